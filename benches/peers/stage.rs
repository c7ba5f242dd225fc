//! What all sections stand on: one Postgres, a fresh database for each measurement, Sandbar's processes on it, and
//! preloading without HTTP.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use sandbar::dev::EmbeddedPostgres;
use sandbar::domain::ids::{InvocationId, TaskId, TenantId, WorkerId};
use sandbar::domain::retry::{RetryPolicy, Verdict};
use sandbar::store::invocation::{InputKind, Spec};
use sandbar::store::queue::{Claimed, Finished, NewInvocation, Want};
use sandbar::store::worker::Registration;
use sandbar::store::{ApiStore, Connect, WorkerStore};
use sandbar_host::limits::Limits;
use sandbar_host::outcome::{Outcome, Receipt, Termination};
use sqlx::PgPool;
use tempfile::TempDir;

use crate::support::{self, ADMIN_KEY, Client, Database, Process};

/// Rows of one preloading statement.
const BATCH: usize = 1_000;
/// Longest drain.
pub const LIMIT: Duration = Duration::from_secs(240);

/// The Postgres of the run.
pub struct Stage {
    postgres: EmbeddedPostgres,
    dir: TempDir,
}

impl Stage {
    /// Starts it.
    pub async fn build() -> Self {
        let (postgres, _, dir) = support::own_postgres().await;
        Self { postgres, dir }
    }

    /// Stops it.
    pub async fn close(self) {
        self.postgres.stop().await.unwrap();
    }

    /// A fresh database with one tenant that has uploaded a task.
    pub async fn scene(&self, guest: &str) -> Scene<'_> {
        let database = support::fresh(&self.postgres).await;
        let connect = |url: String| Connect {
            url,
            max_connections: 8,
            acquire_timeout: Duration::from_secs(10),
            statement_timeout: Duration::from_secs(60),
        };
        let mut scene = Scene {
            admin: database.admin().await,
            api: ApiStore::connect(&connect(database.api_url())).await.unwrap(),
            worker: WorkerStore::connect(&connect(database.worker_url())).await.unwrap(),
            stage: self,
            database,
            tenant: TenantId::generate(),
            task: TaskId::generate(),
        };
        let mut server = scene.spawn("server", &[]);
        let client = Client::new(format!("http://{}", server.address().await));
        server.ready(&client).await;
        client.upload("work", &support::guest(guest)).await.expect(201);
        server.terminate().await;
        (scene.tenant, scene.task) = sqlx::query_as("SELECT tenant_id, task_id FROM sandbar.tasks")
            .fetch_one(&scene.admin)
            .await
            .unwrap();
        scene
    }

    /// A peer's own database, as the variables by which every client of Postgres finds it.
    pub async fn peer(&self, name: &str) -> Vec<(&'static str, String)> {
        let database = support::fresh(&self.postgres).await;
        let admin = database.admin().await;
        sqlx::query("CHECKPOINT").execute(&admin).await.unwrap();
        let url = database.admin_url();
        let options: sqlx::postgres::PgConnectOptions = url.parse().unwrap();
        let (_, rest) = url.split_once("://sandbar:").unwrap();
        let (password, _) = rest.split_once('@').unwrap();
        vec![
            ("PGHOST", options.get_socket().unwrap().display().to_string()),
            ("PGPORT", options.get_port().to_string()),
            ("PGUSER", options.get_username().to_owned()),
            ("PGPASSWORD", password.to_owned()),
            ("PGDATABASE", database.name().to_owned()),
            ("PGSSLMODE", "disable".to_owned()),
            ("PGAPPNAME", name.to_owned()),
        ]
    }
}

/// A database and what works on it.
pub struct Scene<'a> {
    stage: &'a Stage,
    pub database: Database,
    pub admin: PgPool,
    pub api: ApiStore,
    pub worker: WorkerStore,
    pub tenant: TenantId,
    pub task: TaskId,
}

