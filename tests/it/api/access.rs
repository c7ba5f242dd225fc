//! Every operation of the document × (no credential, another tenant, each role, scopes), against the table that the
//! program goes by. An operation without a row fails.

use reqwest::{Method, RequestBuilder};
use sandbar::api::access::{Access, OPERATIONS, Operation};
use sandbar::domain::ids::{KeyId, TenantId};
use sandbar::domain::permission::{Action, Role};
use sandbar::store::tenant::key_hash;
use serde_json::{Value, json};

use super::{Api, OTHER_KEY};
use crate::support::{Answer, send};

/// A key of this tenant, put there past the API.
pub(super) async fn insert_key(api: &Api, tenant: TenantId, role: Role, scopes: &[&str]) -> String {
    let secret = format!("sbk_test-{}", KeyId::generate());
    let scopes: Vec<String> = scopes.iter().map(|s| (*s).to_owned()).collect();
    sqlx::query("INSERT INTO sandbar.api_keys (tenant_id, key_id, prefix, hash, role, scopes, name) VALUES ($1, $2, left($3, 12), $4, $5, $6, 'test')")
        .bind(tenant)
        .bind(KeyId::generate())
        .bind(&secret)
        .bind(key_hash(&secret).as_slice())
        .bind(role.as_str())
        .bind(scopes)
        .execute(&api.admin)
        .await
        .unwrap();
    secret
}

/// The path with parameters of things that are not there, so that nothing happens to anybody who may.
fn nowhere(path: &str) -> String {
    let mut concrete = String::new();
    for part in path.split_inclusive('/') {
        let (name, slash) = part.strip_suffix('/').map_or((part, ""), |name| (name, "/"));
        concrete.push_str(match name {
            "{id}" => "01890000-0000-7000-8000-000000000000",
            "{version}" => "1",
            _ if name.starts_with('{') => "none-such",
            _ => name,
        });
        concrete.push_str(slash);
    }
    concrete
}

fn call(api: &Api, op: &Operation, path: &str) -> RequestBuilder {
    let method: Method = op.method.parse().unwrap();
    let request = api.client.anonymous(method.clone(), path);
    if method == Method::GET { request } else { request.json(&json!({})) }
}

/// The code of a problem; empty when it is none.
fn code(answer: &Answer) -> String {
    let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    body["code"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn every_operation_answers_each_kind_of_caller_as_the_table_says() {
    let api = Api::start().await;
    let document = api.client.get("/openapi.json").await.expect(200).json();
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            let row = OPERATIONS
                .iter()
                .find(|op| op.documented() == *path && op.method.eq_ignore_ascii_case(method));
            operations.push(row.unwrap_or_else(|| panic!("{method} {path} has no row in api::access")));
        }
    }
    assert!(operations.len() > 30, "{}", operations.len());
    let mut keys = Vec::new();
    for role in Role::ALL {
        keys.push((role, insert_key(&api, api.tenant, role, &[]).await));
    }
    for op in operations {
        let path = nowhere(op.path);
        let what = format!("{} {}", op.method, op.path);
        // No credential, and one that is none.
        for request in [call(&api, op, &path), call(&api, op, &path).header("x-api-key", "sbk_stranger")] {
            let answer = send(request).await;
            let refused = answer.status.as_u16() == 401;
            assert_eq!(refused, op.access != Access::Open, "{what} without a credential: {}", answer.text());
        }
        let Some(action) = op.access.action() else { continue };
        // Each role.
        for (role, key) in &keys {
            let answer = send(call(&api, op, &path).header("x-api-key", key)).await;
            let (may, code) = (role.may(action), code(&answer));
            assert_eq!(code != "forbidden", may, "{what} as {role:?}: {}", answer.text());
            assert!(may || answer.status.as_u16() == 403, "{what} as {role:?}");
            assert_ne!(code, "unauthenticated", "{what} as {role:?}");
        }
        // Each relevant scope, on a role that may everything.
        let other = if action == Action::ReadLogs { Action::Submit } else { Action::ReadLogs };
        let on_task = format!("{}:none-such", action.as_str());
        let elsewhere = format!("{}:elsewhere", action.as_str());
        let task = matches!(op.access, Access::Task(_));
        for (scopes, may) in [
            (vec![action.as_str()], true),
            (vec![other.as_str()], false),
            (vec![other.as_str(), action.as_str()], true),
            (vec![on_task.as_str()], task),
            (vec!["*:none-such"], task),
            (vec![elsewhere.as_str()], false),
        ] {
            let key = insert_key(&api, api.tenant, Role::Platform, &scopes).await;
            let answer = send(call(&api, op, &path).header("x-api-key", &key)).await;
            match op.access {
                // Invocations outside of the scopes are not there; what the body names is judged piece by piece.
                Access::Invocation(_) if !may && scopes[0].contains(':') => {
                    assert_eq!(answer.status.as_u16(), 404, "{what} with {scopes:?}: {}", answer.text());
                }
                Access::Named(_) if scopes[0].contains(':') => {
                    assert!(!answer.status.is_success(), "{what} with {scopes:?}: {}", answer.text());
                }
                _ => {
                    let forbidden = code(&answer) == "forbidden";
                    assert_eq!(!forbidden, may, "{what} with {scopes:?}: {}", answer.text());
                }
            }
        }
    }
}

