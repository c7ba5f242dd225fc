//! From the request to the guest's first instruction, at a steady rate, beside a raw commit at the same rate.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use crate::enqueue::{Connection, request};
use crate::peer::{PEERS, measure};
use crate::stage::Stage;
use crate::{figure, quantile};

/// Enqueues per second, and for how many seconds each.
const RATES: [(u32, u32); 3] = [(20, 10), (200, 10), (2_000, 6)];
/// Connections over which requests go.
const CONNECTIONS: usize = 32;
/// The share of the time that raw commits get, half before and half after.
const RAW_SECONDS: u32 = 4;

/// All rates.
pub async fn run(stage: &Stage) {
    for (rate, seconds) in RATES {
        let (rate_text, seconds_text) = (rate.to_string(), seconds.to_string());
        for peer in PEERS {
            if rate > 200 {
                continue; // beyond what they take one by one
            }
            if let Some(answer) = measure(stage, peer, &["start", &rate_text, &seconds_text]).await {
                for at in ["p50", "p99"] {
                    if let Some(value) = answer[at].as_f64() {
                        figure(&format!("start.{peer}.{at}.{rate}"), value, "ms");
                    }
                }
            }
        }
        ours(stage, rate, seconds).await;
    }
}

async fn ours(stage: &Stage, rate: u32, seconds: u32) {
    let scene = stage.scene("clock").await;
    sqlx::query("CREATE TABLE public.raw (n int)").execute(&scene.admin).await.unwrap();
    let (dev, address) = scene.serve("dev", &[("SANDBAR_WORKER__SLOTS", "256".to_owned())]).await;
    let body = request("/v1/tasks/work/invocations", &json!({"input": {}}));
    // Load the code and open the connections first.
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut connection = Connection::open(&address).await;
        assert_eq!(connection.send(&body).await.0, 202);
        connections.push(connection);
    }
    scene.drained().await;
    scene.settle().await;

    let mut raw = commits(&scene.admin, rate, RAW_SECONDS / 2).await;

    let sent: Mutex<HashMap<String, u64>> = Mutex::default();
    let total = rate * seconds;
    let began = Instant::now() + Duration::from_millis(20);
    let sender = async |index: usize, mut connection: Connection| {
        let mut n = index as u32;
        while n < total {
            tokio::time::sleep_until((began + Duration::from_secs(1) * n / rate).into()).await;
            let at = since_1970(SystemTime::now());
            let (status, answer) = connection.send(&body).await;
            assert_eq!(status, 202);
            let answer: Value = serde_json::from_slice(&answer).unwrap();
            sent.lock().unwrap().insert(answer["id"].as_str().unwrap().to_owned(), at);
            n += CONNECTIONS as u32;
        }
    };
    let senders = connections.into_iter().enumerate().map(|(index, connection)| sender(index, connection));
    futures_util::future::join_all(senders).await;
    scene.drained().await;
    raw.extend(commits(&scene.admin, rate, RAW_SECONDS / 2).await);

    let started: Vec<(uuid::Uuid, Vec<u8>)> =
        sqlx::query_as("SELECT invocation_id, output FROM sandbar.results WHERE state = 'succeeded'")
            .fetch_all(&scene.admin)
            .await
            .unwrap();
    let sent = sent.into_inner().unwrap();
    let mut taken: Vec<Duration> = started
        .iter()
        .filter_map(|(id, output)| {
            let sent = sent.get(&id.to_string())?;
            let output: Value = serde_json::from_slice(output).unwrap();
            Some(Duration::from_nanos(output["at_ns"].as_u64().unwrap().saturating_sub(*sent)))
        })
        .collect();
    assert_eq!(taken.len(), total as usize);
    for (name, times) in [("raw", &mut raw), ("sandbox", &mut taken)] {
        figure(&format!("start.{name}.p50.{rate}"), quantile(times, 0.5), "ms");
        figure(&format!("start.{name}.p99.{rate}"), quantile(times, 0.99), "ms");
    }
    dev.terminate().await;
}

/// Single-row commits at the same pace.
async fn commits(admin: &sqlx::PgPool, rate: u32, seconds: u32) -> Vec<Duration> {
    let mut connection = admin.acquire().await.unwrap();
    let mut taken = Vec::new();
    let first = Instant::now();
    for n in 0..rate * seconds {
        tokio::time::sleep_until((first + Duration::from_secs(1) * n / rate).into()).await;
        let began = Instant::now();
        sqlx::query("INSERT INTO public.raw VALUES (1)").execute(&mut *connection).await.unwrap();
        taken.push(began.elapsed());
    }
    taken
}

fn since_1970(at: SystemTime) -> u64 {
    u64::try_from(at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos()).unwrap()
}
