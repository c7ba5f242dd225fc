//! Login, members and invitations: `/v1/auth`, `/v1/members`, `/v1/invitations`, and the keys that verify our tokens.

use axum::Json;
use axum::extract::State;
use axum::http::header::CACHE_CONTROL;
use axum::http::{HeaderName, HeaderValue, StatusCode};

use crate::api::access::Who;
use crate::api::extract::{self, Caller, IdPath, Pairs};
use crate::api::key::{asked_role, role};
use crate::api::problem::{Code, Problem};
use crate::api::{Api, PAGE, again, limit, unknown_parameter};
use crate::app::people::Session;
use crate::domain::ids::{TenantId, UserId};
use crate::store::people::{InvitationRow, MemberRow, MembershipRow};
use crate::wire::Page;
use crate::wire::people as wire;
use crate::wire::problem as problem_wire;

/// Nobody on the way may keep what has a secret in it.
const NO_STORE: [(HeaderName, HeaderValue); 1] = [(CACHE_CONTROL, HeaderValue::from_static("no-store"))];

/// An answer with a secret.
type Secret<T> = ([(HeaderName, HeaderValue); 1], Json<T>);

fn membership(row: &MembershipRow) -> wire::Membership {
    wire::Membership { tenant_id: row.tenant.0, tenant: row.name.clone(), role: role(row.role) }
}

fn session(session: &Session) -> Secret<wire::Session> {
    let body = wire::Session {
        access_token: session.access.clone(),
        expires_at: session.expires_at,
        refresh_token: session.refresh.clone(),
        acts_in: membership(&session.tenant),
        tenants: session.tenants.iter().map(membership).collect(),
    };
    (NO_STORE, Json(body))
}

fn member(row: MemberRow) -> wire::Member {
    wire::Member { id: row.id.0, email: row.email, name: row.name, role: role(row.role), since: row.since }
}

fn invitation(row: InvitationRow) -> wire::Invitation {
    wire::Invitation {
        id: row.id,
        email: row.email,
        role: role(row.role),
        invited_by: row.invited_by,
        created_at: row.created_at,
        expires_at: row.expires_at,
        accepted_at: row.accepted_at,
    }
}

/// `after` and `limit` of a list by id.
fn asked(pairs: &[(String, String)]) -> Result<(Option<uuid::Uuid>, u16), Problem> {
    let (mut after, mut size) = (None, PAGE.0);
    for (key, value) in pairs {
        match key.as_str() {
            "after" => {
                let id =
                    value.parse().map_err(|_| Problem::new(Code::InvalidQuery, "`after` must be an id"))?;
                after = Some(id);
            }
            "limit" => size = limit(value)?,
            other => return Err(unknown_parameter(other, "after and limit")),
        }
    }
    Ok((after, size))
}

