//! What tasks have been given, as it is now: a grant that is taken away is gone for what runs, too. `task` writes it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sqlx::Row as _;
use sqlx::types::Json;

use crate::domain::ids::{InvocationId, TenantId};
use crate::store::kv::AttemptName;
use crate::store::secret::SealedSecret;
use crate::store::task::Setting;
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
    /// Names of the tasks that it may start.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub invoke: Vec<String>,
    /// Names of the secrets that it may see.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// Secrets that it may have sent without seeing them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secret_headers: Vec<SecretHeader>,
}

/// A secret that the host may put into a header of requests to one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretHeader {
    /// Name of the secret.
    pub secret: String,
    /// Name of the header, in lower case.
    pub header: String,
    /// To whom, as [`sandbar_host::egress::grant::HttpGrant`] reads it.
    pub host: String,
}

impl WorkerStore {
    /// What the task of an attempt has been given, and the current versions of these secrets of its tenant, without those
    /// that are not there. `None`: the attempt is not this worker's any more, or has ended.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn attempt_secrets(
        &self,
        attempt: AttemptName,
        names: &[String],
    ) -> Result<Option<(Grants, Vec<SealedSecret>)>> {
        let rows = attempt
            .bind(
                "SELECT h.grants, s.name, s.version, v.sealed, k.master, k.wrapped
                 FROM attempt_task(ROW($1, $2, $3, $4, $5, $6, $7)::attempt_name, false) h
                 LEFT JOIN (secrets s JOIN secret_versions v USING (tenant_id, name, version)
                   JOIN tenant_keys k USING (tenant_id)) ON s.tenant_id = $5 AND s.name = ANY ($8)",
            )
            .bind(names)
            .fetch_all(&self.pool)
            .await?;
        let Some(first) = rows.first() else { return Ok(None) };
        let grants = first.try_get::<Json<Grants>, _>("grants")?.0;
        let mut sealed = Vec::with_capacity(rows.len());
        for row in &rows {
            let Some(name) = row.try_get::<Option<String>, _>("name")? else { continue };
            sealed.push(SealedSecret {
                name,
                version: row.try_get("version")?,
                sealed: row.try_get("sealed")?,
                key: (row.try_get("master")?, row.try_get("wrapped")?),
            });
        }
        Ok(Some((grants, sealed)))
    }

    /// What people have set on the task of an attempt. `None` as above.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn attempt_config(&self, attempt: AttemptName) -> Result<Option<BTreeMap<String, Setting>>> {
        let row = attempt
            .bind(
                "SELECT t.config FROM attempt_task(ROW($1, $2, $3, $4, $5, $6, $7)::attempt_name, false) h
                 JOIN tasks t ON t.tenant_id = $5 AND t.task_id = h.task_id",
            )
            .fetch_optional(&self.pool)
            .await?;
        let Some(row) = row else { return Ok(None) };
        let config = row.try_get::<Option<Json<BTreeMap<String, Setting>>>, _>("config")?;
        Ok(Some(config.map(|json| json.0).unwrap_or_default()))
    }

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
