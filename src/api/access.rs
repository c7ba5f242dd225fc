//! Which action each operation is, and the guard that every request passes: it authenticates, authorises by
//! `domain::permission`, and hands the identity to the extractors. An operation without a row reaches no extractor that
//! yields a caller, so it answers nobody; a test holds the table against the OpenAPI document.

use std::sync::Arc;

use axum::extract::{FromRequestParts, MatchedPath, RawPathParams, Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use tracing::Instrument as _;
use utoipa::openapi::ResponseBuilder;

use crate::api::Api;
use crate::api::limit::ClientAddress;
use crate::api::problem::{Code, Problem};
use crate::app::App;
use crate::app::audit::{self, Said};
use crate::domain::permission::Action::{self, *};
use crate::domain::permission::Reach;
use crate::store::audit::{Entry, INSTALLATION};
use crate::store::tenant::Identity;

/// Characters of a path that are kept in the audit log.
const MAX_TARGET: usize = 512;

/// Who may call an operation, and what the action concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Anybody, without a credential.
    Open,
    /// Anybody with a credential.
    Anyone,
    /// What belongs to no task, or all of it: scopes that name a task do not reach it.
    Whole(Action),
    /// The task that the path names as `{task}`.
    Task(Action),
    /// The invocation that the path names as `{id}`.
    Invocation(Action),
    /// What the body or the query names: the handler asks [`Who::authorize`] for each.
    Named(Action),
}

impl Access {
    /// The action.
    #[must_use]
    pub fn action(self) -> Option<Action> {
        match self {
            Self::Open | Self::Anyone => None,
            Self::Whole(a) | Self::Task(a) | Self::Invocation(a) | Self::Named(a) => Some(a),
        }
    }
}

/// One operation of the API.
#[derive(Debug, Clone, Copy)]
pub struct Operation {
    /// Its method.
    pub method: &'static str,
    /// Its path, as the router has it.
    pub path: &'static str,
    /// Who may call it.
    pub access: Access,
}

/// The path of a route as the OpenAPI document has it.
pub(super) fn documented(path: &str) -> String {
    path.replace("{*", "{")
}

impl Operation {
    /// Its path in the OpenAPI document.
    #[must_use]
    pub fn documented(&self) -> String {
        documented(self.path)
    }

    /// Whether it changes something that is worth an entry each time. Submissions are not: see `app::audit`.
    fn changes(&self) -> bool {
        self.method != "GET" && self.access.action() != Some(Submit)
    }
}

const fn op(method: &'static str, path: &'static str, access: Access) -> Operation {
    Operation { method, path, access }
}

use Access::{Anyone, Invocation, Named, Open, Task, Whole};

