//! Clocks and random values that an invocation can fix, so that the same input takes the same course again. Owns what
//! "fixed" means; nothing here is a secret.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use wasmtime_wasi::{HostMonotonicClock, HostWallClock};

/// What every look at a fixed clock moves it on, so that a guest that waits for time to pass does not wait for ever.
const STEP_NS: u64 = 1_000;
/// Random bytes that are made; they repeat after that.
const RANDOM_BYTES: u64 = 16 << 10;

/// A fixed course.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Determinism {
    /// Where the wall clock begins, in nanoseconds since 1970. Each look at a clock moves all of them on by 1 µs.
    pub clock_ns: u64,
    /// What random values are made from.
    pub seed: u64,
}

/// All clocks of one attempt.
#[derive(Debug, Clone)]
pub(crate) struct Clock {
    start_ns: u64,
    passed_ns: Arc<AtomicU64>,
}

impl Determinism {
    pub(crate) fn clock(&self) -> Clock {
        Clock { start_ns: self.clock_ns, passed_ns: Arc::default() }
    }

    /// Random bytes, the same for the same seed; `stream` tells several uses apart.
    pub(crate) fn random(&self, stream: u8) -> Vec<u8> {
        (0..RANDOM_BYTES / 32)
            .flat_map(|block| -> [u8; 32] {
                Sha256::new()
                    .chain_update(self.seed.to_le_bytes())
                    .chain_update([stream])
                    .chain_update(block.to_le_bytes())
                    .finalize()
                    .into()
            })
            .collect()
    }
}

impl Clock {
    fn step(&self) -> u64 {
        self.passed_ns.fetch_add(STEP_NS, Ordering::Relaxed)
    }
}

impl HostWallClock for Clock {
    fn resolution(&self) -> Duration {
        Duration::from_nanos(STEP_NS)
    }

    fn now(&self) -> Duration {
        Duration::from_nanos(self.start_ns.saturating_add(self.step()))
    }
}

impl HostMonotonicClock for Clock {
    fn resolution(&self) -> u64 {
        STEP_NS
    }

    fn now(&self) -> u64 {
        self.step()
    }
}
