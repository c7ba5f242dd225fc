//! What depth and an old snapshot cost: claims with a million queued, and a drain that nothing can be vacuumed behind.

use std::time::{Duration, Instant};

use sandbar::store::queue::Want;

use crate::stage::{Scene, Stage};
use crate::{figure, quantile};

/// Queue depths.
const SHALLOW: usize = 10_000;
const DEEP: usize = 1_000_000;
/// Claims that are measured at each depth, and rows of each.
const CLAIMS: usize = 60;
const ROWS: i32 = 100;
/// Jobs drained with and without an old snapshot.
const DRAINED: usize = 200_000;

/// Claims at both depths, in one database.
pub async fn claims(stage: &Stage) {
    let scene = stage.scene("echo").await;
    scene.preload(scene.tenant, scene.task, SHALLOW, b"{}").await;
    scene.settle().await;
    figure("deep.claim.10k", claim(&scene).await, "ms");
    let took = scene.preload(scene.tenant, scene.task, DEEP, b"{}").await;
    figure("deep.preload.1M", DEEP as f64 / took.as_secs_f64(), "/s");
    scene.settle().await;
    figure("deep.claim.1M", claim(&scene).await, "ms");
}

async fn claim(scene: &Scene<'_>) -> f64 {
    let (worker, epoch) = scene.register().await;
    let mut taken = Vec::with_capacity(CLAIMS);
    for _ in 0..CLAIMS {
        let began = Instant::now();
        let claimed = scene.worker.claim(worker, epoch, &[Want::of(scene.tenant, ROWS)]).await.unwrap();
        taken.push(began.elapsed());
        assert_eq!(claimed.len(), ROWS as usize);
    }
    quantile(&mut taken, 0.5)
}

/// The native drain twice: alone, and with a repeatable-read snapshot taken before the preload and held to the end.
pub async fn snapshot(stage: &Stage) {
    for held in [false, true] {
        let scene = stage.scene("echo").await;
        let mut old = scene.admin.acquire().await.unwrap();
        if held {
            for statement in [
                "SET idle_in_transaction_session_timeout = 0",
                "BEGIN ISOLATION LEVEL REPEATABLE READ",
                "SELECT count(*) FROM sandbar.tenants",
            ] {
                sqlx::query(statement).execute(&mut *old).await.unwrap();
            }
        }
        scene.preload(scene.tenant, scene.task, DRAINED, b"{}").await;
        scene.settle().await;
        let took: Duration = scene.drain_natively(DRAINED, 500, 2).await;
        figure(
            if held { "snapshot.held" } else { "snapshot.none" },
            DRAINED as f64 / took.as_secs_f64(),
            "/s",
        );
        if held {
            sqlx::query("ROLLBACK").execute(&mut *old).await.unwrap();
        }
    }
}
