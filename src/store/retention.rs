//! History that is over its time: found by a walk in order of age, read for export, deleted. The walk keeps its place in
//! a row, written in the transaction that deletes, so a crash repeats no more than an export.

use chrono::{DateTime, Utc};
use sqlx::Row;
use sqlx::types::Json;

use crate::domain::ids::{InvocationId, TenantId};
use crate::store::{Result, WorkerStore};

/// Rows that one step looks at; most may have to be kept.
const LOOK: i64 = 2_000;
/// Rows that one step deletes.
const PAGE: usize = 500;

/// A tenant whose history is to be looked at.
#[derive(Debug, Clone, Copy)]
pub struct Walk {
    /// Whose.
    pub tenant: TenantId,
    /// What ended before this is over its time.
    pub before: DateTime<Utc>,
    after: Option<uuid::Uuid>,
}

/// A step of a walk.
#[derive(Debug, Clone)]
pub struct Step {
    /// Ended before the time, oldest id first.
    pub ids: Vec<InvocationId>,
    /// Where the next step begins; `None`: the walk is over.
    next: Option<uuid::Uuid>,
}

/// Everything that is kept of one invocation.
#[derive(Debug, Clone)]
pub struct History {
    /// Its row but for the input, with the task's name.
    pub invocation: serde_json::Value,
    /// The data key that seals its payloads.
    pub sealed: Option<String>,
    /// Its input.
    pub input: Vec<u8>,
    /// Its result but for the output.
    pub result: serde_json::Value,
    /// Its output.
    pub output: Option<Vec<u8>>,
    /// Its attempts, first to last.
    pub attempts: serde_json::Value,
    /// Its log, attempt by attempt: number, chunk, and JSON lines or what seals them.
    pub logs: Vec<(i16, i32, Vec<u8>)>,
}

/// The smallest id that can have been made at this time: version 7 begins with the milliseconds.
fn first_id_of(at: DateTime<Utc>) -> uuid::Uuid {
    let millis = u128::try_from(at.timestamp_millis()).unwrap_or(0);
    uuid::Uuid::from_u128(millis << 80)
}

