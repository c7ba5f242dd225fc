//! What access costs: authentication of a cached key, row-level security on one invocation by its id, 10,000 tenants with ten
//! keys each, and sealed payloads. One caller, one request after the other, so that a median is a path and no queue; what is
//! compared takes turns within one run. Prints a table; asserts nothing about time. See docs/performance.md.
//!
//! `cargo bench --bench access`; SANDBAR_BENCH_ROUNDS sets the requests of each kind (default 2,000).

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

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::Method;
use sandbar::app::signals::Signals;
use sandbar::app::vault::{KEY_BYTES, Vault};
use sandbar::app::{App, Settings};
use sandbar::domain::ids::{InvocationId, TenantId};
use sandbar::store::{ApiStore, Connect};
use serde_json::json;
use sqlx::PgPool;
use support::{Client, send};

/// Tenants of the large installation, and keys of each.
const TENANTS: i64 = 10_000;
const KEYS: i64 = 10;

fn connect(url: String) -> Connect {
    Connect {
        url,
        max_connections: 4,
        acquire_timeout: Duration::from_secs(5),
        statement_timeout: Duration::from_secs(60),
    }
}

/// Tenants from `from` to `to`, each with its keys. The key of tenant 3, number 7, is `sbk_bench-3-7`.
async fn tenants(admin: &PgPool, from: i64, to: i64) {
    for statement in [
        "INSERT INTO sandbar.tenants (tenant_id, name) SELECT gen_random_uuid(), 'bench-' || t FROM generate_series($1, $2) t",
        "INSERT INTO sandbar.api_keys (tenant_id, key_id, prefix, hash, role, name)
         SELECT n.tenant_id, gen_random_uuid(), 'sbk', sha256(convert_to('sbk_' || n.name || '-' || k, 'UTF8')), 'admin', 'bench'
         FROM sandbar.tenants n, generate_series(1, 10) k, generate_series($1, $2) t WHERE n.name = 'bench-' || t",
    ] {
        sqlx::query(statement).bind(from).bind(to - 1).execute(admin).await.unwrap();
    }
    sqlx::raw_sql("ANALYZE").execute(admin).await.unwrap();
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}

/// Requests in turn, one of each kind after the other; the median of each in µs.
async fn in_turn<const N: usize>(rounds: usize, mut ask: impl AsyncFnMut(usize, usize)) -> [f64; N] {
    let mut times: [Vec<Duration>; N] = std::array::from_fn(|_| Vec::with_capacity(rounds));
    for round in 0..rounds + rounds / 10 {
        for (kind, times) in times.iter_mut().enumerate() {
            let began = Instant::now();
            ask(round, kind).await;
            // The first tenth warms what is to be warm.
            if round >= rounds / 10 {
                times.push(began.elapsed());
            }
        }
    }
    times.map(|mut times| median(&mut times))
}

struct Bench {
    client: Client,
    app: App,
    admin: PgPool,
    rounds: usize,
}

impl Bench {
    async fn status(&self, key: Option<&str>, method: Method, path: &str) -> u16 {
        let mut request = self.client.anonymous(method, path);
        if let Some(key) = key {
            request = request.header("x-api-key", key);
        }
        send(request).await.status.as_u16()
    }

    /// Two requests that are refused for what they ask and touch no database: one by the guard's way, one that stands
    /// before it.
    async fn authentication(&self) {
        let [open, guarded] = in_turn(self.rounds, async |_, kind| {
            let (key, path) = [(None, "/nowhere"), (Some("sbk_bench-0-1"), "/v1/invocations/none")][kind];
            assert_eq!(self.status(key, Method::GET, path).await, 404);
        })
        .await;
        let mut alone = Vec::new();
        for _ in 0..self.rounds * 10 {
            let began = Instant::now();
            assert!(self.app.authenticate("sbk_bench-0-1").await.unwrap().is_some());
            alone.push(began.elapsed());
        }
        println!("| a request that is refused without a database, no credential | {open:.0} µs | |");
        println!(
            "| the same behind the guard, key remembered | {guarded:.0} µs | +{:.0} µs |",
            guarded - open
        );
        println!("| of it looking the key up in memory | {:.1} µs | |", median(&mut alone));
    }

