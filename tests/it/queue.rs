//! The queue protocol on a real Postgres, through the store: what enqueue, claim, ack, reap and the moves between
//! waiting places promise, one property per test. Caps and what a request says about its place among others have files
//! of their own.

mod admission;
mod caps;
mod scale;

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::Utc;
use sandbar::domain::ids::{InvocationId, LeaseId, TaskId, TenantId, WorkerId};
use sandbar::domain::invocation::State;
use sandbar::domain::retry::{RetryPolicy, Verdict};
use sandbar::store::invocation::{InputKind, Spec};
use sandbar::store::queue::{Acked, Cancelled, Claimed, Enqueued, Finished, NewInvocation, Want};
use sandbar::store::worker::{Load, Registration};
use sandbar::store::{ApiStore, Connect, Error, WorkerStore};
use sandbar_host::limits::Limits;
use sandbar_host::log::Log;
use sandbar_host::outcome::{Outcome, Receipt, Termination};
use sqlx::PgPool;

use crate::support;

const DAY: Duration = Duration::from_secs(86_400);
const DEAD: Duration = Duration::from_secs(6);

/// A fresh database with one tenant, one task and one ready version.
struct Fixture {
    api: ApiStore,
    worker: WorkerStore,
    admin: PgPool,
    tenant: TenantId,
    task: TaskId,
}

impl Fixture {
    async fn new() -> Self {
        let database = support::database().await;
        let connect = |url: String| Connect {
            url,
            max_connections: 8,
            acquire_timeout: Duration::from_secs(5),
            statement_timeout: Duration::from_secs(10),
        };
        let admin = database.admin().await;
        let fixture = Self {
            api: ApiStore::connect(&connect(database.api_url())).await.unwrap(),
            worker: WorkerStore::connect(&connect(database.worker_url())).await.unwrap(),
            admin,
            tenant: TenantId::generate(),
            task: TaskId::generate(),
        };
        fixture.tenant(fixture.tenant, fixture.task, "one").await;
        fixture
    }

    async fn tenant(&self, tenant: TenantId, task: TaskId, name: &str) {
        for statement in [
            "INSERT INTO sandbar.tenants (tenant_id, name) SELECT $1, $3 WHERE $2 IS NOT NULL",
            "INSERT INTO sandbar.tasks (tenant_id, task_id, name, current_version) VALUES ($1, $2, $3, 1)",
            "INSERT INTO sandbar.blobs (tenant_id, sha256, bytes) SELECT $1, sha256('m'), 'm' WHERE $2 IS NOT NULL AND $3 <> ''",
            "INSERT INTO sandbar.versions (tenant_id, task_id, number, sha256, size_bytes, kind, state)
             SELECT $1, $2, 1, sha256('m'), 1, 'task', 'ready' WHERE $3 <> ''",
        ] {
            sqlx::query(statement).bind(tenant).bind(task).bind(name).execute(&self.admin).await.unwrap();
        }
    }

    fn row(&self) -> NewInvocation {
        NewInvocation {
            tenant: self.tenant,
            id: InvocationId::generate(),
            task: self.task,
            version: 1,
            priority: 0,
            input: b"1".to_vec(),
            spec: Spec {
                input: InputKind::Task,
                limits: Limits::default(),
                retry: RetryPolicy::default(),
                retry_of: None,
                scratch: None,
                determinism: None,
                family: None,
                sealed: None,
            },
            tags: BTreeMap::new(),
            run_at: None,
            expires_at: None,
            idempotency: None,
            admission: Default::default(),
        }
    }

    async fn enqueue(&self, rows: &[NewInvocation]) -> Vec<Enqueued> {
        self.api.enqueue(rows, DAY).await.unwrap()
    }

    async fn enqueue_one(&self) -> InvocationId {
        let row = self.row();
        assert_eq!(self.enqueue(std::slice::from_ref(&row)).await, [Enqueued::Accepted(row.id)]);
        row.id
    }

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

