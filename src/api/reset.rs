//! A new password for whoever lost it: `/v1/password-resets` and `/v1/auth/reset`.

use axum::Json;
use axum::extract::State;
use axum::http::header::CACHE_CONTROL;
use axum::http::{HeaderName, HeaderValue, StatusCode};

use crate::api::Api;
use crate::api::access::Who;
use crate::api::extract;
use crate::api::problem::Problem;
use crate::wire::people as wire;
use crate::wire::problem as problem_wire;

/// Nobody on the way may keep the token.
const NO_STORE: [(HeaderName, HeaderValue); 1] = [(CACHE_CONTROL, HeaderValue::from_static("no-store"))];

/// Make a token with which a user who lost the password sets a new one, within an hour, once. Bring it to them: nothing is
/// sent. One that was made before is over. The platform may make it for everybody; the people of a tenant for a member who is
/// in no other tenant.
#[utoipa::path(
    post, path = "/v1/password-resets", tag = "people",
    request_body(content = wire::NewReset, content_type = "application/json"),
    responses(
        (status = 201, description = "The token", body = wire::MadeReset),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "member-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "member-elsewhere", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn make(
    State(api): State<Api>,
    Who(who): Who,
    body: extract::Json<wire::NewReset>,
) -> Result<(StatusCode, [(HeaderName, HeaderValue); 1], Json<wire::MadeReset>), Problem> {
    let (asked, _) = body.into_parts();
    let made = api.app.make_reset(&who, &asked.email).await?;
    let shown = wire::MadeReset {
        token: made.token,
        user: made.user.0,
        email: made.email,
        expires_at: made.expires_at,
    };
    Ok((StatusCode::CREATED, NO_STORE, Json(shown)))
}

/// Set a new password by a token that somebody made for you. All your sessions and your own keys end; a lock of the address
/// after failed logins stays.
#[utoipa::path(
    post, path = "/v1/auth/reset", tag = "people", security(()),
    request_body(content = wire::Reset, content_type = "application/json"),
    responses(
        (status = 204, description = "It is set; log in with it"),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "reset-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 503, description = "overloaded", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn reset(
    State(api): State<Api>,
    body: extract::Json<wire::Reset>,
) -> Result<StatusCode, Problem> {
    let (asked, _) = body.into_parts();
    api.app.use_reset(&asked.token, &asked.password).await?;
    Ok(StatusCode::NO_CONTENT)
}
