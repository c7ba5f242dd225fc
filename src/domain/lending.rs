//! Which attempts of a worker hold how much of its memory, and who gets more. Owns the order among them; never tells
//! anybody.
//!
//! Without overcommit each takes what it declares when it starts, and that is all. With it, an attempt is lent what
//! attempts of its module have used ([`History`]), and asks for more when it needs more. Where there is no more, the
//! youngest attempt is handed back, one after the other; of those that ask the oldest gets first, and nobody starts
//! meanwhile. An attempt that is alone always gets what it declares, so the oldest always goes on, and all of them end.

use std::collections::BTreeMap;

use sandbar_host::limits::HELD_BYTES;

use crate::domain::budget::{Budget, Grant, Level};
use crate::domain::history::History;
use crate::domain::ids::TenantId;
use crate::domain::suspicion::Key;

/// What an attempt may make its host hold, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Whatever it does.
    pub fixed: u64,
    /// If it uses all of its limit.
    pub memory: u64,
}

impl Need {
    fn declared(self) -> u64 {
        self.fixed.saturating_add(self.memory)
    }

    /// What is taken for an attempt that is lent so many bytes of memory.
    fn with(self, lent: u64) -> u64 {
        self.fixed.saturating_add(HELD_BYTES).saturating_add(lent).min(self.declared())
    }
}

/// What is to be done about attempts that ask.
#[derive(Debug, PartialEq, Eq)]
pub enum Relief {
    /// Tell this attempt that it may hold so many bytes.
    Lend {
        /// Which one.
        token: u64,
        /// Its question.
        call: u64,
        /// In all.
        bytes: u64,
    },
    /// Hand this one back: it is to end, and [`Lending::ended`] to be called.
    HandBack(u64),
}

#[derive(Debug)]
struct Started {
    key: Key,
    grant: Grant,
    need: Need,
    /// Bytes of memory that it was lent.
    lent: u64,
    handed_back: bool,
}

/// The memory of one worker. Attempts have tokens that grow with time: the largest is the youngest.
#[derive(Debug)]
pub struct Lending {
    budget: Budget,
    started: BTreeMap<u64, Started>,
    /// With overcommit.
    history: Option<History>,
    /// Those that wait in the middle of their run: question, and bytes in all.
    asking: BTreeMap<u64, (u64, u64)>,
}

impl Lending {
    /// From this budget.
    #[must_use]
    pub fn new(budget: Budget, overcommit: bool) -> Self {
        Self {
            budget,
            started: BTreeMap::new(),
            history: overcommit.then(History::default),
            asking: BTreeMap::new(),
        }
    }

    /// How many more attempts of the usual size could start.
    #[must_use]
    pub fn room(&self) -> u32 {
        match (self.asking.is_empty(), self.started.is_empty()) {
            (false, _) => 0,
            // The usual attempt may be larger than what is there; one at a time always gets its chance.
            (true, true) => self.budget.room().max(1),
            (true, false) => self.budget.room(),
        }
    }

    /// The modules of those that run.
    pub fn running(&self) -> impl Iterator<Item = &Key> {
        self.started.values().map(|one| &one.key)
    }

    /// The module of an attempt that runs.
    #[must_use]
    pub fn key(&self, token: u64) -> Option<Key> {
        self.started.get(&token).map(|one| one.key)
    }

    /// Let an attempt start.
    ///
    /// # Errors
    /// The level that has not enough.
    pub fn start(&mut self, token: u64, key: Key, need: Need) -> Result<(), Level> {
        if !self.budget.could_admit(need.declared()) {
            return Err(Level::Never);
        }
        if !self.asking.is_empty() {
            // What becomes free is for those that have begun.
            return Err(Level::Worker);
        }
        let (lent, bytes) = match &self.history {
            None => (need.memory, need.declared()),
            Some(history) => {
                let lent = history.estimate(&key, need.memory);
                (lent, need.with(lent))
            }
        };
        let grant = self.budget.admit(key.0, bytes)?;
        self.started.insert(token, Started { key, grant, need, lent, handed_back: false });
        Ok(())
    }

