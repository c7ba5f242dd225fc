//! Workers and background duties on the wire.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// Where a worker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum WorkerState {
    /// It claims and runs.
    Active,
    /// It claims nothing; what runs goes on.
    Cordoned,
    /// It claims nothing and leaves when what runs has ended.
    Draining,
    /// It left, or was declared dead.
    Gone,
}

/// Memory of a worker, as its last heartbeat said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WorkerMemory {
    /// Resident bytes of its own process.
    pub worker_bytes: i64,
    /// Resident bytes of its cells, the processes that guests run in.
    pub cells_bytes: i64,
    /// Both together.
    pub total_bytes: i64,
    /// Bytes of its machine or its control group, whichever is less.
    pub host_bytes: i64,
}

/// Which walls of the kernel stand around a worker's cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WorkerWalls {
    /// No program that a cell could start gets more privileges than it.
    pub no_new_privileges: bool,
    /// System calls that are not on the list are refused.
    pub seccomp: bool,
    /// No file can be opened.
    pub landlock: bool,
    /// Memory is cleared by the kernel's own list of used pages, which makes cells faster.
    pub pagemap_scan: bool,
}

/// A worker.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Worker {
    /// Its id: new for every start, and after a lost lease.
    pub id: Uuid,
    /// Name of its machine.
    pub host: String,
    /// Version of its program.
    pub version: String,
    /// Where it stands: what is wanted of it, which it hears with its next heartbeat, or that it is gone.
    pub state: WorkerState,
    /// Attempts it can run at once.
    pub slots: i32,
    /// Attempts it had at its last heartbeat. Absent once it is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<i32>,
    /// Memory it had at its last heartbeat. Absent before the first, and once it is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<WorkerMemory>,
    /// Which walls of the kernel stand around its cells. Absent before it has said so, and once it is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub walls: Option<WorkerWalls>,
    /// When it registered.
    pub started_at: DateTime<Utc>,
    /// Its last heartbeat.
    pub last_seen_at: DateTime<Utc>,
    /// When it left or was declared dead. Kept for a day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gone_at: Option<DateTime<Utc>>,
}

/// Where a duty stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DutyState {
    /// It runs now.
    Running,
    /// It waits for its time.
    Idle,
    /// It runs only when asked to.
    Paused,
    /// No server holds it: none runs, or the last has just died.
    Vacant,
}

/// The last run of a duty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DutyRun {
    /// When it began.
    pub started_at: DateTime<Utc>,
    /// How long it took; absent until the first has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<i64>,
    /// Rows it handled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<i64>,
    /// Why it failed; absent when it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A background duty: one server at a time does it, under a lease.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Duty {
    /// Its name.
    pub name: String,
    /// What it does.
    pub description: String,
    /// Where it stands.
    pub state: DutyState,
    /// It runs only when asked to.
    pub paused: bool,
    /// A run was asked for and has not begun.
    pub run_requested: bool,
    /// The server process that holds it; absent when none does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Uuid>,
    /// Since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_since: Option<DateTime<Utc>>,
    /// Milliseconds between runs. Some duties run sooner when they know of work.
    pub interval_ms: i64,
    /// Milliseconds between runs when none are set, by the holder's configuration.
    pub default_interval_ms: i64,
    /// Runs that ended, well or not.
    pub runs: i64,
    /// Runs that failed.
    pub failures: i64,
    /// Rows handled by all runs.
    pub rows_handled: i64,
    /// The last run; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_run: Option<DutyRun>,
}

/// A change of a duty: a merge patch.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DutyPatch {
    /// Milliseconds between runs, 10 to 86,400,000; `null`: the default.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i64>, minimum = 10, maximum = 86_400_000)]
    pub interval_ms: Option<Option<i64>>,
}

/// In a merge patch `null` is a value; only an absent field is none.
fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}
