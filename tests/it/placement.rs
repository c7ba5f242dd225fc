//! Which of several workers runs an invocation.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{self, Client, Deployment, eventually};

/// Longest wait for anything.
const SOON: Duration = Duration::from_secs(60);

/// Two heartbeats in a row of so many workers whose loops run: whatever they look for at their start, they have found.
async fn settled(deployment: &Deployment, workers: i64) {
    let pool = deployment.database.admin().await;
    let latest = async || {
        let (count, seen): (i64, Option<f64>) = sqlx::query_as(
            "SELECT count(*), min(extract(epoch FROM heartbeat_at))::float8 FROM sandbar.workers WHERE room IS NOT NULL",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        (count == workers).then_some(seen.unwrap())
    };
    let first = eventually(SOON, "every worker to say how much room it has", latest).await;
    eventually(SOON, "another heartbeat of each", async || latest().await.filter(|seen| *seen > first)).await;
    pool.close().await;
}

/// The workers that ran so many invocations, one after the other.
async fn ran_on(client: &Client, invocations: usize) -> BTreeSet<String> {
    let mut workers = BTreeSet::new();
    for _ in 0..invocations {
        let done = client.invoke("echo", &json!({"input": 1})).await.expect(200).json();
        assert_eq!(done["state"], "succeeded", "{done:#}");
        workers.insert(done["attempts"][0]["worker"].as_str().unwrap().to_owned());
    }
    workers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_goes_to_the_worker_that_has_the_module_and_to_another_when_that_takes_none() {
    let settings = [
        ("SANDBAR_WORKER__HEARTBEAT_MS", "100".to_owned()),
        ("SANDBAR_WORKER__POLL_MS", "60000".to_owned()),
        // Longer than the first worker could ever need: whatever the second runs, it ran because nobody else would.
        ("SANDBAR_WORKER__HEAD_START_MS", "10000".to_owned()),
    ];
    let mut deployment = Deployment::on(support::database().await, 1, &settings).await;
    let client = deployment.client();
    client.upload("echo", &support::guest("echo")).await.expect(201);
    let first = ran_on(&client, 1).await;
    let second = deployment.spawn_worker();
    deployment.workers.push(second);
    settled(&deployment, 2).await;
    assert_eq!(ran_on(&client, 10).await, first, "a worker that had to load the module went first");

    let path = format!("/v1/workers/{}/cordon", first.first().unwrap());
    client.post(&path, &json!({})).await.expect(200);
    eventually(SOON, "the first worker to be cordoned", async || {
        deployment.workers[0].log().contains("wanted=cordoned").then_some(())
    })
    .await;
    let then = ran_on(&client, 3).await;
    assert!(then.is_disjoint(&first) && then.len() == 1, "{then:?}");
    let list: Value = client.get("/v1/workers").await.expect(200).json();
    assert!(
        list["items"]
            .as_array()
            .unwrap()
            .iter()
            .any(|w| w["id"].as_str() == then.first().map(String::as_str))
    );
}
