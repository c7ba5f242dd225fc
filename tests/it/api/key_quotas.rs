//! Limits of keys: what a tenant's admins let be submitted with one, below what the tenant may.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::Method;
use sandbar::app::invoke::Request;
use sandbar::app::{App, Settings};
use sandbar::domain::ids::KeyId;
use sandbar::domain::names::TaskName;
use serde_json::{Value, json};

use super::{Api, problem};
use crate::support::{self, Answer, send};

/// A key with limits: its secret, and its id.
async fn key(api: &Api, quotas: Value) -> (String, String) {
    let wanted = json!({"name": "ci", "role": "operator", "quotas": quotas});
    let made = api.client.post("/v1/keys", &wanted).await.expect(201).json();
    (made["secret"].as_str().unwrap().to_owned(), made["key"]["id"].as_str().unwrap().to_owned())
}

async fn submit(api: &Api, secret: &str) -> Answer {
    let request = api.client.anonymous(Method::POST, "/v1/tasks/echo/invocations");
    send(request.header("x-api-key", secret).json(&json!({}))).await
}

async fn change(api: &Api, id: &str, quotas: Value) -> Answer {
    let request = api.client.request(Method::PATCH, &format!("/v1/keys/{id}"));
    send(request.json(&json!({ "quotas": quotas }))).await
}

async fn shown(api: &Api, id: &str) -> Value {
    api.client.get(&format!("/v1/keys/{id}")).await.expect(200).json()["quotas"].clone()
}

#[tokio::test]
async fn a_key_is_held_to_its_limits_however_it_submits_and_other_keys_are_not() {
    let api = Api::start().await;
    api.echo().await;
    let dead = api.dead(Some("no customer")).await;
    let (secret, id) = key(&api, json!({"invocations_per_day": 4})).await;
    let (free, _) = key(&api, json!({})).await;
    let listed = api.client.get("/v1/keys").await.expect(200).json();
    let item = listed["items"].as_array().unwrap().iter().find(|key| key["id"] == *id).unwrap();
    assert_eq!(item["quotas"], json!([{"name": "invocations_per_day", "limit": 4, "used": 0}]));

    submit(&api, &secret).await.expect(202);
    // A batch takes a token for each; a retry takes one; what is repeated or refused for another reason takes none.
    let batch = json!({"invocations": [{"task": "echo"}, {"task": "none-such"}, {"task": "echo"}]});
    let request = api.client.anonymous(Method::POST, "/v1/invocations:batch").header("x-api-key", &secret);
    let outcomes = send(request.json(&batch)).await.expect(200).json();
    let statuses: Vec<&Value> =
        outcomes["outcomes"].as_array().unwrap().iter().map(|o| &o["status"]).collect();
    assert_eq!(statuses, [&json!(202), &json!(404), &json!(202)]);
    let again = |idempotency: &'static str| {
        let request = api.client.anonymous(Method::POST, &format!("/v1/invocations/{dead}/retry"));
        send(request.header("x-api-key", &secret).header("idempotency-key", idempotency).json(&json!({})))
    };
    again("once").await.expect(202);

    let refused = submit(&api, &secret).await;
    assert_eq!(problem(&refused, 429), "quota-exceeded");
    let told = refused.json();
    assert_eq!(
        (&told["quota"]["name"], &told["quota"]["limit"], &told["quota"]["current"]),
        (&json!("invocations_per_day"), &json!(4), &json!(4))
    );
    assert!(told["quota"]["resets_at"].as_str().unwrap().contains("T00:00:00"), "{told}");
    assert!(told["detail"].as_str().unwrap().contains("of this key"), "{told}");
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(problem(&again("twice").await, 429), "quota-exceeded");
    let standing = shown(&api, &id).await;
    assert_eq!((&standing[0]["limit"], &standing[0]["used"]), (&json!(4), &json!(4)));
    assert!(standing[0]["resets_at"].is_string(), "{standing}");

    // Nobody else is held to it, and nothing is counted of whoever has no limits.
    submit(&api, &free).await.expect(202);
    api.client.enqueue("echo", &json!({})).await.expect(202);
    let counted: i64 =
        sqlx::query_scalar("SELECT count(*) FROM sandbar.quota_windows").fetch_one(&api.admin).await.unwrap();
    assert_eq!(counted, 1);

    // More is let through as soon as more is allowed, and none is said when none is left.
    change(&api, &id, json!({"invocations_per_day": 5})).await.expect(200);
    submit(&api, &secret).await.expect(202);
    assert_eq!(problem(&submit(&api, &secret).await, 429), "quota-exceeded");
    let bare = change(&api, &id, json!({"invocations_per_day": null})).await.expect(200).json();
    assert_eq!(bare["quotas"], json!([]));
    submit(&api, &secret).await.expect(202);
}

