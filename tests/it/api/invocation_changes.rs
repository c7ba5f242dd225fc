//! Changing an invocation while it waits, and running one again.

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::Method;
use sandbar::domain::retry::Verdict;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{Api, pointers, problem, success, trapped};
use crate::support::{self, Answer, Client, Deployment};

async fn patch(client: &Client, id: &str, body: &Value) -> Answer {
    support::send(client.request(Method::PATCH, &format!("/v1/invocations/{id}")).json(body)).await
}

async fn invoke(api: &Api, body: Value) -> String {
    let accepted = api.client.enqueue("echo", &body).await.expect(202);
    accepted.json()["id"].as_str().unwrap().to_owned()
}

/// How many invocations are in more or fewer places than one.
async fn misplaced(admin: &PgPool) -> i64 {
    sqlx::query_scalar(
        "SELECT count(*) FROM (SELECT
           (SELECT count(*) FROM sandbar.ready r WHERE r.invocation_id = i.invocation_id)
           + (SELECT count(*) FROM sandbar.scheduled s WHERE s.invocation_id = i.invocation_id)
           + (SELECT count(*) FROM sandbar.results t WHERE t.invocation_id = i.invocation_id)
           + (SELECT count(*) FROM sandbar.leases l CROSS JOIN LATERAL unnest(l.invocations, l.attempts) u(id, attempt)
              WHERE u.id = i.invocation_id AND NOT EXISTS (
                SELECT 1 FROM sandbar.attempts a WHERE a.invocation_id = u.id AND a.attempt = u.attempt)) AS places
         FROM sandbar.invocations i) p WHERE places <> 1",
    )
    .fetch_one(admin)
    .await
    .unwrap()
}

#[tokio::test]
async fn a_higher_priority_overtakes_and_a_later_time_waits() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let (first, second, third) = (
        invoke(&api, json!({})).await,
        invoke(&api, json!({})).await,
        invoke(&api, json!({"delay_ms": 600_000})).await,
    );
    let changed = patch(&api.client, &second, &json!({"priority": 10})).await.expect(200).json();
    assert_eq!((&changed["priority"], &changed["state"]), (&json!(10), &json!("queued")));
    assert_eq!(api.claim(me).await.invocation.to_string(), second);
    let soon =
        patch(&api.client, &first, &json!({"run_at": chrono::Utc::now() + chrono::Duration::hours(1)})).await;
    assert_eq!(soon.expect(200).json()["state"], "scheduled");
    // Priority changes where it waits, and null means at once.
    let waiting = patch(&api.client, &third, &json!({"priority": -3})).await.expect(200).json();
    assert_eq!((&waiting["priority"], &waiting["state"]), (&json!(-3), &json!("scheduled")));
    let now = patch(&api.client, &third, &json!({"run_at": null})).await.expect(200).json();
    assert_eq!((&now["state"], now.get("run_at"), now.get("due_at")), (&json!("queued"), None, None));
    assert_eq!(api.claim(me).await.invocation.to_string(), third);
    patch(&api.client, &first, &json!({"run_at": "2020-01-01T00:00:00Z", "priority": null}))
        .await
        .expect(200);
    assert_eq!(api.claim(me).await.invocation.to_string(), first);
    assert_eq!(misplaced(&api.admin).await, 0);
}

