//! Many invocations in one request.

use serde_json::{Value, json};

use super::{Api, problem, success};
use crate::support;

async fn batch(api: &Api, items: &[Value]) -> Vec<Value> {
    let answer =
        api.client.post("/v1/invocations:batch", &json!({"invocations": items})).await.expect(200).json();
    answer["outcomes"].as_array().unwrap().clone()
}

#[tokio::test]
async fn a_bad_item_fails_alone_and_every_item_has_its_outcome_in_its_place() {
    let api = Api::start().await;
    let schema = json!({"input_schema": {"type": "object", "required": ["n"]}});
    api.task("strict", "task", &schema).await;
    api.echo().await;
    let outcomes = batch(
        &api,
        &[
            json!({"task": "echo", "input": 1, "tags": {"batch": "1"}}),
            json!({"task": "none"}),
            json!({"task": "echo", "nonsense": 1}),
            json!("text"),
            json!({"task": "strict", "input": {}}),
            json!({"task": "strict", "input": {"n": 1}}),
            json!({"task": "echo", "args": ["x"]}),
            json!({"task": "echo", "input_base64": "?"}),
            json!({"task": "echo", "priority": 101}),
            json!({"task": "echo", "tags": {"a": "b\u{0}"}}),
            json!({"task": "echo", "input": 2, "delay_ms": 60_000}),
            json!({"input": 3}),
        ],
    )
    .await;
    let told: Vec<(u64, &str)> = outcomes
        .iter()
        .map(|o| (o["status"].as_u64().unwrap(), o["problem"]["code"].as_str().unwrap_or("-")))
        .collect();
    assert_eq!(
        told,
        [
            (202, "-"),
            (404, "task-not-found"),
            (422, "invalid-body"),
            (422, "invalid-body"),
            (422, "input-mismatch"),
            (202, "-"),
            (422, "wrong-input-kind"),
            (422, "invalid-body"),
            (422, "invalid-body"),
            (422, "invalid-body"),
            (202, "-"),
            (422, "invalid-body"),
        ]
    );
    assert_eq!(outcomes[4]["problem"]["errors"][0]["pointer"], "/invocations/4/input");
    for (place, state) in [(0, "queued"), (5, "queued"), (10, "scheduled")] {
        let id = outcomes[place]["id"].as_str().unwrap();
        assert_eq!(api.client.get(&format!("/v1/invocations/{id}")).await.expect(200).json()["state"], state);
    }
    let all: i64 =
        sqlx::query_scalar("SELECT count(*) FROM sandbar.invocations").fetch_one(&api.admin).await.unwrap();
    assert_eq!(all, 3);
}

#[tokio::test]
async fn a_thousand_are_accepted_in_order_and_one_more_is_refused_whole() {
    let api = Api::start().await;
    api.echo().await;
    let items: Vec<Value> = (0..1_000).map(|n| json!({"task": "echo", "input": n})).collect();
    let outcomes = batch(&api, &items).await;
    let ids: Vec<&str> = outcomes.iter().map(|o| o["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 1_000);
    let me = api.register().await;
    let first = api.claim(me).await;
    assert_eq!((first.invocation.to_string().as_str(), first.input.as_slice()), (ids[0], &b"0"[..]));
    api.ack(me, success(first)).await;
    assert!(ids.is_sorted(), "ids are in the order of the request");

    for bad in
        [json!({"invocations": []}), json!({"invocations": vec![json!({"task": "echo"}); 1_001]}), json!({})]
    {
        let answer = api.client.post("/v1/invocations:batch", &bad).await;
        assert_eq!(problem(&answer, 422), "invalid-body");
    }
    let wrong = api.client.request(reqwest::Method::POST, "/v1/invocations:batch").body("{}");
    assert_eq!(problem(&support::send(wrong).await, 415), "unsupported-media-type");
}

#[tokio::test]
async fn keys_hold_across_batches_within_one_and_for_single_requests() {
    let api = Api::start().await;
    api.echo().await;
    let item = json!({"task": "echo", "input": {"a": 1, "b": 2}, "idempotency_key": "k"});
    let other = json!({"task": "echo", "input": 2, "idempotency_key": "k"});
    let outcomes = batch(&api, &[item.clone(), item.clone(), other.clone()]).await;
    let statuses: Vec<u64> = outcomes.iter().map(|o| o["status"].as_u64().unwrap()).collect();
    assert_eq!(statuses, [202, 200, 422]);
    assert_eq!(outcomes[0]["id"], outcomes[1]["id"]);
    assert_eq!(outcomes[2]["problem"]["code"], "idempotency-key-reused");
    assert_eq!(batch(&api, &[item]).await[0]["status"], 200);
    let single = api
        .client
        .request(reqwest::Method::POST, "/v1/tasks/echo/invocations")
        .header("idempotency-key", "k")
        .json(&json!({"input": {"b": 2, "a": 1}}));
    let single = support::send(single).await.expect(202);
    assert_eq!(single.json()["id"], outcomes[0]["id"]);
    let bad = batch(&api, &[json!({"task": "echo", "idempotency_key": "a b"})]).await;
    assert_eq!(bad[0]["problem"]["code"], "invalid-idempotency-key");
}
