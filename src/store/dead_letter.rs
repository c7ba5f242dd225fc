//! Dead letters as rows: one per invocation that ended dead, written by a trigger in the transaction that ended it. What
//! kind of failure it was is filled in afterwards by a duty (`domain::fingerprint` says how).

use chrono::{DateTime, Utc};
use sandbar_host::outcome::{Frame, Termination};
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{Postgres, QueryBuilder, Row};

use crate::domain::ids::{InvocationId, TenantId};
use crate::domain::names::TaskName;
use crate::store::{Result, TenantConn, WorkerStore};

/// Groups that one answer shows, the largest first.
const MAX_GROUPS: i64 = 200;

/// A dead letter.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// The invocation that died.
    pub id: InvocationId,
    /// Name of its task.
    pub task: String,
    /// Version that ran.
    pub version: i32,
    /// Reason of the last attempt's termination.
    pub reason: String,
    /// When it died.
    pub died_at: DateTime<Utc>,
    /// Attempts it had.
    pub attempts: i64,
    /// Which kind of failure; `None` for the moment until the duty has looked.
    pub fingerprint: Option<Vec<u8>>,
    /// The failure in one line.
    pub summary: Option<String>,
    /// What it was run again as, and when.
    pub redriven: Option<(InvocationId, DateTime<Utc>)>,
    /// The data key that seals the summary.
    pub sealed: Option<String>,
}

/// Dead letters of one task that failed in the same way.
#[derive(Debug, Clone)]
pub struct Group {
    /// Name of the task.
    pub task: String,
    /// Which kind of failure; `None`: not looked at yet.
    pub fingerprint: Option<Vec<u8>>,
    /// The reason they share, of the newest.
    pub reason: String,
    /// The newest in one line.
    pub summary: Option<String>,
    /// How many.
    pub count: i64,
    /// When the first of them died.
    pub first_at: DateTime<Utc>,
    /// When the last of them died.
    pub last_at: DateTime<Utc>,
    /// The newest by id.
    pub newest: InvocationId,
    /// The data key that seals its summary.
    pub sealed: Option<String>,
}

/// Which dead letters.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Of this task.
    pub task: Option<TaskName>,
    /// Of this kind of failure.
    pub fingerprint: Option<Vec<u8>>,
    /// With this reason.
    pub reason: Option<String>,
    /// Died after this time.
    pub after: Option<DateTime<Utc>>,
    /// Died before this time.
    pub before: Option<DateTime<Utc>>,
    /// Run again already, or not; `None`: both.
    pub redriven: Option<bool>,
    /// Older than this one.
    pub older_than: Option<InvocationId>,
}

/// A dead letter whose kind of failure is not known yet.
#[derive(Debug, Clone)]
pub struct Unclassified {
    /// Whose.
    pub tenant: TenantId,
    /// Which.
    pub id: InvocationId,
    /// Reason in its result.
    pub reason: String,
    /// How its last attempt ended; `None`: it had none.
    pub termination: Option<Termination>,
    /// Where the guest was.
    pub backtrace: Vec<Frame>,
    /// Number of that attempt.
    pub attempt: i16,
    /// The data key that seals both.
    pub sealed: Option<String>,
}

fn letter(row: &PgRow) -> Result<DeadLetter> {
    let again: Option<InvocationId> = row.try_get("redriven_as")?;
    let at: Option<DateTime<Utc>> = row.try_get("redriven_at")?;
    Ok(DeadLetter {
        id: row.try_get("invocation_id")?,
        task: row.try_get("name")?,
        version: row.try_get("version")?,
        reason: row.try_get("reason")?,
        died_at: row.try_get("died_at")?,
        attempts: row.try_get("attempts")?,
        fingerprint: row.try_get("fingerprint")?,
        summary: row.try_get("summary")?,
        redriven: again.zip(at),
        sealed: row.try_get("sealed")?,
    })
}