    async fn claim(&self, (worker, epoch): (WorkerId, i64), n: i32) -> Vec<Claimed> {
        self.worker.claim(worker, epoch, &[Want::of(self.tenant, n)]).await.unwrap()
    }

    async fn ack(&self, (worker, epoch): (WorkerId, i64), items: &[Finished]) -> Vec<Acked> {
        self.worker.ack(worker, epoch, items).await.unwrap().accepted
    }

    async fn reap(&self, who: (WorkerId, i64)) -> sandbar::store::queue::Reaped {
        self.worker.reap(DEAD, 10, Some(who.0)).await.unwrap()
    }

    async fn count(&self, table: &str) -> i64 {
        sqlx::query_scalar(&format!("SELECT count(*) FROM sandbar.{table}"))
            .fetch_one(&self.admin)
            .await
            .unwrap()
    }

    async fn state(&self, id: InvocationId) -> String {
        sqlx::query_scalar(
            "SELECT COALESCE((SELECT state FROM sandbar.results WHERE invocation_id = $1),
               CASE WHEN EXISTS (SELECT 1 FROM sandbar.queued WHERE invocation_id = $1) THEN 'queued'
                    WHEN EXISTS (SELECT 1 FROM sandbar.scheduled WHERE invocation_id = $1) THEN 'scheduled'
                    ELSE 'running' END)",
        )
        .bind(id)
        .fetch_one(&self.admin)
        .await
        .unwrap()
    }

    /// Every invocation is in exactly one place.
    async fn check_places(&self) {
        let wrong: Vec<(uuid::Uuid, i64)> = sqlx::query_as(
            "SELECT i.invocation_id,
               (SELECT count(*) FROM sandbar.queued r WHERE r.invocation_id = i.invocation_id)
               + (SELECT count(*) FROM sandbar.scheduled s WHERE s.invocation_id = i.invocation_id)
               + (SELECT count(*) FROM sandbar.results t WHERE t.invocation_id = i.invocation_id)
               + (SELECT count(*) FROM sandbar.leases l CROSS JOIN LATERAL unnest(l.invocations, l.attempts) u(id, attempt)
                  WHERE u.id = i.invocation_id AND NOT EXISTS (
                    SELECT 1 FROM sandbar.attempts a WHERE a.invocation_id = u.id AND a.attempt = u.attempt))
             FROM sandbar.invocations i",
        )
        .fetch_all(&self.admin)
        .await
        .unwrap();
        for (id, places) in wrong {
            assert_eq!(places, 1, "invocation {id} is in {places} places");
        }
        self.check_counters().await;
    }

    /// What is counted as running is what open lease items were charged.
    async fn check_counters(&self) {
        let counted: Vec<(i16, i32, i64)> = sqlx::query_as(
            "SELECT c.scope, c.running, (SELECT count(*) FROM sandbar.leases l
               CROSS JOIN LATERAL unnest(l.tenants, l.invocations, l.attempts, l.flags) u(tenant, id, attempt, flags)
               JOIN sandbar.invocations i ON i.invocation_id = u.id
               WHERE u.tenant = c.tenant_id AND u.flags & (1 << c.scope) <> 0
                 AND (c.scope = 0 OR i.task_id = c.task_id) AND (c.scope < 2 OR i.concurrency_key = c.key)
                 AND NOT EXISTS (SELECT 1 FROM sandbar.attempts a WHERE a.invocation_id = u.id AND a.attempt = u.attempt))
             FROM sandbar.caps c",
        )
        .fetch_all(&self.admin)
        .await
        .unwrap();
        for (scope, running, open) in counted {
            assert_eq!(i64::from(running), open, "a counter of scope {scope}");
        }
        let memory: Vec<(i64, i64)> = sqlx::query_as(
            "SELECT c.memory_used, (SELECT COALESCE(sum(COALESCE(i.spec #>> '{limits,1}', '67108864')::bigint), 0)::bigint FROM sandbar.leases l
               CROSS JOIN LATERAL unnest(l.tenants, l.invocations, l.attempts, l.flags) u(tenant, id, attempt, flags)
               JOIN sandbar.invocations i ON i.invocation_id = u.id
               WHERE u.tenant = c.tenant_id AND u.flags & 64 <> 0
                 AND NOT EXISTS (SELECT 1 FROM sandbar.attempts a WHERE a.invocation_id = u.id AND a.attempt = u.attempt))
             FROM sandbar.caps c WHERE c.scope = 0",
        )
        .fetch_all(&self.admin)
        .await
        .unwrap();
        for (used, open) in memory {
            assert_eq!(used, open, "bytes of memory of a tenant");
        }
    }

    async fn sql(&self, statement: &str) {
        sqlx::raw_sql(&format!("SET search_path = sandbar; {statement}")).execute(&self.admin).await.unwrap();
    }
}

