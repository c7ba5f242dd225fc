//! The body of every error answer: RFC 9457, `application/problem+json`.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What went wrong.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Address of the page about this kind of problem.
    #[serde(rename = "type")]
    #[schema(example = "/errors/task-not-found")]
    pub kind: String,
    /// The kind of problem in words; always the same for one `code`.
    pub title: String,
    /// The HTTP status.
    #[schema(example = 404)]
    pub status: u16,
    /// The kind of problem for programs.
    #[schema(example = "task-not-found")]
    pub code: String,
    /// This very problem in words.
    pub detail: String,
    /// What is wrong with the request body, place by place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldProblem>,
    /// Why a module was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rejection: Option<Rejection>,
    /// Which quota was hit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<Quota>,
}

/// A quota that was hit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quota {
    /// Its name.
    #[schema(example = "invocations_per_day")]
    pub name: String,
    /// What it allows.
    pub limit: u64,
    /// What there is, as far as this server knows, or what there would have been.
    pub current: u64,
    /// When it is counted from 0 again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resets_at: Option<DateTime<Utc>>,
}

/// One thing that is wrong with a request body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldProblem {
    /// JSON pointer into the request body; empty for all of it.
    #[schema(example = "/input/name")]
    pub pointer: String,
    /// What is wrong, and what is allowed.
    pub detail: String,
}

/// Why a module was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Rejection {
    /// For programs: `not-wasm`, `text-format`, `truncated`, `invalid`, `unknown-import`, `no-usable-export`,
    /// `wrong-signature`, `over-limit`, `bad-manifest`, `does-not-compile`, `compile-timeout` or `compile-memory`.
    #[schema(example = "unknown-import")]
    pub code: String,
    /// For people: what was expected and what was found.
    pub detail: String,
}
