//! Bulk operations as rows, and the walk through the places of a tenant's invocations. An operation keeps where it is in
//! its own row, written in the transaction that did the rows before: a crash repeats nothing that was done.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{Connection, PgConnection, Postgres, QueryBuilder, Row};

use crate::domain::bulk::{Action, Stage, UnknownAction};
use crate::domain::ids::{BulkId, InvocationId, TaskId, TenantId};
use crate::domain::invocation::State;
use crate::store::duty::Held;
use crate::store::{Error, Result, TenantConn, WorkerStore};

/// Rows of one transaction.
pub const PAGE: usize = 500;
/// Rows that are looked at for one page; most may not pass the filter.
const LOOK: i64 = 5_000;

/// Which invocations. Stored as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Filter {
    /// In one of these states; never empty.
    pub states: Vec<State>,
    /// Of this task: its id, and its name for people.
    pub task: Option<(TaskId, String)>,
    /// With all of these tags.
    pub tags: BTreeMap<String, String>,
    /// Accepted after this time.
    pub created_after: Option<DateTime<Utc>>,
    /// Accepted before this time.
    pub created_before: Option<DateTime<Utc>>,
    /// Dead letters of this kind of failure.
    pub fingerprint: Option<Vec<u8>>,
    /// Dead letters with this reason.
    pub reason: Option<String>,
}

/// What to do.
#[derive(Debug, Clone)]
pub struct NewOperation {
    /// Its id. Invocations made after it are not its business.
    pub id: BulkId,
    /// To each.
    pub action: Action,
    /// Which.
    pub filter: Filter,
    /// The new priority.
    pub priority: Option<i16>,
    /// Version to run instead of the one that failed.
    pub version: Option<i32>,
    /// So many a second; `None`: as fast as it goes.
    pub rate: Option<i32>,
    /// How many there are, and whether that was counted (true) or estimated.
    pub expected: (i64, bool),
}

/// How an operation stands.
#[derive(Debug, Clone)]
pub struct Operation {
    /// What was asked for.
    pub asked: NewOperation,
    /// `waiting`, `running`, `done`, `cancelled` or `failed`.
    pub state: String,
    /// Where it is.
    pub stage: Option<Stage>,
    after_rank: Option<DateTime<Utc>>,
    after_id: Option<uuid::Uuid>,
    /// Walks that are over.
    pub passes: i16,
    /// Passed the filter so far.
    pub matched: i64,
    /// Of those, done.
    pub done: i64,
    /// Had moved on before it was their turn.
    pub skipped: i64,
    /// Could not be done.
    pub failed: i64,
    /// Why the last of those could not.
    pub error: Option<String>,
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// When its first rows were done.
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub finished_at: Option<DateTime<Utc>>,
}

/// A page of a walk.
#[derive(Debug, Clone)]
pub struct Page {
    /// Those that pass the filter.
    pub ids: Vec<InvocationId>,
    /// Where the next page begins; `None`: the operation is at its end with this page.
    next: Option<(Stage, Option<DateTime<Utc>>, Option<uuid::Uuid>)>,
    /// A walk ends with this page.
    wraps: bool,
}

impl Page {
    /// Its first `n`, as a page; `None`: none of them.
    fn first(&self, op: &Operation, n: usize) -> Option<Self> {
        let ids = self.ids.get(..n)?.to_vec();
        let last = ids.last()?.0;
        let stage = op.stage.or_else(|| Stage::next(None, &op.asked.filter.states))?;
        Some(Self { ids, next: Some((stage, None, Some(last))), wraps: false })
    }
}

/// What became of a page.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Done.
    pub done: i64,
    /// Had moved on.
    pub skipped: i64,
    /// Could not be done.
    pub failed: i64,
    /// Why the last of those could not.
    pub error: Option<String>,
    /// Ended by it.
    pub ended: Vec<InvocationId>,
    /// Asked to stop.
    pub stopping: Vec<InvocationId>,
    /// Something may be claimable that was not.
    pub wake: bool,
}