fn finished(claimed: Claimed, verdict: Verdict) -> Finished {
    Finished {
        claimed,
        verdict,
        started_at: Utc::now(),
        outcome: Outcome {
            termination: Termination::Succeeded,
            receipt: Receipt { fuel: 7, fuel_exact: true, ..Receipt::default() },
            output: b"out".to_vec(),
            content_type: "application/json".to_owned(),
            logs: Log::default(),
            backtrace: Vec::new(),
            artifacts: Vec::new(),
        },
        sealed_log: None,
    }
}

#[tokio::test]
async fn an_invocation_goes_from_queued_to_running_to_its_result() {
    let f = Fixture::new().await;
    let id = f.enqueue_one().await;
    assert_eq!(f.state(id).await, "queued");
    let me = f.register().await;
    let mut claimed = f.claim(me, 10).await;
    assert_eq!(claimed.len(), 1);
    assert_eq!(f.state(id).await, "running");
    let one = claimed.remove(0);
    assert_eq!((one.attempt, one.spent, one.input.as_slice()), (1, 0, &b"1"[..]));
    let acked = f.ack(me, &[finished(one, Verdict::Succeeded)]).await;
    assert_eq!(acked, [Acked { invocation: id, state: State::Succeeded }]);
    assert_eq!(f.state(id).await, "succeeded");
    assert_eq!(f.count("leases").await, 0, "a lease whose items are all done is gone");
    f.check_places().await;
}

#[tokio::test]
async fn higher_priority_goes_first_and_equal_priority_in_order_of_age() {
    let f = Fixture::new().await;
    let rows: Vec<_> =
        [0, 5, -5, 5, 0].into_iter().map(|priority| NewInvocation { priority, ..f.row() }).collect();
    f.enqueue(&rows).await;
    let me = f.register().await;
    let got: Vec<_> = f.claim(me, 10).await.iter().map(|c| c.invocation).collect();
    assert_eq!(got, [rows[1].id, rows[3].id, rows[0].id, rows[4].id, rows[2].id]);
}

#[tokio::test]
async fn a_low_priority_is_overtaken_by_younger_work_for_a_bounded_time_only() {
    let f = Fixture::new().await;
    let low = NewInvocation { priority: -10, ..f.row() };
    f.enqueue(std::slice::from_ref(&low)).await;
    // It has waited for more than ten minutes: what is asked for now, at priority 0, comes after it.
    f.sql("UPDATE invocations SET created_at = created_at - interval '11 min'").await;
    f.sql("UPDATE ready SET rank = rank - interval '11 min'").await;
    let young = f.enqueue_one().await;
    let urgent = NewInvocation { priority: 10, ..f.row() };
    f.enqueue(std::slice::from_ref(&urgent)).await;
    let me = f.register().await;
    let got: Vec<_> = f.claim(me, 10).await.iter().map(|c| c.invocation).collect();
    assert_eq!(got, [urgent.id, low.id, young]);
}

