//! Tokens of a quota with a window, as one process holds them: it takes some at a time from the database, where all are
//! counted, and whoever takes one of them may do one thing. Owns when they may be used and when it is time to ask for more;
//! whom to ask, and what is said when nothing is left, are the caller's.

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

/// After a refusal, the database is asked again at the earliest after this time: somebody may have given tokens back.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// What the database granted.
#[derive(Debug, Clone, Copy)]
pub struct Grant {
    /// How many.
    pub granted: u64,
    /// What is used now, by everybody.
    pub used: u64,
    /// When the window began.
    pub window: DateTime<Utc>,
    /// When it ends, in milliseconds from now.
    pub ends_in_ms: u64,
}

/// Tokens of one quota in its present window.
#[derive(Debug, Clone, Default)]
pub struct Window {
    held: u64,
    /// When the window began, and until when its tokens may be used here. `None` before the first answer.
    of: Option<(DateTime<Utc>, Instant)>,
    /// What was used by everybody, when last heard.
    used: u64,
    /// There was nothing left of this limit; not to be asked before.
    dry: Option<(u64, Instant)>,
}

/// What comes of taking tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// They are of the window that began then.
    Yes(DateTime<Utc>),
    /// The quota is used up, as far as is known.
    No,
    /// The database must say: so many are to be asked for.
    Ask(u64),
}

impl Window {
    /// Take `n` tokens of a quota with this limit, all or none. What is asked for, if need be, is some more than needed (a
    /// fiftieth of the quota and at most `ahead`), so that not everything asks, and few enough that others get theirs.
    pub fn take(&mut self, n: u64, limit: u64, ahead: u64, now: Instant) -> Taken {
        /// One process takes at most this part of a quota ahead.
        const PART: u64 = 50;
        if let Some((began, _)) = self.of.filter(|(_, ends)| now < *ends) {
            if self.held >= n {
                self.held -= n;
                return Taken::Yes(began);
            }
            if self.dry.is_some_and(|(of, until)| of == limit && now < until) {
                return Taken::No;
            }
        } else {
            // A window that is over has taken its tokens with it.
            self.held = 0;
        }
        Taken::Ask(n.saturating_sub(self.held).max((limit / PART).min(ahead)).min(limit.max(n)))
    }

    /// Take `n` tokens out of what was granted at `asked`; when their window began, unless it was too little.
    pub fn granted(&mut self, grant: &Grant, n: u64, limit: u64, asked: Instant) -> Option<DateTime<Utc>> {
        if self.began() != Some(grant.window) {
            self.held = 0;
        }
        let ends = asked + Duration::from_millis(grant.ends_in_ms);
        (self.of, self.used, self.dry) = (Some((grant.window, ends)), grant.used, None);
        self.held = self.held.saturating_add(grant.granted);
        if self.held >= n {
            self.held -= n;
            return Some(grant.window);
        }
        self.dry = Some((limit, ends.min(asked + ASK_AGAIN)));
        None
    }

    /// Put back `n` that were taken from the window that began then, and not used.
    pub fn put_back(&mut self, n: u64, began: DateTime<Utc>) {
        if self.began() == Some(began) {
            self.held = self.held.saturating_add(n);
        }
    }

    /// When the window began.
    #[must_use]
    pub fn began(&self) -> Option<DateTime<Utc>> {
        self.of.map(|(began, _)| began)
    }

    /// Whether the window is over, or none has been heard of.
    #[must_use]
    pub fn is_over(&self, now: Instant) -> bool {
        self.of.is_none_or(|(_, ends)| now >= ends)
    }

