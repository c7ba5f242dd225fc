//! The sandbox through the public face: modules that kill cells, memory that is admitted before it is used.

use std::time::Duration;

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::wat::{QUICK, SPIN, nap};
use crate::support::{self, Client, Deployment, Process, send};

/// Longest any wait of these tests takes before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(60);

fn quick_settings() -> Vec<(&'static str, String)> {
    vec![
        ("SANDBAR_WORKER__POLL_MS", "100".to_owned()),
        ("SANDBAR_WORKER__SLOTS", "4".to_owned()),
        ("SANDBAR_SCHEDULER__TICK_MS", "100".to_owned()),
        ("SANDBAR_SCHEDULER__MAX_HANDOVERS", "3".to_owned()),
    ]
}

async fn upload(client: &Client, task: &str, wat: &str) {
    client.upload_bytes(task, wat::parse_str(wat).unwrap()).await.expect(201);
}

async fn ended(client: &Client, id: &str) -> Value {
    support::eventually(PATIENCE, "the invocation to end", async || {
        let now = client.get(&format!("/v1/invocations/{id}")).await.expect(200).json();
        now["reason"].is_string().then_some(now)
    })
    .await
}

fn reasons(invocation: &Value) -> Vec<&str> {
    let attempts = invocation["attempts"].as_array().unwrap();
    attempts.iter().map(|a| a["termination"]["reason"].as_str().unwrap()).collect()
}

/// The cell of a worker that has used some CPU: a guest spins in it.
async fn busy_cell(worker: &Process, not: u32) -> u32 {
    support::eventually(PATIENCE, "a guest to spin", async || {
        worker.children().into_iter().find(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // User time in hundredths of a second: the fourteenth field, the twelfth after the name.
            let user =
                stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(11)?.parse::<u64>().ok());
            *pid != not && line.windows(6).any(|w| w == b"__cell") && user.is_some_and(|user| user > 30)
        })
    })
    .await
}

#[tokio::test]
async fn a_module_in_flight_at_two_cell_deaths_is_quarantined_until_released_and_others_go_on() {
    let deployment = Deployment::on(support::database().await, 1, &quick_settings()).await;
    let client = deployment.client();
    upload(&client, "spin", SPIN).await;
    upload(&client, "quick", QUICK).await;
    let long = json!({"limits": {"fuel": 1_000_000_000_000_u64, "timeout_ms": 600_000}});
    let id = client.enqueue("spin", &long).await.expect(202).json()["id"].as_str().unwrap().to_owned();
    let mut cell = 0;
    for _ in 0..2 {
        cell = busy_cell(&deployment.workers[0], cell).await;
        support::kill(cell, Signal::KILL);
    }
    let dead = ended(&client, &id).await;
    assert_eq!((dead["state"].as_str(), dead["reason"].as_str()), (Some("dead"), Some("denied")), "{dead:#}");
    assert_eq!(reasons(&dead), ["host-fault", "host-fault", "denied"]);

    let version = support::eventually(PATIENCE, "the quarantine to be written down", async || {
        let version = client.get("/v1/tasks/spin/versions/1").await.expect(200).json();
        version["quarantine"].is_object().then_some(version)
    })
    .await;
    assert!(version["quarantine"]["reason"].as_str().unwrap().contains("signal"), "{version:#}");
    // An answer may be a second old.
    let refused = support::eventually(PATIENCE, "invocations to be refused", async || {
        let answer = client.enqueue("spin", &json!({})).await;
        (answer.status.as_u16() == 409).then_some(answer)
    })
    .await;
    assert!(refused.json()["type"].as_str().unwrap().ends_with("version-quarantined"), "{}", refused.text());
    let other = client.invoke("quick", &json!({})).await.expect(200).json();
    assert_eq!(other["state"], "succeeded", "{other:#}");

    let path = "/v1/tasks/spin/versions/1/release";
    for _ in 0..2 {
        let released = send(client.request(Method::POST, path)).await.expect(200).json();
        assert!(released.get("quarantine").is_none(), "{released:#}");
    }
    let again = client.invoke("spin", &json!({"limits": {"fuel": 1_000_000}})).await.expect(200).json();
    assert_eq!(again["reason"], "out-of-fuel", "{again:#}");
}

