//! Requests and bytes that a tenant, or one of its tasks, may send in a day: over several workers, never passed.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::{Target, deployment, fetch, grant, log};
use crate::support::{self, Client};

async fn set(client: &Client, path: &str, quotas: Value) {
    let request = client.request(Method::PATCH, path).json(&json!({"quotas": quotas}));
    support::send(request).await.expect(200);
}

async fn used(client: &Client, name: &str) -> u64 {
    let all = client.get("/v1/quotas").await.expect(200).json();
    let quota = all["quotas"].as_array().unwrap().iter().find(|quota| quota["name"] == name).unwrap();
    quota["used"].as_u64().unwrap_or_else(|| panic!("{quota:#}"))
}

/// A change holds everywhere within this time.
const SOON: Duration = Duration::from_secs(5);
const TENANT: &str = "/v1/tenants/default/quotas";
const TASK: &str = "/v1/tasks/fetch/quotas";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_day_has_so_many_requests_and_bytes_and_then_the_call_fails_and_the_task_goes_on() {
    let target = Target::start().await;
    let (deployment, client) = deployment(&[]).await;
    grant(&client, &target.grant()).await;
    let get = json!({"url": target.url("/echo")});
    set(&client, TENANT, json!({"egress_requests_per_day": 3})).await;
    // What the rules refuse is no request.
    let (out, _) = fetch(&client, &json!({"url": "http://127.0.0.2/"})).await;
    assert_eq!(out["error"], "HTTP-request-denied");
    for _ in 0..3 {
        let (out, ended) = fetch(&client, &get).await;
        assert_eq!(out["status"], 200, "{ended:#}");
    }
    let (out, ended) = fetch(&client, &get).await;
    assert_eq!((&out["error"], &ended["state"]), (&json!("HTTP-request-denied"), &json!("succeeded")));
    let said = log(&client, &ended).await;
    assert!(said.contains("tenant's quota egress_requests_per_day of 3 is used up"), "{said}");
    assert_eq!((target.seen(), used(&client, "egress_requests_per_day").await), (3, 3));

    // More; and the share of the task, which is smaller: it counts from the moment at which workers hear of it.
    set(&client, TENANT, json!({"egress_requests_per_day": 1_000})).await;
    set(&client, TASK, json!({"egress_requests_per_day": 2})).await;
    let refused = support::eventually(SOON, "the share's end", async || {
        let (out, ended) = fetch(&client, &get).await;
        let known = log(&client, &ended).await.contains("task's quota egress_requests_per_day of 2");
        (out["error"] == "HTTP-request-denied" && known).then_some(ended)
    })
    .await;
    assert_eq!(refused["state"], "succeeded");
    let counted: Vec<i64> = sqlx::query_scalar(
        "SELECT used FROM sandbar.quota_windows WHERE quota = 'egress_requests_per_day' AND task_id <> '00000000-0000-0000-0000-000000000000'",
    )
    .fetch_all(&deployment.database.admin().await)
    .await
    .unwrap();
    assert_eq!(counted, [2]);
    set(&client, TASK, json!({"egress_requests_per_day": null})).await;

    // Bytes, both ways.
    set(&client, TENANT, json!({"egress_requests_per_day": null, "egress_bytes_per_day": 1_000_000})).await;
    let take = json!({"url": target.url("/bytes/400000")});
    let put = json!({"url": target.url("/echo"), "method": "PUT", "body_bytes": 500_000});
    support::eventually(SOON, "the end of the bytes", async || {
        let (out, ended) = fetch(&client, &take).await;
        let known = log(&client, &ended).await.contains("egress_bytes_per_day of 1000000 is used up");
        (out["error"].is_string() && known).then_some(())
    })
    .await;
    let counted = used(&client, "egress_bytes_per_day").await;
    assert!((800_000..=1_000_000).contains(&counted), "{counted}");
    let before = target.seen();
    let (out, _) = fetch(&client, &put).await;
    assert!(out["error"].is_string(), "{out:#}");
    assert!(target.seen() - before <= 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_share_a_day_and_one_that_stops_gives_back_what_it_took_ahead_and_an_http_task_is_told_the_quota()
 {
    let target = Target::start().await;
    let settings = [("SANDBAR_EGRESS__PRIVATE_NETWORKS", "[127.0.0.0/8]".to_owned())];
    let mut deployment = support::Deployment::on(support::database().await, 2, &settings).await;
    let client = deployment.client();
    let http = json!({"http": {"method": "GET", "url": target.url("/echo")}});
    client.post("/v1/tasks/fetch/versions", &http).await.expect(201);
    grant(&client, &target.grant()).await;
    set(&client, TENANT, json!({"egress_requests_per_day": 500})).await;
    let (_, first) = fetch(&client, &Value::Null).await;
    assert_eq!(first["state"], "succeeded", "{first:#}");
    // Then some are taken ahead.
    let (_, second) = fetch(&client, &Value::Null).await;
    assert_eq!(second["state"], "succeeded", "{second:#}");
    assert_eq!(target.seen(), 2);
    for worker in deployment.workers.drain(..) {
        assert!(worker.terminate().await.success());
    }
    assert_eq!(used(&client, "egress_requests_per_day").await, 2, "what was not used is given back");

    set(&client, TENANT, json!({"egress_requests_per_day": 2})).await;
    deployment.workers.push(deployment.spawn_worker());
    let (_, ended) = fetch(&client, &Value::Null).await;
    let end = &ended["attempts"][0]["termination"];
    assert_eq!(
        (&end["reason"], &end["quota"]),
        (&json!("quota-exceeded"), &json!("egress_requests_per_day")),
        "{ended:#}"
    );
    assert_eq!(target.seen(), 2);
}
