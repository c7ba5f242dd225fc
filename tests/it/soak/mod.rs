//! Work flows through several servers and workers over one Postgres while everything is broken in an order that a seed
//! decides; the witnesses are the callers, who remember what they were told, and the workers' journals, in which each
//! start stands before it happens and each end with the guest's own output. The database is asked only at the end, and
//! only to be held against them.
//!
//! The short form is a test like any other. The long one is `make soak`; `SANDBAR_SOAK_INVOCATIONS`,
//! `SANDBAR_SOAK_KILLS`, `SANDBAR_SOAK_SECONDS` and `SANDBAR_SOAK_SEED` change its size and order. When its time is over
//! before its work, it ends what it has begun and says how far it came.

mod fleet;
mod oracle;
mod plan;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{self, Client};
use fleet::Fleet;
use oracle::Oracle;

/// Attempts of the capped task that may run at once, over all workers.
const CAP: usize = 3;
/// Every so many invocations one is of the capped task.
const CAPPED_EVERY: usize = 40;
const SERVERS: usize = 2;
const WORKERS: usize = 3;
/// A caller's pause before it asks again.
const AGAIN: Duration = Duration::from_millis(50);
/// What has been begun must end so long after the time is over.
const REST: Duration = Duration::from_secs(90);
/// Longest request.
const REQUEST: Duration = Duration::from_secs(10);

/// How much of it.
#[derive(Debug, Clone, Copy)]
struct Size {
    invocations: usize,
    kills: usize,
    callers: usize,
    /// Invocations per request, where the server takes batches.
    batch: usize,
    /// Invocations that may be queued before callers wait.
    backlog: usize,
    /// No work is begun and nothing is broken after this.
    time: Duration,
}

