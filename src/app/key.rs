//! API keys: making, changing, rotating and revoking them. Owns what a key is made of and who may make which; nobody can
//! give away more than they have. A key is shown once, when it is made; afterwards only its first characters.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};

use crate::app::quota::{self, Change};
use crate::app::task::page;
use crate::app::{App, Error, FieldError, Result, audit};
use crate::domain::ids::{KeyId, TenantId};
use crate::domain::permission::{Role, Scope};
use crate::domain::quota::Quota;
use crate::store::key::{KeyChange, KeyFilter, KeyRow, NewKey, Unwritten};
use crate::store::quota::MAX_KEY_SHARES;
use crate::store::tenant::{Actor, Identity, key_hash};

/// Keys of a tenant that are not revoked.
pub const MAX_KEYS: i64 = 10_000;
/// Scopes of a key.
const MAX_SCOPES: usize = 64;
/// Characters of a key that are shown.
const SHOWN: usize = 12;
/// Bytes of a key's name.
const MAX_NAME: usize = 200;
/// How long a rotated key goes on working: when nobody says, and at most.
pub const OVERLAP: (TimeDelta, TimeDelta) = (TimeDelta::days(1), TimeDelta::days(30));
/// How long a person's own key works.
const OWN_KEY: TimeDelta = TimeDelta::days(90);
/// Furthest expiry.
const MAX_LIFE: TimeDelta = TimeDelta::days(3_660);

/// A key to be made, as asked for.
#[derive(Debug)]
pub struct Wanted {
    /// For people.
    pub name: String,
    /// What it may at most.
    pub role: Role,
    /// What it is narrowed to.
    pub scopes: Vec<Scope>,
    /// From when on it is refused.
    pub expires_at: Option<DateTime<Utc>>,
    /// Limits of what is submitted with it.
    pub quotas: Vec<Change>,
}

/// A key that was made, and the secret, which nobody sees again.
#[derive(Debug)]
pub struct Made {
    /// The row.
    pub row: KeyRow,
    /// The key itself.
    pub secret: String,
}

/// 256 random bits after a prefix by which scanners of leaked secrets know it.
fn new_secret() -> String {
    let random: [u8; 32] = rand::random();
    format!("sbk_{}", URL_SAFE_NO_PAD.encode(random))
}

fn invalid(pointer: &str, detail: impl Into<String>) -> Error {
    Error::InvalidFields(vec![FieldError::new(pointer, detail)])
}

/// A name as people may choose it.
fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        return Err(invalid("/name", "must be 1 to 200 bytes without control characters"));
    }
    Ok(())
}

fn check_expiry(at: Option<DateTime<Utc>>) -> Result<()> {
    let now = Utc::now();
    if at.is_some_and(|at| at <= now || at > now + MAX_LIFE) {
        return Err(invalid("/expires_at", "must be ahead, and at most 10 years"));
    }
    Ok(())
}

/// Refuse what the caller does not have itself.
fn check_grant(caller: &Identity, role: Role, scopes: &[Scope]) -> Result<()> {
    if scopes.len() > MAX_SCOPES {
        return Err(invalid("/scopes", "may be at most 64"));
    }
    if !caller.role.includes(role) {
        return Err(invalid(
            "/role",
            format!("a `{}` cannot make a key with the role `{}`", caller.role.as_str(), role.as_str()),
        ));
    }
    if !caller.permits().includes(role, scopes) {
        return Err(invalid("/scopes", "must lie within the scopes of the key that makes it"));
    }
    Ok(())
}

/// What a key may, for the audit log.
fn settings(key: &KeyRow) -> Value {
    let scopes: Vec<String> = key.scopes.iter().map(ToString::to_string).collect();
    json!({
        "id": key.id, "name": key.name, "prefix": key.prefix, "role": key.role.as_str(), "scopes": scopes,
        "expires_at": key.expires_at, "quotas": key.quotas.to_json(),
    })
}

impl From<Unwritten> for Error {
    fn from(why: Unwritten) -> Self {
        match why {
            Unwritten::TooMany => Self::TooManyKeys,
            Unwritten::TooManyShares => quota::full("key_shares", MAX_KEY_SHARES),
            Unwritten::NotActive => Self::KeyNotActive,
        }
    }
}

