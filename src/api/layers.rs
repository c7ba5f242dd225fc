//! What surrounds every request: id, span and log line, the bound on how many there are, the bound on their time.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{MatchedPath, Request};
use axum::http::header::{CONTENT_SECURITY_POLICY, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS};
use axum::http::{HeaderName, HeaderValue, Response};
use axum::middleware::Next;
use axum::response::IntoResponse;
use tokio::sync::Semaphore;
use tower_http::request_id::{MakeRequestId, RequestId};
use tracing::Span;

use crate::api::problem::{Code, Problem};

const REQUEST_ID: &str = "x-request-id";
/// Longest request id that is taken over from a client.
const MAX_REQUEST_ID: usize = 128;

/// New ids, in the order of time.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestIds;

impl MakeRequestId for RequestIds {
    fn make_request_id<B>(&mut self, _: &axum::http::Request<B>) -> Option<RequestId> {
        HeaderValue::from_str(&uuid::Uuid::now_v7().to_string()).ok().map(RequestId::new)
    }
}

/// A client's request id goes into our logs: only a short, plain one is taken over.
pub(super) async fn own_request_id(mut request: Request) -> Request {
    let fine = request.headers().get(REQUEST_ID).is_none_or(|value| {
        (1..=MAX_REQUEST_ID).contains(&value.len()) && value.as_bytes().iter().all(u8::is_ascii_graphic)
    });
    if !fine {
        request.headers_mut().remove(REQUEST_ID);
    }
    request
}

/// One span per request. The path as the router knows it, not as the client wrote it.
pub(super) fn span(request: &Request) -> Span {
    let route = request.extensions().get::<MatchedPath>();
    let id = request.headers().get(REQUEST_ID);
    tracing::info_span!(
        "request",
        method = %request.method(),
        route = route.map_or("-", MatchedPath::as_str),
        id = id.and_then(|v| v.to_str().ok()).unwrap_or("-"),
        tenant = tracing::field::Empty,
    )
}

/// One line per answer: failures of ours loudly, everything else quietly.
pub(super) fn log_response<B>(response: &Response<B>, latency: Duration, _: &Span) {
    let status = response.status().as_u16();
    let ms = latency.as_secs_f64() * 1_000.0;
    if response.status().is_server_error() {
        tracing::warn!(status, ms, "answered");
    } else {
        tracing::debug!(status, ms, "answered");
    }
}

/// What a browser is told with every answer; a page that needs more says so itself.
const GUARDS: [(HeaderName, HeaderValue); 4] = [
    (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    (CONTENT_SECURITY_POLICY, HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'")),
];

/// Adds what every answer says to browsers.
pub(super) async fn guarded(mut response: axum::response::Response) -> axum::response::Response {
    for (name, value) in GUARDS {
        response.headers_mut().entry(name).or_insert(value);
    }
    response
}

/// Refuse at once what would be one too many.
pub(super) async fn bounded(
    requests: Arc<Semaphore>,
    request: Request,
    next: Next,
) -> axum::response::Response {
    match requests.try_acquire() {
        Ok(_permit) => next.run(request).await,
        Err(_) => Problem::new(Code::Overloaded, "too many requests at once").into_response(),
    }
}

/// Answer within `limit`, if only that it took too long.
pub(super) async fn within(limit: Duration, request: Request, next: Next) -> axum::response::Response {
    match tokio::time::timeout(limit, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let detail = format!(
                "no answer within {} s; a request that changes something may have done so",
                limit.as_secs()
            );
            Problem::new(Code::Timeout, detail).into_response()
        }
    }
}
