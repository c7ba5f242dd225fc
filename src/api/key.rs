//! `/v1/keys` and `/v1/me`.

use axum::Json;
use axum::extract::State;
use axum::http::header::CACHE_CONTROL;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use chrono::{TimeDelta, Utc};

use crate::api::access::Who;
use crate::api::extract::{self, Caller, KeyPath, MergePatch, OptionalJson, Pairs};
use crate::api::problem::{Code, Problem};
use crate::api::quota::changes;
use crate::api::{Api, PAGE, limit, unknown_parameter};
use crate::app::FieldError;
use crate::app::key::{Made, Wanted};
use crate::app::quota::key_standing;
use crate::domain::permission::{Action, Reach, Role, Scope};
use crate::store::key::{KeyChange, KeyFilter, KeyRow};
use crate::store::tenant::Actor;
use crate::wire::Page;
use crate::wire::key as wire;
use crate::wire::problem as problem_wire;

/// A role on the wire.
pub(super) fn role(role: Role) -> wire::Role {
    match role {
        Role::Platform => wire::Role::Platform,
        Role::Owner => wire::Role::Owner,
        Role::Admin => wire::Role::Admin,
        Role::Developer => wire::Role::Developer,
        Role::Operator => wire::Role::Operator,
        Role::Viewer => wire::Role::Viewer,
    }
}

/// A role from the wire.
pub(super) fn asked_role(role: wire::Role) -> Role {
    match role {
        wire::Role::Platform => Role::Platform,
        wire::Role::Owner => Role::Owner,
        wire::Role::Admin => Role::Admin,
        wire::Role::Developer => Role::Developer,
        wire::Role::Operator => Role::Operator,
        wire::Role::Viewer => Role::Viewer,
    }
}

fn words(scopes: &[Scope]) -> Vec<String> {
    scopes.iter().map(ToString::to_string).collect()
}

fn scopes(words: &[String]) -> Result<Vec<Scope>, Problem> {
    let read = |(n, word): (usize, &String)| {
        word.parse::<Scope>().map_err(|error| {
            Problem::new(Code::InvalidBody, "the request body has invalid values")
                .with_errors(vec![FieldError::new(format!("/scopes/{n}"), error.to_string())])
        })
    };
    words.iter().enumerate().map(read).collect()
}

fn key(row: &KeyRow) -> wire::Key {
    wire::Key {
        id: row.id.0,
        name: row.name.clone(),
        prefix: row.prefix.clone(),
        state: if row.revoked_at.is_some() {
            wire::KeyState::Revoked
        } else if row.expires_at.is_some_and(|at| at <= Utc::now()) {
            wire::KeyState::Expired
        } else if row.replaced_by.is_some() {
            wire::KeyState::Replaced
        } else {
            wire::KeyState::Active
        },
        role: role(row.role),
        scopes: words(&row.scopes),
        created_at: row.created_at,
        created_by: row.created_by.clone(),
        expires_at: row.expires_at,
        last_used_at: row.last_used_at,
        replaced_by: row.replaced_by.map(|id| id.0),
        revoked_at: row.revoked_at,
        quotas: key_standing(row, Utc::now())
            .into_iter()
            .map(|(quota, limit, used, resets_at)| wire::KeyQuota {
                name: quota.as_str().to_owned(),
                limit,
                used,
                resets_at,
            })
            .collect(),
    }
}

/// A secret is in it: nobody on the way may keep it.
pub(super) fn made(status: StatusCode, made: Made) -> Response {
    let body = wire::MadeKey { key: key(&made.row), secret: made.secret };
    (status, [(CACHE_CONTROL, HeaderValue::from_static("no-store"))], Json(body)).into_response()
}