#[tokio::test]
async fn a_retry_keeps_its_place_by_age_and_what_was_asked_for_later_counts_from_then() {
    let f = Fixture::new().await;
    let later = NewInvocation { run_at: Some(Utc::now() + chrono::Duration::milliseconds(300)), ..f.row() };
    f.enqueue(std::slice::from_ref(&later)).await;
    let (old, young) = (f.enqueue_one().await, f.enqueue_one().await);
    let me = f.register().await;
    let end = finished(f.claim(me, 1).await.remove(0), Verdict::Release { delay_ms: 0 });
    assert_eq!(end.claimed.invocation, old);
    f.ack(me, &[end]).await;
    support::eventually(Duration::from_secs(5), "the time", async || {
        (f.worker.promote(10).await.unwrap().0 == 1).then_some(())
    })
    .await;
    let got: Vec<_> = f.claim(me, 10).await.iter().map(|c| c.invocation).collect();
    assert_eq!(got, [old, young, later.id]);
}

#[tokio::test]
async fn a_claim_takes_no_more_than_asked_and_two_workers_never_the_same() {
    let f = Fixture::new().await;
    let rows: Vec<_> = (0..40).map(|_| f.row()).collect();
    f.enqueue(&rows).await;
    let (a, b) = (f.register().await, f.register().await);
    let (x, y) = tokio::join!(f.claim(a, 15), f.claim(b, 15));
    assert!(x.len() <= 15 && y.len() <= 15);
    let mut ids: Vec<_> = x.iter().chain(&y).map(|c| c.invocation).collect();
    let n = ids.len();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), n);
    f.check_places().await;
}

#[tokio::test]
async fn an_ack_of_a_lost_lease_changes_nothing() {
    let f = Fixture::new().await;
    let id = f.enqueue_one().await;
    let old = f.register().await;
    let stale = f.claim(old, 1).await.remove(0);
    assert_eq!(f.reap(old).await.handed_on, 1);
    assert_eq!(f.state(id).await, "queued");
    assert!(f.ack(old, &[finished(stale, Verdict::Succeeded)]).await.is_empty());
    assert_eq!(f.state(id).await, "queued");

    // The next attempt has the next number, and no retry was used up.
    let new = f.register().await;
    let again = f.claim(new, 1).await.remove(0);
    assert_eq!((again.invocation, again.attempt, again.spent), (id, 2, 0));
    assert_eq!(f.ack(new, &[finished(again, Verdict::Succeeded)]).await.len(), 1);
    assert_eq!(f.count("results").await, 1);
    assert_eq!(f.count("attempts").await, 2);
    f.check_places().await;
}

#[tokio::test]
async fn a_second_ack_of_the_same_attempt_changes_nothing() {
    let f = Fixture::new().await;
    let (one, two) = (f.enqueue_one().await, f.enqueue_one().await);
    let me = f.register().await;
    let claimed = f.claim(me, 2).await;
    // The lease stays open through the other item, so only the attempt's own row refuses the repetition.
    let mut ends: Vec<_> = claimed.into_iter().map(|c| finished(c, Verdict::Succeeded)).collect();
    let second = ends.pop().unwrap();
    assert_eq!(f.ack(me, &ends).await, [Acked { invocation: one, state: State::Succeeded }]);
    ends[0].verdict = Verdict::Dead;
    assert!(f.ack(me, &ends).await.is_empty());
    assert_eq!(f.state(one).await, "succeeded");
    assert_eq!(f.count("leases").await, 1);
    assert_eq!(f.ack(me, &[second]).await, [Acked { invocation: two, state: State::Succeeded }]);
    assert_eq!(f.count("leases").await, 0);
}

#[tokio::test]
async fn an_ack_under_another_epoch_or_worker_changes_nothing() {
    let f = Fixture::new().await;
    let id = f.enqueue_one().await;
    let me = f.register().await;
    let other = f.register().await;
    let end = [finished(f.claim(me, 1).await.remove(0), Verdict::Succeeded)];
    assert!(f.ack((me.0, me.1.wrapping_add(1)), &end).await.is_empty());
    assert!(f.ack(other, &end).await.is_empty());
    assert_eq!(f.state(id).await, "running");
    assert_eq!(f.ack(me, &end).await.len(), 1);
}

