//! When to stop asking somebody who does not answer. Owns the decision; the caller brings the clock and does the asking.
//!
//! Closed: every call goes. After [`FAILURES`] failures in a row it opens: calls are refused at once, without a wait and
//! without a place in a queue. After a pause one call goes as a probe; its success closes, its failure opens again for
//! longer. A probe that never reports is given up after [`PROBE`].

use std::time::{Duration, Instant};

/// Failures in a row that open it: one dead connection, or two, is what a pool has after a restart.
pub const FAILURES: u32 = 5;
/// First and longest pause before a probe. The longest is how late a recovery may be noticed.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(1));
/// How long a probe may take before another goes.
const PROBE: Duration = Duration::from_secs(10);

/// The state between calls.
#[derive(Debug, Clone, Copy, Default)]
pub struct Breaker {
    failures: u32,
    /// Open: no call before this, and then one.
    open: Option<Open>,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    since: Instant,
    next: Instant,
    pause: Duration,
}

impl Breaker {
    /// Whether a call may go now. Whoever is let go reports with [`Breaker::note`].
    #[must_use]
    pub fn admit(&mut self, now: Instant) -> bool {
        match &mut self.open {
            None => true,
            Some(open) if now >= open.next => {
                open.next = now + PROBE;
                true
            }
            Some(_) => false,
        }
    }

    /// How a call went. True: this changed whether calls go.
    pub fn note(&mut self, now: Instant, answered: bool) -> bool {
        if answered {
            let was_open = self.open.is_some();
            *self = Self::default();
            return was_open;
        }
        self.failures = self.failures.saturating_add(1);
        match &mut self.open {
            Some(open) => {
                open.pause = (open.pause * 2).min(PAUSE.1);
                open.next = now + open.pause;
                false
            }
            None if self.failures >= FAILURES => {
                self.open = Some(Open { since: now, next: now + PAUSE.0, pause: PAUSE.0 });
                true
            }
            None => false,
        }
    }

    /// How long calls have been refused.
    #[must_use]
    pub fn open_for(&self, now: Instant) -> Duration {
        self.open.map_or(Duration::ZERO, |open| now.saturating_duration_since(open.since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_after_failures_in_a_row_and_a_success_in_between_keeps_it_closed() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        for _ in 0..3 {
            for _ in 1..FAILURES {
                assert!(breaker.admit(now) && !breaker.note(now, false));
            }
            assert!(!breaker.note(now, true));
        }
        for n in 1..=FAILURES {
            assert_eq!(breaker.note(now, false), n == FAILURES);
        }
        assert!(!breaker.admit(now));
        assert_eq!(breaker.open_for(now + PAUSE.0), PAUSE.0);
    }

    #[test]
    fn one_probe_at_a_time_goes_and_its_answer_decides() {
        let mut now = Instant::now();
        let mut breaker = Breaker::default();
        for _ in 0..FAILURES {
            breaker.note(now, false);
        }
        let mut pause = PAUSE.0;
        for _ in 0..6 {
            now += pause;
            assert!(breaker.admit(now), "the probe");
            assert!(!breaker.admit(now), "and nobody else");
            breaker.note(now, false);
            pause = (pause * 2).min(PAUSE.1);
            assert!(!breaker.admit(now + pause - Duration::from_millis(1)));
        }
        now += pause;
        assert!(breaker.admit(now));
        assert!(breaker.note(now, true), "closed again");
        assert!(breaker.admit(now) && breaker.admit(now));
        assert_eq!(breaker.open_for(now), Duration::ZERO);
    }

    #[test]
    fn a_probe_that_never_reports_is_given_up() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        for _ in 0..FAILURES {
            breaker.note(now, false);
        }
        assert!(breaker.admit(now + PAUSE.0));
        assert!(breaker.admit(now + PAUSE.0 + PROBE));
    }
}
