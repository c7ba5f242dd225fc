//! `/v1/pauses`: pause and resume a tenant, a task or a tag.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use crate::api::Api;
use crate::api::extract::{self, Caller, IdPath};
use crate::api::problem::{Code, Problem};
use crate::app::FieldError;
use crate::domain::ids::PauseId;
use crate::domain::names::{Tags, TaskName};
use crate::store::pause::{Pause, Target};
use crate::wire::Page;
use crate::wire::bulk as wire;
use crate::wire::problem as problem_wire;

fn pause(row: &Pause) -> wire::Pause {
    wire::Pause {
        id: row.id.0,
        target: match &row.target {
            Target::Tenant => wire::PauseTarget::Tenant {},
            Target::Task(name) => wire::PauseTarget::Task { task: name.clone() },
            Target::Tag(key, value) => wire::PauseTarget::Tag { key: key.clone(), value: value.clone() },
        },
        created_at: row.created_at,
    }
}

fn target(body: wire::PauseTarget) -> Result<Target, Problem> {
    let invalid = |pointer: &'static str, detail: String| {
        Problem::new(Code::InvalidBody, "the request body has invalid values")
            .with_errors(vec![FieldError::new(pointer, detail)])
    };
    Ok(match body {
        wire::PauseTarget::Tenant {} => Target::Tenant,
        wire::PauseTarget::Task { task } => {
            let name = TaskName::try_from(task).map_err(|e| invalid("/task", e.to_string()))?;
            Target::Task(name.as_str().to_owned())
        }
        wire::PauseTarget::Tag { key, value } => {
            // Checked as tags are.
            Tags::try_from(BTreeMap::from([(key.clone(), value.clone())]))
                .map_err(|e| invalid("/key", e.to_string()))?;
            Target::Tag(key, value)
        }
    })
}

/// Pause a tenant, a task or a tag: on return nothing of it is started any more, what comes waits, and what runs goes on.
/// Pausing what is paused gives the pause there is.
#[utoipa::path(
    post, path = "/v1/pauses", tag = "operations",
    request_body(content = wire::PauseTarget, content_type = "application/json"),
    responses(
        (status = 200, description = "It was paused before", body = wire::Pause),
        (status = 201, description = "It is paused", body = wire::Pause),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "task-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn create(
    State(api): State<Api>,
    Caller(tenant): Caller,
    body: extract::Json<wire::PauseTarget>,
) -> Result<(StatusCode, Json<wire::Pause>), Problem> {
    let (body, _) = body.into_parts();
    let (row, new) = api.app.pause(tenant, target(body)?).await?;
    Ok((if new { StatusCode::CREATED } else { StatusCode::OK }, Json(pause(&row))))
}

/// Every pause, oldest first.
#[utoipa::path(
    get, path = "/v1/pauses", tag = "operations",
    responses(
        (status = 200, description = "Pauses", body = Page<wire::Pause>),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list(
    State(api): State<Api>,
    Caller(tenant): Caller,
) -> Result<Json<Page<wire::Pause>>, Problem> {
    let rows = api.app.pauses(tenant).await?;
    Ok(Json(Page { items: rows.iter().map(pause).collect(), next: None }))
}

/// Resume: what waited may be started again, within a second or so.
#[utoipa::path(
    delete, path = "/v1/pauses/{id}", tag = "operations",
    params(("id" = uuid::Uuid, Path, description = "Id of the pause")),
    responses(
        (status = 204, description = "It is over"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "pause-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn delete(
    State(api): State<Api>,
    Caller(tenant): Caller,
    id: IdPath<PauseId>,
) -> Result<StatusCode, Problem> {
    let id = id.or(Code::PauseNotFound)?;
    api.app.resume(tenant, id).await?;
    Ok(StatusCode::NO_CONTENT)
}