    /// What everybody has used of the quota, when last heard.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used
    }

    /// What is held and not used, and of which window: to be given back by a process that stops.
    #[must_use]
    pub fn left(&self) -> Option<(u64, DateTime<Utc>)> {
        (self.held > 0).then_some(self.held).zip(self.began())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    const WINDOW: Duration = Duration::from_secs(60);

    /// Postgres as `take_quota` is: one row, which a new window begins anew.
    #[derive(Debug)]
    struct Row {
        window: u32,
        used: u64,
        limit: u64,
    }

    impl Row {
        fn began(&self) -> DateTime<Utc> {
            DateTime::UNIX_EPOCH + WINDOW * self.window
        }

        fn grant(&mut self, wanted: u64) -> Grant {
            let granted = wanted.min(self.limit.saturating_sub(self.used));
            self.used += granted;
            let ends_in_ms = u64::try_from(WINDOW.as_millis()).unwrap();
            Grant { granted, used: self.used, window: self.began(), ends_in_ms }
        }
    }

    proptest! {
        /// Some servers take, use, put back and stop, in any order, while windows come and go.
        #[test]
        fn no_window_is_passed_and_what_is_put_back_can_be_used(
            limit in 1u64..500,
            ahead in 1u64..20,
            steps in prop::collection::vec((0usize..3, 0u8..21, 1u64..20), 1..200),
        ) {
            let mut row = Row { window: 0, used: 0, limit };
            let mut servers: [Window; 3] = Default::default();
            let mut accepted = 0;
            // What is under way, with the windows that it is of.
            let mut in_flight: [Vec<(u64, DateTime<Utc>)>; 3] = Default::default();
            let mut now = Instant::now();
            for (at, step, n) in steps {
                let server = &mut servers[at];
                match step {
                    // A request of n.
                    0..=9 => {
                        let taken = match server.take(n, limit, ahead, now) {
                            Taken::Yes(began) => Some(began),
                            Taken::No => None,
                            Taken::Ask(wanted) => {
                                let grant = row.grant(wanted);
                                server.granted(&grant, n, limit, now)
                            }
                        };
                        if let Some(began) = taken {
                            prop_assert_eq!(began, row.began(), "tokens of another window");
                            in_flight[at].push((n, began));
                        }
                    }
                    // They were accepted.
                    10..=14 => {
                        let done = in_flight[at].drain(..).filter(|(_, began)| *began == row.began());
                        accepted += done.map(|(n, _)| n).sum::<u64>();
                    }
                    // They were not, after all; and, some times, the server stops and gives back what it holds.
                    15..=19 => {
                        for (n, began) in in_flight[at].drain(..) {
                            server.put_back(n, began);
                        }
                        if let Some((left, _)) = server.left().filter(|(_, began)| step > 17 && *began == row.began()) {
                            row.used -= left;
                            *server = Window::default();
                        }
                    }
                    // A new window, for everybody at the same moment.
                    _ => {
                        now += WINDOW;
                        (row.window, row.used, accepted) = (row.window + 1, 0, 0);
                    }
                }
                let present = |(_, began): &(u64, DateTime<Utc>)| *began == row.began();
                let held: u64 = servers.iter().filter_map(Window::left).filter(present).map(|(n, _)| n).sum();
                let flying: u64 = in_flight.iter().flatten().filter(|one| present(one)).map(|(n, _)| n).sum();
                prop_assert!(row.used <= limit);
                prop_assert_eq!(row.used, accepted + held + flying);
                now += Duration::from_millis(1);
            }
        }

        #[test]
        fn one_process_asks_for_what_it_needs_and_little_more(
            n in 1u64..1_000, limit in 1u64..100_000, ahead in 1u64..1_000,
        ) {
            let Taken::Ask(wanted) = Window::default().take(n, limit, ahead, Instant::now()) else { panic!() };
            prop_assert!(wanted >= n && wanted <= n.max(ahead).max(1), "{wanted}");
        }
    }

    #[test]
    fn after_a_refusal_nobody_is_asked_for_a_while_unless_the_limit_changes() {
        let (mut row, mut window) = (Row { window: 0, used: 0, limit: 1 }, Window::default());
        let now = Instant::now();
        let granted = row.grant(1);
        assert_eq!(window.granted(&granted, 1, 1, now), Some(row.began()));
        assert_eq!(window.take(1, 1, 10, now), Taken::Ask(1));
        let nothing = row.grant(1);
        assert_eq!(window.granted(&nothing, 1, 1, now), None);
        assert_eq!(window.take(1, 1, 10, now), Taken::No);
        assert_eq!(window.take(1, 2, 10, now), Taken::Ask(1));
        assert_eq!(window.take(1, 1, 10, now + ASK_AGAIN), Taken::Ask(1));
        assert_eq!(window.take(1, 1, 10, now + WINDOW), Taken::Ask(1));
        assert_eq!(window.used(), 1);
    }
}
