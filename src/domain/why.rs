//! Why an invocation is not running yet, from facts that were read in one go. Owns which fact explains the waiting, in
//! which order, and how the wait is estimated; reads nothing itself.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use crate::domain::invocation::State;

/// Longest wait that is estimated. Beyond it a forecast from the last minute says nothing.
const MAX_ESTIMATE: Duration = Duration::from_secs(7 * 86_400);

/// What was read about an invocation and those around it.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// Where it stands.
    pub state: State,
    /// While scheduled: when it becomes ready.
    pub due_at: Option<DateTime<Utc>>,
    /// Failed attempts that count.
    pub spent: i16,
    /// A cancellation is on its way.
    pub cancelling: bool,
    /// Invocations it depends on that have not ended as it wants.
    pub dependencies: i64,
    /// What of it is paused, in words: `tenant`, `task`, or the tag.
    pub paused: Option<String>,
    /// Its task is not active.
    pub inactive: bool,
    /// A quota of a period is used up.
    pub held: Option<Held>,
    /// Its tenant's quota `memory_bytes` has no room for it beside what runs: how much it is, and how much of it is taken.
    pub no_memory: Option<(i64, i64)>,
    /// Caps that are full, the narrowest first.
    pub full: Vec<Cap>,
    /// While queued: invocations of its tenant that go first, counted up to a bound.
    pub ahead: i64,
    /// There may be more ahead than were counted.
    pub ahead_is_bound: bool,
    /// Workers that run.
    pub workers: i64,
    /// Workers that claim: neither cordoned nor draining.
    pub claiming: i64,
    /// Slots of those.
    pub slots: i64,
    /// Attempts they had at their last heartbeats, of all tenants.
    pub running: i64,
    /// Attempts of the usual size for which the memory of those workers has room; `None`: not all have said.
    pub room: Option<i64>,
    /// The part of the weight of all who wait that is its tenant's, 0 to 1.
    pub share: f64,
    /// Invocations of its tenant that ended lately.
    pub ended: i64,
    /// Within this time.
    pub ended_within: Duration,
}

/// A quota of a day or a month that is used up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Whose: `tenant` or `task`.
    pub of: &'static str,
    /// Its name.
    pub quota: String,
    /// When the day or the month ends.
    pub until: DateTime<Utc>,
}

/// A bound on what runs at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cap {
    /// Of what: `tenant`, `task` or `concurrency-key`.
    pub of: &'static str,
    /// How many may run.
    pub limit: i64,
    /// How many do.
    pub running: i64,
}

/// Why it waits.
#[derive(Debug, Clone, PartialEq)]
pub enum Reason {
    /// It does not wait: it has ended.
    Finished,
    /// It does not wait: it runs.
    Running,
    /// It runs, and is being stopped.
    Cancelling,
    /// Its time has not come.
    Delay {
        /// When it comes.
        until: DateTime<Utc>,
        /// It is the pause after a failed attempt.
        backoff: bool,
    },
    /// Others must end first.
    Dependency {
        /// How many.
        left: i64,
    },
    /// Somebody has paused it.
    Paused {
        /// Its tenant, its task, or a tag.
        what: String,
    },
    /// Its task is not active.
    Inactive,
    /// A quota of a day or a month is used up.
    Quota(Held),
    /// As many run as may.
    Cap(Cap),
    /// The attempts of its tenant that run take as much memory as they may together.
    Memory {
        /// Bytes that they may declare.
        limit: i64,
        /// Bytes that they do.
        used: i64,
    },
    /// No worker runs, or none that may claim.
    NoWorker {
        /// Workers that run but are cordoned or draining.
        idle: i64,
    },
    /// Others of its tenant go first.
    Queue {
        /// How many.
        ahead: i64,
        /// There may be more.
        is_bound: bool,
    },
    /// Every slot is taken; its tenant gets its share of those that come free.
    Share {
        /// 0 to 1.
        share: f64,
        /// Slots of all workers that claim.
        slots: i64,
    },
    /// Slots are free, but the memory of every worker is taken.
    NoMemory,
    /// Nothing is in the way: the next claim takes it.
    Next,
}

/// When it may start, and how that is known.
#[derive(Debug, Clone, PartialEq)]
pub struct Estimate {
    /// From now.
    pub starts_in: Duration,
    /// What it is computed from, in words.
    pub basis: String,
}

