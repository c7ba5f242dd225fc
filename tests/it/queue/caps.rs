//! Caps over all workers: of tenants, tasks and concurrency keys. Exact at any moment and after any crash, and a backlog
//! behind one costs the others nothing.

use std::collections::HashMap;

use proptest::prelude::*;
use sandbar::domain::admission::{Admission, Concurrency, Key};

use super::*;

fn keyed(f: &Fixture, key: &str, limit: u32) -> NewInvocation {
    let concurrency = Concurrency { key: Key::try_from(key.to_owned()).unwrap(), limit };
    NewInvocation {
        admission: Admission { concurrency: Some(concurrency), ..Admission::default() },
        ..f.row()
    }
}

fn succeeded(claimed: Vec<Claimed>) -> Vec<Finished> {
    claimed.into_iter().map(|c| finished(c, Verdict::Succeeded)).collect()
}

#[tokio::test]
async fn a_tenant_never_runs_more_than_its_cap_and_at_it_is_not_asked_for() {
    let f = Fixture::new().await;
    f.sql("UPDATE tenants SET max_concurrency = 3").await;
    f.enqueue(&(0..10).map(|_| f.row()).collect::<Vec<_>>()).await;
    assert_eq!(f.worker.ready_tenants(10).await.unwrap()[0].free, Some(3));
    let (a, b) = (f.register().await, f.register().await);
    let two = f.claim(a, 2).await;
    assert_eq!((two.len(), f.claim(b, 10).await.len()), (2, 1));
    assert!(f.worker.ready_tenants(10).await.unwrap().is_empty(), "at its cap");
    assert!(f.claim(a, 10).await.is_empty());
    f.check_places().await;

    let acks = f.worker.ack(a.0, a.1, &succeeded(two)).await.unwrap();
    assert!(acks.wake, "others may claim now");
    assert_eq!(f.worker.ready_tenants(10).await.unwrap()[0].free, Some(2));
    // A worker that dies gives its slots back with its work.
    f.reap(b).await;
    assert_eq!(f.worker.ready_tenants(10).await.unwrap()[0].free, Some(3));
    assert_eq!(f.claim(a, 10).await.len(), 3);
    f.check_places().await;

    f.sql("UPDATE tenants SET max_concurrency = NULL").await;
    assert_eq!(f.claim(a, 10).await.len(), 5);
    f.check_places().await;
}

#[tokio::test]
async fn a_cap_that_is_set_while_work_runs_counts_what_runs() {
    let f = Fixture::new().await;
    f.enqueue(&(0..10).map(|_| f.row()).collect::<Vec<_>>()).await;
    let me = f.register().await;
    let first = f.claim(me, 4).await;
    f.sql("UPDATE tasks SET max_concurrency = 5").await;
    f.sql("UPDATE tenants SET max_concurrency = 6").await;
    f.check_places().await;
    let second = f.claim(me, 10).await;
    assert_eq!(second.len(), 1, "four run already");
    f.ack(me, &succeeded(first)).await;
    f.check_places().await;
    assert_eq!(f.claim(me, 10).await.len(), 4);
    f.ack(me, &succeeded(second)).await;
    f.check_places().await;
}

