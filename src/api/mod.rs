//! The public HTTP API: router, extractors, and the one translation of errors. Handlers are thin: they turn a request
//! into a call of `app` and its answer into wire types. No rules here, and no SQL.

pub mod access;
mod artifact;
mod audit;
mod batch;
mod bulk;
mod common;
mod dead_letter;
mod docs;
mod encryption;
mod extract;
mod health;
mod invocation;
mod key;
mod layers;
mod limit;
mod log;
mod operate;
mod pause;
mod people;
pub mod problem;
mod quota;
mod reset;
mod secret;
mod shape;
pub mod spending;
mod task;
mod tenant;
mod usage;
mod why;

use std::sync::Arc;
use std::time::Duration;

use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue};
use axum::routing::get;
use axum::{Router, middleware};
use tokio::sync::Semaphore;
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{PropagateRequestIdLayer, SetRequestIdLayer};
use tower_http::trace::TraceLayer;
use utoipa::OpenApi;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;

/// Requests in progress at once, waiting ones included. Beyond it: overloaded.
const MAX_REQUESTS: usize = 20_000;
/// Bytes of JSON bodies in memory at once.
const BODY_MEMORY: u64 = 512 << 20;
/// Items of a page: default and most.
const PAGE: (u16, u16) = (50, 200);
/// Longest upload plus inspection, besides the wait that was asked for.
const UPLOAD_TIME: Duration = Duration::from_secs(960);

/// What handlers share.
#[derive(Debug, Clone)]
struct Api {
    app: App,
    bodies: Arc<Semaphore>,
    limits: Arc<limit::Limits>,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Sandbar",
        description = "A fair, metered, multi-tenant, durable host for WebAssembly background tasks. \
                       Every error answer is application/problem+json; its `type` leads to a page about it.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    modifiers(&Security),
    security(("api-key" = []), ("bearer" = [])),
    tags(
        (name = "tasks", description = "Named definitions and their versions"),
        (name = "invocations", description = "Running tasks, and what became of it"),
        (name = "keys", description = "API keys, and who a credential belongs to"),
        (name = "audit", description = "Every change and every denied attempt"),
        (name = "people", description = "Login, members and invitations"),
        (name = "dead letters", description = "What ended badly for good, grouped by what ended it"),
        (name = "operations", description = "One action for many invocations; pauses"),
        (name = "tenants", description = "What a tenant may use, and what it does; for operators of the installation: all of them"),
        (name = "secrets", description = "Values that attempts may be granted, and nobody may read"),
        (name = "platform", description = "Workers and background duties: for operators of the installation"),
        (name = "health", description = "For load balancers and supervisors"),
    ),
)]
struct Document;

struct Security;

impl utoipa::Modify for Security {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_default();
        components.add_security_scheme(
            "api-key",
            SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("x-api-key"))),
        );
        components.add_security_scheme(
            "bearer",
            SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build()),
        );
    }
}