const TASK: &str = "tasks t ON t.tenant_id = d.tenant_id AND t.task_id = d.task_id";
const SEALED: &str = "(SELECT i.spec ->> 'sealed' FROM invocations i
  WHERE i.tenant_id = d.tenant_id AND i.invocation_id = d.invocation_id) AS sealed";

fn conditions<'a>(sql: &mut QueryBuilder<'a, Postgres>, tenant: TenantId, filter: &'a Filter) {
    sql.push(" WHERE d.tenant_id = ").push_bind(tenant);
    if let Some(task) = &filter.task {
        sql.push(" AND d.task_id IN (SELECT n.task_id FROM tasks n WHERE n.tenant_id = ")
            .push_bind(tenant)
            .push(" AND n.name = ")
            .push_bind(task.as_str())
            .push(")");
    }
    if let Some(fingerprint) = &filter.fingerprint {
        sql.push(" AND d.fingerprint = ").push_bind(fingerprint);
    }
    if let Some(reason) = &filter.reason {
        sql.push(" AND d.reason = ").push_bind(reason);
    }
    if let Some(after) = filter.after {
        sql.push(" AND d.died_at > ").push_bind(after);
    }
    if let Some(before) = filter.before {
        sql.push(" AND d.died_at < ").push_bind(before);
    }
    if let Some(redriven) = filter.redriven {
        sql.push(if redriven { " AND d.redriven_as IS NOT NULL" } else { " AND d.redriven_as IS NULL" });
    }
    if let Some(older_than) = filter.older_than {
        sql.push(" AND d.invocation_id < ").push_bind(older_than);
    }
}

impl TenantConn {
    /// Dead letters that pass the filter, newest id first; at most `limit`.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn dead_letters(&mut self, filter: &Filter, limit: i64) -> Result<Vec<DeadLetter>> {
        let tenant = self.tenant();
        let mut sql: QueryBuilder<'_, Postgres> = QueryBuilder::new(format!(
            "SELECT d.*, t.name, {SEALED}, (SELECT count(*) FROM attempts a WHERE a.tenant_id = d.tenant_id
               AND a.invocation_id = d.invocation_id) AS attempts FROM dead_letters d JOIN {TASK}"
        ));
        conditions(&mut sql, tenant, filter);
        sql.push(" ORDER BY d.invocation_id DESC LIMIT ").push_bind(limit);
        sql.build().persistent(false).fetch_all(&mut **self).await?.iter().map(letter).collect()
    }

    /// The groups of dead letters that pass the filter, the largest first; at most 200.
    ///
    /// # Errors
    /// Postgres does not answer in time.
    pub async fn dead_letter_groups(&mut self, filter: &Filter) -> Result<Vec<Group>> {
        let tenant = self.tenant();
        // The greatest UUID as the greatest text: hexadecimal digits sort as their values do.
        let mut sql: QueryBuilder<'_, Postgres> = QueryBuilder::new(
            "SELECT g.*, t.name, n.reason, n.summary, (SELECT i.spec ->> 'sealed' FROM invocations i
               WHERE i.tenant_id = g.tenant_id AND i.invocation_id = g.newest) AS sealed FROM (
               SELECT d.tenant_id, d.task_id, d.fingerprint, count(*) AS count, min(d.died_at) AS first_at,
                 max(d.died_at) AS last_at, max(d.invocation_id::text)::uuid AS newest
               FROM dead_letters d",
        );
        conditions(&mut sql, tenant, filter);
        sql.push(" GROUP BY 1, 2, 3 ORDER BY count(*) DESC, 7 DESC LIMIT ").push_bind(MAX_GROUPS);
        sql.push(
            ") g JOIN tasks t ON t.tenant_id = g.tenant_id AND t.task_id = g.task_id
             JOIN dead_letters n ON n.tenant_id = g.tenant_id AND n.invocation_id = g.newest
             ORDER BY g.count DESC, g.newest DESC",
        );
        let rows = sql.build().persistent(false).fetch_all(&mut **self).await?;
        rows.iter()
            .map(|row| {
                Ok(Group {
                    task: row.try_get("name")?,
                    fingerprint: row.try_get("fingerprint")?,
                    reason: row.try_get("reason")?,
                    summary: row.try_get("summary")?,
                    count: row.try_get("count")?,
                    first_at: row.try_get("first_at")?,
                    last_at: row.try_get("last_at")?,
                    newest: row.try_get("newest")?,
                    sealed: row.try_get("sealed")?,
                })
            })
            .collect()
    }

    /// Note that this was run again, as that. Nothing if it is no dead letter.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn dead_letters_redriven(&mut self, id: InvocationId, again: InvocationId) -> Result<()> {
        let tenant = self.tenant();
        sqlx::query(
            "UPDATE dead_letters SET redriven_as = $3, redriven_at = clock_timestamp()
             WHERE tenant_id = $1 AND invocation_id = $2",
        )
        .bind(tenant)
        .bind(id)
        .bind(again)
        .execute(&mut **self)
        .await?;
        Ok(())
    }

    /// Delete these for good if they are dead letters: payloads, tags, attempts, results, logs and the invocations
    /// themselves. Returns which were.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn dead_letters_purge(&mut self, ids: &[InvocationId]) -> Result<Vec<InvocationId>> {
        Ok(sqlx::query_scalar("SELECT * FROM purge_dead($1)")
            .bind(ids.iter().map(|id| id.0).collect::<Vec<_>>())
            .fetch_all(&mut **self)
            .await?)
    }
}