#[tokio::test]
async fn behind_a_tasks_cap_its_rows_are_parked_once_and_other_tasks_go_on() {
    let f = Fixture::new().await;
    let other = TaskId::generate();
    for statement in [
        "INSERT INTO sandbar.tasks (tenant_id, task_id, name, current_version) VALUES ($1, $2, 'other', 1)",
        "INSERT INTO sandbar.versions (tenant_id, task_id, number, sha256, size_bytes, kind, state)
         VALUES ($1, $2, 1, sha256('m'), 1, 'task', 'ready')",
    ] {
        sqlx::query(statement).bind(f.tenant).bind(other).execute(&f.admin).await.unwrap();
    }
    f.sql("UPDATE tasks SET max_concurrency = 2 WHERE name <> 'other'").await;
    f.enqueue(&(0..300).map(|_| f.row()).collect::<Vec<_>>()).await;
    f.enqueue(&(0..5).map(|_| NewInvocation { task: other, ..f.row() }).collect::<Vec<_>>()).await;
    let me = f.register().await;
    let mut claimed = f.claim(me, 10).await;
    claimed.extend(f.claim(me, 10).await);
    let of_other = claimed.iter().filter(|c| c.task_id == other).count();
    assert_eq!((of_other, claimed.len()), (5, 7), "five of the free task behind 300 of the capped one");
    assert_eq!((f.count("ready").await, f.count("parked").await), (0, 298));
    assert!(f.worker.ready_tenants(10).await.unwrap().is_empty(), "what is parked is nobody's candidate");
    let any: InvocationId = sqlx::query_scalar("SELECT invocation_id FROM sandbar.parked LIMIT 1")
        .fetch_one(&f.admin)
        .await
        .unwrap();
    let mut conn = f.api.tenant(f.tenant).await.unwrap();
    let shown = conn.invocation_get(any, 0).await.unwrap().unwrap();
    assert_eq!(shown.summary.state, State::Queued);
    f.check_places().await;

    // An end brings the oldest parked row back in its own transaction.
    let capped: Vec<_> = claimed.into_iter().filter(|c| c.task_id != other).collect();
    assert!(f.worker.ack(me.0, me.1, &succeeded(capped)).await.unwrap().wake);
    assert_eq!((f.count("ready").await, f.count("parked").await), (2, 296));
    assert_eq!(f.claim(me, 10).await.len(), 2);
    f.check_places().await;

    // A higher cap brings back as many as it has room for, none brings back all.
    f.sql("UPDATE tasks SET max_concurrency = 12 WHERE name <> 'other'").await;
    assert_eq!(f.worker.unpark(1_000).await.unwrap(), 10);
    assert_eq!(f.claim(me, 100).await.len(), 10);
    f.sql("UPDATE tasks SET max_concurrency = NULL").await;
    assert_eq!(f.worker.unpark(1_000).await.unwrap(), 286);
    assert_eq!(f.claim(me, 1_000).await.len(), 286);
    f.check_places().await;
}

#[tokio::test]
async fn rows_of_a_task_that_is_not_active_wait_until_it_is() {
    let f = Fixture::new().await;
    let ids = [f.enqueue_one().await, f.enqueue_one().await];
    f.sql("UPDATE tasks SET active = false").await;
    let me = f.register().await;
    assert!(f.claim(me, 10).await.is_empty());
    assert_eq!(f.count("parked").await, 2);
    // What is parked can be cancelled and expires like anything that waits.
    let mut conn = f.api.tenant(f.tenant).await.unwrap();
    assert_eq!(conn.invocation_cancel(ids[0]).await.unwrap(), Cancelled::Now);
    assert_eq!(f.worker.unpark(10).await.unwrap(), 0);
    f.sql("UPDATE tasks SET active = true").await;
    assert_eq!(f.worker.unpark(10).await.unwrap(), 1);
    assert_eq!(f.claim(me, 10).await[0].invocation, ids[1]);
    f.check_places().await;
}

#[tokio::test]
async fn a_parked_invocation_expires() {
    let f = Fixture::new().await;
    f.sql("UPDATE tasks SET active = false").await;
    let expires_at = Some(Utc::now() + chrono::Duration::milliseconds(50));
    let row = NewInvocation { expires_at, ..f.row() };
    f.enqueue(std::slice::from_ref(&row)).await;
    let me = f.register().await;
    assert!(f.claim(me, 10).await.is_empty());
    support::eventually(Duration::from_secs(5), "the expiry", async || {
        f.worker.expire(10).await.unwrap();
        (f.state(row.id).await == "expired").then_some(())
    })
    .await;
    f.check_places().await;
}

