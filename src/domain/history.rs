//! How much memory the attempts of a module have used lately, in this process. Owns the estimate for the next; what an
//! attempt may use is its limit, whatever is estimated.

use std::collections::{HashMap, VecDeque};

use crate::domain::suspicion::Key;

/// Attempts that an estimate looks back on.
const WINDOW: usize = 32;
/// Fewer than so many say nothing yet.
const ENOUGH: usize = 8;
/// Modules that are remembered; beyond, memory starts anew.
const MAX_MODULES: usize = 4_096;

/// What attempts have used, by tenant and module.
#[derive(Debug, Default)]
pub struct History {
    peaks: HashMap<Key, VecDeque<u64>>,
}

impl History {
    /// An attempt has used so many bytes at the most.
    pub fn add(&mut self, key: Key, peak: u64) {
        if self.peaks.len() >= MAX_MODULES && !self.peaks.contains_key(&key) {
            self.peaks.clear();
        }
        let peaks = self.peaks.entry(key).or_default();
        if peaks.len() >= WINDOW {
            peaks.pop_front();
        }
        peaks.push_back(peak);
    }

    /// Bytes that the next attempt will use, most likely: a quarter more than the most of the last 32, and never more than
    /// it declares; what it declares, until eight are known.
    #[must_use]
    pub fn estimate(&self, key: &Key, declared: u64) -> u64 {
        match self.peaks.get(key) {
            Some(peaks) if peaks.len() >= ENOUGH => {
                let most = peaks.iter().copied().max().unwrap_or(declared);
                most.saturating_add(most / 4).min(declared)
            }
            _ => declared,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::TenantId;

    fn key(n: u8) -> Key {
        (TenantId(uuid::Uuid::from_u128(1)), [n; 32])
    }

    #[test]
    fn an_estimate_needs_enough_attempts_and_forgets_old_ones() {
        let mut history = History::default();
        for _ in 0..ENOUGH - 1 {
            history.add(key(1), 100);
        }
        assert_eq!(history.estimate(&key(1), 1_000), 1_000);
        history.add(key(1), 400);
        assert_eq!(history.estimate(&key(1), 1_000), 500);
        assert_eq!(history.estimate(&key(1), 450), 450, "never more than declared");
        assert_eq!(history.estimate(&key(2), 1_000), 1_000, "another module is another story");
        for _ in 0..WINDOW {
            history.add(key(1), 100);
        }
        assert_eq!(history.estimate(&key(1), 1_000), 125);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut history = History::default();
        for n in 0..2 * MAX_MODULES {
            let mut hash = [0; 32];
            hash[..8].copy_from_slice(&n.to_le_bytes());
            for _ in 0..2 * WINDOW {
                history.add((TenantId(uuid::Uuid::nil()), hash), 1);
            }
        }
        assert!(history.peaks.len() <= MAX_MODULES);
        assert!(history.peaks.values().all(|peaks| peaks.len() <= WINDOW));
    }
}
