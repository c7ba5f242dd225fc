//! `POST /v1/invocations:batch`.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use serde_json::value::RawValue;

use crate::api::Api;
use crate::api::access::Who;
use crate::api::extract::{self, Many};
use crate::api::invocation::request;
use crate::api::problem::{Code, Problem};
use crate::app::FieldError;
use crate::app::batch::{Accepted, MAX_BATCH};
use crate::app::invoke::{Request, fingerprint};
use crate::domain::names::{IdempotencyKey, TaskName};
use crate::domain::permission::Action;
use crate::wire::invocation as wire;
use crate::wire::problem as problem_wire;

/// Run up to 1,000 tasks. Each is accepted or refused by itself, whatever becomes of the others, and has its outcome
/// in the order of the request. A body has at most 32 MiB.
#[utoipa::path(
    post, path = "/v1/invocations:batch", tag = "invocations",
    request_body(content = wire::BatchRequest, content_type = "application/json"),
    responses(
        (status = 200, description = "What became of each", body = wire::BatchResponse),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 408, description = "request-too-slow", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 413, description = "body-too-large", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body: not 1 to 1,000 items", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 503, description = "overloaded, timeout", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn batch(
    State(api): State<Api>,
    who: Who,
    Many(body): Many<wire::BatchRequest>,
) -> Result<Json<wire::BatchResponse>, Problem> {
    let tenant = who.0.tenant;
    let count = body.invocations.len();
    if !(1..=MAX_BATCH).contains(&count) {
        return Err(Problem::new(Code::InvalidBody, "the request body has invalid values").with_errors(
            vec![FieldError::new(
                "/invocations",
                format!("must have 1 to {MAX_BATCH} items; it has {count}"),
            )],
        ));
    }
    // Refused here or there, each keeps its place.
    let mut outcomes: Vec<Option<wire::BatchOutcome>> = Vec::with_capacity(count);
    let mut places = Vec::with_capacity(count);
    let mut requests = Vec::with_capacity(count);
    for (place, raw) in body.invocations.into_iter().enumerate() {
        let item = item(&raw).and_then(|(task, request)| {
            who.authorize(Action::Submit, Some(task.as_str()))?;
            Ok((task, Request { by: who.0.key(), ..request }))
        });
        match item {
            Ok(good) => {
                outcomes.push(None);
                places.push(place);
                requests.push(good);
            }
            Err(problem) => outcomes.push(Some(refused(place, problem))),
        }
    }
    for (place, accepted) in places.into_iter().zip(api.app.invoke_batch(tenant, requests).await) {
        let outcome = match accepted {
            Ok(Accepted::New(id)) => wire::BatchOutcome { status: 202, id: Some(id.0), problem: None },
            Ok(Accepted::Before(id)) => wire::BatchOutcome { status: 200, id: Some(id.0), problem: None },
            Err(error) => refused(place, error.into()),
        };
        if let Some(slot) = outcomes.get_mut(place) {
            *slot = Some(outcome);
        }
    }
    Ok(Json(wire::BatchResponse { outcomes: outcomes.into_iter().flatten().collect() }))
}

fn refused(place: usize, problem: Problem) -> wire::BatchOutcome {
    let body = problem.below(&format!("/invocations/{place}")).body();
    wire::BatchOutcome { status: body.status, id: None, problem: Some(body) }
}

/// One item: what names its task and key, and the rest as a single request would have it. Through raw values, so that
/// an input keeps its bytes.
fn item(raw: &RawValue) -> Result<(TaskName, Request), Problem> {
    let mut fields: BTreeMap<String, Box<RawValue>> = extract::parse(raw.get().as_bytes())?;
    let invalid = |pointer: &str, detail: String| {
        Problem::new(Code::InvalidBody, "the request body has invalid values")
            .with_errors(vec![FieldError::new(pointer, detail)])
    };
    let text = |field: &str, raw: &RawValue| {
        serde_json::from_str::<String>(raw.get()).map_err(|error| invalid(field, error.to_string()))
    };
    let Some(task) = fields.remove("task") else {
        return Err(invalid("/task", "missing: the name of the task".to_owned()));
    };
    let task = text("/task", &task)?;
    let task = TaskName::try_from(task).map_err(|error| Problem::new(Code::TaskNotFound, error))?;
    let key = fields.remove("idempotency_key").filter(|raw| raw.get() != "null");
    let key = key
        .map(|raw| {
            IdempotencyKey::try_from(text("/idempotency_key", &raw)?)
                .map_err(|error| Problem::new(Code::InvalidIdempotencyKey, error))
        })
        .transpose()?;
    let rest = serde_json::to_vec(&fields).map_err(|error| invalid("", error.to_string()))?;
    let mut request = request(extract::parse(&rest)?)?;
    request.idempotency = key.map(|key| (key, fingerprint(&task, &rest)));
    Ok((task, request))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn read(json: &str) -> Result<(TaskName, Request), Problem> {
        item(&RawValue::from_string(json.to_owned()).unwrap())
    }

    #[test]
    fn an_item_keeps_the_bytes_of_its_input_and_has_the_fingerprint_of_a_single_request() {
        let (task, request) =
            read(r#"{"task": "a", "input": {"x" : 1.50}, "idempotency_key": "k", "priority": 3}"#).unwrap();
        assert_eq!((task.as_str(), request.priority), ("a", 3));
        assert_eq!(request.payload.input.unwrap().bytes, br#"{"x" : 1.50}"#);
        let (key, print) = request.idempotency.unwrap();
        assert_eq!(key.as_str(), "k");
        assert_eq!(print, fingerprint(&task, br#"{"priority": 3, "input": {"x": 1.50}}"#));
    }

    #[test]
    fn a_bad_item_is_told_by_its_place() {
        for (json, code, pointer) in [
            ("{}", Code::InvalidBody, "/invocations/7/task"),
            (r#"{"task": 1}"#, Code::InvalidBody, "/invocations/7/task"),
            (r#"{"task": "a", "limits": {"fuel": -1}}"#, Code::InvalidBody, "/invocations/7/limits/fuel"),
            (r#"{"task": "a", "nonsense": 1}"#, Code::InvalidBody, "/invocations/7/nonsense"),
            ("[]", Code::InvalidBody, "/invocations/7"),
            ("3", Code::InvalidBody, "/invocations/7"),
        ] {
            let problem = read(json).expect_err(json);
            assert_eq!(problem.code(), code, "{json}");
            let body = refused(7, problem).problem.unwrap();
            assert_eq!(body.errors[0].pointer, pointer, "{json}");
        }
        assert_eq!(read(r#"{"task": "A B"}"#).expect_err("name").code(), Code::TaskNotFound);
        let key = read(r#"{"task": "a", "idempotency_key": " "}"#).expect_err("key");
        assert_eq!(key.code(), Code::InvalidIdempotencyKey);
    }

    #[test]
    fn shape_of_the_outcomes() {
        let accepted = wire::BatchOutcome { status: 202, id: Some(uuid::Uuid::from_u128(7)), problem: None };
        let refused = refused(1, read(r#"{"task": "a", "priority": "high"}"#).expect_err("a word"));
        insta::assert_json_snapshot!(wire::BatchResponse { outcomes: vec![accepted, refused] });
    }
}
