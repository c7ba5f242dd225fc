//! Invocations as rows: what was accepted, where they stand, their attempts and results. Reads, and the change of one
//! that waits; every other change is in `queue`.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sandbar_host::cell::Progress;
use sandbar_host::files::{File, Scratch};
use sandbar_host::limits::Limits;
use sandbar_host::outcome::{Frame, Termination};
use sandbar_host::run::Determinism;
use serde::{Deserialize, Serialize, Serializer};
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{Postgres, QueryBuilder, Row};

use crate::domain::admission::Dependency;
use crate::domain::ids::{InvocationId, WorkerId};
use crate::domain::invocation::State;
use crate::domain::names::{Tags, TaskName};
use crate::domain::retry::RetryPolicy;
use crate::store::{Error, Result, TenantConn};

/// What a worker needs besides the input; resolved when the invocation was accepted, so that later changes of the
/// task do not change what was promised.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// How the input reaches the guest.
    pub input: InputKind,
    /// Limits of each attempt.
    #[serde(default, skip_serializing_if = "is_default", serialize_with = "limits_without_names")]
    pub limits: Limits,
    /// What happens after a failure.
    #[serde(default, skip_serializing_if = "is_default", serialize_with = "retry_without_names")]
    pub retry: RetryPolicy,
    /// The invocation that this one repeats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_of: Option<InvocationId>,
    /// The scratch directory; its files stand behind the input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<ScratchSpec>,
    /// Fixed clocks and random values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub determinism: Option<Determinism>,
    /// Where it belongs, if an attempt started it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<Family>,
    /// The data key that seals all payloads of this invocation; `None`: they are plain, for good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<String>,
}

/// The place of an invocation among those that go back to one that nobody started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Family {
    /// That one.
    pub root: InvocationId,
    /// Starts between the two.
    pub depth: u16,
}

/// Bytes by which what is sealed is longer than what it was, unless that is empty (`app::sealed`).
pub const SEALED_BYTES: i32 = 29;

/// How the payloads of an invocation are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kept {
    /// The data key that seals them; `None`: they are plain.
    pub sealed: Option<String>,
    /// When they were erased.
    pub erased_at: Option<DateTime<Utc>>,
}

fn kept(row: &PgRow) -> Result<Kept> {
    Ok(Kept { sealed: row.try_get("sealed")?, erased_at: row.try_get("erased_at")? })
}

/// The columns of [`Kept`].
const KEPT: &str = "i.spec ->> 'sealed' AS sealed, i.erased_at";

/// A scratch directory, with its files apart from their bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScratchSpec {
    /// Bytes it may hold.
    pub bytes: u64,
    /// Paths and sizes, in the order in which the bytes stand behind the input.
    pub files: Vec<(String, u64)>,
    /// Patterns of what comes back.
    pub collect: Vec<String>,
}

impl ScratchSpec {
    /// The input proper, and the scratch directory with its files; `None` if the bytes are fewer than they should be.
    #[must_use]
    pub fn unstow<'a>(&self, stored: &'a [u8]) -> Option<(&'a [u8], Scratch)> {
        let sizes: u64 = self.files.iter().map(|(_, size)| *size).sum();
        let (input, mut rest) =
            stored.split_at_checked(stored.len().checked_sub(usize::try_from(sizes).ok()?)?)?;
        let mut files = Vec::with_capacity(self.files.len());
        for (path, size) in &self.files {
            let (bytes, behind) = rest.split_at_checked(usize::try_from(*size).ok()?)?;
            files.push(File { path: path.clone(), bytes: bytes.to_vec() });
            rest = behind;
        }
        Some((input, Scratch { bytes: self.bytes, files, collect: self.collect.clone() }))
    }
}

