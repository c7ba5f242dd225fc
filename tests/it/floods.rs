//! One tenant floods, another goes on: the compiler, and the log. By orders and counts; nothing here is timed.

use std::fmt::Write as _;

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::capabilities::Tenant;
use crate::support::wat::{QUICK, nap};
use crate::support::{self, Deployment};

/// Longest any wait of these tests takes before it counts as failed.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(120);

/// A valid module that keeps the compiler busy for a good part of a second: large functions of branches over many locals.
fn slow(n: usize) -> Vec<u8> {
    let mut wat = format!("(module (memory 1) (func (export \"_start\")) (global i32 (i32.const {n}))");
    for f in 0..2 {
        wat.push_str("(func (param i32) (result i64)");
        wat.push_str(&"(local i64)".repeat(200));
        for i in 0..600 {
            let (a, b, c) = (1 + i % 200, 1 + (i * 7 + f) % 200, 1 + (i * 13 + n) % 200);
            write!(
                wat,
                "(if (local.get 0) (then (local.set {a} (i64.add (local.get {b}) (i64.load (i32.wrap_i64 (local.get {c}))))))
                  (else (local.set {b} (i64.mul (local.get {a}) (local.get {c})))))"
            )
            .unwrap();
        }
        wat.push_str("(local.get 1))");
    }
    wat.push(')');
    wat::parse_str(&wat).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_slow_modules_keeps_no_other_tenant_from_its_one_upload_and_from_running() {
    const FLOOD: usize = 16;
    let deployment = Deployment::start(1).await;
    let (first, flooder) = (Tenant::first(&deployment), Tenant::other(&deployment, "flooder").await);
    for (task, wat) in [("nap", nap(2_000)), ("quick", QUICK.to_owned())] {
        first.upload_bytes(task, ::wat::parse_str(&wat).unwrap(), true).await.expect(201);
    }
    let running = first.send(Method::POST, "/v1/tasks/nap/invocations", Some(&json!({}))).await.expect(202);
    let running = format!("/v1/invocations/{}", running.json()["id"].as_str().unwrap());
    let modules: Vec<_> = (0..FLOOD).map(slow).collect();
    for answer in join_all(modules.into_iter().map(|bytes| flooder.upload_bytes("slow", bytes, false))).await
    {
        assert_eq!(answer.expect(201).json()["state"], "compiling");
    }
    let compiled = async || {
        let all = flooder.send(Method::GET, "/v1/tasks/slow/versions", None).await.expect(200).json();
        let items = all["items"].as_array().unwrap();
        assert_eq!(items.len(), FLOOD);
        items.iter().filter(|version| version["state"] != "compiling").count()
    };
    let before = compiled().await;
    let another = QUICK.replace("_start\")", "_start\") (drop (i32.const 1))");
    let mine = first.upload_bytes("late", wat::parse_str(another).unwrap(), true).await.expect(201).json();
    let after = compiled().await;
    assert_eq!(mine["state"], "ready");
    // The one that was under way; and one more that began before the upload was there.
    assert!(after - before <= 2, "{} of the flood's modules went first", after - before);
    assert!(after < FLOOD - 4, "the flood was over before anything could be seen: {after}");
    // Everything else goes on while it lasts.
    let nothing = json!({});
    for done in join_all((0..20).map(|_| first.wait("quick", &nothing))).await {
        assert_eq!(done["state"], "succeeded", "{done:#}");
    }
    assert!(compiled().await < FLOOD, "the flood was over before the invocations were");
    let done = support::eventually(PATIENCE, "the nap's end", async || {
        let now = first.send(Method::GET, &running, None).await.expect(200).json();
        now["finished_at"].is_string().then_some(now)
    })
    .await;
    assert_eq!(
        (&done["state"], done["attempts"].as_array().unwrap().len()),
        (&json!("succeeded"), 1),
        "{done:#}"
    );
    // And nobody is put off for ever.
    support::eventually(PATIENCE, "the end of the flood", async || (compiled().await == FLOOD).then_some(()))
        .await;
}

