//! Group commit on a real Postgres.

use std::time::Duration;

use sandbar::app::flush::{Flusher, Refused};
use sandbar::domain::ids::{InvocationId, TaskId};
use sandbar::domain::retry::RetryPolicy;
use sandbar::store::invocation::{InputKind, Spec};
use sandbar::store::queue::{Enqueued, NewInvocation, Want};
use sandbar_host::limits::Limits;
use serde_json::json;

use super::Api;
use crate::support;

fn row(api: &Api, task: TaskId) -> NewInvocation {
    NewInvocation {
        tenant: api.tenant,
        id: InvocationId::generate(),
        task,
        version: 1,
        priority: 0,
        input: Vec::new(),
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
        tags: Default::default(),
        run_at: None,
        expires_at: None,
        idempotency: None,
        admission: Default::default(),
    }
}

async fn queued(api: &Api) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM sandbar.ready").fetch_one(&api.admin).await.unwrap()
}

#[tokio::test]
async fn a_row_that_cannot_be_stored_fails_alone() {
    let api = Api::start().await;
    let task = api.echo().await;
    let flusher = Flusher::start(&api.store, &api.signals, Duration::from_secs(60));
    let rows = (0..60).map(|n| row(&api, if n % 20 == 7 { TaskId::generate() } else { task }));
    let outcomes = futures_util::future::join_all(rows.map(|row| flusher.enqueue(row))).await;
    for (n, outcome) in outcomes.iter().enumerate() {
        match outcome {
            Err(Refused::Gone(_)) => assert_eq!(n % 20, 7),
            Ok(Enqueued::Accepted(_)) => assert_ne!(n % 20, 7),
            other => panic!("{n}: {other:?}"),
        }
    }
    assert_eq!(queued(&api).await, 57);
}

#[tokio::test]
async fn what_was_accepted_before_a_shutdown_is_queued_and_what_comes_after_is_refused() {
    let api = Api::start().await;
    let task = api.echo().await;
    let flusher = Flusher::start(&api.store, &api.signals, Duration::from_secs(60));
    let calls = (0..2_000).map(|_| flusher.enqueue(row(&api, task)));
    let (outcomes, ()) = tokio::join!(futures_util::future::join_all(calls), flusher.shutdown());
    let accepted = outcomes.iter().filter(|o| matches!(o, Ok(Enqueued::Accepted(_)))).count();
    assert!(outcomes.iter().all(|o| matches!(o, Ok(_) | Err(Refused::Overloaded))));
    assert_eq!(queued(&api).await, i64::try_from(accepted).unwrap());
    assert_eq!(flusher.enqueue(row(&api, task)).await, Err(Refused::Overloaded));
}

#[tokio::test]
async fn hundreds_of_callers_at_once_are_all_accepted_and_one_wakes_the_workers() {
    let api = Api::start().await;
    api.echo().await;
    let body = json!({"input": 1, "tags": {"a": "b"}});
    let calls: Vec<_> = (0..300).map(|_| api.client.enqueue("echo", &body)).collect();
    for answer in futures_util::future::join_all(calls).await {
        answer.expect(202);
    }
    assert_eq!(queued(&api).await, 300);
    tokio::time::timeout(super::SOON, api.signals.ready.heard()).await.expect("nobody was woken");
    let mut listener = api.worker.listener().await.unwrap();
    listener.listen(sandbar::store::queue::READY_CHANNEL).await.unwrap();
    api.client.enqueue("echo", &body).await.expect(202);
    let heard = tokio::time::timeout(super::SOON, listener.recv()).await;
    heard.expect("other processes were not told").unwrap();
    support::eventually(super::SOON, "the row", async || (queued(&api).await == 301).then_some(())).await;
}

#[tokio::test]
async fn an_application_that_stops_finishes_what_it_has_and_answers_overloaded() {
    let api = Api::start().await;
    api.echo().await;
    api.client.enqueue("echo", &json!({})).await.expect(202);
    api.app.shutdown().await;
    let late = api.client.enqueue("echo", &json!({})).await;
    assert_eq!(super::problem(&late, 503), "overloaded");
    api.stop.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_in_the_middle_of_an_enqueue_hands_over_whatever_it_takes() {
    let api = Api::start().await;
    let task = api.echo().await;
    let me = api.register().await;
    let flusher = Flusher::start(&api.store, &api.signals, Duration::from_secs(60));
    let enqueue = async {
        for _ in 0..1_500 {
            flusher.enqueue(row(&api, task)).await.unwrap();
        }
    };
    let claim = async {
        let mut claimed = 0;
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while claimed < 1_500 && std::time::Instant::now() < deadline {
            claimed += api.worker.claim(me.0, me.1, &[Want::of(api.tenant, 10)]).await.unwrap().len();
            let taken: i64 = sqlx::query_scalar("SELECT COALESCE(sum(open), 0)::bigint FROM sandbar.leases")
                .fetch_one(&api.admin)
                .await
                .unwrap();
            assert_eq!(taken, i64::try_from(claimed).unwrap(), "taken, but not handed over");
        }
        claimed
    };
    let ((), claimed) = tokio::join!(enqueue, claim);
    assert_eq!(claimed, 1_500);
}

#[tokio::test]
async fn while_a_statement_waits_for_a_lock_other_rows_go() {
    let api = Api::start().await;
    let locked = api.echo().await;
    let other = api.task("other", "task", &json!({})).await;
    let flusher = Flusher::start(&api.store, &api.signals, Duration::from_secs(60));
    let mut holder = api.admin.begin().await.unwrap();
    sqlx::query("SELECT 1 FROM sandbar.versions WHERE task_id = $1 FOR UPDATE")
        .bind(locked)
        .execute(&mut *holder)
        .await
        .unwrap();
    let held = tokio::spawn({
        let (flusher, row) = (flusher.clone(), row(&api, locked));
        async move { flusher.enqueue(row).await }
    });
    support::eventually(super::SOON, "the first to wait", async || {
        let waits: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM pg_locks WHERE NOT granted)")
            .fetch_one(&api.admin)
            .await
            .unwrap();
        waits.then_some(())
    })
    .await;
    let calls = (0..20).map(|_| flusher.enqueue(row(&api, other)));
    let outcomes = tokio::time::timeout(super::SOON, futures_util::future::join_all(calls)).await;
    assert!(outcomes.expect("rows of others wait for the lock too").iter().all(Result::is_ok));
    assert!(!held.is_finished());
    holder.rollback().await.unwrap();
    held.await.unwrap().unwrap();
}
