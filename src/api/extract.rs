//! Extractors: who calls, what the path names, what the body says. They parse and refuse; handlers see typed values.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::request::Parts;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::error::Category;

use crate::api::Api;
use crate::api::access::Who;
use crate::api::problem::{Code, Problem};
use crate::app::FieldError;
use crate::domain::ids::{InvocationId, KeyId, TenantId, WorkerId};
use crate::domain::names::{IdempotencyKey, TaskName};

/// Longest time for a JSON body to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of a JSON body besides input: names, tags, limits, white space.
const BODY_OVERHEAD: u64 = 1 << 20;
/// Bytes of a body of many requests, if those of a single one are fewer.
const MAX_BATCH_BYTES: u64 = 32 << 20;
/// One permit of the memory for bodies.
pub(super) const PERMIT_BYTES: u64 = 1 << 10;

/// Whose request it is.
#[derive(Debug, Clone, Copy)]
pub struct Caller(pub TenantId);

impl FromRequestParts<Api> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, Problem> {
        Ok(Self(Who::from_request_parts(parts, api).await?.0.tenant))
    }
}

/// Somebody who may do what this operation is, which belongs to no tenant. Carries nothing for that reason.
#[derive(Debug, Clone, Copy)]
pub struct Operator;

impl FromRequestParts<Api> for Operator {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, Problem> {
        Who::from_request_parts(parts, api).await.map(|_| Self)
    }
}

/// `{task}` of the path.
#[derive(Debug)]
pub struct TaskPath(pub TaskName);

impl FromRequestParts<Api> for TaskPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        let Ok(Path(name)) = Path::<String>::from_request_parts(parts, &()).await else {
            return Err(Problem::new(Code::TaskNotFound, "this is not the name of a task"));
        };
        task_name(name).map(Self)
    }
}

fn task_name(name: String) -> Result<TaskName, Problem> {
    // Such a task cannot exist; uploads alone say why (see `NewTaskPath`).
    TaskName::try_from(name).map_err(|error| Problem::new(Code::TaskNotFound, error))
}

/// `{task}` of the path, where the task may come into being.
#[derive(Debug)]
pub struct NewTaskPath(pub TaskName);

impl FromRequestParts<Api> for NewTaskPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        let refuse = |error: &dyn std::fmt::Display| Problem::new(Code::InvalidTaskName, error);
        let Path(name) =
            Path::<String>::from_request_parts(parts, &()).await.map_err(|error| refuse(&error))?;
        TaskName::try_from(name).map(Self).map_err(|error| refuse(&error))
    }
}

/// `{tenant}` of the path: a name or an id, as it is written.
#[derive(Debug)]
pub struct TenantPath(pub String);

impl FromRequestParts<Api> for TenantPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        let name = Path::<String>::from_request_parts(parts, &()).await.ok();
        name.filter(|Path(name)| !name.contains('\0'))
            .map(|Path(name)| Self(name))
            .ok_or_else(|| Problem::new(Code::TenantNotFound, "this is not the name of a tenant"))
    }
}

/// `{plan}` of the path, which may come into being.
#[derive(Debug)]
pub struct PlanPath(pub TaskName);

impl FromRequestParts<Api> for PlanPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        let name = Path::<String>::from_request_parts(parts, &()).await.ok();
        name.and_then(|Path(name)| TaskName::try_from(name).ok()).map(Self).ok_or_else(|| {
            Problem::new(Code::InvalidBody, "the name of a plan has 1 to 63 of a-z, 0-9, `-` and `_`")
        })
    }
}

/// `{name}` of the path, of a budget.
#[derive(Debug)]
pub struct BudgetPath(pub TaskName);

impl FromRequestParts<Api> for BudgetPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        let name = Path::<String>::from_request_parts(parts, &()).await.ok();
        name.and_then(|Path(name)| TaskName::try_from(name).ok()).map(Self).ok_or_else(|| {
            let rule =
                "names have 1 to 63 characters of a-z, 0-9, - and _, and begin with a letter or a digit";
            Problem::new(Code::BudgetNotFound, rule)
        })
    }
}

/// `{name}` of the path, of a secret.
#[derive(Debug)]
pub struct SecretPath(pub String);

impl FromRequestParts<Api> for SecretPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        let name = Path::<String>::from_request_parts(parts, &()).await.ok();
        name.filter(|Path(name)| crate::app::secret::is_name(name)).map(|Path(name)| Self(name)).ok_or_else(
            || {
                let rule = "the name of a secret has 1 to 64 letters, digits and `_`, and no digit first";
                Problem::new(Code::SecretNotFound, rule)
            },
        )
    }
}

/// `{task}` and `{version}` of the path.
#[derive(Debug)]
pub struct VersionPath(pub TaskName, pub i32);

