//! Log lines: where they go and how they look.
//!
//! Everything is written to standard error, so that standard output stays for data. This module never decides
//! what is logged: `log.filter` does.

use std::io::IsTerminal as _;
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `log.filter` is not a filter.
    #[error("log.filter {filter:?}: {source}")]
    Filter {
        /// The text as configured.
        filter: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// Logging was set up before in this process.
    #[error("logging is set up already: {0}")]
    Twice(Box<dyn std::error::Error + Send + Sync>),
}

/// Sets what is logged from now on.
type Setter = Box<dyn Fn(EnvFilter) -> bool + Send + Sync>;

/// Set once, by [`init`].
static SETTER: OnceLock<Setter> = OnceLock::new();

fn filter(log: &Log) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::try_new(&log.filter)
        .map_err(|source| TelemetryError::Filter { filter: log.filter.clone(), source })
}

/// Whether this could be logged.
///
/// # Errors
/// When the filter cannot be parsed.
pub fn check(log: &Log) -> Result<(), TelemetryError> {
    filter(log).map(drop)
}

/// Logs by another filter from now on; the form of the lines stays.
///
/// # Errors
/// When the filter cannot be parsed; then nothing changes.
pub fn set_filter(log: &Log) -> Result<(), TelemetryError> {
    let filter = filter(log)?;
    if let Some(set) = SETTER.get() {
        set(filter);
    }
    Ok(())
}

/// Starts logging for this process. Call it once, before anything else logs.
///
/// # Errors
/// When the filter cannot be parsed, or when it was called before.
pub fn init(log: &Log) -> Result<(), TelemetryError> {
    let builder = tracing_subscriber::fmt().with_env_filter(filter(log)?).with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => {
            let builder = builder.with_ansi(std::io::stderr().is_terminal()).with_filter_reloading();
            let handle = builder.reload_handle();
            let _ = SETTER.set(Box::new(move |filter| handle.reload(filter).is_ok()));
            builder.try_init()
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_ansi(false).with_filter_reloading();
            let handle = builder.reload_handle();
            let _ = SETTER.set(Box::new(move |filter| handle.reload(filter).is_ok()));
            builder.try_init()
        }
    }
    .map_err(TelemetryError::Twice)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::{Log, LogFormat, TelemetryError, init};

    #[test]
    fn a_bad_filter_is_refused_with_its_text() {
        let log = Log { format: LogFormat::Json, filter: "sandbar=loud".to_owned() };
        let error = init(&log).unwrap_err();
        assert!(matches!(error, TelemetryError::Filter { .. }));
        assert!(error.to_string().contains("sandbar=loud"));
    }
}
