//! What tasks have been given, as it is now: a grant that is taken away is gone for what runs, too. `task` writes it.

use serde::{Deserialize, Serialize};
use sqlx::types::Json;

use crate::domain::ids::{InvocationId, TenantId};
use crate::store::{Result, WorkerStore};

/// Capabilities of a task.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Grants {
    /// Destinations of HTTP requests, each as [`sandbar_host::egress::grant::HttpGrant`] reads it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub http: Vec<String>,
    /// Its key-value store.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub kv: bool,
}

impl WorkerStore {
    /// What the task of an invocation has been given. Of a task that is gone: nothing.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn grants(&self, tenant: TenantId, invocation: InvocationId) -> Result<Grants> {
        let grants: Option<Option<Json<Grants>>> = sqlx::query_scalar(
            "SELECT t.grants FROM invocations i JOIN tasks t ON t.tenant_id = i.tenant_id AND t.task_id = i.task_id
             WHERE i.tenant_id = $1 AND i.invocation_id = $2 AND t.deleted_at IS NULL",
        )
        .bind(tenant)
        .bind(invocation)
        .fetch_optional(&self.pool)
        .await?;
        Ok(grants.flatten().map(|json| json.0).unwrap_or_default())
    }
}
