//! From requests to invocations, and waiting for their end.

use std::time::{Duration, Instant};

use reqwest::Method;
use sandbar::domain::retry::Verdict;
use sandbar::store::invocation::InputKind;
use serde_json::{Value, json};

use super::{Api, pointers, problem, success, trapped};
use crate::support::{self, Answer};

async fn with_key(api: &Api, key: &str, body: &Value) -> Answer {
    let request = api
        .client
        .request(Method::POST, "/v1/tasks/echo/invocations")
        .header("idempotency-key", key)
        .json(body);
    support::send(request).await
}

#[tokio::test]
async fn an_accepted_invocation_reads_the_same_as_its_first_answer() {
    let api = Api::start().await;
    api.echo().await;
    for body in [
        json!({"input": {"b": [1, 2.50, null]}, "priority": 7, "tags": {"team": "a"}}),
        json!({"delay_ms": 3_600_000, "limits": {"fuel": 5}, "retry": {"max_attempts": 1}}),
        json!({"run_at": "2020-01-01T00:00:00Z"}),
    ] {
        let accepted = api.client.enqueue("echo", &body).await.expect(202);
        let location = accepted.headers["location"].to_str().unwrap().to_owned();
        let read = api.client.get(&location).await.expect(200).json();
        let mut first = accepted.json();
        // Postgres keeps microseconds.
        for time in ["run_at", "due_at"] {
            if let (Some(a), Some(b)) = (first[time].as_str(), read[time].as_str()) {
                let parse = |text: &str| chrono::DateTime::parse_from_rfc3339(text).unwrap();
                assert!((parse(a) - parse(b)).num_microseconds().unwrap().abs() <= 1, "{a} {b}");
                first[time] = read[time].clone();
            }
        }
        assert_eq!(first, read);
    }
    let scheduled = api.client.get("/v1/invocations?state=scheduled").await.json();
    assert_eq!(scheduled["items"][0]["state"], "scheduled");
    assert!(scheduled["items"][0]["due_at"].is_string());
}

