//! How a worker stops, as a real process: by SIGTERM, by a second signal, and by an operator through the API.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{self, Client, Deployment, eventually};

/// Longest wait for anything.
const SOON: Duration = Duration::from_secs(60);

async fn deployment(grace_ms: u64) -> (Deployment, Client) {
    let quick = [
        ("SANDBAR_WORKER__HEARTBEAT_MS", "100".to_owned()),
        ("SANDBAR_WORKER__DRAIN_GRACE_MS", grace_ms.to_string()),
        ("SANDBAR_SCHEDULER__TICK_MS", "100".to_owned()),
    ];
    let deployment = Deployment::on(support::database().await, 1, &quick).await;
    let client = deployment.client();
    client.upload("trap", &support::guest("trap")).await.expect(201);
    (deployment, client)
}

/// An invocation that sleeps, once it runs.
async fn sleeper(client: &Client, ms: u64) -> String {
    let body = json!({"input": {"mode": "sleep", "ms": ms}, "retry": {"max_attempts": 1}});
    let id = client.enqueue("trap", &body).await.expect(202).json()["id"].as_str().unwrap().to_owned();
    eventually(SOON, "the sleeper to run", async || {
        (get(client, &id).await["state"] == "running").then_some(())
    })
    .await;
    // Claimed is not started: its module may still be on the way to the cell, which a drain would not wait for.
    id
}

async fn get(client: &Client, id: &str) -> Value {
    client.get(&format!("/v1/invocations/{id}")).await.expect(200).json()
}

async fn worker(client: &Client, state: &str) -> Value {
    eventually(SOON, &format!("a worker that is {state}"), async || {
        let list = client.get("/v1/workers").await.expect(200).json();
        list["items"].as_array().unwrap().iter().find(|w| w["state"] == state).cloned()
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_lets_running_work_finish_claims_nothing_more_and_leaves() {
    let (mut deployment, client) = deployment(60_000).await;
    let running = sleeper(&client, 1_500).await;
    let mut worker_process = deployment.workers.remove(0);
    worker_process.signal(Signal::TERM);
    eventually(SOON, "the drain to begin", async || worker_process.log().contains("draining").then_some(()))
        .await;
    let body = json!({"input": {"mode": "sleep", "ms": 1}});
    let after = client.enqueue("trap", &body).await.expect(202).json()["id"].as_str().unwrap().to_owned();
    assert!(worker_process.ended(SOON).await.success());
    let first = get(&client, &running).await;
    assert_eq!((&first["state"], first["attempts"].as_array().unwrap().len()), (&json!("succeeded"), 1));
    assert_eq!(get(&client, &after).await["state"], "queued", "a draining worker took new work");
    worker(&client, "gone").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_that_outlasts_the_grace_time_goes_back_without_using_up_a_retry() {
    let (mut deployment, client) = deployment(200).await;
    let running = sleeper(&client, 600_000).await;
    let mut worker_process = deployment.workers.remove(0);
    worker_process.signal(Signal::TERM);
    assert!(worker_process.ended(SOON).await.success());
    let back = get(&client, &running).await;
    // It had one attempt in all: a used-up retry would have been its death.
    assert_eq!(back["state"], "queued", "{back:#}");
    assert_eq!(back["attempts"][0]["termination"]["reason"], "lease-lost", "{back:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_stops_at_once_and_the_work_is_handed_on() {
    let (mut deployment, client) = deployment(600_000).await;
    let running = sleeper(&client, 600_000).await;
    let mut worker_process = deployment.workers.remove(0);
    worker_process.signal(Signal::TERM);
    eventually(SOON, "the drain to begin", async || worker_process.log().contains("draining").then_some(()))
        .await;
    worker_process.signal(Signal::TERM);
    worker_process.ended(SOON).await;
    let back = eventually(SOON, "the work to be handed on", async || {
        let now = get(&client, &running).await;
        (now["state"] == "queued").then_some(now)
    })
    .await;
    assert_eq!(back["attempts"][0]["termination"]["reason"], "lease-lost", "{back:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_cordons_uncordons_and_drains_a_worker() {
    let (mut deployment, client) = deployment(0).await;
    let running = sleeper(&client, 1_500).await;
    let id = worker(&client, "active").await["id"].as_str().unwrap().to_owned();
    let tell = async |word: &str| {
        client.post(&format!("/v1/workers/{id}/{word}"), &json!({})).await.expect(200);
        // Only what the worker itself says shows that it has heard.
        let said = format!(
            "wanted={}",
            match word {
                "cordon" => "cordoned",
                "uncordon" => "active",
                _ => "draining",
            }
        );
        eventually(SOON, &format!("the worker to hear {word}"), async || {
            deployment.workers[0].log().contains(&said).then_some(())
        })
        .await;
    };
    tell("cordon").await;
    let body = json!({"input": {"mode": "sleep", "ms": 1}});
    let waits = client.enqueue("trap", &body).await.expect(202).json()["id"].as_str().unwrap().to_owned();
    let ended = async |id: &str| {
        eventually(SOON, "an end", async || {
            let now = get(&client, id).await;
            now["finished_at"].is_string().then_some(now)
        })
        .await
    };
    assert_eq!(ended(&running).await["state"], "succeeded", "what ran went on");
    assert_eq!(get(&client, &waits).await["state"], "queued", "a cordoned worker took new work");
    let why = client.get(&format!("/v1/invocations/{waits}/why")).await.expect(200).json();
    assert_eq!(why["reasons"][0]["kind"], "no-worker", "{why}");
    tell("uncordon").await;
    assert_eq!(ended(&waits).await["state"], "succeeded");

    let memory = eventually(SOON, "a heartbeat with memory", async || {
        worker(&client, "active").await["memory"].as_object().cloned()
    })
    .await;
    assert_eq!(worker(&client, "active").await["walls"]["no_new_privileges"], true);
    assert!(memory["cells_bytes"].as_i64().unwrap() > 1 << 20, "{memory:?}");
    // No grace time is set: a drain by an operator waits for what runs all the same.
    let running = sleeper(&client, 1_500).await;
    tell("drain").await;
    assert!(deployment.workers.remove(0).ended(SOON).await.success());
    assert_eq!(get(&client, &running).await["state"], "succeeded");
}
