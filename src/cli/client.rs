//! The HTTP client of all commands. Owns timeouts, bounds, the few repetitions, and turning answers into failures; knows
//! no command and prints nothing.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::{Method, StatusCode};
use serde::de::DeserializeOwned;

use super::failure::{Exit, Failure};
use super::target::{Connection, Target, is_local};
use crate::wire::problem::Problem;

/// Name resolution, connection and TLS.
const CONNECT: Duration = Duration::from_secs(5);
/// An answer, without what was asked to wait for.
const ANSWER: Duration = Duration::from_secs(60);
/// Longest upload and download of a module: 256 MiB at some 300 KB/s.
pub const TRANSFER: Duration = Duration::from_secs(900);
/// Largest answer that is kept in memory: a result of 16 MiB fits several times.
const MAX_ANSWER: usize = 64 << 20;
/// Silence on a stream after which it counts as broken; the server says something every 15 s.
const STREAM_SILENCE: Duration = Duration::from_secs(45);
/// How often a request that may be repeated is sent in all.
const TRIES: u32 = 4;
/// First pause between two tries; doubles.
const PAUSE: Duration = Duration::from_millis(200);
/// Longest pause, also when the server asks for a longer one.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// Talks to one server.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    target: Target,
    key: HeaderValue,
}

/// A request.
#[derive(Debug, Clone)]
pub struct Request {
    method: Method,
    path: String,
    headers: HeaderMap,
    body: Option<Bytes>,
    /// Longest time for all of it.
    limit: Duration,
    /// Whether sending it twice does no harm.
    repeatable: bool,
}

/// What came of opening a stream.
#[derive(Debug)]
pub enum Opened {
    /// Events will come.
    Stream(reqwest::Response),
    /// There is no stream to be had: ask again and again instead.
    NoStream,
    /// Not this time; another try may help.
    NotNow(Failure),
}

/// A good answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its header fields.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

impl Request {
    fn new(method: Method, path: impl Into<String>) -> Self {
        let repeatable = matches!(method, Method::GET | Method::DELETE);
        Self { method, path: path.into(), headers: HeaderMap::new(), body: None, limit: ANSWER, repeatable }
    }

    /// `GET`.
    pub fn get(path: impl Into<String>) -> Self {
        Self::new(Method::GET, path)
    }

    /// `DELETE`.
    pub fn delete(path: impl Into<String>) -> Self {
        Self::new(Method::DELETE, path)
    }

    /// `POST`, with a body or without.
    pub fn post(path: impl Into<String>) -> Self {
        Self::new(Method::POST, path)
    }

    /// `PUT`.
    pub fn put(path: impl Into<String>) -> Self {
        Self::new(Method::PUT, path)
    }

    /// `PATCH`.
    pub fn patch(path: impl Into<String>) -> Self {
        // A merge patch says what shall be: twice is the same as once.
        Self::new(Method::PATCH, path).repeatable()
    }

    /// With a body of JSON.
    ///
    /// # Errors
    /// The value is not JSON, which does not happen with ours.
    pub fn json(mut self, value: &impl serde::Serialize) -> Result<Self, Failure> {
        let text = serde_json::to_vec(value).map_err(|e| Failure::new(Exit::Failed, e))?;
        self.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.body = Some(text.into());
        Ok(self)
    }

    /// With a header field. A value that cannot be one is a usage error.
    ///
    /// # Errors
    /// The value has control characters.
    pub fn header(mut self, name: &'static str, value: &str) -> Result<Self, Failure> {
        let value = HeaderValue::from_str(value)
            .map_err(|_| Failure::usage(format!("`{name}` takes visible characters only")))?;
        self.headers.insert(HeaderName::from_static(name), value);
        Ok(self)
    }

    /// The server may take so long before it answers.
    ///
    /// # Errors
    /// Never with a duration.
    pub fn wait(mut self, wait: Duration) -> Result<Self, Failure> {
        self.limit += wait;
        self.header("prefer", &format!("wait={}", wait.as_secs()))
    }

    /// With another limit on the whole of it.
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Sent again when the connection breaks or the server is busy: the request does the same twice as once.
    #[must_use]
    pub fn repeatable(mut self) -> Self {
        self.repeatable = true;
        self
    }
}

impl Client {
    /// For the server that flags, variables, profiles or the directory name.
    ///
    /// # Errors
    /// None is named, or there is no key.
    pub fn new(connection: &Connection) -> Result<Self, Failure> {
        Self::to(connection.target()?)
    }

