//! The OpenAPI document against what the server really answers: every answer is valid by its schema, and says nothing
//! that the schema does not name.

use std::collections::BTreeSet;

use reqwest::Method;
use sandbar::domain::retry::Verdict;
use sandbar::store::log::Said;
use sandbar_host::cell::Progress;
use serde_json::{Value, json};

use super::{Api, success, trapped};
use crate::support::{self, Answer};

/// The document, and which operations and statuses were held against it.
struct Document {
    json: Value,
    seen: BTreeSet<String>,
}

impl Document {
    fn resolve<'a>(&'a self, mut schema: &'a Value) -> &'a Value {
        while let Some(reference) = schema["$ref"].as_str() {
            schema = self.json.pointer(reference.strip_prefix('#').unwrap()).unwrap();
        }
        schema
    }

    /// What of `value` no branch of `schema` names.
    fn unnamed(&self, schema: &Value, value: &Value, at: &str) -> Vec<String> {
        let schema = self.resolve(schema);
        let branches: Vec<&Value> =
            ["allOf", "oneOf", "anyOf"].iter().filter_map(|key| schema[*key].as_array()).flatten().collect();
        match value {
            Value::Array(items) => match schema.get("items") {
                Some(of) => items.iter().flat_map(|item| self.unnamed(of, item, at)).collect(),
                None => self.best(&branches, value, at),
            },
            Value::Object(fields) => {
                let mut missing = Vec::new();
                for (name, field) in fields {
                    let place = format!("{at}/{name}");
                    let own = schema["properties"].get(name);
                    let others = schema.get("additionalProperties").filter(|of| of.is_object());
                    if let Some(of) = own.or(others) {
                        missing.extend(self.unnamed(of, field, &place));
                    } else if !schema["properties"].is_object() && branches.is_empty() {
                        // Any JSON.
                    } else {
                        let one = json!({ name: field });
                        missing.extend(self.best(&branches, &one, at));
                    }
                }
                missing
            }
            _ => Vec::new(),
        }
    }

    fn best(&self, branches: &[&Value], value: &Value, at: &str) -> Vec<String> {
        let all = branches.iter().map(|branch| self.unnamed(branch, value, at));
        all.min_by_key(Vec::len).unwrap_or_else(|| vec![format!("{at}: {value}")])
    }

    #[track_caller]
    fn check(&self, schema: &Value, value: &Value, what: &str) {
        let mut whole = schema.clone();
        whole["components"] = self.json["components"].clone();
        let validator = jsonschema::validator_for(&whole).unwrap();
        let errors: Vec<String> =
            validator.iter_errors(value).map(|e| format!("{} {e}", e.instance_path())).collect();
        assert!(errors.is_empty(), "{what}: {errors:?}\n{value:#}");
        let unnamed = self.unnamed(schema, value, "");
        assert!(unnamed.is_empty(), "{what} has what its schema does not name: {unnamed:?}");
    }

    /// Holds an answer, and the body that it answers, against the operation.
    #[track_caller]
    fn answer(&mut self, method: &Method, path: &str, body: Option<&Value>, answer: &Answer) {
        let status = answer.status.as_u16().to_string();
        let name = method.as_str().to_lowercase();
        let what = format!("{name} {path} {status}");
        let operation = &self.json["paths"][path][&name];
        let documented = &operation["responses"][&status];
        assert!(documented.is_object(), "{what} is not documented: {}", answer.text());
        let media =
            answer.headers.get("content-type").map(|v| v.to_str().unwrap().split(';').next().unwrap());
        if let (Some(media), Some(content)) = (media, documented.get("content")) {
            let schema = &content[media]["schema"];
            assert!(!schema.is_null(), "{what}: {media} is not documented");
            if media.ends_with("json") {
                self.check(schema, &answer.json(), &what);
            }
        }
        if let Some(body) = body.filter(|_| answer.status.is_success()) {
            let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
            self.check(schema, body, &format!("the body of {what}"));
        }
        self.seen.insert(what);
    }
}

