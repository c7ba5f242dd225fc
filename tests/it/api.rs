//! The API through HTTP on a real Postgres. The server runs in this process, and the test is its own worker and
//! compiler: so every state between two steps can be looked at.

mod access;
mod audit;
mod batch;
mod bulk;
mod dead_letter;
mod depth;
mod document;
mod edge;
mod flush;
mod follow;
mod invocation_changes;
mod invoke;
mod issuer;
mod key_quotas;
mod keys;
mod logs;
mod oidc;
mod operate;
mod people;
mod quota;
mod quota_counters;
mod read;
mod reset;
mod retention;
mod sealed;
mod secret;
mod spending;
mod strangers;
mod task_changes;
mod upload;
mod usage;
mod waiting_quotas;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use reqwest::Method;
use sandbar::app::sealed::keys::Keys;
use sandbar::app::signals::{self, Signals};
use sandbar::app::{App, Settings};
use sandbar::domain::ids::{KeyId, TaskId, TenantId, WorkerId};
use sandbar::domain::retry::Verdict;
use sandbar::store::queue::{Acked, Claimed, Finished, Want};
use sandbar::store::tenant::key_hash;
use sandbar::store::worker::Registration;
use sandbar::store::{ApiStore, Connect, WorkerStore};
use sandbar_host::outcome::{Frame, LogLevel, LogRecord, Outcome, Receipt, Termination, TrapKind};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::support::{self, ADMIN_KEY, Answer, Client, Database};

/// Key of the second tenant.
const OTHER_KEY: &str = "sbk_the-key-of-somebody-else";
/// Longest wait for anything that should happen soon.
const SOON: Duration = Duration::from_secs(10);

/// A server with two tenants and no tasks.
struct Api {
    client: Client,
    app: App,
    store: ApiStore,
    worker: WorkerStore,
    admin: PgPool,
    signals: Arc<Signals>,
    tenant: TenantId,
    stop: CancellationToken,
    _serving: Vec<AbortOnDropHandle<()>>,
}

fn connect(url: String) -> Connect {
    Connect {
        url,
        max_connections: 8,
        acquire_timeout: Duration::from_secs(2),
        statement_timeout: Duration::from_secs(10),
    }
}

impl Api {
    async fn start() -> Self {
        Self::on(&support::database().await, Settings::default()).await
    }

    async fn on(database: &Database, settings: Settings) -> Self {
        let admin = database.admin().await;
        // The first key is the platform's, as the bootstrap makes it; the second a tenant's admin.
        let tenants = [
            (TenantId::generate(), "one", ADMIN_KEY, "platform"),
            (TenantId::generate(), "two", OTHER_KEY, "admin"),
        ];
        for (tenant, name, key, role) in tenants {
            sqlx::query("INSERT INTO sandbar.tenants (tenant_id, name) VALUES ($1, $2)")
                .bind(tenant)
                .bind(name)
                .execute(&admin)
                .await
                .unwrap();
            sqlx::query("INSERT INTO sandbar.api_keys (tenant_id, key_id, prefix, hash, role) VALUES ($1, $2, 'sbk', $3, $4)")
                .bind(tenant)
                .bind(KeyId::generate())
                .bind(key_hash(key).as_slice())
                .bind(role)
                .execute(&admin)
                .await
                .unwrap();
        }
        let store = ApiStore::connect(&connect(database.api_url())).await.unwrap();
        let signals = Signals::new();
        let stop = CancellationToken::new();
        let app = App::new(store.clone(), signals.clone(), settings).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let router = sandbar::api::router(app.clone());
        let listening = signals::listen(store.clone(), signals.clone(), stop.clone());
        Self {
            client: Client::new(&base),
            app,
            store,
            worker: WorkerStore::connect(&connect(database.worker_url())).await.unwrap(),
            admin,
            signals,
            tenant: tenants[0].0,
            stop,
            _serving: vec![
                AbortOnDropHandle::new(tokio::spawn(async move {
                    axum::serve(listener, router.into_make_service_with_connect_info::<SocketAddr>())
                        .await
                        .unwrap();
                })),
                AbortOnDropHandle::new(tokio::spawn(listening)),
            ],
        }
    }

    /// Another server on the same database, until the handle is dropped.
    async fn beside(&self, settings: Settings) -> (Client, AbortOnDropHandle<()>) {
        let app = App::new(self.store.clone(), Signals::new(), settings).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = Client::new(format!("http://{}", listener.local_addr().unwrap()));
        let service = sandbar::api::router(app).into_make_service_with_connect_info::<SocketAddr>();
        let serving = tokio::spawn(async move { axum::serve(listener, service).await.unwrap() });
        (client, AbortOnDropHandle::new(serving))
    }

    /// A task whose version 1 is ready, put there past the API. `manifest` is what its module would say of itself.
    async fn task(&self, name: &str, kind: &str, manifest: &Value) -> TaskId {
        let task = TaskId::generate();
        for statement in [
            "INSERT INTO sandbar.tasks (tenant_id, task_id, name, current_version) SELECT $1, $2, $3, 1 WHERE $4 <> '' AND $5::jsonb IS NOT NULL",
            "INSERT INTO sandbar.blobs (tenant_id, sha256, bytes) SELECT $1, sha256($3::text::bytea), 'm' WHERE $2 IS NOT NULL AND $4 <> '' AND $5::jsonb IS NOT NULL",
            "INSERT INTO sandbar.versions (tenant_id, task_id, number, sha256, size_bytes, kind, state, manifest)
             VALUES ($1, $2, 1, sha256($3::text::bytea), 1, $4, 'ready', $5)",
        ] {
            sqlx::query(statement)
                .bind(self.tenant)
                .bind(task)
                .bind(name)
                .bind(kind)
                .bind(manifest)
                .execute(&self.admin)
                .await
                .unwrap();
        }
        task
    }

