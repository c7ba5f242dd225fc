//! A lost password: who may make a token for whom, and what it opens.

use std::time::Duration;

use reqwest::Method;
use sandbar::domain::ids::TenantId;
use sandbar::domain::permission::Role;
use serde_json::{Value, json};

use super::access::insert_key;
use super::people::{PASSWORD, join, login, me, post, text, user};
use super::{Api, pointers, problem};
use crate::support::{Answer, eventually, send};

const NEW: &str = "a new and long password";

async fn tenant(api: &Api, name: &str) -> TenantId {
    sqlx::query_scalar("SELECT tenant_id FROM sandbar.tenants WHERE name = $1")
        .bind(name)
        .fetch_one(&api.admin)
        .await
        .unwrap()
}

async fn ask(api: &Api, key: &str, email: &str) -> Answer {
    let request = api.client.anonymous(Method::POST, "/v1/password-resets");
    send(request.header("x-api-key", key).json(&json!({ "email": email }))).await
}

async fn made(api: &Api, email: &str) -> String {
    let answer = api.client.post("/v1/password-resets", &json!({ "email": email })).await.expect(201);
    assert_eq!(answer.headers["cache-control"], "no-store");
    text(&answer.json(), "token").to_owned()
}

async fn reset(api: &Api, token: &str, password: &str) -> Answer {
    post(api, "/v1/auth/reset", &json!({"token": token, "password": password})).await
}

async fn try_login(api: &Api, password: &str) -> Answer {
    post(api, "/v1/auth/login", &json!({"email": "ada@example.org", "password": password})).await
}

#[tokio::test]
async fn a_token_sets_a_password_once_ends_every_session_and_own_key_and_is_kept_only_as_a_hash() {
    let api = Api::start().await;
    user(&api, "ada@example.org", Role::Developer).await;
    let session = login(&api, "ada@example.org").await;
    let access = text(&session, "access_token");
    let own = api.client.anonymous(Method::POST, "/v1/auth/key").bearer_auth(access);
    let own = send(own.json(&json!({"name": "laptop"}))).await.expect(201).json();
    let own = text(&own, "secret").to_owned();
    me(&api, &own).await.expect(200);

    let token = made(&api, "Ada@Example.org").await;
    assert!(token.starts_with("sbp_"));
    let short = reset(&api, &token, "short").await;
    assert_eq!(
        (problem(&short, 422), pointers(&short)),
        ("invalid-body".to_owned(), vec!["/password".to_owned()])
    );
    try_login(&api, PASSWORD).await.expect(200);
    let rows: Vec<String> = sqlx::query_scalar("SELECT r::text FROM sandbar.password_resets r")
        .fetch_all(&api.admin)
        .await
        .unwrap();
    assert!(rows.len() == 1 && !rows[0].contains(&token), "{rows:?}");

    reset(&api, &token, NEW).await.expect(204);
    assert_eq!(problem(&reset(&api, &token, NEW).await, 404), "reset-not-found", "once");
    assert_eq!(problem(&me(&api, access).await, 401), "unauthenticated");
    let refreshed =
        post(&api, "/v1/auth/refresh", &json!({"refresh_token": text(&session, "refresh_token")})).await;
    assert_eq!(problem(&refreshed, 401), "session-over");
    eventually(Duration::from_secs(6), "the own key to be refused", async || {
        (me(&api, &own).await.status.as_u16() == 401).then_some(())
    })
    .await;
    assert_eq!(problem(&try_login(&api, PASSWORD).await, 401), "login-failed");
    try_login(&api, NEW).await.expect(200);

    let audit = api.client.get("/v1/audit").await.expect(200).text();
    assert!(audit.contains("POST /v1/password-resets") && audit.contains("POST /v1/auth/reset"), "{audit}");
    assert!(!audit.contains(&token) && !audit.contains(NEW));
}