#[tokio::test]
async fn tags_are_merged_at_any_time_and_lists_follow() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let id = invoke(&api, json!({"tags": {"a": "1", "b": "1"}})).await;
    let found = async |tag: &str| {
        let list = api.client.get(&format!("/v1/invocations?tag={tag}")).await.expect(200).json();
        list["items"].as_array().unwrap().len()
    };
    let tags =
        patch(&api.client, &id, &json!({"tags": {"a": "2", "b": null, "c": "3"}})).await.expect(200).json();
    assert_eq!(tags["tags"], json!({"a": "2", "c": "3"}));
    assert_eq!(
        (found("a:1").await, found("b:1").await, found("a:2").await, found("c:3").await),
        (0, 0, 1, 1)
    );
    let claimed = api.claim(me).await;
    patch(&api.client, &id, &json!({"tags": {"d": "4"}})).await.expect(200);
    api.ack(me, success(claimed)).await;
    patch(&api.client, &id, &json!({"tags": {"d": null, "e": "5"}})).await.expect(200);
    assert_eq!((found("d:4").await, found("e:5").await), (0, 1));
    let none = patch(&api.client, &id, &json!({"tags": null})).await.expect(200).json();
    assert_eq!((&none["tags"], found("a:2").await), (&json!({}), 0));
    let many: serde_json::Map<String, Value> = (0..16).map(|n| (format!("k{n}"), json!("v"))).collect();
    patch(&api.client, &id, &json!({"tags": many})).await.expect(200);
    let one_more = patch(&api.client, &id, &json!({"tags": {"z": "1"}})).await;
    assert_eq!(
        (problem(&one_more, 422), pointers(&one_more)),
        ("invalid-body".to_owned(), vec!["/tags".to_owned()])
    );
    patch(&api.client, &id, &json!({"tags": {"z": "1", "k0": null}})).await.expect(200);
}

#[tokio::test]
async fn what_runs_or_has_ended_keeps_priority_and_time_and_a_refused_change_changes_nothing() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let id = invoke(&api, json!({"tags": {"a": "1"}})).await;
    let claimed = api.claim(me).await;
    for body in [json!({"priority": 1, "tags": {"a": "2"}}), json!({"run_at": null})] {
        assert_eq!(problem(&patch(&api.client, &id, &body).await, 409), "already-started");
    }
    api.ack(me, success(claimed)).await;
    assert_eq!(problem(&patch(&api.client, &id, &json!({"priority": 1})).await, 409), "already-finished");
    assert_eq!(api.client.get(&format!("/v1/invocations/{id}")).await.json()["tags"], json!({"a": "1"}));

    let expiry = chrono::Utc::now() + chrono::Duration::hours(1);
    let id = invoke(&api, json!({"expires_at": expiry})).await;
    for (body, pointer) in [
        (json!({"priority": 101}), "/priority"),
        (json!({"run_at": expiry}), "/run_at"),
        (json!({"run_at": "2099-01-01T00:00:00Z"}), "/run_at"),
        (json!({"run_at": "soon"}), "/run_at"),
        (json!({"tags": {"a\u{0}": null}}), "/tags"),
        (json!({"tags": {"": "x"}}), "/tags"),
        (json!({"version": 1}), "/version"),
    ] {
        let answer = patch(&api.client, &id, &body).await;
        assert_eq!(problem(&answer, 422), "invalid-body", "{body}");
        assert_eq!(pointers(&answer), [pointer], "{body}");
    }
    let unknown = patch(&api.client, "00000000-0000-0000-0000-000000000000", &json!({})).await;
    assert_eq!(problem(&unknown, 404), "invocation-not-found");
    assert_eq!(misplaced(&api.admin).await, 0);
}

#[tokio::test]
async fn a_time_given_to_one_that_backs_off_replaces_its_wait_and_keeps_its_count() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let id = invoke(&api, json!({})).await;
    api.ack(me, trapped(api.claim(me).await, Verdict::Retry { delay_ms: 3_600_000 })).await;
    patch(&api.client, &id, &json!({"run_at": null})).await.expect(200);
    let claimed = api.claim(me).await;
    assert_eq!((claimed.attempt, claimed.spent), (2, 1));
}