/// The router, ready to be served.
pub fn router(app: App) -> Router {
    let settings = app.settings();
    let quick = settings.request_timeout;
    let waiting = quick.saturating_add(settings.max_wait);
    let uploading = UPLOAD_TIME.saturating_add(settings.max_wait);
    let permits = usize::try_from(BODY_MEMORY / extract::PERMIT_BYTES).unwrap_or(usize::MAX);
    let limits = Arc::new(limit::Limits::new(app.rates(), settings.trusted_proxies.clone()));
    let api = Api { app, limits, bodies: Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS))) };
    let (router, mut document) = documented(quick, waiting, uploading).split_for_parts();
    access::describe(&mut document);
    common::document(&mut document);
    // Rendered once: it never changes.
    let document: bytes::Bytes = serde_json::to_vec(&document).unwrap_or_default().into();
    let requests = Arc::new(Semaphore::new(MAX_REQUESTS));
    router
        .route_layer(middleware::from_fn_with_state(api.clone(), access::guard))
        .route("/openapi.json", get(move || async move { ([(CONTENT_TYPE, "application/json")], document) }))
        .route("/docs", get(docs::docs))
        .route("/errors/{code}", get(health::error_page))
        .fallback(problem::route_not_found)
        .method_not_allowed_fallback(problem::method_not_allowed)
        // As one layer: each layer of its own is a box more, and every request clones those below it.
        .layer(
            ServiceBuilder::new()
                .layer(middleware::map_response(layers::guarded))
                .layer(middleware::map_request(layers::own_request_id))
                .layer(SetRequestIdLayer::x_request_id(layers::RequestIds))
                .layer(
                    TraceLayer::new_for_http()
                        .make_span_with(layers::span)
                        .on_request(())
                        .on_response(layers::log_response)
                        .on_failure(()),
                )
                .layer(PropagateRequestIdLayer::x_request_id())
                .layer(middleware::from_fn(move |request, next| {
                    layers::bounded(Arc::clone(&requests), request, next)
                }))
                .layer(middleware::from_fn_with_state(api.clone(), limit::measure))
                .layer(CatchPanicLayer::custom(problem::panicked)),
        )
        .with_state(api)
}

fn documented(quick: Duration, waiting: Duration, uploading: Duration) -> OpenApiRouter<Api> {
    let within =
        |limit: Duration| middleware::from_fn(move |request, next| layers::within(limit, request, next));
    OpenApiRouter::with_openapi(Document::openapi())
        .merge(
            OpenApiRouter::new()
                .routes(routes!(task::list))
                .routes(routes!(task::get, task::patch, task::delete))
                .routes(routes!(task::versions))
                .routes(routes!(task::version_get))
                .routes(routes!(task::module))
                .routes(routes!(task::version_release))
                .routes(routes!(invocation::list))
                .routes(routes!(invocation::get, invocation::patch))
                .routes(routes!(invocation::retry))
                .routes(routes!(batch::batch))
                .routes(routes!(invocation::result))
                .routes(routes!(log::logs))
                .routes(routes!(artifact::list))
                .routes(routes!(artifact::get))
                .routes(routes!(invocation::cancel))
                .routes(routes!(why::get))
                .routes(routes!(key::me))
                .routes(routes!(key::list, key::create))
                .routes(routes!(key::get, key::patch, key::revoke))
                .routes(routes!(key::rotate))
                .routes(routes!(audit::list))
                .routes(routes!(people::jwks))
                .routes(routes!(people::login))
                .routes(routes!(people::refresh))
                .routes(routes!(people::accept))
                .routes(routes!(reset::make))
                .routes(routes!(reset::reset))
                .routes(routes!(people::logout))
                .routes(routes!(people::password))
                .routes(routes!(people::key))
                .routes(routes!(people::members))
                .routes(routes!(people::change, people::remove))
                .routes(routes!(people::invitations, people::invite))
                .routes(routes!(people::uninvite))
                .routes(routes!(tenant::list, tenant::create))
                .routes(routes!(tenant::get, tenant::patch, tenant::delete))
                .routes(routes!(dead_letter::list))
                .routes(routes!(dead_letter::groups))
                .routes(routes!(dead_letter::purge))
                .routes(routes!(bulk::create, bulk::list))
                .routes(routes!(bulk::get))
                .routes(routes!(bulk::cancel))
                .routes(routes!(pause::create, pause::list))
                .routes(routes!(pause::delete))
                .routes(routes!(quota::own))
                .routes(routes!(quota::get, quota::patch))
                .routes(routes!(quota::task, quota::patch_task))
                .routes(routes!(quota::plans))
                .routes(routes!(quota::set_plan))
                .routes(routes!(usage::get))
                .routes(routes!(spending::list))
                .routes(routes!(spending::put, spending::delete))
                .routes(routes!(spending::events))
                .routes(routes!(secret::list))
                .routes(routes!(secret::get, secret::put, secret::delete))
                .routes(routes!(encryption::get, encryption::put))
                .routes(routes!(encryption::erase))
                .routes(routes!(encryption::erase_key))
                .routes(routes!(operate::workers))
                .routes(routes!(operate::cordon))
                .routes(routes!(operate::uncordon))
                .routes(routes!(operate::drain))
                .routes(routes!(operate::duties))
                .routes(routes!(operate::set))
                .routes(routes!(operate::pause))
                .routes(routes!(operate::resume))
                .routes(routes!(operate::run))
                .routes(routes!(health::live))
                .routes(routes!(health::ready))
                .route_layer(within(quick)),
        )
        .merge(OpenApiRouter::new().routes(routes!(invocation::invoke)).route_layer(within(waiting)))
        .merge(OpenApiRouter::new().routes(routes!(task::upload)).route_layer(within(uploading)))
}

