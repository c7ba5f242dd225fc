//! Login, sessions, tokens, invitations, members and tenants, through HTTP.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use reqwest::Method;
use ring::signature::Ed25519KeyPair;
use sandbar::domain::ids::{TenantId, UserId};
use sandbar::domain::permission::Role;
use serde_json::{Value, json};

use super::access::insert_key;
use super::{Api, SOON, pointers, problem};
use crate::support::{Answer, eventually, send};

pub(super) const PASSWORD: &str = "correct horse battery";

/// A user of the first tenant, put there past the API.
pub(super) async fn user(api: &Api, email: &str, role: Role) -> UserId {
    let (id, hash) = (UserId::generate(), sandbar::app::people::hash(PASSWORD).unwrap());
    sqlx::query("INSERT INTO sandbar.users (user_id, email, name, password_hash) VALUES ($1, $2, 'Ada', $3)")
        .bind(id)
        .bind(email)
        .bind(hash)
        .execute(&api.admin)
        .await
        .unwrap();
    join(api, api.tenant, id, role).await;
    id
}

pub(super) async fn join(api: &Api, tenant: TenantId, user: UserId, role: Role) {
    sqlx::query("INSERT INTO sandbar.memberships (tenant_id, user_id, role) VALUES ($1, $2, $3)")
        .bind(tenant)
        .bind(user)
        .bind(role.as_str())
        .execute(&api.admin)
        .await
        .unwrap();
}

pub(super) async fn post(api: &Api, path: &str, body: &Value) -> Answer {
    send(api.client.anonymous(Method::POST, path).json(body)).await
}

pub(super) async fn login(api: &Api, email: &str) -> Value {
    post(api, "/v1/auth/login", &json!({"email": email, "password": PASSWORD})).await.expect(200).json()
}

pub(super) async fn me(api: &Api, token: &str) -> Answer {
    send(api.client.anonymous(Method::GET, "/v1/me").bearer_auth(token)).await
}

pub(super) fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_else(|| panic!("no {field} in {value}"))
}

#[tokio::test]
async fn a_login_gives_tokens_that_work_and_a_wrong_password_nothing_but_its_code() {
    let api = Api::start().await;
    let id = user(&api, "ada@example.org", Role::Developer).await;
    let answer = post(&api, "/v1/auth/login", &json!({"email": "Ada@Example.org", "password": PASSWORD}))
        .await
        .expect(200);
    assert_eq!(answer.headers["cache-control"], "no-store");
    let session = answer.json();
    let who = me(&api, text(&session, "access_token")).await.expect(200).json();
    assert_eq!((&who["kind"], &who["id"], &who["role"]), (&json!("user"), &json!(id), &json!("developer")));
    assert_eq!(session["acts_in"]["tenant"], "one");
    for body in [
        json!({"email": "ada@example.org", "password": "wrong"}),
        json!({"email": "nobody@example.org", "password": PASSWORD}),
        json!({"email": "ada@example.org", "password": PASSWORD, "tenant": "two"}),
        json!({"email": "no address", "password": PASSWORD}),
    ] {
        let refused = post(&api, "/v1/auth/login", &body).await;
        assert_eq!(problem(&refused, 401), "login-failed");
        assert_eq!(
            refused.json()["detail"],
            "address and password do not belong together, or not to a member of this tenant"
        );
    }
    let stored: String =
        sqlx::query_scalar("SELECT password_hash FROM sandbar.users").fetch_one(&api.admin).await.unwrap();
    assert!(stored.starts_with("$argon2id$"), "{stored}");
}

