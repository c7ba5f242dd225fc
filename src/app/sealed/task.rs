//! What a task keeps from one invocation to the next, sealed at rest: values of its key-value store and its configuration.
//! Each value names the data key that sealed it and is bound to tenant, task, kind and key. A value is sealed by a key of
//! its own, made from the data key and 16 random bytes that stand in front of it: a counter that is written for years
//! comes nowhere near the number of values at which random nonces repeat.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use crate::app::vault::{self, DataKey, SALT_BYTES, VaultError};
use crate::domain::ids::{TaskId, TenantId};
use crate::store::task::Setting;

type Result<T> = std::result::Result<T, VaultError>;

/// Bytes that sealing adds to a value.
pub const OVERHEAD: usize = SALT_BYTES + vault::OVERHEAD;

/// Where a value stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place<'a> {
    /// In the store, under this key.
    Value(&'a str),
    /// In the configuration, under this key.
    Setting(&'a str),
}

/// Seals and opens what one task keeps.
#[derive(Debug)]
pub struct TaskSealer<'a> {
    key: &'a DataKey,
    tenant: TenantId,
    task: TaskId,
}

impl<'a> TaskSealer<'a> {
    /// For this task, by its tenant's data key.
    #[must_use]
    pub fn new(key: &'a DataKey, tenant: TenantId, task: TaskId) -> Self {
        Self { key, tenant, task }
    }

    fn context<T>(&self, place: Place<'_>, then: impl FnOnce(&[&[u8]]) -> T) -> T {
        let (word, name): (&[u8], _) = match place {
            Place::Value(key) => (b"value", key),
            Place::Setting(key) => (b"setting", key),
        };
        then(&[b"task", word, self.tenant.0.as_bytes(), self.task.0.as_bytes(), name.as_bytes()])
    }

    /// Seal. Nothing is sealed like any other value.
    ///
    /// # Errors
    /// Never for what fits into memory.
    pub fn seal(&self, place: Place<'_>, plain: &[u8]) -> Result<Vec<u8>> {
        let salt: [u8; SALT_BYTES] = rand::random();
        let key = self.key.of_value(&salt);
        let sealed = self.context(place, |context| vault::seal(&key, context, plain))?;
        Ok([salt.as_slice(), &sealed].concat())
    }

    /// Open.
    ///
    /// # Errors
    /// [`VaultError::Broken`].
    pub fn open(&self, place: Place<'_>, sealed: &[u8]) -> Result<Vec<u8>> {
        let (salt, sealed) = sealed.split_first_chunk::<SALT_BYTES>().ok_or(VaultError::Broken)?;
        let key = self.key.of_value(salt);
        let mut plain = self.context(place, |context| vault::open(&key, context, sealed))?;
        Ok(std::mem::take(&mut *plain))
    }

    /// Seal a text of the configuration.
    ///
    /// # Errors
    /// As [`TaskSealer::seal`].
    pub fn seal_setting(&self, id: &str, key: &str, text: &str) -> Result<Setting> {
        let data = BASE64_STANDARD.encode(self.seal(Place::Setting(key), text.as_bytes())?);
        Ok(Setting::Sealed { sealed: id.to_owned(), data })
    }

    /// Open a text of the configuration, by its base64.
    ///
    /// # Errors
    /// As [`TaskSealer::open`].
    pub fn open_setting(&self, key: &str, data: &str) -> Result<String> {
        let sealed = BASE64_STANDARD.decode(data).map_err(|_| VaultError::Broken)?;
        String::from_utf8(self.open(Place::Setting(key), &sealed)?).map_err(|_| VaultError::Broken)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::app::vault::{KEY_BYTES, Vault};

    #[test]
    fn a_value_opens_in_its_own_place_only() {
        let vault = Vault::new(Some([3; KEY_BYTES]), Vec::new());
        let (tenant, other) = (TenantId::generate(), TenantId::generate());
        let (task, beside) = (TaskId::generate(), TaskId::generate());
        let key = vault.make(tenant).unwrap().0;
        let sealer = TaskSealer::new(&key, tenant, task);
        let places = [Place::Value("a"), Place::Value("b"), Place::Setting("a"), Place::Setting("b")];
        for place in places {
            for plain in [b"hush".as_slice(), b""] {
                let sealed = sealer.seal(place, plain).unwrap();
                assert_eq!(sealed.len(), plain.len() + OVERHEAD);
                assert_ne!(sealed, sealer.seal(place, plain).unwrap());
                assert_eq!(sealer.open(place, &sealed).unwrap(), plain);
                for elsewhere in places.into_iter().filter(|elsewhere| *elsewhere != place) {
                    assert!(sealer.open(elsewhere, &sealed).is_err(), "{place:?} {elsewhere:?}");
                }
                assert!(TaskSealer::new(&key, tenant, beside).open(place, &sealed).is_err());
                assert!(TaskSealer::new(&key, other, task).open(place, &sealed).is_err());
                for at in 0..sealed.len() {
                    let mut changed = sealed.clone();
                    changed[at] ^= 1;
                    assert!(sealer.open(place, &changed).is_err());
                    assert!(sealer.open(place, &sealed[..at]).is_err());
                }
            }
        }
        let Setting::Sealed { sealed, data } = sealer.seal_setting("id", "a", "ü").unwrap() else {
            panic!()
        };
        assert_eq!((sealed.as_str(), sealer.open_setting("a", &data).unwrap().as_str()), ("id", "ü"));
        assert!(sealer.open_setting("b", &data).is_err() && sealer.open_setting("a", "?").is_err());
        assert_eq!(OVERHEAD, crate::store::task::SEALED_BYTES);
    }
}
