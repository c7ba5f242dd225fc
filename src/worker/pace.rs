//! When a worker claims next. A signal says that work was committed just now, so it ends any wait but the one after an
//! error; everything else (looks at the queue, polling) has its own time. Never decides what is claimed.

use std::time::Duration;

use tokio::time::Instant;

/// After a database error: the wait before claiming again, whatever is heard.
const AFTER_ERROR: Duration = Duration::from_millis(200);

/// What the loop knows about the next claim.
#[derive(Debug)]
pub struct Pace {
    /// Work was announced since the last claim began.
    heard: bool,
    /// Worth asking from then on without a signal.
    next: Option<Instant>,
    not_before: Instant,
}

impl Pace {
    /// Claim at once: nobody knows what waits.
    pub fn new(now: Instant) -> Self {
        Self { heard: false, next: Some(now), not_before: now }
    }

    /// Somebody says that there is work.
    pub fn hear(&mut self) {
        self.heard = true;
    }

    /// Worth asking from then on, if not before.
    pub fn ask_at(&mut self, at: Instant) {
        self.next = Some(self.next.map_or(at, |next| next.min(at)));
    }

    /// Whether to claim now.
    pub fn is_due(&self, now: Instant) -> bool {
        now >= self.not_before && (self.heard || self.next.is_some_and(|next| now >= next))
    }

    /// A claim begins: what is heard from now on means more.
    pub fn begin(&mut self) {
        self.heard = false;
        self.next = None;
    }

    /// The claim got no answer.
    pub fn failed(&mut self, now: Instant) {
        self.not_before = now + AFTER_ERROR;
        self.ask_at(self.not_before);
    }

    /// When to come back if nothing is heard; `None` when that is now or never. (Now, and yet no claim: there are no
    /// slots, and their release wakes the loop.)
    pub fn wake_at(&self, now: Instant) -> Option<Instant> {
        let at =
            if self.heard { Some(self.not_before) } else { self.next.map(|next| next.max(self.not_before)) };
        at.filter(|at| *at > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAIT: Duration = Duration::from_millis(50);

    #[test]
    fn a_signal_ends_the_wait_for_the_next_look() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        pace.begin();
        pace.ask_at(now + WAIT);
        assert!(!pace.is_due(now));
        assert_eq!(pace.wake_at(now), Some(now + WAIT));
        pace.hear();
        assert!(pace.is_due(now));
    }

    #[test]
    fn a_signal_that_comes_during_a_claim_is_not_lost_and_one_before_it_is_answered_by_it() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        pace.hear();
        pace.begin();
        assert!(!pace.is_due(now));
        pace.hear();
        assert!(pace.is_due(now));
    }

    #[test]
    fn after_an_error_nothing_is_claimed_for_a_while_and_then_without_a_signal() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        pace.begin();
        pace.failed(now);
        pace.hear();
        assert!(!pace.is_due(now));
        assert_eq!(pace.wake_at(now), Some(now + AFTER_ERROR));
        assert!(pace.is_due(now + AFTER_ERROR));
    }

    #[test]
    fn with_nothing_to_do_it_sleeps_until_it_hears_something() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        pace.begin();
        assert!(!pace.is_due(now + Duration::from_hours(1)));
        assert_eq!(pace.wake_at(now), None);
    }
}
