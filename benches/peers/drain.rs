//! Draining a preloaded queue: peers' no-ops, our sandboxed runs, and our queue without the sandbox.

use crate::figure;
use crate::peer::{PEERS, measure};
use crate::stage::Stage;

/// Jobs of each drain.
const JOBS: usize = 100_000;
/// Jobs of the native drain, which is quicker.
const NATIVE: usize = 200_000;
/// Attempts at once of the worker.
const SLOTS: u32 = 512;
/// About a hundred bytes, as the peers' payloads.
const INPUT: &[u8] =
    br#"{"n":1,"pad":"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}"#;

/// All of them.
pub async fn run(stage: &Stage) {
    let jobs = JOBS.to_string();
    for peer in PEERS {
        let arguments: &[&str] =
            if peer == "graphile" { &["drain", &jobs, "500", "24"] } else { &["drain", &jobs, "1000"] };
        if let Some(answer) = measure(stage, peer, arguments).await {
            figure(&format!("drain.{peer}"), answer["rate"].as_f64().unwrap(), "/s");
        }
    }

    let scene = stage.scene("echo").await;
    scene.preload(scene.tenant, scene.task, JOBS, INPUT).await;
    scene.settle().await;
    let worker = scene.spawn("worker", &[("SANDBAR_WORKER__SLOTS", SLOTS.to_string())]);
    scene.drained().await;
    figure("drain.sandbox", scene.rate().await, "/s");
    worker.terminate().await;

    let scene = stage.scene("echo").await;
    scene.settle().await;
    let before = wal(&scene.admin).await;
    scene.preload(scene.tenant, scene.task, NATIVE, INPUT).await;
    let took = scene.drain_natively(NATIVE, 1_000, 2).await;
    let written = wal(&scene.admin).await - before;
    figure("drain.native", NATIVE as f64 / took.as_secs_f64(), "/s");
    figure("drain.wal", written / NATIVE as f64, "B");
}

/// Bytes of write-ahead log since the cluster was made.
async fn wal(admin: &sqlx::PgPool) -> f64 {
    sqlx::query_scalar("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8")
        .fetch_one(admin)
        .await
        .unwrap()
}
