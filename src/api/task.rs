//! `/v1/tasks` and their versions.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{
    CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_TYPE, ETAG, IF_NONE_MATCH, LOCATION, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::TryStreamExt;
use sandbar_host::limits::PartialLimits;
use serde::Serialize;

use crate::api::access::Who;
use crate::api::extract::{
    Caller, MergePatch, NewTaskPath, Operator, Pairs, PreferWait, TaskPath, Upload, VersionPath,
};
use crate::api::problem::{Code, Problem, rejection};
use crate::api::{Api, PAGE, limit, shape, unknown_parameter};
use crate::domain::names::TaskName;
use crate::domain::permission::Action;
use crate::domain::retry::PartialRetry;
use crate::store::grant::{Grants, SecretHeader};
use crate::store::task::{Change, Kind, Setting, TaskChange, TaskRow, VersionRow, VersionState};
use crate::wire::Page;
use crate::wire::invocation as invocation_wire;
use crate::wire::patch::Field;
use crate::wire::problem as problem_wire;
use crate::wire::task as wire;

fn task(row: &TaskRow) -> wire::Task {
    let this = format!("/v1/tasks/{}", row.name);
    wire::Task {
        name: row.name.clone(),
        description: row.description.clone(),
        current_version: row.current_version,
        pinned_version: row.pinned_version,
        active: row.active,
        limits: (row.limits != PartialLimits::default()).then_some(invocation_wire::LimitsRequest {
            fuel: row.limits.fuel,
            memory_bytes: row.limits.memory_bytes,
            timeout_ms: row.limits.timeout_ms,
            output_bytes: row.limits.output_bytes,
            log_bytes: row.limits.log_bytes,
        }),
        retry: (row.retry != PartialRetry::default()).then(|| invocation_wire::RetryRequest {
            max_attempts: row.retry.max_attempts,
            backoff: row.retry.backoff.map(shape::backoff),
            initial_ms: row.retry.initial_ms,
            factor: row.retry.factor,
            max_ms: row.retry.max_ms,
            jitter: row.retry.jitter,
        }),
        grants: (row.grants != Grants::default()).then(|| wire::Grants {
            http: row.grants.http.clone(),
            kv: row.grants.kv,
            invoke: row.grants.invoke.clone(),
            secrets: row.grants.secrets.clone(),
            secret_headers: row.grants.secret_headers.iter().map(secret_header).collect(),
        }),
        config: row
            .config
            .iter()
            .filter_map(|(key, setting)| match setting {
                Setting::Plain(text) => Some((key.clone(), text.clone())),
                // `app` has opened what can be opened.
                Setting::Sealed { .. } => None,
            })
            .collect(),
        created_at: row.created_at,
        updated_at: row.updated_at,
        links: wire::TaskLinks {
            versions: format!("{this}/versions"),
            invocations: format!("{this}/invocations"),
            this,
        },
    }
}

fn secret_header(grant: &SecretHeader) -> wire::SecretHeader {
    wire::SecretHeader {
        secret: grant.secret.clone(),
        header: grant.header.clone(),
        host: grant.host.clone(),
    }
}

fn version(task: &TaskName, row: &VersionRow) -> wire::Version {
    wire::Version {
        task: task.as_str().to_owned(),
        version: row.number,
        state: match &row.state {
            VersionState::Compiling => wire::VersionState::Compiling,
            VersionState::Ready => wire::VersionState::Ready,
            VersionState::Rejected(_) => wire::VersionState::Rejected,
        },
        rejection: match &row.state {
            VersionState::Rejected(why) => Some(rejection(why)),
            VersionState::Compiling | VersionState::Ready => None,
        },
        kind: row.kind.as_str().to_owned(),
        sha256: row.hash.to_string(),
        size_bytes: row.size_bytes,
        manifest: row.manifest.as_ref().and_then(|m| serde_json::to_value(m).ok()),
        created_at: row.created_at,
        quarantine: row
            .quarantine
            .as_ref()
            .map(|(since, reason)| wire::Quarantine { since: *since, reason: reason.clone() }),
        links: wire::VersionLinks {
            this: format!("/v1/tasks/{task}/versions/{}", row.number),
            task: format!("/v1/tasks/{task}"),
            module: format!("/v1/tasks/{task}/versions/{}/module", row.number),
        },
    }
}

