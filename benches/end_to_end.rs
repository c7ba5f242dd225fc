//! The whole way, measured from outside with real processes: `Prefer: wait` round trip of a trivial task on an idle
//! server beside a raw single-row commit on the same Postgres, single enqueues over HTTP, and the drain of preloaded
//! sandboxed runs. Prints a table; asserts nothing about time. See docs/performance.md.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr
)]

#[path = "../tests/it/support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use support::{ADMIN_KEY, Client, Process};

/// Round trips that are measured, after as many again divided by ten to warm up.
const ROUND_TRIPS: usize = 1_000;
/// Invocations that are drained.
const DRAIN: usize = 20_000;
/// Callers that preload.
const CALLERS: usize = 64;

#[tokio::main]
async fn main() {
    // `cargo test --benches` runs this without `--bench`: nothing to measure then.
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    let (postgres, database, dir) = support::own_postgres().await;
    let admin = database.admin().await;

    let mut commits = Vec::new();
    sqlx::query("CREATE TABLE public.raw (n int)").execute(&admin).await.unwrap();
    let mut raw = admin.acquire().await.unwrap();
    for _ in 0..ROUND_TRIPS {
        let began = Instant::now();
        sqlx::query("INSERT INTO public.raw VALUES (1)").execute(&mut *raw).await.unwrap();
        commits.push(began.elapsed());
    }
    drop(raw);

    let variables = |name: &str| {
        [
            ("SANDBAR_DATABASE__URL", database.admin_url()),
            ("SANDBAR_DATABASE__API_URL", database.api_url()),
            ("SANDBAR_DATABASE__WORKER_URL", database.worker_url()),
            ("SANDBAR_SERVER__ADMIN_KEY", ADMIN_KEY.to_owned()),
            ("SANDBAR_SERVER__LISTEN", "127.0.0.1:0".to_owned()),
            ("SANDBAR_DATA_DIR", dir.path().join(name).display().to_string()),
            ("SANDBAR_WORKER__SLOTS", "256".to_owned()),
            ("SANDBAR_LOG__FILTER", "warn,sandbar::server=info".to_owned()),
        ]
    };
    let mut dev = Process::spawn("dev", dir.path(), &["dev"], &variables("dev"));
    let client = Client::new(format!("http://{}", dev.address().await));
    dev.ready(&client).await;
    client.upload("echo", &support::guest("echo")).await.expect(201);
    let body = json!({"input": {"n": 1}});
    for _ in 0..ROUND_TRIPS / 10 {
        client.invoke("echo", &body).await.expect(200);
    }
    let mut trips = Vec::new();
    for _ in 0..ROUND_TRIPS {
        let began = Instant::now();
        let answer = client.invoke("echo", &body).await;
        trips.push(began.elapsed());
        answer.expect(200);
    }
    dev.terminate().await;

    let mut server = Process::spawn("server", dir.path(), &["server"], &variables("server"));
    let client = Client::new(format!("http://{}", server.address().await));
    server.ready(&client).await;
    let sent = Arc::new(AtomicUsize::new(0));
    let began = Instant::now();
    let callers: Vec<_> = (0..CALLERS)
        .map(|_| {
            let (client, sent, body) = (client.clone(), sent.clone(), body.clone());
            tokio::spawn(async move {
                while sent.fetch_add(1, Ordering::Relaxed) < DRAIN {
                    client.enqueue("echo", &body).await.expect(202);
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    let enqueue = began.elapsed();
    // The worker alone shares the machine with Postgres while it drains.
    server.terminate().await;
    sqlx::query("CHECKPOINT").execute(&admin).await.unwrap();
    let worker = Process::spawn("worker", dir.path(), &["worker"], &variables("dev"));
    let drained = "SELECT count(*) FROM sandbar.results";
    support::eventually(Duration::from_secs(300), "the queue to drain", async || {
        let n: i64 = sqlx::query_scalar(drained).fetch_one(&admin).await.unwrap();
        (n >= (DRAIN + ROUND_TRIPS) as i64).then_some(())
    })
    .await;
    let (runs, seconds): (i64, f64) = sqlx::query_as(
        "SELECT count(*), extract(epoch FROM max(finished_at) - min(started_at))::float8 FROM sandbar.attempts
         WHERE worker_id = (SELECT worker_id FROM sandbar.attempts ORDER BY finished_at DESC LIMIT 1)",
    )
    .fetch_one(&admin)
    .await
    .unwrap();
    worker.terminate().await;
    postgres.stop().await.unwrap();

    let at = |mut times: Vec<Duration>, share: f64| {
        times.sort();
        times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3
    };
    println!("{:<44} {:>9} {:>9}", "", "p50 ms", "p99 ms");
    println!(
        "{:<44} {:>9.2} {:>9.2}",
        "raw single-row commit",
        at(commits.clone(), 0.5),
        at(commits.clone(), 0.99)
    );
    println!(
        "{:<44} {:>9.2} {:>9.2}",
        "Prefer: wait round trip, echo, idle",
        at(trips.clone(), 0.5),
        at(trips.clone(), 0.99)
    );
    println!("{:<44} {:>9.1}", "  in raw commits (p50 / p50)", at(trips, 0.5) / at(commits, 0.5));
    println!(
        "{:<44} {:>9.0} /s",
        format!("single enqueues over HTTP, {CALLERS} callers"),
        DRAIN as f64 / enqueue.as_secs_f64()
    );
    println!("{:<44} {:>9.0} /s", format!("drain of {runs} sandboxed runs"), runs as f64 / seconds);
}
