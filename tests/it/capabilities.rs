//! What guests may use beyond WASI, by real guests in real cells: each capability with its grant, without it, at its
//! quota, beside another tenant, and after the attempt has been handed on.

mod config;
mod invoke;
mod kv;
mod logging;
mod sealed;
mod secrets;

use reqwest::Method;
use sandbar::domain::ids::{KeyId, TenantId};
use sandbar::store::tenant::key_hash;
use serde_json::{Value, json};

use crate::support::{self, ADMIN_KEY, Answer, Client, Database, Deployment};

/// A caller with a key of one tenant.
#[derive(Clone)]
pub struct Tenant {
    client: Client,
    key: String,
}

impl Tenant {
    /// The tenant of the administrator's key.
    pub fn first(deployment: &Deployment) -> Self {
        Self { client: deployment.client(), key: ADMIN_KEY.to_owned() }
    }

    /// Another tenant, with an admin's key.
    pub async fn other(deployment: &Deployment, name: &str) -> Self {
        let (tenant, key) = (TenantId::generate(), format!("sbk_other-tenant-{name}-0123456789abcdef"));
        let admin = deployment.database.admin().await;
        sqlx::query("INSERT INTO sandbar.tenants (tenant_id, name) VALUES ($1, $2)")
            .bind(tenant)
            .bind(name)
            .execute(&admin)
            .await
            .unwrap();
        sqlx::query("INSERT INTO sandbar.api_keys (tenant_id, key_id, prefix, hash, role) VALUES ($1, $2, 'sbk', $3, 'admin')")
            .bind(tenant)
            .bind(KeyId::generate())
            .bind(key_hash(&key).as_slice())
            .execute(&admin)
            .await
            .unwrap();
        Self { client: deployment.client(), key }
    }

    pub async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Answer {
        let mut request = self.client.anonymous(method, path).header("x-api-key", &self.key);
        if let Some(body) = body {
            request = request.json(body);
        }
        support::send(request).await
    }

    pub async fn upload(&self, task: &str, guest: &str) {
        self.upload_bytes(task, std::fs::read(support::guest(guest)).unwrap(), true).await.expect(201);
    }

    /// Uploads, and waits for the compiler if asked to.
    pub async fn upload_bytes(&self, task: &str, module: Vec<u8>, wait: bool) -> Answer {
        let path = format!("/v1/tasks/{task}/versions");
        let mut request = self.client.anonymous(Method::POST, &path).header("x-api-key", &self.key);
        if wait {
            request = request.header("prefer", "wait=60");
        }
        support::send(request.header("content-type", "application/wasm").body(module)).await
    }

    async fn grant(&self, task: &str, grants: &Value) {
        let body = json!({"grants": grants});
        self.send(Method::PATCH, &format!("/v1/tasks/{task}"), Some(&body)).await.expect(200);
    }

    /// Invokes without retries and waits; the result and the invocation.
    async fn run(&self, task: &str, input: &Value) -> (Value, Value) {
        let body = json!({"input": input, "retry": {"max_attempts": 1}});
        let ended = self.wait(task, &body).await;
        let id = ended["id"].as_str().unwrap_or_else(|| panic!("{ended:#}"));
        let result = self.send(Method::GET, &format!("/v1/invocations/{id}/result"), None).await;
        (serde_json::from_slice(&result.body).unwrap_or_default(), ended)
    }

    /// Invokes with this body and waits for the end.
    pub async fn wait(&self, task: &str, body: &Value) -> Value {
        let path = format!("/v1/tasks/{task}/invocations");
        let request = self.client.anonymous(Method::POST, &path).header("x-api-key", &self.key);
        support::send(request.header("prefer", "wait=60").json(body)).await.expect(200).json()
    }

    async fn log(&self, ended: &Value) -> String {
        let id = ended["id"].as_str().unwrap();
        self.send(Method::GET, &format!("/v1/invocations/{id}/logs"), None).await.expect(200).text()
    }
}

/// One number of the database.
async fn count(database: &Database, sql: &str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(&database.admin().await).await.unwrap()
}