#[tokio::test]
async fn a_worker_that_was_declared_dead_can_neither_claim_nor_heartbeat() {
    let f = Fixture::new().await;
    let id = f.enqueue_one().await;
    let me = f.register().await;
    f.reap(me).await;
    let refused = f.worker.claim(me.0, me.1, &[Want::of(f.tenant, 1)]).await;
    assert!(matches!(refused, Err(Error::WorkerGone)), "{refused:?}");
    assert!(matches!(f.worker.worker_heartbeat(me.0, me.1, Load::default()).await, Err(Error::WorkerGone)));
    assert_eq!(f.state(id).await, "queued", "a refused claim takes nothing");
}

#[tokio::test]
async fn what_a_claim_took_whose_answer_was_lost_is_found_and_given_back() {
    let f = Fixture::new().await;
    let (one, two) = (f.enqueue_one().await, f.enqueue_one().await);
    let (me, other) = (f.register().await, f.register().await);
    let lease = LeaseId::generate();
    drop(f.worker.claim_under(me.0, me.1, lease, &[Want::of(f.tenant, 2)]).await.unwrap());

    assert!(f.worker.leased(other.0, other.1, &[lease]).await.unwrap().is_empty(), "nobody else's");
    assert!(f.worker.leased(me.0, me.1, &[LeaseId::generate()]).await.unwrap().is_empty());
    let mut found = f.worker.leased(me.0, me.1, &[lease]).await.unwrap();
    found.sort_by_key(|c| c.invocation);
    assert_eq!(found.iter().map(|c| c.invocation).collect::<Vec<_>>(), [one, two]);
    let back = finished(found.remove(0), Verdict::Release { delay_ms: 0 });
    assert_eq!(f.ack(me, &[back]).await, [Acked { invocation: one, state: State::Queued }]);

    // What has ended is no longer open.
    assert_eq!(f.worker.leased(me.0, me.1, &[lease]).await.unwrap().len(), 1);
    f.check_places().await;
}

#[tokio::test]
async fn only_silent_workers_are_reaped() {
    let f = Fixture::new().await;
    let (alive, silent) = (f.register().await, f.register().await);
    sqlx::query("UPDATE sandbar.workers SET heartbeat_at = now() - interval '7 s' WHERE worker_id = $1")
        .bind(silent.0)
        .execute(&f.admin)
        .await
        .unwrap();
    assert_eq!(f.worker.reap(DEAD, 10, None).await.unwrap().workers, 1);
    assert!(f.worker.worker_heartbeat(alive.0, alive.1, Load::default()).await.is_ok());
    assert!(f.worker.worker_heartbeat(silent.0, silent.1, Load::default()).await.is_err());
}

#[tokio::test]
async fn an_invocation_that_loses_too_many_workers_is_dead() {
    let f = Fixture::new().await;
    let id = f.enqueue_one().await;
    for round in 1..=3 {
        let me = f.register().await;
        assert_eq!(f.claim(me, 1).await.len(), 1, "round {round}");
        let reaped = f.worker.reap(DEAD, 2, Some(me.0)).await.unwrap();
        assert_eq!(reaped.given_up, i64::from(round == 3), "round {round}");
    }
    assert_eq!(f.state(id).await, "dead");
    f.check_places().await;
}

#[tokio::test]
async fn what_was_only_handed_back_is_not_near_its_end_when_a_host_fails_under_it() {
    let f = Fixture::new().await;
    let id = f.enqueue_one().await;
    let me = f.register().await;
    let end = async |verdict| {
        let mut end = finished(f.claim(me, 1).await.remove(0), verdict);
        end.outcome.termination = Termination::HostFault { message: String::new() };
        let faults = end.claimed.faults;
        f.ack(me, &[end]).await;
        faults
    };
    // More often than faults are allowed, and more often than leases may be lost (10 each).
    for _ in 0..12 {
        end(Verdict::HandBack { delay_ms: 0 }).await;
    }
    assert_eq!(end(Verdict::Release { delay_ms: 0 }).await, 0, "handed back, not failed");
    assert_eq!(end(Verdict::Release { delay_ms: 0 }).await, 1, "the fault before it counts");

    let lost = f.register().await;
    assert_eq!(f.claim(lost, 1).await[0].faults, 2);
    let reaped = f.reap(lost).await;
    assert_eq!((reaped.handed_on, reaped.given_up), (1, 0));

    let again = f.claim(me, 1).await.remove(0);
    assert_eq!((again.invocation, again.faults), (id, 3), "a lost lease counts");
    let recovered = f.worker.leased(me.0, me.1, &[again.lease]).await.unwrap();
    assert_eq!(recovered[0].faults, 3);
    f.check_places().await;
}