    /// For a server.
    ///
    /// # Errors
    /// The key cannot be sent, or TLS cannot be set up.
    pub fn to(target: Target) -> Result<Self, Failure> {
        let mut key = HeaderValue::from_str(&target.key).map_err(|_| {
            Failure::new(
                Exit::Denied,
                format!("the API key (from {}) has characters that no key has", target.key_from),
            )
            .hint("a key is one line of letters, digits, '-' and '_'")
        })?;
        key.set_sensitive(true);
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("sandbar/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            // A redirect could lead the key elsewhere; the API has none.
            .redirect(reqwest::redirect::Policy::none());
        if is_local(&target.server) {
            // What a proxy elsewhere would find at this address is another machine.
            builder = builder.no_proxy();
        }
        if let Some(path) = &target.certificate {
            let read = std::fs::read(path).map_err(|error| error.to_string());
            let certificate =
                read.and_then(|pem| reqwest::Certificate::from_pem(&pem).map_err(|error| chain(&error)));
            let certificate = certificate.map_err(|why| {
                Failure::new(Exit::Failed, format!("cannot use the certificate in {}: {why}", path.display()))
            })?;
            builder = builder.add_root_certificate(certificate);
        }
        let http = builder
            .build()
            .map_err(|error| Failure::new(Exit::Failed, format!("cannot set up HTTP: {}", chain(&error))))?;
        Ok(Self { http, target, key })
    }

    /// Address of the server.
    pub fn server(&self) -> &str {
        &self.target.server
    }

    /// Sends a request and reads the whole answer.
    ///
    /// # Errors
    /// The server cannot be reached, does not answer in time, or answers with a problem.
    pub async fn send(&self, request: Request) -> Result<Answer, Failure> {
        let tries = if request.repeatable { TRIES } else { 1 };
        let mut pause = PAUSE;
        let mut number = 1;
        loop {
            let answer = match self.build(&request).timeout(request.limit).send().await {
                Ok(response) => self.read(response).await,
                Err(error) => Err(self.unreachable(&error)),
            };
            match answer {
                Err(Broken { failure, again: Some(after) }) if number < tries => {
                    drop(failure);
                    tokio::time::sleep(after.max(pause).min(MAX_PAUSE)).await;
                    pause = (pause * 2).min(MAX_PAUSE);
                    number += 1;
                }
                Err(broken) => return Err(broken.failure),
                Ok(answer) => return Ok(answer),
            }
        }
    }

    /// Sends a request and reads its JSON.
    ///
    /// # Errors
    /// As [`Client::send`]; or the answer is not what this program knows.
    pub async fn fetch<T: DeserializeOwned>(&self, request: Request) -> Result<T, Failure> {
        self.send(request).await?.json()
    }

    /// Sends a body piece by piece. Not repeated: the pieces are gone.
    ///
    /// # Errors
    /// As [`Client::send`].
    pub async fn upload(
        &self,
        request: &Request,
        size: u64,
        pieces: impl futures_util::Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    ) -> Result<Answer, Failure> {
        let built = self
            .build(request)
            .header(reqwest::header::CONTENT_LENGTH, size)
            .body(reqwest::Body::wrap_stream(pieces))
            .timeout(request.limit);
        let response = built.send().await.map_err(|error| {
            let failure = self.unreachable(&error).failure;
            if error.is_connect() || error.is_timeout() {
                return failure;
            }
            // It refuses by the announced length, and its answer may be lost while we still send.
            failure.hint(format!(
                "the connection ended within the upload: a server takes modules of at most server.max_module_bytes \
                 (64 MiB unless set), and this one has {}",
                super::output::bytes(size)
            ))
        })?;
        self.read(response).await.map_err(|broken| broken.failure)
    }

    /// Opens an answer whose body is read by the caller as it comes.
    ///
    /// # Errors
    /// As [`Client::send`]. The whole is bounded by the request's limit.
    pub async fn open(&self, request: &Request) -> Result<reqwest::Response, Failure> {
        let sent = self.build(request).timeout(request.limit).send().await;
        let response = sent.map_err(|error| self.unreachable(&error).failure)?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(self.refusal(response).await.failure)
    }

    /// Opens a stream of events, which has no end but its own.
    ///
    /// # Errors
    /// The server refused for good.
    pub async fn events(&self, request: &Request) -> Result<Opened, Failure> {
        let built = self.build(request).header(ACCEPT, "text/event-stream");
        let sent = match tokio::time::timeout(STREAM_SILENCE, built.send()).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Ok(Opened::NotNow(self.unreachable(&error).failure)),
            Err(_) => return Ok(Opened::NotNow(self.silent())),
        };
        if sent.status().is_success() {
            let kind =
                sent.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
            let streams = kind.starts_with("text/event-stream");
            return Ok(if streams { Opened::Stream(sent) } else { Opened::NoStream });
        }
        if matches!(sent.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            // All streams are taken, perhaps for long.
            return Ok(Opened::NoStream);
        }
        let broken = self.refusal(sent).await;
        if broken.again.is_some() { Ok(Opened::NotNow(broken.failure)) } else { Err(broken.failure) }
    }

    /// The next piece of a stream; `None` at its end.
    ///
    /// # Errors
    /// It broke, or nothing came for too long.
    pub async fn piece(&self, stream: &mut reqwest::Response) -> Result<Option<Bytes>, Failure> {
        match tokio::time::timeout(STREAM_SILENCE, stream.chunk()).await {
            Ok(Ok(piece)) => Ok(piece),
            Ok(Err(error)) => Err(self.unreachable(&error).failure),
            Err(_) => Err(self.silent()),
        }
    }

