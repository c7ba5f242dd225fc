//! The one place where errors become HTTP. Every kind of problem is a variant of [`Code`] with a status, a title and a
//! page in `docs/errors/`; the page is part of the binary, so a kind without one does not compile.

use std::fmt;

use axum::http::header::{ALLOW, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use sandbar_host::inspect::{Rejection, RejectionCode};

use crate::app::depth::RETRY_AFTER_S;
use crate::app::token::Refusal;
use crate::app::{Error, FieldError};
use crate::wire::problem as wire;

macro_rules! codes {
    ($($variant:ident $code:literal $status:literal $title:literal;)+) => {
        /// Every kind of problem.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(missing_docs)] // each has a page of its own
        pub enum Code { $($variant),+ }

        impl Code {
            /// Every kind.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word for programs, and the name of the page.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $code),+ }
            }

            /// The HTTP status.
            #[must_use]
            pub fn status(self) -> StatusCode {
                let status = match self { $(Self::$variant => $status),+ };
                StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
            }

            /// The kind in words.
            #[must_use]
            pub fn title(self) -> &'static str {
                match self { $(Self::$variant => $title),+ }
            }

            /// The page: cause and remedy, in Markdown.
            #[must_use]
            pub fn page(self) -> &'static str {
                match self { $(Self::$variant => include_str!(concat!("../../docs/errors/", $code, ".md"))),+ }
            }
        }
    };
}

