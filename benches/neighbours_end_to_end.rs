//! What a tenant with little to do notices of its neighbours, the whole way: a task of 2 ms of CPU every 50 ms, from its
//! request with `Prefer: wait` to the answer, alone, beside endless attempts of another tenant, and beside programs that
//! have nothing to do with us and are as nice as guests are. A real server, a real worker, a real Postgres. One line per
//! neighbour; asserts nothing about time. See docs/performance.md.
//!
//! `cargo bench --bench neighbours_end_to_end`; less than five minutes once it is built. The worker has slots for all
//! attempts at once: what is measured is the share of the CPU, not of the slots. Everything else is as by default.

#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr)]
// The harness of the tests, which may.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../host/benches/support/guests.rs"]
#[allow(dead_code)]
mod guests;
#[path = "../tests/it/support/mod.rs"]
mod support;

use std::io::Read as _;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::future::join_all;
use reqwest::Method;
use sandbar::domain::ids::{KeyId, TenantId};
use sandbar::store::tenant::key_hash;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};

use support::{Client, Deployment, Process, eventually, own_postgres, send};

/// Rounds that have not ended by then are not counted; what then ends takes a few seconds.
const LONGEST: Duration = Duration::from_secs(280);
/// Each measures alone and beside every neighbour, in another order: the machine drifts slower than a round lasts.
const ROUNDS: usize = 7;
/// How long each is measured in a round: 100 requests, of which the 99th percentile is not the maximum.
const LASTING: Duration = Duration::from_secs(5);
/// The same, not counted, before it is measured: so that all neighbours have begun, and the ends of those before are over.
const SETTLE: Duration = Duration::from_secs(1);

/// CPU of the task, and the time between two requests.
const VICTIM_CPU: Duration = Duration::from_millis(2);
const VICTIM_EVERY: Duration = Duration::from_millis(50);
/// Endless attempts at once, of the other tenant.
const HOGS: usize = 200;
/// Attempts at once in the worker.
const SLOTS: usize = 256;
/// Niceness of the threads that run guests, and of spinners.
const NICE: i32 = 10;

/// Key of the other tenant.
const HOGS_KEY: &str = "sbk_the-key-of-the-tenant-with-hogs";
/// Longest wait for the neighbours to be there, or to be gone.
const PATIENCE: Duration = Duration::from_secs(60);
/// Requests of the bench itself at once.
const AT_ONCE: usize = 16;
/// The argument with which this program is a spinner.
const SPIN: &str = "--spin-until-the-input-ends";

fn main() -> ExitCode {
    // `cargo test --benches` runs this without `--bench`: nothing to measure then.
    if std::env::args().any(|arg| arg == SPIN) {
        return spin();
    }
    if !std::env::args().any(|arg| arg == "--bench") {
        return ExitCode::SUCCESS;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime.context("no runtime").and_then(|runtime| runtime.block_on(run())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("not measured: {err:#}");
            ExitCode::FAILURE
        }
    }
}

/// What is beside the victim.
#[derive(Clone, Copy)]
enum Beside {
    Nothing,
    Hogs,
    Spinners,
}

const ALL: [Beside; 3] = [Beside::Nothing, Beside::Hogs, Beside::Spinners];

/// What was measured beside one of them.
#[derive(Default)]
struct Seen {
    /// Milliseconds from a request to its answer; one list per round.
    rounds: Vec<Vec<f64>>,
    /// CPUs that the worker's cells had, one number per round.
    cells: Vec<f64>,
}

async fn run() -> Result<()> {
    let until = Instant::now() + LONGEST;
    let (postgres, database, _dir) = own_postgres().await;
    // As every installation has it, and not as tests do.
    database.as_released().await;
    let settings = [
        ("SANDBAR_WORKER__SLOTS", SLOTS.to_string()),
        ("SANDBAR_DATABASE__MAX_CONNECTIONS", "16".to_owned()),
        ("SANDBAR_LOG__FILTER", "warn,sandbar::server=info".to_owned()),
    ];
    let deployment = Deployment::on(database, 1, &settings).await;
    let mut seen: [Seen; ALL.len()] = Default::default();
    let measured = async {
        let bench = Bench::new(&deployment).await?;
        for round in 0..ROUNDS {
            let mut these: [Option<(Vec<f64>, f64)>; ALL.len()] = Default::default();
            for turn in 0..ALL.len() {
                let which = (round + turn) % ALL.len();
                these[which] = Some(bench.beside(ALL[which]).await?);
            }
            // Whole rounds only, so that the lists compare.
            for (seen, (latencies, cells)) in seen.iter_mut().zip(these.into_iter().flatten()) {
                seen.rounds.push(latencies);
                seen.cells.push(cells);
            }
        }
        Ok(())
    };
    let measured: Result<()> = timeout_at(until, measured).await.unwrap_or_else(|_| {
        println!("not all rounds: {} s are over", LONGEST.as_secs());
        Ok(())
    });
    if !seen[0].rounds.is_empty() {
        report(&seen);
    }
    drop(deployment);
    postgres.stop().await.context("Postgres does not stop")?;
    measured
}