#[tokio::test]
async fn a_rotated_key_shares_limits_and_count_with_the_one_that_it_replaces() {
    let api = Api::start().await;
    api.echo().await;
    let (first, id) = key(&api, json!({"invocations_per_day": 3})).await;
    submit(&api, &first).await.expect(202);
    let rotated = api.client.post(&format!("/v1/keys/{id}/rotate"), &json!({"overlap_s": 3600})).await;
    let rotated = rotated.expect(201).json();
    let (second, next) = (rotated["secret"].as_str().unwrap(), rotated["key"]["id"].as_str().unwrap());
    assert_eq!(rotated["key"]["quotas"][0]["limit"], 3);
    submit(&api, second).await.expect(202);
    submit(&api, &first).await.expect(202);
    for secret in [&first, second] {
        assert_eq!(problem(&submit(&api, secret).await, 429), "quota-exceeded");
    }
    // A change of one is a change of both.
    change(&api, next, json!({"invocations_per_day": 4})).await.expect(200);
    assert_eq!(shown(&api, &id).await[0]["limit"], 4);
    submit(&api, &first).await.expect(202);
    assert_eq!(problem(&submit(&api, second).await, 429), "quota-exceeded");
}

#[tokio::test]
async fn a_limit_above_the_tenants_changes_nothing_and_only_two_quotas_can_be_given_to_keys() {
    let api = Api::start().await;
    api.echo().await;
    let (secret, id) = key(&api, json!({"invocations_per_day": 1_000})).await;
    let tenants = api.client.request(Method::PATCH, "/v1/tenants/one/quotas");
    send(tenants.json(&json!({"quotas": {"invocations_per_day": 1}}))).await.expect(200);
    submit(&api, &secret).await.expect(202);
    let refused = submit(&api, &secret).await;
    assert_eq!(problem(&refused, 429), "quota-exceeded");
    assert_eq!(refused.json()["quota"]["limit"], 1);
    assert!(refused.json()["detail"].as_str().unwrap().contains("of this tenant"));

    for (quotas, pointer) in [
        (json!({"modules": 5}), "/quotas/modules"),
        (json!({"queue_depth": 5}), "/quotas/queue_depth"),
        (json!({"invocations_per_s": 0}), "/quotas/invocations_per_s"),
        (json!({"many": 1}), "/quotas/many"),
    ] {
        let refused = change(&api, &id, quotas.clone()).await;
        assert_eq!(problem(&refused, 422), "invalid-body", "{quotas}");
        assert_eq!(refused.json()["errors"][0]["pointer"], pointer);
        let wanted = json!({"name": "x", "role": "viewer", "quotas": quotas});
        assert_eq!(problem(&api.client.post("/v1/keys", &wanted).await, 422), "invalid-body");
    }
    // Another tenant's admin neither sees nor changes it.
    let path = format!("/v1/keys/{id}");
    let theirs = api.as_other(Method::PATCH, &path).json(&json!({"quotas": {"invocations_per_day": null}}));
    assert_eq!(problem(&send(theirs).await, 404), "key-not-found");
    assert_eq!(shown(&api, &id).await[0]["limit"], 1_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_servers_together_never_pass_a_keys_limit_and_see_a_change_within_five_seconds() {
    let api = Api::start().await;
    api.echo().await;
    let (_, id) = key(&api, json!({"invocations_per_day": 100})).await;
    let by = Some(KeyId(id.parse().unwrap()));
    let other = App::new(api.store.clone(), Arc::clone(&api.signals), Settings::default()).unwrap();
    let task = TaskName::try_from("echo".to_owned()).unwrap();
    let rush = async |apps: &[&App], n: usize| {
        let one = |at: usize| {
            apps[at % apps.len()].invoke(api.tenant, &task, Request { by, ..Request::default() }, None)
        };
        join_all((0..n).map(one)).await.into_iter().filter(Result::is_ok).count()
    };
    let accepted = rush(&[&api.app, &other], 160).await;
    assert!((97..=100).contains(&accepted), "{accepted}");
    change(&api, &id, json!({"invocations_per_day": "unlimited"})).await.expect(200);
    support::eventually(Duration::from_secs(5), "the change on the other server", async || {
        (rush(&[&other], 5).await == 5).then_some(())
    })
    .await;
    change(&api, &id, json!({"invocations_per_day": 1})).await.expect(200);
    support::eventually(Duration::from_secs(5), "the limit on the other server", async || {
        (rush(&[&other], 1).await == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn keys_with_limits_are_counted_and_a_line_that_is_revoked_gives_its_place_back() {
    let api = Api::start().await;
    api.echo().await;
    let (secret, id) = key(&api, json!({"invocations_per_day": 5})).await;
    submit(&api, &secret).await.expect(202);
    for many in [
        "INSERT INTO sandbar.api_keys (tenant_id, key_id, prefix, hash, role)
         SELECT $1, gen_random_uuid(), 'many', sha256(n::text::bytea), 'viewer' FROM generate_series(1, 999) n",
        "INSERT INTO sandbar.key_quotas (tenant_id, key_id, quotas)
         SELECT $1, key_id, '{\"invocations_per_s\": 1}' FROM sandbar.api_keys WHERE prefix = 'many'",
    ] {
        sqlx::query(many).bind(api.tenant).execute(&api.admin).await.unwrap();
    }
    let wanted = json!({"name": "x", "role": "viewer", "quotas": {"invocations_per_s": 1}});
    let refused = api.client.post("/v1/keys", &wanted).await;
    assert_eq!(problem(&refused, 403), "over-quota");
    assert_eq!(refused.json()["quota"], json!({"name": "key_shares", "limit": 1_000, "current": 1_001}));
    let keys: i64 = sqlx::query_scalar("SELECT count(*) FROM sandbar.api_keys WHERE name = 'x'")
        .fetch_one(&api.admin)
        .await
        .unwrap();
    assert_eq!(keys, 0, "no key without its limits");
    // One that has limits already may change them, and rotating takes no place.
    change(&api, &id, json!({"invocations_per_day": 6})).await.expect(200);
    let rotated = api.client.post(&format!("/v1/keys/{id}/rotate"), &json!({})).await.expect(201).json();
    send(api.client.request(Method::DELETE, &format!("/v1/keys/{id}"))).await.expect(204);
    assert_eq!(problem(&api.client.post("/v1/keys", &wanted).await, 403), "over-quota", "its line lives on");
    let next = rotated["key"]["id"].as_str().unwrap();
    send(api.client.request(Method::DELETE, &format!("/v1/keys/{next}"))).await.expect(204);
    api.client.post("/v1/keys", &wanted).await.expect(201);
    let counted: i64 =
        sqlx::query_scalar("SELECT count(*) FROM sandbar.quota_windows").fetch_one(&api.admin).await.unwrap();
    assert_eq!(counted, 0, "its count is gone with it");
}
