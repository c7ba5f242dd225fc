//! Claims whose answers never came. What such a claim took belongs to this worker, so nobody else touches it while the
//! worker lives, and the worker does not know of it: it looks for it and gives it back. Owns the list of their leases;
//! never claims.

use std::time::Duration;

use tokio::time::Instant;
use tracing::info;

use crate::domain::ids::{LeaseId, WorkerId};
use crate::store::WorkerStore;
use crate::store::queue::Claimed;

/// How long a claim without an answer may still come about: the longest statement timeout that can be configured, and
/// a minute on the way.
const MAY_STILL_COME: Duration = Duration::from_secs(660);
/// Between two looks at what such claims have taken.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Leases of claims that got no answer, with the time until which they may still come about.
#[derive(Debug, Default)]
pub struct Unanswered {
    leases: Vec<(LeaseId, Instant)>,
    looked_at: Option<Instant>,
}

impl Unanswered {
    /// A claim under this lease failed in a way that says nothing about what it did.
    pub fn add(&mut self, lease: LeaseId) {
        self.leases.push((lease, Instant::now() + MAY_STILL_COME));
    }

    /// What they have taken. Most of the time there are none, and this asks nobody.
    pub async fn find(&mut self, store: &WorkerStore, (worker, epoch): (WorkerId, i64)) -> Vec<Claimed> {
        let now = Instant::now();
        self.leases.retain(|(_, until)| *until > now);
        if self.leases.is_empty() || self.looked_at.is_some_and(|at| now < at + LOOK_EVERY) {
            return Vec::new();
        }
        self.looked_at = Some(now);
        let leases: Vec<LeaseId> = self.leases.iter().map(|(lease, _)| *lease).collect();
        // An error is as good as nothing found: we look again.
        let found = store.leased(worker, epoch, &leases).await.unwrap_or_default();
        if !found.is_empty() {
            info!(attempts = found.len(), "a claim without an answer had taken work: giving it back");
            // A claim commits once: what it took is known now.
            self.leases.retain(|(lease, _)| !found.iter().any(|one| one.lease == *lease));
        }
        found
    }
}
