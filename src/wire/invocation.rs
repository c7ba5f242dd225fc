//! Invocations, attempts, receipts and logs on the wire.

use std::borrow::Cow;
use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};
use uuid::Uuid;

use crate::wire::patch::Field;
use crate::wire::problem::Problem;

/// A request to run a task. A task takes `input` or `input_base64`; a command takes `args`, `env` and `stdin` or
/// `stdin_base64`.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InvokeRequest {
    /// Input of a task: any JSON. It reaches the task byte for byte as it stands here.
    #[serde(deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<serde_json::Value>)]
    pub input: Option<Box<RawValue>>,
    /// Input of a task: any bytes, in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_base64: Option<String>,
    /// Arguments of a command, after the program's name. At most 1,024.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub args: Option<Vec<String>>,
    /// Environment of a command; nothing else is in it. At most 256.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    /// Standard input of a command, as text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Standard input of a command: any bytes, in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdin_base64: Option<String>,
    /// Version to run. Default: the task's current one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub version: Option<i32>,
    /// Higher is served first among this tenant's invocations. −100 to 100, default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = -100, maximum = 100)]
    pub priority: Option<i16>,
    /// Not before this time; at most 366 days ahead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_at: Option<DateTime<Utc>>,
    /// Not before so many milliseconds from now; not together with `run_at`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay_ms: Option<u64>,
    /// Not to be started after this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<DateTime<Utc>>,
    /// Labels to find it by. At most 16.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// Limits of each attempt, in place of the task's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsRequest>,
    /// What happens after a failed attempt, in place of the task's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry: Option<RetryRequest>,
    /// At most one unfinished invocation of the task under this key. 1 to 255 bytes without control characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unique_key: Option<String>,
    /// What happens when another holds `unique_key`. Default: reject.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unique_policy: Option<UniquePolicy>,
    /// At most `concurrency_limit` running invocations of the task under this key. 1 to 255 bytes without control
    /// characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency_key: Option<String>,
    /// It starts only while fewer than this run under `concurrency_key`. 1 to 10,000, default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 10_000)]
    pub concurrency_limit: Option<u32>,
    /// Invocations that must end first. At most 32.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 32)]
    pub depends_on: Vec<DependsOn>,
    /// What happens when one of them ends otherwise than wanted. Default: cancel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_unmet: Option<OnUnmet>,
    /// Files that a command of WASI preview 1 finds in its scratch directory, which it sees as `/`: path to text, or
    /// to `{"base64": …}`. At most 1,024; they count as input.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, FileContent>,
    /// Patterns of the regular files that come back as artifacts, within the output limit: `*` and `?` stand for
    /// characters of a name, `**` for any directories. At most 16.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub collect: Vec<String>,
    /// Bytes of the scratch directory. 0 to 1 GiB; 64 MiB if `files` or `collect` are given, otherwise there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scratch_bytes: Option<u64>,
    /// Fixes the guest's clocks and random values, so that the same input takes the same course and the same fuel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub determinism: Option<DeterminismRequest>,
}

/// What happens to a request whose `unique_key` an unfinished invocation of the task holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum UniquePolicy {
    /// Refused with `unique-key-taken`.
    Reject,
    /// Answered with the holder.
    Return,
    /// Takes the place of a holder that has not started, which is cancelled; while that runs, refused.
    Replace,
    /// Puts a holder that has not started off until its own `run_at`; while that runs, it waits in its stead.
    Debounce,
}

/// What an unmet condition does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnUnmet {
    /// Ends the invocation: `cancelled`, with the reason `dependency-unmet`.
    Cancel,
    /// Counts as met.
    Run,
}

/// How another invocation must end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    /// Well.
    #[default]
    Succeeded,
    /// Somehow.
    Finished,
    /// Not well: dead, cancelled or expired.
    Failed,
}

/// An invocation that must end first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DependsOn {
    /// Which, of the same tenant.
    pub id: Uuid,
    /// How it must end. Default: succeeded.
    #[serde(default)]
    pub condition: Condition,
}

/// A file's contents: text, or bytes in base64.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum FileContent {
    /// Text.
    Text(String),
    /// Bytes.
    Bytes(FileBytes),
}

