//! The queue alone on a real Postgres: no HTTP, no cells, a native no-op in place of the sandbox. Enqueue rate by batch,
//! drain rate from the first claim to the last durable ack, bytes of WAL per job over its whole life, claim latency with
//! 10 thousand and a million ready, and the drain under an old snapshot that is held open throughout. Prints tables;
//! asserts nothing about time. See docs/performance.md.
//!
//! `cargo bench --bench queue`; SANDBAR_BENCH_JOBS sets the number of jobs (default 200,000).

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

use chrono::{DateTime, Utc};
use sandbar::app::flush::Flusher;
use sandbar::app::signals::Signals;
use sandbar::domain::ids::{InvocationId, TaskId, TenantId, WorkerId};
use sandbar::domain::retry::{RetryPolicy, Verdict};
use sandbar::store::invocation::{InputKind, Spec};
use sandbar::store::queue::{Finished, NewInvocation, Want};
use sandbar::store::worker::Registration;
use sandbar::store::{ApiStore, Connect, WorkerStore};
use sandbar_host::limits::Limits;
use sandbar_host::outcome::{Outcome, Receipt, Termination};
use sqlx::PgPool;

/// Rows of one claim, and of one ack.
const BATCH: i32 = 500;
/// Rows of one bulk enqueue.
const BULK: usize = 1_000;
/// Claimers at once: while one waits for its commit another works.
const CLAIMERS: usize = 3;

struct Bench {
    api: ApiStore,
    worker: WorkerStore,
    admin: PgPool,
    tenant: TenantId,
    task: TaskId,
}

impl Bench {
    fn row(&self) -> NewInvocation {
        NewInvocation {
            tenant: self.tenant,
            id: InvocationId::generate(),
            task: self.task,
            version: 1,
            priority: 0,
            input: b"{\"n\": 1}".to_vec(),
            spec: Spec {
                input: InputKind::Task,
                limits: Limits::default(),
                retry: RetryPolicy::default(),
                retry_of: None,
                scratch: None,
                determinism: None,
                family: None,
                sealed: None,
            },
            tags: Default::default(),
            run_at: None,
            expires_at: None,
            idempotency: None,
            admission: Default::default(),
        }
    }

    async fn register(&self) -> (WorkerId, i64) {
        let registration = Registration {
            worker: WorkerId::generate(),
            epoch: rand::random(),
            host: "bench".to_owned(),
            version: "0".to_owned(),
            slots: 500,
        };
        self.worker.worker_register(&registration).await.unwrap();
        (registration.worker, registration.epoch)
    }

    async fn wal(&self) -> i64 {
        sqlx::query_scalar("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint")
            .fetch_one(&self.admin)
            .await
            .unwrap()
    }