#[tokio::test]
async fn guessing_locks_an_address_whether_or_not_somebody_has_it() {
    let api = Api::start().await;
    user(&api, "ada@example.org", Role::Viewer).await;
    for email in ["ada@example.org", "nobody@example.org"] {
        for _ in 0..5 {
            let refused = post(&api, "/v1/auth/login", &json!({"email": email, "password": "wrong"})).await;
            assert_eq!(problem(&refused, 401), "login-failed");
        }
        // Also with the right password: otherwise the lock would say when it is guessed.
        let locked = post(&api, "/v1/auth/login", &json!({"email": email, "password": PASSWORD})).await;
        assert_eq!(problem(&locked, 429), "login-locked");
        let wait: u64 = locked.headers["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=31).contains(&wait), "{wait}");
    }
    sqlx::query("UPDATE sandbar.login_failures SET locked_until = now()").execute(&api.admin).await.unwrap();
    login(&api, "ada@example.org").await;
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM sandbar.login_failures")
        .fetch_one(&api.admin)
        .await
        .unwrap();
    assert_eq!(left, 1, "a login forgets its failures");
}

#[tokio::test]
async fn a_refresh_token_works_once_and_a_second_time_ends_the_session() {
    let api = Api::start().await;
    let id = user(&api, "ada@example.org", Role::Admin).await;
    let other: TenantId = sqlx::query_scalar("SELECT tenant_id FROM sandbar.tenants WHERE name = 'two'")
        .fetch_one(&api.admin)
        .await
        .unwrap();
    let first = login(&api, "ada@example.org").await;
    let refresh = async |token: &str, tenant: Option<TenantId>| {
        post(&api, "/v1/auth/refresh", &json!({"refresh_token": token, "tenant_id": tenant})).await
    };
    let second = refresh(text(&first, "refresh_token"), None).await.expect(200).json();
    me(&api, text(&second, "access_token")).await.expect(200);
    let stranger = refresh(text(&second, "refresh_token"), Some(other)).await;
    assert_eq!(problem(&stranger, 401), "session-over");
    join(&api, other, id, Role::Viewer).await;
    let there = refresh(text(&second, "refresh_token"), Some(other)).await.expect(200).json();
    assert_eq!((&there["acts_in"]["tenant"], &there["tenants"][0]["tenant"]), (&json!("two"), &json!("one")));
    let who = me(&api, text(&there, "access_token")).await.expect(200).json();
    assert_eq!((&who["tenant"], &who["role"]), (&json!("two"), &json!("viewer")));
    // Somebody has a copy of the second one.
    assert_eq!(problem(&refresh(text(&second, "refresh_token"), None).await, 401), "session-over");
    assert_eq!(
        problem(&refresh(text(&there, "refresh_token"), None).await, 401),
        "session-over",
        "the thief or the owner"
    );
    assert_eq!(problem(&me(&api, text(&there, "access_token")).await, 401), "unauthenticated");
    assert_eq!(problem(&refresh("sbr_nonsense", None).await, 401), "session-over");
}

#[tokio::test]
async fn logout_and_a_new_password_end_sessions_at_once() {
    let api = Api::start().await;
    user(&api, "ada@example.org", Role::Viewer).await;
    let (one, two, three) = (
        login(&api, "ada@example.org").await,
        login(&api, "ada@example.org").await,
        login(&api, "ada@example.org").await,
    );
    let ask = async |session: &Value, path: &str, body: Value| {
        send(api.client.anonymous(Method::POST, path).bearer_auth(text(session, "access_token")).json(&body))
            .await
    };
    ask(&one, "/v1/auth/logout", json!({})).await.expect(204);
    assert_eq!(problem(&me(&api, text(&one, "access_token")).await, 401), "unauthenticated");
    let wrong = ask(&two, "/v1/auth/password", json!({"current": "wrong", "new": "another long one"})).await;
    assert_eq!(problem(&wrong, 401), "login-failed");
    let short = ask(&two, "/v1/auth/password", json!({"current": PASSWORD, "new": "short"})).await;
    assert_eq!(
        (problem(&short, 422), pointers(&short)),
        ("invalid-body".to_owned(), vec!["/new".to_owned()])
    );
    ask(&two, "/v1/auth/password", json!({"current": PASSWORD, "new": "another long one"})).await.expect(204);
    me(&api, text(&two, "access_token")).await.expect(200);
    assert_eq!(problem(&me(&api, text(&three, "access_token")).await, 401), "unauthenticated");
    let old = post(&api, "/v1/auth/login", &json!({"email": "ada@example.org", "password": PASSWORD})).await;
    assert_eq!(problem(&old, 401), "login-failed");
    let key =
        api.client.post("/v1/auth/password", &json!({"current": "x", "new": "a long enough one"})).await;
    assert_eq!(problem(&key, 409), "no-user");
    // A key that somebody made by logging in ends with their logout; one of a program does not.
    let own = ask(&two, "/v1/auth/key", json!({"name": "laptop"})).await.expect(201).json();
    let out = api.client.anonymous(Method::POST, "/v1/auth/logout").header("x-api-key", text(&own, "secret"));
    send(out).await.expect(204);
    let after = api.client.anonymous(Method::GET, "/v1/me").header("x-api-key", text(&own, "secret"));
    assert_eq!(problem(&send(after).await, 401), "unauthenticated");
    me(&api, text(&two, "access_token")).await.expect(200);
    assert_eq!(problem(&api.client.post("/v1/auth/logout", &json!({})).await, 409), "no-user");
    api.client.get("/v1/me").await.expect(200);
}

#[tokio::test]
async fn tokens_that_are_not_ours_are_refused_each_with_its_code() {
    let api = Api::start().await;
    let id = user(&api, "ada@example.org", Role::Viewer).await;
    let session = login(&api, "ada@example.org").await;
    let good = text(&session, "access_token");
    let jwks = send(api.client.anonymous(Method::GET, "/.well-known/jwks.json")).await.expect(200).json();
    let parts: Vec<Value> = good
        .split('.')
        .take(2)
        .map(|p| serde_json::from_slice(&URL_SAFE_NO_PAD.decode(p).unwrap()).unwrap())
        .collect();
    assert_eq!((&parts[0]["kid"], &parts[0]["alg"]), (&jwks["keys"][0]["kid"], &json!("EdDSA")));
    let (kid, seed): (String, Vec<u8>) =
        sqlx::query_as("SELECT kid, seed FROM sandbar.issuer_keys").fetch_one(&api.admin).await.unwrap();
    let pair = Ed25519KeyPair::from_seed_unchecked(&seed).unwrap();
    let forge = |header: Value, change: Value| {
        let mut claims = parts[1].clone();
        for (name, value) in change.as_object().unwrap() {
            claims[name] = value.clone();
        }
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", encode(&header), encode(&claims));
        let signature = URL_SAFE_NO_PAD.encode(pair.sign(signed.as_bytes()).as_ref());
        format!("{signed}.{signature}")
    };
    let header = json!({"alg": "EdDSA", "kid": kid});
    let now = chrono::Utc::now().timestamp();
    assert_eq!(parts[1]["sub"], json!(id));
    me(&api, &forge(header.clone(), json!({}))).await.expect(200);
    for (token, code) in [
        (forge(header.clone(), json!({"exp": now - 60})), "token-expired"),
        (forge(header.clone(), json!({"nbf": now + 60})), "token-not-yet-valid"),
        (forge(header.clone(), json!({"aud": "elsewhere"})), "token-wrong-audience"),
        (forge(header.clone(), json!({"iss": "elsewhere"})), "token-wrong-audience"),
        (forge(json!({"alg": "EdDSA", "kid": "other"}), json!({})), "token-unknown-key"),
        (forge(json!({"alg": "EdDSA"}), json!({})), "token-unknown-key"),
        (forge(json!({"alg": "none", "kid": kid}), json!({})), "token-wrong-algorithm"),
        (forge(json!({"alg": "HS256", "kid": kid}), json!({})), "token-wrong-algorithm"),
        (forge(json!({"alg": "ES256", "kid": kid}), json!({})), "token-wrong-algorithm"),
        (format!("{}x", &good[..good.len() - 2]), "token-invalid"),
    ] {
        assert_eq!(problem(&me(&api, &token).await, 401), code, "{token}");
    }
    // A session that never was.
    let stranger = forge(header, json!({"sid": uuid::Uuid::now_v7()}));
    assert_eq!(problem(&me(&api, &stranger).await, 401), "unauthenticated");
}

#[tokio::test]
async fn an_invitation_makes_a_member_and_roles_hold_at_once() {
    let api = Api::start().await;
    let admin = insert_key(&api, api.tenant, Role::Admin, &[]).await;
    let ask = async |key: &str, method: Method, path: &str, body: Value| {
        send(api.client.anonymous(method, path).header("x-api-key", key).json(&body)).await
    };
    let owner =
        ask(&admin, Method::POST, "/v1/invitations", json!({"email": "o@example.org", "role": "owner"}))
            .await;
    assert_eq!(problem(&owner, 403), "forbidden", "an admin makes no owner");
    let made =
        ask(&admin, Method::POST, "/v1/invitations", json!({"email": "Bob@example.org", "role": "operator"}))
            .await;
    let made = made.expect(201).json();
    let accept = async |body: Value| post(&api, "/v1/auth/accept", &body).await;
    let token = text(&made, "token");
    let nameless = accept(json!({"token": token, "password": PASSWORD})).await;
    assert_eq!(
        (problem(&nameless, 422), pointers(&nameless)),
        ("invalid-body".to_owned(), vec!["/name".to_owned()])
    );
    let session =
        accept(json!({"token": token, "password": PASSWORD, "name": "Bob"})).await.expect(200).json();
    assert_eq!(session["acts_in"]["role"], "operator");
    let again = accept(json!({"token": token, "password": PASSWORD, "name": "Bob"})).await;
    assert_eq!(problem(&again, 404), "invitation-not-found");
    let access = text(&session, "access_token");
    let bob = me(&api, access).await.expect(200).json()["id"].as_str().unwrap().to_owned();
    let members = api.client.get("/v1/members").await.expect(200).json();
    assert_eq!(
        (&members["items"][0]["email"], &members["items"][0]["id"]),
        (&json!("bob@example.org"), &json!(bob))
    );
    // A key of his own follows his role.
    let own = send(
        api.client
            .anonymous(Method::POST, "/v1/auth/key")
            .bearer_auth(access)
            .json(&json!({"name": "laptop"})),
    )
    .await;
    let own = text(&own.expect(201).json(), "secret").to_owned();
    let path = format!("/v1/members/{bob}");
    ask(&admin, Method::PATCH, &path, json!({"role": "viewer"})).await.expect(200);
    assert_eq!(me(&api, access).await.expect(200).json()["role"], "viewer");
    eventually(Duration::from_secs(6), "the key to follow", async || {
        (me(&api, &own).await.json()["role"] == "viewer").then_some(())
    })
    .await;
    ask(&admin, Method::DELETE, &path, json!({})).await.expect(204);
    assert_eq!(problem(&me(&api, access).await, 401), "unauthenticated");
    eventually(Duration::from_secs(6), "the key to be refused", async || {
        (me(&api, &own).await.status.as_u16() == 401).then_some(())
    })
    .await;
    assert_eq!(problem(&ask(&admin, Method::DELETE, &path, json!({})).await, 404), "member-not-found");
    // The last owner stays, and an admin does not touch owners.
    let ada = user(&api, "ada@example.org", Role::Owner).await;
    let path = format!("/v1/members/{ada}");
    assert_eq!(problem(&ask(&admin, Method::DELETE, &path, json!({})).await, 403), "forbidden");
    let last = send(api.client.request(Method::PATCH, &path).json(&json!({"role": "admin"}))).await;
    assert_eq!(problem(&last, 409), "last-owner");
    // One who is here already joins with the password that is known.
    let made = api
        .client
        .post("/v1/invitations", &json!({"email": "bob@example.org", "role": "viewer"}))
        .await
        .expect(201);
    let token = made.json()["token"].as_str().unwrap().to_owned();
    assert_eq!(
        problem(&accept(json!({"token": token, "password": "a wrong password"})).await, 401),
        "login-failed"
    );
    accept(json!({"token": token, "password": PASSWORD})).await.expect(200);
}

#[tokio::test]
async fn a_suspended_tenant_starts_nothing_new_and_comes_back() {
    let api = Api::start().await;
    let made = api
        .client
        .post("/v1/tenants", &json!({"name": "acme", "owner": "eve@example.org"}))
        .await
        .expect(201)
        .json();
    let id = made["tenant"]["id"].as_str().unwrap().to_owned();
    let token = text(&made, "invitation_token");
    let session =
        post(&api, "/v1/auth/accept", &json!({"token": token, "password": PASSWORD, "name": "Eve"})).await;
    let session = session.expect(200).json();
    assert_eq!(
        (&session["acts_in"]["tenant"], &session["acts_in"]["role"]),
        (&json!("acme"), &json!("owner"))
    );
    let taken = api.client.post("/v1/tenants", &json!({"name": "acme"})).await;
    assert_eq!(problem(&taken, 409), "tenant-name-taken");
    let key = insert_key(&api, id.parse().unwrap(), Role::Owner, &[]).await;
    let ask = async |method: Method, path: &str, body: Value| {
        send(api.client.anonymous(method, path).header("x-api-key", &key).json(&body)).await
    };
    let unknown = ask(Method::POST, "/v1/tasks/none/invocations", json!({})).await;
    assert_eq!(problem(&unknown, 404), "task-not-found");
    let path = format!("/v1/tenants/{id}");
    let patch = async |state: &str| {
        let request = api.client.request(Method::PATCH, &path).json(&json!({"state": state, "cancel": true}));
        send(request).await.expect(200).json()
    };
    assert_eq!(patch("suspended").await["state"], "suspended");
    let refused = ask(Method::POST, "/v1/tasks/none/invocations", json!({})).await;
    assert_eq!(problem(&refused, 403), "tenant-suspended");
    ask(Method::GET, "/v1/tasks", json!({})).await.expect(200);
    sqlx::query("INSERT INTO sandbar.ready (tenant_id, rank, invocation_id, attempt, spent) VALUES ($1, now(), gen_random_uuid(), 1, 0)")
        .bind(id.parse::<uuid::Uuid>().unwrap())
        .execute(&api.admin)
        .await
        .unwrap();
    let turn = "SELECT count(*) FROM sandbar.ready_tenants(10)";
    let count = async || sqlx::query_scalar::<_, i64>(turn).fetch_one(&api.admin).await.unwrap();
    assert_eq!(count().await, 0, "a suspended tenant has no turn");
    patch("active").await;
    assert_eq!(count().await, 1);
    let own = format!("/v1/tenants/{}", api.tenant);
    let own = send(api.client.request(Method::DELETE, &own)).await;
    assert_eq!(problem(&own, 409), "own-tenant");
}

#[tokio::test]
async fn a_worker_that_remembers_a_suspended_tenant_gets_nothing_of_it_until_it_is_active() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    api.client.enqueue("echo", &json!({})).await.expect(202);
    api.set_state("suspended").await;
    assert!(api.try_claim(me).await.is_empty());
    api.set_state("active").await;
    api.claim(me).await;
}

