//! Background duties: one holder, a fence against holders that lost their lease, and settings that are seen without a
//! restart.

use std::time::Duration;

use sandbar::domain::ids::WorkerId;
use sandbar::store::duty::DutyChange;
use sandbar::store::{ApiStore, Connect, Error, WorkerStore};
use sqlx::PgPool;

use crate::support;

const LONG: Duration = Duration::from_secs(60);

struct Fixture {
    api: ApiStore,
    store: WorkerStore,
    admin: PgPool,
}

impl Fixture {
    /// A database in which one duty is known, and due every hour.
    async fn new() -> Self {
        let database = support::database().await;
        let connect = |url: String| Connect {
            url,
            max_connections: 8,
            acquire_timeout: Duration::from_secs(5),
            statement_timeout: Duration::from_secs(10),
        };
        let store = WorkerStore::connect(&connect(database.worker_url())).await.unwrap();
        store.duty_announce("tidy", Duration::from_secs(3600)).await.unwrap();
        let api = ApiStore::connect(&connect(database.api_url())).await.unwrap();
        Self { api, store, admin: database.admin().await }
    }

    async fn expire_lease(&self) {
        sqlx::query("UPDATE sandbar.duties SET expires_at = now() - interval '1 s'")
            .execute(&self.admin)
            .await
            .unwrap();
    }

    async fn keys(&self) -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM sandbar.idempotency_keys")
            .fetch_one(&self.admin)
            .await
            .unwrap()
    }

    async fn expired_key(&self) {
        sqlx::query(
            "INSERT INTO sandbar.idempotency_keys VALUES (gen_random_uuid(), 'k', '', gen_random_uuid(), now() - interval '1 s')",
        )
        .execute(&self.admin)
        .await
        .unwrap();
    }
}

#[tokio::test]
async fn a_duty_has_one_holder_until_its_lease_ends_and_counts_its_runs() {
    let f = Fixture::new().await;
    let (a, b) = (WorkerId::generate(), WorkerId::generate());
    let first = f.store.duty_hold("tidy", a, LONG, false).await.unwrap().unwrap();
    assert!(first.begun, "what has never run is due");
    let again = f.store.duty_hold("tidy", a, LONG, false).await.unwrap().unwrap();
    assert!(!again.begun && again.due_in > Duration::from_secs(3500), "{again:?}");
    assert!(f.store.duty_hold("tidy", b, LONG, true).await.unwrap().is_none());
    f.store.duty_ran(&first, Duration::from_millis(7), 3, Some("broke")).await.unwrap();
    let seen = f.api.duties().await.unwrap().remove(0);
    assert_eq!((seen.runs, seen.failures, seen.rows_handled), (1, 1, 3));
    assert_eq!((seen.last_duration_ms, seen.last_error.as_deref()), (Some(7), Some("broke")));
    assert_eq!(seen.holder.unwrap().0, a);
    f.store.duties_release(a).await.unwrap();
    assert!(f.store.duty_hold("tidy", b, LONG, false).await.unwrap().is_some());
    f.store.duty_ran(&first, Duration::ZERO, 3, None).await.unwrap();
    assert_eq!(f.api.duties().await.unwrap()[0].runs, 1, "a run of a former holder counts for nothing");
}

#[tokio::test]
async fn a_holder_that_lost_its_lease_in_the_middle_of_a_run_writes_nothing() {
    let f = Fixture::new().await;
    f.expired_key().await;
    let (a, b) = (WorkerId::generate(), WorkerId::generate());
    let old = f.store.duty_hold("tidy", a, LONG, false).await.unwrap().unwrap();
    f.expire_lease().await;
    let new = f.store.duty_hold("tidy", b, LONG, true).await.unwrap().unwrap();
    assert!(matches!(f.store.under(&old).tidy(10).await, Err(Error::FenceLost)));
    assert_eq!(f.keys().await, 1);
    assert_eq!(f.store.under(&new).tidy(10).await.unwrap(), 1);
    assert_eq!(f.keys().await, 0);

    // The same process, back after the other one: its old fence is no good either.
    f.expire_lease().await;
    assert!(f.store.duty_hold("tidy", a, LONG, true).await.unwrap().is_some());
    assert!(matches!(f.store.under(&old).tidy(10).await, Err(Error::FenceLost)));
}

#[tokio::test]
async fn nobody_takes_a_duty_over_while_a_transaction_of_its_holder_is_open() {
    let f = Fixture::new().await;
    let (a, b) = (WorkerId::generate(), WorkerId::generate());
    let held = f.store.duty_hold("tidy", a, LONG, false).await.unwrap().unwrap();
    let open = f.store.under(&held).begin().await.unwrap();
    f.expire_lease().await;
    assert!(f.store.duty_hold("tidy", b, LONG, true).await.unwrap().is_none());
    // Settings wait for no run.
    let paused = DutyChange { paused: Some(true), ..DutyChange::default() };
    assert!(f.api.duty_change("tidy", paused).await.unwrap().unwrap().paused);
    open.commit().await.unwrap();
    assert!(f.store.duty_hold("tidy", b, LONG, true).await.unwrap().is_some());
    assert!(matches!(f.store.under(&held).begin().await, Err(Error::FenceLost)));
}

#[tokio::test]
async fn a_paused_duty_runs_once_when_asked_to_and_an_interval_counts_from_the_last_run() {
    let f = Fixture::new().await;
    let me = WorkerId::generate();
    let hold = async |eager| f.store.duty_hold("tidy", me, LONG, eager).await.unwrap().unwrap().begun;
    assert!(hold(false).await);
    let change = async |change| f.api.duty_change("tidy", change).await.unwrap().unwrap();
    change(DutyChange { paused: Some(true), interval_ms: Some(Some(10)), run: false }).await;
    assert!(!hold(true).await, "paused");
    assert!(change(DutyChange { run: true, ..DutyChange::default() }).await.run_requested);
    assert!(hold(false).await);
    assert!(!hold(true).await, "once");
    change(DutyChange { paused: Some(false), ..DutyChange::default() }).await;
    support::eventually(Duration::from_secs(5), "the interval of 10 ms to be over", async || {
        hold(false).await.then_some(())
    })
    .await;
    change(DutyChange { interval_ms: Some(None), ..DutyChange::default() }).await;
    assert!(!hold(false).await, "an hour again");
    assert!(f.api.duty_change("nonsense", DutyChange::default()).await.unwrap().is_none());
}
