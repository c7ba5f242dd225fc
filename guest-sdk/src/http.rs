//! HTTP requests of a task, to hosts that its tenant has granted it. Over the standard `wasi:http`, so they work under
//! every host that has it. Redirects are not followed: a task that wants to makes the next request.

use std::fmt;
use std::time::Duration;

use crate::error::TaskError;

#[cfg(target_family = "wasm")]
mod component;
#[cfg(not(target_family = "wasm"))]
mod native;

#[cfg(not(target_family = "wasm"))]
pub use native::{Answering, answer};

/// Bytes of a response that are read unless [`Request::max_bytes`] says otherwise.
const MAX_BYTES: usize = 16 << 20;

/// One request, to be [sent](Request::send).
///
/// ```
/// use sandbar_guest::{TaskError, http, task};
///
/// #[task(grants(http = ["api.example.com"]))]
/// fn rate(currency: String) -> Result<f64, TaskError> {
///     let answer = http::get(format!("https://api.example.com/rates/{currency}"))
///         .header("accept", "text/plain")
///         .send()?
///         .success()?;
///     answer.text().trim().parse().map_err(|_| TaskError::fatal("not a number"))
/// }
///
/// let _answers = http::answer(|request| {
///     assert_eq!(request.url(), "https://api.example.com/rates/CHF");
///     Ok(http::Response::new(200).with_body("1.07\n"))
/// });
/// assert_eq!(rate("CHF".to_owned()).unwrap(), 1.07);
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct Request {
    method: String,
    url: String,
    headers: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
    max_bytes: usize,
    connect: Option<Duration>,
    first_byte: Option<Duration>,
}

/// A `GET` of this URL.
pub fn get(url: impl Into<String>) -> Request {
    Request::new("GET", url)
}

/// A `POST` to this URL.
pub fn post(url: impl Into<String>) -> Request {
    Request::new("POST", url)
}

impl Request {
    /// With a method of your choice.
    pub fn new(method: impl Into<String>, url: impl Into<String>) -> Self {
        Self {
            method: method.into(),
            url: url.into(),
            headers: Vec::new(),
            body: Vec::new(),
            max_bytes: MAX_BYTES,
            connect: None,
            first_byte: None,
        }
    }

    /// With one more header. What belongs to the connection (`host`, `connection`, `transfer-encoding`, …) is refused
    /// when it is sent.
    pub fn header(mut self, name: impl Into<String>, value: impl AsRef<[u8]>) -> Self {
        self.headers.push((name.into(), value.as_ref().to_vec()));
        self
    }

    /// With a body of bytes.
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// With a body of JSON, and the header that says so.
    ///
    /// # Errors
    /// The value cannot be written as JSON.
    pub fn json(self, value: &impl serde::Serialize) -> Result<Self, TaskError> {
        let body = serde_json::to_vec(value).map_err(|error| TaskError::fatal(error.to_string()))?;
        Ok(self.header("content-type", "application/json").body(body))
    }

    /// Reads at most so many bytes of the response; the default is 16 MiB.
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// Waits so long for a connection, and then so long for the response to begin. The host has bounds of its own.
    pub fn timeouts(mut self, connect: Duration, first_byte: Duration) -> Self {
        (self.connect, self.first_byte) = (Some(connect), Some(first_byte));
        self
    }

    /// The method.
    #[must_use]
    pub fn method(&self) -> &str {
        &self.method
    }

    /// The URL.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The body.
    #[must_use]
    pub fn body_bytes(&self) -> &[u8] {
        &self.body
    }

    /// Sends it and reads the whole response, whatever its status.
    ///
    /// # Errors
    /// There was no response, or it is too large.
    pub fn send(self) -> Result<Response, Error> {
        #[cfg(target_family = "wasm")]
        return component::send(&self);
        #[cfg(not(target_family = "wasm"))]
        native::send(&self)
    }

    /// Scheme, authority, and path with query.
    #[cfg_attr(not(target_family = "wasm"), allow(dead_code))]
    fn parts(&self) -> Result<(bool, &str, &str), Error> {
        let malformed = || Error::new("HTTP-request-URI-invalid");
        let (secure, rest) = match (self.url.strip_prefix("https://"), self.url.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            _ => return Err(malformed()),
        };
        let rest = rest.split('#').next().unwrap_or_default();
        let at = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(at);
        if authority.is_empty() { Err(malformed()) } else { Ok((secure, authority, path)) }
    }
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    status: u16,
    headers: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
}