impl FromRequestParts<Api> for VersionPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        let refuse = || Problem::new(Code::VersionNotFound, "a version is a number from 1");
        let Path((name, version)) =
            Path::<(String, String)>::from_request_parts(parts, &()).await.map_err(|_| refuse())?;
        Ok(Self(task_name(name)?, version.parse().map_err(|_| refuse())?))
    }
}

/// `{id}` of the path.
#[derive(Debug, Clone, Copy)]
pub struct InvocationPath(pub InvocationId);

impl FromRequestParts<Api> for InvocationPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        let id = Path::<String>::from_request_parts(parts, &())
            .await
            .ok()
            .and_then(|Path(text)| text.parse().ok());
        id.map(Self)
            .ok_or_else(|| Problem::new(Code::InvocationNotFound, "the id of an invocation is a UUID"))
    }
}

/// `{id}` of the path, of a worker.
#[derive(Debug, Clone, Copy)]
pub struct WorkerPath(pub WorkerId);

impl FromRequestParts<Api> for WorkerPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        let id = Path::<String>::from_request_parts(parts, &()).await.ok();
        id.and_then(|Path(text)| text.parse().ok())
            .map(Self)
            .ok_or_else(|| Problem::new(Code::WorkerNotFound, "the id of a worker is a UUID"))
    }
}

/// `{id}` of the path, of a key.
#[derive(Debug, Clone, Copy)]
pub struct KeyPath(pub KeyId);

impl FromRequestParts<Api> for KeyPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        let id = Path::<String>::from_request_parts(parts, &()).await.ok();
        id.and_then(|Path(text)| text.parse().ok())
            .map(Self)
            .ok_or_else(|| Problem::new(Code::KeyNotFound, "the id of a key is a UUID"))
    }
}

/// `{id}` of the path, of whatever the handler says.
#[derive(Debug, Clone, Copy)]
pub struct IdPath<T>(Option<T>);

impl<T> IdPath<T> {
    /// The id. What cannot be one belongs to nothing.
    ///
    /// # Errors
    /// A problem of this kind.
    pub fn or(self, code: Code) -> Result<T, Problem> {
        self.0.ok_or_else(|| Problem::new(code, "the id is a UUID"))
    }
}

impl<T: std::str::FromStr + Send> FromRequestParts<Api> for IdPath<T> {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Infallible> {
        let id = Path::<String>::from_request_parts(parts, &()).await.ok();
        Ok(Self(id.and_then(|Path(text)| text.parse().ok())))
    }
}

/// `{name}` of the path, of a duty.
#[derive(Debug)]
pub struct DutyPath(pub String);

impl FromRequestParts<Api> for DutyPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        match Path::<String>::from_request_parts(parts, &()).await {
            Ok(Path(name)) => Ok(Self(name)),
            Err(_) => Err(Problem::new(Code::DutyNotFound, "this is not the name of a duty")),
        }
    }
}

/// `{id}` and `{*path}` of a file that an invocation left.
#[derive(Debug)]
pub struct ArtifactPath(pub InvocationId, pub String);

impl FromRequestParts<Api> for ArtifactPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        let found = Path::<(String, String)>::from_request_parts(parts, &()).await;
        let Ok(Path((id, path))) = found else {
            return Err(Problem::new(Code::ArtifactNotFound, "the path of a file is UTF-8"));
        };
        match id.parse() {
            Ok(id) => Ok(Self(id, path)),
            Err(_) => Err(Problem::new(Code::InvocationNotFound, "the id of an invocation is a UUID")),
        }
    }
}

/// The query string as pairs, in order; a key may come again.
#[derive(Debug)]
pub struct Pairs(pub Vec<(String, String)>);

impl FromRequestParts<Api> for Pairs {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        let Query(pairs) =
            Query::try_from_uri(&parts.uri).map_err(|error| Problem::new(Code::InvalidQuery, error))?;
        Ok(Self(pairs))
    }
}

/// `Prefer: wait=N` (RFC 7240), in seconds. Preferences that are not understood are ignored, as it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PreferWait(pub Option<u64>);

impl FromRequestParts<Api> for PreferWait {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Infallible> {
        Ok(prefer_wait(&parts.headers))
    }
}

fn prefer_wait(headers: &HeaderMap) -> PreferWait {
    let preferences = headers.get_all("prefer");
    let wait = preferences
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .find_map(|preference| {
            let (name, value) = preference.split(';').next()?.split_once('=')?;
            if !name.trim().eq_ignore_ascii_case("wait") {
                return None;
            }
            value.trim().trim_matches('"').parse().ok()
        });
    PreferWait(wait)
}

impl PreferWait {
    /// The wait that is granted.
    #[must_use]
    pub fn up_to(self, max: Duration) -> Option<Duration> {
        self.0.map(|seconds| Duration::from_secs(seconds).min(max))
    }
}