codes! {
    MalformedJson "malformed-json" 400 "The request body is not JSON";
    BrokenBody "broken-body" 400 "The request body broke off";
    InvalidQuery "invalid-query" 400 "The query string is not understood";
    InvalidIdempotencyKey "invalid-idempotency-key" 400 "The Idempotency-Key header is not usable";
    Unauthenticated "unauthenticated" 401 "No valid credential";
    TokenInvalid "token-invalid" 401 "The token is not valid";
    TokenExpired "token-expired" 401 "The token has expired";
    TokenNotYetValid "token-not-yet-valid" 401 "The token is not valid yet";
    TokenWrongAudience "token-wrong-audience" 401 "The token is for somebody else";
    TokenUnknownKey "token-unknown-key" 401 "No key has signed the token";
    TokenWrongAlgorithm "token-wrong-algorithm" 401 "The token is signed by the wrong algorithm";
    TokenWithoutRole "token-without-role" 403 "The token gives no role here";
    LoginFailed "login-failed" 401 "The login failed";
    SessionOver "session-over" 401 "The session is over";
    TenantSuspended "tenant-suspended" 403 "The tenant is suspended";
    Forbidden "forbidden" 403 "The credential may not do this";
    OverQuota "over-quota" 403 "More than the quota allows";
    RouteNotFound "route-not-found" 404 "There is nothing at this address";
    TaskNotFound "task-not-found" 404 "No such task";
    VersionNotFound "version-not-found" 404 "No such version";
    InvocationNotFound "invocation-not-found" 404 "No such invocation";
    SecretNotFound "secret-not-found" 404 "No such secret";
    WorkerNotFound "worker-not-found" 404 "No such worker";
    InvitationNotFound "invitation-not-found" 404 "No such invitation";
    MemberNotFound "member-not-found" 404 "No such member";
    ResetNotFound "reset-not-found" 404 "No such token for a new password";
    TenantNotFound "tenant-not-found" 404 "No such tenant";
    KeyNotFound "key-not-found" 404 "No such key";
    DutyNotFound "duty-not-found" 404 "No such duty";
    DeadLetterNotFound "dead-letter-not-found" 404 "No such dead letter";
    BudgetNotFound "budget-not-found" 404 "No such budget";
    BulkOperationNotFound "bulk-operation-not-found" 404 "No such bulk operation";
    PauseNotFound "pause-not-found" 404 "No such pause";
    ArtifactNotFound "artifact-not-found" 404 "No such artifact";
    NoOutput "no-output" 404 "The invocation left no output";
    MethodNotAllowed "method-not-allowed" 405 "This method is not allowed here";
    RequestTooSlow "request-too-slow" 408 "The request came too slowly";
    NotFinished "not-finished" 409 "The invocation has not ended";
    AlreadyFinished "already-finished" 409 "The invocation has already ended";
    AlreadyStarted "already-started" 409 "The invocation has been started";
    NotRetryable "not-retryable" 409 "The invocation cannot be retried";
    TaskInactive "task-inactive" 409 "The task is inactive";
    TaskInUse "task-in-use" 409 "The task has open invocations";
    UniqueKeyTaken "unique-key-taken" 409 "The unique_key is taken";
    VersionNotReady "version-not-ready" 409 "The version is still being compiled";
    VersionQuarantined "version-quarantined" 409 "The version is in quarantine";
    VersionRejected "version-rejected" 409 "The version was rejected";
    MemberElsewhere "member-elsewhere" 409 "The user is in other tenants too";
    LastOwner "last-owner" 409 "The tenant needs an owner";
    NoUser "no-user" 409 "The credential is no user";
    TenantActive "tenant-active" 409 "The tenant is active";
    OwnTenant "own-tenant" 409 "The tenant is the caller's own";
    TenantNameTaken "tenant-name-taken" 409 "The name of the tenant is taken";
    TooManyInvitations "too-many-invitations" 409 "The tenant has too many invitations";
    KeyNotActive "key-not-active" 409 "The key is not active";
    TooManyKeys "too-many-keys" 409 "The tenant has too many keys";
    PayloadsErased "payloads-erased" 410 "The payloads were erased";
    BodyTooLarge "body-too-large" 413 "The request body is too large";
    InputTooLarge "input-too-large" 413 "The input is too large";
    ModuleTooLarge "module-too-large" 413 "The module is too large";
    UnsupportedMediaType "unsupported-media-type" 415 "The request body has the wrong media type";
    InvalidBody "invalid-body" 422 "The request body has invalid values";
    InvalidTaskName "invalid-task-name" 422 "This cannot be the name of a task";
    WrongInputKind "wrong-input-kind" 422 "The input does not fit the kind of module";
    InputMismatch "input-mismatch" 422 "The input does not match the task's schema";
    DependencyNotFound "dependency-not-found" 422 "There is no such invocation to depend on";
    IdempotencyKeyReused "idempotency-key-reused" 422 "The Idempotency-Key belongs to another request";
    ModuleNotWasm "module-not-wasm" 422 "The upload is not WebAssembly";
    ModuleTextFormat "module-text-format" 422 "The upload is WebAssembly text";
    ModuleTruncated "module-truncated" 422 "The module ends too early";
    ModuleInvalid "module-invalid" 422 "The module is not valid WebAssembly";
    ModuleUnknownImport "module-unknown-import" 422 "The module imports what is not there";
    ModuleNoUsableExport "module-no-usable-export" 422 "The module exports nothing that can be run";
    ModuleWrongSignature "module-wrong-signature" 422 "An import or export has the wrong type";
    ModuleOverLimit "module-over-limit" 422 "The module exceeds a limit";
    ModuleBadManifest "module-bad-manifest" 422 "The module's self-description is not usable";
    ModuleDoesNotCompile "module-does-not-compile" 422 "The module does not compile";
    ModuleCompileTimeout "module-compile-timeout" 422 "The module takes too long to compile";
    ModuleCompileMemory "module-compile-memory" 422 "The module takes too much memory to compile";
    LoginLocked "login-locked" 429 "Too many logins failed";
    CompileQueueFull "compile-queue-full" 429 "Too many uploads of this tenant wait to be compiled";
    QueueFull "queue-full" 429 "Too much of this tenant waits";
    QuotaExceeded "quota-exceeded" 429 "A quota of this tenant is used up";
    RateLimited "rate-limited" 429 "Too many calls in a short time";
    Internal "internal" 500 "An internal error";
    SealedUnreadable "sealed-unreadable" 500 "What is sealed does not open";
    SecretsUnavailable "secrets-unavailable" 503 "Secrets cannot be kept here";
    Overloaded "overloaded" 503 "The server is overloaded";
    IssuerUnavailable "issuer-unavailable" 503 "The issuer of the token does not answer";
    DatabaseUnavailable "database-unavailable" 503 "The database is not available";
    Timeout "timeout" 503 "The request took too long";
}

/// An error answer.
#[derive(Debug)]
pub struct Problem {
    code: Code,
    detail: String,
    errors: Vec<FieldError>,
    rejection: Option<Rejection>,
    quota: Option<Box<wire::Quota>>,
    /// Seconds.
    retry_after: Option<u32>,
}

