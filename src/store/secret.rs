//! Secrets as rows: names, versions, sealed values, wrapped keys. Never sees a value or a key in the clear.

use chrono::{DateTime, Utc};
use sqlx::Row;
use sqlx::postgres::PgRow;
use sqlx::{Connection as _, PgConnection};

use crate::domain::ids::{InvocationId, TenantId};
use crate::store::{ApiStore, Result, TenantConn, WorkerStore, quota};

/// A secret, without its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretRow {
    /// Its name.
    pub name: String,
    /// The current version.
    pub version: i32,
    /// When it was first set.
    pub created_at: DateTime<Utc>,
    /// When it was last set.
    pub updated_at: DateTime<Utc>,
}

/// A data key as it is stored: fingerprint of its master key, and the key, wrapped.
pub type WrappedRow = (String, Vec<u8>);

/// A value as it is stored, with what it takes to open it.
#[derive(Debug, Clone)]
pub struct SealedSecret {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: i32,
    /// The value.
    pub sealed: Vec<u8>,
    /// The tenant's data key.
    pub key: WrappedRow,
}

fn secret(row: &PgRow) -> Result<SecretRow> {
    Ok(SecretRow {
        name: row.try_get("name")?,
        version: row.try_get("version")?,
        created_at: row.try_get("created_at")?,
        updated_at: row.try_get("updated_at")?,
    })
}

async fn data_key(connection: &mut PgConnection, tenant: TenantId) -> Result<Option<WrappedRow>> {
    Ok(sqlx::query_as("SELECT master, wrapped FROM tenant_keys WHERE tenant_id = $1")
        .bind(tenant)
        .fetch_optional(connection)
        .await?)
}

/// What there is to erase of a tenant's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyErased {
    /// Key and secrets are gone.
    Done,
    /// The tenant is active.
    Active,
    /// There is no such tenant.
    Unknown,
}

impl ApiStore {
    /// Erase the data key of a tenant that is not active, with the secrets that it seals. For the platform.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn erase_tenant_key(&self, tenant: TenantId) -> Result<KeyErased> {
        let word: String =
            sqlx::query_scalar("SELECT erase_tenant_key($1)").bind(tenant).fetch_one(&self.pool).await?;
        Ok(match word.as_str() {
            "erased" => KeyErased::Done,
            "active" => KeyErased::Active,
            _ => KeyErased::Unknown,
        })
    }
}

impl TenantConn {
    /// Whether this tenant wants its payloads sealed from now on.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn seal_payloads(&mut self, seal: bool) -> Result<()> {
        let tenant = self.tenant();
        sqlx::query("UPDATE tenants SET seal_payloads = $2 WHERE tenant_id = $1")
            .bind(tenant)
            .bind(seal)
            .execute(&mut **self)
            .await?;
        Ok(())
    }

    /// The request of an idempotency key that is remembered: its digest and its invocation.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn request_of(&mut self, key: &str) -> Result<Option<(Vec<u8>, InvocationId)>> {
        let tenant = self.tenant();
        Ok(sqlx::query_as(
            "SELECT fingerprint, invocation_id FROM idempotency_keys
             WHERE tenant_id = $1 AND key = $2 AND expires_at > clock_timestamp()",
        )
        .bind(tenant)
        .bind(key)
        .fetch_optional(&mut **self)
        .await?)
    }

    /// This tenant's data key, if it has one.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn data_key(&mut self) -> Result<Option<WrappedRow>> {
        let tenant = self.tenant();
        data_key(self, tenant).await
    }

    /// Let this be the tenant's data key, unless somebody was quicker; the one that it has then.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn data_key_put(&mut self, (master, wrapped): &WrappedRow) -> Result<WrappedRow> {
        let tenant = self.tenant();
        sqlx::query(
            "INSERT INTO tenant_keys (tenant_id, master, wrapped) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        )
        .bind(tenant)
        .bind(master)
        .bind(wrapped)
        .execute(&mut **self)
        .await?;
        Ok(data_key(self, tenant).await?.unwrap_or_else(|| (master.clone(), wrapped.clone())))
    }

    /// This tenant's secrets, by name.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn secrets(&mut self) -> Result<Vec<SecretRow>> {
        let tenant = self.tenant();
        let rows = sqlx::query("SELECT * FROM secrets WHERE tenant_id = $1 ORDER BY name")
            .bind(tenant)
            .fetch_all(&mut **self)
            .await?;
        rows.iter().map(secret).collect()
    }

    /// One secret.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn secret(&mut self, name: &str) -> Result<Option<SecretRow>> {
        let tenant = self.tenant();
        let row = sqlx::query("SELECT * FROM secrets WHERE tenant_id = $1 AND name = $2")
            .bind(tenant)
            .bind(name)
            .fetch_optional(&mut **self)
            .await?;
        row.as_ref().map(secret).transpose()
    }

    /// Set a secret: `seal` is given the number of the new version. Keeps the `kept` newest versions. `None`: the tenant
    /// has `most` secrets already.
    ///
    /// # Errors
    /// Postgres does not answer, or `seal` fails.
    pub async fn secret_put<E: From<crate::store::Error>>(
        &mut self,
        name: &str,
        most: i64,
        kept: i32,
        seal: impl FnOnce(i32) -> std::result::Result<Vec<u8>, E>,
    ) -> std::result::Result<Option<SecretRow>, E> {
        let tenant = self.tenant();
        let mut transaction = self.begin().await.map_err(crate::store::Error::from)?;
        let work = async |transaction: &mut PgConnection| -> Result<Option<SecretRow>> {
            quota::one_at_a_time(transaction, tenant).await?;
            let row = sqlx::query(
                "INSERT INTO secrets AS s (tenant_id, name, version)
                 SELECT $1, $2, 1 WHERE EXISTS (SELECT 1 FROM secrets WHERE tenant_id = $1 AND name = $2)
                   OR (SELECT count(*) FROM secrets WHERE tenant_id = $1) < $3
                 ON CONFLICT (tenant_id, name) DO UPDATE SET version = s.version + 1, updated_at = clock_timestamp()
                 RETURNING *",
            )
            .bind(tenant)
            .bind(name)
            .bind(most)
            .fetch_optional(transaction)
            .await?;
            row.as_ref().map(secret).transpose()
        };
        let Some(row) = work(&mut *transaction).await? else { return Ok(None) };
        let sealed = seal(row.version)?;
        let rest = async |transaction: &mut PgConnection| -> Result<()> {
            sqlx::query(
                "INSERT INTO secret_versions (tenant_id, name, version, sealed) VALUES ($1, $2, $3, $4)",
            )
            .bind(tenant)
            .bind(name)
            .bind(row.version)
            .bind(&sealed)
            .execute(&mut *transaction)
            .await?;
            sqlx::query("DELETE FROM secret_versions WHERE tenant_id = $1 AND name = $2 AND version <= $3")
                .bind(tenant)
                .bind(name)
                .bind(row.version.saturating_sub(kept))
                .execute(transaction)
                .await?;
            Ok(())
        };
        rest(&mut *transaction).await?;
        transaction.commit().await.map_err(crate::store::Error::from)?;
        Ok(Some(row))
    }

    /// Delete a secret with all its versions. False: there was none.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn secret_delete(&mut self, name: &str) -> Result<bool> {
        let tenant = self.tenant();
        let done = sqlx::query("DELETE FROM secrets WHERE tenant_id = $1 AND name = $2")
            .bind(tenant)
            .bind(name)
            .execute(&mut **self)
            .await?;
        Ok(done.rows_affected() > 0)
    }
}