#[tokio::test]
async fn a_change_that_meets_a_cancellation_does_not_bring_it_back() {
    let api = Api::start().await;
    api.echo().await;
    let id = invoke(&api, json!({"delay_ms": 3_600_000})).await;
    // As a cancellation leaves it that found it on its way between two places.
    sqlx::query("INSERT INTO sandbar.cancels (tenant_id, invocation_id) VALUES ($1, $2::uuid)")
        .bind(api.tenant)
        .bind(&id)
        .execute(&api.admin)
        .await
        .unwrap();
    patch(&api.client, &id, &json!({"run_at": null})).await.expect(200);
    api.worker.promote(10).await.unwrap();
    let ended = api.client.get(&format!("/v1/invocations/{id}")).await.json();
    assert_eq!(ended["state"], "cancelled");
    assert_eq!(misplaced(&api.admin).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_that_race_with_claims_promotions_and_cancellations_neither_lose_nor_double_anything() {
    const N: usize = 400;
    let slots = [("SANDBAR_WORKER__SLOTS", "4".to_owned())];
    let deployment = Deployment::on(support::database().await, 2, &slots).await;
    let client = deployment.client();
    client.upload("echo", &support::guest("echo")).await.expect(201);
    let items: Vec<Value> = (0..N)
        .map(|n| match n % 3 {
            0 => json!({"task": "echo", "input": n}),
            1 => json!({"task": "echo", "input": n, "delay_ms": n}),
            _ => json!({"task": "echo", "input": n, "delay_ms": 3_600_000}),
        })
        .collect();
    let accepted =
        client.post("/v1/invocations:batch", &json!({"invocations": items})).await.expect(200).json();
    let ids: Vec<String> = accepted["outcomes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|o| o["id"].as_str().unwrap().to_owned())
        .collect();
    let mut changing = tokio::task::JoinSet::new();
    for lane in 0..4 {
        let (client, ids) = (client.clone(), ids.clone());
        changing.spawn(async move {
            let mut done = 0;
            for (n, id) in ids.iter().enumerate() {
                let answer = match (n + lane) % 5 {
                    0 => patch(&client, id, &json!({"priority": (n % 200) as i64 - 100})).await,
                    1 => patch(&client, id, &json!({"run_at": null})).await,
                    2 => {
                        let at = chrono::Utc::now() + chrono::Duration::milliseconds(30);
                        patch(&client, id, &json!({"run_at": at, "priority": 3})).await
                    }
                    3 if n % 7 == 0 => client.post(&format!("/v1/invocations/{id}/cancel"), &json!({})).await,
                    _ => patch(&client, id, &json!({"tags": {"lane": lane.to_string()}})).await,
                };
                assert!([200, 202, 409].contains(&answer.status.as_u16()), "{}", answer.text());
                done += usize::from(answer.status == 200);
            }
            done
        });
    }
    let changed: usize = changing.join_all().await.into_iter().sum();
    assert!(changed > N, "{changed} changes took effect");
    // Those that nobody brought forward.
    for id in &ids {
        patch(&client, id, &json!({"run_at": null})).await;
    }
    let admin = deployment.database.admin().await;
    support::eventually(Duration::from_secs(90), "every invocation to end", async || {
        let ended: i64 =
            sqlx::query_scalar("SELECT count(*) FROM sandbar.results").fetch_one(&admin).await.unwrap();
        (usize::try_from(ended).unwrap() == N).then_some(())
    })
    .await;
    assert_eq!(misplaced(&admin).await, 0);
    let (attempts, invocations): (i64, i64) =
        sqlx::query_as("SELECT count(*), count(DISTINCT invocation_id) FROM sandbar.attempts")
            .fetch_one(&admin)
            .await
            .unwrap();
    assert_eq!(attempts, invocations, "an invocation ran twice");
    let (odd, states): (i64, Vec<String>) = sqlx::query_as(
        "SELECT (SELECT count(*) FROM sandbar.results r WHERE (r.state = 'succeeded') <> EXISTS (
             SELECT 1 FROM sandbar.attempts a WHERE a.invocation_id = r.invocation_id AND a.termination ->> 'reason' = 'succeeded')),
           (SELECT array_agg(DISTINCT state) FROM sandbar.results)",
    )
    .fetch_one(&admin)
    .await
    .unwrap();
    assert_eq!(odd, 0);
    let states: BTreeSet<&str> = states.iter().map(String::as_str).collect();
    assert!(states.is_subset(&BTreeSet::from(["succeeded", "cancelled"])), "{states:?}");
}

#[tokio::test]
async fn a_retry_is_a_new_invocation_of_what_ended_badly() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let body = json!({"input": {"x": 1.50}, "priority": 5, "tags": {"a": "1"}, "limits": {"fuel": 9}, "retry": {"max_attempts": 1}});
    let old = invoke(&api, body).await;
    let retry = async |id: &str| api.client.post(&format!("/v1/invocations/{id}/retry"), &json!({})).await;
    assert_eq!(problem(&retry(&old).await, 409), "not-retryable");
    let first = api.claim(me).await;
    assert_eq!(problem(&retry(&old).await, 409), "not-retryable");
    let (input, spec) = (first.input.clone(), first.spec.clone());
    api.ack(me, trapped(first, Verdict::Dead)).await;
    let links = api.client.get(&format!("/v1/invocations/{old}")).await.json()["links"].clone();
    assert_eq!(links["retry"], format!("/v1/invocations/{old}/retry"));

    // Without a body, too.
    let request = api.client.request(Method::POST, &format!("/v1/invocations/{old}/retry"));
    let answer = support::send(request).await.expect(202);
    let new = answer.json();
    let id = new["id"].as_str().unwrap();
    assert_eq!(answer.headers["location"], format!("/v1/invocations/{id}"));
    assert_ne!(id, old);
    for (field, value) in [("retry_of", json!(old)), ("tags", json!({"a": "1"})), ("priority", json!(5))] {
        assert_eq!(new[field], value, "{field}");
    }
    assert_eq!(api.client.get(&format!("/v1/invocations/{id}")).await.json()["retry_of"], old);
    let listed = api.client.get("/v1/invocations?limit=1").await.json();
    assert_eq!(listed["items"][0]["retry_of"], old);
    let again = api.claim(me).await;
    assert_eq!((&again.input, &again.spec.limits, &again.spec.retry), (&input, &spec.limits, &spec.retry));
    assert_eq!((again.attempt, again.spent), (1, 0));
    api.ack(me, success(again)).await;
    assert_eq!(problem(&retry(id).await, 409), "not-retryable");
    // The old one is what it was, and may be retried again.
    assert_eq!(api.client.get(&format!("/v1/invocations/{old}")).await.json()["state"], "dead");
    retry(&old).await.expect(202);
}