    /// In batches of [`BULK`], by as many callers as flushers. Rate per second.
    async fn fill(self: &Arc<Self>, jobs: usize) -> f64 {
        let left = Arc::new(AtomicUsize::new(jobs / BULK));
        let began = Instant::now();
        let callers = (0..CLAIMERS).map(|_| {
            let (me, left) = (self.clone(), left.clone());
            tokio::spawn(async move {
                while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
                    let rows: Vec<_> = (0..BULK).map(|_| me.row()).collect();
                    me.api.enqueue(&rows, Duration::from_secs(60)).await.unwrap();
                }
            })
        });
        for caller in callers.collect::<Vec<_>>() {
            caller.await.unwrap();
        }
        jobs as f64 / began.elapsed().as_secs_f64()
    }

    /// Claim, do nothing, acknowledge, until `jobs` are done. As a worker does it: from its mark on, and every tenth of
    /// the time from the first. Rate per second.
    async fn drain(self: &Arc<Self>, jobs: usize) -> f64 {
        let done = Arc::new(AtomicUsize::new(0));
        let began = Instant::now();
        let claimers = (0..CLAIMERS).map(|_| {
            let (me, done) = (self.clone(), done.clone());
            tokio::spawn(async move {
                let who = me.register().await;
                let mut mark: Option<DateTime<Utc>> = None;
                let mut look_at = Instant::now();
                while done.load(Ordering::Relaxed) < jobs {
                    let look = Instant::now();
                    let from_the_first = look >= look_at;
                    let after = if from_the_first { None } else { mark };
                    let wanted = [Want { tenant: me.tenant, count: BATCH, after }];
                    let claimed = me.worker.claim(who.0, who.1, &wanted).await.unwrap();
                    if from_the_first {
                        look_at = Instant::now() + look.elapsed() * 9;
                    }
                    mark = claimed.iter().map(|c| c.rank).min().or(mark);
                    let ends: Vec<Finished> = claimed.into_iter().map(no_op).collect();
                    if ends.is_empty() {
                        tokio::task::yield_now().await;
                        continue;
                    }
                    let acks = me.worker.ack(who.0, who.1, &ends).await.unwrap();
                    done.fetch_add(acks.accepted.len(), Ordering::Relaxed);
                }
            })
        });
        for claimer in claimers.collect::<Vec<_>>() {
            claimer.await.unwrap();
        }
        jobs as f64 / began.elapsed().as_secs_f64()
    }
}

fn no_op(claimed: sandbar::store::queue::Claimed) -> Finished {
    Finished {
        claimed,
        verdict: Verdict::Succeeded,
        started_at: Utc::now(),
        outcome: Outcome {
            termination: Termination::Succeeded,
            receipt: Receipt {
                fuel: 1_000,
                fuel_exact: true,
                cpu_ns: 12_000,
                wall_ns: 15_000,
                ..Receipt::default()
            },
            output: b"1".to_vec(),
            content_type: "application/json".to_owned(),
            logs: sandbar_host::log::Log::default(),
            backtrace: Vec::new(),
            artifacts: Vec::new(),
        },
        sealed_log: None,
    }
}

