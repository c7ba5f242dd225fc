//! Changing and deleting tasks, and getting their modules back.

use std::time::Duration;

use reqwest::Method;
use sandbar::domain::retry::Verdict;
use serde_json::{Value, json};

use super::{Api, pointers, problem, success, trapped};
use crate::support::{self, Answer};

async fn patch(api: &Api, path: &str, body: &Value) -> Answer {
    let request =
        api.client.request(Method::PATCH, path).header("content-type", "application/merge-patch+json");
    support::send(request.body(body.to_string())).await
}

async fn delete(api: &Api, path: &str) -> Answer {
    support::send(api.client.request(Method::DELETE, path)).await
}

async fn upload(api: &Api, task: &str, bytes: Vec<u8>) -> Answer {
    let request = api
        .client
        .request(Method::POST, &format!("/v1/tasks/{task}/versions"))
        .header("content-type", "application/wasm")
        .body(bytes);
    support::send(request).await
}

/// A task whose module asks for something itself, with a second version.
async fn with_manifest(api: &Api) {
    let manifest = json!({"description": "module", "limits": {"fuel": 1000, "timeout_ms": 2000}, "retry": {"max_attempts": 9}});
    api.task("echo", "task", &manifest).await;
    sqlx::query(
        "WITH b AS (INSERT INTO sandbar.blobs (tenant_id, sha256, bytes) SELECT tenant_id, sha256('second'), 'second' FROM sandbar.tasks)
         INSERT INTO sandbar.versions (tenant_id, task_id, number, sha256, size_bytes, kind, state)
         SELECT t.tenant_id, t.task_id, n, CASE n WHEN 2 THEN sha256('second') ELSE sha256('echo') END, 6, 'command-p1',
           CASE n WHEN 2 THEN 'ready' ELSE 'compiling' END FROM sandbar.tasks t, (VALUES (2)) v(n)",
    )
    .execute(&api.admin)
    .await
    .unwrap();
}

#[tokio::test]
async fn a_patch_changes_what_it_names_and_null_is_not_absent() {
    let api = Api::start().await;
    with_manifest(&api).await;
    let task =
        patch(&api, "/v1/tasks/echo", &json!({"description": "mine", "limits": {"fuel": 5, "log_bytes": 0}}))
            .await
            .expect(200)
            .json();
    assert_eq!(
        (&task["description"], &task["limits"]),
        (&json!("mine"), &json!({"fuel": 5, "log_bytes": 0}))
    );
    assert_eq!((&task["active"], task.get("retry"), task.get("pinned_version")), (&json!(true), None, None));

    // Inside limits too: null takes one away, absent leaves the other.
    let task = patch(
        &api,
        "/v1/tasks/echo",
        &json!({"limits": {"fuel": null, "memory_bytes": 65_536}, "retry": {"jitter": 0.0}}),
    )
    .await
    .expect(200)
    .json();
    assert_eq!(task["limits"], json!({"log_bytes": 0, "memory_bytes": 65_536}));
    assert_eq!((&task["retry"], &task["description"]), (&json!({"jitter": 0.0}), &json!("mine")));
    let same = patch(&api, "/v1/tasks/echo", &json!({})).await.expect(200).json();
    assert_eq!(same["limits"], task["limits"]);
    assert_eq!(api.client.get("/v1/tasks/echo").await.json()["retry"], task["retry"]);

    // To the defaults: the module's own words, none, none.
    sqlx::query("UPDATE sandbar.tasks SET description = 'mine'").execute(&api.admin).await.unwrap();
    let task = patch(
        &api,
        "/v1/tasks/echo",
        &json!({"description": null, "limits": null, "retry": null, "active": null, "version": null}),
    )
    .await
    .expect(200)
    .json();
    assert_eq!((&task["description"], task.get("limits"), task.get("retry")), (&json!("module"), None, None));
}

