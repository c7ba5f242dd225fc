//! `/v1/budgets` and `/v1/events`.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use crate::api::extract::{self, BudgetPath, Caller, Pairs};
use crate::api::problem::{Code, Problem};
use crate::api::{Api, PAGE, again, limit, unknown_parameter};
use crate::app::FieldError;
use crate::domain::names::TaskName;
use crate::domain::spending::{Measure, Period, THRESHOLDS};
use crate::store::spending::{Budget, BudgetRow, EventRow};
use crate::wire::Page;
use crate::wire::problem as problem_wire;
use crate::wire::spending as wire;

fn shape(row: BudgetRow) -> wire::Budget {
    let Budget { name, task, measure, period, amount, thresholds } = row.budget;
    wire::Budget {
        name: name.as_str().to_owned(),
        task: task.map(|task| task.as_str().to_owned()),
        measure: match measure {
            Measure::Fuel => wire::Measure::Fuel,
            Measure::CpuSeconds => wire::Measure::CpuS,
            Measure::Attempts => wire::Measure::Attempts,
        },
        period: match period {
            Period::Day => wire::BudgetPeriod::Day,
            Period::Month => wire::BudgetPeriod::Month,
        },
        amount,
        thresholds,
        used: row.used,
        starts_at: row.starts_at,
        ends_at: row.ends_at,
        updated_at: row.updated_at,
    }
}

fn event(row: EventRow) -> wire::Event {
    wire::Event { id: row.id, at: row.at, kind: row.kind, data: row.data }
}

/// Your tenant's budgets, and what is used of each.
#[utoipa::path(
    get, path = "/v1/budgets", tag = "tenants",
    responses(
        (status = 200, description = "All of them, by name", body = wire::Budgets),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list(
    State(api): State<Api>,
    Caller(tenant): Caller,
) -> Result<Json<wire::Budgets>, Problem> {
    let items = api.app.budgets(tenant).await?.into_iter().map(shape).collect();
    Ok(Json(wire::Budgets { items }))
}

/// Set a budget over the ledger of usage, new or changed: each threshold that is reached becomes an event, once in a period.
/// It stops nothing; quotas do. What was used before it was set counts. A changed amount does not repeat events of the
/// period; a budget that measures something else begins anew.
#[utoipa::path(
    put, path = "/v1/budgets/{name}", tag = "tenants",
    params(("name" = String, Path, description = "Its name")),
    request_body(content = wire::BudgetRequest, content_type = "application/json"),
    responses(
        (status = 200, description = "The budget", body = wire::Budget),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "over-quota, forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "budget-not-found, task-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn put(
    State(api): State<Api>,
    Caller(tenant): Caller,
    BudgetPath(name): BudgetPath,
    body: extract::Json<wire::BudgetRequest>,
) -> Result<Json<wire::Budget>, Problem> {
    let asked = body.into_parts().0;
    let task = asked.task.map(TaskName::try_from).transpose().map_err(|error| {
        Problem::new(Code::InvalidBody, "the request body has invalid values")
            .with_errors(vec![FieldError::new("/task", error.to_string())])
    })?;
    let budget = Budget {
        name,
        task,
        measure: match asked.measure {
            wire::Measure::Fuel => Measure::Fuel,
            wire::Measure::CpuS => Measure::CpuSeconds,
            wire::Measure::Attempts => Measure::Attempts,
        },
        period: match asked.period {
            wire::BudgetPeriod::Day => Period::Day,
            wire::BudgetPeriod::Month => Period::Month,
        },
        amount: asked.amount,
        thresholds: asked.thresholds.unwrap_or_else(|| THRESHOLDS.to_vec()),
    };
    Ok(Json(shape(api.app.set_budget(tenant, budget).await?)))
}

/// Delete a budget. Its events stay.
#[utoipa::path(
    delete, path = "/v1/budgets/{name}", tag = "tenants",
    params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "budget-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn delete(
    State(api): State<Api>,
    Caller(tenant): Caller,
    BudgetPath(name): BudgetPath,
) -> Result<StatusCode, Problem> {
    api.app.delete_budget(tenant, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What happened to your tenant that somebody should know, newest first: thresholds of budgets that were reached.
#[utoipa::path(
    get, path = "/v1/events", tag = "tenants",
    params(
        ("after" = Option<uuid::Uuid>, Query, description = "Older than this one"),
        ("limit" = Option<u16>, Query, description = "Items of the page, 1 to 200; default 50"),
    ),
    responses(
        (status = 200, description = "A page of events", body = Page<wire::Event>),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn events(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Pairs(pairs): Pairs,
) -> Result<Json<Page<wire::Event>>, Problem> {
    let (mut after, mut size) = (None, PAGE.0);
    for (key, value) in &pairs {
        match key.as_str() {
            "after" => {
                let wrong = |_| Problem::new(Code::InvalidQuery, "`after` must be the id of an event");
                after = Some(value.parse().map_err(wrong)?);
            }
            "limit" => size = limit(value)?,
            other => return Err(unknown_parameter(other, "after and limit")),
        }
    }
    let (rows, more) = api.app.events(tenant, after, size).await?;
    let next = rows.last().filter(|_| more).map(|last| again("/v1/events", &pairs, last.id));
    Ok(Json(Page { items: rows.into_iter().map(event).collect(), next }))
}
