//! Pauses as rows, and what they do to what waits: the functions of the migration, with types.

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use sqlx::Row;
use sqlx::postgres::PgRow;

use crate::domain::ids::PauseId;
use crate::store::{Error, Result, TenantConn};

/// Rows of the queue that one transaction looks at when a tag is paused.
const SWEEP: i32 = 2_000;
/// Longest wait for transactions that were under way when a tag was paused: an enqueue or an ack takes milliseconds, and
/// what takes longer than this hangs.
const UNDER_WAY: Duration = Duration::from_secs(5);
/// Between two looks whether they are over.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// What is paused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Everything of the tenant.
    Tenant,
    /// A task, by name.
    Task(String),
    /// What has this tag.
    Tag(String, String),
}

/// A pause.
#[derive(Debug, Clone)]
pub struct Pause {
    /// Its id.
    pub id: PauseId,
    /// What is paused.
    pub target: Target,
    /// Since when.
    pub created_at: DateTime<Utc>,
}

fn pause(row: &PgRow) -> Result<Pause> {
    Ok(Pause {
        id: row.try_get("pause_id")?,
        target: match row.try_get::<&str, _>("kind")? {
            "tenant" => Target::Tenant,
            "task" => Target::Task(row.try_get("name")?),
            "tag" => Target::Tag(row.try_get("tag_key")?, row.try_get("tag_value")?),
            other => return Err(Error::Corrupt(format!("a pause of kind `{other}`"))),
        },
        created_at: row.try_get("created_at")?,
    })
}

impl TenantConn {
    /// Pause something; on return nothing of it is claimed any more. The pause's id, and whether it is new. `None`: no
    /// such task.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn pause(&mut self, target: &Target) -> Result<Option<(PauseId, bool)>> {
        let (kind, task, key, value) = match target {
            Target::Tenant => ("tenant", None, None, None),
            Target::Task(name) => ("task", Some(name), None, None),
            Target::Tag(key, value) => ("tag", None, Some(key), Some(value)),
        };
        let row = sqlx::query("SELECT outcome, pause_id FROM pause($1, $2, $3, $4, $5)")
            .bind(PauseId::generate())
            .bind(kind)
            .bind(task)
            .bind(key)
            .bind(value)
            .fetch_one(&mut **self)
            .await?;
        let new = match row.try_get::<&str, _>("outcome")? {
            "unknown" => return Ok(None),
            outcome => outcome == "new",
        };
        if let (true, Target::Tag(..)) = (new, target) {
            // From now on the trigger keeps new ones back; these were ready before, or were being made so.
            self.writers_over().await?;
            let mut at: Option<(DateTime<Utc>, uuid::Uuid)> = None;
            loop {
                at = sqlx::query_as(
                    "SELECT rank, invocation_id FROM pause_ready(COALESCE($1, '-infinity'), $2, $3)",
                )
                .bind(at.map(|at| at.0))
                .bind(at.map_or_else(uuid::Uuid::nil, |at| at.1))
                .bind(SWEEP)
                .fetch_optional(&mut **self)
                .await?;
                if at.is_none() {
                    break;
                }
            }
        }
        Ok(Some((row.try_get("pause_id")?, new)))
    }

    /// Wait until every transaction that writes now, and may not have seen what was just committed, is over.
    async fn writers_over(&mut self) -> Result<()> {
        let began = Instant::now();
        let fence: i64 = sqlx::query_scalar("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
            .fetch_one(&mut **self)
            .await?;
        loop {
            let over: bool =
                sqlx::query_scalar("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint >= $1")
                    .bind(fence)
                    .fetch_one(&mut **self)
                    .await?;
            if over {
                return Ok(());
            }
            if began.elapsed() > UNDER_WAY {
                tracing::warn!("a transaction hangs; what it makes ready is not held back by the new pause");
                return Ok(());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// End a pause. False: there is none.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn unpause(&mut self, id: PauseId) -> Result<bool> {
        Ok(sqlx::query_scalar("SELECT unpause($1)").bind(id).fetch_one(&mut **self).await?)
    }

    /// Every pause, oldest first; at most 1,000.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn pauses(&mut self) -> Result<Vec<Pause>> {
        let tenant = self.tenant();
        let rows = sqlx::query(
            "SELECT p.*, t.name FROM pauses p LEFT JOIN tasks t ON t.tenant_id = p.tenant_id AND t.task_id = p.task_id
             WHERE p.tenant_id = $1 ORDER BY p.pause_id LIMIT 1000",
        )
        .bind(tenant)
        .fetch_all(&mut **self)
        .await?;
        rows.iter().map(pause).collect()
    }
}
