//! Liveness, readiness, and the pages about errors.

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use crate::api::Api;
use crate::api::problem::{Code, Problem};
use crate::wire::problem as wire;

/// Whether the process runs.
#[utoipa::path(
    get, path = "/livez", tag = "health", security(()),
    responses((status = 200, description = "It runs", body = String, content_type = "text/plain"))
)]
pub(super) async fn live() -> &'static str {
    "ok\n"
}

/// Whether requests can be served: the database answers.
#[utoipa::path(
    get, path = "/readyz", tag = "health", security(()),
    responses(
        (status = 200, description = "They can", body = String, content_type = "text/plain"),
        (status = 503, description = "The database does not answer", body = wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn ready(State(api): State<Api>) -> Result<&'static str, Problem> {
    api.app.ready().await?;
    Ok("ok\n")
}

/// The page that the `type` of a problem leads to.
pub(super) async fn error_page(code: Result<Path<String>, PathRejection>) -> Response {
    let code = code.map(|Path(code)| code).unwrap_or_default();
    match Code::ALL.iter().find(|known| known.as_str() == code) {
        Some(code) => ([(CONTENT_TYPE, "text/markdown; charset=utf-8")], code.page()).into_response(),
        None => Problem::new(Code::RouteNotFound, "there is no such kind of problem").into_response(),
    }
}
