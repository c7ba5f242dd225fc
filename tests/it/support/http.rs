//! A caller of the API.

use std::path::Path;
use std::time::Duration;

use reqwest::header::HeaderMap;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::Value;

use super::ADMIN_KEY;

/// Longest request, also with the longest wait that tests ask for.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Calls one server with the admin key.
#[derive(Debug, Clone)]
pub struct Client {
    base: String,
    http: reqwest::Client,
}

/// What came back.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status of the response.
    pub status: StatusCode,
    /// Its header fields.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Vec<u8>,
}

impl Client {
    /// `base` is `http://ADDR`.
    pub fn new(base: impl Into<String>) -> Self {
        let http = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build().unwrap();
        Self { base: base.into(), http }
    }

    /// `http://ADDR` of the server.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// A request to a path, with the key.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.anonymous(method, path).header("x-api-key", ADMIN_KEY)
    }

    /// A request to a path, without any key.
    pub fn anonymous(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base))
    }

    /// `GET`.
    pub async fn get(&self, path: &str) -> Answer {
        send(self.request(Method::GET, path)).await
    }

    /// `POST` of JSON.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        send(self.request(Method::POST, path).json(body)).await
    }

    /// Uploads a module and waits for the verdict of the compiler.
    pub async fn upload(&self, task: &str, module: &Path) -> Answer {
        self.upload_bytes(task, std::fs::read(module).unwrap()).await
    }

    /// Uploads bytes and waits for the verdict of the compiler.
    pub async fn upload_bytes(&self, task: &str, bytes: Vec<u8>) -> Answer {
        let request = self
            .request(Method::POST, &format!("/v1/tasks/{task}/versions"))
            .header("content-type", "application/wasm")
            .header("prefer", "wait=60")
            .body(bytes);
        send(request).await
    }

    /// Uploads bytes and waits for nobody.
    pub async fn upload_no_wait(&self, task: &str, bytes: Vec<u8>) -> Answer {
        let request = self
            .request(Method::POST, &format!("/v1/tasks/{task}/versions"))
            .header("content-type", "application/wasm")
            .body(bytes);
        send(request).await
    }

    /// Invokes and waits up to 30 s for the end. 200: finished; 202: not in time.
    pub async fn invoke(&self, task: &str, body: &Value) -> Answer {
        let request = self
            .request(Method::POST, &format!("/v1/tasks/{task}/invocations"))
            .header("prefer", "wait=30")
            .json(body);
        send(request).await
    }

    /// Invokes without waiting.
    pub async fn enqueue(&self, task: &str, body: &Value) -> Answer {
        self.post(&format!("/v1/tasks/{task}/invocations"), body).await
    }

    /// Whether the server says that it is ready.
    pub async fn is_ready(&self) -> bool {
        let asked = self.anonymous(Method::GET, "/readyz").timeout(Duration::from_secs(2)).send().await;
        asked.is_ok_and(|response| response.status().is_success())
    }
}

/// Sends a request.
///
/// # Panics
/// When there is no response. Tests that kill servers send by themselves.
pub async fn send(request: RequestBuilder) -> Answer {
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status(), response.headers().clone());
    Answer { status, headers, body: response.bytes().await.unwrap().into() }
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {}: {}", self.status, self.text()))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// This answer, if it has the status.
    ///
    /// # Panics
    /// When it has another one; shows the body.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status.as_u16(), status, "{}", self.text());
        self
    }
}
