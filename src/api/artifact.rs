//! `/v1/invocations/{id}/artifacts`: files that were collected from the last attempt.

use axum::Json;
use axum::extract::State;
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};

use crate::api::Api;
use crate::api::extract::{ArtifactPath, Caller, InvocationPath};
use crate::api::problem::Problem;
use crate::wire::Page;
use crate::wire::artifact as wire;
use crate::wire::problem as problem_wire;

/// A guest chose the bytes. Should a browser come here, it may neither guess nor run anything.
const HEADERS: [(HeaderName, HeaderValue); 3] = [
    (CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
    (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (CONTENT_SECURITY_POLICY, HeaderValue::from_static("default-src 'none'; sandbox")),
];

/// A path as a URL has it: the slashes stay.
fn encode(path: &str) -> String {
    use std::fmt::Write as _;
    let mut encoded = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing into a string cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// List the files that were collected from the last attempt, in the order of their paths.
#[utoipa::path(
    get, path = "/v1/invocations/{id}/artifacts", tag = "invocations",
    params(("id" = uuid::Uuid, Path, description = "Id of the invocation")),
    responses(
        (status = 200, description = "All of them", body = Page<wire::Artifact>),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "invocation-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list(
    State(api): State<Api>,
    Caller(tenant): Caller,
    InvocationPath(id): InvocationPath,
) -> Result<Json<Page<wire::Artifact>>, Problem> {
    let rows = api.app.artifacts(tenant, id).await?;
    let items = rows
        .into_iter()
        .map(|row| wire::Artifact {
            links: wire::ArtifactLinks {
                this: format!("/v1/invocations/{id}/artifacts/{}", encode(&row.path)),
            },
            path: row.path,
            size_bytes: row.size_bytes,
        })
        .collect();
    Ok(Json(Page { items, next: None }))
}

/// The bytes of a file that was collected.
#[utoipa::path(
    get, path = "/v1/invocations/{id}/artifacts/{*path}", tag = "invocations",
    params(
        ("id" = uuid::Uuid, Path, description = "Id of the invocation"),
        ("path" = String, Path, description = "Its path, slashes and all"),
    ),
    responses(
        (status = 200, description = "The bytes", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "invocation-not-found, artifact-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get(
    State(api): State<Api>,
    Caller(tenant): Caller,
    ArtifactPath(id, path): ArtifactPath,
) -> Result<Response, Problem> {
    let bytes = api.app.artifact(tenant, id, &path).await?;
    Ok((HEADERS, bytes).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_becomes_a_url_that_leads_to_it() {
        assert_eq!(encode("out/a b#ä.txt"), "out/a%20b%23%C3%A4.txt");
    }
}