impl App {
    /// Keys, newest first, and whether there are more.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn keys(
        &self,
        tenant: TenantId,
        filter: &KeyFilter,
        limit: u16,
    ) -> Result<(Vec<KeyRow>, bool)> {
        let rows = self.tenant(tenant).await?.key_list(filter, i64::from(limit) + 1).await?;
        Ok(page(rows, limit))
    }

    /// One key.
    ///
    /// # Errors
    /// It is not this tenant's.
    pub async fn key(&self, tenant: TenantId, id: KeyId) -> Result<KeyRow> {
        self.tenant(tenant).await?.key_get(id).await?.ok_or(Error::KeyNotFound(id))
    }

    /// Make a key.
    ///
    /// # Errors
    /// It would have more than its maker, a value is out of range, or the tenant has too many.
    pub async fn make_key(&self, caller: &Identity, wanted: &Wanted) -> Result<Made> {
        check_name(&wanted.name)?;
        check_expiry(wanted.expires_at)?;
        check_grant(caller, wanted.role, &wanted.scopes)?;
        quota::check(&wanted.quotas, Quota::of_keys)?;
        let secret = new_secret();
        let by = caller.label();
        let new = NewKey {
            id: KeyId::generate(),
            name: &wanted.name,
            prefix: &secret[..SHOWN],
            hash: key_hash(&secret),
            role: wanted.role,
            scopes: &wanted.scopes,
            created_by: &by,
            expires_at: wanted.expires_at,
            user: None,
            quotas: &wanted.quotas,
        };
        let row = self.tenant(caller.tenant).await?.key_create(&new, MAX_KEYS).await??;
        if !wanted.quotas.is_empty() {
            self.forget(caller.tenant);
        }
        audit::changed(Value::Null, settings(&row));
        Ok(Made { row, secret })
    }

    /// Make a key for the person who logged in, which may what the person may: for a command line, that has no browser.
    ///
    /// # Errors
    /// The caller is no user, or has too many.
    pub async fn make_own_key(&self, caller: &Identity, name: &str) -> Result<Made> {
        let Actor::User(user, _) = caller.actor else { return Err(Error::NoUser) };
        check_name(name)?;
        let secret = new_secret();
        let by = caller.label();
        let new = NewKey {
            id: KeyId::generate(),
            name,
            prefix: &secret[..SHOWN],
            hash: key_hash(&secret),
            role: caller.role,
            scopes: &[],
            created_by: &by,
            expires_at: Some(Utc::now() + OWN_KEY),
            user: Some(user),
            quotas: &[],
        };
        let row = self.tenant(caller.tenant).await?.key_create(&new, MAX_KEYS).await??;
        audit::changed(Value::Null, settings(&row));
        Ok(Made { row, secret })
    }

    /// Change a key's name, scopes or expiry, or the limits of its line.
    ///
    /// # Errors
    /// It is not this tenant's, is revoked, has more than the caller, or would get more.
    pub async fn change_key(&self, caller: &Identity, id: KeyId, change: &KeyChange) -> Result<KeyRow> {
        if let Some(name) = &change.name {
            check_name(name)?;
        }
        check_expiry(change.expires_at.flatten())?;
        quota::check(&change.quotas, Quota::of_keys)?;
        let mut connection = self.tenant(caller.tenant).await?;
        let old = connection.key_get(id).await?.ok_or(Error::KeyNotFound(id))?;
        check_grant(caller, old.role, &old.scopes)?;
        check_grant(caller, old.role, change.scopes.as_deref().unwrap_or(&old.scopes))?;
        let changed = connection.key_change(id, change).await??;
        self.inner.keys.forget(id);
        if !change.quotas.is_empty() || !changed.quotas.is_empty() {
            self.forget(caller.tenant);
        }
        audit::changed(settings(&old), settings(&changed));
        Ok(changed)
    }

    /// Revoke a key. Here it stops at once, on other servers within five seconds.
    ///
    /// # Errors
    /// It is not this tenant's, or has more than the caller.
    pub async fn revoke_key(&self, caller: &Identity, id: KeyId) -> Result<()> {
        let mut connection = self.tenant(caller.tenant).await?;
        let old = connection.key_get(id).await?.ok_or(Error::KeyNotFound(id))?;
        check_grant(caller, old.role, &old.scopes)?;
        connection.key_revoke(id).await?.ok_or(Error::KeyNotFound(id))?;
        self.inner.keys.forget(id);
        audit::changed(settings(&old), Value::Null);
        Ok(())
    }

    /// Make a key in the place of another, which goes on working for `overlap`. An expiry that nobody names is as far
    /// ahead as the old key's was when it was made.
    ///
    /// # Errors
    /// It is not this tenant's, is not active, was rotated before, or has more than the caller.
    pub async fn rotate_key(
        &self,
        caller: &Identity,
        id: KeyId,
        overlap: Option<TimeDelta>,
        expires_at: Option<DateTime<Utc>>,
    ) -> Result<Made> {
        let overlap = overlap.unwrap_or(OVERLAP.0);
        if overlap < TimeDelta::zero() || overlap > OVERLAP.1 {
            return Err(invalid("/overlap_s", "must be from 0 to 2592000 (30 days)"));
        }
        check_expiry(expires_at)?;
        let mut connection = self.tenant(caller.tenant).await?;
        let old = connection.key_get(id).await?.ok_or(Error::KeyNotFound(id))?;
        check_grant(caller, old.role, &old.scopes)?;
        let now = Utc::now();
        let secret = new_secret();
        let by = caller.label();
        let new = NewKey {
            id: KeyId::generate(),
            name: &old.name,
            prefix: &secret[..SHOWN],
            hash: key_hash(&secret),
            role: old.role,
            scopes: &old.scopes,
            created_by: &by,
            expires_at: expires_at.or_else(|| old.expires_at.map(|at| now + (at - old.created_at))),
            user: None, // the old one's, as are the limits
            quotas: &[],
        };
        let made = connection.key_rotate(id, &new, now + overlap).await?;
        self.inner.keys.forget(id);
        let row = made.ok_or(Error::KeyNotActive)?;
        if !row.quotas.is_empty() {
            // The new one counts from its first use on.
            self.forget(caller.tenant);
        }
        audit::changed(settings(&old), settings(&row));
        Ok(Made { row, secret })
    }

    /// Name of a tenant.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn tenant_name(&self, tenant: TenantId) -> Result<String> {
        Ok(self.tenant(tenant).await?.tenant_name().await?.unwrap_or_default())
    }
}