/// Every invocation carries its limits and its retry policy: the names of their fields would be a fifth of what it
/// writes. Serde reads a struct from a list as well as from a map, in the order of the fields; a field that comes later
/// goes to the end and takes its default in older rows. What is as the defaults are is not written at all, so they
/// belong to the format: another default needs a migration that writes the old one into the rows without.
fn limits_without_names<S: Serializer>(
    limits: &Limits,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    let Limits { fuel, memory_bytes, timeout_ms, output_bytes, log_bytes } = *limits;
    (fuel, memory_bytes, timeout_ms, output_bytes, log_bytes).serialize(serializer)
}

fn retry_without_names<S: Serializer>(
    retry: &RetryPolicy,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    let RetryPolicy { max_attempts, backoff, initial_ms, factor, max_ms, jitter } = retry;
    (max_attempts, backoff, initial_ms, factor, max_ms, jitter).serialize(serializer)
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// How the input reaches the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum InputKind {
    /// As the argument of `run`.
    Task,
    /// As stdin, with these arguments and variables.
    Command {
        /// Arguments after the program's name.
        args: Vec<String>,
        /// Environment; nothing else is in it.
        env: BTreeMap<String, String>,
    },
    /// No guest: as the body of the request that the version describes.
    Http,
}

/// What is the same in a list and alone.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Its id.
    pub id: InvocationId,
    /// Name of the task.
    pub task: String,
    /// Version that runs.
    pub version: i32,
    /// Where it stands: derived from which table has it, in one statement.
    pub state: State,
    /// Why it ended; `None` before.
    pub reason: Option<String>,
    /// −100 to 100.
    pub priority: i16,
    /// Labels.
    pub tags: BTreeMap<String, String>,
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// Asked for: not before.
    pub run_at: Option<DateTime<Utc>>,
    /// Asked for: not to be started after.
    pub expires_at: Option<DateTime<Utc>>,
    /// While scheduled: when it becomes ready.
    pub due_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub finished_at: Option<DateTime<Utc>>,
    /// The invocation that it repeats.
    pub retry_of: Option<InvocationId>,
}

/// One invocation with everything but its input.
#[derive(Debug, Clone)]
pub struct Invocation {
    /// What lists show too.
    pub summary: Summary,
    /// A cancellation has been asked for and is on its way.
    pub cancelling: bool,
    /// Limits of each attempt.
    pub limits: Limits,
    /// What happens after a failure.
    pub retry: RetryPolicy,
    /// Attempts that ended, first to last.
    pub attempts: Vec<AttemptRow>,
    /// The attempt that runs now.
    pub running: Option<RunningAttempt>,
    /// What it waits for before it may be queued.
    pub waiting_on: Vec<Dependency>,
    /// What came out, when it has ended with an output.
    pub output: Option<Output>,
    /// What a guest of it reported last.
    pub progress: Option<ProgressRow>,
    /// How its payloads are kept: as long as nobody has opened them, they are as they are stored.
    pub kept: Kept,
    /// The key of its payloads is gone.
    pub lost: bool,
}

/// A report of progress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgressRow {
    /// Attempt that reported it.
    pub attempt: i16,
    /// The report.
    pub report: Progress,
    /// When it came.
    pub at: DateTime<Utc>,
}

/// An invocation as a retry needs it.
#[derive(Debug, Clone)]
pub struct Repeatable {
    /// Name of its task.
    pub task: TaskName,
    /// The task is gone; another may have its name.
    pub task_deleted: bool,
    /// Version that ran.
    pub version: i32,
    /// Where it stands, if it has ended.
    pub ended: Option<State>,
    /// −100 to 100.
    pub priority: i16,
    /// Input of a task, stdin of a command.
    pub input: Vec<u8>,
    /// The rest of what a worker needs.
    pub spec: Spec,
    /// Labels.
    pub tags: BTreeMap<String, String>,
    /// Its payloads were erased.
    pub erased: bool,
}

/// A change of an invocation, checked.
#[derive(Debug, Clone, Default)]
pub struct InvocationChange {
    /// Its new priority.
    pub priority: Option<i16>,
    /// Its new time; inside, `None`: at once.
    pub run_at: Option<Option<DateTime<Utc>>>,
    /// The tags it has go first.
    pub reset_tags: bool,
    /// Tags to set; `None`: to remove.
    pub tags: BTreeMap<String, Option<String>>,
}

