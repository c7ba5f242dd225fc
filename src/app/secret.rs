//! Secrets of tenants: set, listed, deleted, and opened for attempts that were granted them. The value goes in and never
//! comes out again through the API.

use std::sync::Arc;

use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::app::invoke::invalid;
use crate::app::vault::{self, Vault, VaultError, Wrapped};
use crate::app::{App, Error, Result, audit};
use crate::domain::ids::TenantId;
use crate::store::WorkerStore;
use crate::store::secret::{SealedSecret, SecretRow};

/// Secrets of one tenant.
pub const MAX_SECRETS: i64 = 1_000;
/// Bytes of a value: a certificate chain with its key fits.
pub const MAX_VALUE_BYTES: usize = 64 << 10;
/// Versions that are kept: an attempt that runs may still use the last one.
const KEPT_VERSIONS: i32 = 10;
/// Data keys that are wrapped anew between two looks for more.
const REWRAP_AT_ONCE: i64 = 200;

impl From<VaultError> for Error {
    fn from(error: VaultError) -> Self {
        match error {
            VaultError::NoMasterKey => Self::SecretsUnavailable,
            other => Self::Unreadable(other),
        }
    }
}

/// Whether this may name a secret: letters, digits and `_`, no digit first, as modules name them.
#[must_use]
pub fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !name.starts_with(|c: char| c.is_ascii_digit())
}

impl App {
    /// This tenant's secrets, without their values.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn secrets(&self, tenant: TenantId) -> Result<Vec<SecretRow>> {
        Ok(self.tenant(tenant).await?.secrets().await?)
    }

    /// One secret, without its value.
    ///
    /// # Errors
    /// There is none; or Postgres does not answer.
    pub async fn secret(&self, tenant: TenantId, name: &str) -> Result<SecretRow> {
        let found = self.tenant(tenant).await?.secret(name).await?;
        found.ok_or_else(|| not_found(name))
    }

    /// Set a secret: a new version, which is the current one from now on.
    ///
    /// # Errors
    /// [`Error::InvalidFields`]; [`Error::OverQuota`]; [`Error::SecretsUnavailable`]; or Postgres does not answer.
    pub async fn set_secret(
        &self,
        tenant: TenantId,
        name: &str,
        value: &Zeroizing<Vec<u8>>,
    ) -> Result<SecretRow> {
        if !is_name(name) {
            return Err(invalid(
                "",
                "the name of a secret has 1 to 64 letters, digits and `_`, and no digit first",
            ));
        }
        if value.is_empty() || value.len() > MAX_VALUE_BYTES {
            return Err(invalid("/value", format!("must have 1 to {MAX_VALUE_BYTES} bytes")));
        }
        let mut connection = self.tenant(tenant).await?;
        let key = self.data_key(tenant, &mut connection).await?;
        let seal =
            |version| -> Result<Vec<u8>> { Ok(vault::seal_secret(&key, tenant, name, version, value)?) };
        let set = connection.secret_put(name, MAX_SECRETS, KEPT_VERSIONS, seal).await?;
        let limit = MAX_SECRETS.unsigned_abs();
        let row = set.ok_or(Error::OverQuota { name: "secrets", limit, wanted: limit + 1 })?;
        audit::changed(Value::Null, json!({"name": row.name, "version": row.version}));
        Ok(row)
    }

    /// Delete a secret with all its versions.
    ///
    /// # Errors
    /// There is none; or Postgres does not answer.
    pub async fn delete_secret(&self, tenant: TenantId, name: &str) -> Result<()> {
        if !self.tenant(tenant).await?.secret_delete(name).await? {
            return Err(not_found(name));
        }
        audit::changed(json!({"name": name}), Value::Null);
        Ok(())
    }
}

fn not_found(name: &str) -> Error {
    Error::SecretNotFound(name.chars().take(64).collect())
}

/// The values of secrets that an attempt was granted, by name. For workers.
///
/// # Errors
/// A secret does not open: the master key is missing, or somebody changed a row.
pub fn open(
    vault: &Vault,
    tenant: TenantId,
    sealed: &[SealedSecret],
) -> Result<Vec<(String, Zeroizing<Vec<u8>>)>> {
    sealed
        .iter()
        .map(|secret| {
            let (master, bytes) = secret.key.clone();
            let key = vault.unwrap(tenant, &Wrapped { master, bytes })?;
            let value = vault::open_secret(&key, tenant, &secret.name, secret.version, &secret.sealed)?;
            Ok((secret.name.clone(), value))
        })
        .collect()
}

/// Wrap every data key and every signing key by the current master key that another one wraps. While everything runs; can
/// be repeated. Returns how many.
///
/// # Errors
/// No master key, or one that is needed is missing; or Postgres does not answer.
pub async fn rewrap(store: &WorkerStore, vault: &Arc<Vault>) -> Result<u64> {
    let current = vault.current().ok_or(Error::SecretsUnavailable)?.to_owned();
    let (mut done, mut after) = (0, None);
    for (kid, bytes, master) in store.issuer_keys_to_rewrap(&current).await? {
        let seed = vault.unwrap_seed(&kid, &Wrapped { master, bytes: bytes.clone() })?;
        let wrapped = vault.wrap_seed(&kid, &seed)?;
        let new = (wrapped.bytes.as_slice(), wrapped.master.as_str());
        done += u64::from(store.issuer_key_rewrap(&kid, &bytes, new).await?);
    }
    loop {
        let some = store.keys_to_rewrap(&current, after, REWRAP_AT_ONCE).await?;
        let Some((last, _, _)) = some.last() else { return Ok(done) };
        after = Some(*last);
        for (tenant, master, bytes) in &some {
            let key = vault.unwrap(*tenant, &Wrapped { master: master.clone(), bytes: bytes.clone() })?;
            let wrapped = vault.wrap(*tenant, &key)?;
            done += u64::from(store.key_rewrap(*tenant, bytes, &(wrapped.master, wrapped.bytes)).await?);
        }
    }
}
