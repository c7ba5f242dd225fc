//! `/v1/tasks/{task}/invocations` and `/v1/invocations`.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use sandbar_host::limits::PartialLimits;
use sandbar_host::run::Determinism;

use crate::api::access::Who;
use crate::api::extract::{
    self, Caller, Idempotency, InvocationPath, MergePatch, OptionalJson, Pairs, PreferWait, TaskPath,
};
use crate::api::problem::{Code, Problem};
use crate::api::shape;
use crate::api::{Api, PAGE, limit, preference_applied, unknown_parameter};
use crate::app::FieldError;
use crate::app::files::Files;
use crate::app::invoke::{Invoked, Part, Payload, Request, fingerprint};
use crate::app::policy::PartialRetry;
use crate::domain::admission::{Admission, Concurrency, Condition, Dependency, Key, Unique, UniquePolicy};
use crate::domain::ids::InvocationId;
use crate::domain::invocation::State as Stand;
use crate::domain::names::{Tags, TaskName};
use crate::domain::permission::Action;
use crate::domain::retry::Backoff;
use crate::store::invocation::{Filter, InvocationChange};
use crate::wire::Page;
use crate::wire::invocation as wire;
use crate::wire::problem as problem_wire;

/// Media type of a result whose own is not fit for a header.
const BYTES: HeaderValue = HeaderValue::from_static("application/octet-stream");

fn invalid(pointer: &'static str, detail: impl Into<String>) -> Problem {
    Problem::new(Code::InvalidBody, "the request body has invalid values")
        .with_errors(vec![FieldError::new(pointer, detail)])
}

fn decode(pointer: &'static str, text: &str) -> Result<Part, Problem> {
    let bytes =
        BASE64_STANDARD.decode(text).map_err(|error| invalid(pointer, format!("is not base64: {error}")))?;
    Ok(Part { pointer, bytes })
}

fn payload(body: &mut wire::InvokeRequest) -> Result<Payload, Problem> {
    let input = match (body.input.take(), body.input_base64.take()) {
        (Some(_), Some(_)) => {
            return Err(invalid("/input_base64", "give `input` or `input_base64`, not both"));
        }
        (Some(json), None) => {
            Some(Part { pointer: "/input", bytes: Box::<str>::from(json).into_string().into_bytes() })
        }
        (None, Some(text)) => Some(decode("/input_base64", &text)?),
        (None, None) => None,
    };
    let stdin = match (body.stdin.take(), body.stdin_base64.take()) {
        (Some(_), Some(_)) => {
            return Err(invalid("/stdin_base64", "give `stdin` or `stdin_base64`, not both"));
        }
        (Some(text), None) => Some(Part { pointer: "/stdin", bytes: text.into_bytes() }),
        (None, Some(text)) => Some(decode("/stdin_base64", &text)?),
        (None, None) => None,
    };
    Ok(Payload { input, stdin, args: body.args.take(), env: body.env.take() })
}

fn contents(files: BTreeMap<String, wire::FileContent>) -> Result<BTreeMap<String, Vec<u8>>, Problem> {
    let decode = |(path, content)| match content {
        wire::FileContent::Text(text) => Ok((path, text.into_bytes())),
        wire::FileContent::Bytes(bytes) => match BASE64_STANDARD.decode(&bytes.base64) {
            Ok(bytes) => Ok((path, bytes)),
            Err(error) => Err(invalid("/files", format!("`base64` of {path:?} is not base64: {error}"))),
        },
    };
    files.into_iter().map(decode).collect()
}

fn determinism(wanted: wire::DeterminismRequest) -> Result<Determinism, Problem> {
    let nanos = wanted.clock.timestamp_nanos_opt().and_then(|nanos| u64::try_from(nanos).ok());
    let clock_ns = nanos.ok_or_else(|| invalid("/determinism/clock", "must be from 1970 to 2262"))?;
    Ok(Determinism { clock_ns, seed: wanted.seed })
}