/// Every reason that holds, the one that decides first, and an estimate if there is anything to base it on.
#[must_use]
pub fn explain(facts: &Facts, now: DateTime<Utc>) -> (Vec<Reason>, Option<Estimate>) {
    match facts.state {
        State::Succeeded | State::Dead | State::Cancelled | State::Expired => (vec![Reason::Finished], None),
        State::Running if facts.cancelling => (vec![Reason::Cancelling], None),
        State::Running => (vec![Reason::Running], None),
        State::Scheduled => {
            let Some(until) = facts.due_at else {
                let mut reasons = vec![Reason::Dependency { left: facts.dependencies }];
                reasons.extend(gates(facts));
                return (reasons, None);
            };
            let mut reasons = vec![Reason::Delay { until, backoff: facts.spent > 0 }];
            reasons.extend(gates(facts));
            let basis = "when it is due; how long the queue is then is not known now".to_owned();
            let starts_in = (until - now).max(TimeDelta::zero()).to_std().unwrap_or_default();
            (reasons, (!shut(facts)).then_some(Estimate { starts_in, basis }))
        }
        State::Queued => queued(facts, now),
    }
}

/// What only people can open again: with one of these there is nothing to estimate.
fn shut(facts: &Facts) -> bool {
    facts.paused.is_some() || facts.inactive || facts.claiming == 0
}

/// What keeps it back besides the queue.
fn gates(facts: &Facts) -> Vec<Reason> {
    let mut reasons = Vec::new();
    if let Some(what) = &facts.paused {
        reasons.push(Reason::Paused { what: what.clone() });
    }
    if facts.inactive {
        reasons.push(Reason::Inactive);
    }
    reasons.extend(facts.held.clone().map(Reason::Quota));
    if facts.claiming == 0 {
        reasons.push(Reason::NoWorker { idle: facts.workers });
    }
    reasons
}

