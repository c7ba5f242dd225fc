//! `/v1/usage`: the bill, as JSON or CSV.

use axum::Json;
use axum::extract::State;
use axum::http::header::{ACCEPT, CONTENT_DISPOSITION, CONTENT_TYPE, LINK};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};

use crate::api::extract::{Caller, Pairs};
use crate::api::problem::{Code, Problem};
use crate::api::{Api, unknown_parameter};
use crate::app::usage::{Bill, MAX_RANGE, hour};
use crate::store::usage::{Period, Query, UsageRow};
use crate::wire::problem as problem_wire;
use crate::wire::usage as wire;

/// What the columns of a CSV are called, in order.
const COLUMNS: &str =
    "at,task,attempts,succeeded,fuel,cpu_ns,wall_ns,input_bytes,output_bytes,log_bytes,egress_bytes";
/// The range when none is named.
const DEFAULT_RANGE: TimeDelta = TimeDelta::days(30);

/// What your tenant's attempts cost, from a ledger that has every receipt exactly once. Grouped by `hour`, `day` or not
/// at all in time, and by `task`. With `Accept: text/csv` a table; the header `Link` leads to the rest of a long one.
#[utoipa::path(
    get, path = "/v1/usage", tag = "tenants",
    params(
        ("from" = Option<DateTime<Utc>>, Query, description = "Begin, taken down to the full hour (UTC); default 30 days before the end"),
        ("to" = Option<DateTime<Utc>>, Query, description = "End, not included, taken up to the full hour; default now"),
        ("group" = Option<String>, Query, description = "`hour`, `day`, `task`, or one of the first two with `,task`; `none` for one sum. Default `day`"),
    ),
    responses(
        (status = 200, description = "The sums", content((wire::Usage = "application/json"), (String = "text/csv"))),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Pairs(pairs): Pairs,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (query, group) = query(pairs)?;
    let bill = api.app.usage(tenant, query).await?;
    let next = bill.next.map(|from| {
        let time = |at: DateTime<Utc>| at.to_rfc3339_opts(SecondsFormat::Secs, true);
        format!(
            "/v1/usage?from={}&to={}&group={}",
            time(from),
            time(bill.query.to),
            group.replace(',', "%2C")
        )
    });
    let accepts = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !accepts.split(',').any(|kind| kind.split(';').next().is_some_and(|kind| kind.trim() == "text/csv")) {
        let items = bill.rows.into_iter().map(shape).collect();
        return Ok(
            Json(wire::Usage { from: bill.query.from, to: bill.query.to, items, next }).into_response()
        );
    }
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/csv; charset=utf-8"));
    headers.insert(CONTENT_DISPOSITION, HeaderValue::from_static("attachment; filename=\"usage.csv\""));
    if let Some(link) = next.and_then(|next| HeaderValue::from_str(&format!("<{next}>; rel=\"next\"")).ok()) {
        headers.insert(LINK, link);
    }
    Ok((headers, csv(&bill)).into_response())
}

fn query(pairs: Vec<(String, String)>) -> Result<(Query, String), Problem> {
    let refuse = |detail: String| Problem::new(Code::InvalidQuery, detail);
    let time = |name: &str, value: &str| {
        let time = DateTime::parse_from_rfc3339(value).map(|time| time.to_utc());
        time.map_err(|_| refuse(format!("`{name}` must be a time like 2026-01-31T00:00:00Z")))
    };
    let (mut from, mut to, mut group) = (None, None, "day".to_owned());
    for (key, value) in pairs {
        match key.as_str() {
            "from" => from = Some(hour(time("from", &value)?)),
            "to" => to = Some(time("to", &value)?),
            "group" => group = value,
            other => return Err(unknown_parameter(other, "from, to and group")),
        }
    }
    // Up to the full hour: attempts of the hour that runs count as well.
    let to = to.unwrap_or_else(Utc::now);
    let to = if hour(to) == to { to } else { hour(to) + TimeDelta::hours(1) };
    let from = from.unwrap_or(to - DEFAULT_RANGE);
    if from >= to || to - from > MAX_RANGE {
        return Err(refuse(format!("`from` must be before `to`, and at most {} days", MAX_RANGE.num_days())));
    }
    let (period, by_task) = match group.as_str() {
        "none" => (Period::Whole, false),
        "task" => (Period::Whole, true),
        "hour" => (Period::Hour, false),
        "day" => (Period::Day, false),
        "hour,task" => (Period::Hour, true),
        "day,task" => (Period::Day, true),
        _ => {
            return Err(refuse(
                "`group` must be none, hour, day, task, `hour,task` or `day,task`".to_owned(),
            ));
        }
    };
    Ok((Query { from, to, period, by_task, limit: 0 }, group))
}

fn shape(row: UsageRow) -> wire::UsageRow {
    wire::UsageRow {
        at: row.at,
        task: row.task,
        attempts: row.attempts,
        succeeded: row.succeeded,
        fuel: row.fuel,
        cpu_ns: row.cpu_ns,
        wall_ns: row.wall_ns,
        input_bytes: row.input_bytes,
        output_bytes: row.output_bytes,
        log_bytes: row.log_bytes,
        egress_bytes: row.egress_bytes,
    }
}

/// Names of tasks are letters, digits, `-` and `_`: nothing needs quotes.
fn csv(bill: &Bill) -> String {
    let mut text = format!("{COLUMNS}\r\n");
    for row in &bill.rows {
        let at = row.at.map(|at| at.to_rfc3339_opts(SecondsFormat::Secs, true)).unwrap_or_default();
        let numbers = [
            row.attempts,
            row.succeeded,
            row.fuel,
            row.cpu_ns,
            row.wall_ns,
            row.input_bytes,
            row.output_bytes,
            row.log_bytes,
            row.egress_bytes,
        ];
        let numbers = numbers.map(|n| n.to_string()).join(",");
        text.push_str(&format!("{at},{},{numbers}\r\n", row.task.as_deref().unwrap_or_default()));
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn asked(pairs: &[(&str, &str)]) -> Result<Query, Problem> {
        let pairs = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        query(pairs).map(|(query, _)| query)
    }

    #[test]
    fn a_range_is_of_full_hours_and_not_too_long() {
        let q = asked(&[("from", "2026-01-01T00:30:00Z"), ("to", "2026-01-02T00:00:01+01:00")]).unwrap();
        assert_eq!(q.from.to_rfc3339(), "2026-01-01T00:00:00+00:00");
        assert_eq!(q.to.to_rfc3339(), "2026-01-02T00:00:00+00:00");
        assert_eq!((q.period, q.by_task), (Period::Day, false));
        let now = asked(&[("group", "hour,task")]).unwrap();
        assert!(now.to >= Utc::now() && now.to - now.from == DEFAULT_RANGE);
        for bad in [
            ("from", "yesterday"),
            ("group", "week"),
            ("group", "task,hour"),
            ("x", "1"),
            ("from", "2020-01-01T00:00:00Z"),
            ("from", "2999-01-01T00:00:00Z"),
        ] {
            assert_eq!(asked(&[bad]).expect_err(bad.1).code(), Code::InvalidQuery, "{bad:?}");
        }
    }
}