pub(super) fn request(mut body: wire::InvokeRequest) -> Result<Request, Problem> {
    let payload = payload(&mut body)?;
    let limits = body.limits.unwrap_or_default();
    let retry = body.retry.unwrap_or_default();
    let files = Files { files: contents(body.files)?, collect: body.collect, bytes: body.scratch_bytes };
    let determinism = body.determinism.map(determinism).transpose()?;
    Ok(Request {
        files,
        // Only attempts start families.
        family: None,
        determinism,
        version: body.version,
        payload,
        priority: body.priority.unwrap_or(0),
        run_at: body.run_at,
        delay_ms: body.delay_ms,
        expires_at: body.expires_at,
        tags: Tags::try_from(body.tags).map_err(|e| invalid("/tags", e.to_string()))?,
        limits: PartialLimits {
            fuel: limits.fuel,
            memory_bytes: limits.memory_bytes,
            timeout_ms: limits.timeout_ms,
            output_bytes: limits.output_bytes,
            log_bytes: limits.log_bytes,
        },
        retry: PartialRetry {
            max_attempts: retry.max_attempts,
            backoff: retry.backoff.map(|b| match b {
                wire::Backoff::Fixed => Backoff::Fixed,
                wire::Backoff::Exponential => Backoff::Exponential,
            }),
            initial_ms: retry.initial_ms,
            factor: retry.factor,
            max_ms: retry.max_ms,
            jitter: retry.jitter,
        },
        by: None,
        idempotency: None,
        admission: admission(
            body.unique_key,
            body.unique_policy,
            body.concurrency_key,
            body.concurrency_limit,
            &body.depends_on,
            body.on_unmet,
        )?,
    })
}

fn key(pointer: &'static str, text: String) -> Result<Key, Problem> {
    Key::try_from(text).map_err(|error| invalid(pointer, error.problem))
}

fn admission(
    unique_key: Option<String>,
    unique_policy: Option<wire::UniquePolicy>,
    concurrency_key: Option<String>,
    concurrency_limit: Option<u32>,
    depends_on: &[wire::DependsOn],
    on_unmet: Option<wire::OnUnmet>,
) -> Result<Admission, Problem> {
    let unique = match (unique_key, unique_policy) {
        (Some(text), policy) => Some(Unique {
            key: key("/unique_key", text)?,
            policy: match policy.unwrap_or(wire::UniquePolicy::Reject) {
                wire::UniquePolicy::Reject => UniquePolicy::Reject,
                wire::UniquePolicy::Return => UniquePolicy::Return,
                wire::UniquePolicy::Replace => UniquePolicy::Replace,
                wire::UniquePolicy::Debounce => UniquePolicy::Debounce,
            },
        }),
        (None, Some(_)) => return Err(invalid("/unique_policy", "needs a `unique_key`")),
        (None, None) => None,
    };
    let concurrency = match (concurrency_key, concurrency_limit) {
        (Some(text), limit) => {
            Some(Concurrency { key: key("/concurrency_key", text)?, limit: limit.unwrap_or(1) })
        }
        (None, Some(_)) => return Err(invalid("/concurrency_limit", "needs a `concurrency_key`")),
        (None, None) => None,
    };
    if on_unmet.is_some() && depends_on.is_empty() {
        return Err(invalid("/on_unmet", "needs `depends_on`"));
    }
    let depends_on = depends_on
        .iter()
        .map(|d| Dependency {
            id: InvocationId(d.id),
            condition: match d.condition {
                wire::Condition::Succeeded => Condition::Succeeded,
                wire::Condition::Finished => Condition::Finished,
                wire::Condition::Failed => Condition::Failed,
            },
        })
        .collect();
    Ok(Admission { unique, concurrency, depends_on, run_unmet: on_unmet == Some(wire::OnUnmet::Run) })
}