    /// What an attempt may hold of its memory without asking; none: all of it.
    #[must_use]
    pub fn lent(&self, token: u64) -> Option<u64> {
        self.started.get(&token).filter(|one| one.lent < one.need.memory).map(|one| one.lent)
    }

    /// An attempt asks that it may hold so many bytes of memory in all; [`Self::relieve`] tells what comes of it.
    pub fn ask(&mut self, token: u64, call: u64, bytes: u64) {
        if self.started.contains_key(&token) {
            // One at a time; a cell that says otherwise hears of its last.
            self.asking.insert(token, (call, bytes));
        }
    }

    /// The next thing to do for those that ask, until there is nothing.
    pub fn relieve(&mut self) -> Option<Relief> {
        let asking: Vec<(u64, (u64, u64))> = self.asking.iter().map(|(token, ask)| (*token, *ask)).collect();
        for (token, (call, bytes)) in asking {
            let Some(one) = self.started.get_mut(&token).filter(|one| !one.handed_back) else { continue };
            let bytes = bytes.min(one.need.memory);
            // Half as much again, so that the next page is no question; but not at somebody else's cost.
            let ample = one.lent.saturating_add(one.lent / 2).clamp(bytes, one.need.memory);
            let mut raise = |to: u64| self.budget.raise(&mut one.grant, one.need.with(to)).map(|()| to);
            match raise(ample).or_else(|_| raise(bytes)) {
                Ok(lent) => {
                    one.lent = lent.max(one.lent);
                    let bytes = one.lent;
                    self.asking.remove(&token);
                    return Some(Relief::Lend { token, call, bytes });
                }
                Err(level) => {
                    let tenant = one.key.0;
                    if let Some(youngest) = self.youngest(level, tenant) {
                        return Some(Relief::HandBack(youngest));
                    }
                }
            }
        }
        None
    }

    /// Whom to hand back so that this level gets room; none while one is on its way.
    fn youngest(&mut self, level: Level, tenant: TenantId) -> Option<u64> {
        let concerned =
            |one: &Started| one.need.memory > 0 && (level == Level::Worker || one.key.0 == tenant);
        if self.started.values().any(|one| one.handed_back && concerned(one)) {
            return None;
        }
        let (token, one) = self.started.iter_mut().rev().find(|(_, one)| concerned(one))?;
        one.handed_back = true;
        Some(*token)
    }

    /// An attempt has used so many bytes of memory at the most.
    pub fn used(&mut self, token: u64, peak: u64) {
        if let (Some(history), Some(one)) = (&mut self.history, self.started.get(&token)) {
            history.add(one.key, peak);
        }
    }