    fn silent(&self) -> Failure {
        Failure::new(Exit::Unreachable, format!("{} has been silent for {STREAM_SILENCE:?}", self.server()))
    }

    fn build(&self, request: &Request) -> reqwest::RequestBuilder {
        let url = format!("{}{}", self.target.server, request.path);
        let mut built = self
            .http
            .request(request.method.clone(), url)
            .headers(request.headers.clone())
            .header("x-api-key", self.key.clone());
        if let Some(body) = &request.body {
            built = built.body(body.clone());
        }
        built
    }

    async fn read(&self, mut response: reqwest::Response) -> Result<Answer, Broken> {
        if !response.status().is_success() {
            return Err(self.refusal(response).await);
        }
        let (status, headers) = (response.status(), response.headers().clone());
        let body = self.body(&mut response, MAX_ANSWER).await?;
        Ok(Answer { status, headers, body })
    }

    async fn body(&self, response: &mut reqwest::Response, max: usize) -> Result<Bytes, Broken> {
        let mut body = BytesMut::new();
        while let Some(piece) = response.chunk().await.map_err(|error| self.unreachable(&error))? {
            if body.len() + piece.len() > max {
                let failure = Failure::new(
                    Exit::Failed,
                    format!("the answer of {} is larger than {max} bytes", self.server()),
                );
                return Err(Broken { failure, again: None });
            }
            body.extend_from_slice(&piece);
        }
        Ok(body.freeze())
    }

    /// What an answer that is none means.
    async fn refusal(&self, mut response: reqwest::Response) -> Broken {
        let status = response.status();
        let after = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        let busy = matches!(
            status,
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY | StatusCode::TOO_MANY_REQUESTS
        );
        let again = busy.then(|| Duration::from_secs(after.unwrap_or(0)));
        let body = match self.body(&mut response, MAX_ANSWER).await {
            Ok(body) => body,
            Err(broken) => return broken,
        };
        let failure = match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => {
                let mut failure = Failure::from_problem(problem, self.server());
                if failure.exit == Exit::Denied {
                    failure = failure.detail(format!(
                        "server {}, key from {}",
                        self.server(),
                        self.target.key_from
                    ));
                }
                failure
            }
            Err(_) if status.is_redirection() => Failure::new(
                Exit::Unreachable,
                format!("{} answers with a redirect ({status})", self.server()),
            )
            .hint("name the address it leads to; keys are not sent along redirects"),
            Err(_) => Failure::new(
                Exit::Unreachable,
                format!("{} answers {status}, and not as a Sandbar server does", self.server()),
            )
            .hint("check the address, and what stands between here and there"),
        };
        Broken { failure, again }
    }

    fn unreachable(&self, error: &reqwest::Error) -> Broken {
        // A request that was never sent, or an answer that broke off. A server that is not there is told at once.
        let again = (!error.is_connect() && !error.is_timeout()).then_some(Duration::ZERO);
        let what = if error.is_timeout() { "does not answer in time" } else { "cannot be reached" };
        let failure = Failure::new(Exit::Unreachable, format!("{} {what}: {}", self.server(), chain(error)));
        let hint = if self.target.from == "sandbar dev" {
            "is `sandbar dev` still running?".to_owned()
        } else {
            format!("check the address (from {}), and that the server runs", self.target.from)
        };
        Broken { failure: failure.hint(hint), again }
    }
}

/// Why there is no answer, and whether to try again, and after how long at least.
struct Broken {
    failure: Failure,
    again: Option<Duration>,
}

/// The last cause, which is the one that says something.
fn chain(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

impl Answer {
    /// The body as one of our shapes.
    ///
    /// # Errors
    /// It is another.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_slice(&self.body).map_err(|error| {
            Failure::new(Exit::Failed, format!("the answer is not understood: {error}"))
                .hint("the server may be newer than this program; --json prints what it says as it is")
        })
    }

    /// The body as text, for output as it is.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).trim_end().to_owned()
    }

    /// A header field.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// A value in a path or a query: everything but letters, digits, `-`, `_`, `.` and `~` escaped.
pub fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                escaped.push(char::from(byte));
            }
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

/// A path with a query.
pub fn with_query(path: &str, pairs: &[(&str, String)]) -> String {
    let query: Vec<String> = pairs.iter().map(|(key, value)| format!("{key}={}", escape(value))).collect();
    if query.is_empty() { path.to_owned() } else { format!("{path}?{}", query.join("&")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_user_typed_stays_one_value_of_a_path_or_query() {
        assert_eq!(escape("a/../b?c&d=é"), "a%2F..%2Fb%3Fc%26d%3D%C3%A9");
        assert_eq!(with_query("/p", &[]), "/p");
        assert_eq!(with_query("/p", &[("a", "x:y".to_owned()), ("b", "1".to_owned())]), "/p?a=x%3Ay&b=1");
    }
}