struct Bench<'a> {
    worker: &'a Process,
    victim: Client,
}

impl<'a> Bench<'a> {
    /// With the tasks of both tenants, and the victim's of the right size for this machine.
    async fn new(deployment: &'a Deployment) -> Result<Self> {
        /// Iterations that are timed to know how many take as long as the task should.
        const TIMED: u32 = 10_000_000;
        let bench =
            Self { worker: deployment.workers.first().context("no worker")?, victim: deployment.client() };
        add_tenant(deployment).await?;
        let spin = wat::parse_str(guests::command("", 1, "(loop $l (br $l))"))?;
        let upload = bench.as_hogs(Method::POST, "/v1/tasks/spin/versions").header("prefer", "wait=60");
        send(upload.header("content-type", "application/wasm").body(spin)).await.expect(201);

        bench.victim.upload_bytes("timed", wat::parse_str(guests::burn(TIMED))?).await.expect(201);
        let mut quickest = f64::INFINITY;
        for _ in 0..9 {
            let done = finished(&bench.victim, "timed").await?;
            let cpu_ns = done["attempts"][0]["receipt"]["cpu_ns"].as_f64().context("no receipt")?;
            // Others on the machine only ever add.
            quickest = quickest.min(cpu_ns);
        }
        let iterations = VICTIM_CPU.as_nanos() as f64 * f64::from(TIMED) / quickest;
        bench
            .victim
            .upload_bytes("small", wat::parse_str(guests::burn(iterations as u32))?)
            .await
            .expect(201);
        bench.watch(SETTLE).await?;
        Ok(bench)
    }

    fn as_hogs(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.victim.anonymous(method, path).header("x-api-key", HOGS_KEY)
    }

    /// The victim's latencies beside one of them, and the CPUs that the cells had meanwhile.
    async fn beside(&self, neighbour: Beside) -> Result<(Vec<f64>, f64)> {
        let hogs = if matches!(neighbour, Beside::Hogs) { self.begin_hogs().await? } else { Vec::new() };
        let spinners = if matches!(neighbour, Beside::Spinners) { Some(Spinners::start()?) } else { None };
        self.watch(SETTLE).await?;
        let (began, before) = (Instant::now(), self.cells_cpu_s());
        let latencies = self.watch(LASTING).await?;
        let cells = (self.cells_cpu_s() - before) / began.elapsed().as_secs_f64();
        drop(spinners);
        self.end_hogs(&hogs).await;
        Ok((latencies, cells))
    }

    /// Invokes again and again, whether the one before has ended or not, and waits for all answers at the end.
    async fn watch(&self, lasting: Duration) -> Result<Vec<f64>> {
        let mut answers = JoinSet::new();
        let mut due = Instant::now();
        let end = due + lasting;
        while due < end {
            sleep_until(due).await;
            let victim = self.victim.clone();
            answers.spawn(async move {
                let began = Instant::now();
                finished(&victim, "small").await?;
                anyhow::Ok(began.elapsed().as_secs_f64() * 1e3)
            });
            due += VICTIM_EVERY;
        }
        answers.join_all().await.into_iter().collect()
    }

    /// All of them, once the worker has them.
    async fn begin_hogs(&self) -> Result<Vec<String>> {
        let limits =
            json!({"fuel": 10_000_000_000_000_u64, "timeout_ms": 3_600_000, "memory_bytes": 1 << 20});
        let one = json!({"task": "spin", "limits": limits, "retry": {"max_attempts": 1}});
        let batch = json!({"invocations": vec![one; HOGS]});
        let accepted =
            send(self.as_hogs(Method::POST, "/v1/invocations:batch").json(&batch)).await.expect(200);
        let accepted = accepted.json();
        let ids: Option<Vec<_>> = accepted["outcomes"]
            .as_array()
            .context("no outcomes")?
            .iter()
            .map(|one| one["id"].as_str().map(str::to_owned))
            .collect();
        let ids = ids.context("not all of the hogs are accepted")?;
        eventually(PATIENCE, "all hogs to run", async || (self.running_hogs().await == HOGS).then_some(()))
            .await;
        Ok(ids)
    }

    async fn end_hogs(&self, ids: &[String]) {
        for some in ids.chunks(AT_ONCE) {
            let cancel = |id: &String| {
                send(self.as_hogs(Method::POST, &format!("/v1/invocations/{id}/cancel")).json(&json!({})))
            };
            join_all(some.iter().map(cancel)).await;
        }
        if !ids.is_empty() {
            eventually(PATIENCE, "all hogs to end", async || (self.running_hogs().await == 0).then_some(()))
                .await;
        }
    }