#[tokio::test]
async fn a_patch_out_of_range_or_unknown_changes_nothing() {
    let api = Api::start().await;
    api.echo().await;
    let before = api.client.get("/v1/tasks/echo").await.json();
    for (body, pointer) in [
        (json!({"limits": {"fuel": 0}}), "/limits/fuel"),
        (json!({"limits": {"fuels": 1}}), "/limits/fuels"),
        (json!({"retry": {"max_attempts": 101}}), "/retry/max_attempts"),
        (json!({"retry": {"backoff": "slow"}}), "/retry/backoff"),
        (json!({"description": "x".repeat(5_000)}), "/description"),
        (json!({"description": "a\u{0}"}), "/description"),
        (json!({"active": "no"}), "/active"),
        (json!({"name": "other"}), "/name"),
    ] {
        let answer = patch(&api, "/v1/tasks/echo", &body).await;
        assert_eq!(problem(&answer, 422), "invalid-body", "{body}");
        assert_eq!(pointers(&answer), [pointer], "{body}");
    }
    assert_eq!(
        problem(&patch(&api, "/v1/tasks/echo", &json!({"version": 7})).await, 404),
        "version-not-found"
    );
    assert_eq!(problem(&patch(&api, "/v1/tasks/none", &json!({})).await, 404), "task-not-found");
    let wrong =
        api.client.request(Method::PATCH, "/v1/tasks/echo").header("content-type", "text/plain").body("{}");
    assert_eq!(problem(&support::send(wrong).await, 415), "unsupported-media-type");
    assert_eq!(api.client.get("/v1/tasks/echo").await.json(), before);
}

#[tokio::test]
async fn limits_and_retries_of_a_task_lie_between_the_modules_and_the_requests() {
    let api = Api::start().await;
    with_manifest(&api).await;
    patch(
        &api,
        "/v1/tasks/echo",
        &json!({"limits": {"fuel": 77, "log_bytes": 5}, "retry": {"initial_ms": 3}}),
    )
    .await
    .expect(200);
    let body = json!({"limits": {"log_bytes": 6}, "retry": {"factor": 1.5}});
    let accepted = api.client.enqueue("echo", &body).await.expect(202).json();
    let limits = &accepted["limits"];
    assert_eq!(
        (&limits["fuel"], &limits["timeout_ms"], &limits["log_bytes"]),
        (&json!(77), &json!(2000), &json!(6))
    );
    let retry = &accepted["retry"];
    assert_eq!(
        (&retry["max_attempts"], &retry["initial_ms"], &retry["factor"]),
        (&json!(9), &json!(3), &json!(1.5))
    );
    // What was accepted keeps what it was accepted with.
    patch(&api, "/v1/tasks/echo", &json!({"limits": null})).await.expect(200);
    let path = format!("/v1/invocations/{}", accepted["id"].as_str().unwrap());
    assert_eq!(api.client.get(&path).await.json()["limits"]["fuel"], 77);
    assert_eq!(api.client.enqueue("echo", &json!({})).await.expect(202).json()["limits"]["fuel"], 1000);
}

#[tokio::test]
async fn an_inactive_task_accepts_nothing_and_is_itself_again_afterwards() {
    let api = Api::start().await;
    api.echo().await;
    api.client.enqueue("echo", &json!({})).await.expect(202);
    let task = patch(&api, "/v1/tasks/echo", &json!({"active": false})).await.expect(200).json();
    assert_eq!(task["active"], false);
    // At once, although this server remembers tasks for a second.
    assert_eq!(problem(&api.client.enqueue("echo", &json!({})).await, 409), "task-inactive");
    assert_eq!(problem(&api.client.enqueue("echo", &json!({"version": 1})).await, 409), "task-inactive");
    patch(&api, "/v1/tasks/echo", &json!({"active": true})).await.expect(200);
    api.client.enqueue("echo", &json!({})).await.expect(202);
}

#[tokio::test]
async fn a_pinned_version_is_what_plain_invocations_use_until_it_is_let_go() {
    let api = Api::start().await;
    with_manifest(&api).await;
    sqlx::query("UPDATE sandbar.tasks SET current_version = 2").execute(&api.admin).await.unwrap();
    let task = patch(&api, "/v1/tasks/echo", &json!({"version": 1})).await.expect(200).json();
    assert_eq!((&task["pinned_version"], &task["current_version"]), (&json!(1), &json!(1)));
    assert_eq!(api.client.enqueue("echo", &json!({})).await.expect(202).json()["version"], 1);
    assert_eq!(api.client.enqueue("echo", &json!({"version": 2})).await.expect(202).json()["version"], 2);
    let task = patch(&api, "/v1/tasks/echo", &json!({"version": null})).await.expect(200).json();
    assert_eq!((task.get("pinned_version"), &task["current_version"]), (None, &json!(2)));
    assert_eq!(api.client.enqueue("echo", &json!({})).await.expect(202).json()["version"], 2);
}

