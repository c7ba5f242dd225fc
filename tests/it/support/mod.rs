//! What integration tests stand on: a real Postgres, the real binary, guests compiled in this run.
//!
//! Nothing here waits by sleeping a fixed time: see [`eventually`]. Nothing outlives the test run, also when it is
//! killed: see [`postgres`].

// A part that today's tests do not use is still part of the harness.
#![allow(dead_code, unused_imports)]

mod guests;
mod http;
mod postgres;
mod process;
mod search;
pub mod wat;

use std::time::{Duration, Instant};

pub use guests::{guest, guest_p1, jaq};
pub use http::{Answer, Client, send};
pub use postgres::{Database, data_dir, database, drop_rules, fresh, own_postgres};
pub use process::{Deployment, Process, kill, lasting_address};
pub use search::{holds, tables_with};

/// The admin key of every server that tests start.
pub const ADMIN_KEY: &str = "sbk_the-key-of-integration-tests";

/// Pause between two looks of [`eventually`].
const POLL: Duration = Duration::from_millis(20);

/// Asks until there is an answer, and returns it.
///
/// # Panics
/// When there is none after `limit`; `what` names what was waited for.
pub async fn eventually<T>(limit: Duration, what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited {limit:?} in vain for {what}");
        tokio::time::sleep(POLL).await;
    }
}