/// Run a task. Answers 202 when the invocation is durable; with `Prefer: wait=N` 200 when it has ended within N
/// seconds, with its result.
#[utoipa::path(
    post, path = "/v1/tasks/{task}/invocations", tag = "invocations",
    params(
        ("task" = String, Path, description = "Name of the task"),
        ("Prefer" = Option<String>, Header, description = "wait=N: answer when the invocation has ended, or after N seconds"),
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters: the same key with the same body gives the first invocation again"),
    ),
    request_body(content = wire::InvokeRequest, content_type = "application/json"),
    responses(
        (status = 200, description = "It has ended (only with Prefer: wait)", body = wire::Invocation),
        (status = 202, description = "It is durable and will run", body = wire::Invocation, headers(("Location" = String, description = "The invocation"))),
        (status = 400, description = "malformed-json, invalid-idempotency-key, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden, over-quota", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "task-not-found, version-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 408, description = "request-too-slow", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "task-inactive, version-not-ready, version-rejected, unique-key-taken", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 413, description = "body-too-large, input-too-large", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body, wrong-input-kind, input-mismatch, idempotency-key-reused, dependency-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 429, description = "rate-limited, queue-full, quota-exceeded", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 503, description = "overloaded, database-unavailable, timeout", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn invoke(
    State(api): State<Api>,
    Who(who): Who,
    TaskPath(name): TaskPath,
    prefer: PreferWait,
    Idempotency(key): Idempotency,
    body: extract::Json<wire::InvokeRequest>,
) -> Result<Response, Problem> {
    let (request, wait) = {
        // The body's memory is given back here: waiting costs none.
        let (value, bytes) = body.into_parts();
        let idempotency = key.map(|key| (key, fingerprint(&name, &bytes)));
        let mut request = request(value)?;
        request.idempotency = idempotency;
        request.by = who.key();
        (request, prefer.up_to(api.app.settings().max_wait))
    };
    let invoked = api.app.invoke(who.tenant, &name, request, wait).await?;
    let ended = invoked.invocation.summary.state.is_terminal();
    let body = shape::invocation(&invoked.invocation, wait.is_some() && ended);
    let mut headers = accepted(&body, &invoked);
    if let Some(wait) = wait {
        preference_applied(&mut headers, wait);
    }
    let status = if wait.is_some() && ended { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, headers, Json(body)).into_response())
}

/// One invocation: state, attempts with receipts, why they ended, and where the guest was when it trapped.
#[utoipa::path(
    get, path = "/v1/invocations/{id}", tag = "invocations",
    params(("id" = uuid::Uuid, Path, description = "Its id")),
    responses(
        (status = 200, description = "The invocation", body = wire::Invocation),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "invocation-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get(
    State(api): State<Api>,
    Caller(tenant): Caller,
    InvocationPath(id): InvocationPath,
) -> Result<Json<wire::Invocation>, Problem> {
    let found = api.app.invocation(tenant, id, 0).await?;
    Ok(Json(shape::invocation(&found, false)))
}

