//! API keys as rows. Stores hashes of keys, never keys, and never gives a hash to anybody but `identify`, which compares
//! it. Owns no rule about who may make which key (that is `app::key`).

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{Connection as _, Row};
use subtle::ConstantTimeEq;

use crate::domain::ids::{KeyId, TenantId, UserId};
use crate::domain::permission::{Role, Scope, UnknownRole, UnknownScope};
use crate::domain::quota::{Amount, Level, Quota};
use crate::store::quota::key_quotas_change;
use crate::store::tenant::{Actor, Identity};
use crate::store::{ApiStore, Error, Result, TenantConn, Tries};

/// A key as its row has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRow {
    /// Its id.
    pub id: KeyId,
    /// For people.
    pub name: String,
    /// Its first characters.
    pub prefix: String,
    /// What it may at most.
    pub role: Role,
    /// What it is narrowed to; empty: all that the role may.
    pub scopes: Vec<Scope>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// Who made it, for people.
    pub created_by: Option<String>,
    /// From when on it is refused.
    pub expires_at: Option<DateTime<Utc>>,
    /// Its last use, a minute or so late.
    pub last_used_at: Option<DateTime<Utc>>,
    /// The key that a rotation made in its place.
    pub replaced_by: Option<KeyId>,
    /// When it was revoked.
    pub revoked_at: Option<DateTime<Utc>>,
    /// The first key of the line of rotations that it belongs to.
    pub line: KeyId,
    /// Limits of what is submitted with it and the others of its line.
    pub quotas: Level,
    /// What is used of them, by everybody, in the window that began then.
    pub used: Vec<(Quota, u64, DateTime<Utc>)>,
}

/// Why a key was not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unwritten {
    /// The tenant has as many as it may.
    TooMany,
    /// As many lines of keys as may have limits have some.
    TooManyShares,
    /// There is none that is active.
    NotActive,
}

/// A key to be made.
#[derive(Debug)]
pub struct NewKey<'a> {
    /// Its id.
    pub id: KeyId,
    /// For people.
    pub name: &'a str,
    /// The first characters of the secret.
    pub prefix: &'a str,
    /// Hash of the secret.
    pub hash: [u8; 32],
    /// What it may at most.
    pub role: Role,
    /// What it is narrowed to.
    pub scopes: &'a [Scope],
    /// Who makes it, for people.
    pub created_by: &'a str,
    /// From when on it is refused.
    pub expires_at: Option<DateTime<Utc>>,
    /// Whose it is: it may what that person may.
    pub user: Option<UserId>,
    /// Limits of what is submitted with it.
    pub quotas: &'a [(Quota, Option<Amount>)],
}

/// What is to become of a key. `None`: stays.
#[derive(Debug, Default)]
pub struct KeyChange {
    /// For people.
    pub name: Option<String>,
    /// What it is narrowed to.
    pub scopes: Option<Vec<Scope>>,
    /// From when on it is refused; inside, `None`: never.
    pub expires_at: Option<Option<DateTime<Utc>>>,
    /// Limits of what is submitted with it and its line; inside, `None`: without.
    pub quotas: Vec<(Quota, Option<Amount>)>,
}

/// Which keys a list shows.
#[derive(Debug, Default)]
pub struct KeyFilter {
    /// Whose first characters begin with this.
    pub prefix: Option<String>,
    /// Also those that are revoked.
    pub revoked: bool,
    /// Older than this one.
    pub after: Option<KeyId>,
}

const COLUMNS: &str = "key_id, name, prefix, role, scopes, created_at, created_by, expires_at, last_used_at, replaced_by, revoked_at,
  COALESCE(line, key_id) AS line,
  (SELECT q.quotas FROM key_quotas q
   WHERE q.tenant_id = api_keys.tenant_id AND q.key_id = COALESCE(api_keys.line, api_keys.key_id)) AS quotas,
  (SELECT jsonb_agg(jsonb_build_array(w.quota, w.used, w.starts_at)) FROM quota_windows w
   WHERE w.tenant_id = api_keys.tenant_id AND w.task_id = COALESCE(api_keys.line, api_keys.key_id)) AS used";