const SHORT: Size = Size {
    invocations: 4_000,
    kills: 10,
    callers: 8,
    batch: 20,
    backlog: 600,
    time: Duration::from_secs(90),
};
const LONG: Size = Size {
    invocations: 1_000_000,
    kills: 200,
    callers: 16,
    batch: 500,
    backlog: 30_000,
    time: Duration::from_secs(1_200),
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_or_accepted_twice_whatever_breaks() {
    let long = std::env::var("SANDBAR_SOAK").is_ok_and(|how| how == "long");
    let mut size = if long { LONG } else { SHORT };
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    if let Some(n) = number("SANDBAR_SOAK_INVOCATIONS") {
        size.invocations = n as usize;
    }
    if let Some(n) = number("SANDBAR_SOAK_KILLS") {
        size.kills = n as usize;
    }
    if let Some(n) = number("SANDBAR_SOAK_SECONDS") {
        size.time = Duration::from_secs(n);
    }
    let seed = number("SANDBAR_SOAK_SEED").unwrap_or_else(rand::random);
    soak(size, seed, long).await;
}

/// What callers know, and what they go by.
struct Calls {
    size: Size,
    next: AtomicUsize,
    /// What callers have taken on.
    asked: AtomicUsize,
    acknowledged: Mutex<HashSet<u128>>,
    /// Invocations with a success, as the journals say.
    done: AtomicUsize,
    answered: AtomicU64,
    refused: AtomicU64,
    began: Instant,
}

impl Calls {
    fn is_over(&self) -> bool {
        self.began.elapsed() > self.size.time
    }
}

async fn soak(size: Size, seed: u64, show: bool) {
    let faults = plan::plan(seed, size.kills, WORKERS, SERVERS);
    eprintln!("soak: SANDBAR_SOAK_SEED={seed}, {size:?}, {} faults: {faults:?}", faults.len());
    let guest = support::guest("effect"); // it may have to be built
    let mut fleet = Fleet::start(SERVERS, WORKERS).await;
    let began = Instant::now();
    let admin = fleet.database.admin().await;
    let clients = fleet.clients();
    for task in ["effect", "capped"] {
        clients[0].upload(task, &guest).await.expect(201);
    }
    cap(&admin).await;
    let mut oracle = Oracle::open(&fleet.journal(), CAP);

    let calls = Arc::new(Calls {
        size,
        next: AtomicUsize::new(0),
        asked: AtomicUsize::new(0),
        acknowledged: Mutex::default(),
        done: AtomicUsize::new(0),
        answered: AtomicU64::new(0),
        refused: AtomicU64::new(0),
        began,
    });
    let batches = takes_batches(&clients[0]).await;
    let callers: Vec<_> = (0..size.callers)
        .map(|n| tokio::spawn(call(clients[n % clients.len()].clone(), calls.clone(), batches)))
        .collect();

    // Each fault waits for its share of the work to have been done: work flows between any two.
    let mut inflicted: HashMap<&'static str, usize> = HashMap::new();
    let mut kills = 0;
    let step = size.invocations / (faults.len() + 2);
    let flowing = Instant::now();
    for (index, fault) in faults.iter().enumerate() {
        let due = (index + 1) * step;
        watch(&mut fleet, &mut oracle, &calls, &format!("the work before fault {index}"), |oracle| {
            oracle.done >= due || calls.is_over()
        })
        .await;
        if calls.is_over() {
            break;
        }
        if let Some(pid) = fleet.inflict(*fault).await {
            oracle.gone(pid);
        }
        kills += usize::from(fault.is_kill());
        *inflicted.entry(name(*fault)).or_default() += 1;
        if show {
            eprintln!(
                "soak: {:>4} s, {} of {} done, {} of {} faults, {:?}",
                began.elapsed().as_secs(),
                oracle.done,
                size.invocations,
                index + 1,
                faults.len(),
                fault
            );
        }
    }
    watch(&mut fleet, &mut oracle, &calls, "the rest of the work", |oracle| {
        let asked = calls.asked.load(Ordering::Relaxed);
        callers.iter().all(tokio::task::JoinHandle::is_finished) && oracle.done >= asked
    })
    .await;
    let asked = calls.asked.load(Ordering::Relaxed);
    let whole = asked == size.invocations;
    for caller in callers {
        caller.await.unwrap();
    }
    fleet.wake(true);
    support::eventually(Duration::from_secs(60), "every place but results to be empty", async || {
        let busy: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM sandbar.ready) OR EXISTS (SELECT 1 FROM sandbar.leases)
                 OR EXISTS (SELECT 1 FROM sandbar.scheduled) OR EXISTS (SELECT 1 FROM sandbar.parked)",
        )
        .fetch_one(&admin)
        .await
        .ok()?;
        (!busy).then_some(())
    })
    .await;
    let took = flowing.elapsed();
    oracle.read();

    let ended: Vec<(uuid::Uuid, String)> =
        sqlx::query_as("SELECT invocation_id, state FROM sandbar.results").fetch_all(&admin).await.unwrap();
    let ended: HashMap<u128, String> = ended.into_iter().map(|(id, state)| (id.as_u128(), state)).collect();
    let attempts: Vec<(uuid::Uuid, i16, String)> =
        sqlx::query_as("SELECT invocation_id, attempt, termination ->> 'reason' FROM sandbar.attempts")
            .fetch_all(&admin)
            .await
            .unwrap();
    let recorded = attempts.len();
    let attempts: HashMap<(u128, u32), String> =
        attempts.into_iter().map(|(id, n, reason)| ((id.as_u128(), n as u32), reason)).collect();
    let acknowledged = std::mem::take(&mut *calls.acknowledged.lock().unwrap());
    let compared = oracle.compare(&acknowledged, &ended, &attempts);

    eprintln!(
        "soak{}: {} acknowledged, {} lost, {} starts, {} beyond the first, all {} of them recorded as lost with a lease or a \
         host; {} attempts recorded; {kills} kills {inflicted:?}; {} answers, {} refusals or silences; at most {} of the \
         capped task at once (cap {}); {:.0} s, {:.0} invocations/s under fire; SANDBAR_SOAK_SEED={seed}",
        if whole { "" } else { ", ended by its time" },
        acknowledged.len(),
        compared.lost,
        oracle.starts,
        oracle.starts as usize - oracle.seen.len(),
        compared.explained,
        recorded,
        calls.answered.load(Ordering::Relaxed),
        calls.refused.load(Ordering::Relaxed),
        oracle.most_capped,
        CAP,
        took.as_secs_f64(),
        asked as f64 / took.as_secs_f64(),
    );
    assert!(
        oracle.violations.is_empty(),
        "{} violations: {:#?}\n{}",
        oracle.violated,
        oracle.violations,
        oracle.stories()
    );
    assert_eq!(acknowledged.len(), asked, "idempotency keys gave every request one invocation of its own");
    assert_eq!(ended.len(), asked, "nothing ended that nobody was told of");
    assert_eq!(
        oracle.starts as usize - oracle.seen.len(),
        compared.explained,
        "an extra start without its cause"
    );
    assert!(compared.explained > 0, "no fault hit a running attempt: the test proves nothing");
    assert!(kills >= size.kills || !whole);
    drop(admin);
    fleet.stop().await;
}

fn name(fault: plan::Fault) -> &'static str {
    match fault {
        plan::Fault::Worker(_) => "worker",
        plan::Fault::Cell(_) => "cell",
        plan::Fault::Server(_) => "server",
        plan::Fault::Suspend(_) => "suspension",
        plan::Fault::Postgres => "postgres",
        plan::Fault::Backends => "backends",
        plan::Fault::Held => "held transaction",
        plan::Fault::Exhausted => "exhausted connections",
    }
}

