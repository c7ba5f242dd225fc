//! What a worker remembers of the queue from one claim to the next: who had work, and where in each tenant's order the
//! last claim began. Hints only: every look starts over. Never decides who gets how much.
//!
//! Looking costs Postgres time: a jump per tenant, and a walk over rows that are gone but that an old snapshot keeps
//! from being removed. So a worker that has just looked goes by its memory, from the marks on, and looks again after
//! nine times the time that the look took: at most a tenth of the time goes into looks, whatever they cost, and what
//! lands below a mark (a retry, a row of high priority, one committed out of order) or belongs to somebody new waits
//! for nine looks at most. On a quiet database that is milliseconds.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::Instant;

use crate::domain::fairness::Candidate;
use crate::domain::ids::TenantId;
use crate::store::queue::Claimed;

/// Looks take at most one part in this and one.
const SHARE: u32 = 9;
/// The longest time without a look.
const LONGEST: Duration = Duration::from_millis(500);

/// Tenants a guess may name when a look is due; with more, looking costs less than guessing wrong.
const MAX_GUESS: usize = 64;

/// What is remembered.
#[derive(Debug)]
pub struct Memory {
    candidates: Vec<Candidate>,
    marks: HashMap<TenantId, DateTime<Utc>>,
    look_at: Instant,
    guessed: bool,
}

impl Default for Memory {
    fn default() -> Self {
        Self { candidates: Vec::new(), marks: HashMap::new(), look_at: Instant::now(), guessed: false }
    }
}

impl Memory {
    /// Whether it is time to look again.
    pub fn is_due(&self) -> bool {
        Instant::now() >= self.look_at
    }

    /// Whom to ask without a look. `idle`: the worker has nothing else to do; then it asks those who had work at the last
    /// look that found any, also when a look is due (which is a third of the way of a lone invocation), but not twice in
    /// a row, so that nobody is left out for long.
    pub fn guess(&self, idle: bool) -> &[Candidate] {
        let stale = self.is_due();
        if stale && (!idle || self.guessed || self.candidates.len() > MAX_GUESS) {
            return &[];
        }
        &self.candidates
    }

    /// A guess found something. When a look was due, the next turn looks.
    pub fn guessed(&mut self) {
        self.guessed = self.is_due();
    }

    /// When to look again.
    pub fn look_at(&self) -> Instant {
        self.look_at
    }

    /// Where to begin for this tenant when going by memory.
    pub fn mark(&self, tenant: TenantId) -> Option<DateTime<Utc>> {
        self.marks.get(&tenant).copied()
    }

    /// A look found these, and looking and claiming took so long.
    pub fn looked(&mut self, candidates: Vec<Candidate>, took: Duration) {
        self.guessed = false;
        // An empty queue is no reason to forget who used to fill it: they are the ones to guess next time.
        if !candidates.is_empty() {
            let known: std::collections::HashSet<TenantId> = candidates.iter().map(|c| c.tenant).collect();
            self.marks.retain(|tenant, _| known.contains(tenant));
            self.candidates = candidates;
        }
        self.look_at = Instant::now() + (took * SHARE).min(LONGEST);
    }

    /// These were claimed: what comes before the first of a tenant is gone, or somebody else's.
    pub fn claimed<'a>(&mut self, claimed: impl Iterator<Item = &'a Claimed>) {
        let mut first: HashMap<TenantId, DateTime<Utc>> = HashMap::new();
        let mut taken: HashMap<TenantId, u32> = HashMap::new();
        for one in claimed {
            let rank = first.entry(one.tenant).or_insert(one.rank);
            *rank = (*rank).min(one.rank);
            *taken.entry(one.tenant).or_default() += 1;
        }
        for candidate in &mut self.candidates {
            if let Some(free) = &mut candidate.free {
                *free = free.saturating_sub(taken.get(&candidate.tenant).copied().unwrap_or(0));
            }
        }
        self.marks.extend(first);
    }
}