/// The result: its bytes with the guest's media type; what a command wrote to stdout.
#[utoipa::path(
    get, path = "/v1/invocations/{id}/result", tag = "invocations",
    params(("id" = uuid::Uuid, Path, description = "Id of the invocation")),
    responses(
        (status = 200, description = "The result, in the media type that the guest named", body = Vec<u8>, content_type = "*/*"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "invocation-not-found; no-output: it ended and left nothing", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "not-finished", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn result(
    State(api): State<Api>,
    Caller(tenant): Caller,
    InvocationPath(id): InvocationPath,
) -> Result<Response, Problem> {
    let output = api.app.result(tenant, id).await?;
    let mut headers = HeaderMap::new();
    let media_type = HeaderValue::from_str(&output.content_type).ok();
    let media_type = media_type.filter(|v| !v.is_empty()).unwrap_or(BYTES);
    headers.insert(CONTENT_TYPE, media_type);
    // A guest chose bytes and type. Should a browser come here, it may neither guess nor run anything.
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static("default-src 'none'; sandbox"));
    Ok((headers, output.bytes.unwrap_or_default()).into_response())
}

/// Change an invocation: priority and time while it is scheduled or queued, tags at any time.
#[utoipa::path(
    patch, path = "/v1/invocations/{id}", tag = "invocations",
    params(("id" = uuid::Uuid, Path, description = "Its id")),
    request_body(content((wire::InvocationPatch = "application/merge-patch+json"), (wire::InvocationPatch = "application/json"))),
    responses(
        (status = 200, description = "The invocation as it is now", body = wire::Invocation),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "invocation-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "already-started, already-finished", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 413, description = "body-too-large", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn patch(
    State(api): State<Api>,
    Caller(tenant): Caller,
    InvocationPath(id): InvocationPath,
    MergePatch(body): MergePatch<wire::InvocationPatch>,
) -> Result<Json<wire::Invocation>, Problem> {
    let tags = body.tags.into_option();
    let change = InvocationChange {
        priority: body.priority.into_option().map(Option::unwrap_or_default),
        run_at: body.run_at.into_option(),
        reset_tags: tags == Some(None),
        tags: tags.flatten().unwrap_or_default(),
    };
    let found = api.app.change(tenant, id, &change).await?;
    Ok(Json(shape::invocation(&found, false)))
}

/// Run a dead, cancelled or expired invocation again: a new invocation with the same input, tags, limits, retries and
/// priority, and with `retry_of`.
#[utoipa::path(
    post, path = "/v1/invocations/{id}/retry", tag = "invocations",
    params(
        ("id" = uuid::Uuid, Path, description = "Id of the old invocation"),
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters: the same key gives the first retry again"),
    ),
    request_body(content = Option<wire::RetryInvocation>, content_type = "application/json"),
    responses(
        (status = 202, description = "The new invocation is durable and will run", body = wire::Invocation, headers(("Location" = String, description = "The new invocation"))),
        (status = 400, description = "malformed-json, invalid-idempotency-key, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "invocation-not-found, task-not-found (the task was deleted), version-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "not-retryable, task-inactive, version-not-ready, version-rejected", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body, wrong-input-kind, input-mismatch, idempotency-key-reused", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 429, description = "rate-limited, queue-full, quota-exceeded", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 503, description = "overloaded, database-unavailable, timeout", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn retry(
    State(api): State<Api>,
    Who(who): Who,
    InvocationPath(id): InvocationPath,
    Idempotency(key): Idempotency,
    OptionalJson(body): OptionalJson<wire::RetryInvocation>,
) -> Result<Response, Problem> {
    let invoked = api.app.retry(who.tenant, id, body.version, key, who.key()).await?;
    let body = shape::invocation(&invoked.invocation, false);
    Ok((StatusCode::ACCEPTED, accepted(&body, &invoked), Json(body)).into_response())
}

/// What the answer to an accepted invocation says besides its body.
fn accepted(body: &wire::Invocation, invoked: &Invoked) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if let Ok(location) = HeaderValue::from_str(&body.summary.links.this) {
        headers.insert(LOCATION, location);
    }
    if invoked.replayed {
        headers.insert("idempotency-replayed", HeaderValue::from_static("true"));
    }
    if invoked.existing {
        headers.insert("unique-key-existing", HeaderValue::from_static("true"));
    }
    headers
}

/// Ask for the end of an invocation, waiting or running.
#[utoipa::path(
    post, path = "/v1/invocations/{id}/cancel", tag = "invocations",
    params(("id" = uuid::Uuid, Path, description = "Id of the invocation")),
    responses(
        (status = 200, description = "It waited, and has ended", body = wire::Invocation),
        (status = 202, description = "It runs, and its worker has been told", body = wire::Invocation),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "invocation-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "already-finished", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn cancel(
    State(api): State<Api>,
    Caller(tenant): Caller,
    InvocationPath(id): InvocationPath,
) -> Result<(StatusCode, Json<wire::Invocation>), Problem> {
    let (found, ended) = api.app.cancel(tenant, id).await?;
    let status = if ended { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, Json(shape::invocation(&found, false))))
}

