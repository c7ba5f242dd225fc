//! Unique keys and dependencies: what becomes of a request whose key is taken, and of one that waits for others.

use sandbar::domain::admission::{Admission, Condition, Dependency, Key, Unique, UniquePolicy};

use super::*;

fn unique(f: &Fixture, key: &str, policy: UniquePolicy) -> NewInvocation {
    let unique = Unique { key: Key::try_from(key.to_owned()).unwrap(), policy };
    NewInvocation { admission: Admission { unique: Some(unique), ..Admission::default() }, ..f.row() }
}

fn after(f: &Fixture, on: &[InvocationId], condition: Condition) -> NewInvocation {
    let depends_on = on.iter().map(|id| Dependency { id: *id, condition }).collect();
    NewInvocation { admission: Admission { depends_on, ..Admission::default() }, ..f.row() }
}

async fn one(f: &Fixture, row: &NewInvocation) -> Enqueued {
    f.enqueue(std::slice::from_ref(row)).await[0]
}

async fn end(f: &Fixture, who: (WorkerId, i64), id: InvocationId, verdict: Verdict) {
    let claimed = f.claim(who, 100).await;
    let mut done = false;
    for claimed in claimed {
        let verdict = if claimed.invocation == id {
            done = true;
            verdict
        } else {
            Verdict::Release { delay_ms: 0 }
        };
        f.ack(who, &[finished(claimed, verdict)]).await;
    }
    assert!(done, "{id} was not claimed");
}

#[tokio::test]
async fn a_unique_key_is_held_until_the_end_whatever_the_end() {
    let f = Fixture::new().await;
    let me = f.register().await;
    let again = || unique(&f, "k", UniquePolicy::Reject);
    let mut conn = f.api.tenant(f.tenant).await.unwrap();
    for way in 0..4 {
        let first = again();
        assert_eq!(one(&f, &first).await, Enqueued::Accepted(first.id), "way {way}");
        assert_eq!(one(&f, &again()).await, Enqueued::Duplicate(first.id));
        assert_eq!(one(&f, &unique(&f, "k", UniquePolicy::Return)).await, Enqueued::Existing(first.id));
        match way {
            0 => end(&f, me, first.id, Verdict::Succeeded).await,
            1 => end(&f, me, first.id, Verdict::Dead).await,
            2 => {
                // A retry holds on to it.
                end(&f, me, first.id, Verdict::Retry { delay_ms: 0 }).await;
                assert_eq!(one(&f, &again()).await, Enqueued::Duplicate(first.id));
                f.worker.promote(10).await.unwrap();
                end(&f, me, first.id, Verdict::Succeeded).await;
            }
            _ => assert_eq!(conn.invocation_cancel(first.id).await.unwrap(), Cancelled::Now),
        }
    }
    assert_eq!(f.count("unique_keys").await, 0);
    f.check_places().await;
}

#[tokio::test]
async fn of_many_requests_at_once_with_one_unique_key_one_is_accepted() {
    let f = Fixture::new().await;
    let rows: Vec<Vec<_>> =
        (0..8).map(|_| (0..3).map(|_| unique(&f, "k", UniquePolicy::Reject)).collect()).collect();
    let answers = futures_util::future::join_all(rows.iter().map(|rows| f.enqueue(rows))).await;
    let accepted: Vec<_> = answers.iter().flatten().filter(|a| matches!(a, Enqueued::Accepted(_))).collect();
    assert_eq!(accepted.len(), 1, "{answers:?}");
    assert_eq!(f.count("invocations").await, 1);
    f.check_places().await;
}

#[tokio::test]
async fn replace_takes_the_place_of_one_that_waits_and_leaves_one_that_runs() {
    let f = Fixture::new().await;
    let me = f.register().await;
    let row = || unique(&f, "k", UniquePolicy::Replace);
    let (queued, later) =
        (row(), NewInvocation { run_at: Some(Utc::now() + chrono::Duration::hours(1)), ..row() });
    let last = row();
    one(&f, &queued).await;
    assert_eq!(one(&f, &later).await, Enqueued::Accepted(later.id));
    assert_eq!(one(&f, &last).await, Enqueued::Accepted(last.id));
    assert_eq!(
        (f.state(queued.id).await, f.state(later.id).await),
        ("cancelled".to_owned(), "cancelled".to_owned())
    );
    let claimed = f.claim(me, 10).await;
    assert_eq!(claimed.iter().map(|c| c.invocation).collect::<Vec<_>>(), [last.id]);
    assert_eq!(one(&f, &row()).await, Enqueued::Duplicate(last.id));
    f.check_places().await;
}