/// Every operation.
pub const OPERATIONS: &[Operation] = &[
    op("GET", "/livez", Open),
    op("GET", "/readyz", Open),
    op("GET", "/v1/me", Anyone),
    op("GET", "/v1/tasks", Whole(ReadTasks)),
    op("GET", "/v1/tasks/{task}", Task(ReadTasks)),
    op("PATCH", "/v1/tasks/{task}", Task(ChangeTasks)),
    op("DELETE", "/v1/tasks/{task}", Task(DeleteTasks)),
    op("POST", "/v1/tasks/{task}/versions", Task(Upload)),
    op("GET", "/v1/tasks/{task}/versions", Task(ReadTasks)),
    op("GET", "/v1/tasks/{task}/versions/{version}", Task(ReadTasks)),
    op("GET", "/v1/tasks/{task}/versions/{version}/module", Task(Download)),
    op("POST", "/v1/tasks/{task}/versions/{version}/release", Whole(OperatePlatform)),
    op("POST", "/v1/tasks/{task}/invocations", Task(Submit)),
    op("POST", "/v1/invocations:batch", Named(Submit)),
    op("GET", "/v1/invocations", Named(ReadInvocations)),
    op("GET", "/v1/invocations/{id}", Invocation(ReadInvocations)),
    op("PATCH", "/v1/invocations/{id}", Invocation(ChangeInvocations)),
    op("GET", "/v1/invocations/{id}/why", Invocation(ReadInvocations)),
    op("GET", "/v1/invocations/{id}/result", Invocation(ReadResults)),
    op("GET", "/v1/invocations/{id}/artifacts", Invocation(ReadResults)),
    op("GET", "/v1/invocations/{id}/artifacts/{*path}", Invocation(ReadResults)),
    op("GET", "/v1/invocations/{id}/logs", Invocation(ReadLogs)),
    op("POST", "/v1/invocations/{id}/cancel", Invocation(Cancel)),
    op("POST", "/v1/invocations/{id}/retry", Invocation(Submit)),
    op("DELETE", "/v1/invocations/{id}/payloads", Invocation(ErasePayloads)),
    op("GET", "/.well-known/jwks.json", Open),
    op("POST", "/v1/auth/login", Open),
    op("POST", "/v1/auth/refresh", Open),
    op("POST", "/v1/auth/accept", Open),
    op("POST", "/v1/auth/reset", Open),
    op("POST", "/v1/auth/logout", Anyone),
    op("POST", "/v1/auth/password", Anyone),
    op("POST", "/v1/auth/key", Anyone),
    op("POST", "/v1/password-resets", Whole(ManagePeople)),
    op("GET", "/v1/members", Whole(ReadPeople)),
    op("PATCH", "/v1/members/{id}", Whole(ManagePeople)),
    op("DELETE", "/v1/members/{id}", Whole(ManagePeople)),
    op("GET", "/v1/invitations", Whole(ReadPeople)),
    op("POST", "/v1/invitations", Whole(ManagePeople)),
    op("DELETE", "/v1/invitations/{id}", Whole(ManagePeople)),
    op("GET", "/v1/tenants", Whole(ManageTenants)),
    op("POST", "/v1/tenants", Whole(ManageTenants)),
    op("GET", "/v1/tenants/{id}", Whole(ManageTenants)),
    op("PATCH", "/v1/tenants/{id}", Whole(ManageTenants)),
    op("DELETE", "/v1/tenants/{id}", Whole(ManageTenants)),
    op("DELETE", "/v1/tenants/{id}/key", Whole(ManageTenants)),
    op("GET", "/v1/tenants/{tenant}/quotas", Whole(ManageTenants)),
    op("PATCH", "/v1/tenants/{tenant}/quotas", Whole(ManageTenants)),
    op("GET", "/v1/plans", Whole(ManageTenants)),
    op("PUT", "/v1/plans/{plan}", Whole(ManageTenants)),
    op("GET", "/v1/quotas", Whole(ReadUsage)),
    op("GET", "/v1/tasks/{task}/quotas", Task(ReadUsage)),
    op("PATCH", "/v1/tasks/{task}/quotas", Task(ChangeQuotas)),
    op("GET", "/v1/usage", Whole(ReadUsage)),
    op("GET", "/v1/budgets", Whole(ReadUsage)),
    op("PUT", "/v1/budgets/{name}", Whole(ChangeQuotas)),
    op("DELETE", "/v1/budgets/{name}", Whole(ChangeQuotas)),
    op("GET", "/v1/events", Whole(ReadUsage)),
    op("GET", "/v1/secrets", Whole(ReadSecrets)),
    op("GET", "/v1/secrets/{name}", Whole(ReadSecrets)),
    op("PUT", "/v1/secrets/{name}", Whole(ChangeSecrets)),
    op("DELETE", "/v1/secrets/{name}", Whole(ChangeSecrets)),
    op("GET", "/v1/encryption", Whole(ReadSecrets)),
    op("PUT", "/v1/encryption", Whole(ChangeSecrets)),
    op("GET", "/v1/audit", Whole(ReadAudit)),
    op("GET", "/v1/keys", Whole(ReadKeys)),
    op("POST", "/v1/keys", Whole(ManageKeys)),
    op("GET", "/v1/keys/{id}", Whole(ReadKeys)),
    op("PATCH", "/v1/keys/{id}", Whole(ManageKeys)),
    op("DELETE", "/v1/keys/{id}", Whole(ManageKeys)),
    op("POST", "/v1/keys/{id}/rotate", Whole(ManageKeys)),
    op("GET", "/v1/dead-letters", Whole(ReadQueue)),
    op("GET", "/v1/dead-letters/groups", Whole(ReadQueue)),
    op("DELETE", "/v1/dead-letters/{id}", Whole(ControlQueue)),
    op("GET", "/v1/bulk", Whole(ReadQueue)),
    op("POST", "/v1/bulk", Whole(ControlQueue)),
    op("GET", "/v1/bulk/{id}", Whole(ReadQueue)),
    op("POST", "/v1/bulk/{id}/cancel", Whole(ControlQueue)),
    op("GET", "/v1/pauses", Whole(ReadQueue)),
    op("POST", "/v1/pauses", Whole(ControlQueue)),
    op("DELETE", "/v1/pauses/{id}", Whole(ControlQueue)),
    op("GET", "/v1/workers", Whole(ReadPlatform)),
    op("POST", "/v1/workers/{id}/cordon", Whole(OperatePlatform)),
    op("POST", "/v1/workers/{id}/uncordon", Whole(OperatePlatform)),
    op("POST", "/v1/workers/{id}/drain", Whole(OperatePlatform)),
    op("GET", "/v1/duties", Whole(ReadPlatform)),
    op("PATCH", "/v1/duties/{name}", Whole(OperatePlatform)),
    op("POST", "/v1/duties/{name}/pause", Whole(OperatePlatform)),
    op("POST", "/v1/duties/{name}/resume", Whole(OperatePlatform)),
    op("POST", "/v1/duties/{name}/run", Whole(OperatePlatform)),
];

