//! `/v1/encryption`, and the erasure of payloads and keys.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use crate::api::extract::{self, Caller, IdPath, InvocationPath, Operator};
use crate::api::problem::{Code, Problem};
use crate::api::{Api, shape};
use crate::app::encryption::Encryption;
use crate::domain::ids::TenantId;
use crate::wire::encryption as wire;
use crate::wire::invocation::Invocation;
use crate::wire::problem as problem_wire;

fn encryption(found: Encryption) -> wire::Encryption {
    wire::Encryption {
        payloads: found.tenant || found.installation,
        tenant: found.tenant,
        installation: found.installation,
        key: found.key.map(|(id, master)| wire::DataKey { id, master }),
    }
}

/// Whether your tenant's payloads are sealed at rest, and by which key.
#[utoipa::path(
    get, path = "/v1/encryption", tag = "secrets",
    responses(
        (status = 200, description = "What holds", body = wire::Encryption),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get(
    State(api): State<Api>,
    Caller(tenant): Caller,
) -> Result<Json<wire::Encryption>, Problem> {
    Ok(Json(encryption(api.app.encryption(tenant).await?)))
}

/// Seal the payloads of what your tenant submits from now on, or stop doing so: inputs, results, artifacts, logs, progress
/// messages, failure messages and backtraces. It holds within two seconds on every server. What was accepted before stays
/// as it is, until its end.
#[utoipa::path(
    put, path = "/v1/encryption", tag = "secrets",
    request_body(content = wire::EncryptionRequest, content_type = "application/json"),
    responses(
        (status = 200, description = "What holds now", body = wire::Encryption),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 503, description = "secrets-unavailable, database-unavailable, overloaded, timeout", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn put(
    State(api): State<Api>,
    Caller(tenant): Caller,
    body: extract::Json<wire::EncryptionRequest>,
) -> Result<Json<wire::Encryption>, Problem> {
    let asked = body.into_parts().0;
    Ok(Json(encryption(api.app.set_encryption(tenant, asked.payloads).await?)))
}

/// Erase the payloads of an invocation that has ended, for good: input, result, artifacts, logs, progress, failure messages
/// and backtraces. What remains are its states, times, tags and receipts. One that waits or runs is refused: cancel it first.
#[utoipa::path(
    delete, path = "/v1/invocations/{id}/payloads", tag = "invocations",
    params(("id" = uuid::Uuid, Path, description = "Id of the invocation")),
    responses(
        (status = 200, description = "They are gone", body = Invocation),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "invocation-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "not-finished", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn erase(
    State(api): State<Api>,
    Caller(tenant): Caller,
    InvocationPath(id): InvocationPath,
) -> Result<Json<Invocation>, Problem> {
    Ok(Json(shape::invocation(&api.app.erase_payloads(tenant, id).await?, false)))
}

/// Erase the data key of a suspended tenant, for good: its secrets go, and nothing that was sealed opens again, exports
/// included. What waits, sealed, ends as `denied` when it comes to run.
#[utoipa::path(
    delete, path = "/v1/tenants/{id}/key", tag = "tenants",
    params(("id" = uuid::Uuid, Path, description = "Id of the tenant")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "tenant-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "tenant-active", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn erase_key(
    State(api): State<Api>,
    _: Operator,
    id: IdPath<TenantId>,
) -> Result<StatusCode, Problem> {
    api.app.erase_tenant_key(id.or(Code::TenantNotFound)?).await?;
    Ok(StatusCode::NO_CONTENT)
}
