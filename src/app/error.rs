//! Why a request was not done, without a word about HTTP: `api::problem` gives each its status and its page.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sandbar_host::ModuleKind;
use sandbar_host::inspect::Rejection;

use crate::app::flush::Refused;
use crate::app::token::Refusal;
use crate::app::vault::VaultError;
use crate::domain::ids::{BulkId, InvocationId, KeyId, PauseId, UserId, WorkerId};
use crate::domain::invocation::State;
use crate::domain::permission::{Action, Role};
use crate::store;
use crate::store::task::Kind;

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
    /// It was running when two cells died.
    #[error("version {version} of task `{task}` is in quarantine: it was running when two cells died")]
    VersionQuarantined {
        /// The task.
        task: String,
        /// The version.
        version: i32,
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
    /// Too many uploads of the tenant wait for their compilation.
    #[error("{limit} uploads of this tenant wait for their compilation; no more may")]
    CompileQueueFull {
        /// As many as may.
        limit: u32,
    },
    /// No such invocation of this tenant.
    #[error("there is no invocation {0}")]
    InvocationNotFound(InvocationId),
    /// It has not ended.
    #[error("the invocation is {0}; it has no result yet")]
    NotFinished(State),
    /// It ended and left nothing.
    #[error("the invocation is {0} and left no output")]
    NoOutput(State),
    /// No such file was collected.
    #[error("no file `{0}` was collected from the last attempt")]
    ArtifactNotFound(String),
    /// No such budget of this tenant.
    #[error("there is no budget `{0}`")]
    BudgetNotFound(String),
    /// Its payloads were erased, or the key that sealed them.
    #[error("the payloads of invocation {0} were erased; what remains are its states, times and receipts")]
    PayloadsErased(InvocationId),
    /// Its key is erased only while nothing new starts.
    #[error("the tenant is active: suspend it before its key is erased")]
    TenantActive,
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
        /// What the version is.
        kind: Kind,
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
    /// The caller may not do this.
    #[error("{}", forbidden(*.role, *.action, *.scoped))]
    Forbidden {
        /// What it is.
        role: Role,
        /// What it wanted.
        action: Action,
        /// The role may, and the scopes of the key do not.
        scoped: bool,
    },
    /// The token is refused.
    #[error("{}", refused(*.0))]
    Token(Refusal),
    /// Address and password belong to nobody; or to nobody in that tenant.
    #[error("address and password do not belong together, or not to a member of this tenant")]
    LoginFailed,
    /// Too many logins failed.
    #[error("too many logins failed for this address; the next is possible in {} s", .0.as_secs() + 1)]
    LoginLocked(Duration),
    /// The session cannot go on.
    #[error("this refresh token is unknown, over or was used before; log in again")]
    SessionOver,
    /// A key does what only people can.
    #[error("an API key has no password; log in as a user")]
    NoUser,
    /// No such invitation, or it is over.
    #[error("there is no such invitation, or it was accepted, or is over")]
    InvitationNotFound,
    /// The tenant has as many open invitations as it may.
    #[error("the tenant has 1,000 open invitations; take back those that nobody accepts")]
    TooManyInvitations,
    /// No such member of this tenant.
    #[error("there is no member {0}")]
    MemberNotFound(UserId),
    /// Somebody has to be owner.
    #[error("this is the only owner; make somebody else owner first")]
    LastOwner,
    /// No such tenant: no name, or no id.
    #[error("there is no tenant `{0}`")]
    TenantNotFound(String),
    /// Another tenant has the name.
    #[error("there is a tenant `{0}`")]
    TenantNameTaken(String),
    /// It would lock its own door.
    #[error("this is the tenant of the credential itself; use one of another tenant")]
    OwnTenant,
    /// The tenant is suspended, or is being deleted.
    #[error("the tenant is suspended or is being deleted: nothing new starts, and nothing is changed")]
    TenantSuspended,
    /// No such key of this tenant.
    #[error("there is no key {0}")]
    KeyNotFound(KeyId),
    /// It cannot be changed any more.
    #[error("the key is revoked or expired, or was rotated before")]
    KeyNotActive,
    /// The tenant has as many keys as it may.
    #[error("the tenant has {max} keys, and may not have more; revoke those that nobody uses", max = crate::app::key::MAX_KEYS)]
    TooManyKeys,
    /// More of this tenant waits than may. Nothing was accepted.
    #[error("{current} invocations of this tenant wait, and {limit} may; nothing was accepted")]
    QueueFull {
        /// How many may wait.
        limit: u64,
        /// How many do, as far as this server knows.
        current: u64,
    },
    /// No such dead letter of this tenant.
    #[error("there is no dead letter {0}")]
    DeadLetterNotFound(InvocationId),
    /// No such bulk operation of this tenant.
    #[error("there is no bulk operation {0}")]
    BulkNotFound(BulkId),
    /// No such pause of this tenant.
    #[error("there is no pause {0}")]
    PauseNotFound(PauseId),
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
    /// Another quota is used up, until it is counted anew or something has ended. Nothing was done.
    #[error("the quota {name} of this {whose} is used up: {current} of {limit}")]
    QuotaExceeded {
        /// Which one.
        name: &'static str,
        /// A tenant's, a task's or a key's.
        whose: &'static str,
        /// What it allows.
        limit: u64,
        /// What there is.
        current: u64,
        /// When it is counted from 0 again; `None`: it counts what there is.
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
    /// No such secret of this tenant.
    #[error("there is no secret `{0}`")]
    SecretNotFound(String),
    /// Nothing to seal with.
    #[error(
        "this server has no master key, so it keeps no secrets; its operator sets `secrets.master_key_file`"
    )]
    SecretsUnavailable,
    /// Nobody in reach of the caller has the address.
    #[error("nobody here has this address")]
    UserNotFound,
    /// A tenant's people may not give a member of other tenants a new password.
    #[error("the user is a member of other tenants too, so only the platform may do this")]
    MemberElsewhere,
    /// The token of a new password is unknown, used or over.
    #[error("the token is unknown, was used or replaced, or is over")]
    ResetNotFound,
    /// What is sealed does not open here.
    #[error("{0}")]
    Unreadable(VaultError),
    /// Too much at once. Nothing was done.
    #[error("the server is overloaded: {0}; nothing was done")]
    Overloaded(&'static str),
    /// The keys of an issuer elsewhere cannot be had.
    #[error("the issuer {0} of this token does not answer; try again")]
    IssuerUnavailable(String),
    /// Postgres does not answer. Unknown whether something was done.
    #[error("the database is not available")]
    Unavailable(#[source] anyhow::Error),
    /// Our mistake.
    #[error("an internal error")]
    Internal(#[source] anyhow::Error),
}

fn refused(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::Invalid => "this token is none of ours, or was changed",
        Refusal::Expired => "this token has expired; refresh it, or log in again",
        Refusal::NotYet => "this token is not valid yet: the clocks differ by more than 30 s",
        Refusal::Audience => "this token is for somebody else, or from somebody else",
        Refusal::UnknownKey => "no key of this issuer has the `kid` of this token",
        Refusal::Algorithm => "this token is signed by an algorithm that its issuer does not use",
        Refusal::NoRole => "this token is good, and gives no role in any tenant here",
    }
}

fn forbidden(role: Role, action: Action, scoped: bool) -> String {
    let action = action.as_str();
    if scoped {
        format!("the scopes of this key do not include `{action}` here")
    } else {
        format!("the role `{}` may not `{action}`", role.as_str())
    }
}

fn wrong_kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Http => {
            "this version is an HTTP request: it takes `input` or `input_base64`, and no `args`, `env`, `stdin` or `stdin_base64`"
        }
        Kind::Module(ModuleKind::Task) => {
            "this version is a task: it takes `input` or `input_base64`, and no `args`, `env`, `stdin` or `stdin_base64`"
        }
        Kind::Module(ModuleKind::CommandP1 | ModuleKind::CommandP2) => {
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