#[tokio::main]
async fn main() {
    // `cargo test --benches` runs this without `--bench`: nothing to measure then.
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    let jobs: usize = std::env::var("SANDBAR_BENCH_JOBS").map_or(200_000, |n| n.parse().unwrap());
    let (postgres, database, _dir) = support::own_postgres().await;
    let connect = |url: String| Connect {
        url,
        max_connections: 8,
        acquire_timeout: Duration::from_secs(5),
        statement_timeout: Duration::from_secs(60),
    };
    let bench = Arc::new(Bench {
        api: ApiStore::connect(&connect(database.api_url())).await.unwrap(),
        worker: WorkerStore::connect(&connect(database.worker_url())).await.unwrap(),
        admin: database.admin().await,
        tenant: TenantId::generate(),
        task: TaskId::generate(),
    });
    for statement in [
        "INSERT INTO sandbar.tenants (tenant_id, name) SELECT $1, 'bench' WHERE $2 IS NOT NULL",
        "INSERT INTO sandbar.tasks (tenant_id, task_id, name, current_version) VALUES ($1, $2, 'no-op', 1)",
        "INSERT INTO sandbar.blobs (tenant_id, sha256, bytes) SELECT $1, sha256('m'), 'm' WHERE $2 IS NOT NULL",
        "INSERT INTO sandbar.versions (tenant_id, task_id, number, sha256, size_bytes, kind, state)
         VALUES ($1, $2, 1, sha256('m'), 1, 'task', 'ready')",
    ] {
        sqlx::query(statement).bind(bench.tenant).bind(bench.task).execute(&bench.admin).await.unwrap();
    }

    // Warm up: plans, caches, table sizes.
    bench.fill(BULK * 10).await;
    bench.drain(BULK * 10).await;
    sqlx::raw_sql("CHECKPOINT").execute(&bench.admin).await.unwrap();

    let start = bench.wal().await;
    let enqueue = bench.fill(jobs).await;
    let middle = bench.wal().await;
    let drain = bench.drain(jobs).await;
    let end = bench.wal().await;
    println!("{:<52} {enqueue:>10.0} /s", format!("enqueue, batches of {BULK}"));
    println!("{:<52} {drain:>10.0} /s", format!("drain of no-ops, {CLAIMERS} claimers, batches of {BATCH}"));
    println!("{:<52} {:>10.0} B", "WAL per job: enqueue", (middle - start) as f64 / jobs as f64);
    println!("{:<52} {:>10.0} B", "WAL per job: claim and ack", (end - middle) as f64 / jobs as f64);
    println!("{:<52} {:>10.0} B", "WAL per job: whole life", (end - start) as f64 / jobs as f64);

    // Single rows through the group commit, without HTTP.
    for callers in [1usize, 64, 256] {
        let signals = Signals::new();
        let flusher = Flusher::start(&bench.api, &signals, Duration::from_secs(60));
        let total = if callers == 1 { 2_000 } else { jobs / 4 };
        let left = Arc::new(AtomicUsize::new(total));
        let began = Instant::now();
        let tasks: Vec<_> = (0..callers)
            .map(|_| {
                let (bench, left, flusher) = (bench.clone(), left.clone(), flusher.clone());
                tokio::spawn(async move {
                    while left
                        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
                        .is_ok()
                    {
                        flusher.enqueue(bench.row()).await.unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        let rate = total as f64 / began.elapsed().as_secs_f64();
        flusher.shutdown().await;
        println!("{:<52} {rate:>10.0} /s", format!("enqueue one by one, {callers} callers, group commit"));
        bench.drain(total).await;
    }

    // The same drain while somebody holds a snapshot from before.
    bench.fill(jobs).await;
    let mut old = bench.admin.begin().await.unwrap();
    sqlx::raw_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM sandbar.tenants")
        .execute(&mut *old)
        .await
        .unwrap();
    let held = bench.drain(jobs).await;
    old.rollback().await.unwrap();
    println!("{:<52} {held:>10.0} /s", "drain while an old snapshot is held");
    println!("{:<52} {:>10.2}", "  of the drain without it", held / drain);

    // Claims of 100 with few and with many ready; each is undone, so that the queue stays as it is.
    for ready in [10_000i64, 1_000_000] {
        sqlx::raw_sql("DELETE FROM sandbar.ready; VACUUM sandbar.ready").execute(&bench.admin).await.unwrap();
        sqlx::query(
            "INSERT INTO sandbar.ready (tenant_id, rank, invocation_id, attempt, spent)
             SELECT $1, now() + n * interval '1 ms', gen_random_uuid(), 1, 0 FROM generate_series(1, $2) n",
        )
        .bind(bench.tenant)
        .bind(ready)
        .execute(&bench.admin)
        .await
        .unwrap();
        sqlx::raw_sql("VACUUM ANALYZE sandbar.ready").execute(&bench.admin).await.unwrap();
        let (worker, epoch) = bench.register().await;
        let mut times = Vec::new();
        for _ in 0..300 {
            let mut tx = bench.admin.begin().await.unwrap();
            sqlx::raw_sql("SET LOCAL search_path = sandbar").execute(&mut *tx).await.unwrap();
            let began = Instant::now();
            sqlx::query("SELECT slot FROM claim($1, $2, gen_random_uuid(), ARRAY[$3], ARRAY[100], ARRAY['-infinity'::timestamptz])")
                .bind(worker)
                .bind(epoch)
                .bind(bench.tenant)
                .execute(&mut *tx)
                .await
                .unwrap();
            times.push(began.elapsed());
            tx.rollback().await.unwrap();
        }
        times.sort();
        println!(
            "{:<52} {:>10.2} ms",
            format!("claim of 100, {ready} ready, p50"),
            times[times.len() / 2].as_secs_f64() * 1e3
        );
    }
    postgres.stop().await.unwrap();
}
