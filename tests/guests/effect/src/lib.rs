//! What the fault test counts: one answer per attempt, naming the attempt.

use sandbar_guest::{Context, Schema, task};
use serde::Serialize;

/// Which attempt gave this result.
#[derive(Serialize, Schema)]
struct Effect {
    /// The invocation that was served.
    invocation_id: String,
    /// The number of the attempt.
    attempt: u32,
}

/// Says which attempt of which invocation it served.
#[task]
fn effect(ctx: &Context) -> Effect {
    Effect { invocation_id: ctx.invocation_id().to_owned(), attempt: ctx.attempt() }
}
