//! `/v1/dead-letters`: what died, grouped by what killed it.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use crate::api::extract::{Caller, InvocationPath, Pairs};
use crate::api::problem::{Code, Problem};
use crate::api::{Api, PAGE, again, limit, unknown_parameter};
use crate::domain::names::TaskName;
use crate::store::dead_letter as store;
use crate::wire::Page;
use crate::wire::dead_letter as wire;
use crate::wire::problem as problem_wire;

/// Longest reason that is looked for; ours are shorter.
const MAX_REASON: usize = 64;

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Sixteen hexadecimal digits.
pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    if text.len() != 16 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    (0..8).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()).collect()
}

fn letter(row: &store::DeadLetter) -> wire::DeadLetter {
    let invocation = format!("/v1/invocations/{}", row.id);
    wire::DeadLetter {
        id: row.id.0,
        task: row.task.clone(),
        version: row.version,
        reason: row.reason.clone(),
        fingerprint: row.fingerprint.as_deref().map(hex),
        summary: row.summary.clone(),
        attempts: row.attempts,
        died_at: row.died_at,
        redriven_as: row.redriven.map(|(id, _)| id.0),
        redriven_at: row.redriven.map(|(_, at)| at),
        links: wire::DeadLetterLinks {
            logs: format!("{invocation}/logs"),
            redrive: format!("{invocation}/retry"),
            invocation,
        },
    }
}

fn group(row: &store::Group) -> wire::DeadLetterGroup {
    let fingerprint = row.fingerprint.as_deref().map(hex);
    let same = fingerprint.as_ref().map_or_else(String::new, |f| format!("&fingerprint={f}"));
    wire::DeadLetterGroup {
        link: format!("/v1/dead-letters?task={}{same}", row.task),
        task: row.task.clone(),
        fingerprint,
        reason: row.reason.clone(),
        summary: row.summary.clone(),
        count: row.count,
        first_at: row.first_at,
        last_at: row.last_at,
        newest: row.newest.0,
    }
}

fn filter(pairs: Vec<(String, String)>, pages: bool) -> Result<(store::Filter, u16), Problem> {
    let mut filter = store::Filter::default();
    let mut size = PAGE.0;
    let refuse = |detail: &dyn std::fmt::Display| Problem::new(Code::InvalidQuery, detail);
    for (key, value) in pairs {
        match key.as_str() {
            "task" => filter.task = Some(TaskName::try_from(value).map_err(|e| refuse(&e))?),
            "fingerprint" => {
                let bytes = unhex(&value);
                filter.fingerprint =
                    Some(bytes.ok_or_else(|| refuse(&"`fingerprint` must be sixteen hexadecimal digits"))?);
            }
            "reason" if value.len() <= MAX_REASON && !value.contains('\0') => filter.reason = Some(value),
            "reason" => return Err(refuse(&"`reason` must be that of a termination")),
            "died_after" | "died_before" => {
                let at = value
                    .parse()
                    .map_err(|_| refuse(&format!("`{key}` must be a time as RFC 3339 has it")))?;
                if key == "died_after" {
                    filter.after = Some(at);
                } else {
                    filter.before = Some(at);
                }
            }
            "redriven" => {
                let word = value.parse().map_err(|_| refuse(&"`redriven` must be true or false"))?;
                filter.redriven = Some(word);
            }
            "after" if pages => {
                let id = value.parse().map_err(|_| refuse(&"`after` must be the id of an invocation"))?;
                filter.older_than = Some(id);
            }
            "limit" if pages => size = limit(&value)?,
            other => {
                let known = "task, fingerprint, reason, died_after, died_before and redriven";
                let more = "; of a list also after and limit";
                return Err(unknown_parameter(other, &format!("{known}{more}")));
            }
        }
    }
    Ok((filter, size))
}