    async fn running_hogs(&self) -> usize {
        let page = send(self.as_hogs(Method::GET, &format!("/v1/invocations?state=running&limit={HOGS}")));
        page.await.expect(200).json()["items"].as_array().map_or(0, Vec::len)
    }

    /// CPU that the cells have had so far.
    fn cells_cpu_s(&self) -> f64 {
        let of = |pid: u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let is_cell = line.windows(6).any(|word| word == b"__cell");
            // User and system time in hundredths: the 12th and 13th field behind the name.
            let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
            let hundredths: f64 = fields.filter_map(|field| field.parse::<f64>().ok()).sum();
            if is_cell { hundredths / 100.0 } else { 0.0 }
        };
        self.worker.children().into_iter().map(of).sum()
    }
}

/// Invokes the victim's task and waits for its end.
async fn finished(victim: &Client, task: &str) -> Result<Value> {
    let answer = victim.invoke(task, &json!({"retry": {"max_attempts": 1}})).await;
    ensure!(answer.status.as_u16() == 200, "{}: {}", answer.status, answer.text());
    let done = answer.json();
    ensure!(done["state"] == "succeeded", "{done:#}");
    Ok(done)
}

/// The tenant whose attempts are beside the victim's. The victim is the tenant of the administrator's key.
async fn add_tenant(deployment: &Deployment) -> Result<()> {
    let (tenant, admin) = (TenantId::generate(), deployment.database.admin().await);
    sqlx::query("INSERT INTO sandbar.tenants (tenant_id, name) VALUES ($1, 'hogs')")
        .bind(tenant)
        .execute(&admin)
        .await?;
    sqlx::query(
        "INSERT INTO sandbar.api_keys (tenant_id, key_id, prefix, hash, role) VALUES ($1, $2, 'sbk', $3, 'admin')",
    )
    .bind(tenant)
    .bind(KeyId::generate())
    .bind(key_hash(HOGS_KEY).as_slice())
    .execute(&admin)
    .await?;
    admin.close().await;
    Ok(())
}

/// Programs that only use CPU, one for each core. Dropped, they are killed; they also end with this process.
struct Spinners(Vec<Child>);

impl Spinners {
    fn start() -> Result<Self> {
        let cores = std::thread::available_parallelism().context("the number of cores")?.get();
        let mut all = Self(Vec::new());
        for _ in 0..cores {
            let mut command = Command::new(std::env::current_exe().context("this program's own file")?);
            let child = command.arg(SPIN).stdin(Stdio::piped()).spawn().context("a spinner")?;
            all.0.push(child);
        }
        Ok(all)
    }
}

impl Drop for Spinners {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The body of a spinner.
fn spin() -> ExitCode {
    // Before there is another thread: niceness is a thread's own, and inherited.
    if let Err(err) = rustix::process::nice(NICE) {
        eprintln!("a spinner cannot be nice: {err}");
        return ExitCode::FAILURE;
    }
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    let mut n = 1u64;
    loop {
        n = std::hint::black_box(n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
}

fn report(seen: &[Seen; ALL.len()]) {
    let p99s = |seen: &Seen| seen.rounds.iter().map(|round| quantile(round, 0.99)).collect::<Vec<_>>();
    let alone = p99s(&seen[0]);
    let all_alone = quantile(&seen[0].rounds.concat(), 0.99);
    for (which, seen) in ALL.into_iter().zip(seen) {
        let name = match which {
            Beside::Nothing => "alone".to_owned(),
            Beside::Hogs => format!("beside {HOGS} endless attempts"),
            Beside::Spinners => "beside spinners, one per core".to_owned(),
        };
        let all = seen.rounds.concat();
        let p99 = quantile(&all, 0.99);
        let ratios: Vec<_> = p99s(seen).iter().zip(&alone).map(|(with, alone)| with / alone).collect();
        let ratio = match which {
            Beside::Nothing => String::new(),
            Beside::Hogs | Beside::Spinners => format!(
                "; p99 with / alone {:.2} ({:.2} to {:.2}, {} rounds; {:.2} of all answers together)",
                quantile(&ratios, 0.5),
                quantile(&ratios, 0.0),
                quantile(&ratios, 1.0),
                ratios.len(),
                p99 / all_alone,
            ),
        };
        println!(
            "{name:<30} request to answer p50 {:>6.2} p99 {p99:>6.2} ms ({} answers; cells {:.2} CPUs){ratio}",
            quantile(&all, 0.5),
            all.len(),
            quantile(&seen.cells, 0.5),
        );
    }
}

/// By nearest rank.
fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (q * sorted.len().saturating_sub(1) as f64).round() as usize;
    sorted.get(rank).copied().unwrap_or(f64::NAN)
}
