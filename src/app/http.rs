//! Tasks without a module: what a version of the kind `http` says, checked, and the request that it becomes. Owns the
//! form that is stored in place of a module's bytes. Sends nothing, and knows no grant.

use std::ops::RangeInclusive;

use bytes::Bytes;
use sandbar_host::egress::call::{Headers, Request};
use sandbar_host::egress::client::{self, forbidden};
use sandbar_host::egress::grant::{Destination, Scheme};
use sandbar_host::egress::placeholder;

use crate::app::FieldError;
use crate::wire::task::{Definition, Expected, HttpTask as Said};

/// Bytes of a description.
const MAX_DESCRIPTION: usize = 4 << 10;
/// Bytes of a method.
const MAX_METHOD: usize = 16;
/// Bytes of a body's text.
const MAX_BODY: usize = 64 << 10;
/// Headers: room is left for those that are added.
const MAX_HEADERS: usize = 90;
/// Entries of `expect`.
const MAX_EXPECTED: usize = 16;
/// Milliseconds, as for an attempt.
const MAX_TIMEOUT_MS: u64 = 3_600_000;
/// Statuses that can be expected.
const STATUSES: RangeInclusive<u16> = 200..=599;
/// Where a body takes the input in.
const INPUT: &str = "{{input}}";
/// Methods that change nothing by what they mean: nobody needs to know them again.
const SAFE: [&str; 4] = ["GET", "HEAD", "OPTIONS", "TRACE"];

/// A request that can be made.
#[derive(Debug)]
pub struct HttpTask {
    method: String,
    to: Destination,
    path: String,
    /// Names in lower case.
    headers: Headers,
    body: Option<String>,
    expected: Vec<RangeInclusive<u16>>,
    timeout_ms: Option<u64>,
}

impl HttpTask {
    /// Check what somebody wrote.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place in [`Definition`].
    pub fn check(said: Said) -> Result<Self, FieldError> {
        let wrong = |field: &str, detail: &str| FieldError::new(format!("/http/{field}"), detail);
        if said.description.as_ref().is_some_and(|text| text.len() > MAX_DESCRIPTION || text.contains('\0')) {
            return Err(wrong("description", "may have at most 4096 bytes, and no NUL"));
        }
        let plain = |b: u8| b.is_ascii_uppercase() || b == b'-';
        if !(1..=MAX_METHOD).contains(&said.method.len()) || !said.method.bytes().all(plain) {
            return Err(wrong("method", "must be a method in capitals, like POST"));
        }
        let (to, path) = split(&said.url).map_err(|detail| wrong("url", &detail))?;
        if said.headers.len() > MAX_HEADERS {
            return Err(wrong("headers", "may be at most 90"));
        }
        let mut headers: Headers = Vec::with_capacity(said.headers.len());
        for (name, value) in said.headers {
            let at = || format!("headers/{}", name.replace('~', "~0").replace('/', "~1"));
            let lower = name.to_ascii_lowercase();
            if forbidden(&lower) || lower == "content-length" {
                return Err(wrong(&at(), "is the connection's own, and cannot be set"));
            }
            if headers.iter().any(|(known, _)| *known == lower) {
                return Err(wrong(&at(), "is there in another spelling, too"));
            }
            let one = Request { headers: vec![(lower, value.into_bytes())], ..request("GET", &to, "/") };
            if let Err(refusal) = client::check(&one).and(placeholder::wanted(&one).map(drop)) {
                return Err(wrong(&at(), &refusal.message));
            }
            headers.extend(one.headers);
        }
        if let Some(body) = &said.body {
            if body.len() > MAX_BODY {
                return Err(wrong("body", "may have at most 65536 bytes"));
            }
            if body.matches(INPUT).count() > 1 {
                return Err(wrong("body", "may say {{input}} once"));
            }
        }
        if said.expect.len() > MAX_EXPECTED {
            return Err(wrong("expect", "may have at most 16 entries"));
        }
        let mut expected = Vec::with_capacity(said.expect.len().max(1));
        for (place, one) in said.expect.iter().enumerate() {
            let range = match one {
                Expected::One(status) => Some(*status..=*status),
                Expected::Some(text) => range(text),
            };
            let range = range.filter(|r| {
                r.start() <= r.end() && STATUSES.contains(r.start()) && STATUSES.contains(r.end())
            });
            expected.push(range.ok_or_else(|| {
                wrong(
                    &format!("expect/{place}"),
                    "must be a status from 200 to 599, or like `2xx` or `200-204`",
                )
            })?);
        }
        if expected.is_empty() {
            expected.push(200..=299);
        }
        if said.timeout_ms.is_some_and(|ms| !(1..=MAX_TIMEOUT_MS).contains(&ms)) {
            return Err(wrong("timeout_ms", "must be from 1 to 3600000"));
        }
        let whole = Request { headers: headers.clone(), ..request(&said.method, &to, &path) };
        client::check(&whole).map_err(|refusal| wrong("", &refusal.message))?;
        placeholder::wanted(&whole).map_err(|refusal| wrong("headers", &refusal.message))?;
        Ok(Self {
            method: said.method,
            to,
            path,
            headers,
            body: said.body,
            expected,
            timeout_ms: said.timeout_ms,
        })
    }

