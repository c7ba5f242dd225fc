//! Workers, duties and the reasons of waiting, through HTTP: shapes, who may, and what is not there.

use reqwest::Method;
use sandbar::domain::worker::Wanted;
use sandbar::store::worker::Load;
use serde_json::{Value, json};

use crate::api::{Api, problem, success, trapped};
use crate::support::send;
use sandbar::domain::retry::Verdict;

/// Every operation of the platform's operators.
const PLATFORM: &[(&str, &str)] = &[
    ("GET", "/v1/workers"),
    ("POST", "/v1/workers/{id}/cordon"),
    ("POST", "/v1/workers/{id}/uncordon"),
    ("POST", "/v1/workers/{id}/drain"),
    ("GET", "/v1/duties"),
    ("PATCH", "/v1/duties/reap"),
    ("POST", "/v1/duties/reap/pause"),
    ("POST", "/v1/duties/reap/resume"),
    ("POST", "/v1/duties/reap/run"),
];

#[tokio::test]
async fn only_the_platforms_keys_reach_workers_and_duties() {
    let api = Api::start().await;
    let (worker, _) = api.register().await;
    for (method, path) in PLATFORM {
        let method: Method = method.parse().unwrap();
        let path = path.replace("{id}", &worker.to_string());
        let answer = send(api.as_other(method.clone(), &path).json(&json!({}))).await;
        assert_eq!(problem(&answer, 403), "forbidden", "{method} {path}");
        let answer = send(api.client.anonymous(method.clone(), &path)).await;
        assert_eq!(problem(&answer, 401), "unauthenticated", "{method} {path}");
    }
    let document = api.client.get("/openapi.json").await.json();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            if operation["tags"] == json!(["platform"]) {
                let method = method.to_uppercase();
                let path = path.replace("{name}", "reap");
                assert!(
                    PLATFORM.contains(&(method.as_str(), path.as_str())),
                    "{method} {path} is not in this test"
                );
            }
        }
    }
    // Its own tenant's data is the platform key's too.
    api.client.get("/v1/tasks").await.expect(200);
}

#[tokio::test]
async fn a_worker_shows_its_load_and_hears_what_is_wanted_with_its_next_heartbeat() {
    let api = Api::start().await;
    let me = api.register().await;
    let id = me.0;
    let list = api.client.get("/v1/workers").await.expect(200).json();
    assert_eq!((&list["items"][0]["state"], &list["items"][0]["memory"]), (&json!("active"), &Value::Null));
    let load = Load {
        running: 3,
        room: Some(2),
        worker_bytes: Some(10),
        cells_bytes: Some(5),
        host_bytes: Some(100),
    };
    let beat = async || api.worker.worker_heartbeat(me.0, me.1, load).await.unwrap().wanted;
    assert_eq!(beat().await, Wanted::Active);
    let one = api.client.get("/v1/workers").await.expect(200).json()["items"][0].clone();
    assert_eq!((&one["id"], &one["running"], &one["slots"]), (&json!(id), &json!(3), &json!(8)));
    let memory = json!({"worker_bytes": 10, "cells_bytes": 5, "total_bytes": 15, "host_bytes": 100});
    assert_eq!(one["memory"], memory);

    for (word, state, wanted) in [
        ("cordon", "cordoned", Wanted::Cordoned),
        ("drain", "draining", Wanted::Draining),
        ("uncordon", "active", Wanted::Active),
    ] {
        let answer = api.client.post(&format!("/v1/workers/{id}/{word}"), &json!({})).await.expect(200);
        assert_eq!(answer.json()["state"], state);
        assert_eq!(beat().await, wanted);
    }

    api.worker.reap(std::time::Duration::from_secs(6), 10, Some(id)).await.unwrap();
    let gone = api.client.get("/v1/workers").await.expect(200).json()["items"][0].clone();
    assert_eq!((&gone["id"], &gone["state"]), (&json!(id), &json!("gone")));
    assert!(gone["gone_at"].is_string() && gone["running"].is_null(), "{gone}");
    for unknown in [id.to_string(), "nonsense".to_owned()] {
        let answer = api.client.post(&format!("/v1/workers/{unknown}/drain"), &json!({})).await;
        assert_eq!(problem(&answer, 404), "worker-not-found");
    }
}