fn queued(facts: &Facts, now: DateTime<Utc>) -> (Vec<Reason>, Option<Estimate>) {
    let mut reasons = gates(facts);
    reasons.extend(facts.full.iter().cloned().map(Reason::Cap));
    reasons.extend(facts.no_memory.map(|(limit, used)| Reason::Memory { limit, used }));
    if facts.ahead > 0 {
        reasons.push(Reason::Queue { ahead: facts.ahead, is_bound: facts.ahead_is_bound });
    }
    if facts.claiming > 0 && facts.running >= facts.slots {
        reasons.push(Reason::Share { share: facts.share, slots: facts.slots });
    } else if facts.claiming > 0 && facts.room == Some(0) {
        reasons.push(Reason::NoMemory);
    }
    if reasons.is_empty() {
        reasons.push(Reason::Next);
    }
    let estimate = if shut(facts) {
        None
    } else if let Some(held) = &facts.held {
        let basis = "when the quota begins anew; how long the queue is then is not known now".to_owned();
        let starts_in = (held.until - now).max(TimeDelta::zero()).to_std().unwrap_or_default();
        Some(Estimate { starts_in, basis })
    } else if facts.ahead == 0
        && facts.full.is_empty()
        && facts.no_memory.is_none()
        && facts.running < facts.slots
        && facts.room != Some(0)
    {
        let basis = "a slot is free and nothing of this tenant goes first".to_owned();
        Some(Estimate { starts_in: Duration::ZERO, basis })
    } else if facts.ended > 0 && !facts.ended_within.is_zero() {
        let each = facts.ended_within.as_secs_f64() / facts.ended as f64;
        let seconds = each * (facts.ahead + 1) as f64;
        (seconds < MAX_ESTIMATE.as_secs_f64()).then(|| Estimate {
            starts_in: Duration::from_secs_f64(seconds),
            basis: format!(
                "{}{} of this tenant go first, and {} ended within the last {:.1} s",
                if facts.ahead_is_bound { "at least " } else { "" },
                facts.ahead,
                facts.ended,
                facts.ended_within.as_secs_f64()
            ),
        })
    } else {
        None
    };
    (reasons, estimate)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn waiting() -> Facts {
        Facts {
            state: State::Queued,
            due_at: None,
            spent: 0,
            cancelling: false,
            dependencies: 0,
            paused: None,
            inactive: false,
            held: None,
            no_memory: None,
            full: Vec::new(),
            ahead: 0,
            ahead_is_bound: false,
            workers: 1,
            claiming: 1,
            slots: 8,
            running: 0,
            room: Some(8),
            share: 1.0,
            ended: 0,
            ended_within: Duration::ZERO,
        }
    }

    #[test]
    fn with_a_free_slot_and_nobody_before_it_nothing_is_in_the_way() {
        let (reasons, estimate) = explain(&waiting(), Utc::now());
        assert_eq!(reasons, [Reason::Next]);
        assert_eq!(estimate.unwrap().starts_in, Duration::ZERO);
    }

    #[test]
    fn without_a_worker_that_claims_there_is_no_estimate_whatever_the_past_says() {
        let facts =
            Facts { claiming: 0, ahead: 3, ended: 100, ended_within: Duration::from_secs(1), ..waiting() };
        let (reasons, estimate) = explain(&facts, Utc::now());
        assert_eq!(reasons, [Reason::NoWorker { idle: 1 }, Reason::Queue { ahead: 3, is_bound: false }]);
        assert_eq!(estimate, None);
    }

    #[test]
    fn a_full_fleet_gives_a_share_and_the_past_minute_the_estimate() {
        let facts = Facts {
            running: 8,
            ahead: 9,
            share: 0.25,
            ended: 20,
            ended_within: Duration::from_secs(10),
            ..waiting()
        };
        let (reasons, estimate) = explain(&facts, Utc::now());
        assert_eq!(
            reasons,
            [Reason::Queue { ahead: 9, is_bound: false }, Reason::Share { share: 0.25, slots: 8 }]
        );
        assert_eq!(estimate.unwrap().starts_in, Duration::from_secs(5));
        let unknown = Facts { ended: 0, ..facts };
        assert_eq!(explain(&unknown, Utc::now()).1, None);
    }

    #[test]
    fn with_free_slots_and_no_room_in_memory_it_waits_for_memory() {
        let facts = Facts { room: Some(0), ..waiting() };
        assert_eq!(explain(&facts, Utc::now()), (vec![Reason::NoMemory], None));
        let silent = Facts { room: None, ..waiting() };
        assert_eq!(explain(&silent, Utc::now()).0, [Reason::Next]);
        let taken = Facts { running: 8, ..facts };
        assert_eq!(explain(&taken, Utc::now()).0, [Reason::Share { share: 1.0, slots: 8 }]);
    }

    #[test]
    fn what_is_paused_comes_first_and_has_no_estimate_and_a_full_cap_is_named() {
        let cap = Cap { of: "task", limit: 2, running: 2 };
        let facts =
            Facts { full: vec![cap.clone()], ended: 60, ended_within: Duration::from_secs(60), ..waiting() };
        let (reasons, estimate) = explain(&facts, Utc::now());
        assert_eq!(reasons, [Reason::Cap(cap.clone())]);
        assert_eq!(estimate.unwrap().starts_in, Duration::from_secs(1));
        let paused = Facts { paused: Some("task".to_owned()), ..facts };
        let (reasons, estimate) = explain(&paused, Utc::now());
        assert_eq!(reasons, [Reason::Paused { what: "task".to_owned() }, Reason::Cap(cap)]);
        assert_eq!(estimate, None);
        let waits = Facts { state: State::Scheduled, dependencies: 2, ..waiting() };
        assert_eq!(explain(&waits, Utc::now()), (vec![Reason::Dependency { left: 2 }], None));
    }

    #[test]
    fn a_quota_that_is_used_up_is_named_and_its_end_is_the_estimate_unless_only_people_can_open() {
        let now = Utc::now();
        let held =
            Held { of: "tenant", quota: "fuel_per_day".to_owned(), until: now + TimeDelta::seconds(60) };
        let facts = Facts { held: Some(held.clone()), ended: 60, ahead: 1, ..waiting() };
        let (reasons, estimate) = explain(&facts, now);
        assert_eq!(reasons, [Reason::Quota(held.clone()), Reason::Queue { ahead: 1, is_bound: false }]);
        assert_eq!(estimate.unwrap().starts_in, Duration::from_secs(60));
        let over = Facts { held: Some(Held { until: now - TimeDelta::seconds(1), ..held }), ..facts };
        assert_eq!(explain(&over, now).1.unwrap().starts_in, Duration::ZERO);
        assert_eq!(explain(&Facts { inactive: true, ..over }, now).1, None);
        let full = Facts { no_memory: Some((100, 90)), ..waiting() };
        assert_eq!(explain(&full, now), (vec![Reason::Memory { limit: 100, used: 90 }], None));
    }

    #[test]
    fn what_is_due_later_waits_for_its_time_and_what_runs_or_has_ended_for_nothing() {
        let now = Utc::now();
        let until = now + TimeDelta::seconds(30);
        let facts = Facts { state: State::Scheduled, due_at: Some(until), spent: 1, ..waiting() };
        let (reasons, estimate) = explain(&facts, now);
        assert_eq!(reasons, [Reason::Delay { until, backoff: true }]);
        assert_eq!(estimate.unwrap().starts_in, Duration::from_secs(30));
        let running = Facts { state: State::Running, cancelling: true, ..waiting() };
        assert_eq!(explain(&running, now).0, [Reason::Cancelling]);
        for state in State::ALL.into_iter().filter(|s| s.is_terminal()) {
            assert_eq!(explain(&Facts { state, ..waiting() }, now), (vec![Reason::Finished], None));
        }
    }
}
