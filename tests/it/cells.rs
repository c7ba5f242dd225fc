//! Cells of single tenants and of groups, by real workers: who shares a process, how many there are, when they end, and
//! that waiting for one keeps nobody else from running; and that weights hold between cells.

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::Method;
use rustix::process::Signal;
use sandbar::store::tenant::key_hash;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::wat::{QUICK, SPIN, nap};
use crate::support::{self, Answer, Client, Deployment, Process, send};

/// Longest any wait of these tests takes before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(90);

/// A tenant with a key of its own.
struct Tenant {
    name: String,
    key: String,
    client: Client,
}

impl Tenant {
    async fn new(deployment: &Deployment, id: Uuid, name: &str, weight: i32) -> Self {
        let admin = deployment.database.admin().await;
        let key = format!("sbk_the-key-of-{name}-and-of-nobody-else");
        sqlx::query("INSERT INTO sandbar.tenants (tenant_id, name, weight) VALUES ($1, $2, $3)")
            .bind(id)
            .bind(name)
            .bind(weight)
            .execute(&admin)
            .await
            .unwrap();
        sqlx::query(
            "INSERT INTO sandbar.api_keys (tenant_id, key_id, prefix, hash, role) VALUES ($1, $2, 'sbk', $3, 'admin')",
        )
        .bind(id)
        .bind(Uuid::now_v7())
        .bind(key_hash(&key).as_slice())
        .execute(&admin)
        .await
        .unwrap();
        Self { name: name.to_owned(), key, client: deployment.client() }
    }

    async fn ask(&self, method: Method, path: &str, body: &Value) -> Answer {
        send(self.client.anonymous(method, path).header("x-api-key", &self.key).json(body)).await
    }

    async fn upload(&self, task: &str, wat: &str) {
        let path = format!("/v1/tasks/{task}/versions");
        let request = self.client.anonymous(Method::POST, &path).header("x-api-key", &self.key);
        let request = request.header("content-type", "application/wasm").header("prefer", "wait=60");
        send(request.body(wat::parse_str(wat).unwrap())).await.expect(201);
    }

    async fn enqueue(&self, task: &str, body: &Value) -> String {
        let answer = self.ask(Method::POST, &format!("/v1/tasks/{task}/invocations"), body).await;
        answer.expect(202).json()["id"].as_str().unwrap().to_owned()
    }

    async fn get(&self, id: &str) -> Value {
        self.ask(Method::GET, &format!("/v1/invocations/{id}"), &Value::Null).await.expect(200).json()
    }

    async fn ended(&self, id: &str) -> Value {
        support::eventually(PATIENCE, "the invocation to end", async || {
            let now = self.get(id).await;
            now["reason"].is_string().then_some(now)
        })
        .await
    }
}

fn settings(more: &[(&'static str, String)]) -> Vec<(&'static str, String)> {
    let mut all = vec![
        ("SANDBAR_WORKER__POLL_MS", "100".to_owned()),
        ("SANDBAR_WORKER__SLOTS", "8".to_owned()),
        ("SANDBAR_SCHEDULER__TICK_MS", "100".to_owned()),
    ];
    all.extend_from_slice(more);
    all
}

fn spin() -> Value {
    json!({"limits": {"fuel": 1_000_000_000_000_u64, "timeout_ms": 600_000}})
}

fn is_cell(pid: u32) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.windows(6).any(|word| word == b"__cell")
}

/// The cells of a worker that live.
fn cells(worker: &Process) -> Vec<u32> {
    worker.children().into_iter().filter(|pid| is_cell(*pid)).collect()
}

/// Those in which some guest spins.
fn busy(worker: &Process) -> Vec<u32> {
    cells(worker)
        .into_iter()
        .filter(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // User time in hundredths of a second: the fourteenth field, the twelfth after the name.
            let after = stat.rsplit(')').next().unwrap_or_default();
            after
                .split_whitespace()
                .nth(11)
                .and_then(|user| user.parse::<u64>().ok())
                .is_some_and(|user| user > 30)
        })
        .collect()
}

fn reasons(invocation: &Value) -> Vec<&str> {
    let attempts = invocation["attempts"].as_array().unwrap();
    attempts.iter().filter_map(|attempt| attempt["termination"]["reason"].as_str()).collect()
}

