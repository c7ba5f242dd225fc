//! Everything is killed in turn while work flows. Real processes: one server, two workers with their cells, one
//! Postgres. What was acknowledged must end exactly once, whatever died.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{self, Client, Deployment, Process};

/// Invocations in all.
const TOTAL: usize = 3_000;
/// Callers at once.
const CALLERS: usize = 16;
/// Rounds of killing each victim once.
const ROUNDS: usize = 2;
/// The whole test gives up after this.
const DEADLINE: Duration = Duration::from_secs(240);

/// Silence after which a worker of this test is dead.
const DEAD_AFTER: Duration = Duration::from_millis(900);

/// Ids the server has answered 202 for.
type Acknowledged = Arc<Mutex<HashSet<String>>>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_acknowledged_ends_exactly_once_while_everything_is_killed_in_turn() {
    let began = Instant::now();
    let (postgres, database, _dir) = support::own_postgres().await;
    let admin = database.admin().await;
    let quick = [
        ("SANDBAR_WORKER__HEARTBEAT_MS", "200".to_owned()),
        ("SANDBAR_WORKER__DEAD_AFTER_MS", DEAD_AFTER.as_millis().to_string()),
        ("SANDBAR_WORKER__POLL_MS", "100".to_owned()),
        ("SANDBAR_WORKER__SLOTS", "16".to_owned()),
        ("SANDBAR_SCHEDULER__TICK_MS", "100".to_owned()),
        ("SANDBAR_SCHEDULER__MAX_HANDOVERS", "100".to_owned()),
    ];
    let mut deployment = Deployment::on(database, 2, &quick).await;
    let client = deployment.client();
    for guest in ["effect", "flaky", "word-count"] {
        client.upload(guest, &support::guest(guest)).await.expect(201);
    }

    let acknowledged: Acknowledged = Arc::default();
    let next = Arc::new(AtomicUsize::new(0));
    let callers: Vec<_> = (0..CALLERS)
        .map(|_| tokio::spawn(call(client.clone(), next.clone(), acknowledged.clone(), began)))
        .collect();

    let mut kills = 0;
    for round in 0..ROUNDS {
        for (index, victim) in
            ["worker", "cell", "server", "postgres", "suspended worker"].into_iter().enumerate()
        {
            // Only while work flows: wait for a share of the acknowledgements before each kill.
            let due = (round * 5 + index + 1) * TOTAL / (ROUNDS * 5 + 2);
            support::eventually(DEADLINE, "acknowledgements to flow", async || {
                (acknowledged.lock().unwrap().len() >= due).then_some(())
            })
            .await;
            let worker = round % 2;
            match victim {
                "worker" => {
                    let next = deployment.spawn_worker();
                    std::mem::replace(&mut deployment.workers[worker], next).kill_9();
                }
                "cell" => {
                    let cell = support::eventually(Duration::from_secs(20), "a cell", async || {
                        deployment.workers.iter().find_map(|w| cells(w).pop())
                    })
                    .await;
                    support::kill(cell, Signal::KILL);
                }
                "server" => deployment.restart_server().await,
                "postgres" => {
                    let pid =
                        support::eventually(Duration::from_secs(20), "Postgres", async || postgres.pid())
                            .await;
                    support::kill(pid, Signal::KILL);
                }
                _ => suspend_past_the_lease(&deployment.workers[1 - worker]).await,
            }
            kills += 1;
        }
    }
    for caller in callers {
        caller.await.unwrap();
    }
    assert_eq!(kills, ROUNDS * 5);
    assert!(began.elapsed() < DEADLINE);

    let open: &str = "SELECT count(*) FROM sandbar.invocations i
        WHERE NOT EXISTS (SELECT 1 FROM sandbar.results r WHERE r.invocation_id = i.invocation_id)";
    support::eventually(Duration::from_secs(60), "every invocation to end", async || {
        let left: i64 = sqlx::query_scalar(open).fetch_one(&admin).await.ok()?;
        (left == 0).then_some(())
    })
    .await;

    // Every acknowledged one has ended, and well. (What was queued without its caller hearing of it has ended too.)
    let ended: Vec<(uuid::Uuid, String)> =
        sqlx::query_as("SELECT invocation_id, state FROM sandbar.results").fetch_all(&admin).await.unwrap();
    let ended: std::collections::HashMap<String, String> =
        ended.into_iter().map(|(id, state)| (id.to_string(), state)).collect();
    let acknowledged = acknowledged.lock().unwrap().clone();
    assert_eq!(acknowledged.len(), TOTAL, "idempotency keys gave every caller one invocation of its own");
    for id in &acknowledged {
        assert_eq!(ended.get(id).map(String::as_str), Some("succeeded"), "{id}");
    }

    // Attempts: numbered without gaps; exactly one success, the last; each other is explained.
    let wrong: Vec<(uuid::Uuid, Vec<i16>, Vec<String>)> = sqlx::query_as(
        "SELECT invocation_id, array_agg(attempt ORDER BY attempt), array_agg(termination ->> 'reason' ORDER BY attempt)
         FROM sandbar.attempts GROUP BY invocation_id
         HAVING array_agg(attempt ORDER BY attempt) <> ARRAY(SELECT generate_series(1, max(attempt))::smallint)
            OR count(*) FILTER (WHERE termination ->> 'reason' = 'succeeded') <> 1
            OR (array_agg(termination ->> 'reason' ORDER BY attempt DESC))[1] <> 'succeeded'
            OR count(*) FILTER (WHERE termination ->> 'reason' NOT IN ('succeeded', 'lease-lost', 'host-fault', 'guest-error')) > 0",
    )
    .fetch_all(&admin)
    .await
    .unwrap();
    assert!(wrong.is_empty(), "{wrong:?}");

    // The guest's own word against the database's: the result that was kept is that of the attempt that was kept.
    let (checked, contradicted): (i64, i64) = sqlx::query_as(
        "SELECT count(*), count(*) FILTER (WHERE (convert_from(r.output, 'UTF8')::jsonb ->> 'attempt')::int <> a.attempt
                                              OR convert_from(r.output, 'UTF8')::jsonb ->> 'invocation_id' <> a.invocation_id::text)
         FROM sandbar.results r
         JOIN sandbar.attempts a ON a.invocation_id = r.invocation_id AND a.termination ->> 'reason' = 'succeeded'
         JOIN sandbar.invocations i ON i.invocation_id = r.invocation_id
         JOIN sandbar.tasks t ON t.task_id = i.task_id AND t.name = 'effect'",
    )
    .fetch_one(&admin)
    .await
    .unwrap();
    assert!(checked as usize >= TOTAL / 2);
    assert_eq!(contradicted, 0);

    // The faults were felt: some attempts were lost with their hosts and run again.
    let repeated: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM sandbar.attempts WHERE termination ->> 'reason' IN ('lease-lost', 'host-fault')",
    )
    .fetch_one(&admin)
    .await
    .unwrap();
    assert!(repeated > 0, "no kill hit a running attempt: the test proves nothing");

    let body = json!({"input": {"text": "the cat and the hat", "top": 1}});
    let counted = client.invoke("word-count", &body).await.expect(200).json();
    assert_eq!(counted["result"]["json"]["top"][0]["word"], "the", "{counted:#}");
    assert_eq!(counted["result"]["json"]["top"][0]["count"], 2, "{counted:#}");
    drop(deployment);
    postgres.stop().await.unwrap();
}

