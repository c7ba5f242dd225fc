//! The audit log as rows. Owns no decision about what is written; nothing here can change or remove an entry.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use sqlx::Row;
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use uuid::Uuid;

use crate::domain::ids::TenantId;
use crate::store::{ApiStore, Result, TenantConn, WorkerStore};

/// What is no tenant's: changes of the installation, and attempts of nobody.
pub const INSTALLATION: TenantId = TenantId(Uuid::nil());

/// One entry.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Entry {
    /// Whose log it is in.
    pub tenant_id: TenantId,
    /// Its id, in the order of time.
    pub audit_id: Uuid,
    /// When.
    pub at: DateTime<Utc>,
    /// What kind of somebody: key, user, subject or nobody.
    pub actor_kind: String,
    /// Its id.
    pub actor_id: Option<Uuid>,
    /// Its name at the time.
    pub actor: String,
    /// Address the request came from.
    pub address: Option<String>,
    /// Id of the request.
    pub request_id: Option<String>,
    /// Method and route.
    pub operation: String,
    /// The action it needed.
    pub action: Option<String>,
    /// The path.
    pub target: String,
    /// done or denied.
    pub outcome: String,
    /// HTTP status.
    pub status: i16,
    /// Code of the problem.
    pub code: Option<String>,
    /// How many equal ones this stands for.
    pub times: i32,
    /// What was, as far as it changed.
    pub before: Option<Value>,
    /// What is.
    pub after: Option<Value>,
}

/// Which entries somebody wants to see.
#[derive(Debug, Clone, Default)]
pub struct AuditFilter {
    /// Not before.
    pub since: Option<DateTime<Utc>>,
    /// Before.
    pub until: Option<DateTime<Utc>>,
    /// Of this key or user.
    pub actor: Option<Uuid>,
    /// Needed this action.
    pub action: Option<String>,
    /// done or denied.
    pub outcome: Option<String>,
    /// Whose path begins with this.
    pub target: Option<String>,
    /// Older than this one.
    pub after: Option<Uuid>,
}

fn entry(row: &PgRow) -> Result<Entry> {
    Ok(Entry {
        tenant_id: row.try_get("tenant_id")?,
        audit_id: row.try_get("audit_id")?,
        at: row.try_get("at")?,
        actor_kind: row.try_get("actor_kind")?,
        actor_id: row.try_get("actor_id")?,
        actor: row.try_get("actor")?,
        address: row.try_get("address")?,
        request_id: row.try_get("request_id")?,
        operation: row.try_get("operation")?,
        action: row.try_get("action")?,
        target: row.try_get("target")?,
        outcome: row.try_get("outcome")?,
        status: row.try_get("status")?,
        code: row.try_get("code")?,
        times: row.try_get("times")?,
        before: row.try_get("before")?,
        after: row.try_get("after")?,
    })
}

impl ApiStore {
    /// Write entries of any tenants. Writing one again changes nothing.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn audit_write(&self, entries: &[Entry]) -> Result<()> {
        sqlx::query("SELECT audit_write($1)").bind(Json(entries)).execute(&self.pool).await?;
        Ok(())
    }
}

impl TenantConn {
    /// Entries that pass the filter, newest first.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn audit_list(&mut self, filter: &AuditFilter, limit: i64) -> Result<Vec<Entry>> {
        let rows = sqlx::query(
            "SELECT * FROM audit
             WHERE tenant_id = $1 AND ($2::timestamptz IS NULL OR at >= $2) AND ($3::timestamptz IS NULL OR at < $3)
               AND ($4::uuid IS NULL OR actor_id = $4) AND ($5::text IS NULL OR action = $5)
               AND ($6::text IS NULL OR outcome = $6) AND ($7::text IS NULL OR starts_with(target, $7))
               AND ($8::uuid IS NULL OR audit_id < $8)
             ORDER BY audit_id DESC LIMIT $9",
        )
        .bind(self.tenant())
        .bind(filter.since)
        .bind(filter.until)
        .bind(filter.actor)
        .bind(filter.action.as_deref())
        .bind(filter.outcome.as_deref())
        .bind(filter.target.as_deref())
        .bind(filter.after)
        .bind(limit)
        .fetch_all(&mut **self)
        .await?;
        rows.iter().map(entry).collect()
    }
}

impl WorkerStore {
    /// Forget entries that are older than the retention, at most `limit`. Returns how many.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn audit_forget(&self, limit: i64) -> Result<u64> {
        let mut transaction = self.begin().await?;
        let gone: i64 =
            sqlx::query_scalar("SELECT audit_forget($1)").bind(limit).fetch_one(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(gone.unsigned_abs())
    }
}