impl Response {
    /// An empty one, for tests.
    #[must_use]
    pub fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new() }
    }

    /// With this body, for tests.
    #[must_use]
    pub fn with_body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// With one more header, for tests.
    #[must_use]
    pub fn with_header(mut self, name: impl Into<String>, value: impl AsRef<[u8]>) -> Self {
        self.headers.push((name.into(), value.as_ref().to_vec()));
        self
    }

    /// Such as 200.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.status
    }

    /// The first header of this name, if it is text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(found, _)| found.eq_ignore_ascii_case(name));
        found.and_then(|(_, value)| std::str::from_utf8(value).ok())
    }

    /// All headers.
    #[must_use]
    pub fn headers(&self) -> &[(String, Vec<u8>)] {
        &self.headers
    }

    /// The body.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// The body, owned.
    #[must_use]
    pub fn into_body(self) -> Vec<u8> {
        self.body
    }

    /// The body as text, with replacement characters for what is none.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// It is none, or of another shape.
    pub fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T, TaskError> {
        serde_json::from_slice(&self.body).map_err(|error| {
            TaskError::fatal(format!("the response is not the JSON that was expected: {error}"))
        })
    }

    /// This response, if its status says that all went well.
    ///
    /// # Errors
    /// Retryable for 408, 425, 429 and 5xx, with the server's `Retry-After` if it is in seconds; otherwise fatal.
    pub fn success(self) -> Result<Self, TaskError> {
        let message = format!("the server answered with status {}", self.status);
        match self.status {
            200..=299 => Ok(self),
            408 | 425 | 429 | 500..=599 => {
                let error = TaskError::retryable(message);
                let after = self.header("retry-after").and_then(|seconds| seconds.parse().ok());
                Err(match after {
                    Some(seconds) => error.retry_after(Duration::from_secs(seconds)),
                    None => error,
                })
            }
            _ => Err(TaskError::fatal(message)),
        }
    }
}

/// No response. As a [`TaskError`] it is retryable where another attempt may fare better.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    code: String,
}

impl Error {
    /// With a code of `wasi:http`, for tests.
    #[must_use]
    pub fn new(code: impl Into<String>) -> Self {
        Self { code: code.into() }
    }

    /// The code in the words of `wasi:http`, such as `HTTP-request-denied`, which says that the task has no grant.
    #[must_use]
    pub fn code(&self) -> &str {
        &self.code
    }

    /// Whether the same request may succeed another time.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        !matches!(
            self.code.as_str(),
            "HTTP-request-denied"
                | "destination-IP-prohibited"
                | "HTTP-request-method-invalid"
                | "HTTP-request-URI-invalid"
                | "HTTP-request-URI-too-long"
                | "HTTP-request-header-section-size"
                | "HTTP-request-body-size"
                | "HTTP-response-header-section-size"
                | "HTTP-response-body-size"
                | "TLS-certificate-error"
        )
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the HTTP request failed: {}", self.code)
    }
}

// Not a `std::error::Error`: as one it would become a retryable `TaskError` whatever it is.
impl From<Error> for TaskError {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        if error.is_retryable() { Self::retryable(message) } else { Self::fatal(message) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn urls_fall_into_scheme_authority_and_path() {
        for (url, parts) in [
            ("https://a.b/c?d#e", (true, "a.b", "/c?d")),
            ("http://a.b:80?d", (false, "a.b:80", "?d")),
            ("http://[::1]:80", (false, "[::1]:80", "")),
        ] {
            assert_eq!(get(url).parts().unwrap(), parts);
        }
        for url in ["", "a.b", "ftp://a", "https:///x", "https://#a"] {
            assert!(get(url).parts().is_err(), "{url}");
        }
    }

    #[test]
    fn statuses_say_whether_to_try_again() {
        assert!(Response::new(204).success().is_ok());
        assert!(!Response::new(404).success().unwrap_err().is_retryable());
        let busy = Response::new(429).with_header("Retry-After", "7").success().unwrap_err();
        assert_eq!((busy.is_retryable(), busy.delay()), (true, Some(Duration::from_secs(7))));
        assert!(TaskError::from(Error::new("connection-timeout")).is_retryable());
        assert!(!TaskError::from(Error::new("HTTP-request-denied")).is_retryable());
    }

    #[test]
    fn without_somebody_who_answers_a_native_request_is_denied() {
        assert_eq!(get("https://a.b").send().unwrap_err().code(), "HTTP-request-denied");
        {
            let _answers = answer(|_| Ok(Response::new(200).with_body("12345")));
            assert_eq!(get("https://a.b").send().unwrap().text(), "12345");
            assert_eq!(get("https://a.b").max_bytes(4).send().unwrap_err().code(), "HTTP-response-body-size");
        }
        assert!(get("https://a.b").send().is_err());
    }
}