/// The public keys that verify access tokens.
#[utoipa::path(
    get, path = "/.well-known/jwks.json", tag = "people", security(()),
    responses(
        (status = 200, description = "A JWK set (RFC 7517)", body = wire::Jwks),
        (status = 503, description = "database-unavailable", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn jwks(State(api): State<Api>) -> Result<Json<wire::Jwks>, Problem> {
    let keys = api.app.jwks().await?.into_iter().map(|(kid, x)| wire::Jwk {
        kty: "OKP".to_owned(),
        crv: "Ed25519".to_owned(),
        alg: "EdDSA".to_owned(),
        usage: "sig".to_owned(),
        kid,
        x,
    });
    Ok(Json(wire::Jwks { keys: keys.collect() }))
}

/// Log in. The access token is good for ten minutes, the refresh token for the next pair.
#[utoipa::path(
    post, path = "/v1/auth/login", tag = "people", security(()),
    request_body(content = wire::Login, content_type = "application/json"),
    responses(
        (status = 200, description = "The session", body = wire::Session),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "login-failed", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 429, description = "login-locked", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 503, description = "overloaded", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn login(
    State(api): State<Api>,
    body: extract::Json<wire::Login>,
) -> Result<Secret<wire::Session>, Problem> {
    let (asked, _) = body.into_parts();
    let login = api.app.login(&asked.email, &asked.password, asked.tenant.as_deref());
    Ok(session(&login.await?))
}

/// Exchange a refresh token for a new pair of tokens, in the same tenant or another. One that was used before ends the
/// session: somebody else may have it.
#[utoipa::path(
    post, path = "/v1/auth/refresh", tag = "people", security(()),
    request_body(content = wire::Refresh, content_type = "application/json"),
    responses(
        (status = 200, description = "The session", body = wire::Session),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "session-over", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn refresh(
    State(api): State<Api>,
    body: extract::Json<wire::Refresh>,
) -> Result<Secret<wire::Session>, Problem> {
    let (asked, _) = body.into_parts();
    Ok(session(&api.app.refresh(&asked.refresh_token, asked.tenant_id.map(TenantId)).await?))
}

/// Accept an invitation and log in. The user is made if nobody has the invited address.
#[utoipa::path(
    post, path = "/v1/auth/accept", tag = "people", security(()),
    request_body(content = wire::Accept, content_type = "application/json"),
    responses(
        (status = 200, description = "The session", body = wire::Session),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "login-failed", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "invitation-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 429, description = "login-locked", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 503, description = "overloaded", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn accept(
    State(api): State<Api>,
    body: extract::Json<wire::Accept>,
) -> Result<Secret<wire::Session>, Problem> {
    let (asked, _) = body.into_parts();
    let accepted = api.app.accept(&asked.token, asked.name.as_deref(), &asked.password);
    Ok(session(&Box::pin(accepted).await?))
}

/// Log out: end the session of the access token, or revoke the key that a person made by `POST /v1/auth/key`. Any other key
/// stays.
#[utoipa::path(
    post, path = "/v1/auth/logout", tag = "people",
    responses(
        (status = 204, description = "It has ended; on other servers it works for at most five seconds more"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "no-user: the credential is a key that nobody logged in for", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn logout(State(api): State<Api>, Who(who): Who) -> Result<StatusCode, Problem> {
    api.app.logout(&who).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Change one's own password. All other sessions of the user end.
#[utoipa::path(
    post, path = "/v1/auth/password", tag = "people",
    request_body(content = wire::NewPassword, content_type = "application/json"),
    responses(
        (status = 204, description = "It is changed"),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated, login-failed: the current password is wrong", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "no-user", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 429, description = "login-locked", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 503, description = "overloaded", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn password(
    State(api): State<Api>,
    Who(who): Who,
    body: extract::Json<wire::NewPassword>,
) -> Result<StatusCode, Problem> {
    let (asked, _) = body.into_parts();
    api.app.change_password(&who, &asked.current, &asked.new).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Make an API key for oneself: it may what its person may at the moment of each use, for 90 days, and is refused when the
/// person is no member any more. For machines without a browser.
#[utoipa::path(
    post, path = "/v1/auth/key", tag = "people",
    request_body(content = wire::OwnKey, content_type = "application/json"),
    responses(
        (status = 201, description = "The key", body = crate::wire::key::MadeKey),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "no-user, too-many-keys", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn key(
    State(api): State<Api>,
    Who(who): Who,
    body: extract::Json<wire::OwnKey>,
) -> Result<axum::response::Response, Problem> {
    let (asked, _) = body.into_parts();
    Ok(crate::api::key::made(StatusCode::CREATED, api.app.make_own_key(&who, &asked.name).await?))
}

/// List the members of the tenant.
#[utoipa::path(
    get, path = "/v1/members", tag = "people",
    params(
        ("after" = Option<uuid::Uuid>, Query, description = "After this one"),
        ("limit" = Option<u16>, Query, description = "Items of the page, 1 to 200; default 50"),
    ),
    responses(
        (status = 200, description = "A page of members", body = Page<wire::Member>),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn members(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Pairs(pairs): Pairs,
) -> Result<Json<Page<wire::Member>>, Problem> {
    let (after, size) = asked(&pairs)?;
    let (rows, more) = api.app.members(tenant, after.map(UserId), size).await?;
    let next = rows.last().filter(|_| more).map(|last| again("/v1/members", &pairs, last.id));
    Ok(Json(Page { items: rows.into_iter().map(member).collect(), next }))
}

/// Give a member another role. It holds at once on this server, and within five seconds on every other.
#[utoipa::path(
    patch, path = "/v1/members/{id}", tag = "people",
    params(("id" = uuid::Uuid, Path, description = "Id of the user")),
    request_body(content = wire::MemberPatch, content_type = "application/json"),
    responses(
        (status = 200, description = "The member", body = wire::Member),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "member-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "last-owner", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn change(
    State(api): State<Api>,
    Who(who): Who,
    id: IdPath<UserId>,
    body: extract::Json<wire::MemberPatch>,
) -> Result<Json<wire::Member>, Problem> {
    let (asked, _) = body.into_parts();
    let id = id.or(Code::MemberNotFound)?;
    Ok(Json(member(api.app.change_member(&who, id, Some(asked_role(asked.role))).await?)))
}

/// Remove a member. Its sessions in this tenant end, its other tenants keep it.
#[utoipa::path(
    delete, path = "/v1/members/{id}", tag = "people",
    params(("id" = uuid::Uuid, Path, description = "Id of the user")),
    responses(
        (status = 204, description = "It is no member any more"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "member-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "last-owner", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn remove(
    State(api): State<Api>,
    Who(who): Who,
    id: IdPath<UserId>,
) -> Result<StatusCode, Problem> {
    api.app.change_member(&who, id.or(Code::MemberNotFound)?, None).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// List invitations, newest first.
#[utoipa::path(
    get, path = "/v1/invitations", tag = "people",
    params(
        ("after" = Option<uuid::Uuid>, Query, description = "Older than this one"),
        ("limit" = Option<u16>, Query, description = "Items of the page, 1 to 200; default 50"),
    ),
    responses(
        (status = 200, description = "A page of invitations", body = Page<wire::Invitation>),
        (status = 400, description = "invalid-query", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn invitations(
    State(api): State<Api>,
    Caller(tenant): Caller,
    Pairs(pairs): Pairs,
) -> Result<Json<Page<wire::Invitation>>, Problem> {
    let (after, size) = asked(&pairs)?;
    let (rows, more) = api.app.invitations(tenant, after, size).await?;
    let next = rows.last().filter(|_| more).map(|last| again("/v1/invitations", &pairs, last.id));
    Ok(Json(Page { items: rows.into_iter().map(invitation).collect(), next }))
}

/// Invite somebody. The token in the answer is how they come in; bring it to them.
#[utoipa::path(
    post, path = "/v1/invitations", tag = "people",
    request_body(content = wire::NewInvitation, content_type = "application/json"),
    responses(
        (status = 201, description = "The invitation", body = wire::MadeInvitation),
        (status = 400, description = "malformed-json, broken-body", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 409, description = "too-many-invitations", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 415, description = "unsupported-media-type", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn invite(
    State(api): State<Api>,
    Who(who): Who,
    body: extract::Json<wire::NewInvitation>,
) -> Result<(StatusCode, [(HeaderName, HeaderValue); 1], Json<wire::MadeInvitation>), Problem> {
    let (asked, _) = body.into_parts();
    let (row, token) = api.app.invite(&who, &asked.email, asked_role(asked.role)).await?;
    Ok((StatusCode::CREATED, NO_STORE, Json(wire::MadeInvitation { token, invitation: invitation(row) })))
}

/// Take an invitation back.
#[utoipa::path(
    delete, path = "/v1/invitations/{id}", tag = "people",
    params(("id" = uuid::Uuid, Path, description = "Id of the invitation")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "invitation-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn uninvite(
    State(api): State<Api>,
    Caller(tenant): Caller,
    id: IdPath<uuid::Uuid>,
) -> Result<StatusCode, Problem> {
    api.app.uninvite(tenant, id.or(Code::InvitationNotFound)?).await?;
    Ok(StatusCode::NO_CONTENT)
}