/// The cells of a worker.
fn cells(worker: &Process) -> Vec<u32> {
    let mut children = worker.children();
    children.retain(|pid| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.windows(6).any(|w| w == b"__cell"))
    });
    children
}

/// One caller: every invocation has its own idempotency key, and is asked for until it is acknowledged.
async fn call(client: Client, next: Arc<AtomicUsize>, acknowledged: Acknowledged, began: Instant) {
    loop {
        let n = next.fetch_add(1, Ordering::SeqCst);
        if n >= TOTAL {
            return;
        }
        let (task, body) = if n % 10 == 9 {
            (
                "flaky",
                json!({"input": {"succeed_on": 2}, "retry": {"max_attempts": 5, "initial_ms": 20, "jitter": 0.5}}),
            )
        } else {
            ("effect", json!({"input": null}))
        };
        loop {
            assert!(began.elapsed() < DEADLINE, "invocation {n} was not acknowledged in time");
            let asked = client
                .request(Method::POST, &format!("/v1/tasks/{task}/invocations"))
                .header("idempotency-key", format!("key-{n}"))
                .timeout(Duration::from_secs(10))
                .json(&body)
                .send()
                .await;
            if let Ok(answer) = asked {
                let status = answer.status().as_u16();
                if let Ok(body) = answer.json::<Value>().await {
                    if status == 202 {
                        let id = body["id"].as_str().unwrap().to_owned();
                        acknowledged.lock().unwrap().insert(id);
                        break;
                    }
                    // While Postgres is away: unavailable. Anything else is a defect.
                    assert_eq!(status, 503, "{body}");
                }
            } // otherwise the server is away
            tokio::time::sleep(Duration::from_millis(50)).await; // a caller's pause before it asks again
        }
    }
}

/// Stop a worker's process until the reaper has handed its work on, then let it go on: whatever it now says is too late.
async fn suspend_past_the_lease(worker: &Process) {
    worker.signal(Signal::STOP);
    let since = Instant::now();
    support::eventually(Duration::from_secs(20), "the lease to run out", async || {
        (since.elapsed() > DEAD_AFTER * 3).then_some(())
    })
    .await;
    worker.signal(Signal::CONT);
}
