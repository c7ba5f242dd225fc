//! Tasks and versions on the wire.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::wire::invocation::{Backoff, LimitsRequest, RetryRequest};
use crate::wire::patch::Field;
use crate::wire::problem::Rejection;

/// A named definition.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Task {
    /// Its name.
    #[schema(example = "word-count")]
    pub name: String,
    /// What its newest module says about itself, or what was written in its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The version that plain invocations use: the pinned one, or the newest that became ready. `null` until one has.
    pub current_version: Option<i32>,
    /// The version that plain invocations use although there may be a newer one. Absent: they follow the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned_version: Option<i32>,
    /// False: new invocations are refused, and queued ones wait.
    pub active: bool,
    /// Limits of its invocations, in place of the module's own. Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsRequest>,
    /// Retries of its invocations, in place of the module's own. Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<RetryRequest>,
    /// What an admin of the tenant has given it. Absent: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grants: Option<Grants>,
    /// Texts that it reads by `wasi:config`. Absent: none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub config: BTreeMap<String, String>,
    /// First upload.
    pub created_at: DateTime<Utc>,
    /// Last change.
    pub updated_at: DateTime<Utc>,
    /// Where to go from here.
    pub links: TaskLinks,
}

/// A change of a task, as a JSON merge patch (RFC 7396): what is absent stays, `null` goes back to its default.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TaskPatch {
    /// For people; at most 4,096 bytes. `null`: what its newest module says about itself.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<String>)]
    pub description: Field<String>,
    /// Limits of its invocations, over the module's own and under the request's.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<LimitsPatch>)]
    pub limits: Field<LimitsPatch>,
    /// Retries of its invocations, over the module's own and under the request's.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<RetryPatch>)]
    pub retry: Field<RetryPatch>,
    /// What it is given, kind by kind; a kind that is `null`, or `null` for all, is taken away, also from what runs.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<GrantsPatch>)]
    pub grants: Field<GrantsPatch>,
    /// Texts that it reads by `wasi:config`, key by key; a key that is `null`, or `null` for all, is taken away. At most 100
    /// keys of 1 to 128 bytes, and 64 KiB in all. Not for secrets: whoever may see the task sees them.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<BTreeMap<String, Option<String>>>)]
    pub config: Field<BTreeMap<String, Option<String>>>,
    /// False: new invocations are refused, and queued ones wait. `null`: true.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<bool>)]
    pub active: Field<bool>,
    /// The version that plain invocations use; it must be ready. `null`: the newest that is.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<i32>, minimum = 1)]
    pub version: Field<i32>,
}

/// A version without a module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    /// A request that the worker makes itself, under the task's grants.
    pub http: HttpTask,
}

/// A request that is made once in each attempt. Its answer is the output of the invocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpTask {
    /// For people; at most 4,096 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Such as `POST`: 1 to 16 of A-Z and `-`; not `CONNECT`.
    #[schema(example = "POST")]
    pub method: String,
    /// `http://` or `https://`, host, port, path and query; no user, no fragment. The path and query have at most 8 KiB.
    #[schema(example = "https://api.example.com/hooks/orders")]
    pub url: String,
    /// At most 90, and 32 KiB of names and values. A value may hold `{{secret:NAME}}`, as far as a grant allows it.
    /// `content-type` is `application/json` where there is a body and nothing is said. Unless the method is GET, HEAD,
    /// OPTIONS or TRACE, `idempotency-key` is the id of the invocation where nothing is said.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// What is sent; at most 64 KiB. Where it says `{{input}}`, once at most, the invocation's input is put as it is.
    /// Absent: the input alone. An empty body is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = r#"{"text": {{input}}}"#)]
    pub body: Option<String>,
    /// The statuses of success, at most 16. Absent: `2xx`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expect: Vec<Expected>,
    /// Milliseconds until the answer must be complete, 1 to 3,600,000. Absent: the attempt's deadline, which holds anyway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// A status, or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Expected {
    /// This one, 200 to 599.
    One(u16),
    /// `2xx`, `200-204` or `200`.
    Some(String),
}

/// A change of limits; `null`: the module's own, or the installation's.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsPatch {
    /// Fuel. 1 to 10¹³.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<u64>)]
    pub fuel: Field<u64>,
    /// Bytes of memory in all. 64 KiB to 4 GiB.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<u64>)]
    pub memory_bytes: Field<u64>,
    /// Milliseconds from start to end. 1 to 3,600,000.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<u64>)]
    pub timeout_ms: Field<u64>,
    /// Bytes of result. 0 to 16 MiB.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<u64>)]
    pub output_bytes: Field<u64>,
    /// Bytes of log. 0 to 4 MiB.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<u64>)]
    pub log_bytes: Field<u64>,
}

