//! The component side: bindings to the host, logging, panics, and the way from the export to the
//! task function. Compiled for WebAssembly only; nothing here runs in native tests.

use std::sync::OnceLock;
use std::time::Duration;

use crate::context::{Context, Facts};
use crate::error::TaskError;
use crate::fields::fields;
use crate::payload::Output;

/// Generated from the contract with the host, `wit/task.wit`, and kept, so that a task's build does not
/// build the generator (half of a first build). `ui/tests/bindings.rs` makes it and holds it to the contract.
#[rustfmt::skip]
#[allow(unsafe_code, missing_docs, dead_code, unused, clippy::all, clippy::pedantic)]
#[path = "bindings.rs"]
pub mod bindings;

/// The same for what only some tasks use, from `wit/capabilities.wit`: what a task does not call, its component does not
/// import.
#[cfg(any(feature = "config", feature = "invoke", feature = "kv", feature = "secrets"))]
#[rustfmt::skip]
#[allow(unsafe_code, missing_docs, missing_debug_implementations, dead_code, unused, clippy::all, clippy::pedantic)]
#[path = "capabilities.rs"]
pub mod capabilities;

use bindings::sandbar::task::types::{Failure, FailureKind};
use bindings::sandbar::task::{context as host, log as sink};

/// Serves one call of the export.
///
/// # Errors
/// What the task returned, in the host's terms.
pub fn run(
    input: Vec<u8>,
    level: log::LevelFilter,
    task: fn(&Context, Vec<u8>) -> Result<Output, TaskError>,
) -> Result<bindings::Output, Failure> {
    // A component may be called more than once; only the first call installs.
    if log::set_logger(&Logger).is_ok() {
        log::set_max_level(level);
        #[cfg(feature = "tracing")]
        crate::spans::install(level, emit);
        std::panic::set_hook(Box::new(report_panic));
    }
    let context = Context { facts: OnceLock::new() };
    match task(&context, input) {
        Ok(Output { content_type, bytes }) => Ok(bindings::Output { content_type, bytes }),
        Err(error) => Err(Failure {
            kind: if error.is_retryable() { FailureKind::Retryable } else { FailureKind::Fatal },
            message: error.message().to_owned(),
            retry_after_ms: error.delay().map(milliseconds),
        }),
    }
}

impl Context {
    pub(crate) fn facts(&self) -> &Facts {
        self.facts.get_or_init(|| {
            let info = host::get();
            Facts {
                invocation_id: info.invocation_id,
                task: info.task,
                attempt: info.attempt,
                max_attempts: info.max_attempts,
                timeout: Duration::from_millis(info.timeout_ms),
                tags: info.tags,
            }
        })
    }

    pub(crate) fn host_remaining(&self) -> Duration {
        Duration::from_millis(host::remaining_ms())
    }

    pub(crate) fn host_cancelled(&self) -> bool {
        host::cancelled()
    }

    pub(crate) fn host_progress(&self, done: u64, total: u64, message: &str) {
        host::progress(done, total, message);
    }
}

/// The backend of the `log` crate: every record goes to the host with its key-values.
struct Logger;

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        // The crate's maximum level has decided already; what is too much, the host drops.
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        emit(record.level(), record.target(), &record.args().to_string(), fields(record));
    }

    fn flush(&self) {}
}

/// One record to the host.
#[allow(clippy::needless_pass_by_value)] // The shape that both logging facades share.
fn emit(level: log::Level, target: &str, message: &str, fields: Vec<(String, String)>) {
    let level = match level {
        log::Level::Error => sink::Level::Error,
        log::Level::Warn => sink::Level::Warn,
        log::Level::Info => sink::Level::Info,
        log::Level::Debug => sink::Level::Debug,
        log::Level::Trace => sink::Level::Trace,
    };
    sink::emit(level, target, message, &fields);
}

/// Logs a panic as an error in place of std's text on stderr. The trap follows by itself.
fn report_panic(info: &std::panic::PanicHookInfo<'_>) {
    let payload = info.payload();
    let message = match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text.as_str(),
        _ => "panic with a payload that is not text",
    };
    let mut fields = Vec::new();
    if let Some(location) = info.location() {
        fields.push(("file".to_owned(), location.file().to_owned()));
        fields.push(("line".to_owned(), location.line().to_string()));
    }
    sink::emit(sink::Level::Error, "panic", message, &fields);
}

fn milliseconds(delay: Duration) -> u64 {
    u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)
}