#[tokio::test]
async fn a_new_module_describes_the_task_anew_unless_a_person_has() {
    let api = Api::start().await;
    let upload = async |description: &str| {
        upload(&api, "count", described(description)).await.expect(201);
        api.client.get("/v1/tasks/count").await.expect(200).json()["description"].clone()
    };
    assert_eq!(upload("first").await, "first");
    assert_eq!(upload("second").await, "second");
    patch(&api, "/v1/tasks/count", &json!({"description": "mine"})).await.expect(200);
    assert_eq!(upload("third").await, "mine");
    let task = patch(&api, "/v1/tasks/count", &json!({"description": null})).await.expect(200).json();
    assert_eq!(task["description"], "third");
    assert_eq!(upload("fourth").await, "fourth");
}

/// The smallest command with a self-description.
fn described(description: &str) -> Vec<u8> {
    let wat = r#"(module (memory (export "memory") 1) (func (export "_start")))"#;
    let mut module = wat::parse_str(wat).unwrap();
    let name = sandbar_host::manifest::SECTION.as_bytes();
    let body = json!({"description": description}).to_string();
    let mut section = vec![u8::try_from(name.len()).unwrap()];
    section.extend_from_slice(name);
    section.extend_from_slice(body.as_bytes());
    module.extend_from_slice(&[0, u8::try_from(section.len()).unwrap()]);
    module.extend_from_slice(&section);
    module
}

#[tokio::test]
async fn a_task_in_use_is_deleted_only_with_its_open_invocations() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let invoke = async |body: Value| {
        let accepted = api.client.enqueue("echo", &body).await.expect(202).json();
        accepted["id"].as_str().unwrap().to_owned()
    };
    let state = async |id: &str| {
        api.client.get(&format!("/v1/invocations/{id}")).await.expect(200).json()["state"].clone()
    };
    let ended = invoke(json!({})).await;
    api.ack(me, success(api.claim(me).await)).await;
    let running = invoke(json!({})).await;
    let claimed = api.claim(me).await;
    let (queued, scheduled) = (invoke(json!({})).await, invoke(json!({"delay_ms": 60_000})).await);
    assert_eq!(problem(&delete(&api, "/v1/tasks/echo").await, 409), "task-in-use");
    assert_eq!(problem(&delete(&api, "/v1/tasks/echo?cancel=maybe").await, 400), "invalid-query");
    assert_eq!(problem(&delete(&api, "/v1/tasks/none?cancel=true").await, 404), "task-not-found");
    api.client.get("/v1/tasks/echo").await.expect(200);

    let mut told = api.signals.subscribe_cancelled();
    let gone = delete(&api, "/v1/tasks/echo?cancel=true").await.expect(204);
    assert!(gone.body.is_empty());
    assert_eq!(told.recv().await.unwrap().to_string(), running);
    for id in [&queued, &scheduled] {
        assert_eq!(state(id).await, "cancelled");
    }
    // A running one ends as ever, and is readable under its task's name.
    api.ack(me, trapped(claimed, Verdict::Retry { delay_ms: 0 })).await;
    assert_eq!(state(&running).await, "cancelled");
    for path in [
        "/v1/tasks/echo",
        "/v1/tasks/echo/versions",
        "/v1/tasks/echo/versions/1",
        "/v1/tasks/echo/versions/1/module",
    ] {
        assert_eq!(problem(&api.client.get(path).await, 404), "task-not-found", "{path}");
    }
    assert_eq!(api.client.get("/v1/tasks").await.json()["items"], json!([]));
    assert_eq!(problem(&api.client.enqueue("echo", &json!({})).await, 404), "task-not-found");
    let listed = api.client.get("/v1/invocations?task=echo").await.expect(200).json();
    assert_eq!(listed["items"].as_array().unwrap().len(), 4);
    let old = api.client.get(&format!("/v1/invocations/{ended}")).await.json();
    assert_eq!((&old["task"], &old["state"]), (&json!("echo"), &json!("succeeded")));
    let retried = api.client.post(&format!("/v1/invocations/{queued}/retry"), &json!({})).await;
    assert_eq!(problem(&retried, 404), "task-not-found");
}

