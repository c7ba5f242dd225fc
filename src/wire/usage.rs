//! The bill over the wire: what attempts cost, by time and task.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a tenant's attempts cost in a range of time.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// Begin of the range: a full hour (UTC).
    pub from: DateTime<Utc>,
    /// End of the range, not included: a full hour (UTC).
    pub to: DateTime<Utc>,
    /// In the order of time, then of tasks.
    pub items: Vec<UsageRow>,
    /// Address of the rest of the range; `null` when this is all.
    pub next: Option<String>,
}

/// What attempts that ended in one hour, one day, or the whole range cost.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct UsageRow {
    /// Begin of the hour or day (UTC), when grouped by time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<DateTime<Utc>>,
    /// Name of the task, when grouped by task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    /// Attempts that ended with a receipt.
    pub attempts: u64,
    /// Those of them that succeeded.
    pub succeeded: u64,
    /// Fuel.
    pub fuel: u64,
    /// CPU time, in nanoseconds.
    pub cpu_ns: u64,
    /// Wall time, in nanoseconds.
    pub wall_ns: u64,
    /// Bytes of inputs.
    pub input_bytes: u64,
    /// Bytes of outputs.
    pub output_bytes: u64,
    /// Bytes of logs that were kept.
    pub log_bytes: u64,
    /// Bytes sent to and received from the outside.
    pub egress_bytes: u64,
}