#[tokio::test]
async fn attempts_that_declare_more_memory_than_is_left_wait_for_each_other() {
    let mut settings = quick_settings();
    settings.push(("SANDBAR_WORKER__MEMORY_BYTES", (1_700_u64 << 20).to_string()));
    let deployment = Deployment::on(support::database().await, 1, &settings).await;
    let client = deployment.client();
    upload(&client, "nap", &nap(1_000)).await;
    let half = json!({"limits": {"memory_bytes": 1_u64 << 30}});
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(client.enqueue("nap", &half).await.expect(202).json()["id"].as_str().unwrap().to_owned());
    }
    // Once one waits at the worker, what comes is not even claimed, and can tell why.
    for id in &ids[..2] {
        support::eventually(PATIENCE, "two to be claimed", async || {
            let now = client.get(&format!("/v1/invocations/{id}")).await.expect(200).json();
            (now["state"] != "queued").then_some(())
        })
        .await;
    }
    let late = client.enqueue("nap", &half).await.expect(202).json()["id"].as_str().unwrap().to_owned();
    support::eventually(PATIENCE, "a wait for memory", async || {
        let why = client.get(&format!("/v1/invocations/{late}/why")).await.expect(200).json();
        (why["reasons"][0]["kind"] == "no-memory").then_some(())
    })
    .await;
    ids.push(late);
    let mut times = Vec::new();
    for id in &ids {
        let done = ended(&client, id).await;
        assert_eq!(reasons(&done), ["succeeded"], "{done:#}");
        let attempt = &done["attempts"][0];
        let start: chrono::DateTime<chrono::Utc> = attempt["started_at"].as_str().unwrap().parse().unwrap();
        let wall = attempt["receipt"]["wall_ns"].as_i64().unwrap();
        times.push((start, start + chrono::TimeDelta::nanoseconds(wall)));
    }
    times.sort_unstable();
    for pair in times.windows(2) {
        assert!(pair[0].1 <= pair[1].0, "two ran at once, where there is memory for one: {times:?}");
    }

    let all = json!({"limits": {"memory_bytes": 4_u64 << 30}});
    let id = client.enqueue("nap", &all).await.expect(202).json()["id"].as_str().unwrap().to_owned();
    // It is handed on, since a larger worker may come.
    let tried = support::eventually(PATIENCE, "an attempt", async || {
        let now = client.get(&format!("/v1/invocations/{id}")).await.expect(200).json();
        now["attempts"][0]["termination"].is_object().then_some(now)
    })
    .await;
    assert_eq!(tried["attempts"][0]["termination"]["reason"], "host-fault", "{tried:#}");
    let words = tried["attempts"][0]["termination"]["message"].as_str().unwrap_or_default();
    assert!(words.contains("more memory than this worker gives"), "{tried:#}");
}

/// Grows its memory by as many 64 MiB as the first byte of its input says, and sleeps a second.
const GROW: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 1))
    (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 72)))
    (if (i32.eq (i32.const -1) (memory.grow (i32.mul (i32.const 1024) (i32.load8_u (i32.const 64)))))
      (then (unreachable)))
    (i32.store (i32.const 16) (i32.const 1))
    (i64.store (i32.const 24) (i64.const 1000000000))
    (drop (call $poll (i32.const 0) (i32.const 128) (i32.const 1) (i32.const 512)))))"#;

/// A worker with memory for one GiB of attempts and not for two, whose operator allows overcommit, after eight runs of
/// GROW that used little.
async fn overcommitting() -> Deployment {
    let mut settings = quick_settings();
    settings.push(("SANDBAR_WORKER__MEMORY_BYTES", (1_700_u64 << 20).to_string()));
    settings.push(("SANDBAR_WORKER__MEMORY_OVERCOMMIT", "true".to_owned()));
    let deployment = Deployment::on(support::database().await, 1, &settings).await;
    let client = deployment.client();
    upload(&client, "grow", GROW).await;
    for round in 0..2 {
        let mut ids = Vec::new();
        for _ in 0..4 {
            ids.push(enqueue_grow(&client, "\u{0}", 64 << 20).await);
        }
        for id in ids {
            assert_eq!(reasons(&ended(&client, &id).await), ["succeeded"], "round {round}");
        }
    }
    deployment
}

