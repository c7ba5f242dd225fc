//! Fairness: many small tenants behind a large one, and CPU time by weight.

use sandbar::domain::ids::{TaskId, TenantId};

use crate::figure;
use crate::stage::{Scene, Stage};

/// What the large tenant has queued.
const LARGE: usize = 100_000;
/// Small tenants, and what each has queued.
const SMALL: (usize, usize) = (999, 5);
/// Weights of the tenants that compete.
const WEIGHTS: [u32; 3] = [100, 200, 400];
/// Turns of the guest's loop in an attempt that costs one: about a millisecond.
const TURNS: u64 = 400_000;
/// How long they compete. The first second does not count: the first claims know no costs.
const SECONDS: u64 = 9;
/// Attempts queued per tenant: more than it can have run by then.
const BACKLOG: usize = 20_000;
/// Attempts at once of the worker.
const SLOTS: u32 = 512;

/// One tenant with 100k queued, and 999 with 5 that come after it; then one tenant with as many in all.
pub async fn tenants(stage: &Stage) {
    let scene = stage.scene("echo").await;
    scene.preload(scene.tenant, scene.task, LARGE, b"{}").await;
    let small = more_tenants(&scene, SMALL.0).await;
    let rows: Vec<_> = (0..SMALL.1)
        .flat_map(|_| small.iter().map(|(tenant, task)| scene.row(*tenant, *task, b"{}")))
        .collect();
    for rows in rows.chunks(1_000) {
        scene.api.enqueue(rows, std::time::Duration::from_secs(60)).await.unwrap();
    }
    drain(&scene).await;
    figure("fair.rate", scene.rate().await, "/s");
    let last: f64 = sqlx::query_scalar(
        "SELECT extract(epoch FROM max(first) - min(first))::float8
         FROM (SELECT min(started_at) AS first FROM sandbar.attempts GROUP BY tenant_id) AS t",
    )
    .fetch_one(&scene.admin)
    .await
    .unwrap();
    figure("fair.last", last, "s");

    let scene = stage.scene("echo").await;
    scene.preload(scene.tenant, scene.task, LARGE + SMALL.0 * SMALL.1, b"{}").await;
    drain(&scene).await;
    figure("fair.fifo", scene.rate().await, "/s");
}

async fn drain(scene: &Scene<'_>) {
    scene.settle().await;
    let worker = scene.spawn("worker", &[("SANDBAR_WORKER__SLOTS", SLOTS.to_string())]);
    scene.drained().await;
    worker.terminate().await;
}

/// CPU time of tenants with weights 1:2:4 that all have more work than there is time for: once with the same cost per
/// attempt, and once where the least weighty has the dearest attempts.
pub async fn weights(stage: &Stage) {
    for (name, costs) in [("equal", [1, 1, 1]), ("unequal", [4, 2, 1])] {
        let scene = stage.scene("clock").await;
        let mut who = vec![(scene.tenant, scene.task)];
        who.extend(more_tenants(&scene, WEIGHTS.len() - 1).await);
        for (((tenant, task), weight), cost) in who.iter().zip(WEIGHTS).zip(costs) {
            sqlx::query("UPDATE sandbar.tenants SET weight = $2 WHERE tenant_id = $1")
                .bind(tenant)
                .bind(weight as i32)
                .execute(&scene.admin)
                .await
                .unwrap();
            let input = format!("{{\"turns\":{}}}", TURNS * cost);
            scene.preload(*tenant, *task, BACKLOG, input.as_bytes()).await;
        }
        scene.settle().await;
        let worker = scene.spawn("worker", &[("SANDBAR_WORKER__SLOTS", "64".to_owned())]);
        tokio::time::sleep(std::time::Duration::from_secs(SECONDS)).await; // the time that is measured
        worker.kill_9();
        let used: Vec<(TenantId, i64)> = sqlx::query_as(
            "SELECT tenant_id, sum(cpu_ns)::int8 FROM sandbar.attempts
             WHERE finished_at > (SELECT min(started_at) + interval '1 s' FROM sandbar.attempts) GROUP BY tenant_id",
        )
        .fetch_all(&scene.admin)
        .await
        .unwrap();
        let total: i64 = used.iter().map(|(_, ns)| ns).sum();
        let weights: u32 = WEIGHTS.iter().sum();
        let mut worst = 0f64;
        for ((tenant, _), weight) in who.iter().zip(WEIGHTS) {
            let ns = used.iter().find(|(t, _)| t == tenant).map_or(0, |(_, ns)| *ns);
            let share = ns as f64 / total.max(1) as f64;
            let due = f64::from(weight) / f64::from(weights);
            figure(&format!("weights.{name}.share.{weight}"), share * 100.0, "%");
            worst = worst.max((share / due - 1.0).abs() * 100.0);
        }
        let left: i64 = sqlx::query_scalar(
            "SELECT min(n) FROM (SELECT count(*) AS n FROM sandbar.ready GROUP BY tenant_id) AS t",
        )
        .fetch_one(&scene.admin)
        .await
        .unwrap();
        assert!(left > 0, "a tenant ran dry: the shares mean nothing");
        figure(&format!("weights.{name}"), worst, "%");
    }
}

/// Further tenants with the first one's module under the same task.
async fn more_tenants(scene: &Scene<'_>, count: usize) -> Vec<(TenantId, TaskId)> {
    let (tenants, tasks): (Vec<_>, Vec<_>) =
        (0..count).map(|_| (TenantId::generate(), TaskId::generate())).unzip();
    let mut at_once = scene.admin.begin().await.unwrap();
    for statement in [
        "INSERT INTO sandbar.tenants (tenant_id, name) SELECT t, 'tenant-' || n
           FROM unnest($1::uuid[], $2::uuid[]) WITH ORDINALITY AS u(t, k, n)",
        "INSERT INTO sandbar.blobs (tenant_id, sha256, bytes) SELECT t, b.sha256, b.bytes
           FROM unnest($1::uuid[], $2::uuid[]) AS u(t, k), (SELECT * FROM sandbar.blobs LIMIT 1) AS b",
        "INSERT INTO sandbar.tasks (tenant_id, task_id, name, current_version) SELECT t, k, 'work', 1
           FROM unnest($1::uuid[], $2::uuid[]) AS u(t, k)",
        "INSERT INTO sandbar.versions (tenant_id, task_id, number, sha256, size_bytes, kind, state)
           SELECT t, k, 1, v.sha256, v.size_bytes, v.kind, v.state
           FROM unnest($1::uuid[], $2::uuid[]) AS u(t, k), (SELECT * FROM sandbar.versions LIMIT 1) AS v",
    ] {
        sqlx::query(statement).bind(&tenants).bind(&tasks).execute(&mut *at_once).await.unwrap();
    }
    at_once.commit().await.unwrap();
    tenants.into_iter().zip(tasks).collect()
}