/// The row of an operation. What answers GET answers HEAD.
pub(super) fn operation(method: &Method, path: &str) -> Option<&'static Operation> {
    let method = if method == Method::HEAD { "GET" } else { method.as_str() };
    OPERATIONS.iter().find(|op| op.method == method && op.path == path)
}

/// Say in the document what the guard answers, for every operation that does not say so itself.
pub(super) fn describe(document: &mut utoipa::openapi::OpenApi) {
    let problem = |text: &str| {
        let schema = utoipa::openapi::Ref::from_schema_name("Problem");
        let content = utoipa::openapi::ContentBuilder::new().schema(Some(schema)).build();
        ResponseBuilder::new().description(text).content("application/problem+json", content).build()
    };
    for op in OPERATIONS.iter().filter(|op| op.access != Open) {
        let Some(item) = document.paths.paths.get_mut(op.path) else { continue };
        let found = match op.method {
            "GET" => item.get.as_mut(),
            "POST" => item.post.as_mut(),
            "PUT" => item.put.as_mut(),
            "PATCH" => item.patch.as_mut(),
            "DELETE" => item.delete.as_mut(),
            _ => None,
        };
        let Some(found) = found else { continue };
        let responses = &mut found.responses.responses;
        responses.entry("401".to_owned()).or_insert_with(|| problem("unauthenticated").into());
        if op.access.action().is_some() {
            responses.entry("403".to_owned()).or_insert_with(|| problem("forbidden").into());
        }
    }
}

/// Whose request it is.
#[derive(Debug, Clone)]
pub struct Who(pub Arc<Identity>);

impl FromRequestParts<Api> for Who {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        parts.extensions.get::<Self>().cloned().ok_or_else(|| {
            tracing::error!(method = %parts.method, path = parts.uri.path(), "an operation without a row in api::access");
            Problem::new(Code::Internal, "an internal error")
        })
    }
}

impl Who {
    /// Whether it may do this on this task (`None`: on all): for operations that are [`Access::Named`].
    ///
    /// # Errors
    /// It may not.
    pub fn authorize(&self, action: Action, task: Option<&str>) -> Result<(), Problem> {
        Ok(App::authorize(&self.0, action, task)?)
    }
}

/// Let a request through to its handler if its caller may do what it asks for, and write down what came of it: every
/// denied attempt, and every change before it is answered.
pub(super) async fn guard(State(api): State<Api>, request: Request, next: Next) -> Response {
    let (mut parts, body) = request.into_parts();
    let path = parts.extensions.get::<MatchedPath>();
    // Without a row: another method of a known path, which is answered as such; or a mistake, see `Who`.
    let Some(operation) = path.and_then(|path| operation(&parts.method, path.as_str())) else {
        return next.run(Request::from_parts(parts, body)).await;
    };
    let admitted = admit(operation, &mut parts, &api).await;
    let who = parts.extensions.get::<Who>().cloned();
    let seen = Seen::of(operation, who, &parts);
    let request = Request::from_parts(parts, body);
    let response = match admitted {
        Err(problem) => problem.into_response(),
        Ok(()) if operation.changes() => {
            // In a task of its own: a client that goes away leaves no change half done, and none unwritten.
            let work = async move {
                let (response, said) = audit::observed(next.run(request)).await;
                if refused(&response) {
                    api.app.audit_denial(seen.entry("denied", &response, said));
                } else if response.status().is_success() || said != Said::default() {
                    api.app.audit_change(seen.entry("done", &response, said)).await;
                }
                response
            };
            return match tokio::spawn(work.instrument(tracing::Span::current())).await {
                Ok(response) => response,
                Err(error) => match error.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    Err(_) => Problem::new(Code::Internal, "an internal error").into_response(),
                },
            };
        }
        Ok(()) => next.run(request).await,
    };
    if refused(&response) {
        api.app.audit_denial(seen.entry("denied", &response, Said::default()));
    }
    response
}