/// List tasks in the order of their names.
#[utoipa::path(
    get, path = "/v1/tasks", tag = "tasks",
    params(
        ("after" = Option<String>, Query, description = "Names after this one"),
        ("limit" = Option<u16>, Query, description = "Items of the page, 1 to 200; default 50"),
    ),
    responses(
        (status = 200, description = "A page of tasks", body = Page<wire::Task>),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Pairs(pairs): Pairs,
) -> Result<Json<Page<wire::Task>>, Problem> {
    let mut after = None;
    let mut size = PAGE.0;
    for (key, value) in pairs {
        match key.as_str() {
            "after" => {
                after = Some(TaskName::try_from(value).map_err(|e| Problem::new(Code::InvalidQuery, e))?);
            }
            "limit" => size = limit(&value)?,
            other => return Err(unknown_parameter(other, "after and limit")),
        }
    }
    let (rows, more) = api.app.tasks(tenant, after.as_ref(), size).await?;
    let last = rows.last().filter(|_| more);
    Ok(Json(Page {
        next: last.map(|row| format!("/v1/tasks?after={}&limit={size}", row.name)),
        items: rows.iter().map(task).collect(),
    }))
}

/// One task.
#[utoipa::path(
    get, path = "/v1/tasks/{task}", tag = "tasks",
    params(("task" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "The task", body = wire::Task),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "task-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get(
    State(api): State<Api>,
    Caller(tenant): Caller,
    TaskPath(name): TaskPath,
) -> Result<Json<wire::Task>, Problem> {
    Ok(Json(task(&api.app.task(tenant, &name).await?)))
}

fn change<T>(field: Field<T>) -> Change<T> {
    match field {
        Field::Absent => Change::Keep,
        Field::Null => Change::Reset,
        Field::Value(value) => Change::Set(value),
    }
}

/// As JSON again: that is how a merge patch is merged.
fn merge<T: Serialize>(field: Field<T>) -> Result<Change<serde_json::Value>, Problem> {
    Ok(match change(field) {
        Change::Keep => Change::Keep,
        Change::Reset => Change::Reset,
        Change::Set(value) => {
            let value = serde_json::to_value(&value);
            Change::Set(value.map_err(|error| Problem::new(Code::InvalidBody, error))?)
        }
    })
}

/// Change a task: description, default limits and retries of its invocations, what it is given, whether it is active, and the version
/// that plain invocations use. What was accepted before keeps what it was accepted with.
#[utoipa::path(
    patch, path = "/v1/tasks/{task}", tag = "tasks",
    params(("task" = String, Path, description = "Its name")),
    request_body(content((wire::TaskPatch = "application/merge-patch+json"), (wire::TaskPatch = "application/json"))),
    responses(
        (status = 200, description = "The task as it is now", body = wire::Task),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "task-not-found, version-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "version-not-ready, version-rejected", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 413, description = "body-too-large", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn patch(
    State(api): State<Api>,
    who: Who,
    TaskPath(name): TaskPath,
    MergePatch(body): MergePatch<wire::TaskPatch>,
) -> Result<Json<wire::Task>, Problem> {
    // Changing a task is one thing, opening the way out for it another.
    if !body.grants.is_absent() {
        who.authorize(Action::ChangeSecrets, Some(name.as_str()))?;
    }
    let patch = TaskChange {
        description: change(body.description),
        limits: merge(body.limits)?,
        retry: merge(body.retry)?,
        grants: merge(body.grants)?,
        config: merge(body.config)?,
        active: change(body.active),
        version: change(body.version),
    };
    Ok(Json(task(&api.app.change_task(who.0.tenant, &name, &patch).await?)))
}

