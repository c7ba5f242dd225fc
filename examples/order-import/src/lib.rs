//! A task that fails and recovers: the first attempts meet a supplier that is down, a later one gets
//! through. Shows attempts, retryable and fatal errors, `Retry-After`, logs, progress, cancellation,
//! and how to make outside effects idempotent.
//!
//! The supplier is made up (a task reaches no network unless it is granted one), so its outage is part
//! of the input.

use std::time::Duration;

use sandbar_guest::{Context, Schema, TaskError, log, task};
use serde::{Deserialize, Serialize};

/// Orders to import.
#[derive(Deserialize, Schema)]
#[serde(deny_unknown_fields)]
struct Input {
    /// The orders.
    orders: Vec<Order>,
    /// How the supplier behaves; well, if absent.
    outage: Option<Outage>,
}

/// An order.
#[derive(Deserialize, Schema)]
#[serde(deny_unknown_fields)]
struct Order {
    /// Its number.
    id: String,
    /// Its price in cents.
    cents: i64,
}

/// A supplier that is down.
#[derive(Deserialize, Schema)]
#[serde(deny_unknown_fields)]
struct Outage {
    /// How many attempts meet it.
    attempts: u32,
    /// How long it asks to be left alone, in milliseconds; the retry policy decides if absent.
    retry_after_ms: Option<u64>,
}

/// What was imported.
#[derive(Serialize, Schema, Debug, PartialEq)]
struct Imported {
    /// How many orders.
    orders: u64,
    /// What they are worth, in cents.
    cents: i64,
    /// The attempt that got through.
    attempt: u32,
    /// The key under which each order was booked: the same in every attempt, so that an order that an
    /// earlier attempt had booked already is not booked twice.
    keys: Vec<String>,
}

/// Imports orders from a supplier that may be down.
///
/// An outage is worth another attempt, an order without a price is not.
#[task(
    limits(memory = "16MiB", timeout = "10s"),
    retry(
        max_attempts = 5,
        backoff = "exponential",
        initial = "200ms",
        factor = 2,
        max = "5s",
        jitter = 0.2
    ),
    log = "debug"
)]
fn order_import(ctx: &Context, input: Input) -> Result<Imported, TaskError> {
    let (attempt, of) = (ctx.attempt(), ctx.max_attempts());
    log::info!(attempt, of; "asking the supplier");
    if let Some(outage) = &input.outage
        && attempt <= outage.attempts
    {
        log::warn!(attempt, status = 503; "the supplier is down");
        let error = TaskError::retryable("the supplier answered 503");
        return Err(match outage.retry_after_ms {
            Some(ms) => error.retry_after(Duration::from_millis(ms)),
            None => error,
        });
    }

    let total = input.orders.len() as u64;
    let mut imported = Imported { orders: 0, cents: 0, attempt, keys: Vec::new() };
    for order in &input.orders {
        if ctx.cancelled() {
            log::warn!(done = imported.orders, total; "stopped on request");
            return Err(TaskError::fatal("cancelled"));
        }
        if order.cents <= 0 {
            return Err(TaskError::fatal(format!("order {} has no price", order.id)));
        }
        imported.keys.push(format!("{}/{}", ctx.invocation_id(), order.id));
        imported.cents += order.cents;
        imported.orders += 1;
        log::debug!(order = order.id.as_str(), cents = order.cents; "booked");
        ctx.progress(imported.orders, total, &order.id);
    }
    log::info!(orders = imported.orders, cents = imported.cents; "imported");
    Ok(imported)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(attempts: u32, retry_after_ms: Option<u64>) -> Input {
        let order = |id: &str, cents| Order { id: id.to_owned(), cents };
        Input {
            orders: vec![order("a", 100), order("b", 250)],
            outage: Some(Outage { attempts, retry_after_ms }),
        }
    }

    #[test]
    fn an_outage_is_retryable_and_passes() {
        let during = Context::test().attempt(2).build();
        let error = order_import(&during, input(2, Some(1_500))).unwrap_err();
        assert!(error.is_retryable());
        assert_eq!(error.delay(), Some(Duration::from_millis(1_500)));

        let after = Context::test().attempt(3).capture_logs().build();
        let imported = order_import(&after, input(2, None)).unwrap();
        assert_eq!((imported.orders, imported.cents, imported.attempt), (2, 350, 3));
        assert_eq!(after.reported_progress().last().unwrap().message, "b");
        assert!(after.captured_logs().iter().any(|record| record.message == "booked"));
    }

    #[test]
    fn an_order_without_a_price_is_fatal() {
        let mut input = input(0, None);
        input.orders[1].cents = 0;
        assert!(!order_import(&Context::test().build(), input).unwrap_err().is_retryable());
    }

    #[test]
    fn a_cancellation_ends_it() {
        let context = Context::test().cancelled().build();
        assert_eq!(order_import(&context, input(0, None)).unwrap_err().message(), "cancelled");
    }

    #[test]
    fn the_key_of_an_order_is_the_same_in_every_attempt() {
        let keys = |attempt| {
            let context = Context::test().invocation_id("one").attempt(attempt).build();
            order_import(&context, input(0, None)).unwrap().keys
        };
        assert_eq!(keys(1), keys(2));
    }
}