impl Problem {
    /// A problem of this kind; `detail` says what is particular about it.
    pub fn new(code: Code, detail: impl fmt::Display) -> Self {
        Self {
            code,
            detail: detail.to_string(),
            errors: Vec::new(),
            rejection: None,
            quota: None,
            retry_after: match code {
                Code::CompileQueueFull | Code::QueueFull | Code::QuotaExceeded => Some(RETRY_AFTER_S),
                Code::VersionNotReady | Code::Overloaded | Code::DatabaseUnavailable => Some(1),
                Code::IssuerUnavailable => Some(10),
                _ => None,
            },
        }
    }

    /// With the quota that was hit; to be sent again when it is counted anew, if it is.
    fn with_quota(mut self, name: &str, limit: u64, current: u64, resets_at: Option<DateTime<Utc>>) -> Self {
        self.quota = Some(Box::new(wire::Quota { name: name.to_owned(), limit, current, resets_at }));
        if let Some(at) = resets_at {
            let seconds = (at - Utc::now()).num_milliseconds().max(0).unsigned_abs().div_ceil(1_000);
            self.retry_after = Some(u32::try_from(seconds).unwrap_or(u32::MAX).max(1));
        }
        self
    }

    /// To be sent again after so many seconds.
    #[must_use]
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// Its kind.
    #[must_use]
    pub fn code(&self) -> Code {
        self.code
    }

    /// With the places in the request body that are wrong.
    #[must_use]
    pub fn with_errors(mut self, errors: Vec<FieldError>) -> Self {
        self.errors = errors;
        self
    }

    fn with_rejection(mut self, rejection: Rejection) -> Self {
        self.rejection = Some(rejection);
        self
    }

    /// With every pointer below `prefix`: it belongs to a part of the body.
    pub(super) fn below(mut self, prefix: &str) -> Self {
        for error in &mut self.errors {
            error.pointer.insert_str(0, prefix);
        }
        self
    }

    /// What a client reads.
    pub(super) fn body(self) -> wire::Problem {
        wire::Problem {
            kind: format!("/errors/{}", self.code.as_str()),
            title: self.code.title().to_owned(),
            status: self.code.status().as_u16(),
            code: self.code.as_str().to_owned(),
            detail: self.detail,
            errors: self
                .errors
                .into_iter()
                .map(|e| wire::FieldProblem { pointer: e.pointer, detail: e.detail })
                .collect(),
            rejection: self.rejection.as_ref().map(rejection),
            quota: self.quota.map(|quota| *quota),
        }
    }
}

/// A rejection on the wire.
pub(super) fn rejection(rejection: &Rejection) -> wire::Rejection {
    wire::Rejection { code: rejection.code.as_str().to_owned(), detail: rejection.detail.clone() }
}

