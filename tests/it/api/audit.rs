//! The audit log through HTTP and from SQL.

use reqwest::Method;
use sandbar::domain::permission::Role;
use serde_json::{Value, json};

use super::access::insert_key;
use super::{Api, OTHER_KEY, SOON, problem};
use crate::support::{eventually, send};

async fn entries(api: &Api, query: &str) -> Vec<Value> {
    let page = api.client.get(&format!("/v1/audit?{query}")).await.expect(200).json();
    page["items"].as_array().unwrap().clone()
}

#[tokio::test]
async fn every_change_is_in_the_log_before_it_is_answered_with_what_was_and_what_is() {
    let api = Api::start().await;
    api.echo().await;
    let patch = json!({"description": "new", "limits": {"fuel": 77}});
    let request =
        api.client.request(Method::PATCH, "/v1/tasks/echo").header("x-request-id", "req-1").json(&patch);
    send(request).await.expect(200);
    let made = api.client.post("/v1/keys", &json!({"name": "ci", "role": "viewer"})).await.expect(201).json();
    let id = made["key"]["id"].as_str().unwrap();
    send(api.client.request(Method::DELETE, &format!("/v1/keys/{id}"))).await.expect(204);
    send(api.client.request(Method::DELETE, "/v1/tasks/echo")).await.expect(204);
    let all = entries(&api, "limit=10").await;
    let operations: Vec<&str> = all.iter().rev().map(|e| e["operation"].as_str().unwrap()).collect();
    let expected =
        ["PATCH /v1/tasks/{task}", "POST /v1/keys", "DELETE /v1/keys/{id}", "DELETE /v1/tasks/{task}"];
    assert_eq!(operations, expected);
    let first = &all[3];
    assert_eq!(
        (&first["before"]["description"], &first["after"]["description"]),
        (&Value::Null, &json!("new"))
    );
    assert_eq!((&first["after"]["limits"]["fuel"], &first["request_id"]), (&json!(77), &json!("req-1")));
    assert_eq!((&first["actor_kind"], &first["address"]), (&json!("key"), &json!("127.0.0.1")));
    assert_eq!((&first["action"], &first["outcome"]), (&json!("change-tasks"), &json!("done")));
    assert_eq!((&all[2]["after"]["name"], &all[0]["after"]), (&json!("ci"), &Value::Null));
    assert!(all[0]["before"]["limits"]["fuel"] == 77);
    let text = serde_json::to_string(&all).unwrap();
    assert!(!text.contains(&made["secret"].as_str().unwrap()[12..]), "a key is in the log");
    // Submissions and reads are not.
    api.task("other", "task", &json!({})).await;
    api.client.enqueue("other", &json!({"input": 1})).await.expect(202);
    assert_eq!(entries(&api, "").await.len(), 4);
}

#[tokio::test]
async fn a_server_that_stops_writes_down_the_denied_attempts_that_it_has_collected() {
    let api = Api::start().await;
    for _ in 0..3 {
        let stranger = api.client.anonymous(Method::GET, "/v1/tasks").header("x-api-key", "sbk_guess");
        assert_eq!(problem(&send(stranger).await, 401), "unauthenticated");
    }
    api.app.shutdown().await;
    let written: i64 =
        sqlx::query_scalar("SELECT sum(times)::bigint FROM sandbar.audit WHERE operation = 'GET /v1/tasks'")
            .fetch_one(&api.admin)
            .await
            .unwrap();
    assert_eq!(written, 3);
}

#[tokio::test]
async fn denied_attempts_are_counted_with_who_and_from_where() {
    let api = Api::start().await;
    let viewer = insert_key(&api, api.tenant, Role::Viewer, &[]).await;
    for _ in 0..5 {
        let request = api.client.anonymous(Method::DELETE, "/v1/tasks/echo").header("x-api-key", &viewer);
        assert_eq!(problem(&send(request).await, 403), "forbidden");
    }
    let stranger = api.client.anonymous(Method::GET, "/v1/tasks").header("x-api-key", "sbk_guess");
    assert_eq!(problem(&send(stranger).await, 401), "unauthenticated");
    eventually(SOON, "the denials", async || {
        let denied = entries(&api, "outcome=denied").await;
        let times: i64 = denied.iter().map(|e| e["times"].as_i64().unwrap()).sum();
        (times == 5).then_some(())
    })
    .await;
    let denied = entries(&api, "outcome=denied&action=delete-tasks&target=/v1/tasks").await;
    assert!(
        denied.iter().all(|e| e["code"] == "forbidden" && e["actor"] == "test" && e["status"] == 403),
        "{denied:?}"
    );
    eventually(SOON, "the stranger", async || {
        let all = entries(&api, "of=installation&outcome=denied").await;
        (all.len() == 1 && all[0]["actor_kind"] == "nobody" && all[0]["code"] == "unauthenticated")
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_tenant_reads_its_own_log_and_exports_all_of_it() {
    let api = Api::start().await;
    for n in 0..7 {
        api.client.post("/v1/keys", &json!({"name": format!("k{n}"), "role": "viewer"})).await.expect(201);
    }
    let ask = |path: &str| api.as_other(Method::GET, path);
    assert_eq!(send(ask("/v1/audit")).await.expect(200).json()["items"], json!([]));
    let refused = send(ask("/v1/audit?of=installation")).await;
    assert_eq!(problem(&refused, 403), "forbidden");
    assert!(!OTHER_KEY.is_empty());
    let (mut next, mut names) = (Some("/v1/audit?limit=3&action=manage-keys".to_owned()), Vec::new());
    while let Some(path) = next {
        let page = api.client.get(&path).await.expect(200).json();
        names.extend(
            page["items"].as_array().unwrap().iter().map(|e| e["after"]["name"].as_str().unwrap().to_owned()),
        );
        next = page["next"].as_str().map(str::to_owned);
    }
    assert_eq!(names, ["k6", "k5", "k4", "k3", "k2", "k1", "k0"]);
    let export =
        send(api.client.request(Method::GET, "/v1/audit").header("accept", "application/x-ndjson")).await;
    assert_eq!(export.headers["content-type"], "application/x-ndjson");
    let lines: Vec<Value> = export.text().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 7);
    let now = chrono::Utc::now().to_rfc3339().replace('+', "%2B");
    assert!(entries(&api, &format!("since={now}")).await.is_empty());
    for query in ["since=now", "actor=me", "action=fly", "outcome=maybe", "of=all", "after=1", "order=asc"] {
        assert_eq!(
            problem(&api.client.get(&format!("/v1/audit?{query}")).await, 400),
            "invalid-query",
            "{query}"
        );
    }
}

#[tokio::test]
async fn nobody_changes_the_log() {
    let api = Api::start().await;
    api.client.post("/v1/keys", &json!({"name": "x", "role": "viewer"})).await.expect(201);
    for statement in
        ["UPDATE sandbar.audit SET actor = 'nobody'", "DELETE FROM sandbar.audit", "TRUNCATE sandbar.audit"]
    {
        // As a superuser: the rights of the program's roles do not even get there.
        let refused = sqlx::query(statement).execute(&api.admin).await.unwrap_err().to_string();
        assert!(refused.contains("append-only"), "{statement}: {refused}");
        let mut connection = api.store.tenant(api.tenant).await.unwrap();
        let refused = sqlx::query(statement).execute(&mut *connection).await.unwrap_err().to_string();
        assert!(refused.contains("permission denied"), "{statement}: {refused}");
    }
    assert_eq!(entries(&api, "").await.len(), 1);
}