impl Scene<'_> {
    /// One of Sandbar's roles. All share a data directory, so compiled code is there.
    pub fn spawn(&self, role: &str, more: &[(&'static str, String)]) -> Process {
        let mut variables = vec![
            ("SANDBAR_DATABASE__URL", self.database.admin_url()),
            ("SANDBAR_DATABASE__API_URL", self.database.api_url()),
            ("SANDBAR_DATABASE__WORKER_URL", self.database.worker_url()),
            ("SANDBAR_SERVER__ADMIN_KEY", ADMIN_KEY.to_owned()),
            ("SANDBAR_SERVER__LISTEN", "127.0.0.1:0".to_owned()),
            ("SANDBAR_DATA_DIR", self.stage.dir.path().join("data").display().to_string()),
            ("SANDBAR_LOG__FILTER", "warn,sandbar::server=info".to_owned()),
        ];
        variables.extend_from_slice(more);
        Process::spawn(role, self.stage.dir.path(), &[role], &variables)
    }

    /// One that is ready for callers, with its address.
    pub async fn serve(&self, role: &str, more: &[(&'static str, String)]) -> (Process, String) {
        let mut process = self.spawn(role, more);
        let address = process.address().await;
        process.ready(&Client::new(format!("http://{address}"))).await;
        (process, address)
    }

    /// An invocation of a tenant's task.
    pub fn row(&self, tenant: TenantId, task: TaskId, input: &[u8]) -> NewInvocation {
        NewInvocation {
            tenant,
            id: InvocationId::generate(),
            task,
            version: 1,
            priority: 0,
            input: input.to_vec(),
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
            tags: BTreeMap::new(),
            run_at: None,
            expires_at: None,
            idempotency: None,
            admission: Default::default(),
        }
    }

    /// Queues that many of one tenant in batches of a thousand, two at a time; says how long it took.
    pub async fn preload(&self, tenant: TenantId, task: TaskId, count: usize, input: &[u8]) -> Duration {
        let began = Instant::now();
        let lane = async |count: usize| {
            let mut left = count;
            while left > 0 {
                let size = left.min(BATCH);
                left -= size;
                let rows: Vec<_> = (0..size).map(|_| self.row(tenant, task, input)).collect();
                self.api.enqueue(&rows, Duration::from_secs(60)).await.unwrap();
            }
        };
        tokio::join!(lane(count / 2), lane(count - count / 2));
        began.elapsed()
    }

    /// Everything written so far is on disk, so that no checkpoint of it disturbs what is measured next.
    pub async fn settle(&self) {
        sqlx::query("CHECKPOINT").execute(&self.admin).await.unwrap();
    }

    /// Waits until nothing is queued and nothing runs.
    pub async fn drained(&self) {
        support::eventually(LIMIT, "the queue to drain", async || {
            let busy: bool = sqlx::query_scalar(
                "SELECT EXISTS (SELECT 1 FROM sandbar.ready) OR EXISTS (SELECT 1 FROM sandbar.leases)
                     OR EXISTS (SELECT 1 FROM sandbar.scheduled)",
            )
            .fetch_one(&self.admin)
            .await
            .unwrap();
            (!busy).then_some(())
        })
        .await;
    }

    /// Attempts per second, from the first claim to the last durable end.
    pub async fn rate(&self) -> f64 {
        sqlx::query_scalar(
            "SELECT count(*) / extract(epoch FROM max(finished_at) - min(started_at))::float8 FROM sandbar.attempts",
        )
        .fetch_one(&self.admin)
        .await
        .unwrap()
    }

    /// Become a worker in this process.
    pub async fn register(&self) -> (WorkerId, i64) {
        let registration = Registration {
            worker: WorkerId::generate(),
            epoch: rand::random(),
            host: "bench".to_owned(),
            version: "0".to_owned(),
            slots: 1_000,
        };
        self.worker.worker_register(&registration).await.unwrap();
        (registration.worker, registration.epoch)
    }

    /// Claims batches and acknowledges them at once, in lanes side by side, until nothing is left: the queue alone.
    /// Says how long it took.
    pub async fn drain_natively(&self, count: usize, batch: i32, lanes: usize) -> Duration {
        let (worker, epoch) = self.register().await;
        let left = AtomicUsize::new(count);
        // As a worker does it: from its mark on, and a tenth of the time from the first.
        let lane = async || {
            let (mut mark, mut look_at) = (None, Instant::now());
            while left.load(Ordering::Relaxed) > 0 {
                let began = Instant::now();
                let looks = began >= look_at;
                let after = if looks { None } else { mark };
                let wanted = [Want { tenant: self.tenant, count: batch, after }];
                let claimed = self.worker.claim(worker, epoch, &wanted).await.unwrap();
                if looks {
                    look_at = Instant::now() + began.elapsed() * 9;
                }
                mark = claimed.iter().map(|c| c.rank).min().or(mark);
                if claimed.is_empty() {
                    tokio::task::yield_now().await;
                    continue;
                }
                let ends: Vec<_> = claimed.into_iter().map(succeeded).collect();
                let acks = self.worker.ack(worker, epoch, &ends).await.unwrap();
                left.fetch_sub(acks.accepted.len(), Ordering::Relaxed);
            }
        };
        let began = Instant::now();
        futures_util::future::join_all((0..lanes).map(|_| lane())).await;
        began.elapsed()
    }
}

fn succeeded(claimed: Claimed) -> Finished {
    Finished {
        claimed,
        verdict: Verdict::Succeeded,
        started_at: chrono::Utc::now(),
        outcome: Outcome {
            termination: Termination::Succeeded,
            receipt: Receipt { fuel_exact: true, ..Receipt::default() },
            output: b"null".to_vec(),
            content_type: "application/json".to_owned(),
            logs: sandbar_host::log::Log::default(),
            backtrace: Vec::new(),
            artifacts: Vec::new(),
        },
        sealed_log: None,
    }
}