    /// What is stored, which is the same for the same request.
    ///
    /// # Errors
    /// It cannot be written as JSON, which it was read from.
    pub fn stored(said: &Said) -> serde_json::Result<Bytes> {
        serde_json::to_vec(&Definition { http: said.clone() }).map(Bytes::from)
    }

    /// What was stored.
    ///
    /// # Errors
    /// It was not written by [`HttpTask::stored`], or by a newer version of this program.
    pub fn read(stored: &[u8]) -> Result<Self, FieldError> {
        let definition: Definition =
            serde_json::from_slice(stored).map_err(|error| FieldError::new("", error.to_string()))?;
        Self::check(definition.http)
    }

    /// The request for an invocation with this id and input, and its body.
    #[must_use]
    pub fn request(&self, invocation: &str, input: Vec<u8>) -> (Request, Bytes) {
        let body = match self.body.as_ref().map(|body| (body, body.split_once(INPUT))) {
            None => input,
            Some((body, None)) => body.clone().into_bytes(),
            Some((_, Some((before, after)))) => [before.as_bytes(), &input, after.as_bytes()].concat(),
        };
        let mut headers = self.headers.clone();
        let mut default = |name: &str, value: &str| {
            if !headers.iter().any(|(known, _)| known == name) {
                headers.push((name.to_owned(), value.as_bytes().to_vec()));
            }
        };
        if !SAFE.contains(&self.method.as_str()) {
            default("idempotency-key", invocation);
        }
        if !body.is_empty() {
            default("content-type", "application/json");
            // Known beforehand, so it need not be sent in chunks, which some receivers of hooks do not take.
            headers.push(("content-length".to_owned(), body.len().to_string().into_bytes()));
        }
        let mut request =
            Request { headers, body: !body.is_empty(), ..request(&self.method, &self.to, &self.path) };
        request.first_byte_ms = self.timeout_ms;
        (request, Bytes::from(body))
    }

    /// Whether this status is success.
    #[must_use]
    pub fn expects(&self, status: u16) -> bool {
        self.expected.iter().any(|range| range.contains(&status))
    }

    /// Milliseconds until the answer must be complete.
    #[must_use]
    pub fn timeout_ms(&self) -> Option<u64> {
        self.timeout_ms
    }

    /// Its method.
    #[must_use]
    pub fn method(&self) -> &str {
        &self.method
    }

    /// To whom it goes. Logs say this and not the path, which may say more than is meant for them.
    #[must_use]
    pub fn to(&self) -> &Destination {
        &self.to
    }
}

fn request(method: &str, to: &Destination, path: &str) -> Request {
    Request {
        method: method.to_owned(),
        scheme: to.scheme,
        authority: to.authority(),
        path: path.to_owned(),
        headers: Vec::new(),
        body: false,
        connect_ms: None,
        first_byte_ms: None,
        between_bytes_ms: None,
    }
}

/// Destination, and path with query.
fn split(url: &str) -> Result<(Destination, String), String> {
    let (scheme, rest) = match (url.strip_prefix("https://"), url.strip_prefix("http://")) {
        (Some(rest), _) => (Scheme::Https, rest),
        (_, Some(rest)) => (Scheme::Http, rest),
        _ => return Err("must begin with http:// or https://".to_owned()),
    };
    if rest.contains('#') {
        return Err("may have no fragment: nobody would send it".to_owned());
    }
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let to = Destination::parse(scheme, authority).map_err(|error| error.to_string())?;
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    client::check(&request("GET", &to, &path)).map_err(|refusal| refusal.message)?;
    Ok((to, path))
}