fn words(scopes: &[Scope]) -> Vec<String> {
    scopes.iter().map(ToString::to_string).collect()
}

fn read_scopes(row: &PgRow) -> Result<Vec<Scope>> {
    let words: Vec<String> = row.try_get("scopes")?;
    words.iter().map(|w| w.parse().map_err(|e: UnknownScope| Error::Corrupt(e.to_string()))).collect()
}

fn read_role(row: &PgRow) -> Result<Role> {
    let role: &str = row.try_get("role")?;
    role.parse().map_err(|e: UnknownRole| Error::Corrupt(e.to_string()))
}

/// Which quota, how much of it is used, and since when.
type Window = (String, i64, DateTime<Utc>);

fn key(row: &PgRow) -> Result<KeyRow> {
    let used: Option<Json<Vec<Window>>> = row.try_get("used")?;
    let used = used.map(|json| json.0).unwrap_or_default();
    Ok(KeyRow {
        id: row.try_get("key_id")?,
        name: row.try_get("name")?,
        prefix: row.try_get("prefix")?,
        role: read_role(row)?,
        scopes: read_scopes(row)?,
        created_at: row.try_get("created_at")?,
        created_by: row.try_get("created_by")?,
        expires_at: row.try_get("expires_at")?,
        last_used_at: row.try_get("last_used_at")?,
        replaced_by: row.try_get("replaced_by")?,
        revoked_at: row.try_get("revoked_at")?,
        line: row.try_get("line")?,
        quotas: row.try_get::<Option<Value>, _>("quotas")?.as_ref().map(Level::from_json).unwrap_or_default(),
        used: used
            .into_iter()
            .filter_map(|(quota, used, began)| Some((quota.parse().ok()?, u64::try_from(used).ok()?, began)))
            .collect(),
    })
}

impl ApiStore {
    /// Who is behind the key with this hash, if anybody.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn identify(&self, hash: &[u8; 32]) -> Result<Option<Identity>> {
        let work = async {
            let mut tries = Tries::of(&self.pool);
            loop {
                let answer = sqlx::query("SELECT * FROM identify_key($1)")
                    .bind(hash.as_slice())
                    .fetch_optional(&self.pool)
                    .await;
                if let Some(answer) = tries.settle(answer) {
                    return answer;
                }
            }
        };
        let row = self.guard.call(work).await?;
        let Some(row) = row else { return Ok(None) };
        let stored: Vec<u8> = row.try_get("hash")?;
        if !bool::from(stored.as_slice().ct_eq(hash)) {
            return Ok(None);
        }
        Ok(Some(Identity {
            tenant: row.try_get("tenant_id")?,
            actor: Actor::Key(row.try_get("key_id")?),
            name: row.try_get::<String, _>("name")?.into(),
            role: read_role(&row)?,
            scopes: Arc::from(read_scopes(&row)?),
            expires_at: row.try_get("expires_at")?,
            active: row.try_get::<&str, _>("state")? == "active",
        }))
    }

    /// Write down when keys were last used.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn keys_used(&self, uses: &[(TenantId, KeyId, DateTime<Utc>)]) -> Result<()> {
        // In one order, so that two servers never wait for each other in a circle.
        let mut uses = uses.to_vec();
        uses.sort_unstable();
        let tenants: Vec<TenantId> = uses.iter().map(|u| u.0).collect();
        let keys: Vec<KeyId> = uses.iter().map(|u| u.1).collect();
        let at: Vec<DateTime<Utc>> = uses.iter().map(|u| u.2).collect();
        sqlx::query("SELECT keys_used($1, $2, $3)")
            .bind(tenants)
            .bind(keys)
            .bind(at)
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}