#[tokio::test]
async fn debounce_puts_a_waiting_one_off_and_waits_behind_a_running_one() {
    let f = Fixture::new().await;
    let me = f.register().await;
    let at = |ms| Some(Utc::now() + chrono::Duration::milliseconds(ms));
    let row = |ms| NewInvocation { run_at: at(ms), ..unique(&f, "k", UniquePolicy::Debounce) };
    let first = row(1);
    one(&f, &first).await;
    let queued = async || {
        support::eventually(Duration::from_secs(20), "the time", async || {
            f.worker.promote(10).await.unwrap();
            (f.state(first.id).await == "queued").then_some(())
        })
        .await;
    };
    queued().await;
    // From `ready` back to `scheduled`, and from there further off.
    assert_eq!(one(&f, &row(3_600_000)).await, Enqueued::Existing(first.id));
    assert_eq!(f.state(first.id).await, "scheduled");
    assert_eq!(one(&f, &row(20)).await, Enqueued::Existing(first.id));
    queued().await;
    let claimed = f.claim(me, 10).await;
    assert_eq!(claimed[0].invocation, first.id);
    let next = row(3_600_000);
    assert_eq!(one(&f, &next).await, Enqueued::Accepted(next.id));
    assert_eq!(one(&f, &row(3_600_000)).await, Enqueued::Existing(next.id));
    f.ack(me, &claimed.into_iter().map(|c| finished(c, Verdict::Succeeded)).collect::<Vec<_>>()).await;
    assert_eq!(
        one(&f, &row(3_600_000)).await,
        Enqueued::Existing(next.id),
        "the end of the first leaves the key"
    );
    f.check_places().await;
}

#[tokio::test]
async fn a_request_refused_for_its_unique_key_may_be_repeated_under_its_idempotency_key() {
    let f = Fixture::new().await;
    let me = f.register().await;
    let row =
        |policy| NewInvocation { idempotency: Some(("i".to_owned(), [1; 32])), ..unique(&f, "k", policy) };
    let holder = unique(&f, "k", UniquePolicy::Reject);
    one(&f, &holder).await;
    assert_eq!(one(&f, &row(UniquePolicy::Reject)).await, Enqueued::Duplicate(holder.id));
    assert_eq!(one(&f, &row(UniquePolicy::Return)).await, Enqueued::Existing(holder.id));
    assert_eq!(one(&f, &row(UniquePolicy::Return)).await, Enqueued::Replayed(holder.id));
    end(&f, me, holder.id, Verdict::Succeeded).await;
    assert_eq!(
        one(&f, &row(UniquePolicy::Return)).await,
        Enqueued::Replayed(holder.id),
        "the first answer stays"
    );
    f.check_places().await;
}

#[tokio::test]
async fn a_dependant_is_ready_in_the_transaction_of_the_last_end_it_waits_for() {
    let f = Fixture::new().await;
    let me = f.register().await;
    let (a, b) = (f.enqueue_one().await, f.enqueue_one().await);
    let row = after(&f, &[a, b], Condition::Succeeded);
    assert_eq!(one(&f, &row).await, Enqueued::Waiting(row.id));
    assert_eq!(f.state(row.id).await, "scheduled");
    let mut conn = f.api.tenant(f.tenant).await.unwrap();
    let shown = conn.invocation_get(row.id, 0).await.unwrap().unwrap();
    let mut waits: Vec<_> = shown.waiting_on.iter().map(|d| d.id).collect();
    waits.sort();
    assert_eq!((waits, shown.summary.due_at), (vec![a, b], None));
    let mut claimed = f.claim(me, 10).await;
    assert_eq!(claimed.len(), 2);
    let acks = f.worker.ack(me.0, me.1, &[finished(claimed.remove(0), Verdict::Succeeded)]).await.unwrap();
    assert!(!acks.wake);
    assert_eq!(f.state(row.id).await, "scheduled");
    let acks = f.worker.ack(me.0, me.1, &[finished(claimed.remove(0), Verdict::Succeeded)]).await.unwrap();
    assert!(acks.wake);
    assert_eq!(f.state(row.id).await, "queued");
    f.worker.settle(100).await.unwrap();
    f.worker.settle(100).await.unwrap();
    assert_eq!((f.count("dependencies").await, f.count("ended").await), (0, 0));
    f.check_places().await;
}

#[tokio::test]
async fn an_unmet_condition_cancels_down_the_line_or_lets_run_as_declared() {
    let f = Fixture::new().await;
    let me = f.register().await;
    let root = f.enqueue_one().await;
    let cancelled = after(&f, &[root], Condition::Succeeded);
    let mut runs = after(&f, &[root], Condition::Succeeded);
    runs.admission.run_unmet = true;
    let on_failure = after(&f, &[root], Condition::Failed);
    let whatever = after(&f, &[root], Condition::Finished);
    let rows = [cancelled.clone(), runs.clone(), on_failure.clone(), whatever.clone()];
    assert_eq!(f.enqueue(&rows).await, rows.each_ref().map(|r| Enqueued::Waiting(r.id)));
    let below = after(&f, &[cancelled.id], Condition::Succeeded);
    let saves = after(&f, &[below.id], Condition::Failed);
    one(&f, &below).await;
    one(&f, &saves).await;
    end(&f, me, root, Verdict::Dead).await;
    support::eventually(Duration::from_secs(5), "the line", async || {
        f.worker.settle(100).await.unwrap();
        (f.state(saves.id).await == "queued").then_some(())
    })
    .await;
    for (row, state) in [
        (&cancelled, "cancelled"),
        (&runs, "queued"),
        (&on_failure, "queued"),
        (&whatever, "queued"),
        (&below, "cancelled"),
    ] {
        assert_eq!(f.state(row.id).await, state);
    }
    f.check_places().await;
}