impl WorkerStore {
    /// Dead letters whose kind of failure is not known yet, the first to die first; at most `limit`.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn dead_letters_unclassified(&self, limit: i64) -> Result<Vec<Unclassified>> {
        let rows = sqlx::query(&format!(
            "SELECT d.tenant_id, d.invocation_id, d.reason, a.termination, a.backtrace, a.attempt, {SEALED}
             FROM dead_letters d
             LEFT JOIN LATERAL (SELECT termination, backtrace, attempt FROM attempts a WHERE a.tenant_id = d.tenant_id
               AND a.invocation_id = d.invocation_id ORDER BY a.attempt DESC LIMIT 1) a ON true
             WHERE d.fingerprint IS NULL ORDER BY d.died_at LIMIT $1"
        ))
        .bind(limit)
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| {
                Ok(Unclassified {
                    tenant: row.try_get("tenant_id")?,
                    id: row.try_get("invocation_id")?,
                    reason: row.try_get("reason")?,
                    termination: row.try_get::<Option<Json<_>>, _>("termination")?.map(|json| json.0),
                    backtrace: row
                        .try_get::<Option<Json<Vec<Frame>>>, _>("backtrace")?
                        .map(|json| json.0)
                        .unwrap_or_default(),
                    attempt: row.try_get::<Option<i16>, _>("attempt")?.unwrap_or(0),
                    sealed: row.try_get("sealed")?,
                })
            })
            .collect()
    }

    /// Say which kind of failure each was. Under the duty's fence.
    ///
    /// # Errors
    /// Postgres does not answer, or the duty is somebody else's by now.
    pub async fn dead_letters_classify(
        &self,
        found: &[(TenantId, InvocationId, [u8; 8], String)],
    ) -> Result<()> {
        let mut transaction = self.begin().await?;
        sqlx::query(
            "UPDATE dead_letters d SET fingerprint = u.fingerprint, summary = u.summary
             FROM unnest($1::uuid[], $2::uuid[], $3::bytea[], $4::text[]) AS u(tenant_id, id, fingerprint, summary)
             WHERE d.tenant_id = u.tenant_id AND d.invocation_id = u.id",
        )
        .bind(found.iter().map(|f| f.0.0).collect::<Vec<_>>())
        .bind(found.iter().map(|f| f.1.0).collect::<Vec<_>>())
        .bind(found.iter().map(|f| f.2.as_slice()).collect::<Vec<_>>())
        .bind(found.iter().map(|f| f.3.as_str()).collect::<Vec<_>>())
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(())
    }
}