#[tokio::test]
async fn a_cell_that_dies_takes_only_attempts_of_its_own_tenant_or_group_with_it() {
    let ids: Vec<Uuid> = (0..4).map(|_| Uuid::now_v7()).collect();
    let settings = settings(&[
        ("SANDBAR_WORKER__ISOLATION", "tenant".to_owned()),
        ("SANDBAR_WORKER__TRUST_GROUPS", format!(r#"{{friends=["{}","{}"]}}"#, ids[2], ids[3])),
    ]);
    let deployment = Deployment::on(support::database().await, 0, &settings).await;
    let mut tenants = Vec::new();
    for (id, name) in ids.iter().zip(["ada", "bob", "carl", "dora"]) {
        let tenant = Tenant::new(&deployment, *id, name, 100).await;
        tenant.upload("spin", SPIN).await;
        tenants.push(tenant);
    }
    let worker = deployment.spawn_worker();
    let mut spinning = Vec::new();
    for tenant in &tenants {
        spinning.push((tenant, tenant.enqueue("spin", &spin()).await));
    }
    for (tenant, id) in &spinning {
        support::eventually(PATIENCE, "all to run", async || {
            (tenant.get(id).await["state"] == "running").then_some(())
        })
        .await;
    }
    let found = support::eventually(PATIENCE, "three busy cells", async || {
        Some(busy(&worker)).filter(|cells| cells.len() == 3)
    })
    .await;
    assert_eq!(cells(&worker).len(), 3, "one of each and one of the group");
    let mut seen: BTreeSet<String> = BTreeSet::new();
    let mut deaths: Vec<Vec<String>> = Vec::new();
    for pid in found {
        support::kill(pid, Signal::KILL);
        let lost = support::eventually(PATIENCE, "the death to be noticed", async || {
            let mut lost = Vec::new();
            for (tenant, id) in &spinning {
                if !seen.contains(&tenant.name) && reasons(&tenant.get(id).await).contains(&"host-fault") {
                    lost.push(tenant.name.clone());
                }
            }
            // Both of the group are lost by one death, and perhaps not in one ack.
            let half = lost.len() == 1 && ["carl", "dora"].contains(&lost[0].as_str());
            (!lost.is_empty() && !half).then_some(lost)
        })
        .await;
        seen.extend(lost.iter().cloned());
        deaths.push(lost);
    }
    deaths.sort();
    assert_eq!(
        deaths,
        [vec!["ada".to_owned()], vec!["bob".to_owned()], vec!["carl".to_owned(), "dora".to_owned()]]
    );
}

/// Some seconds of CPU, and an end.
const WORK: &str = r#"(module (memory (export "memory") 1)
  (func (export "_start") (local $i i32) (local $x i64)
    (local.set $i (i32.const 1500000000))
    (loop $l
      (local.set $x (i64.add (i64.const 1442695040888963407)
        (i64.mul (local.get $x) (i64.const 6364136223846793005))))
      (br_if $l (local.tee $i (i32.sub (local.get $i) (i32.const 1)))))
    (i64.store (i32.const 0) (local.get $x))))"#;

#[tokio::test]
async fn a_shared_cell_that_dies_costs_its_attempt_no_retry_and_those_of_the_other_cell_nothing() {
    let settings = settings(&[("SANDBAR_WORKER__CELLS", "2".to_owned())]);
    let deployment = Deployment::on(support::database().await, 0, &settings).await;
    let worker = deployment.spawn_worker();
    let mut body = spin();
    // If a death took it, there would be no second one.
    body["retry"] = json!({"max_attempts": 1});
    let mut working = Vec::new();
    for name in ["ada", "bob"] {
        let tenant = Tenant::new(&deployment, Uuid::now_v7(), name, 100).await;
        tenant.upload("work", WORK).await;
        working.push((tenant, String::new()));
    }
    for (tenant, id) in &mut working {
        *id = tenant.enqueue("work", &body).await;
    }
    let found = support::eventually(PATIENCE, "both cells to work", async || {
        Some(busy(&worker)).filter(|cells| cells.len() == 2)
    })
    .await;
    assert_eq!(cells(&worker).len(), 2);
    let (dies, lives) = (found[0], found[1]);
    let killed_at = chrono::Utc::now();
    support::kill(dies, Signal::KILL);

    let mut ends = Vec::new();
    for (tenant, id) in &working {
        let done = tenant.ended(id).await;
        assert_eq!(done["state"], "succeeded", "{done:#}");
        let begun = &done["attempts"].as_array().unwrap().last().unwrap()["started_at"];
        let begun: chrono::DateTime<chrono::Utc> = begun.as_str().unwrap().parse().unwrap();
        ends.push((reasons(&done).join(", "), begun > killed_at));
    }
    ends.sort();
    let [hit, spared] = &ends[..] else { panic!("two") };
    assert_eq!((hit.0.as_str(), hit.1), ("host-fault, succeeded", true), "{ends:?}");
    assert_eq!(
        (spared.0.as_str(), spared.1),
        ("succeeded", false),
        "the one that ran then is the one that ended: {ends:?}"
    );
    let now = support::eventually(PATIENCE, "another cell in its place", async || {
        Some(cells(&worker)).filter(|cells| cells.len() == 2)
    })
    .await;
    assert!(now.contains(&lives) && !now.contains(&dies), "{now:?} after {dies} died beside {lives}");
}

#[tokio::test]
async fn tenants_take_turns_where_there_are_fewer_cells_than_tenants_and_never_more_run() {
    let settings = settings(&[
        ("SANDBAR_WORKER__ISOLATION", "tenant".to_owned()),
        ("SANDBAR_WORKER__MAX_CELLS", "2".to_owned()),
    ]);
    let deployment = Deployment::on(support::database().await, 0, &settings).await;
    let mut tenants = Vec::new();
    for name in ["ada", "bob", "carl"] {
        let tenant = Tenant::new(&deployment, Uuid::now_v7(), name, 100).await;
        tenant.upload("nap", &nap(300)).await;
        tenants.push(tenant);
    }
    let worker = deployment.spawn_worker();
    let mut backlog = Vec::new();
    for _ in 0..100 {
        for tenant in &tenants[..2] {
            backlog.push((tenant, tenant.enqueue("nap", &json!({})).await));
        }
    }
    support::eventually(PATIENCE, "both cells to be there", async || {
        (cells(&worker).len() == 2).then_some(())
    })
    .await;
    let late = tenants[2].enqueue("nap", &json!({})).await;
    let mut most = 0;
    support::eventually(PATIENCE, "the third to have had its turn", async || {
        most = most.max(cells(&worker).len());
        tenants[2].get(&late).await["reason"].is_string().then_some(())
    })
    .await;
    let (tenant, last) = &backlog[backlog.len() - 1];
    let (other, before) = &backlog[backlog.len() - 2];
    let left = [tenant.get(last).await["reason"].clone(), other.get(before).await["reason"].clone()];
    assert!(left.iter().any(Value::is_null), "it waited until the others had nothing more: {left:?}");
    backlog.push((&tenants[2], late));
    for (tenant, id) in &backlog {
        let done = support::eventually(PATIENCE, "all to end", async || {
            most = most.max(cells(&worker).len());
            let now = tenant.get(id).await;
            now["reason"].is_string().then_some(now)
        })
        .await;
        assert_eq!(reasons(&done), ["succeeded"], "{done:#}");
    }
    assert_eq!(most, 2, "cells at once");
}

#[tokio::test]
async fn cells_without_work_end_and_come_back() {
    let settings = settings(&[
        ("SANDBAR_WORKER__ISOLATION", "tenant".to_owned()),
        ("SANDBAR_WORKER__CELL_IDLE_MS", "300".to_owned()),
    ]);
    let deployment = Deployment::on(support::database().await, 0, &settings).await;
    let mut tenants = Vec::new();
    for name in ["ada", "bob"] {
        let tenant = Tenant::new(&deployment, Uuid::now_v7(), name, 100).await;
        tenant.upload("nap", &nap(300)).await;
        tenants.push(tenant);
    }
    let worker = deployment.spawn_worker();
    for _ in 0..2 {
        let mut ids = Vec::new();
        for tenant in &tenants {
            ids.push((tenant, tenant.enqueue("nap", &json!({})).await));
        }
        for (tenant, id) in ids {
            let done = tenant.ended(&id).await;
            assert_eq!(reasons(&done), ["succeeded"], "{done:#}");
        }
        support::eventually(PATIENCE, "the cells to end", async || cells(&worker).is_empty().then_some(()))
            .await;
    }
    let workers = deployment.client().get("/v1/workers").await.expect(200).json();
    assert_eq!(workers["items"][0]["walls"]["no_new_privileges"], true, "{workers:#}");
}

#[tokio::test]
async fn attempts_without_a_cell_are_handed_back_for_free_and_keep_nobody_else_from_running() {
    let ids: Vec<Uuid> = (0..3).map(|_| Uuid::now_v7()).collect();
    let groups = format!(r#"{{one=["{}"],two=["{}"]}}"#, ids[0], ids[1]);
    let mut settings =
        settings(&[("SANDBAR_WORKER__TRUST_GROUPS", groups), ("SANDBAR_WORKER__MAX_CELLS", "1".to_owned())]);
    settings.push(("SANDBAR_WORKER__SLOTS", "4".to_owned()));
    let deployment = Deployment::on(support::database().await, 0, &settings).await;
    let mut tenants = Vec::new();
    for (id, name) in ids.iter().zip(["ada", "bob", "carl"]) {
        let tenant = Tenant::new(&deployment, *id, name, 100).await;
        tenant.upload("spin", SPIN).await;
        tenant.upload("quick", QUICK).await;
        tenants.push(tenant);
    }
    let [holds, waits, other] = &tenants[..] else { panic!("three") };
    let _worker = deployment.spawn_worker();
    let mut long = spin();
    long["limits"]["timeout_ms"] = json!(14_000);
    long["retry"] = json!({"max_attempts": 1});
    let long = holds.enqueue("spin", &long).await;
    support::eventually(PATIENCE, "the only cell of groups to be taken", async || {
        (holds.get(&long).await["state"] == "running").then_some(())
    })
    .await;
    let mut waiting = Vec::new();
    for _ in 0..12 {
        waiting.push(waits.enqueue("quick", &json!({"retry": {"max_attempts": 1}})).await);
    }
    support::eventually(PATIENCE, "one to wait at the worker", async || {
        for id in &waiting {
            if waits.get(id).await["state"] == "running" {
                return Some(());
            }
        }
        None
    })
    .await;
    for _ in 0..10 {
        let id = other.enqueue("quick", &json!({})).await;
        assert_eq!(other.ended(&id).await["state"], "succeeded");
    }
    assert!(holds.get(&long).await["reason"].is_null(), "the others went on while the cell was taken");
    let mut handed_back = 0;
    for id in &waiting {
        let done = waits.ended(id).await;
        assert_eq!(done["state"], "succeeded", "one attempt is all it may have: {done:#}");
        handed_back += reasons(&done).iter().filter(|reason| **reason == "host-fault").count();
    }
    assert!((1..=4).contains(&handed_back), "few wait for ten seconds at the worker: {handed_back}");
    assert_eq!(holds.ended(&long).await["reason"], "deadline");
}

/// CPU that all cells of a worker have used, in hundredths of a second.
fn ticks(worker: &Process) -> u64 {
    let of = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after = stat.rsplit(')').next().unwrap_or_default().to_owned();
        after.split_whitespace().nth(11).and_then(|user| user.parse::<u64>().ok()).unwrap_or(0)
    };
    cells(worker).into_iter().map(of).sum()
}

#[tokio::test]
async fn weights_hold_between_tenants_in_cells_of_their_own() {
    let settings = settings(&[
        ("SANDBAR_WORKER__ISOLATION", "tenant".to_owned()),
        ("SANDBAR_WORKER__SLOTS", "64".to_owned()),
    ]);
    let deployment = Deployment::on(support::database().await, 0, &settings).await;
    let worker = deployment.spawn_worker();
    // Each alone could keep every core busy.
    let each = std::thread::available_parallelism().unwrap().get() + 1;
    let mut spinning = Vec::new();
    for (name, weight) in [("light", 100), ("heavy", 300)] {
        let tenant = Tenant::new(&deployment, Uuid::now_v7(), name, weight).await;
        tenant.upload("spin", SPIN).await;
        spinning.push((tenant, Vec::new()));
    }
    for (tenant, ids) in &mut spinning {
        for _ in 0..each {
            ids.push(tenant.enqueue("spin", &spin()).await);
        }
    }
    support::eventually(PATIENCE, "enough CPU to be used", async || (ticks(&worker) > 800).then_some(()))
        .await;
    let mut cpu = Vec::new();
    for (tenant, ids) in &spinning {
        for id in ids {
            tenant.ask(Method::POST, &format!("/v1/invocations/{id}/cancel"), &json!({})).await;
        }
    }
    for (tenant, ids) in &spinning {
        let mut sum = 0;
        for id in ids {
            let done = tenant.ended(id).await;
            assert_eq!(done["state"], "cancelled", "{done:#}");
            sum += done["attempts"][0]["receipt"]["cpu_ns"].as_u64().unwrap();
        }
        cpu.push(sum as f64 / 1e9);
    }
    let ratio = cpu[1] / cpu[0];
    assert!((1.9..4.5).contains(&ratio), "three times the weight got {ratio:.2} times the CPU: {cpu:?} s");
}