#[tokio::test]
async fn what_has_ended_as_wanted_is_not_waited_for_and_an_unknown_one_is_refused() {
    let f = Fixture::new().await;
    let me = f.register().await;
    let root = f.enqueue_one().await;
    end(&f, me, root, Verdict::Succeeded).await;
    let row = after(&f, &[root], Condition::Succeeded);
    assert_eq!(one(&f, &row).await, Enqueued::Accepted(row.id));
    let unmet = after(&f, &[root], Condition::Failed);
    assert_eq!(one(&f, &unmet).await, Enqueued::Waiting(unmet.id));
    assert_eq!(f.worker.settle(10).await.unwrap().cancelled, 1);
    assert_eq!(f.state(unmet.id).await, "cancelled");
    let unknown = InvocationId::generate();
    let answers = f.enqueue(&[after(&f, &[root, unknown], Condition::Finished), f.row()]).await;
    assert_eq!(answers[0], Enqueued::UnknownDependency(unknown));
    assert!(matches!(answers[1], Enqueued::Accepted(_)), "a stranger in the same flush is not hurt");
    // Another tenant's invocation is as good as none.
    let (tenant, task) = (TenantId::generate(), TaskId::generate());
    f.tenant(tenant, task, "two").await;
    let theirs = NewInvocation { tenant, task, ..after(&f, &[root], Condition::Finished) };
    assert_eq!(one(&f, &theirs).await, Enqueued::UnknownDependency(root));
    f.check_places().await;
}

#[tokio::test]
async fn a_dependant_waits_for_its_time_too_and_can_be_cancelled_before() {
    let f = Fixture::new().await;
    let me = f.register().await;
    let root = f.enqueue_one().await;
    let run_at = Some(Utc::now() + chrono::Duration::hours(1));
    let later = NewInvocation { run_at, ..after(&f, &[root], Condition::Finished) };
    let gone = after(&f, &[root], Condition::Finished);
    f.enqueue(&[later.clone(), gone.clone()]).await;
    let mut conn = f.api.tenant(f.tenant).await.unwrap();
    assert_eq!(conn.invocation_cancel(gone.id).await.unwrap(), Cancelled::Now);
    end(&f, me, root, Verdict::Succeeded).await;
    let shown = conn.invocation_get(later.id, 0).await.unwrap().unwrap();
    assert_eq!(shown.summary.state, State::Scheduled);
    assert!(shown.summary.due_at.is_some() && shown.waiting_on.is_empty());
    f.check_places().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_end_is_missed_however_it_meets_the_enqueue_of_a_dependant() {
    let f = std::sync::Arc::new(Fixture::new().await);
    let me = f.register().await;
    let mut dependants = Vec::new();
    for round in 0..40 {
        let roots: Vec<_> = (0..3).map(|_| f.row()).collect();
        f.enqueue(&roots).await;
        let ids: Vec<_> = roots.iter().map(|r| r.id).collect();
        let claimed = f.claim(me, 100).await;
        let (ours, others): (Vec<_>, Vec<_>) = claimed.into_iter().partition(|c| ids.contains(&c.invocation));
        let others: Vec<_> = others.into_iter().map(|c| finished(c, Verdict::Succeeded)).collect();
        f.ack(me, &others).await;
        // Each end in a transaction of its own, at the same time as the enqueue.
        let acks = ours.into_iter().map(|c| {
            let f = f.clone();
            async move { f.ack(me, &[finished(c, Verdict::Succeeded)]).await }
        });
        let row = after(&f, &ids, Condition::Succeeded);
        dependants.push(row.id);
        let enqueue = async {
            if round % 2 == 0 {
                tokio::task::yield_now().await;
            }
            one(&f, &row).await
        };
        let (acked, _) = tokio::join!(futures_util::future::join_all(acks), enqueue);
        assert!(acked.iter().all(|a| a.len() == 1));
    }
    support::eventually(Duration::from_secs(30), "every dependant", async || {
        f.worker.settle(100).await.unwrap();
        (f.count("dependencies").await == 0 && f.count("ended").await == 0).then_some(())
    })
    .await;
    for id in dependants {
        assert_ne!(f.state(id).await, "scheduled");
    }
    f.check_places().await;
}

#[tokio::test]
async fn one_end_with_many_dependants_tells_them_in_bounded_steps() {
    let f = Fixture::new().await;
    let me = f.register().await;
    let root = f.enqueue_one().await;
    let rows: Vec<_> = (0..700).map(|_| after(&f, &[root], Condition::Finished)).collect();
    f.enqueue(&rows).await;
    end(&f, me, root, Verdict::Succeeded).await;
    assert_eq!(f.count("ready").await, 500);
    while f.worker.settle(50).await.unwrap().more {}
    assert_eq!(f.count("ready").await, 700);
    assert_eq!((f.count("dependencies").await, f.count("ended").await), (0, 0));
    f.check_places().await;
}
