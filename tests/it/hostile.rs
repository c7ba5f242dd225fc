//! The hostile corpus: every file of `tests/guests/hostile` is uploaded and invoked through the public API, and has to
//! end as its head says, while a control task of another tenant stays correct and prompt and the cells live.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use reqwest::Method;
use sandbar::store::tenant::key_hash;
use serde_json::{Value, json};

use crate::support::{self, Client, Deployment, send};

/// Key of the control task's tenant.
const CONTROL_KEY: &str = "sbk_control_control_control_control";
/// Hostile modules at the same time.
const AT_ONCE: usize = 4;
/// How many times fewer calls of the control there may be beside the corpus than apart from it, in the same time on the
/// same machine: whatever else the machine does, it does to both.
const SLOWER: usize = 4;
/// Most resident memory that the cells may have after all of it, in bytes. One cell with four slots that keep 10 MiB
/// each, its code cache, and itself.
const CELL_BYTES: u64 = 600 << 20;
/// Echoes stdin.
const ECHO: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 1000))
    (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 4)))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"#;

struct Case {
    name: String,
    expect: Vec<String>,
    body: Value,
    wasm: Vec<u8>,
}

fn corpus() -> Vec<Case> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guests/hostile");
    let mut cases = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let head = |what: &str| text.lines().find_map(|line| line.strip_prefix(what)).map(str::trim);
        let expect = head(";; expect:").unwrap_or_else(|| panic!("{name} does not say what to expect"));
        let body = head(";; body:").map_or(json!({}), |body| serde_json::from_str(body).unwrap());
        let wasm = wat::parse_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        let expect = expect.split(',').map(|word| word.trim().to_owned()).collect();
        cases.insert(name.clone(), Case { name, expect, body, wasm });
    }
    cases.into_values().collect()
}

/// How it went: the reason of the end, or status and code of the refusal.
async fn run(client: &Client, case: &Case) -> String {
    let uploaded = client.upload_bytes(&case.name, case.wasm.clone()).await;
    let version = uploaded.json();
    if uploaded.status.as_u16() == 422 {
        return format!("422 {}", version["type"].as_str().unwrap().rsplit('/').next().unwrap());
    }
    match version["state"].as_str() {
        Some("ready") => {}
        Some("rejected") => {
            return format!("422 module-{}", version["rejection"]["code"].as_str().unwrap_or_default());
        }
        _ => return format!("upload: {} {version}", uploaded.status),
    }
    let ended = client.invoke(&case.name, &case.body).await;
    let ended_body = ended.json();
    let Some(reason) = ended_body["reason"].as_str() else {
        return format!("{} {ended_body}", ended.status);
    };
    match left_behind(client, &ended_body).await {
        Ok(()) => reason.to_owned(),
        Err(dirt) => format!("{reason}, but {dirt}"),
    }
}

/// What it left in the log, in the words about its end and in files must be fit to be shown, fetched and counted.
async fn left_behind(client: &Client, ended: &Value) -> Result<(), String> {
    let base = format!("/v1/invocations/{}", ended["id"].as_str().unwrap());
    let logs = client.get(&format!("{base}/logs?limit=500")).await.expect(200).json();
    for (what, said) in [("its log", &logs["items"]), ("its end", &ended["attempts"])] {
        if let Some(text) = control_characters(said) {
            return Err(format!("{what} has control characters: {text:?}"));
        }
    }
    for attempt in ended["attempts"].as_array().unwrap() {
        let receipt = &attempt["receipt"];
        if attempt["termination"]["reason"] != "denied" && receipt["fuel"].as_u64().unwrap_or(0) == 0 {
            return Err(format!("its receipt says nothing: {receipt}"));
        }
    }
    let artifacts = client.get(&format!("{base}/artifacts")).await.expect(200).json();
    for artifact in artifacts["items"].as_array().unwrap() {
        let link = artifact["links"]["self"].as_str().unwrap();
        let got = client.get(link).await;
        let size = u64::try_from(got.body.len()).unwrap();
        if got.status.as_u16() != 200 || artifact["size_bytes"].as_u64() != Some(size) {
            return Err(format!("{artifact} cannot be fetched: {}", got.status));
        }
    }
    Ok(())
}

/// The first text anywhere in it that has some.
fn control_characters(value: &Value) -> Option<&str> {
    match value {
        Value::String(text) => text.contains(|c: char| c.is_control() && c != '\t').then_some(text.as_str()),
        Value::Array(items) => items.iter().find_map(control_characters),
        Value::Object(fields) => fields.values().find_map(control_characters),
        _ => None,
    }
}

/// How the calls of a control task went.
struct Calls {
    /// How long each took.
    took: Vec<Duration>,
}

impl Calls {
    fn quantile(&self, q: f64) -> Duration {
        let mut took = self.took.clone();
        took.sort_unstable();
        let rank = (q * took.len().saturating_sub(1) as f64).round() as usize;
        took.get(rank).copied().unwrap_or_default()
    }

