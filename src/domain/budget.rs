//! Which attempts fit into a worker's memory: attempt ≤ tenant ≤ worker. Owns the sums; never measures memory and
//! never waits.
//!
//! What is admitted is what the attempt may make the host hold at the most: as it declared it, or what it was lent of that,
//! and more only after [`Budget::raise`]. So whatever guests do, the sum stays below what the operator gave.

use std::collections::HashMap;

use crate::domain::ids::TenantId;

/// The level that refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// More than this worker would ever give one tenant: it can never run here.
    Never,
    /// The tenant has too much running here.
    Tenant,
    /// The worker is full.
    Worker,
}

impl Level {
    /// For people.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Never => "larger than the worker",
            Self::Tenant => "the tenant's share of the worker",
            Self::Worker => "the worker",
        }
    }
}

/// The right of one attempt to its bytes. Given back to the budget it came from.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Grant {
    tenant: TenantId,
    bytes: u64,
}

/// The sums of one worker.
#[derive(Debug)]
pub struct Budget {
    worker: u64,
    tenant: u64,
    used: u64,
    tenants: HashMap<TenantId, u64>,
    /// What attempts took lately, on average: how many more may be claimed is guessed from it.
    typical: f64,
}

/// Weight of the latest attempt in [`Budget::typical`].
const LEARNING: f64 = 0.05;

impl Budget {
    /// So many bytes in all, and at most so many for one tenant.
    #[must_use]
    pub fn new(worker: u64, tenant: u64, typical: u64) -> Self {
        Self {
            worker,
            tenant: tenant.min(worker),
            used: 0,
            tenants: HashMap::new(),
            typical: typical.max(1) as f64,
        }
    }

    /// Whether so many could be taken for one attempt if there were no other.
    #[must_use]
    pub const fn could_admit(&self, bytes: u64) -> bool {
        bytes <= self.tenant
    }

    /// Take `bytes` for an attempt of this tenant.
    ///
    /// # Errors
    /// The level that has not so many left; nothing was taken.
    pub fn admit(&mut self, tenant: TenantId, bytes: u64) -> Result<Grant, Level> {
        if !self.could_admit(bytes) {
            return Err(Level::Never);
        }
        let own = self.tenants.get(&tenant).copied().unwrap_or(0);
        if self.worker - self.used < bytes {
            return Err(Level::Worker);
        }
        if self.tenant.saturating_sub(own) < bytes {
            return Err(Level::Tenant);
        }
        self.used += bytes;
        *self.tenants.entry(tenant).or_default() += bytes;
        self.typical += (bytes as f64 - self.typical) * LEARNING;
        Ok(Grant { tenant, bytes })
    }

    /// Take more for an attempt, until it has `bytes`; it never gets fewer than it has.
    ///
    /// # Errors
    /// The level that has not so many left; the grant is as it was.
    pub fn raise(&mut self, grant: &mut Grant, bytes: u64) -> Result<(), Level> {
        let Some(more) = bytes.checked_sub(grant.bytes) else { return Ok(()) };
        let own = self.tenants.get(&grant.tenant).copied().unwrap_or(0);
        if self.tenant.saturating_sub(own) < more {
            return Err(Level::Tenant);
        }
        if self.worker - self.used < more {
            return Err(Level::Worker);
        }
        self.used += more;
        *self.tenants.entry(grant.tenant).or_default() += more;
        grant.bytes = bytes;
        Ok(())
    }

    /// Give back what an attempt had.
    pub fn give_back(&mut self, Grant { tenant, bytes }: Grant) {
        self.used = self.used.saturating_sub(bytes);
        if let Some(own) = self.tenants.get_mut(&tenant) {
            *own = own.saturating_sub(bytes);
            if *own == 0 {
                self.tenants.remove(&tenant);
            }
        }
    }

    /// How many more attempts of the usual size fit.
    #[must_use]
    pub fn room(&self) -> u32 {
        let free = (self.worker - self.used) as f64;
        // Saturates; NaN cannot be, as `typical` is at least about 1.
        (free / self.typical.max(1.0)) as u32
    }

    /// Bytes taken.
    #[must_use]
    pub const fn used(&self) -> u64 {
        self.used
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn tenant(n: u8) -> TenantId {
        TenantId(uuid::Uuid::from_u128(u128::from(n)))
    }

    #[test]
    fn a_refusal_names_its_level() {
        let mut budget = Budget::new(100, 60, 10);
        assert_eq!(budget.admit(tenant(1), 61), Err(Level::Never));
        let _first = budget.admit(tenant(1), 50).unwrap();
        assert_eq!(budget.admit(tenant(1), 20), Err(Level::Tenant));
        let _second = budget.admit(tenant(2), 45).unwrap();
        assert_eq!(budget.admit(tenant(3), 20), Err(Level::Worker));
        assert_eq!(budget.used(), 95);
    }

    #[test]
    fn room_follows_what_attempts_take() {
        let mut budget = Budget::new(1_000, 1_000, 100);
        assert_eq!(budget.room(), 10);
        for _ in 0..200 {
            let grant = budget.admit(tenant(1), 500).unwrap();
            budget.give_back(grant);
        }
        assert_eq!(budget.room(), 2);
    }

    proptest! {
        #[test]
        fn no_level_is_ever_passed_and_everything_comes_back(
            worker in 1u64..1_000_000, share in 1u64..1_000_000,
            steps in prop::collection::vec((0u8..5, 0u64..400_000, 0u8..3, any::<prop::sample::Index>()), 1..200),
        ) {
            let mut budget = Budget::new(worker, share, 1_000);
            let mut held: Vec<Grant> = Vec::new();
            for (who, bytes, what, which) in steps {
                if what == 0 || held.is_empty() {
                    held.extend(budget.admit(tenant(who), bytes));
                } else if what == 1 {
                    let grant = which.index(held.len());
                    let grant = &mut held[grant];
                    let before = grant.bytes;
                    match budget.raise(grant, bytes) {
                        Ok(()) => prop_assert_eq!(grant.bytes, before.max(bytes)),
                        Err(_) => prop_assert_eq!(grant.bytes, before),
                    }
                } else {
                    let grant = held.swap_remove(which.index(held.len()));
                    budget.give_back(grant);
                }
                let sum: u64 = held.iter().map(|grant| grant.bytes).sum();
                prop_assert_eq!(sum, budget.used());
                prop_assert!(sum <= worker);
                for n in 0..5 {
                    let own: u64 = held.iter().filter(|g| g.tenant == tenant(n)).map(|g| g.bytes).sum();
                    prop_assert!(own <= share.min(worker));
                }
            }
            for grant in held {
                budget.give_back(grant);
            }
            prop_assert_eq!(budget.used(), 0);
            prop_assert!(budget.admit(tenant(0), share.min(worker)).is_ok());
        }
    }
}