/// Walks of one operation at most: an invocation that moved back behind the walk (a failed attempt goes from running to
/// scheduled) is met by the next.
const MAX_PASSES: i16 = 3;

fn operation(row: &PgRow) -> Result<Operation> {
    let action: &str = row.try_get("action")?;
    let stage: Option<&str> = row.try_get("stage")?;
    Ok(Operation {
        asked: NewOperation {
            id: row.try_get("bulk_id")?,
            action: action.parse().map_err(|e: UnknownAction| Error::Corrupt(e.to_string()))?,
            filter: row.try_get::<Json<_>, _>("filter")?.0,
            priority: row.try_get("priority")?,
            version: row.try_get("version")?,
            rate: row.try_get("rate")?,
            expected: (
                row.try_get::<Option<i64>, _>("expected")?.unwrap_or(0),
                row.try_get("expected_exact")?,
            ),
        },
        state: row.try_get("state")?,
        stage: stage.and_then(Stage::named),
        after_rank: row.try_get("after_rank")?,
        after_id: row.try_get("after_id")?,
        passes: row.try_get("passes")?,
        matched: row.try_get("matched")?,
        done: row.try_get("done")?,
        skipped: row.try_get("skipped")?,
        failed: row.try_get("failed")?,
        error: row.try_get("error")?,
        created_at: row.try_get("created_at")?,
        started_at: row.try_get("started_at")?,
        finished_at: row.try_get("finished_at")?,
    })
}

/// The rows of a place that a walk looks at: (id, rank), in the order of the walk.
fn place(sql: &mut QueryBuilder<'_, Postgres>, stage: Stage, tenant: TenantId) {
    match stage {
        Stage::Scheduled | Stage::Parked => {
            let table = if stage == Stage::Parked { "parked" } else { "scheduled" };
            sql.push(format_args!(
                "SELECT p.invocation_id AS id, NULL::timestamptz AS rank FROM {table} p WHERE p.tenant_id = "
            ))
            .push_bind(tenant);
        }
        Stage::Ready => {
            sql.push("SELECT p.invocation_id AS id, p.rank FROM ready p WHERE p.tenant_id = ")
                .push_bind(tenant);
        }
        Stage::Running => {
            sql.push(
                "SELECT p.invocation_id AS id, NULL::timestamptz AS rank FROM running_attempts() p WHERE true",
            );
        }
        // Spelled out, because a parameter would not match the predicate of the partial index.
        Stage::Dead | Stage::Cancelled | Stage::Expired => {
            sql.push(
                "SELECT p.invocation_id AS id, NULL::timestamptz AS rank FROM results p WHERE p.tenant_id = ",
            )
            .push_bind(tenant)
            .push(format_args!(" AND p.state = '{}'", stage.as_str()));
        }
    }
}

/// The conditions on an invocation `i`.
fn passes<'a>(sql: &mut QueryBuilder<'a, Postgres>, asked: &'a NewOperation, stage: Stage) {
    let filter = &asked.filter;
    sql.push("i.invocation_id < ").push_bind(asked.id.0);
    if let Some((task, _)) = &filter.task {
        sql.push(" AND i.task_id = ").push_bind(*task);
    }
    if !filter.tags.is_empty() {
        sql.push(" AND i.tags @> ").push_bind(Json(&filter.tags));
    }
    if let Some(after) = filter.created_after {
        sql.push(" AND i.created_at > ").push_bind(after);
    }
    if let Some(before) = filter.created_before {
        sql.push(" AND i.created_at < ").push_bind(before);
    }
    if let (Action::Reprioritise, Some(priority)) = (asked.action, asked.priority) {
        sql.push(" AND i.priority <> ").push_bind(priority);
    }
    if asked.action == Action::Cancel && stage == Stage::Running {
        sql.push(
            " AND NOT EXISTS (SELECT 1 FROM cancels c WHERE c.tenant_id = i.tenant_id AND c.invocation_id = i.invocation_id)",
        );
    }
    if stage == Stage::Dead {
        sql.push(" AND EXISTS (SELECT 1 FROM dead_letters d WHERE d.tenant_id = i.tenant_id AND d.invocation_id = i.invocation_id");
        // What was run again already has its second chance.
        if asked.action == Action::Retry {
            sql.push(" AND d.redriven_as IS NULL");
        }
        if let Some(fingerprint) = &filter.fingerprint {
            sql.push(" AND d.fingerprint = ").push_bind(fingerprint);
        }
        if let Some(reason) = &filter.reason {
            sql.push(" AND d.reason = ").push_bind(reason);
        }
        sql.push(")");
    }
}

