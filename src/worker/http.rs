//! Attempts of versions that have no module: the worker makes their request itself. Owns their tasks from start to end
//! and what their ends mean; the rules about where a request may go are `egress`'s. No cell takes part.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::OnceLock;
use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt as _;
use rustix::time::{ClockId, clock_gettime};
use sandbar_host::cell::CancelReason;
use sandbar_host::egress::call::{Code, Headers, Refusal};
use sandbar_host::limits::Limits;
use sandbar_host::outcome::{LogLevel, LogRecord, Outcome, Receipt, Termination};
use sandbar_host::recheck::Sent;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::app::http::HttpTask;
use crate::domain::ids::TenantId;
use crate::store::queue::Claimed;
use crate::worker::attempt::host_fault;
use crate::worker::egress::{Fetched, NotSent, Own, Short};

/// Under what the line about a request stands in the log of its attempt, as a guest's refused ones do.
const LOG_TARGET: &str = "sandbar.http";
/// What a record costs of the log limit beyond its text.
const RECORD_OVERHEAD: u64 = 32;
/// What one attempt holds besides its bodies: the connection with its buffers, the head of the answer, the log line.
const FIXED_BYTES: u64 = 256 << 10;
/// What a byte of input costs: as it was claimed, and in the body that goes out.
const INPUT_FACTOR: u64 = 2;

/// Bytes that an attempt makes the worker hold at the most.
pub fn reserved_bytes(limits: &Limits, input: u64) -> u64 {
    FIXED_BYTES.saturating_add(input.saturating_mul(INPUT_FACTOR)).saturating_add(limits.output_bytes)
}

/// The end of one.
#[derive(Debug)]
pub struct Ended {
    /// Which one.
    pub token: u64,
    /// How.
    pub outcome: Box<Outcome>,
}

/// Those under way. Dropping it ends them.
pub struct Http {
    running: HashMap<u64, Running>,
    ends: mpsc::UnboundedSender<Ended>,
}

struct Running {
    cancel: Option<oneshot::Sender<CancelReason>>,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Http {
    /// None under way; and where their ends come out, as many at most as there are slots.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Ended>) {
        let (ends, ended) = mpsc::unbounded_channel();
        (Self { running: HashMap::new(), ends }, ended)
    }

    /// Make the request of an attempt. Its end comes out, whatever happens.
    pub fn start(&mut self, token: u64, claimed: &Claimed, own: Result<Own, Refusal>) {
        let job = Job {
            tenant: claimed.tenant,
            sha256: claimed.sha256,
            invocation: claimed.invocation.to_string(),
            input: claimed.input.clone(),
            limits: claimed.spec.limits,
        };
        let (cancel, cancelled) = oneshot::channel();
        let ends = self.ends.clone();
        let task = tokio::spawn(async move {
            let sent = Sent::under(job.limits, false);
            let run = AssertUnwindSafe(job.run(own, cancelled)).catch_unwind();
            // A panic is our mistake, and must not hold its slot for ever.
            let mut outcome = run.await.unwrap_or_else(|_| host_fault("the worker failed at the request"));
            sent.outcome(&mut outcome);
            // Refused only when the loop has ended.
            let _ = ends.send(Ended { token, outcome: Box::new(outcome) });
        });
        self.running.insert(token, Running { cancel: Some(cancel), task });
    }

    /// End one, if it is there: its end comes out soon. Nothing more is sent.
    pub fn cancel(&mut self, token: u64, reason: CancelReason) -> bool {
        let Some(running) = self.running.get_mut(&token) else { return false };
        if let Some(cancel) = running.cancel.take() {
            // Refused when it is ending anyway.
            let _ = cancel.send(reason);
        }
        true
    }

    /// It has ended.
    pub fn end(&mut self, token: u64) {
        self.running.remove(&token);
    }

    /// Nothing goes on.
    pub fn abandon(&mut self) {
        self.running.clear();
    }
}

/// What a request is made of.
struct Job {
    tenant: TenantId,
    sha256: [u8; 32],
    invocation: String,
    input: Vec<u8>,
    limits: Limits,
}

/// How a request ended.
enum End {
    Answered(Fetched, bool),
    Refused(Refusal),
    Short(Short),
    Fault(String),
}

