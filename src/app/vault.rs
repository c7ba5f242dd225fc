//! Sealing: values by a data key of their tenant, data keys by the master key of the installation (AES-256-GCM, random
//! nonces). What is sealed is bound to its row: moved elsewhere, it does not open. Owns keys in memory and the formats;
//! stores nothing. Nonces are random: a data key seals some thousand secrets in its life, and the payloads of each
//! invocation by a key of their own that is made from it, so that no key comes near 2^32 values, where they repeat.

use std::fmt;

use aes_gcm::Aes256Gcm;
use aes_gcm::aead::{Aead, KeyInit, Payload};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::domain::ids::{InvocationId, TenantId};

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
/// Bytes of a nonce, before the ciphertext.
const NONCE_BYTES: usize = 12;
/// First byte of everything sealed: which format this is.
const FORMAT: u8 = 1;
/// Bytes behind the ciphertext that tell whether it was changed.
const TAG_BYTES: usize = 16;
/// Bytes that sealing adds.
pub const OVERHEAD: usize = 1 + NONCE_BYTES + TAG_BYTES;
/// Random bytes from which the key of one value is made.
pub(super) const SALT_BYTES: usize = 16;
/// Bytes of a key's fingerprint, in hexadecimal twice as many characters.
const FINGERPRINT_BYTES: usize = 8;

/// Why something was not sealed or opened. Says nothing about what is inside.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VaultError {
    /// Nobody configured a master key.
    #[error("this process has no master key")]
    NoMasterKey,
    /// Wrapped by a key that this process does not have.
    #[error("the master key {0} is needed and not configured")]
    UnknownMasterKey(String),
    /// Changed, moved, or sealed by another key.
    #[error("what is sealed does not open: it was changed, moved or sealed by another key")]
    Broken,
}

/// A key that is wiped when it is dropped, and never shown.
#[derive(Clone)]
pub struct DataKey(Zeroizing<[u8; KEY_BYTES]>);

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(***)")
    }
}

impl DataKey {
    /// Its fingerprint: names it where something says what it seals.
    #[must_use]
    pub fn id(&self) -> String {
        fingerprint("sandbar data key\0", &self.0)
    }

    /// The key for the payloads of one invocation. All parts have a fixed length, so the plain hash is a keyed one.
    #[must_use]
    pub fn of_invocation(&self, tenant: TenantId, invocation: InvocationId) -> Self {
        let digest = Sha256::new()
            .chain_update("sandbar invocation\0")
            .chain_update(self.0.as_slice())
            .chain_update(tenant.0.as_bytes())
            .chain_update(invocation.0.as_bytes())
            .finalize();
        Self(Zeroizing::new(digest.into()))
    }

    /// The key for one value, by the random bytes that stand in front of it.
    #[must_use]
    pub(super) fn of_value(&self, salt: &[u8; SALT_BYTES]) -> Self {
        let digest = Sha256::new()
            .chain_update("sandbar value\0")
            .chain_update(self.0.as_slice())
            .chain_update(salt)
            .finalize();
        Self(Zeroizing::new(digest.into()))
    }

    /// A digest that only this key makes: says whether two requests are the same, and nothing about either to whoever
    /// guesses.
    #[must_use]
    pub fn digest(&self, of: &[u8; 32]) -> [u8; 32] {
        Sha256::new()
            .chain_update("sandbar request\0")
            .chain_update(self.0.as_slice())
            .chain_update(of)
            .finalize()
            .into()
    }
}

fn fingerprint(what: &str, key: &[u8; KEY_BYTES]) -> String {
    let digest = Sha256::new().chain_update(what).chain_update(key).finalize();
    digest.iter().take(FINGERPRINT_BYTES).map(|byte| format!("{byte:02x}")).collect()
}

/// A data key as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrapped {
    /// Fingerprint of the master key.
    pub master: String,
    /// The key, sealed.
    pub bytes: Vec<u8>,
}

struct Master {
    fingerprint: String,
    key: DataKey,
}

/// The master keys of this process.
#[derive(Default)]
pub struct Vault {
    /// Wraps what is new.
    current: Option<Master>,
    /// Still open what they wrapped.
    previous: Vec<Master>,
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vault").field("current", &self.current()).finish_non_exhaustive()
    }
}

impl Master {
    fn new(key: [u8; KEY_BYTES]) -> Self {
        Self { fingerprint: fingerprint("sandbar master key\0", &key), key: DataKey(Zeroizing::new(key)) }
    }
}

impl Vault {
    /// With the key that wraps from now on, and those that did before.
    #[must_use]
    pub fn new(current: Option<[u8; KEY_BYTES]>, previous: Vec<[u8; KEY_BYTES]>) -> Self {
        Self { current: current.map(Master::new), previous: previous.into_iter().map(Master::new).collect() }
    }