    /// An attempt is over; its module, if it had started.
    pub fn ended(&mut self, token: u64) -> Option<Key> {
        self.asking.remove(&token);
        let one = self.started.remove(&token)?;
        self.budget.give_back(one.grant);
        Some(one.key)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    const MIB: u64 = 1 << 20;

    fn key(tenant: u8) -> Key {
        (TenantId(uuid::Uuid::from_u128(u128::from(tenant))), [tenant; 32])
    }

    /// As after eight attempts that used so much.
    fn with_history(worker: u64, tenant: u64, peak: u64) -> Lending {
        let mut lending = Lending::new(Budget::new(worker, tenant, MIB), true);
        for n in 0..8 {
            for who in 0..4 {
                lending.history.as_mut().unwrap().add(key(who), peak + n);
            }
        }
        lending
    }

    #[test]
    fn without_overcommit_an_attempt_takes_what_it_declares() {
        let mut lending = Lending::new(Budget::new(100 * MIB, 100 * MIB, MIB), false);
        for token in 0..20 {
            lending.used(token, 1);
        }
        let need = Need { fixed: MIB, memory: 60 * MIB };
        lending.start(1, key(1), need).unwrap();
        assert_eq!(lending.lent(1), None, "nothing to ask for");
        assert_eq!(lending.start(2, key(1), need), Err(Level::Worker));
    }

    #[test]
    fn the_youngest_of_the_level_that_lacks_memory_is_handed_back_and_only_one_at_a_time() {
        let need = Need { fixed: 0, memory: 80 * MIB };
        let mut lending = with_history(200 * MIB, 82 * MIB, MIB);
        for (token, who) in [(1, 1), (2, 1), (3, 2)] {
            lending.start(token, key(who), need).unwrap();
        }
        lending.ask(1, 7, 80 * MIB);
        // The tenant lacks it, not the worker: a neighbour stays.
        assert_eq!(lending.relieve(), Some(Relief::HandBack(2)));
        assert_eq!(lending.relieve(), None);
        assert_eq!(lending.room(), 0);
        assert_eq!(lending.start(4, key(3), need), Err(Level::Worker), "nobody starts meanwhile");
        assert_eq!(lending.ended(2), Some(key(1)));
        assert_eq!(lending.relieve(), Some(Relief::Lend { token: 1, call: 7, bytes: 80 * MIB }));
        lending.start(4, key(3), need).unwrap();
    }

    proptest! {
        /// Attempts that need anything up to their limit, in steps, whatever history says.
        #[test]
        fn the_budget_is_never_passed_all_of_them_end_and_the_oldest_is_never_handed_back(
            worker in 70u64..300, share in 70u64..300, peak in 1u64..70,
            needs in prop::collection::vec((0u8..4, prop::collection::vec(1u64..65, 1..4)), 1..30),
        ) {
            let (worker, share) = (worker * MIB, share.min(worker) * MIB);
            let mut lending = with_history(worker, share, peak * MIB);
            let need = Need { fixed: MIB, memory: 64 * MIB };
            let mut waiting: VecDeque<(u8, Vec<u64>)> = needs.into();
            // Tokens with what they still want, and what they hold.
            let mut running: BTreeMap<u64, (u8, Vec<u64>, u64)> = BTreeMap::new();
            let (mut token, mut turns) = (0, 0);
            while !waiting.is_empty() || !running.is_empty() {
                turns += 1;
                prop_assert!(turns < 10_000, "nothing goes on");
                while let Some((who, steps)) = waiting.front() {
                    if lending.start(token, key(*who), need).is_err() {
                        break;
                    }
                    running.insert(token, (*who, steps.clone(), 0));
                    waiting.pop_front();
                    token += 1;
                }
                // Each that does not wait takes its next step, or ends.
                for (token, (_, steps, holds)) in &mut running {
                    if lending.asking.contains_key(token) {
                        continue;
                    }
                    let Some(step) = steps.first().map(|step| step * MIB) else { continue };
                    if lending.lent(*token).is_none_or(|lent| step <= lent) {
                        *holds = step.max(*holds);
                        steps.remove(0);
                    } else {
                        lending.ask(*token, 0, step);
                    }
                }
                let over: Vec<u64> = running.iter().filter(|(_, (_, steps, _))| steps.is_empty()).map(|(t, _)| *t).collect();
                for token in over {
                    lending.ended(token);
                    running.remove(&token);
                }
                while let Some(relief) = lending.relieve() {
                    if let Relief::HandBack(victim) = relief {
                        prop_assert!(running.keys().next() != Some(&victim), "the oldest");
                        // It ends a little later; here, at once.
                        lending.ended(victim);
                        let (who, steps, _) = running.remove(&victim).unwrap();
                        waiting.push_back((who, steps));
                    }
                }
                let holds: u64 = running.values().map(|(_, _, holds)| holds + need.fixed).sum();
                prop_assert!(holds <= worker && lending.budget.used() <= worker);
                for who in 0..4 {
                    let own: u64 = running.values().filter(|one| one.0 == who).map(|one| one.2 + need.fixed).sum();
                    prop_assert!(own <= share);
                }
            }
            prop_assert_eq!(lending.budget.used(), 0);
        }
    }
}