#[tokio::test]
async fn every_answer_of_the_new_operations_is_as_the_document_says() {
    let api = Api::start().await;
    api.task("echo", "task", &json!({"description": "x", "limits": {"fuel": 1000}})).await;
    let me = api.register().await;
    let json = api.client.get("/openapi.json").await.expect(200).json();
    let mut document = Document { json, seen: BTreeSet::new() };
    let mut call = async |method: Method, path: &str, id: &str, query: &str, body: Option<Value>| {
        let concrete = path.replace("{task}", "echo").replace("{version}", "1").replace("{id}", id);
        let mut request = api.client.request(method.clone(), &format!("{concrete}{query}"));
        if let Some(body) = &body {
            request = request.json(body);
        }
        let answer = support::send(request).await;
        document.answer(&method, path, body.as_ref(), &answer);
        answer
    };
    let (task, one) = ("/v1/tasks/{task}", "/v1/invocations/{id}");
    for body in [
        json!({"description": "mine", "limits": {"fuel": 5, "memory_bytes": null}, "retry": {"backoff": "fixed", "factor": 2.5, "jitter": null}, "active": true, "version": 1}),
        json!({"description": null, "limits": null, "retry": null, "active": null, "version": null}),
        json!({"version": 9}),
        json!({"limits": {"fuel": 0}}),
    ] {
        call(Method::PATCH, task, "", "", Some(body)).await;
    }
    call(Method::GET, task, "", "", None).await.expect(200);
    call(Method::GET, "/v1/tasks", "", "", None).await.expect(200);
    call(Method::GET, "/v1/tasks/{task}/versions/{version}", "", "", None).await.expect(200);
    call(Method::GET, "/v1/tasks/{task}/versions/{version}/module", "", "", None).await.expect(200);
    let batch = json!({"invocations": [
        {"task": "echo", "input": {"any": ["JSON", 1.5, null]}, "tags": {"a": "1"}, "idempotency_key": "k", "priority": 1,
         "limits": {"fuel": 7}, "retry": {"max_attempts": 1}, "expires_at": "2099-01-01T00:00:00Z"},
        {"task": "echo", "delay_ms": 60_000}, {"task": "none"}, {"task": "echo", "idempotency_key": "k"}]});
    let mut good = batch.clone();
    good["invocations"].as_array_mut().unwrap()[0]["expires_at"] =
        json!(chrono::Utc::now() + chrono::Duration::hours(1));
    let outcomes = call(Method::POST, "/v1/invocations:batch", "", "", Some(good)).await.expect(200).json();
    call(Method::POST, "/v1/invocations:batch", "", "", Some(json!({"invocations": []}))).await.expect(422);
    let id = outcomes["outcomes"][0]["id"].as_str().unwrap().to_owned();
    let later = outcomes["outcomes"][1]["id"].as_str().unwrap().to_owned();
    let change = json!({"priority": 3, "run_at": null, "tags": {"a": null, "b": "2"}});
    call(Method::PATCH, one, &id, "", Some(change)).await.expect(200);
    call(Method::PATCH, one, &later, "", Some(json!({"tags": null, "priority": null}))).await.expect(200);
    let claimed = api.claim(me).await;
    call(Method::PATCH, one, &id, "", Some(json!({"priority": 4}))).await.expect(409);
    let report = Progress { done: 1, total: 2, message: "half".to_owned() };
    let said = Said {
        claim: claimed.claim(),
        started_at: chrono::Utc::now(),
        log: None,
        progress: Some((report, chrono::Utc::now())),
    };
    api.worker.write_live(me.0, me.1, &[said]).await.unwrap();
    api.ack(me, trapped(claimed, Verdict::Dead)).await;
    call(Method::GET, one, &id, "", None).await.expect(200);
    call(Method::GET, "/v1/invocations", "", "", None).await.expect(200);
    call(Method::GET, "/v1/invocations/{id}/logs", &id, "?limit=1", None).await.expect(200);
    call(Method::GET, "/v1/invocations/{id}/logs", &id, "?limit=0", None).await.expect(400);
    let again = call(Method::POST, "/v1/invocations/{id}/retry", &id, "", Some(json!({"version": 1}))).await;
    let again = again.expect(202).json()["id"].as_str().unwrap().to_owned();
    call(Method::POST, "/v1/invocations/{id}/retry", &again, "", None).await.expect(409);
    let claimed = api.claim(me).await;
    api.ack(me, success(claimed)).await;
    call(Method::GET, one, &again, "", None).await.expect(200);
    call(Method::DELETE, task, "", "", None).await.expect(409);
    call(Method::DELETE, task, "", "?cancel=true", None).await.expect(204);
    call(Method::DELETE, task, "", "", None).await.expect(404);
    assert!(document.seen.len() >= 18, "{:?}", document.seen);
}
