//! The smallest task: what benches measure when they measure everything but the guest.

/// Returns its input.
#[sandbar_guest::task]
fn echo(input: serde_json::Value) -> serde_json::Value {
    input
}