#[tokio::test]
async fn of_a_concurrency_key_only_so_many_run_and_other_keys_are_not_held_up() {
    let f = Fixture::new().await;
    let mut rows: Vec<_> = (0..5).map(|_| keyed(&f, "a", 2)).collect();
    rows.extend((0..2).map(|_| keyed(&f, "b", 1)));
    rows.push(f.row());
    f.enqueue(&rows).await;
    let me = f.register().await;
    let claimed = f.claim(me, 10).await;
    let mut ids: Vec<_> = claimed.iter().map(|c| c.invocation).collect();
    ids.sort();
    assert_eq!(ids, [rows[0].id, rows[1].id, rows[5].id, rows[7].id]);
    f.check_places().await;
    f.ack(me, &succeeded(claimed)).await;
    let next: Vec<_> = f.claim(me, 10).await;
    assert_eq!(next.iter().map(|c| c.invocation).collect::<Vec<_>>(), [rows[2].id, rows[3].id, rows[6].id]);
    f.check_places().await;

    // A freed slot's row is cancelled before anybody claims it: the duty sees to the next.
    f.ack(me, &succeeded(next)).await;
    let mut conn = f.api.tenant(f.tenant).await.unwrap();
    conn.invocation_cancel(rows[4].id).await.unwrap();
    f.worker.tidy(100).await.unwrap();
    let keys: i64 = sqlx::query_scalar("SELECT count(*) FROM sandbar.caps WHERE scope = 2")
        .fetch_one(&f.admin)
        .await
        .unwrap();
    assert_eq!(keys, 0, "idle keys are forgotten");
    f.check_places().await;
}

fn sized(f: &Fixture, mib: u64) -> NewInvocation {
    let mut row = f.row();
    row.spec.limits.memory_bytes = mib << 20;
    row
}

#[tokio::test]
async fn a_tenants_attempts_never_declare_more_memory_than_it_may_have_and_small_ones_do_not_pass_a_large_one()
 {
    let f = Fixture::new().await;
    f.enqueue(&[f.row(), sized(&f, 7)]).await;
    let declared: Vec<i64> = sqlx::query_scalar(
        "SELECT sandbar.declared_memory(spec) FROM sandbar.invocations ORDER BY invocation_id",
    )
    .fetch_all(&f.admin)
    .await
    .unwrap();
    assert_eq!(declared, [i64::try_from(Limits::default().memory_bytes).unwrap(), 7 << 20]);
    let me = f.register().await;
    let before = f.claim(me, 10).await;
    f.ack(me, &succeeded(before)).await;

    f.sql("UPDATE tenants SET max_memory = 10 << 20").await;
    let rows: Vec<_> = [4, 4, 4, 1, 10, 1].map(|mib| sized(&f, mib)).into();
    f.enqueue(&rows).await;
    let (a, b) = (f.register().await, f.register().await);
    let ids = |claimed: &[Claimed]| claimed.iter().map(|c| c.invocation).collect::<Vec<_>>();
    let mut first = f.claim(a, 10).await;
    assert_eq!(ids(&first), [rows[0].id, rows[1].id], "8 of 10 MiB, and the next wants 4");
    assert!(f.worker.ready_tenants(10).await.unwrap().is_empty(), "its next has no room");
    assert!(f.claim(b, 10).await.is_empty());
    f.check_places().await;
    assert!(f.worker.ack(a.0, a.1, &succeeded(vec![first.remove(0)])).await.unwrap().wake);
    assert_eq!(f.worker.ready_tenants(10).await.unwrap().len(), 1);
    let second = f.claim(b, 10).await;
    assert_eq!(ids(&second), [rows[2].id, rows[3].id], "4 + 4 + 1; the next wants all 10");
    f.ack(a, &succeeded(first)).await;
    assert!(
        f.claim(a, 10).await.is_empty(),
        "the last one wants little, and waits for the large one before it"
    );
    f.check_places().await;
    // A worker that dies gives back what its work declared.
    f.reap(b).await;
    assert_eq!(f.claim(a, 10).await.len(), 2, "those that were handed on");
    f.check_places().await;

    // What was accepted when more was allowed runs alone.
    let large = f.claim(a, 10).await;
    assert!(large.is_empty());
    f.sql("UPDATE tenants SET max_memory = 2 << 20").await;
    f.reap(a).await;
    let a = f.register().await;
    for expected in [&rows[2], &rows[3], &rows[4], &rows[5]] {
        let one = f.claim(a, 10).await;
        assert_eq!(ids(&one), [expected.id]);
        f.check_places().await;
        f.ack(a, &succeeded(one)).await;
    }
    f.check_places().await;
}