#[tokio::test]
async fn a_deleted_tenant_goes_with_everything_and_no_other_loses_a_row() {
    let api = Api::start().await;
    api.echo().await;
    api.client.enqueue("echo", &json!({"input": 1})).await.expect(202);
    let other: TenantId = sqlx::query_scalar("SELECT tenant_id FROM sandbar.tenants WHERE name = 'two'")
        .fetch_one(&api.admin)
        .await
        .unwrap();
    let key = insert_key(&api, other, Role::Owner, &[]).await;
    for n in 0..3 {
        let body = json!({"name": format!("k{n}"), "role": "viewer"});
        send(api.client.anonymous(Method::POST, "/v1/keys").header("x-api-key", &key).json(&body))
            .await
            .expect(201);
    }
    let path = format!("/v1/tenants/{other}");
    let far = send(api.client.request(Method::DELETE, &format!("{path}?grace_s=99999999"))).await;
    assert_eq!(problem(&far, 422), "invalid-body");
    let deleting =
        send(api.client.request(Method::DELETE, &format!("{path}?grace_s=3600"))).await.expect(202).json();
    assert_eq!(deleting["state"], "deleting");
    assert_eq!(api.worker.erase_tenant(1_000).await.unwrap(), 0, "not before its time");
    send(api.client.request(Method::PATCH, &path).json(&json!({"state": "active"}))).await.expect(200);
    send(api.client.request(Method::DELETE, &format!("{path}?grace_s=0"))).await.expect(202);
    let late = send(api.client.request(Method::PATCH, &path).json(&json!({"state": "active"}))).await;
    assert_eq!(problem(&late, 404), "tenant-not-found");
    eventually(SOON, "the end of the tenant", async || {
        api.worker.erase_tenant(1).await.unwrap();
        let left: i64 = sqlx::query_scalar("SELECT count(*) FROM sandbar.tenants WHERE tenant_id = $1")
            .bind(other)
            .fetch_one(&api.admin)
            .await
            .unwrap();
        (left == 0).then_some(())
    })
    .await;
    let refused = send(api.client.anonymous(Method::GET, "/v1/me").header("x-api-key", &key)).await;
    assert!(matches!(refused.status.as_u16(), 401 | 200), "at most five seconds");
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT c.relname::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'tenant_id'
         WHERE c.relnamespace = 'sandbar'::regnamespace AND c.relkind IN ('r', 'p')",
    )
    .fetch_all(&api.admin)
    .await
    .unwrap();
    for table in tables {
        let left: i64 =
            sqlx::query_scalar(&format!("SELECT count(*) FROM sandbar.{table} WHERE tenant_id = $1"))
                .bind(other)
                .fetch_one(&api.admin)
                .await
                .unwrap();
        assert_eq!(left, 0, "{table}");
    }
    api.client.get("/v1/tasks/echo").await.expect(200);
    let mine = api.client.get("/v1/invocations").await.expect(200).json();
    assert_eq!(mine["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn what_runs_in_a_suspended_tenant_goes_on_or_is_cancelled_as_was_asked() {
    let mut api = Api::start().await;
    api.tenant = sqlx::query_scalar("SELECT tenant_id FROM sandbar.tenants WHERE name = 'two'")
        .fetch_one(&api.admin)
        .await
        .unwrap();
    api.echo().await;
    let submitted = api.as_other(Method::POST, "/v1/tasks/echo/invocations").json(&json!({"input": 1}));
    let id = text(&send(submitted).await.expect(202).json(), "id").to_owned();
    let me = api.register().await;
    let claimed = api.claim(me).await;
    for (cancel, cancelling) in [(false, 0), (true, 1)] {
        let body = json!({"state": "suspended", "cancel": cancel});
        let request = api.client.request(Method::PATCH, &format!("/v1/tenants/{}", api.tenant));
        send(request.json(&body)).await.expect(200);
        let asked: i64 =
            sqlx::query_scalar("SELECT count(*) FROM sandbar.cancels WHERE invocation_id::text = $1")
                .bind(&id)
                .fetch_one(&api.admin)
                .await
                .unwrap();
        assert_eq!(asked, cancelling, "cancel: {cancel}");
    }
    // Whatever it comes to, its end has somewhere to go, and its people can read it.
    api.ack(me, super::success(claimed)).await;
    let path = format!("/v1/invocations/{id}/result");
    assert_eq!(send(api.as_other(Method::GET, &path)).await.expect(200).json(), 1);
}