/// `Idempotency-Key`.
#[derive(Debug)]
pub struct Idempotency(pub Option<IdempotencyKey>);

impl FromRequestParts<Api> for Idempotency {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        let Some(value) = parts.headers.get("idempotency-key") else {
            return Ok(Self(None));
        };
        let text = String::from_utf8_lossy(value.as_bytes()).into_owned();
        IdempotencyKey::try_from(text)
            .map(|key| Self(Some(key)))
            .map_err(|error| Problem::new(Code::InvalidIdempotencyKey, error))
    }
}

/// A JSON body, read and bounded.
#[derive(Debug)]
pub struct Json<T> {
    value: T,
    bytes: bytes::Bytes,
    /// Memory paid for until the body has become a request.
    _memory: tokio::sync::OwnedSemaphorePermit,
}

impl<T> Json<T> {
    /// What the body says, and how it says it. Whoever takes the parts soon drops the bytes.
    pub fn into_parts(self) -> (T, bytes::Bytes) {
        (self.value, self.bytes)
    }
}

impl<T: DeserializeOwned> FromRequest<Api> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        let (value, bytes, memory) = json(request, api, JSON, max_body(api)).await?;
        Ok(Self { value, bytes, _memory: memory })
    }
}

/// A JSON merge patch (RFC 7396), read and bounded.
#[derive(Debug)]
pub struct MergePatch<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Api> for MergePatch<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        let types = &["application/merge-patch+json", "application/json"];
        Ok(Self(json(request, api, types, BODY_OVERHEAD).await?.0))
    }
}

/// What becomes a version: a module, whose bytes are read as they come, or a definition in JSON.
#[derive(Debug)]
pub enum Upload<T> {
    /// The body, and the length that the client announced.
    Module(Body, Option<u64>),
    /// In place of a module.
    Definition(T),
}

impl<T: DeserializeOwned> FromRequest<Api> for Upload<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        if media_type(request.headers(), JSON).is_ok() {
            return Ok(Self::Definition(json(request, api, JSON, BODY_OVERHEAD).await?.0));
        }
        media_type(request.headers(), &["application/wasm", "application/json"])?;
        let declared = content_length(request.headers());
        Ok(Self::Module(request.into_body(), declared))
    }
}

/// A JSON body of many requests, read and bounded.
#[derive(Debug)]
pub struct Many<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Api> for Many<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        let max = MAX_BATCH_BYTES.max(max_body(api));
        Ok(Self(json(request, api, JSON, max).await?.0))
    }
}

/// A JSON body that may be left out.
#[derive(Debug)]
pub struct OptionalJson<T>(pub T);

impl<T: DeserializeOwned + Default> FromRequest<Api> for OptionalJson<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        if !request.headers().contains_key(CONTENT_TYPE) && request.body().is_end_stream() {
            return Ok(Self(T::default()));
        }
        Ok(Self(json(request, api, JSON, BODY_OVERHEAD).await?.0))
    }
}

/// The media type of requests.
const JSON: &[&str] = &["application/json"];

/// Bytes of the body of one request.
fn max_body(api: &Api) -> u64 {
    // Base64 takes four bytes for three, and escapes up to six for one; twice is enough for ordinary text.
    api.app.settings().max_input_bytes.saturating_mul(2) + BODY_OVERHEAD
}

/// A body of one of these types and at most `max` bytes; the permit pays for its memory.
async fn json<T: DeserializeOwned>(
    request: Request,
    api: &Api,
    types: &[&str],
    max: u64,
) -> Result<(T, bytes::Bytes, tokio::sync::OwnedSemaphorePermit), Problem> {
    media_type(request.headers(), types)?;
    let declared = content_length(request.headers());
    if declared.is_some_and(|length| length > max) {
        return Err(too_large(max));
    }
    let permits = declared.unwrap_or(max).div_ceil(PERMIT_BYTES);
    let memory = u32::try_from(permits)
        .ok()
        .and_then(|n| Arc::clone(&api.bodies).try_acquire_many_owned(n).ok())
        .ok_or_else(|| Problem::new(Code::Overloaded, "too many request bodies at once"))?;
    let bytes = read(request.into_body(), max).await?;
    let value = parse(&bytes)?;
    Ok((value, bytes, memory))
}

fn too_large(max: u64) -> Problem {
    Problem::new(Code::BodyTooLarge, format!("this request body may have at most {max} bytes"))
}

async fn read(body: Body, max: u64) -> Result<bytes::Bytes, Problem> {
    let limit = usize::try_from(max).unwrap_or(usize::MAX);
    let collect = Limited::new(body, limit).collect();
    match tokio::time::timeout(BODY_TIMEOUT, collect).await {
        Err(_) => Err(Problem::new(
            Code::RequestTooSlow,
            format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs()),
        )),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large(max)),
        Ok(Err(error)) => Err(Problem::new(Code::BrokenBody, error)),
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
    }
}

