//! Who a key belongs to, remembered for a few seconds, and what its role may (`domain::role` has the table). Never keeps a key, only its hash; never remembers that a key is
//! unknown, so a new key works at once and strangers cannot fill the memory.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::app::{App, Error, Result};
use crate::domain::role::Action;
use crate::store::tenant::{Identity, key_hash};

/// A revoked key works at most this long.
const STALE_AFTER: Duration = Duration::from_secs(5);
/// Keys remembered.
const MAX_KEYS: usize = 10_000;
/// Longest key that is looked at.
const MAX_KEY_BYTES: usize = 512;

/// Keys seen lately.
#[derive(Debug, Default)]
pub struct Keys {
    seen: Mutex<HashMap<[u8; 32], (Identity, Instant)>>,
}

impl Keys {
    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 32], (Identity, Instant)>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, hash: &[u8; 32], now: Instant) -> Option<Identity> {
        let seen = self.lock();
        let (identity, at) = seen.get(hash)?;
        (now.saturating_duration_since(*at) < STALE_AFTER).then_some(*identity)
    }

    fn put(&self, hash: [u8; 32], identity: Identity, now: Instant) {
        let mut seen = self.lock();
        if seen.len() >= MAX_KEYS && !seen.contains_key(&hash) {
            seen.retain(|_, (_, at)| now.saturating_duration_since(*at) < STALE_AFTER);
            if seen.len() >= MAX_KEYS {
                seen.clear();
            }
        }
        seen.insert(hash, (identity, now));
    }
}

impl App {
    /// Who this key belongs to; `None` for nobody.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn authenticate(&self, key: &str) -> Result<Option<Identity>> {
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return Ok(None);
        }
        let hash = key_hash(key);
        // Taken before the question, so that an answer is never older than it claims.
        let now = Instant::now();
        if let Some(identity) = self.inner.keys.get(&hash, now) {
            return Ok(Some(identity));
        }
        let identity = self.inner.store.authenticate(&hash).await?;
        if let Some(identity) = identity {
            self.inner.keys.put(hash, identity, now);
        }
        Ok(identity)
    }

    /// Whether this key was found to be somebody's in the last seconds: asking for it costs nothing.
    #[must_use]
    pub fn remembers(&self, key: &str) -> bool {
        self.inner.keys.get(&key_hash(key), Instant::now()).is_some()
    }

    /// Whether this caller may do this: nothing, or [`Error::Forbidden`].
    ///
    /// # Errors
    /// It may not.
    pub fn authorize(caller: &Identity, action: Action) -> Result<()> {
        if caller.role.may(action) { Ok(()) } else { Err(Error::Forbidden(caller.role.as_str())) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::domain::ids::{KeyId, TenantId};
    use crate::domain::role::Role;

    #[test]
    fn a_key_is_asked_for_again_after_five_seconds_and_memory_is_bounded() {
        let identity = Identity { tenant: TenantId::generate(), key: KeyId::generate(), role: Role::Admin };
        let keys = Keys::default();
        let start = Instant::now();
        keys.put([1; 32], identity, start);
        assert_eq!(keys.get(&[1; 32], start + Duration::from_millis(4_999)), Some(identity));
        assert_eq!(keys.get(&[1; 32], start + STALE_AFTER), None);
        for n in 0..=u32::try_from(MAX_KEYS).unwrap() {
            keys.put(key_hash(&n.to_string()), identity, start);
        }
        assert!(keys.lock().len() <= MAX_KEYS);
    }
}