#[tokio::test]
async fn a_retry_waits_and_counts_and_a_release_does_neither() {
    let f = Fixture::new().await;
    let id = f.enqueue_one().await;
    let me = f.register().await;
    let end = finished(f.claim(me, 1).await.remove(0), Verdict::Retry { delay_ms: 0 });
    assert_eq!(f.ack(me, &[end]).await, [Acked { invocation: id, state: State::Scheduled }]);
    assert_eq!(f.state(id).await, "scheduled");
    assert!(f.claim(me, 1).await.is_empty());
    assert_eq!(f.worker.promote(10).await.unwrap().0, 1);
    let second = f.claim(me, 1).await.remove(0);
    assert_eq!((second.attempt, second.spent), (2, 1));

    let end = finished(second, Verdict::Release { delay_ms: 0 });
    assert_eq!(f.ack(me, &[end]).await, [Acked { invocation: id, state: State::Queued }]);
    let third = f.claim(me, 1).await.remove(0);
    assert_eq!((third.attempt, third.spent), (3, 1));

    let end = finished(third, Verdict::Release { delay_ms: 60_000 });
    assert_eq!(f.ack(me, &[end]).await, [Acked { invocation: id, state: State::Scheduled }]);
    let (moved, next) = f.worker.promote(10).await.unwrap();
    assert_eq!(moved, 0);
    assert!(next.unwrap() > Utc::now() + chrono::Duration::seconds(50));
    f.check_places().await;
}

#[tokio::test]
async fn cancelling_ends_what_waits_and_flags_what_runs() {
    let f = Fixture::new().await;
    let mut conn = f.api.tenant(f.tenant).await.unwrap();
    let queued = f.enqueue_one().await;
    assert_eq!(conn.invocation_cancel(queued).await.unwrap(), Cancelled::Now);
    assert_eq!(conn.invocation_cancel(queued).await.unwrap(), Cancelled::TooLate);
    assert_eq!(f.state(queued).await, "cancelled");

    let later = NewInvocation { run_at: Some(Utc::now() + chrono::Duration::hours(1)), ..f.row() };
    f.enqueue(std::slice::from_ref(&later)).await;
    assert_eq!(conn.invocation_cancel(later.id).await.unwrap(), Cancelled::Now);

    let running = f.enqueue_one().await;
    let me = f.register().await;
    let claimed = f.claim(me, 1).await.remove(0);
    assert_eq!(conn.invocation_cancel(running).await.unwrap(), Cancelled::Soon);
    assert_eq!(f.worker.worker_heartbeat(me.0, me.1, Load::default()).await.unwrap().cancels, [running]);
    // It fails for another reason before the cancellation reaches it: no further attempt.
    let acked = f.ack(me, &[finished(claimed, Verdict::Retry { delay_ms: 0 })]).await;
    assert_eq!(acked[0].state, State::Cancelled);
    assert_eq!(f.count("cancels").await, 0);
    assert_eq!(conn.invocation_cancel(InvocationId::generate()).await.unwrap(), Cancelled::Unknown);
    f.check_places().await;
}

