//! What benches of latency and of shares run: the clock at the first instruction, then as much work as asked for.

use std::time::SystemTime;

use sandbar_guest::{Schema, task};
use serde::{Deserialize, Serialize};

/// What is asked for.
#[derive(Deserialize, Schema)]
struct Work {
    /// Turns of a loop that cannot be optimised away.
    #[serde(default)]
    turns: u64,
}

/// When it began.
#[derive(Serialize, Schema)]
struct Began {
    /// Nanoseconds since 1970.
    at_ns: u64,
}

/// Says when it started.
#[task]
fn clock(work: Work) -> Began {
    let now = SystemTime::now();
    let mut x = 1u64;
    for n in 0..work.turns {
        x = std::hint::black_box(x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(n));
    }
    std::hint::black_box(x);
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Began { at_ns: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX) }
}
