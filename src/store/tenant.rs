//! Tenants, and who acts in them. Owns the first key of an installation; all others are `store::key`'s.

use std::sync::Arc;

use anyhow::Context;
use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};
use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

use crate::domain::ids::{KeyId, TenantId, UserId};
use crate::domain::permission::{Permits, Role, Scope};
use crate::store::{ApiStore, Error, Result, TenantConn, WorkerStore};

/// Who acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Actor {
    /// An API key.
    Key(KeyId),
    /// A user, in a session.
    User(UserId, Uuid),
    /// Somebody whom an issuer elsewhere vouches for.
    Subject(Uuid),
}

impl Actor {
    /// The kind in a word, and the id.
    #[must_use]
    pub fn parts(self) -> (&'static str, Uuid) {
        match self {
            Self::Key(id) => ("key", id.0),
            Self::Subject(id) => ("subject", id),
            Self::User(id, _) => ("user", id.0),
        }
    }
}

/// Who a request comes from, and what it may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Whose data it may see.
    pub tenant: TenantId,
    /// Who acts.
    pub actor: Actor,
    /// The actor's name, for people.
    pub name: Arc<str>,
    /// What it may at most.
    pub role: Role,
    /// What it is narrowed to; empty: all that the role may.
    pub scopes: Arc<[Scope]>,
    /// From when on it is refused.
    pub expires_at: Option<DateTime<Utc>>,
    /// Its tenant is neither suspended nor going.
    pub active: bool,
}

impl Identity {
    /// What it may.
    #[must_use]
    pub fn permits(&self) -> Permits<'_> {
        Permits { role: self.role, scopes: &self.scopes }
    }

    /// The key that acts, if it is one.
    #[must_use]
    pub fn key(&self) -> Option<KeyId> {
        match self.actor {
            Actor::Key(key) => Some(key),
            Actor::User(..) | Actor::Subject(_) => None,
        }
    }

    /// The actor's name, or its id when it has none.
    #[must_use]
    pub fn label(&self) -> String {
        let (kind, id) = self.actor.parts();
        if self.name.is_empty() { format!("{kind} {id}") } else { self.name.to_string() }
    }
}

/// Hash under which a key is stored. The key is 256 random bits, so a plain hash is enough: there is nothing to guess.
#[must_use]
pub fn key_hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// Where a tenant stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TenantState {
    /// It works.
    Active,
    /// Nothing new starts.
    Suspended,
    /// The same, and everything goes when the grace time is over.
    Deleting,
}

impl TenantState {
    /// The word in the database and in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Suspended => "suspended",
            Self::Deleting => "deleting",
        }
    }
}

/// A tenant as the platform sees it.
#[derive(Debug, Clone)]
pub struct TenantRow {
    /// Its id.
    pub id: TenantId,
    /// Its name.
    pub name: String,
    /// Its share of the slots.
    pub weight: i32,
    /// Where it stands.
    pub state: TenantState,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When its state was changed last.
    pub changed_at: Option<DateTime<Utc>>,
    /// When everything of it goes.
    pub delete_after: Option<DateTime<Utc>>,
}

impl ApiStore {
    /// The tenant of this name, and whether it works.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn identify_tenant(&self, name: &str) -> Result<Option<(TenantId, bool)>> {
        let work = async {
            let asked =
                sqlx::query_as("SELECT tenant_id, state = 'active' FROM identify_tenant($1)").bind(name);
            Ok(asked.fetch_optional(&self.pool).await?)
        };
        self.guard.call(work).await
    }

    /// Tenants by name, after this one; or one of them.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn tenant_list(&self, id: Option<TenantId>, after: &str, limit: i64) -> Result<Vec<TenantRow>> {
        let rows = sqlx::query("SELECT * FROM tenant_list($1, $2, $3)")
            .bind(id)
            .bind(after)
            .bind(limit)
            .fetch_all(&self.pool)
            .await?;
        rows.iter()
            .map(|row| {
                Ok(TenantRow {
                    id: row.try_get("tenant_id")?,
                    name: row.try_get("name")?,
                    weight: row.try_get("weight")?,
                    state: match row.try_get("state")? {
                        "active" => TenantState::Active,
                        "suspended" => TenantState::Suspended,
                        "deleting" => TenantState::Deleting,
                        other => return Err(Error::Corrupt(format!("state {other} of a tenant"))),
                    },
                    created_at: row.try_get("created_at")?,
                    changed_at: row.try_get("changed_at")?,
                    delete_after: row.try_get("delete_after")?,
                })
            })
            .collect()
    }

    /// Make a tenant. False: the name is taken.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn tenant_create(&self, id: TenantId, name: &str) -> Result<bool> {
        let made = sqlx::query_scalar("SELECT tenant_create($1, $2)").bind(id).bind(name);
        Ok(made.fetch_one(&self.pool).await?)
    }

    /// Change a tenant's state; with `cancel` what runs is asked to stop. False: there is none, or its time is over.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn tenant_change(
        &self,
        id: TenantId,
        state: TenantState,
        delete_after: Option<DateTime<Utc>>,
        cancel: bool,
    ) -> Result<bool> {
        Ok(sqlx::query_scalar("SELECT tenant_change($1, $2, $3, $4)")
            .bind(id)
            .bind(state.as_str())
            .bind(delete_after)
            .bind(cancel)
            .fetch_one(&self.pool)
            .await?)
    }
}

impl WorkerStore {
    /// Take rows of a tenant whose time has come, at most `limit` of each table, and in the end the tenant. Returns how many
    /// rows went.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn erase_tenant(&self, limit: i32) -> Result<u64> {
        let mut transaction = self.begin().await?;
        let gone: i64 =
            sqlx::query_scalar("SELECT erase_tenant($1)").bind(limit).fetch_one(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(gone.unsigned_abs())
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
        "INSERT INTO api_keys (tenant_id, key_id, prefix, hash, role, name)
         SELECT tenant_id, $1, left($2, 12), $3, 'platform', 'first key' FROM tenants WHERE name = 'default'
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