/// List dead letters, newest invocation first: invocations that ended badly for good. Those that were run again stay in
/// the list (`redriven=false` leaves them out) until retention or a purge removes them.
#[utoipa::path(
    get, path = "/v1/dead-letters", tag = "dead letters",
    params(
        ("task" = Option<String>, Query, description = "Of this task"),
        ("fingerprint" = Option<String>, Query, description = "Of this kind of failure"),
        ("reason" = Option<String>, Query, description = "With this reason, such as trap"),
        ("died_after" = Option<String>, Query, description = "Died after this time (RFC 3339)"),
        ("died_before" = Option<String>, Query, description = "Died before this time (RFC 3339)"),
        ("redriven" = Option<bool>, Query, description = "Run again already, or not"),
        ("after" = Option<uuid::Uuid>, Query, description = "Older than this invocation: the last one of the page before"),
        ("limit" = Option<u16>, Query, description = "Items of the page, 1 to 200; default 50"),
    ),
    responses(
        (status = 200, description = "A page of dead letters", body = Page<wire::DeadLetter>),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Pairs(pairs): Pairs,
) -> Result<Json<Page<wire::DeadLetter>>, Problem> {
    let (filter, size) = filter(pairs.clone(), true)?;
    let (rows, more) = api.app.dead_letters(tenant, &filter, size).await?;
    let last = rows.last().filter(|_| more);
    Ok(Json(Page {
        next: last.map(|row| again("/v1/dead-letters", &pairs, row.id)),
        items: rows.iter().map(letter).collect(),
    }))
}

/// Dead letters grouped by task and kind of failure, the largest group first; at most 200 groups.
#[utoipa::path(
    get, path = "/v1/dead-letters/groups", tag = "dead letters",
    params(
        ("task" = Option<String>, Query, description = "Of this task"),
        ("fingerprint" = Option<String>, Query, description = "Of this kind of failure"),
        ("reason" = Option<String>, Query, description = "With this reason"),
        ("died_after" = Option<String>, Query, description = "Died after this time (RFC 3339)"),
        ("died_before" = Option<String>, Query, description = "Died before this time (RFC 3339)"),
        ("redriven" = Option<bool>, Query, description = "Run again already, or not"),
    ),
    responses(
        (status = 200, description = "Groups", body = Page<wire::DeadLetterGroup>),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn groups(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Pairs(pairs): Pairs,
) -> Result<Json<Page<wire::DeadLetterGroup>>, Problem> {
    let (filter, _) = filter(pairs, false)?;
    let rows = api.app.dead_letter_groups(tenant, &filter).await?;
    Ok(Json(Page { items: rows.iter().map(group).collect(), next: None }))
}

/// Delete a dead letter for good: the invocation with its input, attempts, result and logs. Many at once:
/// `POST /v1/bulk` with the action `purge`. To run one again: `POST /v1/invocations/{id}/retry`.
#[utoipa::path(
    delete, path = "/v1/dead-letters/{id}", tag = "dead letters",
    params(("id" = uuid::Uuid, Path, description = "Id of the invocation")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "dead-letter-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn purge(
    State(api): State<Api>,
    Caller(tenant): Caller,
    InvocationPath(id): InvocationPath,
) -> Result<StatusCode, Problem> {
    api.app.dead_letter_purge(tenant, id).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_fingerprint_is_sixteen_hexadecimal_digits_and_nothing_else() {
        assert_eq!(unhex(&hex(&[0, 1, 0xfe, 3, 4, 5, 6, 7])).unwrap(), [0, 1, 0xfe, 3, 4, 5, 6, 7]);
        for bad in ["", "0011", "00112233445566gg", "001122334455667788", "ßßßßßßßß", "+011223344556677"]
        {
            assert!(unhex(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn shape_of_a_dead_letter_and_of_a_group() {
        let at = "2026-01-01T00:00:00Z".parse().unwrap();
        let id = crate::domain::ids::InvocationId(uuid::Uuid::from_u128(1));
        insta::assert_json_snapshot!(letter(&store::DeadLetter {
            id,
            task: "t".to_owned(),
            version: 2,
            reason: "trap".to_owned(),
            died_at: at,
            attempts: 3,
            fingerprint: Some(vec![1; 8]),
            summary: Some("trap (unreachable) in a::b".to_owned()),
            redriven: Some((id, at)),
            sealed: None,
        }));
        insta::assert_json_snapshot!(group(&store::Group {
            task: "t".to_owned(),
            fingerprint: Some(vec![1; 8]),
            reason: "trap".to_owned(),
            summary: None,
            count: 7,
            first_at: at,
            last_at: at,
            newest: id,
            sealed: None,
        }));
    }
}
