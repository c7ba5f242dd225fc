//! Which module a dying cell is blamed on. Owns the rule; never kills, never writes.
//!
//! A cell dies with whatever runs in it, and most of that is innocent. So whoever was there at a first death is a
//! suspect, suspects run one module at a time, and a death while exactly one of them runs has its culprit: in flight
//! at two cell deaths, and alone under suspicion at the second. A suspect that ends often enough without a death is
//! one no longer; each further death doubles how often that is.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use crate::domain::ids::TenantId;

/// A tenant's module, by its hash.
pub type Key = (TenantId, [u8; 32]);

/// Attempts a suspect must end without a death after its first.
const CLEAN_ENDS: u32 = 16;
/// Deaths that still double it.
const MAX_DOUBLINGS: u32 = 10;
/// How long a suspect waits for another before both run: one that takes an hour must not hold up all others.
pub const HOLD: Duration = Duration::from_secs(10);
/// How long one that does not run again stays a suspect.
const FORGET_AFTER: Duration = Duration::from_secs(6 * 3600);
/// Suspects remembered; beyond it the oldest are forgotten.
const MAX_SUSPECTS: usize = 10_000;

#[derive(Debug, Clone, Copy)]
struct Suspect {
    deaths: u32,
    clean: u32,
    since: Instant,
}

/// The suspects of one worker.
#[derive(Debug, Default)]
pub struct Suspicion {
    suspects: HashMap<Key, Suspect>,
}

impl Suspicion {
    /// Whether a module may start now, next to what runs, after having waited so long.
    #[must_use]
    pub fn may_start<'a>(
        &self,
        module: &Key,
        running: impl IntoIterator<Item = &'a Key>,
        waited: Duration,
    ) -> bool {
        !self.suspects.contains_key(module)
            || waited >= HOLD
            || running.into_iter().all(|other| other == module || !self.suspects.contains_key(other))
    }

    /// A cell died while these ran in it. Returns the culprit, if there is one; it is no suspect any more, because it
    /// is known.
    pub fn died(&mut self, running: &HashSet<Key>, now: Instant) -> Option<Key> {
        self.suspects.retain(|_, suspect| now.saturating_duration_since(suspect.since) < FORGET_AFTER);
        let mut known = running.iter().filter(|module| self.suspects.contains_key(*module));
        match (known.next().copied(), known.next()) {
            (Some(culprit), None) => {
                self.suspects.remove(&culprit);
                Some(culprit)
            }
            _ => {
                for module in running {
                    let deaths = self.suspects.get(module).map_or(0, |suspect| suspect.deaths) + 1;
                    self.suspects.insert(*module, Suspect { deaths, clean: 0, since: now });
                }
                while self.suspects.len() > MAX_SUSPECTS {
                    let oldest = self.suspects.iter().min_by_key(|(_, s)| s.since).map(|(key, _)| *key);
                    oldest.and_then(|key| self.suspects.remove(&key));
                }
                None
            }
        }
    }

    /// An attempt ended while its cell lived.
    pub fn ended(&mut self, module: &Key) {
        if let Some(suspect) = self.suspects.get_mut(module) {
            suspect.clean += 1;
            if suspect.clean >= CLEAN_ENDS << suspect.deaths.saturating_sub(1).min(MAX_DOUBLINGS) {
                self.suspects.remove(module);
            }
        }
    }

    /// Whether nobody is under suspicion.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.suspects.is_empty()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn key(n: u8) -> Key {
        (TenantId(uuid::Uuid::from_u128(1)), [n; 32])
    }

    fn set(keys: &[u8]) -> HashSet<Key> {
        keys.iter().map(|n| key(*n)).collect()
    }

    #[test]
    fn one_death_condemns_nobody_and_the_second_only_the_suspect_in_it() {
        let mut suspicion = Suspicion::default();
        let now = Instant::now();
        assert_eq!(suspicion.died(&set(&[1, 2, 3]), now), None);
        assert_eq!(suspicion.died(&set(&[2, 8, 9]), now), Some(key(2)));
        assert!(suspicion.may_start(&key(8), [&key(1)], Duration::ZERO), "bystanders of a solved case go on");
    }

    #[test]
    fn suspects_run_one_at_a_time_but_do_not_wait_for_ever() {
        let mut suspicion = Suspicion::default();
        suspicion.died(&set(&[1, 2]), Instant::now());
        assert!(!suspicion.may_start(&key(1), [&key(2)], Duration::ZERO));
        assert!(suspicion.may_start(&key(1), [&key(1), &key(7)], Duration::ZERO));
        assert!(suspicion.may_start(&key(7), [&key(1), &key(2)], Duration::ZERO));
        assert!(suspicion.may_start(&key(1), [&key(2)], HOLD));
        assert_eq!(suspicion.died(&set(&[1, 2]), Instant::now()), None, "either could have done it");
    }

    #[test]
    fn a_suspect_that_ends_well_often_enough_is_one_no_longer() {
        let mut suspicion = Suspicion::default();
        suspicion.died(&set(&[1]), Instant::now());
        for _ in 0..CLEAN_ENDS {
            assert!(!suspicion.is_empty());
            suspicion.ended(&key(1));
        }
        assert!(suspicion.is_empty());
    }

    proptest! {
        #[test]
        fn a_module_that_kills_every_cell_it_runs_in_is_the_only_one_condemned(
            order in prop::collection::vec(prop::collection::hash_set(1u8..20, 0..8), 1..60),
        ) {
            let killer = key(0);
            let mut suspicion = Suspicion::default();
            let mut condemned = Vec::new();
            for bystanders in order {
                let mut running: HashSet<Key> = HashSet::new();
                for module in std::iter::once(killer).chain(bystanders.iter().map(|n| key(*n))) {
                    if suspicion.may_start(&module, &running, Duration::ZERO) {
                        running.insert(module);
                    }
                }
                condemned.extend(suspicion.died(&running, Instant::now()));
                if !condemned.is_empty() {
                    break;
                }
            }
            prop_assert!(condemned.is_empty() || condemned == [killer]);
        }
    }
}