/// Any bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FileBytes {
    /// In base64.
    pub base64: String,
}

/// A fixed course.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DeterminismRequest {
    /// Where the guest's wall clock begins; not before 1970. Each look at a clock moves it on by 1 µs.
    pub clock: DateTime<Utc>,
    /// What random values are made from.
    pub seed: u64,
}

/// `null` is an input like any other; only an absent field is none.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Box<RawValue>>, D::Error> {
    Box::<RawValue>::deserialize(deserializer).map(Some)
}

/// Limits of each attempt; what is absent comes from the task, then from the installation.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsRequest {
    /// Fuel. 1 to 10¹³.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fuel: Option<u64>,
    /// Bytes of memory in all. 64 KiB to 4 GiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Milliseconds from start to end. 1 to 3,600,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Bytes of result. 0 to 16 MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_bytes: Option<u64>,
    /// Bytes of log. 0 to 4 MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_bytes: Option<u64>,
}

/// How the wait between attempts grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Backoff {
    /// Always `initial_ms`.
    Fixed,
    /// `initial_ms`, then `factor` times as long after each failure, at most `max_ms`.
    Exponential,
}

/// What happens after a failed attempt; what is absent comes from the task, then from the installation.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RetryRequest {
    /// Attempts in all. 1 to 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<u16>,
    /// Growth of the wait.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backoff: Option<Backoff>,
    /// First wait in milliseconds. 0 to 86,400,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial_ms: Option<u64>,
    /// Growth per failure. 1 to 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    /// Longest wait in milliseconds. 0 to 604,800,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_ms: Option<u64>,
    /// Share of the wait that is random. 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jitter: Option<f64>,
}

/// Where an invocation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Its time has not come: `run_at` ahead, backing off, or waiting for others (`waiting_on`).
    Scheduled,
    /// Waiting for a free slot.
    Queued,
    /// A worker has it.
    Running,
    /// Ended well.
    Succeeded,
    /// Ended badly for good: retries spent, or a fatal error.
    Dead,
    /// Ended because somebody asked for it.
    Cancelled,
    /// Not started before `expires_at`.
    Expired,
}

/// An invocation as lists show it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct InvocationSummary {
    /// Its id; ids made later are greater.
    pub id: Uuid,
    /// Name of the task.
    pub task: String,
    /// Version that runs.
    pub version: i32,
    /// Where it stands.
    pub state: State,
    /// Why it ended: the reason of the last attempt's termination, `cancelled` or `expired`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// True while a cancellation is on its way to the worker.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cancel_requested: bool,
    /// −100 to 100.
    pub priority: i16,
    /// Labels.
    pub tags: BTreeMap<String, String>,
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// Asked for: not before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_at: Option<DateTime<Utc>>,
    /// Asked for: not to be started after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<DateTime<Utc>>,
    /// While scheduled: when it becomes ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due_at: Option<DateTime<Utc>>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<DateTime<Utc>>,
    /// The invocation that it repeats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_of: Option<Uuid>,
    /// Where to go from here.
    pub links: InvocationLinks,
}

/// Where to go from an invocation.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct InvocationLinks {
    /// The invocation.
    #[serde(rename = "self")]
    pub this: String,
    /// Its result.
    pub result: String,
    /// Its log.
    pub logs: String,
    /// Where to cancel it; absent when it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cancel: Option<String>,
    /// Where to run it again; only when it is dead, cancelled or expired.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<String>,
}

/// One invocation.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Invocation {
    /// What lists show too.
    #[serde(flatten)]
    pub summary: InvocationSummary,
    /// Its attempts, first to last.
    pub attempts: Vec<Attempt>,
    /// Limits of each attempt.
    pub limits: Limits,
    /// What happens after a failed attempt.
    pub retry: Retry,
    /// What its guest reported last; stays after the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// How its payloads are kept; absent: as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payloads: Option<Payloads>,
    /// What it waits for before it may be queued.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waiting_on: Vec<DependsOn>,
    /// What came out. Only in answers to `Prefer: wait=…`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<InlineResult>,
}

