//! What a worker may do under its lease: how long it holds after a heartbeat, and how much more may be taken on.
//! Owns the arithmetic; the caller brings the clock.

use std::time::Duration;

/// The part of the silence after which a worker is declared dead that it keeps clear of: it stops that much earlier.
const MARGIN: u32 = 6;
/// Ends that may wait for their ack, per slot, before nothing more is claimed.
const MAX_UNACKED_PER_SLOT: u64 = 4;

/// How long guests may run on the last answered heartbeat, counted from when it was *sent*: the database received it
/// later, so it declares us dead later than we stop, whatever the network did in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity(Duration);

impl Validity {
    /// Of workers that are declared dead after so long a silence.
    #[must_use]
    pub fn of(dead_after: Duration) -> Self {
        Self(dead_after - dead_after / MARGIN)
    }

    /// May guests run? Both times in nanoseconds on a clock that runs through suspension.
    #[must_use]
    pub fn holds(self, sent_ns: u64, now_ns: u64) -> bool {
        u128::from(now_ns.saturating_sub(sent_ns)) < self.0.as_nanos()
    }
}

/// Attempts that a claim could start now. Ends that wait for their ack count too, once there are many: a database that
/// cannot keep up must not gather them in the worker.
#[must_use]
pub fn free_slots(slots: u32, in_flight: usize, unacked: u64) -> u32 {
    if unacked > u64::from(slots) * MAX_UNACKED_PER_SLOT {
        return 0;
    }
    slots.saturating_sub(u32::try_from(in_flight).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_lease_ends_by_our_clock_before_anybody_may_declare_us_dead(
            dead_ms in 300u64..600_000, sent in 0u64..1 << 60, way_ns in 0u64..1 << 40, age in 0u64..1 << 41,
        ) {
            let dead = Duration::from_millis(dead_ms);
            // The database received it later than we sent it, and waits from then on.
            let declared_dead = u128::from(sent + way_ns) + dead.as_nanos();
            if Validity::of(dead).holds(sent, sent + age) {
                prop_assert!(u128::from(sent + age) < declared_dead);
            }
        }

        #[test]
        fn slots_and_work_in_flight_never_exceed_the_worker(slots in 1u32..4096, in_flight in 0usize..5000, unacked in 0u64..20_000) {
            let free = free_slots(slots, in_flight, unacked);
            prop_assert!(free as usize + in_flight <= (slots as usize).max(in_flight));
        }
    }
}