    /// Fingerprint of the key that wraps.
    #[must_use]
    pub fn current(&self) -> Option<&str> {
        self.current.as_ref().map(|master| master.fingerprint.as_str())
    }

    /// A new data key for a tenant.
    ///
    /// # Errors
    /// [`VaultError::NoMasterKey`].
    pub fn make(&self, tenant: TenantId) -> Result<(DataKey, Wrapped), VaultError> {
        let key = DataKey(Zeroizing::new(rand::random()));
        let wrapped = self.wrap(tenant, &key)?;
        Ok((key, wrapped))
    }

    /// A data key as it may be stored.
    ///
    /// # Errors
    /// [`VaultError::NoMasterKey`].
    pub fn wrap(&self, tenant: TenantId, key: &DataKey) -> Result<Wrapped, VaultError> {
        let master = self.current.as_ref().ok_or(VaultError::NoMasterKey)?;
        let context = [b"data key".as_slice(), tenant.0.as_bytes(), master.fingerprint.as_bytes()];
        let bytes = seal(&master.key, &context, key.0.as_slice())?;
        Ok(Wrapped { master: master.fingerprint.clone(), bytes })
    }

    /// The master key with this fingerprint.
    fn master(&self, fingerprint: &str) -> Result<&Master, VaultError> {
        if self.current.is_none() && self.previous.is_empty() {
            return Err(VaultError::NoMasterKey);
        }
        let mut masters = self.current.iter().chain(&self.previous);
        let found = masters.find(|master| master.fingerprint == fingerprint);
        found.ok_or_else(|| VaultError::UnknownMasterKey(fingerprint.to_owned()))
    }

    /// The private half of a signing key as it may be stored, bound to the key's name.
    ///
    /// # Errors
    /// [`VaultError::NoMasterKey`].
    pub fn wrap_seed(&self, kid: &str, seed: &[u8]) -> Result<Wrapped, VaultError> {
        let master = self.current.as_ref().ok_or(VaultError::NoMasterKey)?;
        let context = [b"signing key".as_slice(), kid.as_bytes(), master.fingerprint.as_bytes()];
        let bytes = seal(&master.key, &context, seed)?;
        Ok(Wrapped { master: master.fingerprint.clone(), bytes })
    }

    /// The private half of a signing key.
    ///
    /// # Errors
    /// The master key is not here, or it does not open.
    pub fn unwrap_seed(&self, kid: &str, wrapped: &Wrapped) -> Result<Zeroizing<Vec<u8>>, VaultError> {
        let master = self.master(&wrapped.master)?;
        let context = [b"signing key".as_slice(), kid.as_bytes(), master.fingerprint.as_bytes()];
        open(&master.key, &context, &wrapped.bytes)
    }

    /// A tenant's data key.
    ///
    /// # Errors
    /// The master key is not here, or it does not open.
    pub fn unwrap(&self, tenant: TenantId, wrapped: &Wrapped) -> Result<DataKey, VaultError> {
        let master = self.master(&wrapped.master)?;
        let context = [b"data key".as_slice(), tenant.0.as_bytes(), master.fingerprint.as_bytes()];
        let opened = open(&master.key, &context, &wrapped.bytes)?;
        let bytes: [u8; KEY_BYTES] = opened.as_slice().try_into().map_err(|_| VaultError::Broken)?;
        Ok(DataKey(Zeroizing::new(bytes)))
    }
}

/// Seal a value of a tenant's secret.
///
/// # Errors
/// Never for values of the size that is allowed.
pub fn seal_secret(
    key: &DataKey,
    tenant: TenantId,
    name: &str,
    version: i32,
    value: &[u8],
) -> Result<Vec<u8>, VaultError> {
    seal(key, &[b"secret", tenant.0.as_bytes(), name.as_bytes(), &version.to_be_bytes()], value)
}

/// The value of a tenant's secret.
///
/// # Errors
/// [`VaultError::Broken`].
pub fn open_secret(
    key: &DataKey,
    tenant: TenantId,
    name: &str,
    version: i32,
    sealed: &[u8],
) -> Result<Zeroizing<Vec<u8>>, VaultError> {
    open(key, &[b"secret", tenant.0.as_bytes(), name.as_bytes(), &version.to_be_bytes()], sealed)
}

/// What a ciphertext is bound to: each part with its length, so that no two contexts are the same bytes.
fn associated(context: &[&[u8]]) -> Vec<u8> {
    let mut bytes = b"sandbar\0".to_vec();
    bytes.push(FORMAT);
    for part in context {
        bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
        bytes.extend_from_slice(part);
    }
    bytes
}