/// Let time pass, with the journals read and the suspended woken, until it is so.
async fn watch(
    fleet: &mut Fleet,
    oracle: &mut Oracle,
    calls: &Calls,
    what: &str,
    so: impl Fn(&Oracle) -> bool,
) {
    let left = (calls.size.time + REST).saturating_sub(calls.began.elapsed());
    support::eventually(left, what, async || {
        fleet.wake(false);
        fleet.must_live();
        oracle.read();
        calls.done.store(oracle.done, Ordering::Relaxed);
        assert!(
            oracle.violations.is_empty(),
            "{} violations: {:#?}\n{}",
            oracle.violated,
            oracle.violations,
            oracle.stories()
        );
        so(oracle).then_some(())
    })
    .await;
}

/// Limits the capped task.
async fn cap(admin: &PgPool) {
    sqlx::query("UPDATE sandbar.tasks SET max_concurrency = $1 WHERE name = 'capped'")
        .bind(CAP as i32)
        .execute(admin)
        .await
        .unwrap();
}

/// Whether the server has the operation for batches.
async fn takes_batches(client: &Client) -> bool {
    let asked = client.post("/v1/invocations:batch", &json!({"invocations": []})).await;
    !matches!(asked.status.as_u16(), 404 | 405)
}

/// One caller: takes a share of the work, again and again, and asks for each until it is acknowledged. Every invocation
/// has an idempotency key of its own, so asking again makes no second one.
async fn call(client: Client, calls: Arc<Calls>, batches: bool) {
    let share = if batches { calls.size.batch } else { 1 };
    loop {
        // Callers who are far ahead of the workers wait: work must be flowing when things break.
        while calls.next.load(Ordering::Relaxed) > calls.done.load(Ordering::Relaxed) + calls.size.backlog {
            if calls.is_over() {
                return;
            }
            tokio::time::sleep(AGAIN).await;
        }
        if calls.is_over() {
            return;
        }
        let first = calls.next.fetch_add(share, Ordering::Relaxed);
        if first >= calls.size.invocations {
            return;
        }
        let mut missing: Vec<usize> = (first..(first + share).min(calls.size.invocations)).collect();
        calls.asked.fetch_add(missing.len(), Ordering::Relaxed);
        while !missing.is_empty() {
            assert!(calls.began.elapsed() < calls.size.time + REST, "not acknowledged in time: {missing:?}");
            let told =
                if batches { ask_batch(&client, &missing).await } else { ask_one(&client, missing[0]).await };
            let Some(told) = told else {
                calls.refused.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(AGAIN).await;
                continue;
            };
            calls.answered.fetch_add(1, Ordering::Relaxed);
            let mut left = Vec::new();
            let mut acknowledged = calls.acknowledged.lock().unwrap();
            for (n, id) in missing.iter().zip(told) {
                match id {
                    Some(id) => drop(acknowledged.insert(id)),
                    None => left.push(*n),
                }
            }
            drop(acknowledged);
            missing = left;
        }
    }
}

fn task(n: usize) -> &'static str {
    if n.is_multiple_of(CAPPED_EVERY) { "capped" } else { "effect" }
}

/// `None`: no answer, or the database is away. Otherwise an id per invocation that was acknowledged.
async fn ask_one(client: &Client, n: usize) -> Option<Vec<Option<u128>>> {
    let answer = client
        .request(Method::POST, &format!("/v1/tasks/{}/invocations", task(n)))
        .header("idempotency-key", format!("key-{n}"))
        .timeout(REQUEST)
        .json(&json!({"input": null}))
        .send()
        .await
        .ok()?;
    let status = answer.status().as_u16();
    let body: Value = answer.json().await.ok()?;
    match status {
        202 | 200 => Some(vec![Some(id(&body["id"]))]),
        503 | 429 => None,
        _ => panic!("{status}: {body}"),
    }
}

async fn ask_batch(client: &Client, missing: &[usize]) -> Option<Vec<Option<u128>>> {
    let invocations: Vec<Value> = missing
        .iter()
        .map(|n| json!({"task": task(*n), "input": null, "idempotency_key": format!("key-{n}")}))
        .collect();
    let answer = client
        .request(Method::POST, "/v1/invocations:batch")
        .timeout(REQUEST)
        .json(&json!({"invocations": invocations}))
        .send()
        .await
        .ok()?;
    let status = answer.status().as_u16();
    let body: Value = answer.json().await.ok()?;
    match status {
        200 => {
            let outcomes = body["outcomes"].as_array().unwrap();
            assert_eq!(outcomes.len(), missing.len());
            Some(
                outcomes
                    .iter()
                    .map(|outcome| match outcome["status"].as_u64() {
                        Some(200 | 202) => Some(id(&outcome["id"])),
                        Some(503 | 429) => None,
                        _ => panic!("{outcome}"),
                    })
                    .collect(),
            )
        }
        503 | 429 => None,
        _ => panic!("{status}: {body}"),
    }
}

fn id(value: &Value) -> u128 {
    value.as_str().unwrap().parse::<uuid::Uuid>().unwrap().as_u128()
}
