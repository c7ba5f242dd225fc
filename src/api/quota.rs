//! `/v1/quotas`, `/v1/tenants/{tenant}/quotas`, `/v1/tasks/{task}/quotas` and `/v1/plans`.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use crate::api::Api;
use crate::api::extract::{self, Caller, MergePatch, Operator, PlanPath, TaskPath, TenantPath};
use crate::api::problem::{Code, Problem};
use crate::app::FieldError;
use crate::app::quota::{Change, Standing};
use crate::domain::quota::{Amount, Level, Quota};
use crate::wire::problem as problem_wire;
use crate::wire::quota as wire;

fn shape(plan: Option<String>, standings: &[Standing]) -> wire::Quotas {
    let quotas = standings.iter().map(|standing| wire::QuotaStanding {
        name: standing.quota.as_str().to_owned(),
        limit: standing.amount,
        source: standing.source.as_str().to_owned(),
        effect: standing.quota.effect().as_str().to_owned(),
        used: standing.used,
        resets_at: standing.resets_at,
    });
    wire::Quotas { plan, quotas: quotas.collect() }
}

fn named(level: &Level) -> BTreeMap<String, Amount> {
    let said = |quota: &Quota| Some((quota.as_str().to_owned(), level.get(*quota)?));
    Quota::ALL.iter().filter_map(said).collect()
}

pub(super) fn changes(quotas: BTreeMap<String, Option<Amount>>) -> Result<Vec<Change>, Problem> {
    quotas
        .into_iter()
        .map(|(name, amount)| match name.parse::<Quota>() {
            Ok(quota) => Ok((quota, amount)),
            Err(error) => {
                let pointer = format!("/quotas/{}", name.chars().take(64).collect::<String>());
                Err(Problem::new(Code::InvalidBody, "the request body has invalid values")
                    .with_errors(vec![FieldError::new(pointer, format!("{error}"))]))
            }
        })
        .collect()
}

/// What your tenant may use, what it uses, and what happens when a quota is hit.
#[utoipa::path(
    get, path = "/v1/quotas", tag = "tenants",
    responses(
        (status = 200, description = "Every quota", body = wire::Quotas),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn own(
    State(api): State<Api>,
    Caller(tenant): Caller,
) -> Result<Json<wire::Quotas>, Problem> {
    let (plan, standings) = api.app.quotas(tenant).await?;
    Ok(Json(shape(plan, &standings)))
}

/// What a tenant may use. For operators of the platform.
#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/quotas", tag = "tenants",
    params(("tenant" = String, Path, description = "Its name or id")),
    responses(
        (status = 200, description = "Every quota", body = wire::Quotas),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "tenant-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get(
    State(api): State<Api>,
    _: Operator,
    TenantPath(name): TenantPath,
) -> Result<Json<wire::Quotas>, Problem> {
    let tenant = api.app.tenant_named(&name).await?;
    let (plan, standings) = api.app.quotas(tenant).await?;
    Ok(Json(shape(plan, &standings)))
}

/// Change what a tenant may use: its plan, and quotas of its own. Holds on every server within 5 s. For operators of the
/// platform.
#[utoipa::path(
    patch, path = "/v1/tenants/{tenant}/quotas", tag = "tenants",
    params(("tenant" = String, Path, description = "Its name or id")),
    request_body(content((wire::QuotasPatch = "application/merge-patch+json"), (wire::QuotasPatch = "application/json"))),
    responses(
        (status = 200, description = "Every quota as it is now", body = wire::Quotas),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "tenant-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn patch(
    State(api): State<Api>,
    _: Operator,
    TenantPath(name): TenantPath,
    MergePatch(body): MergePatch<wire::QuotasPatch>,
) -> Result<Json<wire::Quotas>, Problem> {
    let tenant = api.app.tenant_named(&name).await?;
    api.app.change_quotas(tenant, body.plan.into_option(), &changes(body.quotas)?).await?;
    let (plan, standings) = api.app.quotas(tenant).await?;
    Ok(Json(shape(plan, &standings)))
}

/// The shares that a task has of its tenant's quotas.
#[utoipa::path(
    get, path = "/v1/tasks/{task}/quotas", tag = "tasks",
    params(("task" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "Its shares", body = wire::TaskQuotas),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "task-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn task(
    State(api): State<Api>,
    Caller(tenant): Caller,
    TaskPath(name): TaskPath,
) -> Result<Json<wire::TaskQuotas>, Problem> {
    let level = api.app.task_quotas(tenant, &name).await?;
    Ok(Json(shares(&level)))
}

/// Give a task shares of its tenant's quotas; the tenant's own quotas hold besides.
#[utoipa::path(
    patch, path = "/v1/tasks/{task}/quotas", tag = "tasks",
    params(("task" = String, Path, description = "Its name")),
    request_body(content((wire::TaskQuotas = "application/merge-patch+json"), (wire::TaskQuotas = "application/json"))),
    responses(
        (status = 200, description = "Its shares as they are now", body = wire::TaskQuotas),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden, over-quota", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "task-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn patch_task(
    State(api): State<Api>,
    Caller(tenant): Caller,
    TaskPath(name): TaskPath,
    MergePatch(body): MergePatch<wire::TaskQuotas>,
) -> Result<Json<wire::TaskQuotas>, Problem> {
    let level = api.app.change_task_quotas(tenant, &name, &changes(body.quotas)?).await?;
    Ok(Json(shares(&level)))
}

fn shares(level: &Level) -> wire::TaskQuotas {
    let quotas = named(level).into_iter().map(|(name, amount)| (name, Some(amount)));
    wire::TaskQuotas { quotas: quotas.collect() }
}

/// The plans of the platform. For its operators.
#[utoipa::path(
    get, path = "/v1/plans", tag = "tenants",
    responses(
        (status = 200, description = "Every plan", body = wire::Plans),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn plans(State(api): State<Api>, _: Operator) -> Result<Json<wire::Plans>, Problem> {
    let items = api.app.plans().await?.into_iter().map(|plan| wire::Plan {
        quotas: named(&plan.quotas),
        name: plan.name,
        updated_at: plan.updated_at,
    });
    Ok(Json(wire::Plans { items: items.collect() }))
}

/// Make a plan, or let an existing one say this and nothing else: holds for its tenants within 5 s. Queue depth,
/// concurrency and weight are set for each tenant. For operators of the platform.
#[utoipa::path(
    put, path = "/v1/plans/{plan}", tag = "tenants",
    params(("plan" = String, Path, description = "Its name")),
    request_body(content = wire::PlanRequest, content_type = "application/json"),
    responses(
        (status = 204, description = "It says this"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "over-quota, forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn set_plan(
    State(api): State<Api>,
    _: Operator,
    PlanPath(name): PlanPath,
    body: extract::Json<wire::PlanRequest>,
) -> Result<StatusCode, Problem> {
    let quotas = body.into_parts().0.quotas;
    let quotas = quotas.into_iter().map(|(name, amount)| (name, Some(amount))).collect();
    api.app.set_plan(&name, &changes(quotas)?).await?;
    Ok(StatusCode::NO_CONTENT)
}