fn range(text: &str) -> Option<RangeInclusive<u16>> {
    let number = |text: &str| (text.len() == 3).then(|| text.parse::<u16>().ok()).flatten();
    if let Some(hundreds) = text.strip_suffix("xx") {
        let hundreds: u16 = hundreds.parse().ok().filter(|digit| *digit < 10)?;
        return Some(hundreds * 100..=hundreds * 100 + 99);
    }
    match text.split_once('-') {
        Some((from, to)) => Some(number(from)?..=number(to)?),
        None => number(text).map(|status| status..=status),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use serde_json::{Value, json};

    fn said(value: Value) -> Said {
        serde_json::from_value(value).unwrap()
    }

    fn task(value: Value) -> HttpTask {
        HttpTask::check(said(value)).unwrap()
    }

    fn header<'a>(request: &'a Request, name: &str) -> Option<&'a str> {
        let found = request.headers.iter().find(|(known, _)| known == name)?;
        Some(std::str::from_utf8(&found.1).unwrap())
    }

    #[test]
    fn the_input_is_the_body_or_stands_where_the_body_says_and_headers_win_over_what_is_added() {
        let plain = task(json!({"method": "POST", "url": "https://API.example.com?x=1"}));
        let (request, body) = plain.request("id", b"{}".to_vec());
        assert_eq!((request.authority.as_str(), request.path.as_str()), ("api.example.com", "/?x=1"));
        assert_eq!((body.as_ref(), request.body), (&b"{}"[..], true));
        assert_eq!(header(&request, "content-type"), Some("application/json"));
        assert_eq!(header(&request, "content-length"), Some("2"));
        assert_eq!(header(&request, "idempotency-key"), Some("id"));

        let get = task(json!({"method": "GET", "url": "http://a.example:8080/p"}));
        let (request, body) = get.request("id", Vec::new());
        assert!(!request.body && body.is_empty() && request.headers.is_empty(), "{request:?}");
        assert_eq!(request.authority, "a.example:8080");

        let hook = json!({
            "method": "PUT", "url": "https://a.example", "body": "<{{input}}>",
            "headers": {"Content-Type": "text/plain", "Idempotency-Key": "mine"}, "timeout_ms": 5,
        });
        let (request, body) = task(hook).request("id", b"{{input}}".to_vec());
        assert_eq!(body, &b"<{{input}}>"[..], "an input is not looked at again");
        assert_eq!(header(&request, "content-type"), Some("text/plain"));
        assert_eq!(header(&request, "idempotency-key"), Some("mine"));
        assert_eq!(request.first_byte_ms, Some(5));
    }

    #[test]
    fn statuses_are_single_ones_ranges_and_hundreds() {
        let task =
            task(json!({"method": "GET", "url": "https://a.example", "expect": [204, "3xx", "410-412"]}));
        for (status, expected) in
            [(200, false), (204, true), (300, true), (399, true), (409, false), (412, true)]
        {
            assert_eq!(task.expects(status), expected, "{status}");
        }
    }

    #[test]
    fn what_could_never_be_sent_is_refused_where_it_stands() {
        let with = |field: &str, value: Value| {
            let mut whole = json!({"method": "POST", "url": "https://a.example/"});
            whole[field] = value;
            HttpTask::check(said(whole)).map_err(|error| error.pointer)
        };
        let bad = |field: &str, value: Value| with(field, value).unwrap_err();
        for url in [
            "ftp://a.example",
            "a.example",
            "https://",
            "https://u:p@a.example",
            "https://a.example/#x",
            "https://127.1/",
            "https://a.example/a b",
            "https://a.example:0",
            "https://a.example/\r\nx: y",
        ] {
            assert_eq!(bad("url", json!(url)), "/http/url", "{url}");
        }
        for method in ["", "post", "GE T", "AAAAAAAAAAAAAAAAA"] {
            assert_eq!(bad("method", json!(method)), "/http/method", "{method}");
        }
        assert_eq!(bad("method", json!("CONNECT")), "/http/");
        for (name, value) in [
            ("host", "x"),
            ("Content-Length", "1"),
            ("a b", "x"),
            ("x", "a\r\nb: c"),
            ("x", "{{secret:}}"),
            ("x", "{{secret:A"),
            ("transfer-encoding", "chunked"),
        ] {
            assert_eq!(bad("headers", json!({name: value})), format!("/http/headers/{name}"), "{value}");
        }
        assert_eq!(bad("headers", json!({"x-a": "1", "X-A": "2"})), "/http/headers/x-a");
        let secrets: std::collections::BTreeMap<String, &str> =
            (0..9).map(|n| (format!("x-{n}"), "{{secret:A}}")).collect();
        assert_eq!(bad("headers", json!(secrets)), "/http/headers");
        assert_eq!(bad("body", json!("{{input}}{{input}}")), "/http/body");
        assert_eq!(bad("body", json!("x".repeat(65_537))), "/http/body");
        for one in
            [json!(199), json!(600), json!("xx"), json!("1xx"), json!("204-200"), json!("2x"), json!("+20")]
        {
            assert_eq!(bad("expect", json!([200, one])), "/http/expect/1", "{one}");
        }
        assert_eq!(bad("timeout_ms", json!(0)), "/http/timeout_ms");
        assert_eq!(bad("description", json!("a\0")), "/http/description");
        assert!(with("headers", json!({"authorization": "Bearer {{secret:TOKEN}}"})).is_ok());
    }

    #[test]
    fn what_is_stored_is_read_again_and_the_same_for_the_same_request() {
        let one = said(json!({"url": "https://a.example", "method": "GET", "expect": ["2xx", 404]}));
        let stored = HttpTask::stored(&one).unwrap();
        let same =
            said(json!({"expect": ["2xx", 404], "method": "GET", "url": "https://a.example", "body": null}));
        assert_eq!(stored, HttpTask::stored(&same).unwrap());
        assert!(HttpTask::read(&stored).unwrap().expects(404));
        assert!(HttpTask::read(b"\0asm").is_err());
    }
}
