//! Makes HTTP requests, and says what came of them in place of failing.

use std::collections::BTreeMap;

use sandbar_guest::{Schema, http, task};
use serde::{Deserialize, Serialize};
use wasip2::http::outgoing_handler;
use wasip2::http::types::{Fields, OutgoingRequest, Scheme};

/// What to ask for.
#[derive(Deserialize, Schema)]
struct Input {
    /// The method; `GET` if absent.
    method: Option<String>,
    /// Where.
    url: String,
    /// Headers.
    #[serde(default)]
    headers: BTreeMap<String, String>,
    /// A body of so many bytes of `x`.
    #[serde(default)]
    body_bytes: usize,
    /// So many requests at once, of which no body is read: only how many began.
    #[serde(default)]
    at_once: usize,
    /// The same request again after this long, in milliseconds.
    again_after_ms: Option<u64>,
}

/// What came of it.
#[derive(Default, Serialize, Schema)]
struct Output {
    /// The status, if there was an answer.
    status: Option<u16>,
    /// The code, if there was none.
    error: Option<String>,
    /// The code of the second request, if there was one and it failed.
    error_again: Option<String>,
    /// Bytes of the response's body.
    body_bytes: usize,
    /// The body, if it is short.
    body: String,
    /// Requests that began, of those at once.
    began: usize,
}

/// Bytes of a response that are shown.
const SHOWN: usize = 4 << 10;

/// Makes HTTP requests.
#[task(grants(http = ["api.example.com"]))]
fn fetch(input: Input) -> Output {
    if input.at_once > 0 {
        return Output { began: at_once(&input), ..Output::default() };
    }
    let mut output = match send(&input) {
        Ok(response) => Output {
            status: Some(response.status()),
            body_bytes: response.body().len(),
            body: if response.body().len() <= SHOWN { response.text() } else { String::new() },
            ..Output::default()
        },
        Err(error) => Output { error: Some(error.code().to_owned()), ..Output::default() },
    };
    if let Some(wait) = input.again_after_ms {
        std::thread::sleep(std::time::Duration::from_millis(wait));
        output.error_again = send(&input).err().map(|error| error.code().to_owned());
    }
    output
}

fn send(input: &Input) -> Result<http::Response, http::Error> {
    let mut request = http::Request::new(input.method.as_deref().unwrap_or("GET"), &input.url)
        .max_bytes(1 << 30)
        .body(vec![b'x'; input.body_bytes]);
    for (name, value) in &input.headers {
        request = request.header(name, value);
    }
    request.send()
}

/// Begins requests without waiting for any, and says how many the host took.
fn at_once(input: &Input) -> usize {
    let (authority, path) = input.url.trim_start_matches("http://").split_once('/').unwrap();
    let path = format!("/{path}");
    let mut begun = Vec::new();
    for _ in 0..input.at_once {
        let request = OutgoingRequest::new(Fields::new());
        request.set_scheme(Some(&Scheme::Http)).unwrap();
        request.set_authority(Some(authority)).unwrap();
        request.set_path_with_query(Some(path.as_str())).unwrap();
        if let Ok(future) = outgoing_handler::handle(request, None) {
            begun.push(future);
        }
    }
    begun.len()
}