/// Who the credential belongs to, and what it may.
#[utoipa::path(
    get, path = "/v1/me", tag = "keys",
    responses(
        (status = 200, description = "Who it is", body = wire::Me),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn me(State(api): State<Api>, Who(who): Who) -> Result<Json<wire::Me>, Problem> {
    let tenant = api.app.tenant_name(who.tenant).await?;
    let (kind, id) = match who.actor {
        Actor::Key(id) => (wire::ActorKind::Key, id.0),
        Actor::User(id, _) => (wire::ActorKind::User, id.0),
        Actor::Subject(id) => (wire::ActorKind::Subject, id),
    };
    let permits = who.permits();
    let may = Action::ALL.iter().filter(|action| permits.reach(**action) != Reach::Nothing);
    Ok(Json(wire::Me {
        tenant_id: who.tenant.0,
        tenant,
        kind,
        id,
        name: who.name.to_string(),
        role: role(who.role),
        scopes: words(&who.scopes),
        expires_at: who.expires_at,
        may: may.map(|action| action.as_str().to_owned()).collect(),
    }))
}

/// List keys, newest first. Never the keys themselves.
#[utoipa::path(
    get, path = "/v1/keys", tag = "keys",
    params(
        ("prefix" = Option<String>, Query, description = "Whose first characters begin with this"),
        ("revoked" = Option<bool>, Query, description = "Also those that are revoked; default false"),
        ("after" = Option<uuid::Uuid>, Query, description = "Older than this one"),
        ("limit" = Option<u16>, Query, description = "Items of the page, 1 to 200; default 50"),
    ),
    responses(
        (status = 200, description = "A page of keys", body = Page<wire::Key>),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Pairs(pairs): Pairs,
) -> Result<Json<Page<wire::Key>>, Problem> {
    let mut filter = KeyFilter::default();
    let mut size = PAGE.0;
    let refuse = |detail: &str| Problem::new(Code::InvalidQuery, detail);
    for (name, value) in pairs {
        match name.as_str() {
            "prefix" => {
                let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
                if value.len() > 64 || !value.bytes().all(plain) {
                    return Err(refuse("`prefix` must be the first characters of a key"));
                }
                filter.prefix = Some(value);
            }
            "revoked" => {
                filter.revoked = value.parse().map_err(|_| refuse("`revoked` must be true or false"))?;
            }
            "after" => {
                let id = value.parse().map_err(|_| refuse("`after` must be the id of a key"))?;
                filter.after = Some(id);
            }
            "limit" => size = limit(&value)?,
            other => return Err(unknown_parameter(other, "prefix, revoked, after and limit")),
        }
    }
    let (rows, more) = api.app.keys(tenant, &filter, size).await?;
    let prefix = filter.prefix.map(|p| format!("prefix={p}&")).unwrap_or_default();
    let next = rows
        .last()
        .filter(|_| more)
        .map(|row| format!("/v1/keys?{prefix}revoked={}&limit={size}&after={}", filter.revoked, row.id));
    Ok(Json(Page { items: rows.iter().map(key).collect(), next }))
}

/// Make a key. The answer has the key itself, which is not shown again.
#[utoipa::path(
    post, path = "/v1/keys", tag = "keys",
    request_body(content = wire::NewKey, content_type = "application/json"),
    responses(
        (status = 201, description = "The key", body = wire::MadeKey),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden, over-quota: too many keys have limits", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "too-many-keys", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body: also when it would have more than its maker", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn create(
    State(api): State<Api>,
    Who(who): Who,
    body: extract::Json<wire::NewKey>,
) -> Result<Response, Problem> {
    let (body, _) = body.into_parts();
    let wanted = Wanted {
        scopes: scopes(&body.scopes)?,
        role: asked_role(body.role),
        name: body.name,
        expires_at: body.expires_at,
        quotas: changes(body.quotas)?,
    };
    Ok(made(StatusCode::CREATED, api.app.make_key(&who, &wanted).await?))
}

/// One key.
#[utoipa::path(
    get, path = "/v1/keys/{id}", tag = "keys",
    params(("id" = uuid::Uuid, Path, description = "Id of the key")),
    responses(
        (status = 200, description = "The key", body = wire::Key),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "key-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get(
    State(api): State<Api>,
    Caller(tenant): Caller,
    KeyPath(id): KeyPath,
) -> Result<Json<wire::Key>, Problem> {
    Ok(Json(key(&api.app.key(tenant, id).await?)))
}

/// Change a key's name, scopes or expiry, or the limits of what is submitted with it, which hold on every server within 5 s.
/// Its role stays what it is.
#[utoipa::path(
    patch, path = "/v1/keys/{id}", tag = "keys",
    params(("id" = uuid::Uuid, Path, description = "Id of the key")),
    request_body(content = wire::KeyPatch, content_type = "application/json"),
    responses(
        (status = 200, description = "The key", body = wire::Key),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden, over-quota: too many keys have limits", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "key-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "key-not-active: it is revoked", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn patch(
    State(api): State<Api>,
    Who(who): Who,
    KeyPath(id): KeyPath,
    MergePatch(body): MergePatch<wire::KeyPatch>,
) -> Result<Json<wire::Key>, Problem> {
    let change = KeyChange {
        name: body.name,
        scopes: body.scopes.as_deref().map(scopes).transpose()?,
        expires_at: body.expires_at.into_option(),
        quotas: changes(body.quotas)?,
    };
    Ok(Json(key(&api.app.change_key(&who, id, &change).await?)))
}

/// Revoke a key. It stops at once on this server, and within five seconds on every other.
#[utoipa::path(
    delete, path = "/v1/keys/{id}", tag = "keys",
    params(("id" = uuid::Uuid, Path, description = "Id of the key")),
    responses(
        (status = 204, description = "It is revoked"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "key-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body: it has more than the caller", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn revoke(
    State(api): State<Api>,
    Who(who): Who,
    KeyPath(id): KeyPath,
) -> Result<StatusCode, Problem> {
    api.app.revoke_key(&who, id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Make a key with the same name, role and scopes in the place of this one, which goes on working for a while.
#[utoipa::path(
    post, path = "/v1/keys/{id}/rotate", tag = "keys",
    params(("id" = uuid::Uuid, Path, description = "Id of the key")),
    request_body(content = wire::RotateKey, content_type = "application/json", description = "May be left out"),
    responses(
        (status = 201, description = "The new key", body = wire::MadeKey),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "key-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "key-not-active: it is revoked, expired or was rotated before", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn rotate(
    State(api): State<Api>,
    Who(who): Who,
    KeyPath(id): KeyPath,
    OptionalJson(body): OptionalJson<wire::RotateKey>,
) -> Result<Response, Problem> {
    let overlap = body.overlap_s.map(|s| TimeDelta::seconds(s.into()));
    Ok(made(StatusCode::CREATED, api.app.rotate_key(&who, id, overlap, body.expires_at).await?))
}
