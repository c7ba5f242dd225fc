//! One-time tokens for a new password, as rows. Never sees a token or a password, only their hashes. Who may make one for
//! whom is decided in `app`; that a tenant makes none for a member of another, here.

use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use crate::domain::ids::{TenantId, UserId};
use crate::store::people::interval;
use crate::store::{ApiStore, Result, TenantConn};

impl TenantConn {
    /// Make a token for a user, in the place of the last one; with `platform` whatever tenants the user is in. Until when it
    /// can be used; `None`: the user is in another tenant too.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn reset_make(
        &mut self,
        user: UserId,
        hash: &[u8; 32],
        platform: bool,
        life: Duration,
    ) -> Result<Option<DateTime<Utc>>> {
        Ok(sqlx::query_scalar("SELECT reset_make($1, $2, $3, $4)")
            .bind(user)
            .bind(hash.as_slice())
            .bind(platform)
            .bind(interval(life))
            .fetch_one(&mut **self)
            .await?)
    }
}

impl ApiStore {
    /// Whose password a token may set now.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn reset_find(&self, hash: &[u8; 32]) -> Result<Option<UserId>> {
        let asked = sqlx::query_scalar("SELECT reset_find($1)").bind(hash.as_slice());
        Ok(asked.fetch_one(&self.pool).await?)
    }

    /// Use a token: set the password, and end the user's sessions and own keys. `None`: it is over.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn reset_use(&self, hash: &[u8; 32], password_hash: &str) -> Result<Option<UserId>> {
        let used = sqlx::query_scalar("SELECT reset_use($1, $2)").bind(hash.as_slice()).bind(password_hash);
        Ok(used.fetch_one(&self.pool).await?)
    }
}

/// Make a token for the user with this address, as the owner of the schema. Until when it can be used.
///
/// # Errors
/// Postgres does not answer, or nobody has the address.
pub async fn make(
    admin_url: &str,
    email: &str,
    hash: &[u8; 32],
    life: Duration,
) -> anyhow::Result<DateTime<Utc>> {
    let options =
        admin_url.parse::<sqlx::postgres::PgConnectOptions>()?.options([("search_path", "sandbar")]);
    let mut connection = PgConnection::connect_with(&options).await.context("cannot connect to Postgres")?;
    let mut transaction = connection.begin().await?;
    let user: Option<UserId> = sqlx::query_scalar("SELECT user_id FROM users WHERE email = $1")
        .bind(email)
        .fetch_optional(&mut *transaction)
        .await?;
    let user = user.context("nobody has this address")?;
    let until: DateTime<Utc> = sqlx::query_scalar(
        "INSERT INTO password_resets AS r (user_id, hash, expires_at) VALUES ($1, $2, clock_timestamp() + $3)
         ON CONFLICT (user_id) DO UPDATE SET hash = EXCLUDED.hash, made_in = NULL, expires_at = EXCLUDED.expires_at
         RETURNING r.expires_at",
    )
    .bind(user)
    .bind(hash.as_slice())
    .bind(interval(life))
    .fetch_one(&mut *transaction)
    .await?;
    let tenants: Vec<TenantId> = sqlx::query_scalar("SELECT tenant_id FROM memberships WHERE user_id = $1")
        .bind(user)
        .fetch_all(&mut *transaction)
        .await?;
    for tenant in tenants {
        sqlx::query(
            "INSERT INTO audit (tenant_id, audit_id, at, actor_kind, actor, operation, target, outcome, status, times, after)
             VALUES ($1, $2, now(), 'nobody', 'command on the server', 'sandbar user reset', $3, 'done', 0, 1,
               jsonb_build_object('email', $3::text, 'expires_at', $4::timestamptz))",
        )
        .bind(tenant)
        .bind(Uuid::now_v7())
        .bind(email)
        .bind(until)
        .execute(&mut *transaction)
        .await?;
    }
    transaction.commit().await?;
    connection.close().await?;
    Ok(until)
}
