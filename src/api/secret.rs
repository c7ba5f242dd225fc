//! `/v1/secrets`.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use zeroize::Zeroizing;

use crate::api::Api;
use crate::api::extract::{self, Caller, SecretPath};
use crate::api::problem::{Code, Problem};
use crate::app::FieldError;
use crate::store::secret::SecretRow;
use crate::wire::problem as problem_wire;
use crate::wire::secret as wire;

fn shape(row: SecretRow) -> wire::Secret {
    wire::Secret {
        name: row.name,
        version: row.version,
        created_at: row.created_at,
        updated_at: row.updated_at,
    }
}

/// Your tenant's secrets, without their values.
#[utoipa::path(
    get, path = "/v1/secrets", tag = "secrets",
    responses(
        (status = 200, description = "All of them, by name", body = wire::Secrets),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list(
    State(api): State<Api>,
    Caller(tenant): Caller,
) -> Result<Json<wire::Secrets>, Problem> {
    let items = api.app.secrets(tenant).await?.into_iter().map(shape).collect();
    Ok(Json(wire::Secrets { items }))
}

/// One secret, without its value.
#[utoipa::path(
    get, path = "/v1/secrets/{name}", tag = "secrets",
    params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "The secret", body = wire::Secret),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "secret-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get(
    State(api): State<Api>,
    Caller(tenant): Caller,
    SecretPath(name): SecretPath,
) -> Result<Json<wire::Secret>, Problem> {
    Ok(Json(shape(api.app.secret(tenant, &name).await?)))
}

/// Set a secret: makes a new version, which is used from now on. The value is sealed before it is stored and never comes
/// out of the API again. Names have 1 to 64 letters, digits and `_`, no digit first.
#[utoipa::path(
    put, path = "/v1/secrets/{name}", tag = "secrets",
    params(("name" = String, Path, description = "Its name")),
    request_body(content = wire::SecretRequest, content_type = "application/json"),
    responses(
        (status = 200, description = "The secret with its new version", body = wire::Secret),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "over-quota, forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 503, description = "secrets-unavailable, database-unavailable, overloaded, timeout", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn put(
    State(api): State<Api>,
    Caller(tenant): Caller,
    SecretPath(name): SecretPath,
    body: extract::Json<wire::SecretRequest>,
) -> Result<Json<wire::Secret>, Problem> {
    let invalid = |pointer: &str, detail: &str| {
        Problem::new(Code::InvalidBody, "the request body has invalid values")
            .with_errors(vec![FieldError::new(pointer, detail)])
    };
    let wire::SecretRequest { value, value_base64 } = body.into_parts().0;
    let value = match (value, value_base64) {
        (Some(text), None) => text.into_bytes(),
        (None, Some(text)) => {
            let text = Zeroizing::new(text);
            BASE64_STANDARD.decode(text.as_bytes()).map_err(|_| invalid("/value_base64", "is not base64"))?
        }
        _ => return Err(invalid("/value", "give `value` or `value_base64`, one of them")),
    };
    Ok(Json(shape(api.app.set_secret(tenant, &name, &Zeroizing::new(value)).await?)))
}

/// Delete a secret with all its versions. Attempts that start from now on do not get it.
#[utoipa::path(
    delete, path = "/v1/secrets/{name}", tag = "secrets",
    params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "secret-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn delete(
    State(api): State<Api>,
    Caller(tenant): Caller,
    SecretPath(name): SecretPath,
) -> Result<StatusCode, Problem> {
    api.app.delete_secret(tenant, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}