    fn report(&self, whose: &str) {
        let [p50, p99, most] = [0.5, 0.99, 1.0].map(|q| self.quantile(q));
        eprintln!("{whose}: {} calls, p50 {p50:?}, p99 {p99:?}, the longest {most:?}", self.took.len());
    }
}

/// A deployment with one worker, and a tenant whose task echoes.
async fn with_control() -> (Deployment, Client) {
    let settings = vec![
        ("SANDBAR_WORKER__SLOTS", "8".to_owned()),
        ("SANDBAR_WORKER__POLL_MS", "100".to_owned()),
        ("SANDBAR_COMPILE__PARALLEL", "2".to_owned()),
        ("SANDBAR_COMPILE__PARALLEL_PER_TENANT", "2".to_owned()),
    ];
    let deployment = Deployment::on(support::database().await, 1, &settings).await;
    let client = deployment.client();
    let admin = deployment.database.admin().await;
    let tenant = uuid::Uuid::now_v7();
    sqlx::query("INSERT INTO sandbar.tenants (tenant_id, name) VALUES ($1, 'control')")
        .bind(tenant)
        .execute(&admin)
        .await
        .unwrap();
    sqlx::query(
        "INSERT INTO sandbar.api_keys (tenant_id, key_id, prefix, hash, role) VALUES ($1, $2, 'sbk', $3, 'admin')",
    )
    .bind(tenant)
    .bind(uuid::Uuid::now_v7())
    .bind(key_hash(CONTROL_KEY).as_slice())
    .execute(&admin)
    .await
    .unwrap();
    let echo = client
        .anonymous(Method::POST, "/v1/tasks/echo/versions")
        .header("x-api-key", CONTROL_KEY)
        .header("content-type", "application/wasm")
        .header("prefer", "wait=60")
        .body(wat::parse_str(ECHO).unwrap());
    send(echo).await.expect(201);
    (deployment, client)
}

/// Calls the echo of the control's tenant again and again.
async fn control(client: Client, stop: Arc<AtomicBool>) -> Calls {
    let mut took = Vec::new();
    while !stop.load(Ordering::Relaxed) || took.is_empty() {
        let words = format!("control {}", took.len());
        let request = client
            .anonymous(Method::POST, "/v1/tasks/echo/invocations")
            .header("x-api-key", CONTROL_KEY)
            .header("prefer", "wait=30")
            .json(&json!({"stdin": words}));
        let began = Instant::now();
        let done = send(request).await.expect(200).json();
        took.push(began.elapsed());
        assert_eq!(done["result"]["text"], words, "{done:#}");
        assert_eq!(done["attempts"].as_array().unwrap().len(), 1, "the control's cell died: {done:#}");
        tokio::time::sleep(Duration::from_millis(20)).await; // a caller's pause
    }
    Calls { took }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_hostile_module_ends_as_expected_and_neighbours_stay_correct_and_prompt() {
    let cases = corpus();
    assert!(cases.len() >= 80, "{} cases", cases.len());
    let (deployment, client) = with_control().await;
    // The same task at the same time on the same machine, with a worker for itself.
    let (_quiet, apart) = with_control().await;
    let stop = Arc::new(AtomicBool::new(false));
    let watching = tokio::spawn(control(client.clone(), stop.clone()));
    let comparing = tokio::spawn(control(apart, stop.clone()));
    let client = &client;
    let wrong: Vec<String> = futures_util::stream::iter(&cases)
        .map(|case| async move {
            let got = run(client, case).await;
            (!case.expect.contains(&got)).then(|| format!("{}: {got}, expected {:?}", case.name, case.expect))
        })
        .buffer_unordered(AT_ONCE)
        .filter_map(async |wrong| wrong)
        .collect()
        .await;
    stop.store(true, Ordering::Relaxed);
    let (beside, apart) = (watching.await.unwrap(), comparing.await.unwrap());
    assert!(wrong.is_empty(), "{} of {}\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    beside.report("beside the corpus");
    apart.report("on a worker of its own");
    assert!(
        beside.took.len() >= apart.took.len() / SLOWER,
        "{} calls of the control beside hostile modules, {} of the same without them",
        beside.took.len(),
        apart.took.len()
    );

    // Which way slots are cleared is logged, and shown.
    let log = deployment.workers[0].log();
    let workers = client.get("/v1/workers").await.expect(200).json();
    let scans = workers["items"][0]["walls"]["pagemap_scan"].as_bool().unwrap();
    assert!(
        log.lines()
            .any(|line| line.contains("cell started") && line.contains(&format!("pagemap_scan={scans}"))),
        "{log}"
    );

    // The bound on what they did to the host: the one cell lives, and has not grown beyond what it may.
    assert!(!deployment.workers[0].log().contains("a cell died"), "a cell died");
    for pid in deployment.workers[0].children() {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if line.windows(6).any(|w| w == b"__cell") {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
            let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
            assert!(peak * 1024 < CELL_BYTES, "the cell had {peak} KiB at its peak");
        }
    }
}