/// A change of retries; `null`: the module's own, or the installation's.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RetryPatch {
    /// Attempts in all. 1 to 100.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<u16>)]
    pub max_attempts: Field<u16>,
    /// Growth of the wait.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<Backoff>)]
    pub backoff: Field<Backoff>,
    /// First wait in milliseconds. 0 to 86,400,000.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<u64>)]
    pub initial_ms: Field<u64>,
    /// Growth per failure. 1 to 100.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<f64>)]
    pub factor: Field<f64>,
    /// Longest wait in milliseconds. 0 to 604,800,000.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<u64>)]
    pub max_ms: Field<u64>,
    /// Share of the wait that is random. 0 to 1.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<f64>)]
    pub jitter: Field<f64>,
}

/// Capabilities of a task.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Grants {
    /// Where its HTTP requests may go: `[http://|https://][*.]host[:port]`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(example = json!(["https://api.example.com:443"]))]
    pub http: Vec<String>,
    /// Its key-value store.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub kv: bool,
    /// Names of the tasks that it may start.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(example = json!(["fetch-page"]))]
    pub invoke: Vec<String>,
    /// Names of the secrets whose values it may see.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(example = json!(["SIGNING_KEY"]))]
    pub secrets: Vec<String>,
    /// Secrets that it may have sent without seeing them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secret_headers: Vec<SecretHeader>,
}

/// A secret that the host puts into a header of requests to one host, where the task writes `{{secret:NAME}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SecretHeader {
    /// Name of the secret.
    #[schema(example = "API_TOKEN")]
    pub secret: String,
    /// Name of the header, in lower case.
    #[schema(example = "authorization")]
    pub header: String,
    /// To whom: `[http://|https://][*.]host[:port]`, besides `http`, which lets the request out.
    #[schema(example = "https://api.example.com")]
    pub host: String,
}

/// A change of what a task is given.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GrantsPatch {
    /// Where its HTTP requests may go, at most 32: `[http://|https://][*.]host[:port]`. Without a scheme by TLS, without
    /// a port the scheme's own; `*.` stands for one label.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<Vec<String>>)]
    pub http: Field<Vec<String>>,
    /// Its key-value store (`wasi:keyvalue`). What is in it stays when the grant goes.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<bool>)]
    pub kv: Field<bool>,
    /// Names of the tasks that it may start (`sandbar:task/invoke`), at most 32.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<Vec<String>>)]
    pub invoke: Field<Vec<String>>,
    /// Names of the secrets whose values it may see (`sandbar:task/secrets`), at most 32.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<Vec<String>>)]
    pub secrets: Field<Vec<String>>,
    /// Secrets that it may have sent without seeing them, at most 32.
    #[serde(skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<Vec<SecretHeader>>)]
    pub secret_headers: Field<Vec<SecretHeader>>,
}

/// Where to go from a task.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TaskLinks {
    /// The task.
    #[serde(rename = "self")]
    pub this: String,
    /// Its versions.
    pub versions: String,
    /// Where to invoke it.
    pub invocations: String,
}

/// Where a version stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VersionState {
    /// Uploaded and looked at; being compiled.
    Compiling,
    /// May be invoked.
    Ready,
    /// Does not compile, for good.
    Rejected,
}

/// One uploaded module of a task, or what stands in its place.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Name of the task.
    pub task: String,
    /// Number, from 1.
    pub version: i32,
    /// Where it stands.
    pub state: VersionState,
    /// Why it was rejected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rejection: Option<Rejection>,
    /// `task` (component of the world `sandbar:task`), `command-p1` (WASI preview 1), `command-p2` (WASI 0.2), or `http` (a
    /// request, and no module).
    #[schema(example = "task")]
    pub kind: String,
    /// SHA-256 of the uploaded bytes, in hexadecimal.
    pub sha256: String,
    /// How many bytes were uploaded.
    pub size_bytes: i64,
    /// What the module says about itself: `description`, `input_schema`, `output_schema`, `limits`, `retry`, `grants`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub manifest: Option<Value>,
    /// When it was uploaded.
    pub created_at: DateTime<Utc>,
    /// While it is in quarantine: nothing of it starts until it is released.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quarantine: Option<Quarantine>,
    /// Where to go from here.
    pub links: VersionLinks,
}

/// A module that was running when two cells died.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Quarantine {
    /// Since when.
    pub since: DateTime<Utc>,
    /// How the second cell died.
    pub reason: String,
}

/// Where to go from a version.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct VersionLinks {
    /// The version.
    #[serde(rename = "self")]
    pub this: String,
    /// Its task.
    pub task: String,
    /// The uploaded bytes.
    pub module: String,
}
