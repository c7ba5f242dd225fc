//! The world `sandbar:task/task`, generated from the one WIT file, and this host's side of it:
//! context and log. Owns no state of its own; everything lives in [`crate::state::Host`].

use std::time::Instant;

use crate::control::Progress;
use crate::outcome::LogLevel;
use crate::output::{clean, lock};
use crate::state::Host;

mod generated {
    #![allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
    wasmtime::component::bindgen!({
        path: "../guest-sdk/wit",
        world: "task",
        exports: { default: async },
    });
}

pub(crate) use generated::sandbar::task::types::{Failure, FailureKind};
pub(crate) use generated::{Task, TaskPre};

use generated::sandbar::task::{context, log, types};

/// Bytes of a progress message, as the WIT says.
const MAX_PROGRESS_MESSAGE: usize = 1024;

impl types::Host for Host {}

impl context::Host for Host {
    fn get(&mut self) -> context::Info {
        self.common.calls += 1;
        context::Info {
            invocation_id: self.context.invocation_id.clone(),
            task: self.context.task.clone(),
            attempt: self.context.attempt,
            max_attempts: self.context.max_attempts,
            timeout_ms: self.timeout_ms,
            tags: self.context.tags.clone(),
        }
    }

    fn remaining_ms(&mut self) -> u64 {
        self.common.calls += 1;
        let left = self.deadline.saturating_duration_since(Instant::now());
        u64::try_from(left.as_millis()).unwrap_or(u64::MAX)
    }

    fn cancelled(&mut self) -> bool {
        self.common.calls += 1;
        self.common.control.watch_cancel()
    }

    fn progress(&mut self, done: u64, total: u64, message: String) {
        self.common.calls += 1;
        let (message, _) = clean(message.as_bytes(), MAX_PROGRESS_MESSAGE);
        let first = self.common.control.set_progress(Progress { done, total, message: message.into_owned() });
        if first && let Some(sink) = &self.progress {
            sink.progress(&self.common.control);
        }
    }
}

impl log::Host for Host {
    fn emit(&mut self, level: log::Level, target: String, message: String, fields: Vec<(String, String)>) {
        self.common.calls += 1;
        let level = match level {
            log::Level::Trace => LogLevel::Trace,
            log::Level::Debug => LogLevel::Debug,
            log::Level::Info => LogLevel::Info,
            log::Level::Warn => LogLevel::Warn,
            log::Level::Error => LogLevel::Error,
        };
        lock(&self.common.capture).record(level, &target, &message, &fields);
    }
}