/// All that pass, in all stages.
fn everything<'a>(sql: &mut QueryBuilder<'a, Postgres>, asked: &'a NewOperation, tenant: TenantId) {
    let mut stage = Stage::next(None, &asked.filter.states);
    let mut first = true;
    while let Some(here) = stage {
        if !first {
            sql.push(" UNION ALL ");
        }
        first = false;
        sql.push("SELECT 1 FROM (");
        place(sql, here, tenant);
        sql.push(") c JOIN invocations i ON i.invocation_id = c.id AND i.tenant_id = ")
            .push_bind(tenant)
            .push(" WHERE ");
        passes(sql, asked, here);
        stage = Stage::next(Some(here), &asked.filter.states);
    }
}

impl TenantConn {
    /// How many pass the filter now: counted (true), or estimated when counting takes longer than `limit`.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn bulk_count(&mut self, asked: &NewOperation, limit: Duration) -> Result<(i64, bool)> {
        let tenant = self.tenant();
        let mut transaction = self.begin().await?;
        sqlx::query("SELECT set_config('statement_timeout', $1, true)")
            .bind(limit.as_millis().to_string())
            .execute(&mut *transaction)
            .await?;
        let mut sql: QueryBuilder<'_, Postgres> = QueryBuilder::new("SELECT count(*) FROM (");
        everything(&mut sql, asked, tenant);
        sql.push(") n");
        let counted = sql.build_query_scalar::<i64>().persistent(false).fetch_one(&mut *transaction).await;
        transaction.rollback().await?;
        match counted {
            Ok(counted) => return Ok((counted, true)),
            // query_canceled: it took too long.
            Err(sqlx::Error::Database(db)) if db.code().as_deref() == Some("57014") => {}
            Err(error) => return Err(error.into()),
        }
        let mut sql: QueryBuilder<'_, Postgres> = QueryBuilder::new("EXPLAIN (FORMAT JSON) ");
        everything(&mut sql, asked, tenant);
        let plan: Json<serde_json::Value> =
            sql.build_query_scalar().persistent(false).fetch_one(&mut **self).await?;
        let rows = plan.0[0]["Plan"]["Plan Rows"].as_f64().unwrap_or(0.0);
        #[allow(clippy::cast_possible_truncation)] // an estimate
        Ok((rows as i64, false))
    }

    /// Accept an operation, if no more than `most` are open. False: there are.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn bulk_insert(&mut self, asked: &NewOperation, most: i64) -> Result<bool> {
        let tenant = self.tenant();
        let done = sqlx::query(
            "INSERT INTO bulk_operations (tenant_id, bulk_id, action, filter, priority, version, rate, expected, expected_exact)
             SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9 WHERE (SELECT count(*) FROM bulk_operations o
               WHERE o.tenant_id = $1 AND o.state IN ('waiting', 'running')) < $10",
        )
        .bind(tenant)
        .bind(asked.id)
        .bind(asked.action.as_str())
        .bind(Json(&asked.filter))
        .bind(asked.priority)
        .bind(asked.version)
        .bind(asked.rate)
        .bind(asked.expected.0)
        .bind(asked.expected.1)
        .bind(most)
        .execute(&mut **self)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// One operation.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn bulk_get(&mut self, id: BulkId) -> Result<Option<Operation>> {
        let tenant = self.tenant();
        let row = sqlx::query("SELECT * FROM bulk_operations WHERE tenant_id = $1 AND bulk_id = $2")
            .bind(tenant)
            .bind(id)
            .fetch_optional(&mut **self)
            .await?;
        row.as_ref().map(operation).transpose()
    }

    /// Operations, newest first, older than `after`; at most `limit`.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn bulk_list(&mut self, after: Option<BulkId>, limit: i64) -> Result<Vec<Operation>> {
        let tenant = self.tenant();
        let rows = sqlx::query(
            "SELECT * FROM bulk_operations WHERE tenant_id = $1 AND ($2::uuid IS NULL OR bulk_id < $2)
             ORDER BY bulk_id DESC LIMIT $3",
        )
        .bind(tenant)
        .bind(after)
        .bind(limit)
        .fetch_all(&mut **self)
        .await?;
        rows.iter().map(operation).collect()
    }

    /// Stop an operation where it is. What is done stays done.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn bulk_cancel(&mut self, id: BulkId) -> Result<()> {
        let tenant = self.tenant();
        sqlx::query(
            "UPDATE bulk_operations SET state = 'cancelled', finished_at = clock_timestamp()
             WHERE tenant_id = $1 AND bulk_id = $2 AND state IN ('waiting', 'running')",
        )
        .bind(tenant)
        .bind(id)
        .execute(&mut **self)
        .await?;
        Ok(())
    }

    /// The next page of an operation's walk: at most `limit` that pass the filter.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn bulk_page(&mut self, op: &Operation, limit: usize) -> Result<Page> {
        let tenant = self.tenant();
        let states = &op.asked.filter.states;
        let Some(stage) = op.stage.or_else(|| Stage::next(None, states)) else {
            return Ok(Page { ids: Vec::new(), next: None, wraps: false });
        };
        let mut sql: QueryBuilder<'_, Postgres> = QueryBuilder::new("WITH c AS MATERIALIZED (");
        place(&mut sql, stage, tenant);
        let order = if stage == Stage::Ready {
            if let Some(rank) = op.after_rank {
                sql.push(" AND (p.rank, p.invocation_id) > (").push_bind(rank).push(", ");
                sql.push_bind(op.after_id.unwrap_or_default()).push(")");
            }
            "p.rank, p.invocation_id"
        } else {
            sql.push(" AND p.invocation_id > ").push_bind(op.after_id.unwrap_or_default());
            "p.invocation_id"
        };
        sql.push(format_args!(" ORDER BY {order} LIMIT ")).push_bind(LOOK);
        sql.push(") SELECT c.id, c.rank, (");
        passes(&mut sql, &op.asked, stage);
        sql.push(") IS TRUE AS matched FROM c LEFT JOIN invocations i ON i.invocation_id = c.id AND i.tenant_id = ")
            .push_bind(tenant)
            .push(" ORDER BY c.rank, c.id");
        let rows = sql.build().persistent(false).fetch_all(&mut **self).await?;
        let mut ids = Vec::new();
        let mut at = (op.after_rank, op.after_id);
        let mut looked = 0;
        for row in &rows {
            if ids.len() >= limit {
                break;
            }
            looked += 1;
            at = (row.try_get("rank")?, row.try_get("id")?);
            if row.try_get("matched")? {
                ids.push(row.try_get("id")?);
            }
        }
        let over = looked == rows.len() && i64::try_from(rows.len()).unwrap_or(i64::MAX) < LOOK;
        if !over {
            return Ok(Page { ids, next: Some((stage, at.0, at.1)), wraps: false });
        }
        if let Some(stage) = Stage::next(Some(stage), states) {
            return Ok(Page { ids, next: Some((stage, None, None)), wraps: false });
        }
        let again = op.asked.action == Action::Cancel && op.passes + 1 < MAX_PASSES;
        let first = Stage::next(None, states).filter(|_| again);
        Ok(Page { ids, next: first.map(|stage| (stage, None, None)), wraps: true })
    }

    /// Do an action of SQL to a page, and note where the operation is; in one transaction under the duty's fence. `None`:
    /// somebody has stopped it.
    ///
    /// # Errors
    /// The duty is somebody else's by now, or Postgres does not answer; then nothing was done.
    pub async fn bulk_apply(&mut self, held: &Held, op: &Operation, page: &Page) -> Result<Option<Outcome>> {
        let tenant = self.tenant();
        let mut transaction = self.begin().await?;
        if !begins(&mut transaction, held, tenant, op).await? {
            return Ok(None);
        }
        let ids: Vec<uuid::Uuid> = page.ids.iter().map(|id| id.0).collect();
        let mut outcome = Outcome::default();
        match op.asked.action {
            Action::Cancel | Action::Reprioritise => {
                // In one order, so that two of them wait for each other and never in a circle.
                let call = if op.asked.action == Action::Cancel {
                    "cancel_invocation(u.id)"
                } else {
                    "change_invocation(u.id, $2, false, NULL, false, NULL, 1000)"
                };
                let sql = format!(
                    "SELECT u.id, {call} AS word, $2::smallint FROM (SELECT id FROM unnest($1::uuid[]) id ORDER BY id) u"
                );
                let rows =
                    sqlx::query(&sql).bind(&ids).bind(op.asked.priority).fetch_all(&mut *transaction).await?;
                for row in &rows {
                    let id = row.try_get("id")?;
                    match row.try_get::<&str, _>("word")? {
                        "cancelled" => outcome.ended.push(id),
                        "cancelling" => outcome.stopping.push(id),
                        "changed" => {}
                        "ready" => outcome.wake = true,
                        _ => {
                            outcome.skipped += 1;
                            continue;
                        }
                    }
                    outcome.done += 1;
                }
            }
            Action::Purge => {
                let purged: Vec<InvocationId> = sqlx::query_scalar("SELECT * FROM purge_dead($1)")
                    .bind(&ids)
                    .fetch_all(&mut *transaction)
                    .await?;
                outcome.done = i64::try_from(purged.len()).unwrap_or(i64::MAX);
                outcome.skipped = i64::try_from(ids.len()).unwrap_or(i64::MAX) - outcome.done;
            }
            Action::Retry => return Err(Error::Corrupt("a retry is not done here".to_owned())),
        }
        advance(&mut transaction, tenant, op, page, &outcome).await?;
        transaction.commit().await?;
        Ok(Some(outcome))
    }

    /// Note what was done to a page outside of this transaction, and where the operation is; under the duty's fence.
    /// False: somebody has stopped it, or another holder was there before; then nothing was noted.
    ///
    /// # Errors
    /// The duty is somebody else's by now, or Postgres does not answer.
    pub async fn bulk_advance(
        &mut self,
        held: &Held,
        op: &Operation,
        page: &Page,
        outcome: &Outcome,
    ) -> Result<bool> {
        let tenant = self.tenant();
        let mut transaction = self.begin().await?;
        if !begins(&mut transaction, held, tenant, op).await? {
            return Ok(false);
        }
        advance(&mut transaction, tenant, op, page, outcome).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// The same for the first `met` of a page; the rest is not for now, and comes back after this time, or later where the
    /// operation's own rate says so. Only of places that are walked by id alone.
    ///
    /// # Errors
    /// As there.
    pub async fn bulk_hold_up(
        &mut self,
        held: &Held,
        op: &Operation,
        page: &Page,
        met: usize,
        outcome: &Outcome,
        wait: Duration,
    ) -> Result<bool> {
        let tenant = self.tenant();
        let mut transaction = self.begin().await?;
        if !begins(&mut transaction, held, tenant, op).await? {
            return Ok(false);
        }
        if let Some(part) = page.first(op, met) {
            advance(&mut transaction, tenant, op, &part, outcome).await?;
        }
        sqlx::query(
            "UPDATE bulk_operations SET not_before = GREATEST(not_before, clock_timestamp() + make_interval(secs => $3))
             WHERE tenant_id = $1 AND bulk_id = $2",
        )
        .bind(tenant)
        .bind(op.asked.id)
        .bind(wait.as_secs_f64())
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(true)
    }
}