    /// One invocation by its id: as the API's role with the tenant set for it and reset, and on a connection that stays.
    async fn row_level_security(
        &self,
        (api, bypass): (&ApiStore, &ApiStore),
        tenant: TenantId,
        id: InvocationId,
    ) {
        let mut kept = api.tenant(tenant).await.unwrap();
        let mut free = bypass.tenant(tenant).await.unwrap();
        // As who logged in: the superuser of the bench's cluster.
        sqlx::query("SET ROLE NONE").execute(&mut *free).await.unwrap();
        let [plain, policies, built] = in_turn(self.rounds, async |_, kind| {
            let found = match kind {
                0 => free.invocation_get(id, 65_536).await,
                1 => kept.invocation_get(id, 65_536).await,
                _ => api.tenant(tenant).await.unwrap().invocation_get(id, 65_536).await,
            };
            assert!(found.unwrap().is_some());
        })
        .await;
        let over = |time: f64| format!("{:+.0}%", (time / plain - 1.0) * 100.0);
        println!("| get by id, a role that bypasses the policies, the connection kept | {plain:.0} µs | |");
        println!("| the API's role, the connection kept | {policies:.0} µs | {} |", over(policies));
        println!(
            "| as built: a connection of the tenant taken and given back | {built:.0} µs | {} |",
            over(built)
        );
    }

    /// `GET /v1/me` of keys that are seen for the first time, and for the second.
    async fn keys(&self, what: &str, tenants: i64) {
        let count = self.rounds.min(usize::try_from(tenants * (KEYS - 1)).unwrap());
        // Spread over all tenants, and none twice; the first keys are for the other measurements.
        let step = usize::try_from(tenants * (KEYS - 1)).unwrap() / count;
        let key = |n: usize| {
            let n = i64::try_from(n * step).unwrap();
            format!("sbk_bench-{}-{}", n % tenants, n / tenants + 2)
        };
        let mut medians = Vec::new();
        for _ in 0..2 {
            let mut times = Vec::with_capacity(count);
            for n in 0..count {
                let began = Instant::now();
                assert_eq!(self.status(Some(&key(n)), Method::GET, "/v1/me").await, 200, "{}", key(n));
                times.push(began.elapsed());
            }
            medians.push(median(&mut times));
        }
        println!(
            "| `GET /v1/me`, {what}: key seen first, and again | {:.0}, {:.0} µs | |",
            medians[0], medians[1]
        );
    }

    /// Submitting and reading, plain and sealed.
    async fn sealing(&self, names: [&str; 2]) {
        let body = json!({"input": {"text": "x".repeat(1_000)}, "delay_ms": 3_600_000});
        let mut ids = Vec::new();
        let [plain, sealed] = in_turn(self.rounds / 2, async |_, kind| {
            let request = self.client.anonymous(Method::POST, "/v1/tasks/bench/invocations");
            let answer = send(request.header("x-api-key", names[kind]).json(&body)).await.expect(202);
            if ids.len() < 2 {
                ids.push(answer.json()["id"].as_str().unwrap().to_owned());
            }
        })
        .await;
        println!("| submit 1 KB, plain, sealed | {plain:.0}, {sealed:.0} µs | {:.2} × |", sealed / plain);
        // As a worker would leave a result: 1 KB, each of its kind.
        for (name, id) in names.iter().zip(&ids) {
            let id: InvocationId = id.parse().unwrap();
            self.leave_result(name, id).await;
        }
        let [plain, sealed] = in_turn(self.rounds, async |_, kind| {
            let path = format!("/v1/invocations/{}/result", ids[kind]);
            assert_eq!(self.status(Some(names[kind]), Method::GET, &path).await, 200);
        })
        .await;
        println!(
            "| read a result of 1 KB, plain, sealed | {plain:.0}, {sealed:.0} µs | {:.2} × |",
            sealed / plain
        );
    }