/// What a change of an invocation met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changed {
    /// It was changed. True: it may be claimed now.
    Done(bool),
    /// There is no such invocation.
    Unknown,
    /// It runs.
    Started,
    /// It has ended.
    Finished,
    /// It would have too many tags.
    TooManyTags,
    /// Its new time is not before its expiry.
    Expired,
}

/// An output, or word of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Media type as the guest named it.
    pub content_type: String,
    /// Size.
    pub size_bytes: i64,
    /// The bytes, unless there are more of them than were asked for.
    pub bytes: Option<Vec<u8>>,
}

/// An attempt that ended. Receipt fields are `None` when nobody lived to count.
#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)] // the fields of `sandbar_host::outcome::Receipt`
pub struct AttemptRow {
    pub attempt: i16,
    pub worker_id: WorkerId,
    pub started_at: DateTime<Utc>,
    pub finished_at: DateTime<Utc>,
    pub termination: Termination,
    pub fuel: Option<u64>,
    pub fuel_exact: Option<bool>,
    pub cpu_ns: Option<u64>,
    pub wall_ns: Option<u64>,
    pub peak_memory_bytes: Option<u64>,
    pub input_bytes: Option<u64>,
    pub output_bytes: Option<u64>,
    pub output_dropped_bytes: Option<u64>,
    pub log_bytes: Option<u64>,
    pub log_dropped_bytes: Option<u64>,
    pub egress_bytes: Option<u64>,
    pub host_calls: Option<u64>,
    pub backtrace: Option<Vec<Frame>>,
}

/// An attempt that runs now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunningAttempt {
    /// Its number.
    pub attempt: i16,
    /// Who has it.
    pub worker: WorkerId,
    /// When it was claimed.
    pub started_at: DateTime<Utc>,
}

/// An invocation as far as its result goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResultRow {
    /// It has not ended.
    Unfinished,
    /// It ended in this state and left nothing.
    Nothing(State),
    /// It ended and left this.
    Output(Output),
}

/// What an erasure met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Erased {
    /// The payloads are gone.
    Done,
    /// It has not ended.
    Open,
    /// There is no such invocation.
    Unknown,
}

/// Which invocations a list shows.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// In this state.
    pub state: Option<State>,
    /// Of this task.
    pub task: Option<TaskName>,
    /// With all of these tags.
    pub tags: Vec<(String, String)>,
    /// Older than this one.
    pub after: Option<InvocationId>,
}

/// An invocation in none of the waiting places and without a result is with a worker: every move between places is
/// one transaction, and one statement sees one snapshot.
pub(super) const STATE: &str =
    "CASE WHEN r.invocation_id IS NOT NULL THEN r.state WHEN q.invocation_id IS NOT NULL THEN 'queued'
  WHEN s.invocation_id IS NOT NULL THEN 'scheduled' ELSE 'running' END AS state";

const COLUMNS: &str =
    "i.invocation_id, t.name, i.version, i.priority, i.tags, i.run_at, i.expires_at, i.created_at,
  s.due_at, r.reason, r.finished_at, i.spec ->> 'retry_of' AS retry_of";

/// The row of an invocation and its place in the queue's order, which is computed below a fence: behind a policy Postgres
/// looks up by a value, not by an expression that might leak it, and would read the whole queue of the tenant.
macro_rules! ranked {
    () => {
        "x.*, rank_of(x.created_at, x.run_at, x.priority) AS rank FROM invocations x"
    };
}
/// The invocation `$2` of the tenant `$1`.
pub(super) const ONE: &str =
    concat!("(SELECT ", ranked!(), " WHERE x.tenant_id = $1 AND x.invocation_id = $2 OFFSET 0) i");