/// The length that the client announced.
fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Refuse bodies of other types than these.
fn media_type(headers: &HeaderMap, allowed: &[&str]) -> Result<(), Problem> {
    let found = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok());
    let essence = found.and_then(|v| v.split(';').next()).map(str::trim);
    if essence.is_some_and(|e| allowed.iter().any(|a| a.eq_ignore_ascii_case(e))) {
        return Ok(());
    }
    Err(Problem::new(
        Code::UnsupportedMediaType,
        format!(
            "the header Content-Type must be {}; it is {}",
            allowed.join(" or "),
            found.map_or_else(|| "absent".to_owned(), |v| format!("`{v}`"))
        ),
    ))
}

pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    // A structure may also be read from an array of its fields: nobody means that.
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        return Err(Problem::new(Code::InvalidBody, "the request body must be a JSON object")
            .with_errors(vec![FieldError::new("", "must be an object")]));
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let pointer = pointer(error.path());
        bad_json(&error.into_inner(), &pointer)
    })?;
    json.end().map_err(|error| bad_json(&error, ""))?;
    Ok(value)
}

fn bad_json(error: &serde_json::Error, pointer: &str) -> Problem {
    match error.classify() {
        Category::Data => Problem::new(Code::InvalidBody, "the request body has invalid values")
            .with_errors(vec![FieldError::new(pointer, error.to_string())]),
        Category::Syntax | Category::Eof | Category::Io => Problem::new(Code::MalformedJson, error),
    }
}

fn pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut pointer = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => pointer.push_str(&format!("/{index}")),
            Segment::Map { key } => {
                pointer.push('/');
                pointer.push_str(&key.replace('~', "~0").replace('/', "~1"));
            }
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    pointer
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::wire::invocation::InvokeRequest;
    use axum::http::HeaderValue;

    fn wait(values: &[&str]) -> Option<u64> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append("prefer", HeaderValue::from_str(value).unwrap());
        }
        prefer_wait(&headers).0
    }

    #[test]
    fn a_wait_is_found_among_preferences_and_nonsense_is_ignored() {
        assert_eq!(wait(&["wait=10"]), Some(10));
        assert_eq!(wait(&["respond-async, Wait = \"7\"; foo=bar"]), Some(7));
        assert_eq!(wait(&["return=minimal", "wait=3"]), Some(3));
        assert_eq!(wait(&["wait=soon", "wait", "wait=-1"]), None);
        assert_eq!(PreferWait(Some(u64::MAX)).up_to(Duration::from_secs(60)), Some(Duration::from_secs(60)));
    }

    fn refused(body: &str) -> Problem {
        parse::<InvokeRequest>(body.as_bytes()).expect_err(body)
    }

    #[test]
    fn malformed_json_is_told_by_position_and_a_wrong_value_by_pointer() {
        for (body, position) in [("{\"input\": ", "column 10"), ("{} x", "column 4"), ("", "column 0")] {
            let problem = refused(body);
            assert_eq!(problem.code(), Code::MalformedJson, "{body}");
            assert!(format!("{problem:?}").contains(position), "{problem:?}");
        }
        for (body, pointer) in [
            ("{\"inputs\": 1}", "\"/inputs\""),
            ("{\"limits\": {\"fuel\": -1}}", "\"/limits/fuel\""),
            ("{\"args\": [\"a\", 1]}", "\"/args/1\""),
            ("{\"tags\": {\"a/b\": 1}}", "\"/tags/a~1b\""),
            ("[]", "\"\""),
        ] {
            let problem = refused(body);
            assert_eq!(problem.code(), Code::InvalidBody, "{body}");
            assert!(format!("{problem:?}").contains(pointer), "{pointer} {problem:?}");
        }
    }

    #[test]
    fn an_input_of_null_is_an_input_and_keeps_its_bytes() {
        let request: InvokeRequest = parse(br#"{"input": null}"#).unwrap();
        assert_eq!(request.input.unwrap().get(), "null");
        let request: InvokeRequest =
            parse(br#"{"input": {"a" : 1.0, "n": 123456789012345678901234567890}}"#).unwrap();
        assert_eq!(request.input.unwrap().get(), r#"{"a" : 1.0, "n": 123456789012345678901234567890}"#);
        assert!(parse::<InvokeRequest>(b"{}").unwrap().input.is_none());
    }

    #[test]
    fn only_the_media_types_that_a_route_takes_pass() {
        let mut headers = HeaderMap::new();
        assert!(media_type(&headers, &["application/json"]).is_err());
        headers.insert("content-type", HeaderValue::from_static("Application/JSON; charset=utf-8"));
        assert!(media_type(&headers, &["application/json"]).is_ok());
        assert!(media_type(&headers, &["application/wasm"]).is_err());
    }
}
