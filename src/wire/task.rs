//! Tasks and versions on the wire.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::wire::problem::Rejection;

/// A named definition.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Task {
    /// Its name.
    #[schema(example = "word-count")]
    pub name: String,
    /// What the first module said about itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The version that plain invocations use: the newest that became ready. `null` until one has.
    pub current_version: Option<i32>,
    /// First upload.
    pub created_at: DateTime<Utc>,
    /// Last change.
    pub updated_at: DateTime<Utc>,
    /// Where to go from here.
    pub links: TaskLinks,
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

/// One uploaded module of a task.
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
    /// `task` (component of the world `sandbar:task`), `command-p1` (WASI preview 1) or `command-p2` (WASI 0.2).
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
    /// Where to go from here.
    pub links: VersionLinks,
}

/// Where to go from a version.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct VersionLinks {
    /// The version.
    #[serde(rename = "self")]
    pub this: String,
    /// Its task.
    pub task: String,
}
