//! Tenants, and who acts in them. Owns the first key of an installation; all others are `store::key`'s.

use std::sync::Arc;

use anyhow::Context;
use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};
use sqlx::{Connection, PgConnection};

use crate::domain::ids::{KeyId, TenantId};
use crate::domain::permission::{Permits, Role, Scope};

/// Who acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Actor {
    /// An API key.
    Key(KeyId),
}

impl Actor {
    /// The kind in a word, and the id.
    #[must_use]
    pub fn parts(self) -> (&'static str, uuid::Uuid) {
        match self {
            Self::Key(id) => ("key", id.0),
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
}

impl Identity {
    /// What it may.
    #[must_use]
    pub fn permits(&self) -> Permits<'_> {
        Permits { role: self.role, scopes: &self.scopes }
    }

    /// The actor's name, or its id when it has none.
    #[must_use]
    pub fn label(&self) -> String {
        let Actor::Key(id) = self.actor;
        if self.name.is_empty() { format!("key {id}") } else { self.name.to_string() }
    }
}

/// Hash under which a key is stored. The key is 256 random bits, so a plain hash is enough: there is nothing to guess.
#[must_use]
pub fn key_hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
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