// One look by the key for each row, whatever statistics say or do not say yet: a plan that joins whole tables is good while
// they are small, and tables of this kind are small when they are looked at and large a second later.
pub(super) const RESULT: &str = "LATERAL (SELECT * FROM results x WHERE x.tenant_id = i.tenant_id AND x.invocation_id = i.invocation_id OFFSET 0) r ON true";
/// Needs `i.rank`.
pub(super) const READY: &str =
    "LATERAL (SELECT * FROM queued x WHERE x.tenant_id = i.tenant_id AND x.rank = i.rank AND x.invocation_id = i.invocation_id
       OFFSET 0) q ON true";
pub(super) const SCHEDULED: &str = "LATERAL (SELECT * FROM scheduled x WHERE x.tenant_id = i.tenant_id AND x.invocation_id = i.invocation_id OFFSET 0) s ON true";
const TASK: &str = "tasks t ON t.tenant_id = i.tenant_id AND t.task_id = i.task_id";

fn state(word: &str) -> Result<State> {
    word.parse().map_err(|e: crate::domain::invocation::UnknownState| Error::Corrupt(e.to_string()))
}

fn summary(row: &PgRow) -> Result<Summary> {
    Ok(Summary {
        id: row.try_get("invocation_id")?,
        task: row.try_get("name")?,
        version: row.try_get("version")?,
        state: state(row.try_get("state")?)?,
        reason: row.try_get("reason")?,
        priority: row.try_get("priority")?,
        tags: row.try_get::<Json<_>, _>("tags")?.0,
        created_at: row.try_get("created_at")?,
        run_at: row.try_get("run_at")?,
        expires_at: row.try_get("expires_at")?,
        due_at: row.try_get("due_at")?,
        finished_at: row.try_get("finished_at")?,
        retry_of: row
            .try_get::<Option<&str>, _>("retry_of")?
            .map(str::parse)
            .transpose()
            .map_err(|_| Error::Corrupt("retry_of is not an id".to_owned()))?,
    })
}