#[tokio::test]
async fn what_belongs_to_another_tenant_is_not_there() {
    let api = Api::start().await;
    api.echo().await;
    let invocation = api.client.enqueue("echo", &json!({"input": 1})).await.expect(202).json();
    let made =
        api.client.post("/v1/keys", &json!({"name": "mine", "role": "viewer"})).await.expect(201).json();
    let other: TenantId = sqlx::query_scalar("SELECT tenant_id FROM sandbar.tenants WHERE name = 'two'")
        .fetch_one(&api.admin)
        .await
        .unwrap();
    let owner = insert_key(&api, other, Role::Owner, &[]).await;
    let mut seen = 0;
    for op in OPERATIONS {
        let Some(action) = op.access.action().filter(|a| Role::Owner.may(*a)) else { continue };
        // An upload makes the task of that name in the caller's own tenant.
        if !op.path.contains('{') || action == Action::Upload {
            continue;
        }
        let id = if op.path.starts_with("/v1/keys/") { &made["key"]["id"] } else { &invocation["id"] };
        let path =
            op.path.replace("{task}", "echo").replace("{id}", id.as_str().unwrap()).replace("{version}", "1");
        let answer = send(call(&api, op, &path).header("x-api-key", &owner)).await;
        let known = ["/v1/tasks/", "/v1/invocations/", "/v1/keys/"].iter().any(|p| op.path.starts_with(p));
        if known && !path.contains('{') {
            assert_eq!(answer.status.as_u16(), 404, "{} {path}: {}", op.method, answer.text());
            seen += 1;
        } else {
            assert!(!answer.status.is_success(), "{} {path}: {}", op.method, answer.text());
        }
        assert!(!answer.text().contains("mine"), "{} {path}", op.method);
    }
    assert!(seen >= 15, "{seen}");
    let request = |path: &str| api.as_other(Method::GET, path);
    for list in ["/v1/tasks", "/v1/invocations"] {
        let answer = send(request(list)).await.expect(200).json();
        assert_eq!(answer["items"], json!([]), "{list}");
    }
    let keys = send(request("/v1/keys")).await.expect(200).json();
    assert_eq!(keys["items"].as_array().unwrap().len(), 2, "its own two: {keys}");
    assert!(!OTHER_KEY.is_empty());
}

#[tokio::test]
async fn a_key_for_one_task_reaches_that_task_and_nothing_else() {
    let api = Api::start().await;
    api.echo().await;
    api.task("other", "task", &json!({})).await;
    let key = insert_key(&api, api.tenant, Role::Developer, &["submit:echo", "read-invocations:echo"]).await;
    let ask = |method: Method, path: &str| api.client.anonymous(method, path).header("x-api-key", &key);
    let mine = send(ask(Method::POST, "/v1/tasks/echo/invocations").json(&json!({"input": 1}))).await;
    let mine = mine.expect(202).json()["id"].as_str().unwrap().to_owned();
    let theirs = api.client.enqueue("other", &json!({"input": 1})).await.expect(202).json();
    let theirs = theirs["id"].as_str().unwrap().to_owned();
    for (method, path, status) in [
        (Method::POST, "/v1/tasks/other/invocations".to_owned(), 403),
        (Method::GET, "/v1/tasks/echo".to_owned(), 403),
        (Method::GET, "/v1/tasks".to_owned(), 403),
        (Method::GET, format!("/v1/invocations/{mine}"), 200),
        (Method::GET, format!("/v1/invocations/{theirs}"), 404),
        (Method::GET, format!("/v1/invocations/{mine}/logs"), 403),
        (Method::POST, format!("/v1/invocations/{mine}/cancel"), 403),
        (Method::GET, "/v1/invocations".to_owned(), 403),
        (Method::GET, "/v1/invocations?task=echo".to_owned(), 200),
        (Method::GET, "/v1/invocations?task=other".to_owned(), 403),
    ] {
        let body = json!({"input": 1});
        let request = ask(method.clone(), &path);
        let request = if method == Method::GET { request } else { request.json(&body) };
        let answer = send(request).await;
        assert_eq!(answer.status.as_u16(), status, "{method} {path}: {}", answer.text());
    }
    let batch = json!({"invocations": [{"task": "echo", "input": 1}, {"task": "other", "input": 1}]});
    let outcomes = send(ask(Method::POST, "/v1/invocations:batch").json(&batch)).await.expect(200).json();
    assert_eq!(
        (&outcomes["outcomes"][0]["status"], &outcomes["outcomes"][1]["status"]),
        (&json!(202), &json!(403))
    );
}