#[tokio::test]
async fn what_waits_past_its_expiry_ends_expired_and_what_runs_may_finish() {
    let f = Fixture::new().await;
    let soon =
        || NewInvocation { expires_at: Some(Utc::now() + chrono::Duration::milliseconds(50)), ..f.row() };
    let (runs, waits) = (soon(), soon());
    f.enqueue(std::slice::from_ref(&runs)).await;
    let me = f.register().await;
    let claimed = f.claim(me, 1).await.remove(0);
    f.enqueue(std::slice::from_ref(&waits)).await;
    support::eventually(Duration::from_secs(5), "the expiry", async || {
        f.worker.expire(10).await.unwrap();
        (f.state(waits.id).await == "expired").then_some(())
    })
    .await;
    assert_eq!(f.state(runs.id).await, "running");
    assert_eq!(f.ack(me, &[finished(claimed, Verdict::Succeeded)]).await[0].state, State::Succeeded);
    assert_eq!(f.count("expiring").await, 0);
    f.check_places().await;
}

#[tokio::test]
async fn an_idempotency_key_gives_the_first_invocation_or_a_conflict() {
    let f = Fixture::new().await;
    let keyed = |print: u8| NewInvocation { idempotency: Some(("k".to_owned(), [print; 32])), ..f.row() };
    let (first, same, other) = (keyed(1), keyed(1), keyed(2));
    // Twice in one flush, and again later.
    let answers = f.enqueue(&[first.clone(), same.clone()]).await;
    assert_eq!(answers, [Enqueued::Accepted(first.id), Enqueued::Replayed(first.id)]);
    assert_eq!(f.enqueue(&[other]).await, [Enqueued::Conflict]);
    assert_eq!(f.enqueue(&[keyed(1), f.row()]).await[0], Enqueued::Replayed(first.id));
    assert_eq!(f.count("invocations").await, 2);

    // Past its time the key is free again.
    sqlx::query("UPDATE sandbar.idempotency_keys SET expires_at = now() - interval '1 s'")
        .execute(&f.admin)
        .await
        .unwrap();
    let new = keyed(9);
    assert_eq!(f.enqueue(std::slice::from_ref(&new)).await, [Enqueued::Accepted(new.id)]);
}

#[tokio::test]
async fn keys_of_two_tenants_do_not_meet() {
    let f = Fixture::new().await;
    let (tenant, task) = (TenantId::generate(), TaskId::generate());
    f.tenant(tenant, task, "two").await;
    let mine = NewInvocation { idempotency: Some(("k".to_owned(), [1; 32])), ..f.row() };
    let theirs = NewInvocation { tenant, task, idempotency: Some(("k".to_owned(), [2; 32])), ..f.row() };
    let answers = f.enqueue(&[mine.clone(), theirs.clone()]).await;
    assert_eq!(answers, [Enqueued::Accepted(mine.id), Enqueued::Accepted(theirs.id)]);
    let ready = f.worker.ready_tenants(10).await.unwrap();
    assert_eq!(ready.len(), 2);
}

#[tokio::test]
async fn a_row_that_refers_to_nothing_fails_its_flush_whole() {
    let f = Fixture::new().await;
    let bad = NewInvocation { version: 99, ..f.row() };
    let error = f.api.enqueue(&[f.row(), bad], DAY).await.unwrap_err();
    assert!(matches!(error, Error::Constraint { .. }), "{error:?}");
    assert_eq!(f.count("invocations").await, 0);
    assert_eq!(f.count("ready").await, 0);
}

