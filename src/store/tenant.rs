//! Tenants and their API keys. Stores hashes of keys, never keys.

use anyhow::Context;
use sha2::{Digest, Sha256};
use sqlx::{Connection, PgConnection, Row};

use crate::domain::ids::{KeyId, TenantId};
use crate::domain::role::{Role, UnknownRole};
use crate::store::{ApiStore, Error, Result, TenantConn, Tries};

/// Who a request comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Whose data it may see.
    pub tenant: TenantId,
    /// The key it used.
    pub key: KeyId,
    /// What the key was made for.
    pub role: Role,
}

/// Hash under which a key is stored. The key is 256 random bits, so a plain hash is enough: there is nothing to guess.
#[must_use]
pub fn key_hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

impl ApiStore {
    /// Who is behind the key with this hash, if anybody.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn authenticate(&self, hash: &[u8; 32]) -> Result<Option<Identity>> {
        let work = async {
            let mut tries = Tries::of(&self.pool);
            loop {
                let answer = sqlx::query("SELECT tenant_id, key_id, role FROM authenticate_key($1)")
                    .bind(hash.as_slice())
                    .fetch_optional(&self.pool)
                    .await;
                if let Some(answer) = tries.settle(answer) {
                    return answer;
                }
            }
        };
        let row = self.guard.call(work).await?;
        row.map(|row| {
            let role: &str = row.try_get("role")?;
            Ok(Identity {
                tenant: row.try_get("tenant_id")?,
                key: row.try_get("key_id")?,
                role: role.parse().map_err(|e: UnknownRole| Error::Corrupt(e.to_string()))?,
            })
        })
        .transpose()
    }
}

impl TenantConn {
    /// How many of this tenant's invocations wait, counted up to its limit and one more, and that limit: its own, or
    /// `default`.
    ///
    /// # Errors
    /// Postgres does not answer in time.
    pub async fn queue_depth(&mut self, default: u64) -> Result<(u64, u64)> {
        let tenant = self.tenant();
        let (counted, limit): (i64, i64) = sqlx::query_as(
            "WITH most AS MATERIALIZED (SELECT COALESCE(max_queued, $2) AS n FROM tenants WHERE tenant_id = $1)
             SELECT (SELECT count(*) FROM (
                 (SELECT 1 FROM queued q WHERE q.tenant_id = $1 LIMIT (SELECT n + 1 FROM most))
                 UNION ALL
                 (SELECT 1 FROM scheduled s WHERE s.tenant_id = $1 LIMIT (SELECT n + 1 FROM most))) w),
               (SELECT n FROM most)",
        )
        .bind(tenant)
        .bind(i64::try_from(default).unwrap_or(i64::MAX))
        .fetch_one(&mut **self)
        .await?;
        Ok((counted.unsigned_abs(), limit.unsigned_abs()))
    }
}

/// Make sure that the tenant `default` exists and that `key` is a key of it with the platform's role. As the owner of the
/// schema.
///
/// # Errors
/// Postgres does not answer.
pub async fn bootstrap(admin_url: &str, key: &str) -> anyhow::Result<()> {
    let options =
        admin_url.parse::<sqlx::postgres::PgConnectOptions>()?.options([("search_path", "sandbar")]);
    let mut connection = PgConnection::connect_with(&options).await.context("cannot connect to Postgres")?;
    sqlx::query("INSERT INTO tenants (tenant_id, name) VALUES ($1, 'default') ON CONFLICT (name) DO NOTHING")
        .bind(TenantId::generate())
        .execute(&mut connection)
        .await?;
    sqlx::query(
        "INSERT INTO api_keys (tenant_id, key_id, prefix, hash, role)
         SELECT tenant_id, $1, left($2, 12), $3, 'platform' FROM tenants WHERE name = 'default'
         ON CONFLICT (hash) DO UPDATE SET role = 'platform' WHERE api_keys.role = 'admin'",
    )
    .bind(KeyId::generate())
    .bind(key)
    .bind(key_hash(key).as_slice())
    .execute(&mut connection)
    .await?;
    connection.close().await?;
    Ok(())
}

/// Whether the installation has any key yet. As the owner of the schema.
///
/// # Errors
/// Postgres does not answer.
pub async fn has_keys(admin_url: &str) -> anyhow::Result<bool> {
    let options =
        admin_url.parse::<sqlx::postgres::PgConnectOptions>()?.options([("search_path", "sandbar")]);
    let mut connection = PgConnection::connect_with(&options).await.context("cannot connect to Postgres")?;
    let any = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM api_keys WHERE revoked_at IS NULL)")
        .fetch_one(&mut connection)
        .await?;
    connection.close().await?;
    Ok(any)
}
