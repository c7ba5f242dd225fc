//! Answers that any operation may give, put into the OpenAPI document in one place: what the edge refuses before a
//! handler is asked. Owns no status of its own; what the guard answers is `access::describe`'s.

use utoipa::openapi::{Content, OpenApi, PathItem, Ref, RefOr, Response};

use crate::api::access::documented;

/// Of every operation under `/v1/`.
const ANY: &[(&str, &str)] = &[
    ("429", "rate-limited"),
    ("500", "internal, sealed-unreadable"),
    ("503", "database-unavailable, issuer-unavailable, overloaded, timeout"),
];
/// Of those that take parameters in the query or the path.
const ASKING: &[(&str, &str)] = &[("400", "invalid-query, broken-body, malformed-json")];
/// Of those with a body.
const SENDING: &[(&str, &str)] = &[
    ("408", "request-too-slow"),
    ("413", "body-too-large"),
    ("415", "unsupported-media-type"),
    ("422", "invalid-body"),
];

/// Add what is not there, and write the paths as OpenAPI does: it has no word for "the rest of the path".
pub(super) fn document(document: &mut OpenApi) {
    let paths = std::mem::take(&mut document.paths.paths);
    document.paths.paths = paths.into_iter().map(|(path, item)| (documented(&path), item)).collect();
    for (path, item) in &mut document.paths.paths {
        let open = !path.starts_with("/v1/");
        for operation in operations(item) {
            let body = operation.request_body.is_some();
            let asks = operation.parameters.as_ref().is_some_and(|parameters| !parameters.is_empty());
            let add = |wanted: bool, answers: &'static [(&str, &str)]| answers.iter().filter(move |_| wanted);
            let answers = add(!open, ANY).chain(add(asks || body, ASKING)).chain(add(body, SENDING));
            let limited = add(open && path != "/livez", &ANY[..1]);
            for (status, codes) in answers.chain(limited) {
                let there = operation.responses.responses.entry((*status).to_owned());
                there.or_insert_with(|| RefOr::T(problem(codes)));
            }
        }
    }
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut utoipa::openapi::path::Operation> {
    let PathItem { get, put, post, delete, patch, .. } = item;
    [get, put, post, delete, patch].into_iter().flatten()
}

fn problem(codes: &str) -> Response {
    let mut response = Response::new(codes);
    let schema = Ref::from_schema_name("Problem");
    response.content.insert("application/problem+json".to_owned(), Content::new(Some(schema)));
    response
}
