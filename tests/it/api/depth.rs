//! Backpressure: what may wait of a tenant, and what a caller hears beyond it.

use sandbar::app::Settings;
use serde_json::json;

use crate::api::{Api, SOON, problem};
use crate::support::{self, eventually, send};
use reqwest::Method;

#[tokio::test]
async fn beyond_its_depth_a_tenant_is_refused_with_the_quota_and_when_to_come_again_and_others_are_not() {
    let settings = Settings { max_queued: 3, ..Settings::default() };
    let api = Api::on(&support::database().await, settings).await;
    api.echo().await;
    let enqueue = async |body| api.client.enqueue("echo", &body).await;
    for body in [json!({"input": 1}), json!({"input": 2}), json!({"input": 3, "delay_ms": 3_600_000})] {
        enqueue(body).await.expect(202);
    }
    let full = enqueue(json!({"input": 4})).await;
    assert_eq!(problem(&full, 429), "queue-full");
    assert_eq!(full.headers["retry-after"], "1");
    assert_eq!(full.json()["quota"], json!({"name": "queue_depth", "limit": 3, "current": 3}));
    let list = api.client.get("/v1/invocations").await.expect(200).json();
    assert_eq!(list["items"].as_array().unwrap().len(), 3, "what was accepted stays");

    // Another tenant has a depth of its own: it has no such task, and that is all it hears.
    let other = send(api.as_other(Method::POST, "/v1/tasks/echo/invocations").json(&json!({}))).await;
    assert_eq!(problem(&other, 404), "task-not-found");

    // What is claimed waits no more.
    let me = api.register().await;
    api.claim(me).await;
    eventually(SOON, "room in the queue", async || {
        let answer = enqueue(json!({"input": 5})).await;
        (answer.status == 202).then_some(())
    })
    .await;

    // A limit of its own goes before the installation's.
    sqlx::query("UPDATE sandbar.tenants SET max_queued = 5 WHERE tenant_id = $1")
        .bind(api.tenant)
        .execute(&api.admin)
        .await
        .unwrap();
    eventually(SOON, "the new limit", async || {
        let answer = enqueue(json!({"input": 6})).await;
        (answer.status == 202).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_server_never_passes_the_depth_whatever_comes_at_once() {
    let settings = Settings { max_queued: 50, ..Settings::default() };
    let api = Api::on(&support::database().await, settings).await;
    api.echo().await;
    let answers = futures_util::future::join_all((0..200).map(|n| {
        let client = api.client.clone();
        async move { client.enqueue("echo", &json!({"input": n})).await.status.as_u16() }
    }))
    .await;
    let accepted = answers.iter().filter(|status| **status == 202).count();
    assert_eq!(accepted, 50);
    assert!(answers.iter().all(|status| [202, 429].contains(status)), "{answers:?}");
    let waiting: i64 =
        sqlx::query_scalar("SELECT count(*) FROM sandbar.ready").fetch_one(&api.admin).await.unwrap();
    assert_eq!(waiting, 50);
}
