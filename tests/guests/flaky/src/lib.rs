//! Retries: fails as asked until an attempt is reached, and logs every attempt.

use std::time::Duration;

use sandbar_guest::{Context, Schema, TaskError, log, task};
use serde::{Deserialize, Serialize};

/// When to succeed.
#[derive(Deserialize, Schema)]
struct Input {
    /// The first attempt that succeeds.
    succeed_on: u32,
    /// The delay to ask for before the next attempt, in milliseconds; the policy's if absent.
    retry_after_ms: Option<u64>,
}

/// What it took.
#[derive(Serialize, Schema)]
struct Done {
    /// The attempt that succeeded.
    attempt: u32,
    /// How many there might have been.
    max_attempts: u32,
}

/// Fails retryably before the attempt that the input names, then succeeds.
#[task(retry(max_attempts = 5, backoff = "fixed", initial_ms = 10, jitter = 0))]
fn flaky(ctx: &Context, input: Input) -> Result<Done, TaskError> {
    let attempt = ctx.attempt();
    log::info!(attempt; "attempt {attempt} of {}", ctx.max_attempts());
    if attempt < input.succeed_on {
        let error = TaskError::retryable(format!("attempt {attempt} fails as asked"));
        return Err(match input.retry_after_ms {
            Some(delay) => error.retry_after(Duration::from_millis(delay)),
            None => error,
        });
    }
    Ok(Done { attempt, max_attempts: ctx.max_attempts() })
}