impl Job {
    async fn run(
        mut self,
        own: Result<Own, Refusal>,
        mut cancelled: oneshot::Receiver<CancelReason>,
    ) -> Outcome {
        let began = Instant::now();
        let limits = self.limits;
        let input_bytes = self.input.len() as u64;
        let whom = OnceLock::new();
        let mut work = Metered { inner: Box::pin(self.work(&own, &whom)), cpu_ns: 0 };
        let deadline = began + Duration::from_millis(limits.timeout_ms);
        let stopped = tokio::select! {
            biased;
            reason = &mut cancelled => Err(match reason {
                Ok(CancelReason::LeaseLost) => Termination::LeaseLost,
                Ok(CancelReason::Cancelled) | Err(_) => Termination::Cancelled,
            }),
            () = tokio::time::sleep_until(deadline) => Err(Termination::Deadline),
            end = &mut work => Ok(end),
        };
        let cpu_ns = work.cpu_ns;
        drop(work);
        let is_held = own.as_ref().is_ok_and(Own::is_held);
        let whom = whom.get().map_or("no request", String::as_str);
        let (termination, fetched, words) = match stopped {
            Err(termination) => {
                let words = format!("{whom}: given up after {} ms", began.elapsed().as_millis());
                (termination, None, words)
            }
            Ok(End::Fault(message)) => (Termination::HostFault { message: message.clone() }, None, message),
            Ok(End::Short(short)) => {
                let words = format!("{whom}: {}", short.refusal().message);
                (if is_held { not_counted(&short) } else { Termination::LeaseLost }, None, words)
            }
            Ok(End::Refused(refusal)) => {
                let words = format!("{whom}: {}", refusal.message);
                (if is_held { refused(&refusal) } else { Termination::LeaseLost }, None, words)
            }
            Ok(End::Answered(fetched, expected)) => {
                let words = format!(
                    "{whom}: {}, {} bytes in {} ms",
                    fetched.status,
                    fetched.body.len() as u64 + fetched.dropped,
                    began.elapsed().as_millis()
                );
                let termination = if expected { Termination::Succeeded } else { unexpected(whom, &fetched) };
                (termination, Some(fetched), words)
            }
        };
        let level = if termination == Termination::Succeeded { LogLevel::Info } else { LogLevel::Warn };
        let line = LogRecord {
            at_us: micros(began),
            level,
            target: LOG_TARGET.to_owned(),
            message: words,
            fields: fetched.iter().map(|f| ("status".to_owned(), f.status.to_string())).collect(),
        };
        let line_bytes = line.target.len()
            + line.message.len()
            + line.fields.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>();
        let fits = line_bytes as u64 + RECORD_OVERHEAD <= limits.log_bytes;
        let (kept, dropped) = if fits { (line_bytes as u64, 0) } else { (0, line_bytes as u64) };
        let (output, content_type, output_dropped) = match fetched {
            Some(fetched) => (fetched.body, content_type(&fetched.headers), fetched.dropped),
            None => (Vec::new(), String::new(), 0),
        };
        Outcome {
            termination,
            receipt: Receipt {
                // Fuel counts what guests execute, and there was none.
                fuel: 0,
                fuel_exact: true,
                cpu_ns,
                wall_ns: u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX),
                peak_memory_bytes: input_bytes.saturating_add(output.len() as u64),
                input_bytes,
                output_bytes: output.len() as u64,
                output_dropped_bytes: output_dropped,
                log_bytes: kept,
                log_dropped_bytes: dropped,
                egress_bytes: 0, // the meter of the attempt knows them
                host_calls: 1,
            },
            output,
            content_type,
            logs: fits.then_some(&line).into_iter().collect(),
            backtrace: Vec::new(),
            artifacts: Vec::new(),
        }
    }

    /// The request itself. `whom` is said as soon as it is known, for who gives up waiting.
    async fn work(&mut self, own: &Result<Own, Refusal>, whom: &OnceLock<String>) -> End {
        let own = match own {
            Ok(own) => own,
            Err(refusal) => return End::Refused(refusal.clone()),
        };
        let task = match own.store().module_bytes(self.tenant, &self.sha256).await {
            Err(error) => return End::Fault(format!("its definition cannot be read now: {error}")),
            Ok(None) => return End::Fault("its definition is not stored".to_owned()),
            Ok(Some(stored)) => match HttpTask::read(&stored) {
                Err(error) => return End::Fault(format!("its definition cannot be read: {}", error.detail)),
                Ok(task) => task,
            },
        };
        let whom = whom.get_or_init(|| format!("{} {}", task.method(), task.to()));
        let (request, body) = task.request(&self.invocation, std::mem::take(&mut self.input));
        let sending = own.send(request, body, self.limits.output_bytes);
        let within = task.timeout_ms().unwrap_or(self.limits.timeout_ms);
        match tokio::time::timeout(Duration::from_millis(within), sending).await {
            Ok(Ok(fetched)) => {
                let expected = task.expects(fetched.status);
                End::Answered(fetched, expected)
            }
            Ok(Err(NotSent::Refused(refusal))) => End::Refused(refusal),
            Ok(Err(NotSent::Short(short))) => End::Short(short),
            Err(_) => {
                let words = format!("{whom} was not complete within {within} ms");
                End::Refused(Refusal::new(Code::HttpResponseTimeout, words))
            }
        }
    }
}

