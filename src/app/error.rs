//! Why a request was not done, without a word about HTTP: `api::problem` gives each its status and its page.

use chrono::{DateTime, Utc};
use sandbar_host::ModuleKind;
use sandbar_host::inspect::Rejection;

use crate::app::flush::Refused;
use crate::domain::ids::{InvocationId, WorkerId};
use crate::domain::invocation::State;
use crate::store;

/// Result of an application call.
pub type Result<T> = std::result::Result<T, Error>;

/// One thing that is wrong with a request body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// JSON pointer into the request body.
    pub pointer: String,
    /// What is wrong, and what is allowed.
    pub detail: String,
}

impl FieldError {
    /// One error.
    pub fn new(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), detail: detail.into() }
    }
}

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such task of this tenant.
    #[error("there is no task `{0}`")]
    TaskNotFound(String),
    /// Somebody switched the task off.
    #[error("task `{0}` is inactive: it accepts nothing new until it is active again")]
    TaskInactive(String),
    /// It has open invocations.
    #[error("task `{0}` has open invocations; wait for their end, or delete with cancel=true")]
    TaskInUse(String),
    /// The task has no such version.
    #[error("task `{task}` has no version {version}")]
    VersionNotFound {
        /// The task.
        task: String,
        /// The number asked for.
        version: i32,
    },
    /// Nothing to run yet.
    #[error("version {version} of task `{task}` is still being compiled")]
    VersionNotReady {
        /// The task.
        task: String,
        /// The version that is awaited.
        version: i32,
    },
    /// Nothing to run, for good.
    #[error("version {version} of task `{task}` was rejected: {rejection}")]
    VersionRejected {
        /// The task.
        task: String,
        /// The version.
        version: i32,
        /// Why.
        rejection: Rejection,
    },
    /// The uploaded bytes are no module that can run here.
    #[error("{}", .0.detail)]
    ModuleRejected(Rejection),
    /// The uploaded bytes are too many.
    #[error("a module may have at most {max} bytes")]
    ModuleTooLarge {
        /// The limit.
        max: u64,
    },
    /// The client stopped sending.
    #[error("the upload stalled: nothing came for {seconds} s, or it took too long in all")]
    UploadStalled {
        /// Longest pause.
        seconds: u64,
    },
    /// The client broke the connection or its encoding.
    #[error("the upload broke off: {0}")]
    UploadBroken(String),
    /// No such invocation of this tenant.
    #[error("there is no invocation {0}")]
    InvocationNotFound(InvocationId),
    /// It has not ended.
    #[error("the invocation is {0}; it has no result yet")]
    NotFinished(State),
    /// It ended and left nothing.
    #[error("the invocation is {0} and left no output")]
    NoOutput(State),
    /// It cannot be cancelled any more.
    #[error("the invocation has already ended: it is {0}")]
    AlreadyFinished(State),
    /// It does not wait any more.
    #[error("the invocation has been started: only its tags can still be changed")]
    AlreadyStarted,
    /// It did not end badly.
    #[error("the invocation is {0}; only dead, cancelled and expired ones can be retried")]
    NotRetryable(State),
    /// Input for a command given to a task, or the other way round.
    #[error("{}", wrong_kind(*.kind))]
    WrongInputKind {
        /// What the module is.
        kind: ModuleKind,
        /// What does not fit.
        errors: Vec<FieldError>,
    },
    /// The input is not what the task's schema allows.
    #[error("the input does not match the input schema of the task")]
    InputMismatch(Vec<FieldError>),
    /// A value of the body is out of its range, or contradicts another.
    #[error("the request body has invalid values")]
    InvalidFields(Vec<FieldError>),
    /// Input (or stdin, arguments and variables) is too large.
    #[error("input, stdin, args and env may have at most {max} bytes together")]
    InputTooLarge {
        /// The limit.
        max: u64,
    },
    /// The key's role may not do this.
    #[error(
        "this key's role is `{0}`, which may not do this; workers and duties are for the platform's operators"
    )]
    Forbidden(&'static str),
    /// No such worker runs.
    #[error("there is no worker {0} that runs")]
    WorkerNotFound(WorkerId),
    /// No such duty.
    #[error("there is no duty `{0}`")]
    DutyNotFound(String),
    /// The key belongs to another request.
    #[error("this Idempotency-Key was used with another request; use a new key for a new request")]
    IdempotencyKeyReused,
    /// An unfinished invocation of the task holds the unique key. Nothing was queued.
    #[error("invocation {holder} holds this unique_key and has not ended; nothing was queued")]
    UniqueKeyTaken {
        /// The one that holds it.
        holder: InvocationId,
    },
    /// No such invocation of this tenant to depend on. Nothing was queued.
    #[error("there is no invocation {0} to depend on; nothing was queued")]
    DependencyNotFound(InvocationId),
    /// A quota is used up until it is counted anew. Nothing was done.
    #[error("the quota {name} is used up: {current} of {limit}")]
    QuotaExceeded {
        /// Which one.
        name: &'static str,
        /// What it allows.
        limit: u64,
        /// What there is.
        current: u64,
        /// When it is counted from 0 again.
        resets_at: Option<DateTime<Utc>>,
    },
    /// More than a quota allows, whenever it is asked for. Nothing was done.
    #[error("the quota {name} allows {limit}; this would be {wanted}")]
    OverQuota {
        /// Which one.
        name: &'static str,
        /// What it allows.
        limit: u64,
        /// What there would have been.
        wanted: u64,
    },
    /// No such tenant.
    #[error("there is no tenant `{0}`")]
    TenantNotFound(String),
    /// No such secret of this tenant.
    #[error("there is no secret `{0}`")]
    SecretNotFound(String),
    /// Nothing to seal with.
    #[error(
        "this server has no master key, so it keeps no secrets; its operator sets `secrets.master_key_file`"
    )]
    SecretsUnavailable,
    /// Too much at once. Nothing was done.
    #[error("the server is overloaded: {0}; nothing was done")]
    Overloaded(&'static str),
    /// Postgres does not answer. Unknown whether something was done.
    #[error("the database is not available")]
    Unavailable(#[source] anyhow::Error),
    /// Our mistake.
    #[error("an internal error")]
    Internal(#[source] anyhow::Error),
}

fn wrong_kind(kind: ModuleKind) -> &'static str {
    match kind {
        ModuleKind::Task => {
            "this version is a task: it takes `input` or `input_base64`, and no `args`, `env`, `stdin` or `stdin_base64`"
        }
        ModuleKind::CommandP1 | ModuleKind::CommandP2 => {
            "this version is a command: it takes `args`, `env`, `stdin` or `stdin_base64`, and no `input` or `input_base64`"
        }
    }
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::Unavailable(_) => Self::Unavailable(error.into()),
            store::Error::Constraint { .. }
            | store::Error::WorkerGone
            | store::Error::FenceLost
            | store::Error::Corrupt(_)
            | store::Error::Other(_) => Self::Internal(error.into()),
        }
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Overloaded => Self::Overloaded("too many invocations wait to be queued"),
            Refused::Unavailable(_) => Self::Unavailable(refused.into()),
            Refused::Gone(_) | Refused::Failed(_) => Self::Internal(refused.into()),
        }
    }
}