#[tokio::test]
async fn more_open_invocations_than_one_statement_cancels_go_all_the_same() {
    let api = Api::start().await;
    api.echo().await;
    let items: Vec<Value> = (0..1_000).map(|_| json!({"task": "echo"})).collect();
    for _ in 0..2 {
        api.client.post("/v1/invocations:batch", &json!({"invocations": items})).await.expect(200);
    }
    delete(&api, "/v1/tasks/echo?cancel=true").await.expect(204);
    let cancelled: i64 = sqlx::query_scalar("SELECT count(*) FROM sandbar.results WHERE state = 'cancelled'")
        .fetch_one(&api.admin)
        .await
        .unwrap();
    assert_eq!(cancelled, 2_000);
}

#[tokio::test]
async fn the_name_of_a_deleted_task_can_be_taken_again_and_its_module_is_freed_and_comes_back() {
    let api = Api::start().await;
    let module = described("x");
    let bytes = async || -> (i64, bool) {
        sqlx::query_as("SELECT octet_length(bytes)::bigint, freed_at IS NOT NULL FROM sandbar.blobs")
            .fetch_one(&api.admin)
            .await
            .unwrap()
    };
    let full = i64::try_from(module.len()).unwrap();
    upload(&api, "a", module.clone()).await.expect(201);
    upload(&api, "b", module.clone()).await.expect(201);
    api.compile().await;
    delete(&api, "/v1/tasks/a").await.expect(204);
    assert_eq!(api.worker.free_modules(Duration::ZERO, 10).await.unwrap(), 1);
    assert_eq!(bytes().await, (full, false), "b needs it");
    delete(&api, "/v1/tasks/b").await.expect(204);
    assert_eq!(api.worker.free_modules(Duration::from_secs(60), 10).await.unwrap(), 0, "not yet");
    assert_eq!(api.worker.free_modules(Duration::ZERO, 10).await.unwrap(), 1);
    assert_eq!(bytes().await, (0, true));
    let again = upload(&api, "a", module.clone()).await.expect(201).json();
    assert_eq!(again["version"], 1, "a new task");
    assert_eq!(bytes().await, (full, false));
    assert_eq!(api.client.get("/v1/tasks/a/versions/1/module").await.expect(200).body, module);
    assert_eq!(api.worker.free_modules(Duration::ZERO, 10).await.unwrap(), 0);
}

#[tokio::test]
async fn a_module_comes_back_as_it_was_uploaded_in_pieces_or_not_at_all() {
    let api = Api::start().await;
    let mut module = described("x");
    // A custom section of more than two pieces.
    let filler = vec![7u8; (2 << 20) + 12_345];
    let mut size = filler.len() + 2;
    let mut leb = Vec::new();
    while size > 0 {
        leb.push(u8::try_from(size & 0x7f).unwrap() | if size > 0x7f { 0x80 } else { 0 });
        size >>= 7;
    }
    module.push(0);
    module.extend_from_slice(&leb);
    module.extend_from_slice(&[1, b'x']);
    module.extend_from_slice(&filler);
    upload(&api, "big", module.clone()).await.expect(201);
    let path = "/v1/tasks/big/versions/1/module";
    let got = api.client.get(path).await.expect(200);
    assert!(got.body == module, "{} of {} bytes", got.body.len(), module.len());
    let header = |name: &str| got.headers[name].to_str().unwrap().to_owned();
    assert_eq!(header("content-type"), "application/wasm");
    assert_eq!(header("content-length"), module.len().to_string());
    assert_eq!(header("content-disposition"), "attachment; filename=\"big-1.wasm\"");
    let sha256 =
        api.client.get("/v1/tasks/big/versions/1").await.json()["sha256"].as_str().unwrap().to_owned();
    assert_eq!(header("etag"), format!("\"{sha256}\""));
    let known = api.client.request(Method::GET, path).header("if-none-match", header("etag"));
    let not_modified = support::send(known).await;
    assert_eq!((not_modified.status.as_u16(), not_modified.body.len()), (304, 0));
    assert_eq!(problem(&api.client.get("/v1/tasks/big/versions/2/module").await, 404), "version-not-found");
}
