//! Bulk operations and pauses: what they meet, what they leave alone, and that a stop, a repeat and another tenant change
//! nothing.

use reqwest::Method;
use sandbar::domain::ids::WorkerId;
use serde_json::{Value, json};

use crate::api::{Api, SOON, pointers, problem, success};
use crate::support::{eventually, send};

impl Api {
    async fn enqueue_tagged(&self, n: usize, tag: &str, more: &Value) -> Vec<String> {
        let mut ids = Vec::new();
        for _ in 0..n {
            let mut body = json!({"input": 1, "tags": {"batch": tag}});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let answer = self.client.enqueue("echo", &body).await.expect(202).json();
            ids.push(answer["id"].as_str().unwrap().to_owned());
        }
        ids
    }

    async fn state(&self, id: &str) -> String {
        let now = self.client.get(&format!("/v1/invocations/{id}")).await.expect(200).json();
        now["state"].as_str().unwrap().to_owned()
    }

    async fn bulk(&self, body: &Value) -> Value {
        let answer = self.client.post("/v1/bulk", body).await.expect(202).json();
        self.bulk_turns().await;
        let link = answer["links"]["self"].as_str().unwrap();
        self.client.get(link).await.expect(200).json()
    }
}

#[tokio::test]
async fn a_dry_run_counts_exactly_and_changes_nothing_and_a_cancel_meets_what_waits_and_what_runs() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let running = api.enqueue_tagged(1, "a", &json!({"priority": 100})).await.remove(0);
    let claimed = api.claim(me).await;
    let queued = api.enqueue_tagged(3, "a", &json!({})).await;
    let later = api.enqueue_tagged(2, "a", &json!({"delay_ms": 3_600_000})).await;
    let others = api.enqueue_tagged(2, "b", &json!({})).await;
    let filter = json!({"tags": {"batch": "a"}});
    let dry = json!({"action": "cancel", "filter": filter, "dry_run": true});
    let count = api.client.post("/v1/bulk", &dry).await.expect(200).json();
    assert_eq!(count, json!({"matched": 6, "exact": true}));
    assert_eq!(api.state(&queued[0]).await, "queued");

    let done = api.bulk(&json!({"action": "cancel", "filter": filter})).await;
    assert_eq!(
        (&done["state"], &done["matched"], &done["done"]),
        (&json!("done"), &json!(6), &json!(6)),
        "{done:#}"
    );
    assert_eq!(done["expected"], json!({"matched": 6, "exact": true}));
    assert!(done["finished_at"].is_string() && done["links"]["cancel"].is_null());
    for id in queued.iter().chain(&later) {
        assert_eq!(api.state(id).await, "cancelled");
    }
    for id in &others {
        assert_eq!(api.state(id).await, "queued");
    }
    let now = api.client.get(&format!("/v1/invocations/{running}")).await.expect(200).json();
    assert_eq!(now["cancel_requested"], true);
    api.ack(me, success(claimed)).await;
}

#[tokio::test]
async fn a_priority_changes_for_what_waits_and_a_stopped_operation_does_no_more() {
    let api = Api::start().await;
    api.echo().await;
    let ids = api.enqueue_tagged(5, "a", &json!({})).await;
    let body = json!({"action": "reprioritise", "priority": 50, "filter": {"task": "echo"}});
    let stopped = api.client.post("/v1/bulk", &body).await.expect(202).json();
    let link = stopped["links"]["cancel"].as_str().unwrap();
    assert_eq!(api.client.post(link, &json!({})).await.expect(200).json()["state"], "cancelled");
    api.bulk_turns().await;
    let priority = async |id: &str| {
        api.client.get(&format!("/v1/invocations/{id}")).await.expect(200).json()["priority"]
            .as_i64()
            .unwrap()
    };
    assert_eq!(priority(&ids[0]).await, 0);
    let done = api.bulk(&body).await;
    assert_eq!((&done["done"], &done["skipped"]), (&json!(5), &json!(0)), "{done:#}");
    for id in &ids {
        assert_eq!((priority(id).await, api.state(id).await.as_str()), (50, "queued"));
    }
}