/// Say which wait was granted.
fn preference_applied(headers: &mut HeaderMap, wait: Duration) {
    if let Ok(value) = HeaderValue::from_str(&format!("wait={}", wait.as_secs())) {
        headers.insert("preference-applied", value);
    }
}

/// `limit` of a list.
fn limit(text: &str) -> Result<u16, problem::Problem> {
    text.parse().ok().filter(|n| (1..=PAGE.1).contains(n)).ok_or_else(|| {
        problem::Problem::new(problem::Code::InvalidQuery, format!("`limit` must be from 1 to {}", PAGE.1))
    })
}

/// Address of the next page: the same question, continued after `last`.
fn again(path: &str, pairs: &[(String, String)], last: impl std::fmt::Display) -> String {
    let mut query = String::new();
    for (key, value) in pairs.iter().filter(|(key, _)| key != "after") {
        query.push_str(key);
        query.push('=');
        // What is not plain is escaped; the keys are known words.
        for byte in value.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b':' => {
                    query.push(char::from(byte));
                }
                _ => query.push_str(&format!("%{byte:02X}")),
            }
        }
        query.push('&');
    }
    format!("{path}?{query}after={last}")
}

fn unknown_parameter(name: &str, known: &str) -> problem::Problem {
    let name: String = name.chars().take(64).collect();
    problem::Problem::new(
        problem::Code::InvalidQuery,
        format!("unknown parameter `{name}`; known are {known}"),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use serde_json::Value;

    pub(super) fn document() -> Value {
        let second = Duration::from_secs(1);
        let (_, mut document) = documented(second, second, second).split_for_parts();
        access::describe(&mut document);
        common::document(&mut document);
        serde_json::to_value(document).unwrap()
    }

    #[test]
    fn the_document_has_every_route_with_its_method() {
        let document = document();
        let mut routes: Vec<String> = Vec::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys() {
                routes.push(format!("{method} {path}"));
            }
        }
        routes.sort();
        insta::assert_json_snapshot!(routes);
    }

    #[test]
    fn every_reference_of_the_document_leads_somewhere() {
        fn walk<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
            match value {
                Value::Object(map) => {
                    if let Some(Value::String(reference)) = map.get("$ref") {
                        found.push(reference);
                    }
                    map.values().for_each(|v| walk(v, found));
                }
                Value::Array(items) => items.iter().for_each(|v| walk(v, found)),
                _ => {}
            }
        }
        let document = document();
        let mut references = Vec::new();
        walk(&document, &mut references);
        assert!(references.len() > 10);
        for reference in references {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
    }

    #[test]
    fn every_operation_documents_its_problems() {
        let document = document();
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                let responses = operation["responses"].as_object().unwrap();
                let needed = match path.as_str() {
                    // Whoever has the token needs no other credential.
                    "/v1/auth/reset" => "404",
                    path if path.starts_with("/v1/") => "401",
                    _ => "200",
                };
                assert!(responses.contains_key(needed), "{method} {path}");
            }
        }
    }
}