    async fn leave_result(&self, key: &str, id: InvocationId) {
        use sandbar::app::sealed::{Part, Sealer};
        let tenant = self.app.authenticate(key).await.unwrap().unwrap().tenant;
        let mut output = vec![b'7'; 1_000];
        let row: Option<(String, Vec<u8>)> =
            sqlx::query_as("SELECT master, wrapped FROM sandbar.tenant_keys WHERE tenant_id = $1")
                .bind(tenant)
                .fetch_optional(&self.admin)
                .await
                .unwrap();
        if let Some((master, bytes)) = row {
            let wrapped = sandbar::app::vault::Wrapped { master, bytes };
            let key = self.app.settings().vault.unwrap(tenant, &wrapped).unwrap();
            output = Sealer::new(&key, tenant, id).seal(0, Part::Output, &output).unwrap();
        }
        let mut transaction = self.admin.begin().await.unwrap();
        sqlx::query("DELETE FROM sandbar.scheduled WHERE invocation_id = $1")
            .bind(id)
            .execute(&mut *transaction)
            .await
            .unwrap();
        sqlx::query(
            "INSERT INTO sandbar.results (tenant_id, invocation_id, state, reason, output, content_type)
             VALUES ($1, $2, 'succeeded', 'succeeded', $3, 'application/json')",
        )
        .bind(tenant)
        .bind(id)
        .bind(&output)
        .execute(&mut *transaction)
        .await
        .unwrap();
        transaction.commit().await.unwrap();
    }
}

async fn run() {
    let rounds =
        std::env::var("SANDBAR_BENCH_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2_000);
    let database = support::database().await;
    // As every installation has it, and not as tests do.
    database.as_released().await;
    let admin = database.admin().await;
    tenants(&admin, 0, 1).await;
    let vault = Arc::new(Vault::new(Some([7; KEY_BYTES]), Vec::new()));
    let store = ApiStore::connect(&connect(database.api_url())).await.unwrap();
    let app = App::new(store.clone(), Signals::new(), Settings { vault, ..Settings::default() }).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = Client::new(format!("http://{}", listener.local_addr().unwrap()));
    let service = sandbar::api::router(app.clone()).into_make_service_with_connect_info::<SocketAddr>();
    tokio::spawn(async move { axum::serve(listener, service).await.unwrap() });
    let bench = Bench { client, app, admin: admin.clone(), rounds };

    println!("| | p50 | |");
    println!("|---|---|---|");
    bench.authentication().await;

    tenants(&admin, 1, 100).await;
    bench.keys("100 tenants × 10 keys", 100).await;
    tenants(&admin, 100, TENANTS).await;
    bench.keys("10,000 tenants × 10 keys", TENANTS).await;

    // Two tenants with the same task, of which one seals.
    for statement in [
        "INSERT INTO sandbar.tasks (tenant_id, task_id, name, current_version)
         SELECT tenant_id, gen_random_uuid(), 'bench', 1 FROM sandbar.tenants WHERE name IN ('bench-0', 'bench-1')",
        "INSERT INTO sandbar.blobs (tenant_id, sha256, bytes)
         SELECT tenant_id, sha256('m'), 'm' FROM sandbar.tenants WHERE name IN ('bench-0', 'bench-1')",
        "INSERT INTO sandbar.versions (tenant_id, task_id, number, sha256, size_bytes, kind, state, manifest)
         SELECT t.tenant_id, t.task_id, 1, sha256('m'), 1, 'task', 'ready', '{}' FROM sandbar.tasks t WHERE t.name = 'bench'",
    ] {
        sqlx::query(statement).execute(&admin).await.unwrap();
    }
    let names = ["sbk_bench-0-1", "sbk_bench-1-1"];
    let put = bench.client.anonymous(Method::PUT, "/v1/encryption").header("x-api-key", names[1]);
    send(put.json(&json!({"payloads": true}))).await.expect(200);
    bench.sealing(names).await;

    let (tenant, id): (TenantId, InvocationId) = sqlx::query_as(
        "SELECT r.tenant_id, r.invocation_id FROM sandbar.results r JOIN sandbar.tenants t USING (tenant_id) WHERE t.name = 'bench-0'",
    )
    .fetch_one(&admin)
    .await
    .unwrap();
    let bypass = ApiStore::connect(&connect(database.admin_url())).await.unwrap();
    bench.row_level_security((&store, &bypass), tenant, id).await;
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(run());
    // The shared Postgres and its supervisor end with the process.
    std::process::exit(0);
}
