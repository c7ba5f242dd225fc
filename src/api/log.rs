//! `/v1/invocations/{id}/logs`: in pages as JSON, or as events while it happens.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::header::{ACCEPT, CACHE_CONTROL};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use futures_util::StreamExt;
use sandbar_host::outcome::LogLevel;
use serde::Serialize;

use crate::api::extract::{Caller, InvocationPath, Pairs};
use crate::api::problem::{Code, Problem};
use crate::api::{Api, shape, unknown_parameter};
use crate::app::log::{Heard, LogFilter};
use crate::store::log::Place;
use crate::wire::invocation as wire;
use crate::wire::problem as problem_wire;

/// Records of a page: default and most.
const PAGE: (usize, usize) = (200, 1_000);
/// Silence after which a stream says that it is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The log: records of all attempts in order, or of one, with filters. What a running attempt logs is there within
/// about a second. With `Accept: text/event-stream` the answer goes on until the invocation ends: events `log` (data:
/// LogRecord, id: its cursor), `progress` (Progress), `state` (its state and attempt) and at last `end`
/// (InvocationSummary). A stream that broke off is continued by the header Last-Event-ID.
#[utoipa::path(
    get, path = "/v1/invocations/{id}/logs", tag = "invocations",
    params(
        ("id" = uuid::Uuid, Path, description = "Id of the invocation"),
        ("attempt" = Option<i16>, Query, description = "Only of this attempt"),
        ("level" = Option<wire::Level>, Query, description = "Only of this level and worse ones"),
        ("since" = Option<DateTime<Utc>>, Query, description = "Only of this time and later"),
        ("after" = Option<String>, Query, description = "After the record with this cursor"),
        ("limit" = Option<u16>, Query, description = "Records of the page, 1 to 1,000; default 200. Not for streams"),
        ("Accept" = Option<String>, Header, description = "text/event-stream: follow it"),
        ("Last-Event-ID" = Option<String>, Header, description = "Cursor of the last record of a stream that broke off; goes before `after`"),
    ),
    responses(
        (status = 200, description = "A page of records, or the stream", content((wire::LogPage = "application/json"), (String = "text/event-stream"))),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "invocation-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 503, description = "overloaded: too many streams; database-unavailable", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn logs(
    State(api): State<Api>,
    Caller(tenant): Caller,
    InvocationPath(id): InvocationPath,
    headers: HeaderMap,
    Pairs(pairs): Pairs,
) -> Result<Response, Problem> {
    let mut asked = asked(pairs)?;
    if !wants_events(&headers) {
        let (records, more) = api.app.log(tenant, id, asked.filter, asked.after, asked.limit).await?;
        let items: Vec<wire::LogRecord> = records.iter().map(shape::record).collect();
        let next = items.last().filter(|_| more).map(|last| last.cursor.clone());
        return Ok(Json(wire::LogPage { items, next }).into_response());
    }
    if let Some(last) = headers.get("last-event-id").and_then(|v| v.to_str().ok()).filter(|v| !v.is_empty()) {
        asked.after = Some(place(last, "Last-Event-ID")?);
    }
    let heard = api.app.follow(tenant, id, asked.filter, asked.after).await?;
    let events = heard.map(|heard| Ok::<_, Infallible>(event(&heard)));
    let mut response =
        Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE).text("still here")).into_response();
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, no-store"));
    // For proxies that would otherwise collect the events before they pass them on.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

fn wants_events(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(ACCEPT).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(','));
    let mut types = accepted.filter_map(|one| one.split(';').next()).map(str::trim);
    types.any(|one| one.eq_ignore_ascii_case("text/event-stream"))
}

fn event(heard: &Heard) -> Event {
    match heard {
        Heard::State(state, attempt) => {
            named("state", &wire::StateEvent { state: shape::state(*state), attempt: *attempt })
        }
        Heard::Log(record) => {
            let record = shape::record(record);
            named("log", &record).id(record.cursor)
        }
        Heard::Progress(progress) => named("progress", &shape::progress(progress)),
        Heard::End(summary) => named("end", &shape::summary(summary, false)),
    }
}