/// How input, result, artifacts, logs and messages of an invocation are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Payloads {
    /// Sealed at rest by the tenant's data key.
    Sealed,
    /// Erased, or the key is: nobody can have them any more.
    Erased,
}

/// How far an attempt has come, in its guest's own words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// Units done.
    pub done: u64,
    /// Units in all; 0 means unknown.
    pub total: u64,
    /// For people.
    pub message: String,
    /// Attempt that reported it.
    pub attempt: i16,
    /// When it reported it.
    pub at: DateTime<Utc>,
}

/// A change of an invocation, as a JSON merge patch (RFC 7396): what is absent stays.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InvocationPatch {
    /// −100 to 100; only while it is scheduled or queued. `null`: 0.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<i16>, minimum = -100, maximum = 100)]
    pub priority: Field<i16>,
    /// Not before this time, at most 366 days ahead; only while it is scheduled or queued. `null`: at once.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<DateTime<Utc>>)]
    pub run_at: Field<DateTime<Utc>>,
    /// Tags to set or, with `null` as value, to remove; at any time. `null`: remove all.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<BTreeMap<String, Option<String>>>)]
    pub tags: Field<BTreeMap<String, Option<String>>>,
}

/// Many invocations. Each is accepted or refused by itself.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BatchRequest {
    /// 1 to 1,000, queued in this order.
    #[schema(value_type = Vec<BatchItem>, min_items = 1, max_items = 1000)]
    pub invocations: Vec<Box<RawValue>>,
}

/// One invocation of many: an [`InvokeRequest`] with the name of its task and its key. Never made: it is read in two
/// parts, so that an input keeps its bytes, and only its schema is of use.
#[derive(Debug)]
pub enum BatchItem {}

impl PartialSchema for BatchItem {
    fn schema() -> RefOr<Schema> {
        let mut schema = InvokeRequest::schema();
        if let RefOr::T(Schema::Object(object)) = &mut schema {
            let text = |description: &str| {
                ObjectBuilder::new().schema_type(Type::String).description(Some(description)).build()
            };
            object.description =
                Some("One invocation of many, as a request by itself would have it.".to_owned());
            object.properties.insert("task".to_owned(), text("Name of the task.").into());
            object.required.push("task".to_owned());
            let key = text("As the header Idempotency-Key of a single request.");
            object.properties.insert("idempotency_key".to_owned(), key.into());
        }
        schema
    }
}

impl ToSchema for BatchItem {
    fn name() -> Cow<'static, str> {
        "BatchItem".into()
    }

    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        InvokeRequest::schemas(schemas);
    }
}

/// What became of many invocations.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct BatchResponse {
    /// In the order of the request.
    pub outcomes: Vec<BatchOutcome>,
}

/// What became of one of many.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct BatchOutcome {
    /// 202: durable, and will run. 200: the same key and request were accepted before. Otherwise as a single request
    /// would have been answered.
    #[schema(example = 202)]
    pub status: u16,
    /// The invocation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<Uuid>,
    /// Why it was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
}

/// How to run an invocation again.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RetryInvocation {
    /// Version to run. Default: the one that ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub version: Option<i32>,
}

/// Limits of each attempt.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)] // see LimitsRequest
pub struct Limits {
    pub fuel: u64,
    pub memory_bytes: u64,
    pub timeout_ms: u64,
    pub output_bytes: u64,
    pub log_bytes: u64,
}

/// What happens after a failed attempt.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)] // see RetryRequest
pub struct Retry {
    pub max_attempts: u16,
    pub backoff: Backoff,
    pub initial_ms: u64,
    pub factor: f64,
    pub max_ms: u64,
    pub jitter: f64,
}

/// One run of an invocation.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Attempt {
    /// Its number, from 1.
    pub attempt: i16,
    /// Who ran it.
    pub worker: Uuid,
    /// When it began.
    pub started_at: DateTime<Utc>,
    /// When it ended; absent while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<DateTime<Utc>>,
    /// Why it ended; absent while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub termination: Option<Termination>,
    /// What it cost; absent while it runs, and when its worker was lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Receipt>,
    /// Where the guest was when it trapped, innermost frame first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backtrace: Vec<Frame>,
}