#[tokio::test]
async fn a_bound_of_memory_that_is_set_while_work_runs_counts_what_runs_and_one_that_goes_lets_all_run() {
    let f = Fixture::new().await;
    f.enqueue(&(0..8).map(|_| sized(&f, 2)).collect::<Vec<_>>()).await;
    let me = f.register().await;
    let first = f.claim(me, 3).await;
    f.sql("UPDATE tenants SET max_memory = 9 << 20").await;
    f.check_places().await;
    let second = f.claim(me, 10).await;
    assert_eq!(second.len(), 1, "6 of 9 MiB are taken");
    f.ack(me, &succeeded(first)).await;
    f.check_places().await;
    f.sql("UPDATE tenants SET max_memory = NULL").await;
    let rest = f.claim(me, 10).await;
    assert_eq!(rest.len(), 4);
    // Those that were not counted are given back to nobody.
    f.sql("UPDATE tenants SET max_memory = 4 << 20").await;
    f.check_places().await;
    f.ack(me, &succeeded(rest)).await;
    f.ack(me, &succeeded(second)).await;
    f.check_places().await;
    let used: i64 = sqlx::query_scalar("SELECT memory_used FROM sandbar.caps WHERE scope = 0")
        .fetch_one(&f.admin)
        .await
        .unwrap();
    assert_eq!(used, 0);
}

/// Several workers on connections of their own claim, acknowledge, release and die at random. At no moment does anything
/// run above its cap, and in the end everything has run. `Err` says what was seen otherwise.
async fn storm(f: Fixture, seed: u64, caps: Caps) -> Result<(), String> {
    use rand::{Rng as _, SeedableRng as _};
    let f = std::sync::Arc::new(f);
    if let Some(cap) = caps.task {
        f.sql(&format!("UPDATE tasks SET max_concurrency = {cap}")).await;
    }
    if let Some(cap) = caps.tenant {
        f.sql(&format!("UPDATE tenants SET max_concurrency = {cap}")).await;
    }
    if let Some(cap) = caps.memory {
        f.sql(&format!("UPDATE tenants SET max_memory = {cap}::bigint << 20")).await;
    }
    let row = |n: i32| {
        let mut row = if n % 3 == 0 { f.row() } else { keyed(&f, &format!("k{}", n % 5), caps.key) };
        row.spec.limits.memory_bytes = [1, 3, 8, 2][n as usize % 4] << 20;
        row
    };
    let rows: Vec<_> = (0..120).map(row).collect();
    f.enqueue(&rows).await;
    let total = i64::try_from(rows.len()).unwrap();
    let workers = (0..4u64).map(|n| {
        let f = f.clone();
        tokio::spawn(async move {
            let mut rng = rand::rngs::StdRng::seed_from_u64(seed * 10 + n);
            let mut me = f.register().await;
            let mut held: Vec<Claimed> = Vec::new();
            let deadline = std::time::Instant::now() + Duration::from_secs(60);
            while f.count("results").await < total {
                if std::time::Instant::now() > deadline {
                    return Err("stuck".to_owned());
                }
                held.extend(f.claim(me, rng.random_range(1..12)).await);
                caps.check(&running(&f).await, running_bytes(&f).await)?;
                match rng.random_range(0..10) {
                    0 => {
                        // Dies with what it holds.
                        held.clear();
                        f.reap(me).await;
                        me = f.register().await;
                    }
                    1 => {
                        let release = |c| finished(c, Verdict::Release { delay_ms: 0 });
                        f.ack(me, &held.drain(..).map(release).collect::<Vec<_>>()).await;
                    }
                    2 => {
                        f.worker.unpark(100).await.unwrap();
                    }
                    3 => {} // goes on holding
                    _ => {
                        let n = rng.random_range(0..=held.len());
                        f.ack(me, &succeeded(held.drain(..n).collect())).await;
                    }
                }
            }
            Ok(())
        })
    });
    for worker in futures_util::future::join_all(workers.collect::<Vec<_>>()).await {
        worker.map_err(|e| e.to_string())??;
    }
    f.check_places().await;
    Ok(())
}

#[derive(Debug, Clone, Copy)]
struct Caps {
    tenant: Option<i32>,
    task: Option<i32>,
    /// In MiB.
    memory: Option<i64>,
    key: u32,
}