/// Writes `lines` lines of ten bytes to stderr: `line 0000`, `line 0001`, …, in pieces that end in the midst of lines.
fn lines(lines: u32) -> String {
    format!(
        r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "line 0000\n")
  (func (export "_start") (local $n i32) (local $k i32) (local $at i32)
    (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 3))
    (i32.store (i32.const 8) (i32.const 67)) (i32.store (i32.const 12) (i32.const 7))
    (loop $next
      (local.set $k (local.get $n)) (local.set $at (i32.const 72))
      (loop $digit
        (i32.store8 (local.get $at) (i32.add (i32.const 48) (i32.rem_u (local.get $k) (i32.const 10))))
        (local.set $k (i32.div_u (local.get $k) (i32.const 10)))
        (br_if $digit (i32.gt_u (local.tee $at (i32.sub (local.get $at) (i32.const 1))) (i32.const 68))))
      (drop (call $write (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 32)))
      (drop (call $write (i32.const 2) (i32.const 8) (i32.const 1) (i32.const 32)))
      (br_if $next (i32.lt_u (local.tee $n (i32.add (local.get $n) (i32.const 1))) (i32.const {lines}))))))"#
    )
}

/// The messages of an invocation's log, all of them, in order.
async fn messages(tenant: &Tenant, ended: &Value) -> Vec<String> {
    let mut path = format!("/v1/invocations/{}/logs?limit=500", ended["id"].as_str().unwrap());
    let mut all = Vec::new();
    loop {
        let page = tenant.send(Method::GET, &path, None).await.expect(200).json();
        let items = page["items"].as_array().unwrap();
        all.extend(items.iter().map(|item| item["message"].as_str().unwrap().to_owned()));
        match page["next"].as_str() {
            Some(next) if !items.is_empty() => {
                path =
                    format!("/v1/invocations/{}/logs?limit=500&after={next}", ended["id"].as_str().unwrap());
            }
            _ => return all,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_flood_costs_its_tenant_its_own_quota_and_nobody_else_a_line() {
    const FLOODS: usize = 12;
    /// Bytes that one of them writes.
    const WRITTEN: u64 = 20_000 * 10;
    const LIMIT: u64 = 40_000;
    let settings = [("SANDBAR_SCHEDULER__TICK_MS", "100".to_owned())];
    let deployment = Deployment::on(support::database().await, 1, &settings).await;
    let (first, flooder) = (Tenant::first(&deployment), Tenant::other(&deployment, "flooder").await);
    flooder.upload_bytes("flood", wat::parse_str(lines(20_000)).unwrap(), true).await.expect(201);
    first.upload_bytes("words", wat::parse_str(lines(300)).unwrap(), true).await.expect(201);
    let quota = json!({"quotas": {"log_bytes_per_day": FLOODS as u64 * LIMIT * 2}});
    first.send(Method::PATCH, "/v1/tenants/flooder/quotas", Some(&quota)).await.expect(200);

    let limits = json!({"limits": {"log_bytes": LIMIT}});
    let floods = join_all((0..FLOODS).map(|_| flooder.wait("flood", &limits)));
    let nothing = json!({});
    let words = join_all((0..FLOODS).map(|_| first.wait("words", &nothing)));
    let (floods, words) = tokio::join!(floods, words);

    // Nothing of the other's is lost, late or out of order.
    let wanted: Vec<_> = (0..300).map(|n| format!("line {n:04}")).collect();
    for done in &words {
        assert_eq!(done["state"], "succeeded", "{done:#}");
        let receipt = &done["attempts"][0]["receipt"];
        assert_eq!(receipt["log_dropped_bytes"], 0, "{receipt:#}");
        assert_eq!(messages(&first, done).await, wanted);
    }
    // The flooder has the beginning of each log, and knows how much is missing.
    let mut kept = 0;
    for done in &floods {
        assert_eq!(done["state"], "succeeded", "{done:#}");
        let receipt = &done["attempts"][0]["receipt"];
        let of = |what: &str| receipt[what].as_u64().unwrap();
        assert!(of("log_bytes") <= LIMIT && of("log_bytes") > LIMIT / 8, "{receipt:#}");
        // Ends of lines are not text.
        let lines = WRITTEN / 10;
        assert!(
            (WRITTEN - lines..=WRITTEN).contains(&(of("log_bytes") + of("log_dropped_bytes"))),
            "{receipt:#}"
        );
        kept += of("log_bytes");
        let got = messages(&flooder, done).await;
        assert!(!got.is_empty() && got.iter().enumerate().all(|(n, line)| *line == format!("line {n:04}")));
        assert!(got.iter().map(String::len).sum::<usize>() as u64 <= of("log_bytes"));
    }
    // It pays with its quota for what was kept, to the byte; nobody else does.
    let used = async |tenant: &Tenant| {
        let seen = tenant.send(Method::GET, "/v1/quotas", None).await.expect(200).json();
        let quotas = seen["quotas"].as_array().unwrap().clone();
        quotas.iter().find(|q| q["name"] == "log_bytes_per_day").unwrap()["used"].as_u64()
    };
    support::eventually(PATIENCE, "the log to be charged", async || {
        (used(&flooder).await == Some(kept)).then_some(())
    })
    .await;
    let own =
        words.iter().map(|done| done["attempts"][0]["receipt"]["log_bytes"].as_u64().unwrap()).sum::<u64>();
    support::eventually(PATIENCE, "the other's own", async || {
        (used(&first).await == Some(own)).then_some(())
    })
    .await;

    // With its quota used up it runs as before, and logs nothing.
    let quota = json!({"quotas": {"log_bytes_per_day": kept}});
    first.send(Method::PATCH, "/v1/tenants/flooder/quotas", Some(&quota)).await.expect(200);
    support::eventually(PATIENCE, "a run that logs nothing", async || {
        let done = flooder.wait("flood", &limits).await;
        assert_eq!(done["state"], "succeeded", "{done:#}");
        (done["attempts"][0]["receipt"]["log_bytes"] == 0).then_some(())
    })
    .await;
    let done = first.wait("words", &json!({})).await;
    assert_eq!(messages(&first, &done).await, wanted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_beyond_the_fuel_of_a_day_waits_with_that_reason_and_all_of_it_runs_when_there_is_more() {
    const ALL: usize = 40;
    let settings =
        [("SANDBAR_SCHEDULER__TICK_MS", "50".to_owned()), ("SANDBAR_WORKER__SLOTS", "2".to_owned())];
    let deployment = Deployment::on(support::database().await, 1, &settings).await;
    let (first, spender) = (Tenant::first(&deployment), Tenant::other(&deployment, "spender").await);
    for tenant in [&first, &spender] {
        tenant.upload_bytes("nap", ::wat::parse_str(nap(100)).unwrap(), true).await.expect(201);
    }
    let limit = async |fuel: Value| {
        let quotas = json!({"quotas": {"fuel_per_day": fuel}});
        first.send(Method::PATCH, "/v1/tenants/spender/quotas", Some(&quotas)).await.expect(200);
    };
    limit(json!(1)).await;
    let batch = json!({"invocations": vec![json!({"task": "nap"}); ALL]});
    let accepted = spender.send(Method::POST, "/v1/invocations:batch", Some(&batch)).await.expect(200).json();
    let last = accepted["outcomes"].as_array().unwrap().last().unwrap()["id"].clone();
    let last = format!("/v1/invocations/{}", last.as_str().unwrap());
    let why = support::eventually(PATIENCE, "the end of the day's fuel", async || {
        let why = spender.send(Method::GET, &format!("{last}/why"), None).await.expect(200).json();
        (why["reasons"][0]["kind"] == "quota").then_some(why)
    })
    .await;
    assert!(why["reasons"][0]["detail"].as_str().unwrap().contains("fuel_per_day"), "{why:#}");
    let ended = async || {
        let page = spender.send(Method::GET, "/v1/invocations?state=succeeded&limit=100", None).await;
        page.expect(200).json()["items"].as_array().unwrap().len()
    };
    // The other tenant's work goes on, and what ran at that moment was not stopped; nothing more was begun.
    assert_eq!(first.wait("nap", &json!({})).await["state"], "succeeded");
    let held = ended().await;
    assert!((1..ALL / 2).contains(&held), "{held}");
    assert_eq!(first.wait("nap", &json!({})).await["state"], "succeeded");
    assert!(ended().await <= held + 2, "{held}");
    limit(json!("unlimited")).await;
    support::eventually(PATIENCE, "the rest", async || (ended().await == ALL).then_some(())).await;
}
