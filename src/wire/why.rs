//! Why an invocation waits, on the wire.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::wire::invocation::State;

/// Why an invocation is where it is.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Why {
    /// The invocation.
    pub id: Uuid,
    /// Where it stands.
    pub state: State,
    /// Every reason that holds, the one that decides first.
    pub reasons: Vec<WhyReason>,
    /// When it may start; absent when it runs, has ended, or nothing is known to base an estimate on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<WhyEstimate>,
}

/// One reason.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WhyReason {
    /// `delay`, `dependency`, `paused`, `task-inactive`, `cap` (as many run as may), `no-worker`, `queue` (others of this
    /// tenant go first), `weight-share` (all slots are taken), `no-memory` (slots are free, memory is not), `next` (nothing is in the way), `running`, `cancelling`
    /// or `finished`. There may be more.
    #[schema(example = "delay")]
    pub kind: String,
    /// The reason in words.
    pub detail: String,
    /// Until when, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<DateTime<Utc>>,
    /// `queue`: how many go first, counted up to 10,000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ahead: Option<i64>,
    /// `weight-share`: the part of the slots that come free which is this tenant's, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    /// `cap`: of the `tenant`, the `task` or the `concurrency-key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<String>,
    /// `cap`: how many may run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<i64>,
    /// `cap`: how many do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current: Option<i64>,
}

/// When it may start, and how that is known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WhyEstimate {
    /// Milliseconds from now.
    pub starts_in_ms: u64,
    /// When that is.
    pub starts_at: DateTime<Utc>,
    /// What it is computed from.
    pub basis: String,
}
