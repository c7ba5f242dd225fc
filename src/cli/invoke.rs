//! `sandbar invoke`: a request to run a task. Owns how the command line becomes a request; waiting is in `wait`.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use chrono::{DateTime, Utc};
use serde_json::value::RawValue;

use super::client::{Client, Request};
use super::failure::{Failure, Outcome};
use super::output::Output;
use super::target::Remote;
use super::value::{self, MAX_INPUT, text_or_file};
use super::wait::WaitArgs;
use crate::domain::names::TaskName;
use crate::wire::invocation::{InvokeRequest, LimitsRequest, RetryRequest};

/// How long the server is asked to wait in the first request. Most tasks have ended by then, and one answer says all;
/// for the others the id must be known soon.
const FIRST_WAIT: Duration = Duration::from_secs(2);

/// Run a task on the server
#[derive(Debug, clap::Args)]
pub struct Invoke {
    /// Name of the task
    #[arg(value_name = "TASK", value_parser = value::task_name)]
    task: TaskName,
    /// Input of a task: JSON, the JSON in a file, or standard input
    #[arg(long, short, value_name = "JSON|@FILE|-")]
    input: Option<String>,
    /// The input is bytes, not JSON
    #[arg(long, requires = "input")]
    raw: bool,
    /// Standard input of a command: a text, a file, or standard input
    #[arg(long, value_name = "TEXT|@FILE|-", conflicts_with = "input")]
    stdin: Option<String>,
    /// Variable of a command's environment; may be repeated
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = value::pair)]
    env: Vec<(String, String)>,
    #[command(flatten)]
    wait: WaitArgs,
    /// Label to find it by; may be repeated
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = value::tag)]
    tag: Vec<(String, String)>,
    /// Version to run [default: the task's current one]
    #[arg(long, value_name = "N")]
    version: Option<i32>,
    /// Higher is served first among the tenant's invocations, -100 to 100
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    priority: Option<i16>,
    /// Start not before so long from now
    #[arg(long, value_name = "DURATION", value_parser = value::duration, conflicts_with = "at")]
    delay: Option<Duration>,
    /// Start not before this time
    #[arg(long, value_name = "TIME", value_parser = value::moment)]
    at: Option<DateTime<Utc>>,
    /// Do not start after this time, or so long from now
    #[arg(long, value_name = "TIME|DURATION", value_parser = value::future)]
    expires: Option<DateTime<Utc>>,
    /// The same key with the same request gives the same invocation [default: a new key]
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    #[command(flatten)]
    limits: LimitArgs,
    /// Attempts at most, the first included
    #[arg(long, value_name = "N", help_heading = "Limits of each attempt")]
    max_attempts: Option<u16>,
    #[command(flatten)]
    remote: Remote,
    /// Arguments of a command
    #[arg(last = true, value_name = "ARGS")]
    args: Vec<String>,
}

/// Limits in place of the task's own.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Limits of each attempt")]
pub struct LimitArgs {
    /// Fuel, like 500M or 20G
    #[arg(long, value_name = "N", value_parser = value::fuel)]
    pub fuel: Option<u64>,
    /// Memory, like 128MiB
    #[arg(long, value_name = "SIZE", value_parser = value::size)]
    pub memory: Option<u64>,
    /// Time, like 30s
    #[arg(long, value_name = "DURATION", value_parser = value::duration)]
    pub timeout: Option<Duration>,
    /// Size of the result, like 4MiB
    #[arg(long, value_name = "SIZE", value_parser = value::size)]
    pub output: Option<u64>,
    /// Size of the log, like 256KiB
    #[arg(long, value_name = "SIZE", value_parser = value::size)]
    pub log: Option<u64>,
}

impl LimitArgs {
    fn request(&self) -> Option<LimitsRequest> {
        let limits = LimitsRequest {
            fuel: self.fuel,
            memory_bytes: self.memory,
            timeout_ms: self.timeout.map(millis),
            output_bytes: self.output,
            log_bytes: self.log,
        };
        let any = limits.fuel.is_some()
            || limits.memory_bytes.is_some()
            || limits.timeout_ms.is_some()
            || limits.output_bytes.is_some()
            || limits.log_bytes.is_some();
        any.then_some(limits)
    }
}

/// Whole milliseconds.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Invoke {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote.json
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.remote.json);
        let body = self.body()?;
        let client = Client::new(&self.remote.connection)?;
        // With a key the request may be sent again when the connection breaks, and still runs once.
        let key = self.idempotency_key.clone().unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        let mut request = Request::post(format!("/v1/tasks/{}/invocations", self.task))
            .json(&body)?
            .header("idempotency-key", &key)?
            .repeatable();
        if let Some(limit) = self.wait.wait() {
            let wait = limit.map_or(FIRST_WAIT, |limit| limit.min(FIRST_WAIT));
            if wait >= Duration::from_secs(1) {
                request = request.wait(wait)?;
            }
        }
        let answer = client.send(request).await?;
        if answer.header("idempotency-replayed") == Some("true") {
            output.note("this key was used before: this is the invocation it made");
        }
        self.wait.conclude(&client, output, answer).await
    }

    fn body(&self) -> Result<InvokeRequest, Failure> {
        let mut body = InvokeRequest {
            version: self.version,
            priority: self.priority,
            run_at: self.at,
            delay_ms: self.delay.map(millis),
            expires_at: self.expires,
            tags: self.tag.iter().cloned().collect(),
            limits: self.limits.request(),
            retry: self
                .max_attempts
                .map(|n| RetryRequest { max_attempts: Some(n), ..RetryRequest::default() }),
            ..InvokeRequest::default()
        };
        if let Some(input) = &self.input {
            let bytes = text_or_file(input, MAX_INPUT)?;
            if self.raw {
                body.input_base64 = Some(base64::prelude::BASE64_STANDARD.encode(bytes));
            } else {
                body.input = Some(json(bytes, input)?);
            }
        }
        if let Some(stdin) = &self.stdin {
            match String::from_utf8(text_or_file(stdin, MAX_INPUT)?) {
                Ok(text) => body.stdin = Some(text),
                Err(error) => {
                    body.stdin_base64 = Some(base64::prelude::BASE64_STANDARD.encode(error.as_bytes()));
                }
            }
        }
        if !self.args.is_empty() {
            body.args = Some(self.args.clone());
        }
        if !self.env.is_empty() {
            body.env = Some(self.env.iter().cloned().collect::<BTreeMap<_, _>>());
        }
        Ok(body)
    }
}

/// The input as JSON, byte for byte.
fn json(bytes: Vec<u8>, given: &str) -> Result<Box<RawValue>, Failure> {
    let source = match given {
        "-" => "standard input",
        file if file.starts_with('@') => &file[1..],
        _ => "--input",
    };
    let wrong = |why: String| {
        let text = given.chars().all(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '.' | ',' | '!'));
        let hint = if source == "--input" && text {
            format!("a text needs quotes of its own: --input '\"{given}\"'")
        } else {
            "bytes that are not JSON are sent with --raw".to_owned()
        };
        Failure::usage(format!("{source} is not JSON: {why}")).hint(hint)
    };
    let text = String::from_utf8(bytes).map_err(|_| wrong("it is not UTF-8".to_owned()))?;
    RawValue::from_string(text).map_err(|error| wrong(error.to_string()))
}
