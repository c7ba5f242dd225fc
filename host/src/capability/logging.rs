//! `wasi:logging`: the log of the attempt by another name.

use super::generated::wasi::logging::logging;
use crate::outcome::LogLevel;
use crate::output::lock;
use crate::state::Host;

impl logging::Host for Host {
    async fn log(&mut self, level: logging::Level, context: String, message: String) {
        self.common.calls += 1;
        let critical = matches!(level, logging::Level::Critical);
        let level = match level {
            logging::Level::Trace => LogLevel::Trace,
            logging::Level::Debug => LogLevel::Debug,
            logging::Level::Info => LogLevel::Info,
            logging::Level::Warn => LogLevel::Warn,
            logging::Level::Error | logging::Level::Critical => LogLevel::Error,
        };
        let fields = [("critical".to_owned(), "true".to_owned())];
        let fields = if critical { &fields[..] } else { &[] };
        lock(&self.common.capture).record(level, &context, &message, fields);
    }
}
