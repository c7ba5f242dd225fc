//! `/v1/audit`: in pages as JSON, or all of it as JSON lines.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use futures_util::StreamExt;

use crate::api::access::Who;
use crate::api::extract::Pairs;
use crate::api::problem::{Code, Problem};
use crate::api::{Api, PAGE, limit, unknown_parameter};
use crate::domain::permission::Action;
use crate::store::audit::{AuditFilter, Entry, INSTALLATION};
use crate::wire::Page;
use crate::wire::audit as wire;
use crate::wire::problem as problem_wire;

/// Media type of an export.
const LINES: &str = "application/x-ndjson";

fn shape(e: Entry) -> wire::AuditEntry {
    wire::AuditEntry {
        id: e.audit_id,
        at: e.at,
        actor_kind: e.actor_kind,
        actor_id: e.actor_id,
        actor: e.actor,
        address: e.address,
        request_id: e.request_id,
        operation: e.operation,
        action: e.action,
        target: e.target,
        outcome: if e.outcome == "done" { wire::Outcome::Done } else { wire::Outcome::Denied },
        status: e.status,
        code: e.code,
        times: e.times,
        before: e.before,
        after: e.after,
    }
}

/// The audit log: every change and every denied attempt, newest first. With `Accept: application/x-ndjson` everything
/// that passes the filters, one entry per line. `of=installation` is for the platform: its own changes, and attempts
/// without a valid credential.
#[utoipa::path(
    get, path = "/v1/audit", tag = "audit",
    params(
        ("since" = Option<DateTime<Utc>>, Query, description = "Not before this time"),
        ("until" = Option<DateTime<Utc>>, Query, description = "Before this time"),
        ("actor" = Option<uuid::Uuid>, Query, description = "By this key or user"),
        ("action" = Option<String>, Query, description = "That needed this action"),
        ("outcome" = Option<wire::Outcome>, Query, description = "With this outcome"),
        ("target" = Option<String>, Query, description = "Whose path begins with this"),
        ("of" = Option<String>, Query, description = "`tenant` (default) or `installation`"),
        ("after" = Option<uuid::Uuid>, Query, description = "Older than this one"),
        ("limit" = Option<u16>, Query, description = "Items of the page, 1 to 200; default 50. Not for exports"),
        ("Accept" = Option<String>, Header, description = "application/x-ndjson: an export"),
    ),
    responses(
        (status = 200, description = "A page of entries, or the export", content((Page<wire::AuditEntry> = "application/json"), (String = "application/x-ndjson"))),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list(
    State(api): State<Api>,
    who: Who,
    headers: HeaderMap,
    Pairs(pairs): Pairs,
) -> Result<Response, Problem> {
    let asked = asked(&pairs)?;
    let tenant = if asked.installation {
        who.authorize(Action::ReadPlatform, None)?;
        INSTALLATION
    } else {
        who.0.tenant
    };
    let accepted = headers.get(ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
    if accepted.split([',', ';']).any(|one| one.trim().eq_ignore_ascii_case(LINES)) {
        let pages = api.app.audit_export(tenant, asked.filter);
        let lines = pages.map(|page| {
            let mut text = String::new();
            for entry in
                page.inspect_err(|error| tracing::warn!(%error, "an export of the audit log broke off"))?
            {
                // Strings, numbers and JSON: this cannot fail.
                text.push_str(&serde_json::to_string(&shape(entry)).unwrap_or_default());
                text.push('\n');
            }
            Ok::<_, crate::app::Error>(text)
        });
        return Ok(([(CONTENT_TYPE, LINES)], Body::from_stream(lines)).into_response());
    }
    let (rows, more) = api.app.audit(tenant, &asked.filter, asked.limit).await?;
    let next = rows.last().filter(|_| more).map(|last| crate::api::again("/v1/audit", &pairs, last.audit_id));
    Ok(Json(Page { items: rows.into_iter().map(shape).collect::<Vec<_>>(), next }).into_response())
}

struct Asked {
    filter: AuditFilter,
    installation: bool,
    limit: u16,
}

fn asked(pairs: &[(String, String)]) -> Result<Asked, Problem> {
    let mut asked = Asked { filter: AuditFilter::default(), installation: false, limit: PAGE.0 };
    let refuse = |detail: &str| Problem::new(Code::InvalidQuery, detail);
    let time = |name: &str, text: &str| {
        let at = DateTime::parse_from_rfc3339(text);
        at.map(|at| at.with_timezone(&Utc))
            .map_err(|error| refuse(&format!("`{name}` must be an RFC 3339 time: {error}")))
    };
    let filter = &mut asked.filter;
    for (key, value) in pairs {
        match key.as_str() {
            "since" => filter.since = Some(time(key, value)?),
            "until" => filter.until = Some(time(key, value)?),
            "actor" => {
                filter.actor = Some(value.parse().map_err(|_| refuse("`actor` must be an id"))?);
            }
            "action" => {
                let known = Action::ALL.iter().any(|a| a.as_str() == value);
                if !known {
                    return Err(refuse("`action` must be an action of docs/permissions.md"));
                }
                filter.action = Some(value.clone());
            }
            "outcome" if value == "done" || value == "denied" => filter.outcome = Some(value.clone()),
            "outcome" => return Err(refuse("`outcome` must be done or denied")),
            "target" if value.len() <= 512 && !value.contains('\0') => filter.target = Some(value.clone()),
            "target" => return Err(refuse("`target` must be the beginning of a path")),
            "of" if value == "installation" => asked.installation = true,
            "of" if value == "tenant" => asked.installation = false,
            "of" => return Err(refuse("`of` must be tenant or installation")),
            "after" => {
                filter.after = Some(value.parse().map_err(|_| refuse("`after` must be the id of an entry"))?);
            }
            "limit" => asked.limit = limit(value)?,
            other => {
                return Err(unknown_parameter(
                    other,
                    "since, until, actor, action, outcome, target, of, after and limit",
                ));
            }
        }
    }
    Ok(asked)
}