    async fn echo(&self) -> TaskId {
        self.task("echo", "task", &json!({})).await
    }

    /// Suspends the first tenant, or lets it be active again: nobody may do that to their own through the API.
    async fn set_state(&self, state: &str) {
        sqlx::query("UPDATE sandbar.tenants SET state = $1 WHERE name = 'one'")
            .bind(state)
            .execute(&self.admin)
            .await
            .unwrap();
    }

    fn as_other(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client.anonymous(method, path).header("x-api-key", OTHER_KEY)
    }

    /// Says what the compiler would say of everything that waits for it.
    async fn compile(&self) {
        while let Some(v) = self.worker.version_to_compile(Duration::from_secs(60), 64).await.unwrap() {
            assert!(self.worker.version_ready(v.tenant, v.task, v.number).await.unwrap());
        }
        self.signals.version_changed();
    }

    /// A worker that is only a row.
    async fn register(&self) -> (WorkerId, i64) {
        let registration = Registration {
            worker: WorkerId::generate(),
            epoch: rand::random(),
            host: "test".to_owned(),
            version: "0".to_owned(),
            slots: 8,
        };
        self.worker.worker_register(&registration).await.unwrap();
        (registration.worker, registration.epoch)
    }

    /// Claims one attempt as soon as there is one.
    async fn claim(&self, (worker, epoch): (WorkerId, i64)) -> Claimed {
        support::eventually(SOON, "something to claim", async || {
            self.worker.claim(worker, epoch, &[Want::of(self.tenant, 1)]).await.unwrap().pop()
        })
        .await
    }

    /// Claims one attempt if there is one now.
    async fn try_claim(&self, (worker, epoch): (WorkerId, i64)) -> Vec<Claimed> {
        self.worker.claim(worker, epoch, &[Want::of(self.tenant, 1)]).await.unwrap()
    }

    /// Does what waits as bulk operations, as the duty would.
    async fn bulk_turns(&self) {
        self.worker.duty_announce("bulk", SOON).await.unwrap();
        let me = WorkerId::generate();
        let held = self.worker.duty_hold("bulk", me, SOON, true).await.unwrap().unwrap();
        loop {
            let (_, again) = self.app.bulk_turn(&held, &self.worker).await.unwrap();
            match again {
                None => break,
                Some(wait) => tokio::time::sleep(wait).await,
            }
        }
        self.worker.duties_release(me).await.unwrap();
    }

    /// Says of new dead letters what kind of failure they are, as the duty would.
    async fn classify(&self) -> sandbar::store::Result<u64> {
        sandbar::app::dead_letter::classify(&self.worker, &self.keys()).await
    }

    /// The data keys, as a worker has them.
    fn keys(&self) -> Keys {
        Keys::new(self.worker.clone(), Arc::clone(&self.app.settings().vault))
    }

    async fn ack(&self, (worker, epoch): (WorkerId, i64), finished: Finished) -> Acked {
        let acked = self.worker.ack(worker, epoch, &[finished]).await.unwrap().accepted;
        acked[0]
    }
}

/// How a test's attempt ends: well, with its input as output.
fn success(claimed: Claimed) -> Finished {
    let output = claimed.input.clone();
    Finished {
        claimed,
        verdict: Verdict::Succeeded,
        started_at: Utc::now(),
        outcome: Outcome {
            termination: Termination::Succeeded,
            receipt: Receipt { fuel: 7, fuel_exact: true, peak_memory_bytes: 65_536, ..Receipt::default() },
            output,
            content_type: "application/json".to_owned(),
            logs: [record("one"), record("two")].iter().collect(),
            backtrace: Vec::new(),
            artifacts: Vec::new(),
        },
        sealed_log: None,
    }
}

/// How a test's attempt ends: badly.
fn trapped(claimed: Claimed, verdict: Verdict) -> Finished {
    let mut finished = success(claimed);
    finished.verdict = verdict;
    finished.outcome.output = Vec::new();
    finished.outcome.termination =
        Termination::Trap { kind: TrapKind::Unreachable, message: "unreachable".to_owned() };
    finished.outcome.backtrace =
        vec![Frame { function: "guest::work".to_owned(), file: None, line: Some(3), module_offset: None }];
    finished
}

fn record(message: &str) -> LogRecord {
    LogRecord {
        at_us: 5,
        level: LogLevel::Info,
        target: "guest".to_owned(),
        message: message.to_owned(),
        fields: vec![("k".to_owned(), "v".to_owned())],
    }
}

/// The code of a problem, after checking that it is one.
#[track_caller]
fn problem(answer: &Answer, status: u16) -> String {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text());
    assert_eq!(answer.headers["content-type"], "application/problem+json");
    let body = answer.json();
    assert_eq!(body["status"], status);
    let code = body["code"].as_str().unwrap().to_owned();
    assert_eq!(body["type"], format!("/errors/{code}"));
    assert!(!body["title"].as_str().unwrap().is_empty() && !body["detail"].as_str().unwrap().is_empty());
    code
}

/// The pointers of a problem's errors.
#[track_caller]
fn pointers(answer: &Answer) -> Vec<String> {
    let body = answer.json();
    let errors = body["errors"].as_array().unwrap_or_else(|| panic!("no errors in {body}"));
    errors.iter().map(|e| e["pointer"].as_str().unwrap().to_owned()).collect()
}