/// List invocations, newest first.
#[utoipa::path(
    get, path = "/v1/invocations", tag = "invocations",
    params(
        ("state" = Option<wire::State>, Query, description = "In this state"),
        ("task" = Option<String>, Query, description = "Of this task"),
        ("tag" = Option<Vec<String>>, Query, description = "With this tag, as key:value; may come again, then all must be there"),
        ("after" = Option<uuid::Uuid>, Query, description = "Older than this one"),
        ("limit" = Option<u16>, Query, description = "Items of the page, 1 to 200; default 50"),
    ),
    responses(
        (status = 200, description = "A page of invocations", body = Page<wire::InvocationSummary>),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list(
    State(api): State<Api>,
    who: Who,
    Pairs(pairs): Pairs,
) -> Result<Json<Page<wire::InvocationSummary>>, Problem> {
    let (filter, size) = filter(pairs.clone())?;
    who.authorize(Action::ReadInvocations, filter.task.as_ref().map(TaskName::as_str))?;
    let (rows, more) = api.app.invocations(who.0.tenant, &filter, size).await?;
    let last = rows.last().filter(|_| more);
    Ok(Json(Page {
        next: last.map(|row| super::again("/v1/invocations", &pairs, row.id)),
        items: rows.iter().map(|row| shape::summary(row, false)).collect(),
    }))
}

fn filter(pairs: Vec<(String, String)>) -> Result<(Filter, u16), Problem> {
    let mut filter = Filter::default();
    let mut size = PAGE.0;
    let refuse = |detail: &dyn std::fmt::Display| Problem::new(Code::InvalidQuery, detail);
    for (key, value) in pairs {
        match key.as_str() {
            "state" => filter.state = Some(value.parse::<Stand>().map_err(|e| refuse(&e))?),
            "task" => filter.task = Some(TaskName::try_from(value).map_err(|e| refuse(&e))?),
            "tag" => {
                let (key, value) = value.split_once(':').ok_or_else(|| refuse(&"`tag` must be key:value"))?;
                let tag = BTreeMap::from([(key.to_owned(), value.to_owned())]);
                // Checked as tags are, so that nothing reaches the database that could not be in it.
                let tag = Tags::try_from(tag).map_err(|e| refuse(&e))?;
                filter.tags.extend(BTreeMap::from(tag));
            }
            "after" => {
                let id = value.parse().map_err(|_| refuse(&"`after` must be the id of an invocation"))?;
                filter.after = Some(id);
            }
            "limit" => size = limit(&value)?,
            other => {
                return Err(unknown_parameter(other, "state, task, tag, after and limit"));
            }
        }
    }
    if filter.tags.len() > Tags::MAX_COUNT {
        return Err(refuse(&"`tag` may come at most 16 times"));
    }
    Ok((filter, size))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn a_filter_takes_tags_again_and_again_and_refuses_what_it_does_not_know() {
        let (filter, size) =
            filter(pairs(&[("tag", "a:1"), ("tag", "b:x:y"), ("state", "dead"), ("limit", "7")])).unwrap();
        assert_eq!(filter.tags, pairs(&[("a", "1"), ("b", "x:y")]));
        assert_eq!((filter.state, size), (Some(Stand::Dead), 7));
        for bad in [
            ("state", "done"),
            ("tag", "a"),
            ("tag", "a:\0"),
            ("after", "1"),
            ("limit", "0"),
            ("limit", "201"),
            ("task", "A B"),
            ("order", "asc"),
        ] {
            assert!(super::filter(pairs(&[bad])).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_next_page_asks_the_same_question() {
        let id = crate::domain::ids::InvocationId(uuid::Uuid::from_u128(7));
        let asked = pairs(&[("tag", "k:v&x=ü"), ("after", "old"), ("limit", "2")]);
        assert_eq!(
            crate::api::again("/v1/invocations", &asked, id),
            format!("/v1/invocations?tag=k:v%26x%3D%C3%BC&limit=2&after={id}")
        );
    }

    #[test]
    fn contradicting_forms_of_input_and_broken_base64_are_refused() {
        let read = |json: &str| serde_json::from_str::<wire::InvokeRequest>(json).unwrap();
        for bad in [
            r#"{"input": 1, "input_base64": ""}"#,
            r#"{"stdin": "", "stdin_base64": ""}"#,
            r#"{"input_base64": "?"}"#,
            r#"{"tags": {"": "x"}}"#,
        ] {
            let problem = request(read(bad)).expect_err(bad);
            assert_eq!(problem.code(), Code::InvalidBody);
        }
        let request = request(read(r#"{"input": [1, 2], "priority": -7}"#)).unwrap();
        assert_eq!(request.payload.input.unwrap().bytes, b"[1, 2]");
        assert_eq!(request.priority, -7);
    }
}