#[tokio::test]
async fn a_version_that_has_invocations_stays_and_none_is_queued_of_one_that_is_gone() {
    let f = Fixture::new().await;
    let delete = "DELETE FROM sandbar.versions WHERE number = $1";
    for add in [
        "INSERT INTO sandbar.blobs SELECT tenant_id, sha256('n'), bytes FROM sandbar.blobs",
        "INSERT INTO sandbar.versions (tenant_id, task_id, number, sha256, size_bytes, kind, state)
         SELECT tenant_id, task_id, 2, sha256('n'), 1, 'task', 'ready' FROM sandbar.versions",
    ] {
        sqlx::raw_sql(add).execute(&f.admin).await.unwrap();
    }
    let second = NewInvocation { version: 2, ..f.row() };
    // One that is being queued while its version is being deleted: whoever comes second waits, and is refused.
    let mut deleting = f.admin.begin().await.unwrap();
    sqlx::query(delete).bind(2).execute(&mut *deleting).await.unwrap();
    let queued = f.api.enqueue(std::slice::from_ref(&second), DAY);
    let (queued, ()) = tokio::join!(queued, async {
        support::eventually(Duration::from_secs(20), "the enqueue to wait for the deletion", async || {
            let waits: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM pg_locks WHERE NOT granted)")
                .fetch_one(&f.admin)
                .await
                .unwrap();
            waits.then_some(())
        })
        .await;
        deleting.commit().await.unwrap();
    });
    assert!(
        matches!(&queued, Err(Error::Constraint { constraint }) if constraint == "invocations_version"),
        "{queued:?}"
    );

    f.enqueue(&[f.row()]).await;
    let refused = sqlx::query(delete).bind(1).execute(&f.admin).await.unwrap_err();
    assert_eq!(
        refused.as_database_error().and_then(|e| e.constraint()),
        Some("invocations_version"),
        "{refused}"
    );
}

#[tokio::test]
async fn nul_and_broken_text_in_outputs_and_inputs_survive_the_way() {
    let f = Fixture::new().await;
    let row = NewInvocation { input: vec![0, 255, 0], ..f.row() };
    f.enqueue(std::slice::from_ref(&row)).await;
    let me = f.register().await;
    let mut end = finished(f.claim(me, 1).await.remove(0), Verdict::Succeeded);
    assert_eq!(end.claimed.input, [0, 255, 0]);
    end.outcome.output = vec![0, 159, 146, 150];
    assert_eq!(f.ack(me, &[end]).await.len(), 1);
    let output: Vec<u8> =
        sqlx::query_scalar("SELECT output FROM sandbar.results").fetch_one(&f.admin).await.unwrap();
    assert_eq!(output, [0, 159, 146, 150]);
}

#[tokio::test]
async fn usage_is_counted_once_per_attempt_however_often_it_is_acknowledged_and_folded() {
    let f = Fixture::new().await;
    let me = f.register().await;
    for _ in 0..2 {
        let (a, b) = (f.enqueue_one().await, f.enqueue_one().await);
        let ends: Vec<_> =
            f.claim(me, 2).await.into_iter().map(|c| finished(c, Verdict::Succeeded)).collect();
        assert_eq!(f.ack(me, &ends).await.len(), 2, "{a} {b}");
        assert!(f.ack(me, &ends).await.is_empty());
        let (attempts, fuel): (i64, i64) =
            sqlx::query_as("SELECT sum(attempts)::bigint, sum(fuel)::bigint FROM sandbar.usage")
                .fetch_one(&f.admin)
                .await
                .unwrap();
        assert_eq!(fuel, attempts * 7);
        f.worker.fold_usage(100).await.unwrap();
        assert_eq!(f.count("usage_deltas").await, 0);
    }
    let (attempts, succeeded): (i64, i64) =
        sqlx::query_as("SELECT sum(attempts)::bigint, sum(succeeded)::bigint FROM sandbar.usage")
            .fetch_one(&f.admin)
            .await
            .unwrap();
    assert_eq!((attempts, succeeded), (4, 4));
    assert_eq!(f.count("late_acks").await, 0, "a repetition is not late");
}

#[tokio::test]
async fn late_ends_are_counted_and_cost_nothing() {
    let f = Fixture::new().await;
    let (one, two) = (f.enqueue_one().await, f.enqueue_one().await);
    let old = f.register().await;
    let stale: Vec<_> = f.claim(old, 2).await.into_iter().map(|c| finished(c, Verdict::Succeeded)).collect();
    f.reap(old).await;
    assert!(f.ack(old, &stale).await.is_empty());
    let items: i64 = sqlx::query_scalar("SELECT sum(items)::bigint FROM sandbar.late_acks")
        .fetch_one(&f.admin)
        .await
        .unwrap();
    assert_eq!(items, 2);
    assert_eq!(f.count("usage").await, 0);
    assert_eq!((f.state(one).await, f.state(two).await), ("queued".to_owned(), "queued".to_owned()));
}