/// Check the fence, and that the operation is open and where `op` says.
async fn begins(
    connection: &mut PgConnection,
    held: &Held,
    tenant: TenantId,
    op: &Operation,
) -> Result<bool> {
    held.check(connection).await?;
    let open: Option<bool> = sqlx::query_scalar(
        "SELECT state IN ('waiting', 'running') AND stage IS NOT DISTINCT FROM $3 AND after_id IS NOT DISTINCT FROM $4
           AND passes = $5
         FROM bulk_operations WHERE tenant_id = $1 AND bulk_id = $2 FOR UPDATE",
    )
    .bind(tenant)
    .bind(op.asked.id)
    .bind(op.stage.map(Stage::as_str))
    .bind(op.after_id)
    .bind(op.passes)
    .fetch_optional(connection)
    .await?;
    Ok(open.unwrap_or(false))
}

async fn advance(
    connection: &mut PgConnection,
    tenant: TenantId,
    op: &Operation,
    page: &Page,
    outcome: &Outcome,
) -> Result<()> {
    let matched = i64::try_from(page.ids.len()).unwrap_or(i64::MAX);
    let pause = op.asked.rate.map_or(0.0, |rate| page.ids.len() as f64 / f64::from(rate.max(1)));
    // A walk whose end finds nothing more is the last, if it is not the first.
    let over = page.next.is_none() || (page.wraps && matched == 0 && op.passes > 0);
    let (stage, rank, id) = match page.next.filter(|_| !over) {
        Some((stage, rank, id)) => (Some(stage.as_str()), rank, id),
        None => (None, None, None),
    };
    sqlx::query(
        "UPDATE bulk_operations SET state = CASE WHEN $3 THEN 'done' ELSE 'running' END,
           stage = $4, after_rank = $5, after_id = $6, passes = passes + CASE WHEN $7 THEN 1 ELSE 0 END,
           matched = matched + $8, done = done + $9, skipped = skipped + $10, failed = failed + $11,
           error = COALESCE($12, error), not_before = clock_timestamp() + make_interval(secs => $13),
           started_at = COALESCE(started_at, clock_timestamp()),
           finished_at = CASE WHEN $3 THEN clock_timestamp() END
         WHERE tenant_id = $1 AND bulk_id = $2",
    )
    .bind(tenant)
    .bind(op.asked.id)
    .bind(over)
    .bind(stage)
    .bind(rank)
    .bind(id)
    .bind(page.wraps)
    .bind(matched)
    .bind(outcome.done)
    .bind(outcome.skipped)
    .bind(outcome.failed)
    .bind(outcome.error.as_deref())
    .bind(pause)
    .execute(connection)
    .await?;
    Ok(())
}

impl WorkerStore {
    /// Operations that are open and whose time has come, of any tenant, the longest waiting first; at most `limit`. And
    /// how long until the next one's, if there is one.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn bulk_open(&self, limit: i64) -> Result<(Vec<(TenantId, BulkId)>, Option<Duration>)> {
        let rows = sqlx::query(
            "SELECT tenant_id, bulk_id, extract(epoch FROM not_before - clock_timestamp())::float8 AS wait FROM bulk_operations
             WHERE state IN ('waiting', 'running') ORDER BY not_before LIMIT $1",
        )
        .bind(limit)
        .fetch_all(&self.pool)
        .await?;
        let mut due = Vec::new();
        for row in &rows {
            let wait: f64 = row.try_get("wait")?;
            if wait > 0.0 {
                return Ok((due, Some(Duration::from_secs_f64(wait))));
            }
            due.push((row.try_get("tenant_id")?, row.try_get("bulk_id")?));
        }
        Ok((due, None))
    }
}
