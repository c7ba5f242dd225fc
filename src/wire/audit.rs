//! The audit log on the wire.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use uuid::Uuid;

/// What became of what somebody wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It was done.
    Done,
    /// It was refused: no valid credential, or one that may not.
    Denied,
}

/// One entry of the audit log.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    /// Its id; ids are in the order of time.
    pub id: Uuid,
    /// When.
    pub at: DateTime<Utc>,
    /// `key`, `user`, `subject` (of an outside issuer) or `nobody`.
    pub actor_kind: String,
    /// Id of the key or user.
    pub actor_id: Option<Uuid>,
    /// Its name at the time.
    pub actor: String,
    /// Address the request came from.
    pub address: Option<String>,
    /// Id of the request.
    pub request_id: Option<String>,
    /// Method and route, like `PATCH /v1/tasks/{task}`.
    pub operation: String,
    /// The action it needed.
    pub action: Option<String>,
    /// The path as called.
    pub target: String,
    /// What became of it.
    pub outcome: Outcome,
    /// HTTP status of the answer.
    pub status: i16,
    /// Code of the problem.
    pub code: Option<String>,
    /// How many equal denials within a second it stands for.
    pub times: i32,
    /// What was, as far as it changed; secrets are masked.
    pub before: Option<Value>,
    /// What is since then; secrets are masked.
    pub after: Option<Value>,
}
