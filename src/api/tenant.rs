//! `/v1/tenants`: for operators of the platform.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CACHE_CONTROL;
use axum::http::{HeaderName, HeaderValue};

use crate::api::access::Who;
use crate::api::extract::{self, IdPath, Operator, Pairs};
use crate::api::problem::{Code, Problem};
use crate::api::{Api, PAGE, limit, unknown_parameter};
use crate::domain::ids::TenantId;
use crate::store::tenant::{TenantRow, TenantState};
use crate::wire::Page;
use crate::wire::problem as problem_wire;
use crate::wire::tenant as wire;

fn tenant(row: TenantRow) -> wire::Tenant {
    wire::Tenant {
        id: row.id.0,
        name: row.name,
        state: match row.state {
            TenantState::Active => wire::TenantState::Active,
            TenantState::Suspended => wire::TenantState::Suspended,
            TenantState::Deleting => wire::TenantState::Deleting,
        },
        weight: row.weight,
        created_at: row.created_at,
        changed_at: row.changed_at,
        delete_after: row.delete_after,
    }
}

/// List tenants by name.
#[utoipa::path(
    get, path = "/v1/tenants", tag = "tenants",
    params(
        ("after" = Option<String>, Query, description = "Names after this one"),
        ("limit" = Option<u16>, Query, description = "Items of the page, 1 to 200; default 50"),
    ),
    responses(
        (status = 200, description = "A page of tenants", body = Page<wire::Tenant>),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list(
    State(api): State<Api>,
    _: Operator,
    Pairs(pairs): Pairs,
) -> Result<Json<Page<wire::Tenant>>, Problem> {
    let (mut after, mut size) = (String::new(), PAGE.0);
    for (key, value) in pairs {
        match key.as_str() {
            "after" if value.len() <= 63 && !value.contains('\0') => after = value,
            "after" => return Err(Problem::new(Code::InvalidQuery, "`after` must be the name of a tenant")),
            "limit" => size = limit(&value)?,
            other => return Err(unknown_parameter(other, "after and limit")),
        }
    }
    let (rows, more) = api.app.tenants(&after, size).await?;
    let next = rows.last().filter(|_| more).map(|row| format!("/v1/tenants?limit={size}&after={}", row.name));
    Ok(Json(Page { items: rows.into_iter().map(tenant).collect(), next }))
}

/// Make a tenant, and invite its owner.
#[utoipa::path(
    post, path = "/v1/tenants", tag = "tenants",
    request_body(content = wire::NewTenant, content_type = "application/json"),
    responses(
        (status = 201, description = "The tenant", body = wire::MadeTenant),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "tenant-name-taken", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn create(
    State(api): State<Api>,
    Who(who): Who,
    body: extract::Json<wire::NewTenant>,
) -> Result<(StatusCode, [(HeaderName, HeaderValue); 1], Json<wire::MadeTenant>), Problem> {
    let (asked, _) = body.into_parts();
    let (made, invitation_token) = api.app.make_tenant(&who, &asked.name, asked.owner.as_deref()).await?;
    let no_store = [(CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    Ok((StatusCode::CREATED, no_store, Json(wire::MadeTenant { tenant: tenant(made), invitation_token })))
}

/// One tenant.
#[utoipa::path(
    get, path = "/v1/tenants/{id}", tag = "tenants",
    params(("id" = uuid::Uuid, Path, description = "Id of the tenant")),
    responses(
        (status = 200, description = "The tenant", body = wire::Tenant),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "tenant-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get(
    State(api): State<Api>,
    _: Operator,
    id: IdPath<TenantId>,
) -> Result<Json<wire::Tenant>, Problem> {
    Ok(Json(tenant(api.app.tenant_row(id.or(Code::TenantNotFound)?).await?)))
}

/// Suspend a tenant, or make it active again: also one whose deletion has not begun. It holds at once on this server, and
/// within five seconds on every other.
#[utoipa::path(
    patch, path = "/v1/tenants/{id}", tag = "tenants",
    params(("id" = uuid::Uuid, Path, description = "Id of the tenant")),
    request_body(content = wire::TenantPatch, content_type = "application/json"),
    responses(
        (status = 200, description = "The tenant", body = wire::Tenant),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "tenant-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "own-tenant", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn patch(
    State(api): State<Api>,
    Who(who): Who,
    id: IdPath<TenantId>,
    body: extract::Json<wire::TenantPatch>,
) -> Result<Json<wire::Tenant>, Problem> {
    let (asked, _) = body.into_parts();
    let id = id.or(Code::TenantNotFound)?;
    let state = match asked.state {
        wire::WantedState::Active => TenantState::Active,
        wire::WantedState::Suspended => TenantState::Suspended,
    };
    Ok(Json(tenant(api.app.set_tenant(&who, id, state, None, asked.cancel).await?)))
}

/// Delete a tenant with everything of it, after a grace time in which it can be made active again. What runs is cancelled.
#[utoipa::path(
    delete, path = "/v1/tenants/{id}", tag = "tenants",
    params(
        ("id" = uuid::Uuid, Path, description = "Id of the tenant"),
        ("grace_s" = Option<u32>, Query, description = "Seconds until everything goes; default 604,800 (7 days), at most 7,776,000 (90 days)"),
    ),
    responses(
        (status = 202, description = "It will be deleted at `delete_after`", body = wire::Tenant),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "tenant-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "own-tenant", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn delete(
    State(api): State<Api>,
    Who(who): Who,
    id: IdPath<TenantId>,
    Pairs(pairs): Pairs,
) -> Result<(StatusCode, Json<wire::Tenant>), Problem> {
    let id = id.or(Code::TenantNotFound)?;
    let mut grace = None;
    for (key, value) in pairs {
        match key.as_str() {
            "grace_s" => {
                let seconds = value.parse();
                let wrong = |_| Problem::new(Code::InvalidQuery, "`grace_s` must be a number of seconds");
                grace = Some(seconds.map_err(wrong)?);
            }
            other => return Err(unknown_parameter(other, "grace_s")),
        }
    }
    let row = api.app.set_tenant(&who, id, TenantState::Deleting, grace, true).await?;
    Ok((StatusCode::ACCEPTED, Json(tenant(row))))
}