/// Seal, bound to this context.
pub(super) fn seal(key: &DataKey, context: &[&[u8]], plain: &[u8]) -> Result<Vec<u8>, VaultError> {
    let cipher = Aes256Gcm::new((&*key.0).into());
    let nonce: [u8; NONCE_BYTES] = rand::random();
    let payload = Payload { msg: plain, aad: &associated(context) };
    let text = cipher.encrypt((&nonce).into(), payload).map_err(|_| VaultError::Broken)?;
    Ok([&[FORMAT], nonce.as_slice(), &text].concat())
}

/// Open what was sealed in this context.
pub(super) fn open(
    key: &DataKey,
    context: &[&[u8]],
    sealed: &[u8],
) -> Result<Zeroizing<Vec<u8>>, VaultError> {
    let rest = sealed.strip_prefix(&[FORMAT]).ok_or(VaultError::Broken)?;
    let (nonce, text) = rest.split_first_chunk::<NONCE_BYTES>().ok_or(VaultError::Broken)?;
    let cipher = Aes256Gcm::new((&*key.0).into());
    let payload = Payload { msg: text, aad: &associated(context) };
    let plain = cipher.decrypt(nonce.into(), payload).map_err(|_| VaultError::Broken)?;
    Ok(Zeroizing::new(plain))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_sealed_opens_in_its_own_place_only() {
        let vault = Vault::new(Some([1; KEY_BYTES]), Vec::new());
        let (tenant, other) = (TenantId::generate(), TenantId::generate());
        let (key, wrapped) = vault.make(tenant).unwrap();
        let sealed = seal_secret(&key, tenant, "TOKEN", 3, b"hush").unwrap();
        assert_eq!(open_secret(&key, tenant, "TOKEN", 3, &sealed).unwrap().as_slice(), b"hush");
        assert_eq!(open_secret(&key, other, "TOKEN", 3, &sealed).unwrap_err(), VaultError::Broken);
        assert_eq!(open_secret(&key, tenant, "TOKEN2", 3, &sealed).unwrap_err(), VaultError::Broken);
        assert_eq!(open_secret(&key, tenant, "TOKEN", 4, &sealed).unwrap_err(), VaultError::Broken);
        // A data key moved to another tenant's row does not open either.
        assert_eq!(vault.unwrap(other, &wrapped).unwrap_err(), VaultError::Broken);
        let again = vault.unwrap(tenant, &wrapped).unwrap();
        assert_eq!(open_secret(&again, tenant, "TOKEN", 3, &sealed).unwrap().as_slice(), b"hush");
        assert!(!format!("{key:?}{vault:?}").contains("[1, 1"), "keys are not shown");
    }

    #[test]
    fn a_new_master_key_wraps_anew_and_the_old_one_opens_until_it_goes() {
        let (old, new) = ([1; KEY_BYTES], [2; KEY_BYTES]);
        let tenant = TenantId::generate();
        let (key, wrapped) = Vault::new(Some(old), Vec::new()).make(tenant).unwrap();
        let both = Vault::new(Some(new), vec![old]);
        let opened = both.unwrap(tenant, &wrapped).unwrap();
        assert_eq!(opened.0, key.0);
        let rewrapped = both.wrap(tenant, &opened).unwrap();
        assert_ne!(rewrapped.master, wrapped.master);
        let alone = Vault::new(Some(new), Vec::new());
        assert_eq!(alone.unwrap(tenant, &rewrapped).unwrap().0, key.0);
        assert_eq!(
            alone.unwrap(tenant, &wrapped).unwrap_err(),
            VaultError::UnknownMasterKey(wrapped.master.clone())
        );
        assert_eq!(Vault::default().unwrap(tenant, &wrapped).unwrap_err(), VaultError::NoMasterKey);
        assert_eq!(Vault::default().make(tenant).unwrap_err(), VaultError::NoMasterKey);
    }

    proptest! {
        #[test]
        fn a_changed_byte_anywhere_is_noticed(value in prop::collection::vec(any::<u8>(), 0..100), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let tenant = TenantId::generate();
            let (key, _) = Vault::new(Some([9; KEY_BYTES]), Vec::new()).make(tenant).unwrap();
            let mut sealed = seal_secret(&key, tenant, "A", 1, &value).unwrap();
            prop_assert!(value.len() < 4 || !sealed.windows(value.len()).any(|part| part == value));
            prop_assert_eq!(open_secret(&key, tenant, "A", 1, &sealed).unwrap().to_vec(), value);
            let at = at.index(sealed.len());
            sealed[at] ^= 1 << bit;
            prop_assert!(open_secret(&key, tenant, "A", 1, &sealed).is_err());
            sealed.truncate(at);
            prop_assert!(open_secret(&key, tenant, "A", 1, &sealed).is_err());
        }
    }
}
