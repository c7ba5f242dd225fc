//! The memory that uploads may take while they come in: so much in all, and half of it for one tenant, so that one that
//! sends slowly or much keeps no other out. Never waits: uploads that wait for each other's memory would all stand still.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::app::{Error, Result};
use crate::domain::ids::TenantId;

/// One unit of it, in bytes.
const UNIT_BYTES: u64 = 64 << 10;
/// Uploads of the largest size that fit at once; smaller ones more.
const LARGEST_AT_ONCE: u64 = 4;
/// Of one tenant.
const LARGEST_OF_ONE: u64 = 2;

/// What is left.
#[derive(Debug)]
pub struct Memory {
    /// Units that one upload may need.
    largest: u64,
    held: Mutex<HashMap<TenantId, u64>>,
}

/// A share of it, until it is dropped.
#[derive(Debug)]
pub struct Held<'a> {
    memory: &'a Memory,
    tenant: TenantId,
    units: u64,
}

impl Memory {
    /// For uploads of at most so many bytes.
    pub fn new(max_module_bytes: u64) -> Self {
        Self { largest: max_module_bytes.div_ceil(UNIT_BYTES).max(1), held: Mutex::default() }
    }

    /// What an upload needs to begin.
    ///
    /// # Errors
    /// Too many are under way, in all or of the tenant.
    pub fn begin(&self, tenant: TenantId) -> Result<Held<'_>> {
        let mut held = Held { memory: self, tenant, units: 0 };
        held.grow_to(1)?;
        Ok(held)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TenantId, u64>> {
        // Nothing panics while it holds the lock.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held<'_> {
    /// Enough for so many bytes.
    ///
    /// # Errors
    /// Too many are under way, in all or of the tenant. What is held stays.
    pub fn grow_to(&mut self, bytes: u64) -> Result<()> {
        let more = bytes.div_ceil(UNIT_BYTES).saturating_sub(self.units);
        if more == 0 {
            return Ok(());
        }
        let mut held = self.memory.lock();
        // As many entries as tenants with an upload under way, each with a unit at least: no more than there are units.
        let all = held.values().fold(more, |sum, units| sum.saturating_add(*units));
        if all > self.memory.largest.saturating_mul(LARGEST_AT_ONCE) {
            return Err(Error::Overloaded("too many uploads at once"));
        }
        let own = held.get(&self.tenant).copied().unwrap_or(0).saturating_add(more);
        if own > self.memory.largest.saturating_mul(LARGEST_OF_ONE) {
            return Err(Error::Overloaded("too many uploads of this tenant at once"));
        }
        held.insert(self.tenant, own);
        drop(held);
        self.units = self.units.saturating_add(more);
        Ok(())
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut held = self.memory.lock();
        if let Some(units) = held.get_mut(&self.tenant) {
            *units = units.saturating_sub(self.units);
            if *units == 0 {
                held.remove(&self.tenant);
            }
        }
    }
}