#[tokio::test]
async fn a_retry_takes_another_version_a_key_and_what_was_cancelled() {
    let api = Api::start().await;
    let schema = json!({"input_schema": {"type": "object"}});
    api.task("echo", "task", &schema).await;
    api.task("tool", "command-p1", &json!({})).await;
    let id = invoke(&api, json!({"input": {}})).await;
    api.client.post(&format!("/v1/invocations/{id}/cancel"), &json!({})).await.expect(200);
    let retry = async |key: Option<&str>, body: &str| {
        let mut request = api.client.request(Method::POST, &format!("/v1/invocations/{id}/retry"));
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        support::send(request.header("content-type", "application/json").body(body.to_owned())).await
    };
    let first = retry(Some("k"), "{}").await.expect(202).json();
    let replayed = retry(Some("k"), "").await;
    assert_eq!(replayed.status, 400, "an empty body is no JSON when it says that it is");
    let replayed = retry(Some("k"), "{}").await.expect(202);
    assert_eq!(
        (&replayed.json()["id"], &replayed.headers["idempotency-replayed"]),
        (&first["id"], &"true".parse().unwrap())
    );
    assert_eq!(problem(&retry(Some("k"), r#"{"version": 1}"#).await, 422), "idempotency-key-reused");
    assert_eq!(retry(None, r#"{"version": 1}"#).await.expect(202).json()["version"], 1);
    assert_eq!(problem(&retry(None, r#"{"version": 2}"#).await, 404), "version-not-found");
    assert_eq!(problem(&retry(None, r#"{"versions": 2}"#).await, 422), "invalid-body");
    // Another version, which is a command, does not take the input of a task.
    sqlx::query(
        "INSERT INTO sandbar.versions (tenant_id, task_id, number, sha256, size_bytes, kind, state)
         SELECT tenant_id, task_id, 2, sha256('tool'), 1, 'command-p1', 'ready' FROM sandbar.tasks WHERE name = 'echo'",
    )
    .execute(&api.admin)
    .await
    .unwrap();
    assert_eq!(problem(&retry(None, r#"{"version": 2}"#).await, 422), "wrong-input-kind");
    let none =
        api.client.post("/v1/invocations/00000000-0000-0000-0000-000000000000/retry", &json!({})).await;
    assert_eq!(problem(&none, 404), "invocation-not-found");
}