fn module_code(code: RejectionCode) -> Code {
    match code {
        RejectionCode::NotWasm => Code::ModuleNotWasm,
        RejectionCode::TextFormat => Code::ModuleTextFormat,
        RejectionCode::Truncated => Code::ModuleTruncated,
        RejectionCode::Invalid => Code::ModuleInvalid,
        RejectionCode::UnknownImport => Code::ModuleUnknownImport,
        RejectionCode::NoUsableExport => Code::ModuleNoUsableExport,
        RejectionCode::WrongSignature => Code::ModuleWrongSignature,
        RejectionCode::OverLimit => Code::ModuleOverLimit,
        RejectionCode::BadManifest => Code::ModuleBadManifest,
        RejectionCode::DoesNotCompile => Code::ModuleDoesNotCompile,
        RejectionCode::CompileTimeout => Code::ModuleCompileTimeout,
        RejectionCode::CompileMemory => Code::ModuleCompileMemory,
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        let plain = |code| Self::new(code, &text);
        match error {
            Error::TaskNotFound(_) => plain(Code::TaskNotFound),
            Error::TaskInactive(_) => plain(Code::TaskInactive),
            Error::TaskInUse(_) => plain(Code::TaskInUse),
            Error::AlreadyStarted => plain(Code::AlreadyStarted),
            Error::NotRetryable(_) => plain(Code::NotRetryable),
            Error::VersionNotFound { .. } => plain(Code::VersionNotFound),
            Error::VersionNotReady { .. } => plain(Code::VersionNotReady),
            Error::ArtifactNotFound(_) => plain(Code::ArtifactNotFound),
            Error::VersionQuarantined { .. } => plain(Code::VersionQuarantined),
            Error::VersionRejected { rejection, .. } => {
                plain(Code::VersionRejected).with_rejection(rejection)
            }
            Error::ModuleRejected(rejection) => plain(module_code(rejection.code)).with_rejection(rejection),
            Error::ModuleTooLarge { .. } => plain(Code::ModuleTooLarge),
            Error::UploadStalled { .. } => plain(Code::RequestTooSlow),
            Error::UploadBroken(_) => plain(Code::BrokenBody),
            Error::InvocationNotFound(_) => plain(Code::InvocationNotFound),
            Error::Forbidden { .. } => plain(Code::Forbidden),
            Error::Token(refusal) => plain(match refusal {
                Refusal::Invalid => Code::TokenInvalid,
                Refusal::Expired => Code::TokenExpired,
                Refusal::NotYet => Code::TokenNotYetValid,
                Refusal::Audience => Code::TokenWrongAudience,
                Refusal::UnknownKey => Code::TokenUnknownKey,
                Refusal::Algorithm => Code::TokenWrongAlgorithm,
                Refusal::NoRole => Code::TokenWithoutRole,
            }),
            Error::LoginFailed => plain(Code::LoginFailed),
            Error::LoginLocked(wait) => {
                let seconds = u32::try_from(wait.as_secs()).unwrap_or(u32::MAX).saturating_add(1);
                Self { retry_after: Some(seconds), ..plain(Code::LoginLocked) }
            }
            Error::SessionOver => plain(Code::SessionOver),
            Error::NoUser => plain(Code::NoUser),
            Error::InvitationNotFound => plain(Code::InvitationNotFound),
            Error::TooManyInvitations => plain(Code::TooManyInvitations),
            Error::MemberNotFound(_) => plain(Code::MemberNotFound),
            Error::LastOwner => plain(Code::LastOwner),
            Error::UserNotFound => plain(Code::MemberNotFound),
            Error::MemberElsewhere => plain(Code::MemberElsewhere),
            Error::ResetNotFound => plain(Code::ResetNotFound),
            Error::TenantNotFound(_) => plain(Code::TenantNotFound),
            Error::TenantNameTaken(_) => plain(Code::TenantNameTaken),
            Error::OwnTenant => plain(Code::OwnTenant),
            Error::TenantActive => plain(Code::TenantActive),
            Error::PayloadsErased(_) => plain(Code::PayloadsErased),
            Error::TenantSuspended => plain(Code::TenantSuspended),
            Error::KeyNotFound(_) => plain(Code::KeyNotFound),
            Error::KeyNotActive => plain(Code::KeyNotActive),
            Error::TooManyKeys => plain(Code::TooManyKeys),
            Error::CompileQueueFull { .. } => plain(Code::CompileQueueFull),
            Error::QueueFull { limit, current } => {
                plain(Code::QueueFull).with_quota("queue_depth", limit, current, None)
            }
            Error::DeadLetterNotFound(_) => plain(Code::DeadLetterNotFound),
            Error::BudgetNotFound(_) => plain(Code::BudgetNotFound),
            Error::BulkNotFound(_) => plain(Code::BulkOperationNotFound),
            Error::PauseNotFound(_) => plain(Code::PauseNotFound),
            Error::WorkerNotFound(_) => plain(Code::WorkerNotFound),
            Error::DutyNotFound(_) => plain(Code::DutyNotFound),
            Error::NotFinished(_) => plain(Code::NotFinished),
            Error::NoOutput(_) => plain(Code::NoOutput),
            Error::AlreadyFinished(_) => plain(Code::AlreadyFinished),
            Error::WrongInputKind { errors, .. } => plain(Code::WrongInputKind).with_errors(errors),
            Error::InputMismatch(errors) => plain(Code::InputMismatch).with_errors(errors),
            Error::InvalidFields(errors) => plain(Code::InvalidBody).with_errors(errors),
            Error::InputTooLarge { .. } => plain(Code::InputTooLarge),
            Error::UniqueKeyTaken { .. } => plain(Code::UniqueKeyTaken),
            Error::DependencyNotFound(_) => plain(Code::DependencyNotFound),
            Error::IdempotencyKeyReused => plain(Code::IdempotencyKeyReused),
            Error::SecretNotFound(_) => plain(Code::SecretNotFound),
            Error::SecretsUnavailable => plain(Code::SecretsUnavailable),
            Error::Unreadable(_) => {
                tracing::error!(error = %text, "something sealed does not open");
                plain(Code::SealedUnreadable)
            }
            Error::QuotaExceeded { name, limit, current, resets_at, .. } => {
                plain(Code::QuotaExceeded).with_quota(name, limit, current, resets_at)
            }
            Error::OverQuota { name, limit, wanted } => {
                plain(Code::OverQuota).with_quota(name, limit, wanted, None)
            }
            Error::Overloaded(_) => plain(Code::Overloaded),
            // The causes are for the log: they name hosts, statements and constraints.
            Error::IssuerUnavailable(_) => plain(Code::IssuerUnavailable),
            Error::Unavailable(cause) => {
                tracing::warn!(error = format!("{cause:#}"), "the database is not available");
                plain(Code::DatabaseUnavailable)
            }
            Error::Internal(cause) => {
                tracing::error!(error = format!("{cause:#}"), "internal error");
                plain(Code::Internal)
            }
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (code, retry_after) = (self.code, self.retry_after);
        // Strings and numbers: this cannot fail, and an empty body would still have its status.
        let body = serde_json::to_vec(&self.body()).unwrap_or_default();
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = retry_after {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        if code.status() == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        let mut response = (code.status(), headers, body).into_response();
        // For whoever watches answers: the audit log.
        response.extensions_mut().insert(code);
        response
    }
}

/// Answer of a route that knows the address but not the method. Axum adds what is allowed.
pub(super) async fn method_not_allowed() -> Response {
    let mut response =
        Problem::new(Code::MethodNotAllowed, "the header Allow lists the methods of this address")
            .into_response();
    response.headers_mut().remove(ALLOW);
    response
}

/// Answer to an address that leads nowhere.
pub(super) async fn route_not_found() -> Problem {
    Problem::new(Code::RouteNotFound, "no resource has this address; /openapi.json lists those there are")
}

/// Answer after a panic, which has been logged by the panic hook.
pub(super) fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    Problem::new(Code::Internal, "an internal error").into_response()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use std::collections::BTreeSet;
    use std::path::Path;

    #[test]
    fn every_code_has_a_page_that_names_it_with_cause_and_remedy_and_no_page_is_left_over() {
        let mut codes = BTreeSet::new();
        for code in Code::ALL {
            assert!(codes.insert(format!("{}.md", code.as_str())), "{code:?} twice");
            let page = code.page();
            assert!(page.starts_with(&format!("# {}\n", code.as_str())), "{code:?}");
            assert!(page.contains(&format!("HTTP {}", code.status().as_u16())), "{code:?}");
            for section in ["## Cause", "## Remedy"] {
                assert!(page.contains(section), "{code:?} lacks {section}");
            }
        }
        let pages = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/errors");
        for page in std::fs::read_dir(pages).unwrap() {
            let name = page.unwrap().file_name().into_string().unwrap();
            assert!(name == "README.md" || codes.contains(&name), "{name} belongs to no code");
        }
    }

    #[test]
    fn a_cause_for_operators_stays_out_of_the_answer() {
        let error = Error::Internal(anyhow::anyhow!("relation secret_table"));
        let body = serde_json::to_string(&Problem::from(error).body()).unwrap();
        assert!(!body.contains("secret_table"), "{body}");
    }

    #[test]
    fn shape_of_a_problem() {
        let error =
            Error::InputMismatch(vec![FieldError::new("/input/n", "\"x\" is not of type \"integer\"")]);
        insta::assert_json_snapshot!(Problem::from(error).body());
        let error = Error::ModuleRejected(Rejection {
            code: RejectionCode::UnknownImport,
            detail: "unknown import `env.abort`".to_owned(),
        });
        insta::assert_json_snapshot!(Problem::from(error).body());
    }
}