/// Delete a task. Invocations that ended stay readable under its name; the name is free for another task. Modules
/// that no other task uses are freed some minutes later.
#[utoipa::path(
    delete, path = "/v1/tasks/{task}", tag = "tasks",
    params(
        ("task" = String, Path, description = "Its name"),
        ("cancel" = Option<bool>, Query, description = "Cancel its open invocations first; running ones are asked to stop. Default: false"),
    ),
    responses(
        (status = 204, description = "It is gone"),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "task-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "task-in-use", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 503, description = "timeout: it cancels what it can and accepts nothing new; repeat. database-unavailable", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn delete(
    State(api): State<Api>,
    Caller(tenant): Caller,
    TaskPath(name): TaskPath,
    Pairs(pairs): Pairs,
) -> Result<StatusCode, Problem> {
    let mut cancel = false;
    for (key, value) in pairs {
        match (key.as_str(), value.as_str()) {
            ("cancel", "true") => cancel = true,
            ("cancel", "false") => cancel = false,
            ("cancel", _) => {
                return Err(Problem::new(Code::InvalidQuery, "`cancel` must be true or false"));
            }
            (other, _) => return Err(unknown_parameter(other, "cancel")),
        }
    }
    api.app.delete_task(tenant, &name, cancel).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// List the versions of a task, newest first.
#[utoipa::path(
    get, path = "/v1/tasks/{task}/versions", tag = "tasks",
    params(
        ("task" = String, Path, description = "Its name"),
        ("before" = Option<i32>, Query, description = "Numbers below this one"),
        ("limit" = Option<u16>, Query, description = "Items of the page, 1 to 200; default 50"),
    ),
    responses(
        (status = 200, description = "A page of versions", body = Page<wire::Version>),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "task-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn versions(
    State(api): State<Api>,
    Caller(tenant): Caller,
    TaskPath(name): TaskPath,
    Pairs(pairs): Pairs,
) -> Result<Json<Page<wire::Version>>, Problem> {
    let mut before = None;
    let mut size = PAGE.0;
    for (key, value) in pairs {
        match key.as_str() {
            "before" => {
                let number = value.parse().map_err(|_| {
                    Problem::new(Code::InvalidQuery, "`before` must be the number of a version")
                })?;
                before = Some(number);
            }
            "limit" => size = limit(&value)?,
            other => return Err(unknown_parameter(other, "before and limit")),
        }
    }
    let (rows, more) = api.app.versions(tenant, &name, before, size).await?;
    let last = rows.last().filter(|_| more);
    Ok(Json(Page {
        next: last.map(|row| format!("/v1/tasks/{name}/versions?before={}&limit={size}", row.number)),
        items: rows.iter().map(|row| version(&name, row)).collect(),
    }))
}

/// One version.
#[utoipa::path(
    get, path = "/v1/tasks/{task}/versions/{version}", tag = "tasks",
    params(
        ("task" = String, Path, description = "Name of the task"),
        ("version" = i32, Path, description = "Number of the version"),
    ),
    responses(
        (status = 200, description = "The version", body = wire::Version),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "task-not-found, version-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn version_get(
    State(api): State<Api>,
    Caller(tenant): Caller,
    VersionPath(name, number): VersionPath,
) -> Result<Json<wire::Version>, Problem> {
    let row = api.app.version(tenant, &name, number).await?;
    Ok(Json(version(&name, &row)))
}

/// The uploaded bytes of a version; of an HTTP request, its definition.
#[utoipa::path(
    get, path = "/v1/tasks/{task}/versions/{version}/module", tag = "tasks",
    params(
        ("task" = String, Path, description = "Name of the task"),
        ("version" = i32, Path, description = "Number of the version"),
        ("If-None-Match" = Option<String>, Header, description = "ETag of bytes that the client has"),
    ),
    responses(
        (status = 200, description = "The bytes", content((Vec<u8> = "application/wasm"), (wire::Definition = "application/json")), headers(("ETag" = String, description = "SHA-256 of the bytes"))),
        (status = 304, description = "The client has them"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "task-not-found, version-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn module(
    State(api): State<Api>,
    Caller(tenant): Caller,
    VersionPath(name, number): VersionPath,
    asked: HeaderMap,
) -> Result<Response, Problem> {
    let row = api.app.version(tenant, &name, number).await?;
    let tag = format!("\"{}\"", row.hash);
    let mut headers = HeaderMap::new();
    let (media_type, extension) = match row.kind {
        Kind::Module(_) => ("application/wasm", "wasm"),
        Kind::Http => ("application/json", "json"),
    };
    let file = format!("attachment; filename=\"{name}-{number}.{extension}\"");
    for (header, value) in [
        (ETAG, tag.as_str()),
        (CONTENT_TYPE, media_type),
        (CONTENT_DISPOSITION, file.as_str()),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ] {
        headers.insert(header, HeaderValue::from_str(value).map_err(|e| Problem::new(Code::Internal, e))?);
    }
    let known = asked.get(IF_NONE_MATCH).and_then(|v| v.to_str().ok()).unwrap_or_default();
    if known.split(',').any(|one| one.trim().trim_start_matches("W/") == tag || one.trim() == "*") {
        return Ok((StatusCode::NOT_MODIFIED, headers).into_response());
    }
    headers.insert(CONTENT_LENGTH, row.size_bytes.into());
    let body = Body::from_stream(api.app.module(tenant, row.hash).map_err(|error| {
        tracing::warn!(%error, "a module's bytes broke off");
        error
    }));
    Ok((headers, body).into_response())
}

/// Take a version out of quarantine, where it is because it was running when two cells died. For operators of the
/// platform: the tenant whose module it is cannot. Dead invocations of it are not run again by this.
#[utoipa::path(
    post, path = "/v1/tasks/{task}/versions/{version}/release", tag = "tasks",
    params(
        ("task" = String, Path, description = "Name of the task"),
        ("version" = i32, Path, description = "Number of the version"),
        ("tenant" = Option<uuid::Uuid>, Query, description = "Whose task it is; the caller's own if absent"),
    ),
    responses(
        (status = 200, description = "The version; also if it was not in quarantine", body = wire::Version),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden: the key is not the platform's", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "task-not-found, version-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn version_release(
    State(api): State<Api>,
    _: Operator,
    Caller(own): Caller,
    VersionPath(name, number): VersionPath,
    Pairs(pairs): Pairs,
) -> Result<Json<wire::Version>, Problem> {
    let mut tenant = own;
    for (key, value) in pairs {
        match key.as_str() {
            "tenant" => {
                tenant = value
                    .parse()
                    .map_err(|_| Problem::new(Code::InvalidQuery, "`tenant` must be the id of a tenant"))?;
            }
            other => return Err(unknown_parameter(other, "tenant")),
        }
    }
    let row = api.app.version_release(tenant, &name, number).await?;
    Ok(Json(version(&name, &row)))
}

/// Upload a module as a version of a task, which the first upload makes. The same bytes give the version they already
/// have. Compilation goes on in the background; `Prefer: wait=N` waits for it. A definition in JSON stands in place of a
/// module, and is ready at once.
#[utoipa::path(
    post, path = "/v1/tasks/{task}/versions", tag = "tasks",
    params(
        ("task" = String, Path, description = "Its name: 1 to 63 of a-z, 0-9, - and _, beginning with a letter or a digit"),
        ("Prefer" = Option<String>, Header, description = "wait=N: answer when the version is ready or rejected, or after N seconds"),
    ),
    request_body(content((Vec<u8> = "application/wasm"), (wire::Definition = "application/json")), description = "The module: a component of the world sandbar:task, or a WASI command. Or what the worker is to do without one"),
    responses(
        (status = 200, description = "These bytes are a version already", body = wire::Version),
        (status = 201, description = "A new version", body = wire::Version, headers(("Location" = String, description = "The version"))),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden, over-quota", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 408, description = "request-too-slow", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 413, description = "module-too-large, body-too-large", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-task-name, invalid-body: the definition is not one that could be carried out, module-…: the module cannot run here; `rejection` says why", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 429, description = "rate-limited, compile-queue-full: too many uploads of the tenant wait to be compiled", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 503, description = "overloaded, database-unavailable, timeout", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn upload(
    State(api): State<Api>,
    Caller(tenant): Caller,
    NewTaskPath(name): NewTaskPath,
    prefer: PreferWait,
    upload: Upload<wire::Definition>,
) -> Result<Response, Problem> {
    let wait = prefer.up_to(api.app.settings().max_wait);
    let uploaded = match upload {
        Upload::Module(body, declared) => {
            api.app.upload(tenant, &name, declared, body.into_data_stream(), wait).await?
        }
        Upload::Definition(definition) => api.app.define(tenant, &name, definition.http).await?,
    };
    let body = version(&name, &uploaded.version);
    let mut headers = HeaderMap::new();
    if let Ok(location) = HeaderValue::from_str(&body.links.this) {
        headers.insert(LOCATION, location);
    }
    if let Some(wait) = wait {
        super::preference_applied(&mut headers, wait);
    }
    let status = if uploaded.created { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, headers, Json(body)).into_response())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::domain::ids::TaskId;
    use crate::domain::retry::Backoff;

    #[test]
    fn shape_of_a_task_with_and_without_what_people_set() {
        let at = chrono::DateTime::from_timestamp_millis(1_760_000_000_000).unwrap();
        let plain = TaskRow {
            id: TaskId(uuid::Uuid::from_u128(1)),
            name: "word-count".to_owned(),
            description: None,
            current_version: None,
            pinned_version: None,
            active: true,
            limits: PartialLimits::default(),
            retry: PartialRetry::default(),
            grants: Grants::default(),
            config: std::collections::BTreeMap::new(),
            created_at: at,
            updated_at: at,
        };
        insta::assert_json_snapshot!(task(&plain));
        let set = TaskRow {
            description: Some("Counts words".to_owned()),
            current_version: Some(2),
            pinned_version: Some(2),
            active: false,
            grants: Grants {
                http: vec!["api.example.com".to_owned()],
                kv: true,
                invoke: vec!["fetch-page".to_owned()],
                secrets: vec!["SIGNING_KEY".to_owned()],
                secret_headers: vec![SecretHeader {
                    secret: "API_TOKEN".to_owned(),
                    header: "authorization".to_owned(),
                    host: "https://api.example.com".to_owned(),
                }],
            },
            config: [("greeting".to_owned(), Setting::Plain("hello".to_owned()))].into(),
            limits: PartialLimits { fuel: Some(5), ..PartialLimits::default() },
            retry: PartialRetry { backoff: Some(Backoff::Fixed), ..PartialRetry::default() },
            ..plain
        };
        insta::assert_json_snapshot!(task(&set));
    }
}