impl WorkerStore {
    /// The current versions of these secrets of a tenant; those that are not there are left out.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn sealed_secrets(&self, tenant: TenantId, names: &[String]) -> Result<Vec<SealedSecret>> {
        let rows = sqlx::query(
            "SELECT s.name, s.version, v.sealed, k.master, k.wrapped
             FROM secrets s JOIN secret_versions v USING (tenant_id, name, version) JOIN tenant_keys k USING (tenant_id)
             WHERE s.tenant_id = $1 AND s.name = ANY ($2)",
        )
        .bind(tenant)
        .bind(names)
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| {
                Ok(SealedSecret {
                    name: row.try_get("name")?,
                    version: row.try_get("version")?,
                    sealed: row.try_get("sealed")?,
                    key: (row.try_get("master")?, row.try_get("wrapped")?),
                })
            })
            .collect()
    }

    /// Whether these tenants want their payloads sealed, and the data keys of those that have one.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn data_keys(
        &self,
        tenants: &[TenantId],
    ) -> Result<Vec<(TenantId, (bool, Option<WrappedRow>))>> {
        let rows = sqlx::query(
            "SELECT t.tenant_id, t.seal_payloads, k.master, k.wrapped
             FROM tenants t LEFT JOIN tenant_keys k USING (tenant_id) WHERE t.tenant_id = ANY ($1)",
        )
        .bind(tenants)
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| {
                let master: Option<String> = row.try_get("master")?;
                let key = master.zip(row.try_get("wrapped")?);
                Ok((row.try_get("tenant_id")?, (row.try_get("seal_payloads")?, key)))
            })
            .collect()
    }

    /// Let this be the tenant's data key, unless somebody was quicker. False: it has none, for it is not active.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn data_key_make(&self, tenant: TenantId, (master, wrapped): &WrappedRow) -> Result<bool> {
        let master: Option<String> = sqlx::query_scalar("SELECT master FROM tenant_key_make($1, $2, $3)")
            .bind(tenant)
            .bind(master)
            .bind(wrapped)
            .fetch_one(&self.pool)
            .await?;
        Ok(master.is_some())
    }

    /// Some data keys that another master key than this one wraps.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn keys_to_rewrap(
        &self,
        master: &str,
        after: Option<TenantId>,
        limit: i64,
    ) -> Result<Vec<(TenantId, String, Vec<u8>)>> {
        Ok(sqlx::query_as(
            "SELECT tenant_id, master, wrapped FROM tenant_keys
             WHERE master <> $1 AND ($2::uuid IS NULL OR tenant_id > $2) ORDER BY tenant_id LIMIT $3",
        )
        .bind(master)
        .bind(after)
        .bind(limit)
        .fetch_all(&self.pool)
        .await?)
    }

    /// Replace a wrapped data key, if it is still the one that was read. False: it is not.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn key_rewrap(
        &self,
        tenant: TenantId,
        old: &[u8],
        (master, wrapped): &WrappedRow,
    ) -> Result<bool> {
        let done = sqlx::query(
            "UPDATE tenant_keys SET master = $3, wrapped = $4, wrapped_at = clock_timestamp()
             WHERE tenant_id = $1 AND wrapped = $2",
        )
        .bind(tenant)
        .bind(old)
        .bind(master)
        .bind(wrapped)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() > 0)
    }
}