fn refused(response: &Response) -> bool {
    matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

/// What the audit log wants to know of a request.
struct Seen {
    operation: &'static Operation,
    who: Option<Who>,
    address: Option<String>,
    request_id: Option<String>,
    target: String,
}

impl Seen {
    fn of(operation: &'static Operation, who: Option<Who>, parts: &Parts) -> Self {
        let address = parts.extensions.get::<ClientAddress>().filter(|client| !client.0.is_unspecified());
        let id = parts.headers.get("x-request-id").and_then(|v| v.to_str().ok());
        Self {
            operation,
            who,
            address: address.map(|client| client.0.to_string()),
            request_id: id.map(str::to_owned),
            // Without the query: a filter may be anything.
            target: parts.uri.path().chars().take(MAX_TARGET).collect(),
        }
    }

    fn entry(self, outcome: &str, response: &Response, said: Said) -> Entry {
        let action = self.operation.access.action();
        let platforms = matches!(action, Some(OperatePlatform | ManageTenants)) && outcome == "done";
        let (kind, id, name, tenant) = match &self.who {
            Some(Who(who)) => {
                let (kind, id) = who.actor.parts();
                (kind, Some(id), who.label(), if platforms { INSTALLATION } else { who.tenant })
            }
            // Who it is may be proved by the request itself: a login.
            None => match &said.by {
                Some((tenant, actor, name)) => {
                    let (kind, id) = actor.parts();
                    (kind, Some(id), name.clone(), *tenant)
                }
                None => ("nobody", None, String::new(), INSTALLATION),
            },
        };
        Entry {
            tenant_id: tenant,
            audit_id: uuid::Uuid::now_v7(),
            at: chrono::Utc::now(),
            actor_kind: kind.to_owned(),
            actor_id: id,
            actor: name,
            address: self.address,
            request_id: self.request_id,
            operation: format!("{} {}", self.operation.method, self.operation.path),
            action: action.map(|action| action.as_str().to_owned()),
            target: self.target,
            outcome: outcome.to_owned(),
            status: i16::try_from(response.status().as_u16()).unwrap_or_default(),
            code: response.extensions().get::<Code>().map(|code| code.as_str().to_owned()),
            times: 1,
            before: said.before,
            after: said.after,
        }
    }
}

async fn admit(operation: &Operation, parts: &mut Parts, api: &Api) -> Result<(), Problem> {
    if operation.access == Open {
        return Ok(());
    }
    let identity = authenticate(parts, api).await?;
    parts.extensions.insert(Who(Arc::clone(&identity)));
    if let Some(action) = operation.access.action() {
        App::check_active(&identity, action)?;
    }
    match operation.access {
        Open | Anyone => {}
        Whole(action) => App::authorize(&identity, action, None)?,
        Task(action) => {
            let task = parameter(parts, "task").await;
            App::authorize(&identity, action, Some(&task))?;
        }
        Invocation(action) => match parameter(parts, "id").await.parse() {
            Ok(id) => api.app.authorize_invocation(&identity, action, id).await?,
            // Nothing has such an id, which the extractor says to those who may ask at all.
            Err(_) if identity.permits().reach(action) != Reach::Nothing => {}
            Err(_) => App::authorize(&identity, action, None)?,
        },
        Named(action) => {
            // Whoever may on no task at all need not send more.
            if identity.permits().reach(action) == Reach::Nothing {
                App::authorize(&identity, action, None)?;
            }
        }
    }
    Ok(())
}

/// A parameter of the path; empty when it is not there.
async fn parameter(parts: &mut Parts, name: &str) -> String {
    match RawPathParams::from_request_parts(parts, &()).await {
        Ok(params) => params.iter().find(|(key, _)| *key == name).map(|(_, v)| v.to_owned()),
        Err(_) => None,
    }
    .unwrap_or_default()
}

async fn authenticate(parts: &Parts, api: &Api) -> Result<Arc<Identity>, Problem> {
    let refuse = |detail: &str| Err(Problem::new(Code::Unauthenticated, detail));
    let Some(key) = presented_key(&parts.headers) else {
        return refuse("send the API key in the header x-api-key, or as Authorization: Bearer");
    };
    if !api.app.remembers(key) {
        api.limits.stranger(&parts.extensions)?;
    }
    match api.app.authenticate(key).await? {
        Some(identity) => {
            api.limits.known(&parts.extensions, identity.tenant.0, identity.actor.parts().1)?;
            tracing::Span::current().record("tenant", tracing::field::display(identity.tenant));
            Ok(identity)
        }
        None => refuse("this API key is unknown, expired or revoked"),
    }
}

fn presented_key(headers: &HeaderMap) -> Option<&str> {
    if let Some(key) = headers.get("x-api-key") {
        return key.to_str().ok();
    }
    let (scheme, key) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(key.trim_start())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::domain::permission::Role;
    use axum::http::HeaderValue;
    use std::collections::BTreeSet;
    use std::fmt::Write as _;
    use std::path::Path;

    #[test]
    fn a_key_comes_in_either_header() {
        let mut headers = HeaderMap::new();
        assert_eq!(presented_key(&headers), None);
        headers.insert("authorization", HeaderValue::from_static("bearer abc"));
        assert_eq!(presented_key(&headers), Some("abc"));
        headers.insert("authorization", HeaderValue::from_static("Basic abc"));
        assert_eq!(presented_key(&headers), None);
        headers.insert("x-api-key", HeaderValue::from_static("def"));
        assert_eq!(presented_key(&headers), Some("def"));
    }

    #[test]
    fn every_operation_of_the_document_has_a_row_and_no_row_is_left_over() {
        let mut documented = BTreeSet::new();
        let document = crate::api::tests::document();
        for (path, item) in document["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys() {
                documented.insert((method.to_uppercase(), path.clone()));
            }
        }
        let rows: Vec<_> = OPERATIONS.iter().map(|op| (op.method.to_owned(), op.documented())).collect();
        let unique: BTreeSet<_> = rows.iter().cloned().collect();
        assert_eq!(unique.len(), rows.len(), "a row twice");
        let missing: Vec<_> = documented.difference(&unique).collect();
        let extra: Vec<_> = unique.difference(&documented).collect();
        assert!(
            missing.is_empty() && extra.is_empty(),
            "without a row: {missing:?}; without an operation: {extra:?}"
        );
    }

    #[test]
    fn a_row_names_its_task_or_invocation_in_the_path() {
        for op in OPERATIONS {
            match op.access {
                Task(_) => assert!(op.path.contains("{task}"), "{op:?}"),
                Invocation(_) => assert!(op.path.starts_with("/v1/invocations/{id}"), "{op:?}"),
                _ => {}
            }
            assert!(
                op.access != Open || !op.path.starts_with("/v1/") || op.path.starts_with("/v1/auth/"),
                "{op:?}"
            );
        }
    }

    const HEAD: &str = "\
<!-- Written by a test from domain::permission and api::access: SANDBAR_BLESS=1 cargo test --workspace --lib api::access -->
# Who may do what

A key or a user has one role in its tenant. What a role may is this table; it is the one that the program goes by.
`platform` operates the installation and is owner of its own tenant: it does not see the data of other tenants either.

A key can be narrowed further by scopes: `action`, `action:task`, or `*:task` (all that its role may, on that task).
Without scopes it may all that its role may. A scope on a task reaches that task, its versions and its invocations; what
is outside is 403 `forbidden`, and invocations of other tasks are 404, as if they were not there.

Nobody can make a key, or give a role, that may more than they may themselves.
";

    #[test]
    fn the_page_about_permissions_is_the_table() {
        let mut page = HEAD.to_owned();
        page.push_str("\n| action | what |");
        for role in Role::ALL {
            write!(page, " {} |", role.as_str()).unwrap();
        }
        page.push_str("\n|---|---|");
        page.push_str(&"---|".repeat(Role::ALL.len()));
        for action in Action::ALL {
            write!(page, "\n| `{}` | {} |", action.as_str(), action.describe()).unwrap();
            for role in Role::ALL {
                page.push_str(if role.may(*action) { " ✓ |" } else { "  |" });
            }
        }
        page.push_str("\n\n## Operations\n\n| operation | action | on |\n|---|---|---|");
        for op in OPERATIONS {
            let action = match op.access {
                Open => "– (no credential)".to_owned(),
                Anyone => "– (any credential)".to_owned(),
                other => format!("`{}`", other.action().unwrap().as_str()),
            };
            let on = match op.access {
                Open | Anyone => "",
                Whole(_) => "everything",
                Task(_) => "the task of the path",
                Invocation(_) => "the task of the invocation",
                Named(_) => "the tasks it names",
            };
            write!(page, "\n| `{} {}` | {action} | {on} |", op.method, op.documented()).unwrap();
        }
        page.push('\n');
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/permissions.md");
        if std::env::var_os("SANDBAR_BLESS").is_some() {
            std::fs::write(&file, &page).unwrap();
        }
        let stored = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(
            stored == page,
            "docs/permissions.md is stale: SANDBAR_BLESS=1 cargo test --workspace --lib api::access"
        );
    }
}
