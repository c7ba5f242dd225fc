//! `/v1/bulk`: one action for many invocations.

use axum::Json;
use axum::extract::State;
use axum::http::header::LOCATION;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};

use crate::api::dead_letter::{hex, unhex};
use crate::api::extract::{self, Caller, IdPath, Pairs};
use crate::api::problem::{Code, Problem};
use crate::api::{Api, PAGE, limit, shape, unknown_parameter};
use crate::app::FieldError;
use crate::app::bulk::{Asked, Request};
use crate::domain::bulk::Action;
use crate::domain::ids::BulkId;
use crate::domain::names::{Tags, TaskName};
use crate::store::bulk::Operation;
use crate::wire::Page;
use crate::wire::bulk as wire;
use crate::wire::problem as problem_wire;

/// Longest reason that is looked for; ours are shorter.
const MAX_REASON: usize = 64;

fn operation(row: &Operation) -> wire::BulkOperation {
    let this = format!("/v1/bulk/{}", row.asked.id);
    let filter = &row.asked.filter;
    let state = match row.state.as_str() {
        "waiting" => wire::BulkState::Waiting,
        "running" => wire::BulkState::Running,
        "done" => wire::BulkState::Done,
        "cancelled" => wire::BulkState::Cancelled,
        _ => wire::BulkState::Failed,
    };
    wire::BulkOperation {
        id: row.asked.id.0,
        action: match row.asked.action {
            Action::Cancel => wire::BulkAction::Cancel,
            Action::Reprioritise => wire::BulkAction::Reprioritise,
            Action::Retry => wire::BulkAction::Retry,
            Action::Purge => wire::BulkAction::Purge,
        },
        filter: wire::BulkFilter {
            state: filter.states.iter().copied().map(shape::state).collect(),
            task: filter.task.as_ref().map(|(_, name)| name.clone()),
            tags: filter.tags.clone(),
            created_after: filter.created_after,
            created_before: filter.created_before,
            fingerprint: filter.fingerprint.as_deref().map(hex),
            reason: filter.reason.clone(),
        },
        priority: row.asked.priority,
        version: row.asked.version,
        rate_per_second: row.asked.rate,
        expected: wire::BulkCount { matched: row.asked.expected.0, exact: row.asked.expected.1 },
        matched: row.matched,
        done: row.done,
        skipped: row.skipped,
        failed: row.failed,
        error: row.error.clone(),
        created_at: row.created_at,
        started_at: row.started_at,
        finished_at: row.finished_at,
        links: wire::BulkLinks { cancel: row.finished_at.is_none().then(|| format!("{this}/cancel")), this },
        state,
    }
}

fn invalid(pointer: &'static str, detail: impl Into<String>) -> Problem {
    Problem::new(Code::InvalidBody, "the request body has invalid values")
        .with_errors(vec![FieldError::new(pointer, detail)])
}

fn request(body: wire::BulkRequest) -> Result<Request, Problem> {
    let filter = body.filter;
    let task = filter.task.map(TaskName::try_from).transpose();
    let tags = Tags::try_from(filter.tags).map_err(|e| invalid("/filter/tags", e.to_string()))?;
    if filter.reason.as_ref().is_some_and(|reason| reason.len() > MAX_REASON || reason.contains('\0')) {
        return Err(invalid("/filter/reason", "must be that of a termination"));
    }
    Ok(Request {
        action: match body.action {
            wire::BulkAction::Cancel => Action::Cancel,
            wire::BulkAction::Reprioritise => Action::Reprioritise,
            wire::BulkAction::Retry => Action::Retry,
            wire::BulkAction::Purge => Action::Purge,
        },
        states: filter.state.into_iter().map(shape::stand).collect(),
        task: task.map_err(|e| invalid("/filter/task", e.to_string()))?,
        tags: tags.into(),
        created_after: filter.created_after,
        created_before: filter.created_before,
        fingerprint: match filter.fingerprint {
            None => None,
            Some(text) => Some(
                unhex(&text)
                    .ok_or_else(|| invalid("/filter/fingerprint", "must be sixteen hexadecimal digits"))?,
            ),
        },
        reason: filter.reason,
        priority: body.priority,
        version: body.version,
        rate: body.rate_per_second,
    })
}