#[tokio::test]
async fn dead_letters_are_redriven_once_at_a_rate_and_then_left_alone() {
    let api = Api::start().await;
    api.echo().await;
    let mut dead = Vec::new();
    for message in ["no customer 1", "no customer 2", "something else"] {
        dead.push(api.dead(Some(message)).await);
    }
    api.classify().await.unwrap();
    let groups = api.client.get("/v1/dead-letters/groups").await.expect(200).json();
    let fingerprint = groups["items"][0]["fingerprint"].clone();
    let body = json!({"action": "retry", "filter": {"fingerprint": fingerprint}, "rate_per_second": 10});
    let done = api.bulk(&body).await;
    assert_eq!(
        (&done["state"], &done["done"], &done["failed"]),
        (&json!("done"), &json!(2), &json!(0)),
        "{done:#}"
    );
    let waiting = api.client.get("/v1/invocations?state=queued").await.expect(200).json();
    assert_eq!(waiting["items"].as_array().unwrap().len(), 2);
    let redriven = api.client.get("/v1/dead-letters?redriven=true").await.expect(200).json();
    assert_eq!(redriven["items"].as_array().unwrap().len(), 2);
    let again = waiting["items"][0]["retry_of"].as_str().unwrap().to_owned();
    assert!(dead[..2].contains(&again), "{again}");
    let repeated = api.bulk(&body).await;
    assert_eq!(repeated["matched"], 0, "what has its second chance is left alone: {repeated:#}");

    let purged = api.bulk(&json!({"action": "purge", "filter": {"reason": "guest-error"}})).await;
    assert_eq!(purged["done"], 3, "{purged:#}");
    let answer = api.client.get(&format!("/v1/invocations/{}", dead[0])).await;
    assert_eq!(problem(&answer, 404), "invocation-not-found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_that_meets_a_quota_goes_on_when_more_is_let_through_and_counts_each_once() {
    let api = Api::start().await;
    api.echo().await;
    for n in 0..5 {
        api.dead(Some(&format!("no customer {n}"))).await;
    }
    let quota = json!({"quotas": {"invocations_per_s": 2}});
    send(api.client.request(Method::PATCH, "/v1/tenants/one/quotas").json(&quota)).await.expect(200);
    let done = api.bulk(&json!({"action": "retry", "filter": {"task": "echo"}})).await;
    assert_eq!(
        (&done["state"], &done["matched"], &done["done"], &done["failed"]),
        (&json!("done"), &json!(5), &json!(5), &json!(0)),
        "{done:#}"
    );
    let waiting = api.client.get("/v1/invocations?state=queued").await.expect(200).json();
    assert_eq!(waiting["items"].as_array().unwrap().len(), 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_under_a_quota_keeps_what_it_has_done_before_its_duty_could_be_somebody_elses() {
    const ALL: i64 = 12;
    let api = Api::start().await;
    api.echo().await;
    for n in 0..ALL {
        api.dead(Some(&format!("no customer {n}"))).await;
    }
    let quota = json!({"quotas": {"invocations_per_day": 1_000}});
    send(api.client.request(Method::PATCH, "/v1/tenants/one/quotas").json(&quota)).await.expect(200);
    // A Postgres so slow that all of them would take longer than one run of the duty may.
    for slow in [
        "CREATE FUNCTION sandbar.slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.2); RETURN NEW; END'",
        "CREATE TRIGGER slow BEFORE INSERT ON sandbar.invocations FOR EACH ROW EXECUTE FUNCTION sandbar.slow()",
    ] {
        sqlx::query(slow).execute(&api.admin).await.unwrap();
    }
    let asked = json!({"action": "retry", "filter": {"task": "echo"}});
    let accepted = api.client.post("/v1/bulk", &asked).await.expect(202).json();
    let link = accepted["links"]["self"].as_str().unwrap();
    api.worker.duty_announce("bulk", SOON).await.unwrap();
    let me = WorkerId::generate();
    let held = api.worker.duty_hold("bulk", me, SOON, true).await.unwrap().unwrap();
    let (_, again) = api.app.bulk_turn(&held, &api.worker).await.unwrap();
    assert!(again.is_some());
    let now = api.client.get(link).await.expect(200).json();
    assert!((1..ALL).contains(&now["done"].as_i64().unwrap()), "{now:#}");
    assert_eq!((&now["state"], &now["matched"]), (&json!("running"), &now["done"]), "{now:#}");
    api.worker.duties_release(me).await.unwrap();
    api.bulk_turns().await;
    let done = api.client.get(link).await.expect(200).json();
    assert_eq!(
        (&done["state"], &done["matched"], &done["done"], &done["failed"]),
        (&json!("done"), &json!(ALL), &json!(ALL), &json!(0)),
        "{done:#}"
    );
}

#[tokio::test]
async fn a_holder_of_the_duty_that_was_replaced_does_nothing() {
    let api = Api::start().await;
    api.echo().await;
    let ids = api.enqueue_tagged(2, "a", &json!({})).await;
    api.client.post("/v1/bulk", &json!({"action": "cancel", "filter": {}})).await.expect(202);
    api.worker.duty_announce("bulk", SOON).await.unwrap();
    let old = api.worker.duty_hold("bulk", WorkerId::generate(), SOON, true).await.unwrap().unwrap();
    sqlx::query("UPDATE sandbar.duties SET expires_at = now() - interval '1 s'")
        .execute(&api.admin)
        .await
        .unwrap();
    api.worker.duty_hold("bulk", WorkerId::generate(), SOON, true).await.unwrap().unwrap();
    assert!(api.app.bulk_turn(&old, &api.worker).await.is_err());
    assert_eq!(api.state(&ids[0]).await, "queued");
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_and_others_see_no_operation() {
    let api = Api::start().await;
    api.echo().await;
    for (body, pointer) in [
        (json!({"action": "cancel", "filter": {"state": ["dead"]}}), "/filter/state"),
        (json!({"action": "reprioritise", "filter": {}}), "/priority"),
        (json!({"action": "retry", "filter": {}, "version": 1}), "/version"),
        (json!({"action": "retry", "filter": {"fingerprint": "x"}}), "/filter/fingerprint"),
        (json!({"action": "retry", "filter": {}, "rate_per_second": 0}), "/rate_per_second"),
        (json!({"action": "cancel", "filter": {"tag": "a"}}), "/filter/tag"),
    ] {
        let answer = api.client.post("/v1/bulk", &body).await;
        assert_eq!(
            (problem(&answer, 422).as_str(), pointers(&answer)),
            ("invalid-body", vec![pointer.to_owned()])
        );
    }
    let unknown = json!({"action": "cancel", "filter": {"task": "nonsense"}});
    assert_eq!(problem(&api.client.post("/v1/bulk", &unknown).await, 404), "task-not-found");
    let answer =
        api.client.post("/v1/bulk", &json!({"action": "cancel", "filter": {}})).await.expect(202).json();
    let link = answer["links"]["self"].as_str().unwrap();
    for (method, path) in [(Method::GET, link.to_owned()), (Method::POST, format!("{link}/cancel"))] {
        assert_eq!(problem(&send(api.as_other(method, &path)).await, 404), "bulk-operation-not-found");
    }
    let list = send(api.as_other(Method::GET, "/v1/bulk")).await.expect(200).json();
    assert_eq!(list["items"], json!([]));
    assert_eq!(api.client.get("/v1/bulk").await.expect(200).json()["items"].as_array().unwrap().len(), 1);
    for _ in 1..20 {
        api.client.post("/v1/bulk", &json!({"action": "cancel", "filter": {}})).await.expect(202);
    }
    let answer = api.client.post("/v1/bulk", &json!({"action": "cancel", "filter": {}})).await;
    assert_eq!(problem(&answer, 429), "quota-exceeded");
}

#[tokio::test]
async fn a_pause_keeps_back_what_waits_and_what_comes_and_lets_what_runs_finish() {
    let api = Api::start().await;
    api.echo().await;
    for target in [
        json!({"kind": "tenant"}),
        json!({"kind": "task", "task": "echo"}),
        json!({"kind": "tag", "key": "batch", "value": "a"}),
    ] {
        let me = api.register().await;
        api.enqueue_tagged(1, "a", &json!({})).await;
        let running = api.claim(me).await;
        let before = api.enqueue_tagged(2, "a", &json!({})).await;
        let pause = api.client.post("/v1/pauses", &target).await.expect(201).json();
        assert_eq!(pause["target"], target);
        let same = api.client.post("/v1/pauses", &target).await.expect(200).json();
        assert_eq!(same["id"], pause["id"], "paused is paused");
        let after = api.enqueue_tagged(1, "a", &json!({})).await;
        assert!(api.try_claim(me).await.is_empty(), "{target}: something paused was claimed");
        for id in before.iter().chain(&after) {
            assert_eq!(api.state(id).await, "queued", "{target}");
        }
        let why = api.client.get(&format!("/v1/invocations/{}/why", after[0])).await.expect(200).json();
        assert_eq!(why["reasons"][0]["kind"], "paused", "{target} {why}");
        assert_eq!(why["estimate"], Value::Null);
        api.ack(me, success(running)).await;

        let path = format!("/v1/pauses/{}", pause["id"].as_str().unwrap());
        assert_eq!(problem(&send(api.as_other(Method::DELETE, &path)).await, 404), "pause-not-found");
        send(api.client.request(Method::DELETE, &path)).await.expect(204);
        assert_eq!(problem(&send(api.client.request(Method::DELETE, &path)).await, 404), "pause-not-found");
        let mut left = 3;
        while left > 0 {
            let claimed = eventually(SOON, "what was paused", async || {
                api.worker.unpark(100).await.unwrap();
                api.try_claim(me).await.pop()
            })
            .await;
            api.ack(me, success(claimed)).await;
            left -= 1;
        }
    }
    let answer = api.client.post("/v1/pauses", &json!({"kind": "task", "task": "nonsense"})).await;
    assert_eq!(problem(&answer, 404), "task-not-found");
    let list = send(api.as_other(Method::GET, "/v1/pauses")).await.expect(200).json();
    assert_eq!(list["items"], json!([]));
}

#[tokio::test]
async fn a_paused_tag_leaves_other_tags_alone() {
    let api = Api::start().await;
    api.echo().await;
    api.client.post("/v1/pauses", &json!({"kind": "tag", "key": "batch", "value": "a"})).await.expect(201);
    api.enqueue_tagged(1, "a", &json!({})).await;
    let free = api.enqueue_tagged(1, "b", &json!({})).await;
    let me = api.register().await;
    assert_eq!(api.claim(me).await.invocation.to_string(), free[0]);
    assert!(api.try_claim(me).await.is_empty());
}

#[tokio::test]
async fn the_pause_of_a_tag_also_meets_what_is_becoming_ready_at_that_moment() {
    let api = Api::start().await;
    api.echo().await;
    api.enqueue_tagged(1, "a", &json!({"delay_ms": 3_600_000})).await;
    let mut promotion = api.admin.begin().await.unwrap();
    sqlx::query(
        "WITH due AS (DELETE FROM sandbar.scheduled RETURNING *)
         INSERT INTO sandbar.ready (tenant_id, rank, invocation_id, attempt, spent, flags)
         SELECT tenant_id, rank, invocation_id, attempt, spent, flags FROM due",
    )
    .execute(&mut *promotion)
    .await
    .unwrap();
    let client = api.client.clone();
    let mut pause = tokio::spawn(async move {
        let tag = json!({"kind": "tag", "key": "batch", "value": "a"});
        client.post("/v1/pauses", &tag).await.expect(201);
    });
    // Long enough for a pause that would not wait to come back, and to miss the row.
    let early = tokio::time::timeout(std::time::Duration::from_millis(500), &mut pause).await;
    promotion.commit().await.unwrap();
    if early.is_err() {
        pause.await.unwrap();
    }
    let me = api.register().await;
    assert!(api.try_claim(me).await.is_empty(), "it was claimed after the pause");
}
