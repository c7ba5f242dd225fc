//! Delivers an event to a URL: what most background work outside a database comes down to. Shows requests to granted
//! hosts, what is worth another attempt, and a key by which the receiver knows a delivery that it has had.

use sandbar_guest::{Context, Schema, TaskError, http, log, task};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What to deliver, and where.
#[derive(Deserialize, Schema)]
#[serde(deny_unknown_fields)]
struct Input {
    /// Where. The task needs a grant for its host.
    url: String,
    /// What it is, such as `order.paid`.
    event: String,
    /// The event itself.
    data: Value,
}

/// A delivery.
#[derive(Serialize, Schema, Debug, PartialEq)]
struct Delivered {
    /// The receiver's status.
    status: u16,
    /// The beginning of what it answered.
    answer: String,
}

/// Characters of an answer that are kept.
const KEPT: usize = 1_000;

/// Delivers an event by `POST`, as JSON.
///
/// A receiver that is busy or down is tried again; one that does not want the event is not.
#[task(retry(max_attempts = 8, initial = "1s", max = "10m"))]
fn webhook(ctx: &Context, input: Input) -> Result<Delivered, TaskError> {
    let answer = http::post(&input.url)
        .header("x-event", &input.event)
        // The same in every attempt: whoever was given the event by an attempt that then broke off can tell.
        .header("idempotency-key", ctx.invocation_id())
        .json(&input.data)?
        .max_bytes(1 << 20)
        .send()?
        .success()?;
    log::info!(status = answer.status(), attempt = ctx.attempt(); "delivered");
    Ok(Delivered { status: answer.status(), answer: answer.text().chars().take(KEPT).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deliver(answer: Result<http::Response, http::Error>) -> Result<Delivered, TaskError> {
        let _answers = http::answer(move |request| {
            assert_eq!((request.method(), request.url()), ("POST", "https://shop.example/hook"));
            assert_eq!(request.body_bytes(), br#"{"order":7}"#);
            answer.clone()
        });
        let input = r#"{"url": "https://shop.example/hook", "event": "order.paid", "data": {"order": 7}}"#;
        webhook(&Context::test().build(), serde_json::from_str(input).unwrap())
    }

    #[test]
    fn a_delivery_says_what_the_receiver_answered() {
        let delivered = deliver(Ok(http::Response::new(202).with_body("thanks"))).unwrap();
        assert_eq!(delivered, Delivered { status: 202, answer: "thanks".to_owned() });
    }

    #[test]
    fn who_is_busy_is_tried_again_and_who_refuses_is_not() {
        assert!(deliver(Ok(http::Response::new(503))).unwrap_err().is_retryable());
        assert!(deliver(Err(http::Error::new("connection-refused"))).unwrap_err().is_retryable());
        assert!(!deliver(Ok(http::Response::new(410))).unwrap_err().is_retryable());
        assert!(!deliver(Err(http::Error::new("HTTP-request-denied"))).unwrap_err().is_retryable());
    }
}
