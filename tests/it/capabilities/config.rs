//! Texts that people set on a task.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::Tenant;
use crate::support::{Deployment, eventually};

async fn set(tenant: &Tenant, config: &Value) -> Value {
    let body = json!({"config": config});
    tenant.send(Method::PATCH, "/v1/tasks/settings", Some(&body)).await.expect(200).json()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_people_set_is_read_by_their_task_alone_and_is_of_one_moment_for_an_attempt() {
    let deployment = Deployment::start(1).await;
    let first = Tenant::first(&deployment);
    let second = Tenant::other(&deployment, "second").await;
    for tenant in [&first, &second] {
        tenant.upload("settings", "settings").await;
    }
    let look = json!([{"what": "all"}, {"what": "get", "name": "a"}]);
    assert_eq!(first.run("settings", &look).await.0, json!(["", "none"]));

    let task = set(&first, &json!({"a": "1", "b": "two", "c~/d": "ü"})).await;
    assert_eq!(task["config"], json!({"a": "1", "b": "two", "c~/d": "ü"}), "{task:#}");
    let (out, ended) = first.run("settings", &look).await;
    assert_eq!(out, json!(["a=1 b=two c~/d=ü", "1"]), "{ended:#}");
    assert_eq!(
        second.run("settings", &look).await.0,
        json!(["", "none"]),
        "another tenant's task of the same name"
    );

    // What is not named stays, what is null goes.
    assert_eq!(set(&first, &json!({"a": null, "b": "2"})).await["config"], json!({"b": "2", "c~/d": "ü"}));
    // An attempt sees what was there when it first looked.
    let running = tokio::spawn({
        let first = first.clone();
        let steps = json!([{"what": "get", "name": "b"}, {"what": "sleep", "count": 1_500}, {"what": "get", "name": "b"}]);
        async move { first.run("settings", &steps).await.0 }
    });
    eventually(Duration::from_secs(20), "the attempt to run", async || {
        let stats = first.send(Method::GET, "/v1/invocations?state=running", None).await.json();
        stats["items"].as_array().is_some_and(|items| !items.is_empty()).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    set(&first, &json!({"b": "3"})).await;
    let out = running.await.unwrap();
    assert_eq!(out[0], out[2], "{out:#}");
    assert_eq!(first.run("settings", &json!([{"what": "get", "name": "b"}])).await.0, json!(["3"]));
    assert!(set(&first, &Value::Null).await.get("config").is_none());

    // Beyond the bounds nothing is set.
    let many: serde_json::Map<String, Value> = (0..101).map(|n| (format!("k{n}"), json!("v"))).collect();
    for bad in [
        json!({"": "v"}),
        json!({"k": "a\u{0}"}),
        json!({"k".repeat(129): "v"}),
        json!(many),
        json!({"k": "v".repeat(65_536)}),
    ] {
        let body = json!({"config": bad});
        first.send(Method::PATCH, "/v1/tasks/settings", Some(&body)).await.expect(422);
    }
    assert_eq!(first.run("settings", &look).await.0, json!(["", "none"]));
}