/// What it means that a request was not answered. Denied is what an admin has to change; what a later attempt may find
/// changed is retryable.
fn refused(refusal: &Refusal) -> Termination {
    let message = refusal.message.clone();
    let failed = |retryable| Termination::GuestError {
        retryable,
        message: format!("{}: {message}", kebab(refusal.code)),
        retry_after_ms: None,
    };
    match refusal.code {
        Code::HttpRequestDenied | Code::DestinationIpProhibited => {
            Termination::Denied { capability: format!("http: {message}") }
        }
        Code::HttpRequestBodySize => Termination::QuotaExceeded { quota: "egress.max_sent_bytes".to_owned() },
        Code::HttpResponseBodySize => {
            Termination::QuotaExceeded { quota: "egress.max_received_bytes".to_owned() }
        }
        Code::InternalError => Termination::HostFault { message },
        Code::HttpRequestMethodInvalid
        | Code::HttpRequestUriInvalid
        | Code::HttpRequestUriTooLong
        | Code::HttpRequestHeaderSectionSize => failed(false),
        _ => failed(true),
    }
}

/// What it means that the day's quota of requests or bytes did not let a request through.
fn not_counted(short: &Short) -> Termination {
    match short {
        Short::UsedUp { quota, .. } => Termination::QuotaExceeded { quota: quota.as_str().to_owned() },
        Short::Unknown => Termination::HostFault { message: short.refusal().message },
    }
}

/// An answer with another status than the ones of success. The outside may do better later where the status says so.
fn unexpected(whom: &str, fetched: &Fetched) -> Termination {
    let retryable = matches!(fetched.status, 408 | 425 | 429 | 500..=599);
    let after = header(&fetched.headers, "retry-after").and_then(|text| text.parse::<u64>().ok());
    Termination::GuestError {
        retryable,
        message: format!("unexpected-status: {whom} answered {}", fetched.status),
        retry_after_ms: after.filter(|_| retryable).map(|seconds| seconds.saturating_mul(1_000)),
    }
}

fn header<'a>(headers: &'a Headers, name: &str) -> Option<&'a str> {
    let (_, value) = headers.iter().find(|(known, _)| known == name)?;
    std::str::from_utf8(value).ok().map(str::trim)
}

fn content_type(headers: &Headers) -> String {
    header(headers, "content-type").unwrap_or_default().to_owned()
}

/// `ConnectionRefused` as `connection-refused`.
fn kebab(code: Code) -> String {
    let mut text = String::new();
    for c in format!("{code:?}").chars() {
        if c.is_ascii_uppercase() && !text.is_empty() {
            text.push('-');
        }
        text.push(c.to_ascii_lowercase());
    }
    text
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// A future, and the CPU time of its polls. What the connection does in a task of its own is not in it.
struct Metered<F> {
    inner: Pin<Box<F>>,
    cpu_ns: u64,
}

impl<F: Future> Future for Metered<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut std::task::Context<'_>) -> Poll<F::Output> {
        let began = thread_ns();
        let polled = self.inner.as_mut().poll(context);
        self.cpu_ns = self.cpu_ns.saturating_add(thread_ns().saturating_sub(began));
        polled
    }
}

/// CPU nanoseconds of this thread.
fn thread_ns() -> u64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn what_an_admin_has_to_change_is_denied_and_what_time_may_change_is_retried() {
        let end = |code| refused(&Refusal::new(code, "words"));
        assert_eq!(
            end(Code::HttpRequestDenied),
            Termination::Denied { capability: "http: words".to_owned() }
        );
        assert!(matches!(end(Code::DestinationIpProhibited), Termination::Denied { .. }));
        assert!(matches!(end(Code::InternalError), Termination::HostFault { .. }));
        assert!(matches!(end(Code::HttpResponseBodySize), Termination::QuotaExceeded { .. }));
        let Termination::GuestError { retryable: true, message, .. } = end(Code::TlsCertificateError) else {
            panic!("retryable");
        };
        assert_eq!(message, "tls-certificate-error: words");
    }

    #[test]
    fn a_status_is_retried_where_it_says_so_and_when_it_says() {
        let of = |status: u16, after: &str| {
            let headers = vec![("retry-after".to_owned(), after.as_bytes().to_vec())];
            unexpected("GET https://a.example", &Fetched { status, headers, body: Vec::new(), dropped: 0 })
        };
        let Termination::GuestError { retryable: true, message, retry_after_ms: Some(7_000) } = of(503, "7")
        else {
            panic!("after 7 s");
        };
        assert_eq!(message, "unexpected-status: GET https://a.example answered 503");
        for (status, after) in [(429, "soon"), (500, "")] {
            let end = of(status, after);
            assert!(
                matches!(end, Termination::GuestError { retryable: true, retry_after_ms: None, .. }),
                "{end:?}"
            );
        }
        for status in [204, 302, 404] {
            let end = of(status, "7");
            assert!(
                matches!(end, Termination::GuestError { retryable: false, retry_after_ms: None, .. }),
                "{end:?}"
            );
        }
    }
}