impl TenantConn {
    /// One invocation with its attempts, and with its output if that has at most `inline_bytes` bytes.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invocation_get(
        &mut self,
        id: InvocationId,
        inline_bytes: i32,
    ) -> Result<Option<Invocation>> {
        let tenant = self.tenant();
        let longer = format!(
            "CASE WHEN i.spec ? 'sealed' AND octet_length(r.output) > 0 THEN {SEALED_BYTES} ELSE 0 END"
        );
        let row = sqlx::query(&format!(
            "SELECT {COLUMNS}, {STATE}, i.spec -> 'limits' AS limits, i.spec -> 'retry' AS retry,
               r.content_type, {KEPT}, octet_length(r.output) - {longer} AS size,
               CASE WHEN octet_length(r.output) - {longer} <= $3 THEN r.output END AS output,
               r.invocation_id IS NULL AND EXISTS (SELECT 1 FROM cancels c
                 WHERE c.tenant_id = i.tenant_id AND c.invocation_id = i.invocation_id) AS cancelling,
               (SELECT jsonb_agg(to_jsonb(a) ORDER BY a.attempt) FROM attempts a
                 WHERE a.tenant_id = i.tenant_id AND a.invocation_id = i.invocation_id) AS attempts,
               (SELECT jsonb_agg(jsonb_build_object('id', d.on_id, 'condition', d.condition) ORDER BY d.on_id) FROM dependencies d
                 WHERE s.invocation_id IS NOT NULL AND d.tenant_id = i.tenant_id AND d.invocation_id = i.invocation_id) AS waiting_on,
               u.attempt AS running, u.worker_id, u.started_at, p.attempt AS progress_attempt, p.report, p.at AS progress_at
             FROM {ONE} JOIN {TASK} LEFT JOIN {RESULT} LEFT JOIN {READY} LEFT JOIN {SCHEDULED}
             LEFT JOIN LATERAL (SELECT * FROM running_attempts(ARRAY[i.invocation_id])
               WHERE r.invocation_id IS NULL AND q.invocation_id IS NULL AND s.invocation_id IS NULL LIMIT 1) u ON true
             LEFT JOIN progress p ON p.tenant_id = i.tenant_id AND p.invocation_id = i.invocation_id"
        ))
        .bind(tenant)
        .bind(id)
        .bind(inline_bytes)
        .fetch_optional(&mut **self)
        .await?;
        let Some(row) = row else { return Ok(None) };
        let running = match row.try_get::<Option<i16>, _>("running")? {
            Some(attempt) => Some(RunningAttempt {
                attempt,
                worker: row.try_get("worker_id")?,
                started_at: row.try_get("started_at")?,
            }),
            None => None,
        };
        let size: Option<i32> = row.try_get("size")?;
        Ok(Some(Invocation {
            summary: summary(&row)?,
            cancelling: row.try_get("cancelling")?,
            limits: row.try_get::<Option<Json<_>>, _>("limits")?.map_or_else(Limits::default, |json| json.0),
            retry: row
                .try_get::<Option<Json<_>>, _>("retry")?
                .map_or_else(RetryPolicy::default, |json| json.0),
            attempts: row.try_get::<Option<Json<_>>, _>("attempts")?.map(|json| json.0).unwrap_or_default(),
            running,
            waiting_on: row
                .try_get::<Option<Json<_>>, _>("waiting_on")?
                .map(|json| json.0)
                .unwrap_or_default(),
            output: match size {
                Some(size) => Some(Output {
                    content_type: row.try_get::<Option<String>, _>("content_type")?.unwrap_or_default(),
                    size_bytes: i64::from(size),
                    bytes: row.try_get("output")?,
                }),
                None => None,
            },
            progress: match row.try_get::<Option<Json<Progress>>, _>("report")? {
                Some(Json(report)) => Some(ProgressRow {
                    attempt: row.try_get("progress_attempt")?,
                    report,
                    at: row.try_get("progress_at")?,
                }),
                None => None,
            },
            kept: kept(&row)?,
            lost: false,
        }))
    }

    /// What a retry of an invocation needs. `None`: no such invocation.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invocation_repeatable(&mut self, id: InvocationId) -> Result<Option<Repeatable>> {
        let tenant = self.tenant();
        let row = sqlx::query(&format!(
            "SELECT t.name, t.deleted_at IS NOT NULL AS deleted, i.version, i.priority, i.input, i.spec, i.tags, r.state,
               i.erased_at IS NOT NULL AS erased FROM invocations i JOIN {TASK} LEFT JOIN {RESULT} WHERE i.tenant_id = $1 AND i.invocation_id = $2"
        ))
        .bind(tenant)
        .bind(id)
        .fetch_optional(&mut **self)
        .await?;
        row.map(|row| {
            Ok(Repeatable {
                task: TaskName::try_from(row.try_get::<String, _>("name")?)
                    .map_err(|error| Error::Corrupt(error.to_string()))?,
                task_deleted: row.try_get("deleted")?,
                version: row.try_get("version")?,
                ended: row.try_get::<Option<&str>, _>("state")?.map(state).transpose()?,
                priority: row.try_get("priority")?,
                input: row.try_get("input")?,
                spec: row.try_get::<Json<Spec>, _>("spec")?.0,
                tags: row.try_get::<Json<_>, _>("tags")?.0,
                erased: row.try_get("erased")?,
            })
        })
        .transpose()
    }

    /// Change an invocation while it waits; its tags at any time.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invocation_change(
        &mut self,
        id: InvocationId,
        change: &InvocationChange,
    ) -> Result<Changed> {
        let word: String = sqlx::query_scalar("SELECT change_invocation($1, $2, $3, $4, $5, $6, $7)")
            .bind(id)
            .bind(change.priority)
            .bind(change.run_at.is_some())
            .bind(change.run_at.flatten())
            .bind(change.reset_tags)
            .bind(Json(&change.tags))
            .bind(i32::try_from(Tags::MAX_COUNT).unwrap_or(i32::MAX))
            .fetch_one(&mut **self)
            .await?;
        Ok(match word.as_str() {
            "ready" => Changed::Done(true),
            "changed" => Changed::Done(false),
            "started" => Changed::Started,
            "finished" => Changed::Finished,
            "tags" => Changed::TooManyTags,
            "expiry" => Changed::Expired,
            _ => Changed::Unknown,
        })
    }

    /// Whether an invocation has ended.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invocation_finished(&mut self, id: InvocationId) -> Result<bool> {
        let tenant = self.tenant();
        Ok(sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM results WHERE tenant_id = $1 AND invocation_id = $2)",
        )
        .bind(tenant)
        .bind(id)
        .fetch_one(&mut **self)
        .await?)
    }

    /// Erase the payloads of an invocation that has ended.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invocation_erase(&mut self, id: InvocationId) -> Result<Erased> {
        let word: String =
            sqlx::query_scalar("SELECT erase_payloads($1)").bind(id).fetch_one(&mut **self).await?;
        Ok(match word.as_str() {
            "erased" => Erased::Done,
            "open" => Erased::Open,
            _ => Erased::Unknown,
        })
    }

    /// How the payloads of an invocation are kept. `None`: no such invocation.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invocation_kept(&mut self, id: InvocationId) -> Result<Option<Kept>> {
        let tenant = self.tenant();
        let row = sqlx::query(&format!(
            "SELECT {KEPT} FROM invocations i WHERE i.tenant_id = $1 AND i.invocation_id = $2"
        ))
        .bind(tenant)
        .bind(id)
        .fetch_optional(&mut **self)
        .await?;
        row.as_ref().map(kept).transpose()
    }

    /// What an invocation left, as it is stored. `None`: no such invocation.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invocation_result(&mut self, id: InvocationId) -> Result<Option<(ResultRow, Kept)>> {
        let tenant = self.tenant();
        let row = sqlx::query(&format!(
            "SELECT r.state, r.output, r.content_type, {KEPT} FROM invocations i LEFT JOIN {RESULT}
             WHERE i.tenant_id = $1 AND i.invocation_id = $2"
        ))
        .bind(tenant)
        .bind(id)
        .fetch_optional(&mut **self)
        .await?;
        let Some(row) = row else { return Ok(None) };
        let kept = kept(&row)?;
        let Some(word) = row.try_get::<Option<&str>, _>("state")? else {
            return Ok(Some((ResultRow::Unfinished, kept)));
        };
        let state = state(word)?;
        let left = match row.try_get::<Option<Vec<u8>>, _>("output")? {
            // A failure without a word on stdout is a failure without output; a success may be empty.
            Some(bytes) if state == State::Succeeded || !bytes.is_empty() => ResultRow::Output(Output {
                content_type: row.try_get::<Option<String>, _>("content_type")?.unwrap_or_default(),
                size_bytes: i64::try_from(bytes.len()).unwrap_or(i64::MAX),
                bytes: Some(bytes),
            }),
            _ => ResultRow::Nothing(state),
        };
        Ok(Some((left, kept)))
    }

    /// Invocations that pass the filter, newest first; at most `limit`.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invocation_list(&mut self, filter: &Filter, limit: i64) -> Result<Vec<Summary>> {
        let tenant = self.tenant();
        let mut sql: QueryBuilder<'_, Postgres> =
            QueryBuilder::new(format!("SELECT {COLUMNS}, {STATE} FROM (SELECT {}", ranked!()));
        // The place that a state names drives the query, so that its cost follows what is there, not all that was.
        let place = match filter.state {
            None => None,
            Some(State::Queued) => Some("queued d ON d.tenant_id = x.tenant_id"),
            Some(State::Scheduled) => Some("scheduled d ON d.tenant_id = x.tenant_id"),
            // It knows of one tenant only.
            Some(State::Running) => Some("running_attempts() d ON true"),
            Some(_) => Some("results d ON d.tenant_id = x.tenant_id"),
        };
        if let Some(place) = place {
            sql.push(format_args!(" JOIN {place} AND d.invocation_id = x.invocation_id"));
        }
        sql.push(" WHERE x.tenant_id = ").push_bind(tenant);
        if let Some(state) = filter.state.filter(|state| state.is_terminal()) {
            // Spelled out, because a parameter would not match the predicate of the partial index.
            sql.push(format_args!(" AND d.state = '{}'", state.as_str()));
        }
        if let Some(task) = &filter.task {
            // Those of deleted tasks of the name too.
            sql.push(" AND x.task_id IN (SELECT n.task_id FROM tasks n WHERE n.tenant_id = ")
                .push_bind(tenant)
                .push(" AND n.name = ")
                .push_bind(task.as_str())
                .push(")");
        }
        for (key, value) in &filter.tags {
            sql.push(
                " AND EXISTS (SELECT 1 FROM invocation_tags g WHERE g.tenant_id = x.tenant_id AND g.key = ",
            )
            .push_bind(key)
            .push(" AND g.value = ")
            .push_bind(value)
            .push(" AND g.invocation_id = x.invocation_id)");
        }
        if let Some(after) = filter.after {
            sql.push(" AND x.invocation_id < ").push_bind(after);
        }
        if filter.state == Some(State::Running) {
            // Of those that are leased some may have ended or wait again: which, is seen further out.
            sql.push(" OFFSET 0");
        } else {
            sql.push(" ORDER BY x.invocation_id DESC LIMIT ").push_bind(limit);
        }
        sql.push(format_args!(") i JOIN {TASK} LEFT JOIN {RESULT} LEFT JOIN {READY} LEFT JOIN {SCHEDULED}"));
        if filter.state == Some(State::Running) {
            sql.push(
                " WHERE r.invocation_id IS NULL AND q.invocation_id IS NULL AND s.invocation_id IS NULL",
            );
        }
        sql.push(" ORDER BY i.invocation_id DESC LIMIT ").push_bind(limit);
        // Planned with the values at hand: a plan for any tag would be wrong for most.
        sql.build().persistent(false).fetch_all(&mut **self).await?.iter().map(summary).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_spec_is_read_as_it_was_written_and_as_it_used_to_be_written() {
        let retry = RetryPolicy { max_attempts: 9, factor: 1.5, jitter: 0.25, ..RetryPolicy::default() };
        let limits = Limits { fuel: 7, log_bytes: 8, ..Limits::default() };
        let spec = Spec {
            input: InputKind::Task,
            limits,
            retry: retry.clone(),
            retry_of: None,
            scratch: None,
            determinism: None,
            family: None,
            sealed: None,
        };
        let text = serde_json::to_string(&spec).unwrap();
        assert!(!text.contains("memory_bytes"), "{text}");
        assert_eq!(serde_json::from_str::<Spec>(&text).unwrap(), spec);
        let named = serde_json::json!({"input": {"kind": "task"}, "limits": limits, "retry": retry});
        assert_eq!(serde_json::from_value::<Spec>(named).unwrap(), spec);
        // Of the defaults nothing is written, so rows depend on them for good: these figures never change.
        let plain = Spec { limits: Limits::default(), retry: RetryPolicy::default(), ..spec };
        let text = serde_json::to_string(&plain).unwrap();
        assert_eq!(text, r#"{"input":{"kind":"task"}}"#);
        assert_eq!(serde_json::from_str::<Spec>(&text).unwrap(), plain);
        let written = serde_json::json!({"input": {"kind": "task"},
            "limits": [100_000_000_000u64, 67_108_864, 60_000, 1_048_576, 262_144],
            "retry": [3, "exponential", 1_000, 2.0, 300_000, 0.5]});
        assert_eq!(serde_json::from_value::<Spec>(written).unwrap(), plain);
        // A field that this row does not know has its default.
        let shorter: Limits = serde_json::from_str("[5, 65536]").unwrap();
        assert_eq!(shorter, Limits { fuel: 5, memory_bytes: 65536, ..Limits::default() });
    }
}