impl TenantConn {
    /// Keys, newest first.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn key_list(&mut self, filter: &KeyFilter, limit: i64) -> Result<Vec<KeyRow>> {
        // A prefix is base64url: it has no character that LIKE would read as a pattern but `_`.
        let like = filter.prefix.as_ref().map(|p| format!("{}%", p.replace('_', "\\_")));
        let rows = sqlx::query(&format!(
            "SELECT {COLUMNS} FROM api_keys
             WHERE tenant_id = $1 AND ($2::text IS NULL OR prefix LIKE $2) AND ($3 OR revoked_at IS NULL)
               AND ($4::uuid IS NULL OR key_id < $4)
             ORDER BY key_id DESC LIMIT $5"
        ))
        .bind(self.tenant())
        .bind(like)
        .bind(filter.revoked)
        .bind(filter.after)
        .bind(limit)
        .fetch_all(&mut **self)
        .await?;
        rows.iter().map(key).collect()
    }

    /// One key.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn key_get(&mut self, id: KeyId) -> Result<Option<KeyRow>> {
        let row =
            sqlx::query(&format!("SELECT {COLUMNS} FROM api_keys WHERE tenant_id = $1 AND key_id = $2"))
                .bind(self.tenant())
                .bind(id)
                .fetch_optional(&mut **self)
                .await?;
        row.as_ref().map(key).transpose()
    }

    /// Make a key, unless the tenant has `max` that are not revoked. Several at the same moment may pass it by as many.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn key_create(
        &mut self,
        new: &NewKey<'_>,
        max: i64,
    ) -> Result<std::result::Result<KeyRow, Unwritten>> {
        let tenant = self.tenant();
        let mut transaction = self.begin().await?;
        let row = sqlx::query(&format!(
            "INSERT INTO api_keys (tenant_id, key_id, prefix, hash, role, name, scopes, created_by, expires_at, user_id)
             SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $11
             WHERE (SELECT count(*) FROM api_keys WHERE tenant_id = $1 AND revoked_at IS NULL) < $10
             RETURNING {COLUMNS}"
        ))
        .bind(tenant)
        .bind(new.id)
        .bind(new.prefix)
        .bind(new.hash.as_slice())
        .bind(new.role.as_str())
        .bind(new.name)
        .bind(words(new.scopes))
        .bind(new.created_by)
        .bind(new.expires_at)
        .bind(max)
        .bind(new.user)
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(row) = row else { return Ok(Err(Unwritten::TooMany)) };
        let mut made = key(&row)?;
        if !new.quotas.is_empty() {
            if !key_quotas_change(&mut transaction, tenant, new.id, new.quotas).await? {
                return Ok(Err(Unwritten::TooManyShares));
            }
            for (quota, amount) in new.quotas {
                made.quotas.set(*quota, *amount).map_err(Error::Corrupt)?;
            }
        }
        transaction.commit().await?;
        Ok(Ok(made))
    }

    /// Change a key that is not revoked.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn key_change(
        &mut self,
        id: KeyId,
        change: &KeyChange,
    ) -> Result<std::result::Result<KeyRow, Unwritten>> {
        let tenant = self.tenant();
        let mut transaction = self.begin().await?;
        if !change.quotas.is_empty() {
            let line: Option<KeyId> = sqlx::query_scalar(
                "SELECT COALESCE(line, key_id) FROM api_keys WHERE tenant_id = $1 AND key_id = $2 AND revoked_at IS NULL",
            )
            .bind(tenant)
            .bind(id)
            .fetch_optional(&mut *transaction)
            .await?;
            let Some(line) = line else { return Ok(Err(Unwritten::NotActive)) };
            if !key_quotas_change(&mut transaction, tenant, line, &change.quotas).await? {
                return Ok(Err(Unwritten::TooManyShares));
            }
        }
        let row = sqlx::query(&format!(
            "UPDATE api_keys SET name = COALESCE($3, name), scopes = COALESCE($4, scopes),
               expires_at = CASE WHEN $5 THEN $6 ELSE expires_at END
             WHERE tenant_id = $1 AND key_id = $2 AND revoked_at IS NULL RETURNING {COLUMNS}"
        ))
        .bind(tenant)
        .bind(id)
        .bind(change.name.as_deref())
        .bind(change.scopes.as_deref().map(words))
        .bind(change.expires_at.is_some())
        .bind(change.expires_at.flatten())
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(row) = row else { return Ok(Err(Unwritten::NotActive)) };
        let changed = key(&row)?;
        transaction.commit().await?;
        Ok(Ok(changed))
    }

    /// Revoke a key; `None` when there is none. One that was revoked stays as it was.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn key_revoke(&mut self, id: KeyId) -> Result<Option<KeyRow>> {
        let row = sqlx::query(&format!(
            "UPDATE api_keys SET revoked_at = COALESCE(revoked_at, clock_timestamp())
             WHERE tenant_id = $1 AND key_id = $2 RETURNING {COLUMNS}"
        ))
        .bind(self.tenant())
        .bind(id)
        .fetch_optional(&mut **self)
        .await?;
        row.as_ref().map(key).transpose()
    }

    /// Revoke a key that a person made for itself. False: it is none of those, or is revoked already.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn key_end_own(&mut self, id: KeyId) -> Result<bool> {
        let done = sqlx::query(
            "UPDATE api_keys SET revoked_at = clock_timestamp()
             WHERE tenant_id = $1 AND key_id = $2 AND user_id IS NOT NULL AND revoked_at IS NULL",
        )
        .bind(self.tenant())
        .bind(id)
        .execute(&mut **self)
        .await?;
        Ok(done.rows_affected() > 0)
    }

    /// Put a new key in the place of one that is active; the old one ends at `old_ends` at the latest. `None`: it is not
    /// active, or was replaced before.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn key_rotate(
        &mut self,
        old: KeyId,
        new: &NewKey<'_>,
        old_ends: DateTime<Utc>,
    ) -> Result<Option<KeyRow>> {
        let row = sqlx::query(&format!(
            "WITH old AS (
               UPDATE api_keys SET replaced_by = $2, expires_at = LEAST(expires_at, $10)
               WHERE tenant_id = $1 AND key_id = $11 AND revoked_at IS NULL AND replaced_by IS NULL
                 AND (expires_at IS NULL OR expires_at > clock_timestamp())
               RETURNING user_id, COALESCE(line, key_id) AS first)
             INSERT INTO api_keys (tenant_id, key_id, prefix, hash, role, name, scopes, created_by, expires_at, user_id, line)
             SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, old.user_id, old.first FROM old
             RETURNING {COLUMNS}"
        ))
        .bind(self.tenant())
        .bind(new.id)
        .bind(new.prefix)
        .bind(new.hash.as_slice())
        .bind(new.role.as_str())
        .bind(new.name)
        .bind(words(new.scopes))
        .bind(new.created_by)
        .bind(new.expires_at)
        .bind(old_ends)
        .bind(old)
        .fetch_optional(&mut **self)
        .await?;
        row.as_ref().map(key).transpose()
    }

    /// Name of this session's tenant.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn tenant_name(&mut self) -> Result<Option<String>> {
        Ok(sqlx::query_scalar("SELECT name FROM tenants WHERE tenant_id = $1")
            .bind(self.tenant())
            .fetch_optional(&mut **self)
            .await?)
    }

    /// Name of the task that an invocation belongs to.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invocation_task(&mut self, id: crate::domain::ids::InvocationId) -> Result<Option<String>> {
        Ok(sqlx::query_scalar(
            "SELECT t.name FROM invocations i JOIN tasks t USING (tenant_id, task_id)
             WHERE i.tenant_id = $1 AND i.invocation_id = $2",
        )
        .bind(self.tenant())
        .bind(id)
        .fetch_optional(&mut **self)
        .await?)
    }
}