#[tokio::test]
async fn a_token_ends_with_the_next_one_and_after_its_hour_and_is_no_way_around_a_lock() {
    let api = Api::start().await;
    user(&api, "ada@example.org", Role::Viewer).await;
    let first = made(&api, "ada@example.org").await;
    let second = made(&api, "ada@example.org").await;
    assert_eq!(problem(&reset(&api, &first, NEW).await, 404), "reset-not-found", "replaced");
    let life: f64 = sqlx::query_scalar(
        "SELECT EXTRACT(EPOCH FROM expires_at - clock_timestamp())::float8 FROM sandbar.password_resets",
    )
    .fetch_one(&api.admin)
    .await
    .unwrap();
    assert!((3_500.0..=3_600.0).contains(&life), "{life}");
    sqlx::query("UPDATE sandbar.password_resets SET expires_at = now()").execute(&api.admin).await.unwrap();
    assert_eq!(problem(&reset(&api, &second, NEW).await, 404), "reset-not-found", "over");
    assert_eq!(problem(&reset(&api, "sbp_nonsense", NEW).await, 404), "reset-not-found");
    assert!(api.worker.people_tidy(10).await.unwrap() >= 1);

    for _ in 0..5 {
        assert_eq!(problem(&try_login(&api, "wrong").await, 401), "login-failed");
    }
    let token = made(&api, "ada@example.org").await;
    reset(&api, &token, NEW).await.expect(204);
    assert_eq!(problem(&try_login(&api, NEW).await, 429), "login-locked", "the lock of the address stays");
    sqlx::query("UPDATE sandbar.login_failures SET locked_until = now()").execute(&api.admin).await.unwrap();
    try_login(&api, NEW).await.expect(200);
}

#[tokio::test]
async fn the_people_of_a_tenant_make_tokens_for_members_of_theirs_alone_and_for_nobody_above_them() {
    let api = Api::start().await;
    let two = tenant(&api, "two").await;
    let ada = user(&api, "ada@example.org", Role::Developer).await;
    user(&api, "boss@example.org", Role::Owner).await;
    let admin = insert_key(&api, api.tenant, Role::Admin, &[]).await;
    let theirs = insert_key(&api, two, Role::Owner, &[]).await;

    // Of another tenant, or of nobody: the same answer.
    for email in ["ada@example.org", "nobody@example.org"] {
        assert_eq!(problem(&ask(&api, &theirs, email).await, 404), "member-not-found");
    }
    assert_eq!(problem(&ask(&api, &admin, "nobody@example.org").await, 404), "member-not-found");
    assert_eq!(problem(&ask(&api, &admin, "boss@example.org").await, 403), "forbidden");
    let owner = insert_key(&api, api.tenant, Role::Owner, &[]).await;
    ask(&api, &owner, "boss@example.org").await.expect(201);
    let developer = insert_key(&api, api.tenant, Role::Developer, &[]).await;
    assert_eq!(problem(&ask(&api, &developer, "ada@example.org").await, 403), "forbidden");

    let early: Value = ask(&api, &admin, "ada@example.org").await.expect(201).json();
    // She joins another tenant: the token that is out is none any more, and no other is made, by either side.
    join(&api, two, ada, Role::Viewer).await;
    assert_eq!(problem(&reset(&api, text(&early, "token"), NEW).await, 404), "reset-not-found");
    for key in [&admin, &owner, &theirs] {
        assert_eq!(problem(&ask(&api, key, "ada@example.org").await, 409), "member-elsewhere");
    }
    try_login(&api, PASSWORD).await.expect(200);
    // A key of the platform that is narrowed to people is no platform here; the platform itself may.
    let narrow = insert_key(&api, api.tenant, Role::Platform, &["manage-people"]).await;
    assert_eq!(problem(&ask(&api, &narrow, "ada@example.org").await, 409), "member-elsewhere");
    reset(&api, &made(&api, "ada@example.org").await, NEW).await.expect(204);
    try_login(&api, NEW).await.expect(200);
}