/// Why an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum Termination {
    /// The guest returned a result, or exit code 0.
    Succeeded,
    /// The guest returned an error.
    GuestError {
        /// False: the guest said that no attempt will succeed.
        retryable: bool,
        /// The guest's message.
        message: String,
        /// The guest's wish for the next attempt, in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        retry_after_ms: Option<u64>,
    },
    /// A command ended with another code than 0.
    ExitCode {
        /// 1 to 255.
        code: i32,
    },
    /// The guest trapped.
    Trap {
        /// `unreachable`, `memory-out-of-bounds`, `table-out-of-bounds`, `bad-indirect-call`, `arithmetic`,
        /// `bad-host-call` or `other`.
        kind: String,
        /// The engine's words.
        message: String,
    },
    /// The fuel limit was reached.
    OutOfFuel,
    /// The memory limit was reached.
    OutOfMemory,
    /// The guest's stack is exhausted.
    StackOverflow,
    /// The time limit was reached.
    Deadline,
    /// The result was larger than its limit.
    OutputTooLarge,
    /// A quota ended it.
    QuotaExceeded {
        /// Which one.
        quota: String,
    },
    /// It could not go on without a capability that it was not granted.
    Denied {
        /// Which one.
        capability: String,
    },
    /// Somebody asked for its end.
    Cancelled,
    /// Its worker was lost; another attempt takes over.
    LeaseLost,
    /// The host's fault; another attempt takes over.
    HostFault {
        /// For operators.
        message: String,
    },
}

/// What an attempt cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Receipt {
    /// Fuel used.
    pub fuel: u64,
    /// False: after an abort the count may be short by one settling interval.
    pub fuel_exact: bool,
    /// CPU nanoseconds.
    pub cpu_ns: u64,
    /// Nanoseconds from start to end.
    pub wall_ns: u64,
    /// Most memory at once.
    pub peak_memory_bytes: u64,
    /// Bytes of input.
    pub input_bytes: u64,
    /// Bytes of result kept.
    pub output_bytes: u64,
    /// Bytes of result dropped.
    pub output_dropped_bytes: u64,
    /// Bytes of log kept.
    pub log_bytes: u64,
    /// Bytes of log dropped.
    pub log_dropped_bytes: u64,
    /// Bytes sent to and received from other hosts.
    pub egress_bytes: u64,
    /// Calls into the host's capabilities.
    pub host_calls: u64,
}

/// One frame of a guest's backtrace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Frame {
    /// Name of the function.
    pub function: String,
    /// Source file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Line in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
    /// Offset in the module.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module_offset: Option<u64>,
}

/// A result within the invocation: one of `json`, `text` and `base64`, or none of them when it is larger than 64 KiB
/// (then the link `result` has it).
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct InlineResult {
    /// Media type, as the guest named it.
    pub content_type: String,
    /// Size of the result.
    pub size_bytes: i64,
    /// The result, when it says that it is JSON, and is.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<serde_json::Value>)]
    pub json: Option<Box<RawValue>>,
    /// The result, when it says that it is text, and is UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Any other result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
}

/// One page of a log.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct LogPage {
    /// Records in order.
    pub items: Vec<LogRecord>,
    /// `after` of the next page; absent when there is nothing more now. While the invocation runs, more may come after
    /// the last record's `cursor`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// Severity of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // as everywhere
pub enum Level {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
}

/// One record of a log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogRecord {
    /// Its place: `after` for what comes behind it. It stays the same when the attempt ends.
    #[schema(example = "1.17")]
    pub cursor: String,
    /// Attempt that wrote it.
    pub attempt: i16,
    /// When it was written.
    pub at: DateTime<Utc>,
    /// Microseconds since the attempt began.
    pub at_us: u64,
    /// Severity; lines of stdout and stderr are `info`.
    pub level: Level,
    /// `stderr`, or the guest's own name for the place.
    pub target: String,
    /// The message, one line.
    pub message: String,
    /// Structured fields.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub fields: BTreeMap<String, String>,
}

/// Event `state` of a stream: the invocation stands elsewhere now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StateEvent {
    /// Where it stands.
    pub state: State,
    /// The attempt that runs, or the last one that ended; `null` before the first.
    pub attempt: Option<i16>,
}