async fn enqueue_grow(client: &Client, units: &str, limit: u64) -> String {
    let body = json!({
        "stdin": units,
        "limits": {"memory_bytes": limit, "timeout_ms": 50_000},
        "retry": {"max_attempts": 1},
    });
    client.enqueue("grow", &body).await.expect(202).json()["id"].as_str().unwrap().to_owned()
}

/// When the last attempt ran.
fn ran(invocation: &Value) -> (chrono::DateTime<chrono::Utc>, chrono::DateTime<chrono::Utc>) {
    let attempt = invocation["attempts"].as_array().unwrap().last().unwrap();
    let start: chrono::DateTime<chrono::Utc> = attempt["started_at"].as_str().unwrap().parse().unwrap();
    (start, start + chrono::TimeDelta::nanoseconds(attempt["receipt"]["wall_ns"].as_i64().unwrap()))
}

#[tokio::test]
async fn with_overcommit_attempts_start_by_what_their_module_has_used() {
    let deployment = overcommitting().await;
    let client = deployment.client();
    let mut ids = Vec::new();
    for _ in 0..4 {
        // Each may use a GiB, and the worker has no second one.
        ids.push(enqueue_grow(&client, "\u{0}", 1 << 30).await);
    }
    let mut times = Vec::new();
    for id in &ids {
        let done = ended(&client, id).await;
        assert_eq!(reasons(&done), ["succeeded"], "{done:#}");
        times.push(ran(&done));
    }
    times.sort_unstable();
    assert!(times.windows(2).any(|pair| pair[1].0 < pair[0].1), "no two ran at once: {times:?}");
}

#[tokio::test]
async fn under_pressure_the_youngest_is_handed_back_without_using_up_a_retry_and_all_get_their_memory() {
    let deployment = overcommitting().await;
    let client = deployment.client();
    let mut ids = Vec::new();
    for _ in 0..3 {
        // 768 MiB of the GiB it may have: there is room for one.
        ids.push(enqueue_grow(&client, "\u{c}", 1 << 30).await);
    }
    let mut handed_back = 0;
    let mut times = Vec::new();
    for id in &ids {
        let done = ended(&client, id).await;
        assert_eq!(done["state"], "succeeded", "{done:#}");
        for attempt in done["attempts"].as_array().unwrap().iter().rev().skip(1) {
            let words = attempt["termination"]["message"].as_str().unwrap_or_default();
            assert!(words.contains("handed back"), "{done:#}");
            handed_back += 1;
        }
        let last = done["attempts"].as_array().unwrap().last().unwrap();
        assert!(last["receipt"]["peak_memory_bytes"].as_u64().unwrap() >= 768 << 20, "{done:#}");
        times.push(ran(&done));
    }
    assert!(handed_back > 0, "nobody was in the way: {times:?}");
}

