//! API keys through HTTP: made, shown once, changed, rotated, revoked.

use std::time::Duration;

use reqwest::Method;
use sandbar::app::signals::Signals;
use sandbar::app::{App, Settings};
use sandbar::domain::permission::Role;
use serde_json::{Value, json};

use super::access::insert_key;
use super::{Api, SOON, pointers, problem};
use crate::support::{Answer, eventually, send};

async fn works(api: &Api, secret: &str) -> bool {
    send(api.client.anonymous(Method::GET, "/v1/me").header("x-api-key", secret)).await.status.is_success()
}

fn made(answer: Answer) -> (String, String) {
    let body = answer.expect(201).json();
    (body["secret"].as_str().unwrap().to_owned(), body["key"]["id"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn a_key_is_shown_once_and_says_who_made_it_and_when_it_was_used() {
    let api = Api::start().await;
    let wanted = json!({"name": "ci", "role": "developer", "scopes": ["upload", "submit:echo"]});
    let answer = api.client.post("/v1/keys", &wanted).await;
    assert_eq!(answer.headers["cache-control"], "no-store");
    let (secret, id) = made(answer);
    assert!(secret.starts_with("sbk_") && secret.len() == 47, "{secret}");
    let me = send(api.client.anonymous(Method::GET, "/v1/me").bearer_auth(&secret)).await.expect(200).json();
    assert_eq!((&me["role"], &me["name"], &me["tenant"]), (&json!("developer"), &json!("ci"), &json!("one")));
    assert_eq!(me["may"], json!(["upload", "submit"]));
    let list = api.client.get(&format!("/v1/keys?prefix={}", &secret[..12])).await.expect(200);
    assert!(!list.text().contains(&secret[12..]), "a list shows a key");
    let item = &list.json()["items"][0];
    assert_eq!(
        (&item["id"], &item["state"], &item["prefix"]),
        (&json!(id), &json!("active"), &json!(&secret[..12]))
    );
    eventually(SOON, "the last use", async || {
        let key = api.client.get(&format!("/v1/keys/{id}")).await.expect(200).json();
        key["last_used_at"].is_string().then_some(())
    })
    .await;
    let (stored,): (bool,) =
        sqlx::query_as("SELECT bool_or(strpos(k::text, $1) > 0) FROM sandbar.api_keys k")
            .bind(&secret[12..])
            .fetch_one(&api.admin)
            .await
            .unwrap();
    assert!(!stored, "the key itself is in the database");
}

#[tokio::test]
async fn a_revoked_key_stops_at_once_here_and_within_five_seconds_elsewhere() {
    let api = Api::start().await;
    let (secret, id) = made(api.client.post("/v1/keys", &json!({"name": "x", "role": "viewer"})).await);
    let elsewhere = App::new(api.store.clone(), Signals::new(), Settings::default()).unwrap();
    assert!(works(&api, &secret).await && elsewhere.authenticate(&secret).await.unwrap().is_some());
    let path = format!("/v1/keys/{id}");
    send(api.client.request(Method::DELETE, &path)).await.expect(204);
    assert!(!works(&api, &secret).await);
    eventually(Duration::from_secs(6), "the other server to notice", async || {
        elsewhere.authenticate(&secret).await.unwrap().is_none().then_some(())
    })
    .await;
    assert_eq!(api.client.get(&path).await.expect(200).json()["state"], "revoked");
    assert_eq!(
        problem(&send(api.client.request(Method::PATCH, &path).json(&json!({"name": "y"}))).await, 409),
        "key-not-active"
    );
    let again = api.client.post(&format!("{path}/rotate"), &json!({})).await;
    assert_eq!(problem(&again, 409), "key-not-active");
    let list = api.client.get("/v1/keys").await.expect(200).text();
    assert!(!list.contains(&id), "{list}");
    assert!(api.client.get("/v1/keys?revoked=true").await.expect(200).text().contains(&id));
}

#[tokio::test]
async fn a_rotation_lets_the_old_key_work_for_as_long_as_was_asked() {
    let api = Api::start().await;
    let wanted = json!({"name": "x", "role": "operator", "scopes": ["submit"]});
    let (first, id) = made(api.client.post("/v1/keys", &wanted).await);
    let (second, next) =
        made(api.client.post(&format!("/v1/keys/{id}/rotate"), &json!({"overlap_s": 3600})).await);
    assert!(works(&api, &first).await && works(&api, &second).await);
    let old = api.client.get(&format!("/v1/keys/{id}")).await.expect(200).json();
    assert_eq!((&old["state"], &old["replaced_by"]), (&json!("replaced"), &json!(next)));
    let new = api.client.get(&format!("/v1/keys/{next}")).await.expect(200).json();
    assert_eq!((&new["role"], &new["scopes"], &new["name"]), (&old["role"], &old["scopes"], &old["name"]));
    let twice = api.client.post(&format!("/v1/keys/{id}/rotate"), &json!({})).await;
    assert_eq!(problem(&twice, 409), "key-not-active");
    let (third, _) =
        made(api.client.post(&format!("/v1/keys/{next}/rotate"), &json!({"overlap_s": 0})).await);
    assert!(!works(&api, &second).await && works(&api, &third).await);
    let far = api.client.post(&format!("/v1/keys/{next}/rotate"), &json!({"overlap_s": 9_999_999})).await;
    assert_eq!(
        (problem(&far, 422), pointers(&far)),
        ("invalid-body".to_owned(), vec!["/overlap_s".to_owned()])
    );
}

#[tokio::test]
async fn nobody_gives_away_more_than_they_have() {
    let api = Api::start().await;
    let ask = async |key: &str, method: Method, path: &str, body: Value| {
        send(api.client.anonymous(method, path).header("x-api-key", key).json(&body)).await
    };
    let admin = insert_key(&api, api.tenant, Role::Admin, &[]).await;
    for role in ["owner", "platform"] {
        let answer = ask(&admin, Method::POST, "/v1/keys", json!({"name": "x", "role": role})).await;
        assert_eq!(
            (problem(&answer, 422), pointers(&answer)),
            ("invalid-body".to_owned(), vec!["/role".to_owned()])
        );
    }
    let narrow = insert_key(&api, api.tenant, Role::Admin, &["manage-keys", "submit:echo"]).await;
    for scopes in
        [json!([]), json!(["submit"]), json!(["submit:other"]), json!(["*:echo"]), json!(["read-logs"])]
    {
        let body = json!({"name": "x", "role": "operator", "scopes": scopes});
        let answer = ask(&narrow, Method::POST, "/v1/keys", body).await;
        assert_eq!(
            (problem(&answer, 422), pointers(&answer)),
            ("invalid-body".to_owned(), vec!["/scopes".to_owned()]),
            "{scopes}"
        );
    }
    let body = json!({"name": "x", "role": "operator", "scopes": ["submit:echo"]});
    let (_, id) = made(ask(&narrow, Method::POST, "/v1/keys", body).await);
    let path = format!("/v1/keys/{id}");
    let wider = ask(&narrow, Method::PATCH, &path, json!({"scopes": ["submit"]})).await;
    assert_eq!(pointers(&wider), ["/scopes"]);
    // Nor can it rotate a key that has more: it would learn a secret that may more than it.
    let (_, strong) = made(api.client.post("/v1/keys", &json!({"name": "y", "role": "admin"})).await);
    for (method, path) in
        [(Method::POST, format!("/v1/keys/{strong}/rotate")), (Method::DELETE, format!("/v1/keys/{strong}"))]
    {
        let answer = ask(&narrow, method, &path, json!({})).await;
        assert_eq!(problem(&answer, 422), "invalid-body", "{path}");
    }
}

#[tokio::test]
async fn an_expired_key_and_nonsense_are_refused() {
    let api = Api::start().await;
    let secret = insert_key(&api, api.tenant, Role::Admin, &[]).await;
    assert!(works(&api, &secret).await);
    sqlx::query("UPDATE sandbar.api_keys SET expires_at = now() - interval '1 s' WHERE prefix = left($1, 12) AND name = 'test'")
        .bind(&secret)
        .execute(&api.admin)
        .await
        .unwrap();
    eventually(Duration::from_secs(6), "the expiry", async || (!works(&api, &secret).await).then_some(()))
        .await;
    for (body, pointer) in [
        (json!({"name": "", "role": "viewer"}), "/name"),
        (json!({"name": "x", "role": "root"}), "/role"),
        (json!({"name": "x", "role": "viewer", "scopes": ["submit", "fly"]}), "/scopes/1"),
        (json!({"name": "x", "role": "viewer", "expires_at": "2001-01-01T00:00:00Z"}), "/expires_at"),
    ] {
        let answer = api.client.post("/v1/keys", &body).await;
        assert_eq!(
            (problem(&answer, 422), pointers(&answer)),
            ("invalid-body".to_owned(), vec![pointer.to_owned()])
        );
    }
    for query in ["prefix=%25", "revoked=maybe", "after=1", "order=asc", "limit=0"] {
        assert_eq!(
            problem(&api.client.get(&format!("/v1/keys?{query}")).await, 400),
            "invalid-query",
            "{query}"
        );
    }
    assert_eq!(problem(&api.client.get("/v1/keys/nonsense").await, 404), "key-not-found");
}