/// Do something to every invocation that passes a filter: cancel, reprioritise, retry, purge. Done in the background, in
/// transactions of at most 500, each written down with its progress, so that a crash neither loses nor repeats any. With
/// `dry_run` it is only counted. To pause and resume: `/v1/pauses`.
#[utoipa::path(
    post, path = "/v1/bulk", tag = "operations",
    request_body(content = wire::BulkRequest, content_type = "application/json"),
    responses(
        (status = 200, description = "The count of a dry run", body = wire::BulkCount),
        (status = 202, description = "It will be done", body = wire::BulkOperation, headers(("Location" = String, description = "The operation"))),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "task-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 429, description = "rate-limited; quota-exceeded: 20 are open", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn create(
    State(api): State<Api>,
    Caller(tenant): Caller,
    body: extract::Json<wire::BulkRequest>,
) -> Result<Response, Problem> {
    let (body, _) = body.into_parts();
    let dry_run = body.dry_run;
    match api.app.bulk(tenant, request(body)?, dry_run).await? {
        Asked::Count(matched, exact) => Ok(Json(wire::BulkCount { matched, exact }).into_response()),
        Asked::Accepted(row) => {
            let body = operation(&row);
            let mut headers = HeaderMap::new();
            if let Ok(location) = HeaderValue::from_str(&body.links.this) {
                headers.insert(LOCATION, location);
            }
            Ok((StatusCode::ACCEPTED, headers, Json(body)).into_response())
        }
    }
}

/// List bulk operations, newest first.
#[utoipa::path(
    get, path = "/v1/bulk", tag = "operations",
    params(
        ("after" = Option<uuid::Uuid>, Query, description = "Older than this operation"),
        ("limit" = Option<u16>, Query, description = "Items of the page, 1 to 200; default 50"),
    ),
    responses(
        (status = 200, description = "A page of operations", body = Page<wire::BulkOperation>),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Pairs(pairs): Pairs,
) -> Result<Json<Page<wire::BulkOperation>>, Problem> {
    let mut after = None;
    let mut size = PAGE.0;
    for (key, value) in pairs {
        match key.as_str() {
            "after" => {
                let id = value.parse().map_err(|_| {
                    Problem::new(Code::InvalidQuery, "`after` must be the id of an operation")
                })?;
                after = Some(id);
            }
            "limit" => size = limit(&value)?,
            other => return Err(unknown_parameter(other, "after and limit")),
        }
    }
    let (rows, more) = api.app.bulk_list(tenant, after, size).await?;
    let last = rows.last().filter(|_| more);
    Ok(Json(Page {
        next: last.map(|row| format!("/v1/bulk?after={}&limit={size}", row.asked.id)),
        items: rows.iter().map(operation).collect(),
    }))
}

/// One bulk operation with its progress.
#[utoipa::path(
    get, path = "/v1/bulk/{id}", tag = "operations",
    params(("id" = uuid::Uuid, Path, description = "Its id")),
    responses(
        (status = 200, description = "The operation", body = wire::BulkOperation),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "bulk-operation-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get(
    State(api): State<Api>,
    Caller(tenant): Caller,
    id: IdPath<BulkId>,
) -> Result<Json<wire::BulkOperation>, Problem> {
    let id = id.or(Code::BulkOperationNotFound)?;
    Ok(Json(operation(&api.app.bulk_get(tenant, id).await?)))
}

/// Stop a bulk operation where it is. What is done stays done.
#[utoipa::path(
    post, path = "/v1/bulk/{id}/cancel", tag = "operations",
    params(("id" = uuid::Uuid, Path, description = "Its id")),
    responses(
        (status = 200, description = "The operation: cancelled, or what it was if it was over", body = wire::BulkOperation),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "bulk-operation-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn cancel(
    State(api): State<Api>,
    Caller(tenant): Caller,
    id: IdPath<BulkId>,
) -> Result<Json<wire::BulkOperation>, Problem> {
    let id = id.or(Code::BulkOperationNotFound)?;
    Ok(Json(operation(&api.app.bulk_cancel(tenant, id).await?)))
}