#[tokio::test]
async fn a_duty_is_described_paused_asked_for_and_set() {
    let api = Api::start().await;
    api.worker.duty_announce("reap", std::time::Duration::from_secs(1)).await.unwrap();
    let list = api.client.get("/v1/duties").await.expect(200).json();
    let one = &list["items"][0];
    assert_eq!(
        (&one["name"], &one["state"], &one["interval_ms"]),
        (&json!("reap"), &json!("vacant"), &json!(1000))
    );
    assert!(!one["description"].as_str().unwrap().is_empty());
    let post = async |word: &str, status| {
        api.client.post(&format!("/v1/duties/reap/{word}"), &json!({})).await.expect(status).json()
    };
    assert_eq!(post("pause", 200).await["state"], "paused");
    assert_eq!(post("run", 202).await["run_requested"], true);
    assert_eq!(post("resume", 200).await["paused"], false);
    let patch =
        async |body: Value| send(api.client.request(Method::PATCH, "/v1/duties/reap").json(&body)).await;
    assert_eq!(patch(json!({"interval_ms": 250})).await.expect(200).json()["interval_ms"], 250);
    assert_eq!(patch(json!({})).await.expect(200).json()["interval_ms"], 250, "absent is unchanged");
    assert_eq!(patch(json!({"interval_ms": null})).await.expect(200).json()["interval_ms"], 1000);
    for bad in [json!({"interval_ms": 9}), json!({"interval_ms": 86_400_001}), json!({"interval": 5})] {
        assert_eq!(problem(&patch(bad).await, 422), "invalid-body");
    }
    let answer = api.client.post("/v1/duties/nonsense/run", &json!({})).await;
    assert_eq!(problem(&answer, 404), "duty-not-found");
}

#[tokio::test]
async fn why_names_what_an_invocation_waits_for_and_others_see_nothing() {
    let api = Api::start().await;
    api.echo().await;
    let enqueue = async |body: Value| {
        let answer = api.client.enqueue("echo", &body).await.expect(202).json();
        answer["id"].as_str().unwrap().to_owned()
    };
    let why = async |id: &str| api.client.get(&format!("/v1/invocations/{id}/why")).await.expect(200).json();
    let kinds = |why: &Value| -> Vec<String> {
        why["reasons"].as_array().unwrap().iter().map(|r| r["kind"].as_str().unwrap().to_owned()).collect()
    };
    let first = enqueue(json!({"input": 1})).await;
    let second = enqueue(json!({"input": 2})).await;
    assert_eq!(kinds(&why(&first).await), ["no-worker"]);
    let waiting = why(&second).await;
    assert_eq!(kinds(&waiting), ["no-worker", "queue"]);
    assert_eq!((&waiting["reasons"][1]["ahead"], &waiting["estimate"]), (&json!(1), &Value::Null));

    let me = api.register().await;
    let next = why(&first).await;
    assert_eq!((kinds(&next), &next["estimate"]["starts_in_ms"]), (vec!["next".to_owned()], &json!(0)));
    let full = Load { running: 8, ..Load::default() };
    api.worker.worker_heartbeat(me.0, me.1, full).await.unwrap();
    let shared = why(&first).await;
    assert_eq!(
        (kinds(&shared), &shared["reasons"][0]["share"]),
        (vec!["weight-share".to_owned()], &json!(1.0))
    );

    let roomless = Load { room: Some(0), ..Load::default() };
    api.worker.worker_heartbeat(me.0, me.1, roomless).await.unwrap();
    assert_eq!(kinds(&why(&first).await), ["no-memory"]);

    let claimed = api.claim(me).await;
    assert_eq!(kinds(&why(&first).await), ["running"]);
    api.client.post(&format!("/v1/invocations/{first}/cancel"), &json!({})).await;
    assert_eq!(kinds(&why(&first).await), ["cancelling"]);
    api.ack(me, success(claimed)).await;
    assert_eq!(kinds(&why(&first).await), ["finished"]);
    let estimated = why(&second).await;
    assert!(
        estimated["estimate"]["starts_in_ms"].as_u64().unwrap() > 0,
        "one ended in the last minute: {estimated}"
    );

    let claimed = api.claim(me).await;
    api.ack(me, trapped(claimed, Verdict::Retry { delay_ms: 60_000 })).await;
    let backoff = why(&second).await;
    assert_eq!(kinds(&backoff), ["delay"]);
    assert!(backoff["reasons"][0]["detail"].as_str().unwrap().contains("failed attempt"), "{backoff}");
    let later = enqueue(json!({"input": 3, "delay_ms": 60_000})).await;
    let delayed = why(&later).await;
    assert!(
        delayed["reasons"][0]["until"].is_string() && delayed["estimate"]["basis"].is_string(),
        "{delayed}"
    );

    let answer = send(api.as_other(Method::GET, &format!("/v1/invocations/{first}/why"))).await;
    assert_eq!(problem(&answer, 404), "invocation-not-found");
}
