//! Bulk operations and pauses on the wire.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::wire::invocation::State;

/// What is done to each invocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum BulkAction {
    /// Cancel it: scheduled, queued or running.
    Cancel,
    /// Give it another priority: scheduled or queued.
    Reprioritise,
    /// Run it again as a new one: dead, cancelled or expired. Dead ones that were run again are left out.
    Retry,
    /// Delete it for good: dead.
    Purge,
}

/// Which invocations: those that pass all of it. An empty filter means all of the tenant.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BulkFilter {
    /// In one of these states. Default: those that the action is for; of `retry` only `dead`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub state: Vec<State>,
    /// Of this task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    /// With all of these tags.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// Accepted after this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_after: Option<DateTime<Utc>>,
    /// Accepted before this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_before: Option<DateTime<Utc>>,
    /// Dead letters of this kind of failure: sixteen hexadecimal digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// Dead letters with this reason, such as `trap`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// A request for a bulk operation.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BulkRequest {
    /// What to do.
    pub action: BulkAction,
    /// To which.
    pub filter: BulkFilter,
    /// Only count.
    #[serde(default)]
    pub dry_run: bool,
    /// `reprioritise`: the new priority, −100 to 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<i16>,
    /// `retry`: version to run instead of the one that failed; needs a task in the filter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<i32>,
    /// So many a second, 1 to 10,000. Default: as fast as it goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_per_second: Option<i32>,
}

/// The answer to a dry run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BulkCount {
    /// How many pass the filter now.
    pub matched: i64,
    /// True: counted. False: counting took too long, and this is the database's estimate.
    pub exact: bool,
}

/// Where a bulk operation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum BulkState {
    /// It has not begun.
    Waiting,
    /// Some pages are done.
    Running,
    /// It is over.
    Done,
    /// Somebody stopped it; what was done stays done.
    Cancelled,
    /// It could not go on.
    Failed,
}

/// A bulk operation.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct BulkOperation {
    /// Its id. Invocations that were accepted after it are not touched.
    pub id: Uuid,
    /// What it does.
    pub action: BulkAction,
    /// To which.
    pub filter: BulkFilter,
    /// The new priority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<i16>,
    /// Version to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<i32>,
    /// So many a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_per_second: Option<i32>,
    /// Where it stands.
    pub state: BulkState,
    /// How many passed the filter when it was accepted.
    pub expected: BulkCount,
    /// How many passed the filter when it came to them.
    pub matched: i64,
    /// Of those, done.
    pub done: i64,
    /// Of those, had moved on before it was their turn.
    pub skipped: i64,
    /// Of those, could not be done.
    pub failed: i64,
    /// Why the last of those could not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// When its first page was done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<DateTime<Utc>>,
    /// Where to go from here.
    pub links: BulkLinks,
}

/// Where to go from a bulk operation.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct BulkLinks {
    /// The operation.
    #[serde(rename = "self")]
    pub this: String,
    /// Where to stop it; absent when it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cancel: Option<String>,
}

/// Something to pause: what waits of it waits on, what comes waits too, what runs goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum PauseTarget {
    /// Everything of this tenant.
    Tenant {},
    /// One task.
    Task {
        /// Its name.
        task: String,
    },
    /// Invocations with one tag.
    Tag {
        /// Its key.
        key: String,
        /// Its value.
        value: String,
    },
}

/// A pause.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Pause {
    /// Its id: delete it to resume.
    pub id: Uuid,
    /// What is paused.
    pub target: PauseTarget,
    /// Since when.
    pub created_at: DateTime<Utc>,
}