impl Caps {
    fn check(&self, running: &HashMap<String, i64>, bytes: i64) -> Result<(), String> {
        let all: i64 = running.values().sum();
        let within = |cap: Option<i32>| cap.is_none_or(|cap| all <= i64::from(cap));
        let keys = running.iter().all(|(key, n)| key.is_empty() || *n <= i64::from(self.key));
        let fits = self.memory.is_none_or(|cap| bytes <= cap << 20);
        if within(self.tenant) && within(self.task) && keys && fits {
            Ok(())
        } else {
            Err(format!("{running:?} and {bytes} bytes under {self:?}"))
        }
    }
}

/// What runs, by concurrency key ('': none), from the leases alone.
async fn running(f: &Fixture) -> HashMap<String, i64> {
    sqlx::query_as::<_, (String, i64)>(
        "SELECT COALESCE(i.concurrency_key, ''), count(*) FROM sandbar.leases l
           CROSS JOIN LATERAL unnest(l.invocations, l.attempts) u(id, attempt)
           JOIN sandbar.invocations i ON i.invocation_id = u.id
         WHERE NOT EXISTS (SELECT 1 FROM sandbar.attempts a WHERE a.invocation_id = u.id AND a.attempt = u.attempt)
         GROUP BY 1",
    )
    .fetch_all(&f.admin)
    .await
    .unwrap()
    .into_iter()
    .collect()
}

/// Bytes of memory that what runs declares, from the leases alone.
async fn running_bytes(f: &Fixture) -> i64 {
    sqlx::query_scalar(
        "SELECT COALESCE(sum(COALESCE(i.spec #>> '{limits,1}', '67108864')::bigint), 0)::bigint FROM sandbar.leases l
           CROSS JOIN LATERAL unnest(l.invocations, l.attempts) u(id, attempt)
           JOIN sandbar.invocations i ON i.invocation_id = u.id
         WHERE NOT EXISTS (SELECT 1 FROM sandbar.attempts a WHERE a.invocation_id = u.id AND a.attempt = u.attempt)",
    )
    .fetch_one(&f.admin)
    .await
    .unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[test]
fn caps_hold_among_concurrent_workers_that_die() {
    let runtime = runtime();
    let cap = || prop::option::of(1..12i32);
    // The largest of what is queued has 8 MiB.
    let cases = (any::<u32>(), cap(), cap(), prop::option::of(8..30i64), 1..4u32);
    let config = ProptestConfig {
        cases: 5,
        failure_persistence: None,
        max_shrink_iters: 0,
        ..ProptestConfig::default()
    };
    proptest!(config, |((seed, tenant, task, memory, key) in cases)| {
        let seen = runtime.block_on(async {
            storm(Fixture::new().await, u64::from(seed), Caps { tenant, task, memory, key }).await
        });
        prop_assert_eq!(seen, Ok(()));
    });
}

#[test]
fn without_any_one_of_its_checks_the_storm_sees_a_cap_broken() {
    // What is cut out, and of which function.
    for (function, check, without) in [
        ("claim", "GREATEST(LEAST(u.n, l.free), 0)", "u.n"),
        ("pass_gates", "m.task_place > m.free", "false"),
        ("pass_gates", "x.running + m.key_place <= m.lim", "true"),
        ("fit_memory", "so_far <= room", "true"),
    ] {
        let seen = runtime().block_on(async {
            let f = Fixture::new().await;
            let definition: String =
                sqlx::query_scalar(&format!("SELECT pg_get_functiondef('sandbar.{function}'::regproc)"))
                    .fetch_one(&f.admin)
                    .await
                    .unwrap();
            assert!(definition.contains(check), "{function} has changed");
            f.sql(&definition.replace(check, without)).await;
            let none = Caps { tenant: None, task: None, memory: None, key: 9 };
            let caps = match check {
                check if check.contains("LEAST") => Caps { tenant: Some(2), ..none },
                check if check.contains("task") => Caps { task: Some(2), ..none },
                check if check.contains("room") => Caps { memory: Some(9), ..none },
                _ => Caps { key: 1, ..none },
            };
            storm(f, 7, caps).await
        });
        assert!(seen.is_err(), "nobody noticed {function} without `{check}`");
    }
}