impl WorkerStore {
    /// The tenant whose turn it is, if it is anybody's. `days`: what is kept where the tenant has no number of its own.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn retention_next(&self, days: i32) -> Result<Option<Walk>> {
        let row = sqlx::query(
            "SELECT t.tenant_id, clock_timestamp() - make_interval(days => COALESCE(t.retention_days, $1)) AS before, w.after_id
             FROM tenants t LEFT JOIN retention_walks w ON w.tenant_id = t.tenant_id
             WHERE w.next_at IS NULL OR w.next_at <= clock_timestamp()
             ORDER BY w.next_at NULLS FIRST, t.tenant_id LIMIT 1",
        )
        .bind(days)
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| {
            Ok(Walk {
                tenant: row.try_get("tenant_id")?,
                before: row.try_get("before")?,
                after: row.try_get("after_id")?,
            })
        })
        .transpose()
    }

    /// The next step of a walk. What has not ended is passed over, however old.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn retention_step(&self, walk: &Walk) -> Result<Step> {
        let rows = sqlx::query(
            "SELECT i.invocation_id, COALESCE(r.finished_at < $4, false) AS over FROM (
               SELECT invocation_id FROM invocations WHERE tenant_id = $1 AND invocation_id > $2 AND invocation_id < $3
               ORDER BY invocation_id LIMIT $5) i
             LEFT JOIN results r ON r.tenant_id = $1 AND r.invocation_id = i.invocation_id ORDER BY i.invocation_id",
        )
        .bind(walk.tenant)
        .bind(walk.after.unwrap_or_default())
        // What was accepted later cannot have ended before.
        .bind(first_id_of(walk.before))
        .bind(walk.before)
        .bind(LOOK)
        .fetch_all(&self.pool)
        .await?;
        let mut ids = Vec::new();
        let mut last = None;
        for row in &rows {
            if ids.len() >= PAGE {
                return Ok(Step { ids, next: last });
            }
            let id: InvocationId = row.try_get("invocation_id")?;
            last = Some(id.0);
            if row.try_get("over")? {
                ids.push(id);
            }
        }
        let over = i64::try_from(rows.len()).unwrap_or(i64::MAX) < LOOK;
        Ok(Step { ids, next: last.filter(|_| !over) })
    }

    /// Everything that is kept of one invocation that has ended; `None`: nothing any more.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn retention_read(&self, tenant: TenantId, id: InvocationId) -> Result<Option<History>> {
        let row = sqlx::query(
            "SELECT i.input, i.spec ->> 'sealed' AS sealed, (to_jsonb(i) - 'input') || jsonb_build_object('task', t.name) AS invocation,
               r.output, to_jsonb(r) - 'output' AS result,
               (SELECT COALESCE(jsonb_agg(to_jsonb(a) ORDER BY a.attempt), '[]') FROM attempts a
                 WHERE a.tenant_id = $1 AND a.invocation_id = $2) AS attempts,
               k.attempts AS log_attempts, k.chunks, k.records
             FROM invocations i JOIN tasks t ON t.tenant_id = i.tenant_id AND t.task_id = i.task_id
             JOIN results r ON r.tenant_id = i.tenant_id AND r.invocation_id = i.invocation_id
             CROSS JOIN LATERAL (SELECT array_agg(l.attempt ORDER BY l.attempt, l.chunk) AS attempts,
               array_agg(l.chunk ORDER BY l.attempt, l.chunk) AS chunks, array_agg(l.records ORDER BY l.attempt, l.chunk) AS records
               FROM logs l WHERE l.tenant_id = $1 AND l.invocation_id = $2) k
             WHERE i.tenant_id = $1 AND i.invocation_id = $2",
        )
        .bind(tenant)
        .bind(id)
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| {
            let attempts: Vec<i16> = row.try_get::<Option<_>, _>("log_attempts")?.unwrap_or_default();
            let chunks: Vec<i32> = row.try_get::<Option<_>, _>("chunks")?.unwrap_or_default();
            let records: Vec<Vec<u8>> = row.try_get::<Option<_>, _>("records")?.unwrap_or_default();
            Ok(History {
                invocation: row.try_get::<Json<_>, _>("invocation")?.0,
                input: row.try_get("input")?,
                result: row.try_get::<Json<_>, _>("result")?.0,
                output: row.try_get("output")?,
                attempts: row.try_get::<Json<_>, _>("attempts")?.0,
                sealed: row.try_get("sealed")?,
                logs: attempts.into_iter().zip(chunks).zip(records).map(|((a, c), r)| (a, c, r)).collect(),
            })
        })
        .transpose()
    }

    /// Delete what a step found, and note where the walk is. Under the duty's fence.
    ///
    /// # Errors
    /// The duty is somebody else's by now, or Postgres does not answer; then nothing was deleted.
    pub async fn retention_delete(&self, walk: &Walk, step: &Step) -> Result<u64> {
        let mut transaction = self.begin().await?;
        let deleted: i64 = sqlx::query_scalar("SELECT drop_history($1, $2)")
            .bind(walk.tenant)
            .bind(step.ids.iter().map(|id| id.0).collect::<Vec<_>>())
            .fetch_one(&mut *transaction)
            .await?;
        sqlx::query(
            "INSERT INTO retention_walks AS w (tenant_id, after_id, next_at)
             VALUES ($1, $2, clock_timestamp() + CASE WHEN $2 IS NULL THEN interval '1 hour' ELSE interval '0' END)
             ON CONFLICT (tenant_id) DO UPDATE SET after_id = excluded.after_id, next_at = excluded.next_at",
        )
        .bind(walk.tenant)
        .bind(step.next)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(deleted.unsigned_abs())
    }
}
