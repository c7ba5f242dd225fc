//! Dead letters on the wire.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// An invocation that ended badly for good.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DeadLetter {
    /// The invocation.
    pub id: Uuid,
    /// Name of its task.
    pub task: String,
    /// Version that ran.
    pub version: i32,
    /// Reason of the last attempt's termination.
    #[schema(example = "trap")]
    pub reason: String,
    /// Which kind of failure, as sixteen hexadecimal digits: the same for those that failed in the same way. Absent for
    /// the moment until somebody has looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// The failure in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// Attempts it had.
    pub attempts: i64,
    /// When it died.
    pub died_at: DateTime<Utc>,
    /// What it was run again as, the last time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redriven_as: Option<Uuid>,
    /// When.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redriven_at: Option<DateTime<Utc>>,
    /// Where to go from here.
    pub links: DeadLetterLinks,
}

/// Where to go from a dead letter.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DeadLetterLinks {
    /// The invocation with its attempts, receipts and backtraces.
    pub invocation: String,
    /// Its log.
    pub logs: String,
    /// Where to run it again.
    pub redrive: String,
}

/// Dead letters of one task that failed in the same way.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DeadLetterGroup {
    /// Name of the task.
    pub task: String,
    /// Which kind of failure. Absent: not looked at yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// Reason of the newest.
    pub reason: String,
    /// The newest in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// How many.
    pub count: i64,
    /// When the first of them died.
    pub first_at: DateTime<Utc>,
    /// When the last of them died.
    pub last_at: DateTime<Utc>,
    /// The newest of them.
    pub newest: Uuid,
    /// All of them.
    pub link: String,
}