#[tokio::test]
async fn the_guest_gets_its_input_byte_for_byte() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let odd = r#"{"n": 123456789012345678901234567890, "x" : 1.50,"a":"\u00e4"}"#;
    for (body, input) in [
        (format!(r#"{{"input": {odd}}}"#), odd.as_bytes()),
        (r#"{"input_base64": "AP8="}"#.to_owned(), &[0, 255][..]),
        (r#"{"input": null}"#.to_owned(), &b"null"[..]),
        ("{}".to_owned(), &b""[..]),
    ] {
        let request = api
            .client
            .request(Method::POST, "/v1/tasks/echo/invocations")
            .header("content-type", "application/json; charset=utf-8")
            .body(body);
        support::send(request).await.expect(202);
        let claimed = api.claim(me).await;
        assert_eq!(claimed.input, input);
        assert_eq!(claimed.spec.input, InputKind::Task);
        api.ack(me, success(claimed)).await;
    }
}

#[tokio::test]
async fn a_command_gets_stdin_arguments_and_environment() {
    let api = Api::start().await;
    api.task("tool", "command-p1", &json!({})).await;
    let me = api.register().await;
    let body = json!({"stdin": "in", "args": ["-v", "x y"], "env": {"A": "1"}, "priority": -100});
    api.client.enqueue("tool", &body).await.expect(202);
    let claimed = api.claim(me).await;
    assert_eq!(claimed.input, b"in");
    let env = [("A".to_owned(), "1".to_owned())].into();
    assert_eq!(claimed.spec.input, InputKind::Command { args: vec!["-v".to_owned(), "x y".to_owned()], env });
}

#[tokio::test]
async fn a_wait_ends_with_the_invocation_and_brings_its_result() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let body = json!({"input": {"n": 1}});
    let (answer, ()) = tokio::join!(api.client.invoke("echo", &body), async {
        let claimed = api.claim(me).await;
        let acked = api.ack(me, success(claimed)).await;
        api.signals.done(&[acked.invocation]);
    });
    let answer = answer.expect(200);
    assert_eq!(answer.headers["preference-applied"], "wait=30");
    let body = answer.json();
    assert_eq!((&body["state"], &body["reason"]), (&json!("succeeded"), &json!("succeeded")));
    assert_eq!(
        body["result"],
        json!({"content_type": "application/json", "size_bytes": 7, "json": {"n": 1}})
    );
    assert_eq!(body["attempts"][0]["receipt"]["fuel"], 7);
    assert!(body["links"].get("cancel").is_none());
}

#[tokio::test]
async fn the_end_in_another_process_wakes_a_waiter_by_notification_and_without_one_soon_after() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    for notify in [true, false] {
        let body = json!({});
        let (answer, acked_at) = tokio::join!(
            async {
                let answer = api.client.invoke("echo", &body).await;
                (answer.expect(200), Instant::now())
            },
            async {
                let claimed = api.claim(me).await;
                let acked = api.ack(me, success(claimed)).await;
                if notify {
                    api.worker.notify_done(&[acked.invocation]).await.unwrap();
                }
                Instant::now()
            }
        );
        let limit = if notify { 400 } else { 2_000 };
        let took = answer.1.duration_since(acked_at);
        assert!(took < Duration::from_millis(limit), "notified: {notify}, took {took:?}");
    }
}

#[tokio::test]
async fn a_wait_that_is_over_answers_202_with_where_it_stands() {
    let api = Api::start().await;
    api.echo().await;
    let request = api
        .client
        .request(Method::POST, "/v1/tasks/echo/invocations")
        .header("prefer", "wait=1")
        .json(&json!({}));
    let began = Instant::now();
    let answer = support::send(request).await.expect(202);
    assert!(began.elapsed() >= Duration::from_secs(1));
    assert_eq!(answer.headers["preference-applied"], "wait=1");
    assert_eq!(answer.json()["state"], "queued");
}

#[tokio::test]
async fn a_wait_is_bounded_by_the_installation() {
    let settings = sandbar::app::Settings { max_wait: Duration::from_secs(1), ..Default::default() };
    let api = Api::on(&support::database().await, settings).await;
    api.echo().await;
    let answer = api.client.invoke("echo", &json!({})).await.expect(202);
    assert_eq!(answer.headers["preference-applied"], "wait=1");
}

#[tokio::test]
async fn a_cancelled_invocation_wakes_its_waiter() {
    let api = Api::start().await;
    api.echo().await;
    let body = json!({"tags": {"find": "me"}});
    let (answer, ()) = tokio::join!(api.client.invoke("echo", &body), async {
        let id = support::eventually(super::SOON, "the invocation", async || {
            let list = api.client.get("/v1/invocations?tag=find:me").await.json();
            list["items"][0]["id"].as_str().map(str::to_owned)
        })
        .await;
        api.client.post(&format!("/v1/invocations/{id}/cancel"), &json!({})).await.expect(200);
    });
    assert_eq!(answer.expect(200).json()["state"], "cancelled");
}

#[tokio::test]
async fn the_same_key_with_the_same_request_gives_the_first_invocation_and_with_another_is_refused() {
    let api = Api::start().await;
    api.echo().await;
    let first = with_key(&api, "k1", &json!({"input": {"a": 1, "b": 2}})).await.expect(202);
    let request = api
        .client
        .request(Method::POST, "/v1/tasks/echo/invocations")
        .header("idempotency-key", "k1")
        .header("content-type", "application/json")
        .body("{\"input\":{\"b\":2, \"a\":1}}");
    let again = support::send(request).await.expect(202);
    assert_eq!(again.json()["id"], first.json()["id"]);
    assert_eq!(again.headers["idempotency-replayed"], "true");
    assert!(first.headers.get("idempotency-replayed").is_none());
    let other = with_key(&api, "k1", &json!({"input": {"a": 1, "b": 3}})).await;
    assert_eq!(problem(&other, 422), "idempotency-key-reused");
    let fresh = with_key(&api, "k2", &json!({"input": {"a": 1, "b": 2}})).await.expect(202);
    assert_ne!(fresh.json()["id"], first.json()["id"]);
    for bad in ["", "a b", &"x".repeat(256)] {
        assert_eq!(problem(&with_key(&api, bad, &json!({})).await, 400), "invalid-idempotency-key");
    }
    let all = api.client.get("/v1/invocations").await.json();
    assert_eq!(all["items"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn one_key_used_by_many_at_once_makes_one_invocation() {
    let api = Api::start().await;
    api.echo().await;
    let body = json!({"input": 1});
    let calls: Vec<_> = (0..20).map(|_| with_key(&api, "once", &body)).collect();
    let answers = futures_util::future::join_all(calls).await;
    let ids: std::collections::BTreeSet<String> =
        answers.into_iter().map(|a| a.expect(202).json()["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(ids.len(), 1);
}

#[tokio::test]
async fn an_input_outside_the_schema_is_refused_by_pointer_and_nothing_is_queued() {
    let api = Api::start().await;
    let schema = json!({"type": "object", "required": ["words"], "properties": {"words": {"items": {"type": "string"}}}});
    api.task("strict", "task", &json!({"input_schema": schema})).await;
    let wrong = api.client.enqueue("strict", &json!({"input": {"words": ["a", 1]}})).await;
    assert_eq!(problem(&wrong, 422), "input-mismatch");
    assert_eq!(pointers(&wrong), ["/input/words/1"]);
    let missing = api.client.enqueue("strict", &json!({})).await;
    assert_eq!(problem(&missing, 422), "input-mismatch");
    // By the other way in as well.
    let bytes = api.client.enqueue("strict", &json!({"input_base64": "MQ=="})).await;
    assert_eq!(
        (problem(&bytes, 422).as_str(), pointers(&bytes)),
        ("input-mismatch", vec!["/input_base64".to_owned()])
    );
    api.client.enqueue("strict", &json!({"input": {"words": ["a"]}})).await.expect(202);
    assert_eq!(api.client.get("/v1/invocations").await.json()["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_body_with_anything_wrong_in_it_is_refused_by_pointer() {
    let api = Api::start().await;
    api.echo().await;
    api.task("tool", "command-p2", &json!({})).await;
    for (task, body, code, pointer) in [
        ("echo", json!({"inputs": 1}), "invalid-body", "/inputs"),
        ("echo", json!({"limits": {"fule": 1}}), "invalid-body", "/limits/fule"),
        ("echo", json!({"limits": {"fuel": 0}}), "invalid-body", "/limits/fuel"),
        ("echo", json!({"limits": {"memory_bytes": 1u64 << 40}}), "invalid-body", "/limits/memory_bytes"),
        ("echo", json!({"retry": {"max_attempts": 101}}), "invalid-body", "/retry/max_attempts"),
        ("echo", json!({"retry": {"backoff": "linear"}}), "invalid-body", "/retry/backoff"),
        ("echo", json!({"priority": 101}), "invalid-body", "/priority"),
        ("echo", json!({"priority": 100_000}), "invalid-body", "/priority"),
        ("echo", json!({"run_at": "tomorrow"}), "invalid-body", "/run_at"),
        ("echo", json!({"run_at": "2030-01-01T00:00:00Z", "delay_ms": 1}), "invalid-body", "/delay_ms"),
        ("echo", json!({"expires_at": "2020-01-01T00:00:00Z"}), "invalid-body", "/expires_at"),
        ("echo", json!({"tags": {"k": "a\u{0}"}}), "invalid-body", "/tags"),
        ("echo", json!({"input": 1, "input_base64": "MQ=="}), "invalid-body", "/input_base64"),
        ("echo", json!({"input_base64": "%"}), "invalid-body", "/input_base64"),
        ("echo", json!({"args": []}), "wrong-input-kind", "/args"),
        ("echo", json!({"stdin": ""}), "wrong-input-kind", "/stdin"),
        ("tool", json!({"input": 1}), "wrong-input-kind", "/input"),
        ("tool", json!({"args": ["a\u{0}"]}), "invalid-body", "/args/0"),
        ("tool", json!({"env": {"A=B": ""}}), "invalid-body", "/env"),
    ] {
        let answer = api.client.enqueue(task, &body).await;
        assert_eq!(problem(&answer, 422), code, "{body}");
        assert_eq!(pointers(&answer), [pointer], "{body}");
    }
    let nothing: i64 =
        sqlx::query_scalar("SELECT count(*) FROM sandbar.invocations").fetch_one(&api.admin).await.unwrap();
    assert_eq!(nothing, 0);
}

#[tokio::test]
async fn limits_and_retry_come_from_the_request_then_the_task_then_the_installation() {
    let api = Api::start().await;
    let manifest =
        json!({"limits": {"fuel": 11, "timeout_ms": 12}, "retry": {"max_attempts": 9, "jitter": 0}});
    api.task("modest", "task", &manifest).await;
    let body = json!({"limits": {"fuel": 5}, "retry": {"max_attempts": 2}});
    let accepted = api.client.enqueue("modest", &body).await.expect(202).json();
    assert_eq!(accepted["limits"]["fuel"], 5);
    assert_eq!(accepted["limits"]["timeout_ms"], 12);
    assert_eq!(accepted["limits"]["output_bytes"], 1 << 20);
    assert_eq!(accepted["retry"]["max_attempts"], 2);
    assert_eq!(accepted["retry"]["jitter"], 0.0);
    assert_eq!(accepted["retry"]["initial_ms"], 1_000);
}

#[tokio::test]
async fn only_a_ready_version_runs_and_a_new_one_is_seen_at_once() {
    let api = Api::start().await;
    assert_eq!(problem(&api.client.enqueue("none", &json!({})).await, 404), "task-not-found");
    assert_eq!(problem(&api.client.enqueue("No Name", &json!({})).await, 404), "task-not-found");
    let task = api.echo().await;
    let unknown = api.client.enqueue("echo", &json!({"version": 2})).await;
    assert_eq!(problem(&unknown, 404), "version-not-found");
    api.client.enqueue("echo", &json!({})).await.expect(202);
    sqlx::query(
        "INSERT INTO sandbar.versions (tenant_id, task_id, number, sha256, size_bytes, kind, state)
         SELECT tenant_id, task_id, 2, sha256, 1, 'task', 'compiling' FROM sandbar.versions WHERE task_id = $1",
    )
    .bind(task)
    .execute(&api.admin)
    .await
    .unwrap_err(); // the same bytes cannot be two versions
    sqlx::query("WITH b AS (INSERT INTO sandbar.blobs (tenant_id, sha256, bytes) VALUES ($1, sha256('2'), '2'))
         INSERT INTO sandbar.versions (tenant_id, task_id, number, sha256, size_bytes, kind, state) VALUES ($1, $2, 2, sha256('2'), 1, 'task', 'compiling')")
        .bind(api.tenant)
        .bind(task)
        .execute(&api.admin)
        .await
        .unwrap();
    let early = api.client.enqueue("echo", &json!({"version": 2})).await;
    assert_eq!(problem(&early, 409), "version-not-ready");
    assert_eq!(early.headers["retry-after"], "1");
    assert_eq!(api.client.enqueue("echo", &json!({})).await.expect(202).json()["version"], 1);
    api.compile().await;
    assert_eq!(api.client.enqueue("echo", &json!({})).await.expect(202).json()["version"], 2);
    assert_eq!(api.client.enqueue("echo", &json!({"version": 1})).await.expect(202).json()["version"], 1);
}

#[tokio::test]
async fn inputs_and_bodies_over_the_limit_are_refused() {
    let settings = sandbar::app::Settings { max_input_bytes: 1_000, ..Default::default() };
    let api = Api::on(&support::database().await, settings).await;
    api.echo().await;
    api.client.enqueue("echo", &json!({"input": "x".repeat(998)})).await.expect(202);
    let input = api.client.enqueue("echo", &json!({"input": "x".repeat(999)})).await;
    assert_eq!(problem(&input, 413), "input-too-large");
    let body = api.client.enqueue("echo", &json!({"input": "x".repeat(2 << 20)})).await;
    assert_eq!(problem(&body, 413), "body-too-large");
    let pieces: Vec<Result<Vec<u8>, std::io::Error>> = (0..20).map(|_| Ok(vec![b' '; 100_000])).collect();
    let streamed = api
        .client
        .request(Method::POST, "/v1/tasks/echo/invocations")
        .header("content-type", "application/json")
        .body(reqwest::Body::wrap_stream(futures_util::stream::iter(pieces)));
    assert_eq!(problem(&support::send(streamed).await, 413), "body-too-large");
}

#[tokio::test]
async fn a_failed_attempt_shows_its_trap_and_the_next_one_runs_later() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let id =
        api.client.enqueue("echo", &json!({})).await.expect(202).json()["id"].as_str().unwrap().to_owned();
    let claimed = api.claim(me).await;
    let path = format!("/v1/invocations/{id}");
    let running = api.client.get(&path).await.json();
    assert_eq!(running["state"], "running");
    assert_eq!(running["attempts"][0]["attempt"], 1);
    assert_eq!(running["attempts"][0]["worker"], me.0.to_string());
    assert!(running["attempts"][0].get("termination").is_none());
    api.ack(me, trapped(claimed, Verdict::Retry { delay_ms: 60_000 })).await;
    let waiting = api.client.get(&path).await.json();
    assert_eq!(waiting["state"], "scheduled");
    assert!(waiting["due_at"].is_string());
    let attempt = &waiting["attempts"][0];
    assert_eq!(
        attempt["termination"],
        json!({"reason": "trap", "kind": "unreachable", "message": "unreachable"})
    );
    assert_eq!(attempt["backtrace"], json!([{"function": "guest::work", "line": 3}]));
}

#[tokio::test]
async fn a_server_that_drains_answers_those_who_wait() {
    let api = Api::start().await;
    api.echo().await;
    let body = json!({});
    let (answer, took) = tokio::join!(
        async {
            let answer = api.client.invoke("echo", &body).await;
            (answer.expect(202), Instant::now())
        },
        async {
            let me = api.register().await;
            let _claimed = api.claim(me).await;
            api.app.drain();
            Instant::now()
        }
    );
    assert!(answer.1.duration_since(took) < Duration::from_secs(2));
    assert_eq!(answer.0.json()["state"], "running");
}