/// Copies `in.txt` to `out/copy.txt` and writes what stdin says to stdout.
const COPY: &str = r#"(module
  (import "wasi_snapshot_preview1" "path_open" (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_create_directory" (func $mkdir (param i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 1024) "in.txt")
  (data (i32.const 1040) "out/copy.txt")
  (func $must (param $errno i32) (if (local.get $errno) (then (call $exit (local.get $errno)))))
  (func $copy (param $from i32) (param $to i32)
    (i32.store (i32.const 0) (i32.const 2048)) (i32.store (i32.const 4) (i32.const 4096))
    (call $must (call $fd_read (local.get $from) (i32.const 0) (i32.const 1) (i32.const 4)))
    (call $must (call $fd_write (local.get $to) (i32.const 0) (i32.const 1) (i32.const 16))))
  (func $open (param $path i32) (param $len i32) (param $create i32) (result i32)
    (call $must (call $path_open (i32.const 3) (i32.const 1) (local.get $path) (local.get $len)
      (local.get $create) (i64.const 66) (i64.const 0) (i32.const 0) (i32.const 512)))
    (i32.load (i32.const 512)))
  (func (export "_start")
    (call $must (call $mkdir (i32.const 3) (i32.const 1040) (i32.const 3)))
    (call $copy (call $open (i32.const 1024) (i32.const 6) (i32.const 0))
      (call $open (i32.const 1040) (i32.const 12) (i32.const 1)))
    (call $copy (i32.const 0) (i32.const 1))))"#;

#[tokio::test]
async fn files_are_laid_before_the_start_and_artifacts_come_back() {
    let deployment = Deployment::on(support::database().await, 1, &quick_settings()).await;
    let client = deployment.client();
    upload(&client, "copy", COPY).await;
    let body = json!({
        "stdin": "words",
        "files": {"in.txt": {"base64": "AP8B"}, "deep/er/x.txt": "text"},
        "collect": ["out/*", "deep/**"],
    });
    let done = client.invoke("copy", &body).await.expect(200).json();
    assert_eq!(done["state"], "succeeded", "{done:#}");
    assert_eq!(done["result"]["text"], "words", "{done:#}");
    let base = format!("/v1/invocations/{}/artifacts", done["id"].as_str().unwrap());
    let listed = client.get(&base).await.expect(200).json();
    let listed: Vec<_> = listed["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| (item["path"].as_str().unwrap().to_owned(), item["size_bytes"].as_i64().unwrap()))
        .collect();
    assert_eq!(listed, [("deep/er/x.txt".to_owned(), 4), ("out/copy.txt".to_owned(), 3)]);
    let bytes = client.get(&format!("{base}/out/copy.txt")).await.expect(200);
    assert_eq!(bytes.body, [0, 0xff, 1]);
    assert_eq!(bytes.headers["x-content-type-options"], "nosniff");
    let missing = client.get(&format!("{base}/in.txt")).await.expect(404).json();
    assert!(missing["type"].as_str().unwrap().ends_with("artifact-not-found"), "{missing:#}");
    let unknown = "/v1/invocations/019a0000-0000-7000-8000-000000000000/artifacts";
    client.get(unknown).await.expect(404);
    client.get(&format!("{unknown}/x")).await.expect(404);

    // Nothing of it is there for the next.
    let next =
        client.invoke("copy", &json!({"scratch_bytes": 1_000_000, "retry": {"max_attempts": 1}})).await;
    let next = next.expect(200).json();
    assert_eq!(next["attempts"][0]["termination"], json!({"reason": "exit-code", "code": 44}), "{next:#}");
    for (body, pointer) in [
        (json!({"files": {"../x": ""}}), "/files/..~1x"),
        (json!({"files": {"/etc/passwd": ""}}), "/files/~1etc~1passwd"),
        (json!({"collect": ["/"]}), "/collect/0"),
        (json!({"files": {"a": {"base64": "?"}}}), "/files"),
    ] {
        let refused = client.enqueue("copy", &body).await.expect(422).json();
        assert_eq!(refused["errors"][0]["pointer"], pointer, "{refused:#}");
    }
}

#[tokio::test]
async fn a_fixed_clock_and_seed_fix_output_and_fuel_through_the_api() {
    let deployment = Deployment::on(support::database().await, 2, &quick_settings()).await;
    let client = deployment.client();
    let guest = r#"(module
      (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 1)
      (func (export "_start")
        (drop (call $random (i32.const 64) (i32.const 8)))
        (drop (call $clock (i32.const 0) (i64.const 0) (i32.const 72)))
        (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 16))
        (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"#;
    upload(&client, "dice", guest).await;
    let run = async |seed: u64| {
        let body = json!({"determinism": {"clock": "2026-01-02T03:04:05Z", "seed": seed}});
        let done = client.invoke("dice", &body).await.expect(200).json();
        assert_eq!(done["state"], "succeeded", "{done:#}");
        (done["result"].clone(), done["attempts"][0]["receipt"]["fuel"].clone())
    };
    assert_eq!(run(1).await, run(1).await);
    assert_ne!(run(1).await.0, run(2).await.0);
    let refused =
        client.enqueue("dice", &json!({"determinism": {"clock": "1960-01-01T00:00:00Z", "seed": 1}})).await;
    assert_eq!(refused.expect(422).json()["errors"][0]["pointer"], "/determinism/clock");
}