fn named<T: Serialize>(name: &str, data: &T) -> Event {
    // Strings, numbers and lists of them: this cannot fail.
    Event::default().event(name).data(serde_json::to_string(data).unwrap_or_default())
}

#[derive(Debug)]
struct Asked {
    filter: LogFilter,
    after: Option<Place>,
    limit: usize,
}

fn asked(pairs: Vec<(String, String)>) -> Result<Asked, Problem> {
    let mut asked = Asked { filter: LogFilter::default(), after: None, limit: PAGE.0 };
    let refuse = |detail: String| Problem::new(Code::InvalidQuery, detail);
    for (key, value) in pairs {
        match key.as_str() {
            "attempt" => {
                let number = value.parse::<i16>().ok().filter(|n| *n > 0);
                let number =
                    number.ok_or_else(|| refuse("`attempt` must be the number of an attempt".to_owned()))?;
                asked.filter.attempt = Some(number);
            }
            "level" => {
                let level = LEVELS.into_iter().find(|(name, _)| *name == value);
                asked.filter.level =
                    Some(level.map(|(_, level)| level).ok_or_else(|| {
                        refuse("`level` must be trace, debug, info, warn or error".to_owned())
                    })?);
            }
            "since" => {
                let at = DateTime::parse_from_rfc3339(&value)
                    .map_err(|error| refuse(format!("`since` must be an RFC 3339 time: {error}")))?;
                asked.filter.since = Some(at.with_timezone(&Utc));
            }
            "after" => asked.after = Some(place(&value, "after")?),
            "limit" => {
                let number = value.parse().ok().filter(|n| (1..=PAGE.1).contains(n));
                asked.limit =
                    number.ok_or_else(|| refuse(format!("`limit` must be from 1 to {}", PAGE.1)))?;
            }
            other => return Err(unknown_parameter(other, "attempt, level, since, after and limit")),
        }
    }
    Ok(asked)
}

const LEVELS: [(&str, LogLevel); 5] = [
    ("trace", LogLevel::Trace),
    ("debug", LogLevel::Debug),
    ("info", LogLevel::Info),
    ("warn", LogLevel::Warn),
    ("error", LogLevel::Error),
];

/// What [`shape::record`] wrote.
fn place(cursor: &str, what: &str) -> Result<Place, Problem> {
    let place = cursor.split_once('.').and_then(|(attempt, index)| {
        Some(Place { attempt: attempt.parse().ok()?, index: index.parse().ok()? })
    });
    place
        .filter(|place| place.attempt > 0 && place.index >= 0 && place.index < i32::MAX)
        .ok_or_else(|| Problem::new(Code::InvalidQuery, format!("`{what}` must be the cursor of a record")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn filters_are_read_and_what_is_not_understood_is_refused() {
        let all = [
            ("attempt", "2"),
            ("level", "warn"),
            ("since", "2026-01-02T03:04:05+02:00"),
            ("after", "1.17"),
            ("limit", "1000"),
        ];
        let found = asked(pairs(&all)).unwrap();
        assert_eq!((found.filter.attempt, found.filter.level), (Some(2), Some(LogLevel::Warn)));
        assert_eq!(found.filter.since.unwrap().to_rfc3339(), "2026-01-02T01:04:05+00:00");
        assert_eq!((found.after, found.limit), (Some(Place { attempt: 1, index: 17 }), 1_000));
        for bad in [
            ("attempt", "0"),
            ("level", "loud"),
            ("since", "yesterday"),
            ("after", "17"),
            ("after", "0.1"),
            ("after", "1.-1"),
            ("after", "1.2147483647"),
            ("after", "99999.1"),
            ("limit", "1001"),
            ("follow", "1"),
        ] {
            assert_eq!(asked(pairs(&[bad])).expect_err(bad.0).code(), Code::InvalidQuery, "{bad:?}");
        }
    }

    #[test]
    fn a_stream_is_given_only_to_those_who_ask_for_one() {
        let wants = |accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_str(accept).unwrap());
            wants_events(&headers)
        };
        assert!(wants("text/event-stream") && wants("application/json;q=0.5, Text/Event-Stream;q=1"));
        assert!(!wants("*/*") && !wants("application/json") && !wants_events(&HeaderMap::new()));
    }
}
