//! Budgets and the events they make, as rows. Decides nothing: what is allowed in a budget is `domain::spending`.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{Connection as _, Row};
use uuid::Uuid;

use crate::domain::ids::TenantId;
use crate::domain::names::TaskName;
use crate::domain::spending::{MAX_BUDGETS, Measure, Period};
use crate::store::{Error, Result, TenantConn, WorkerStore, quota};

/// What somebody means to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    /// Its name.
    pub name: TaskName,
    /// Of this task; `None`: of the whole tenant.
    pub task: Option<TaskName>,
    /// What is counted.
    pub measure: Measure,
    /// Over which time.
    pub period: Period,
    /// How much.
    pub amount: i64,
    /// Percentages of it that are events.
    pub thresholds: Vec<i16>,
}

/// A budget and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BudgetRow {
    /// What is meant.
    pub budget: Budget,
    /// What is used in the current period.
    pub used: i64,
    /// When that began.
    pub starts_at: DateTime<Utc>,
    /// When it ends.
    pub ends_at: DateTime<Utc>,
    /// When the budget was set last.
    pub updated_at: DateTime<Utc>,
}

/// Something that a tenant is told once.
#[derive(Debug, Clone, PartialEq)]
pub struct EventRow {
    /// Its id, in the order of time.
    pub id: Uuid,
    /// When it was noticed.
    pub at: DateTime<Utc>,
    /// What kind of event.
    pub kind: String,
    /// The rest.
    pub data: Value,
}

/// What became of setting a budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// It holds.
    Done,
    /// There is no such task.
    UnknownTask,
    /// There are [`MAX_BUDGETS`] others.
    TooMany,
}

fn budget(row: &PgRow) -> Result<BudgetRow> {
    let corrupt = |what: &str| Error::Corrupt(format!("a budget with {what}"));
    let name = |text: String| TaskName::try_from(text).map_err(|_| corrupt("a name that is none"));
    Ok(BudgetRow {
        budget: Budget {
            name: name(row.try_get("name")?)?,
            task: row.try_get::<Option<String>, _>("task")?.map(name).transpose()?,
            measure: row.try_get::<&str, _>("measure")?.parse().map_err(|()| corrupt("another measure"))?,
            period: row.try_get::<&str, _>("period")?.parse().map_err(|()| corrupt("another period"))?,
            amount: row.try_get("amount")?,
            thresholds: row.try_get("thresholds")?,
        },
        used: row.try_get("used")?,
        starts_at: row.try_get("starts_at")?,
        ends_at: row.try_get("ends_at")?,
        updated_at: row.try_get("updated_at")?,
    })
}

/// A sum as it fits into an answer.
const USED: &str = "LEAST(s.used, 9223372036854775807)::bigint AS used, s.starts_at, s.ends_at";

impl TenantConn {
    /// This tenant's budgets by name, or one of them, and what is used of each.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn budgets(&mut self, name: Option<&TaskName>) -> Result<Vec<BudgetRow>> {
        let tenant = self.tenant();
        let rows = sqlx::query(&format!(
            "SELECT b.*, t.name AS task, {USED} FROM budgets b
             LEFT JOIN tasks t ON t.tenant_id = b.tenant_id AND t.task_id = b.task_id
             CROSS JOIN LATERAL budget_used(b.tenant_id, b.task_id, b.measure, b.period, clock_timestamp()) s
             WHERE b.tenant_id = $1 AND ($2::text IS NULL OR b.name = $2) ORDER BY b.name"
        ))
        .bind(tenant)
        .bind(name.map(TaskName::as_str))
        .fetch_all(&mut **self)
        .await?;
        rows.iter().map(budget).collect()
    }

    /// Let a budget be this, new or changed. One that measures something else from now on begins anew.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn budget_put(&mut self, budget: &Budget) -> Result<Put> {
        let tenant = self.tenant();
        let mut transaction = self.begin().await.map_err(Error::from)?;
        quota::one_at_a_time(&mut transaction, tenant).await?;
        let task: Option<Uuid> = match &budget.task {
            None => None,
            Some(name) => {
                let found = sqlx::query_scalar(
                    "SELECT task_id FROM tasks WHERE tenant_id = $1 AND name = $2 AND deleted_at IS NULL",
                );
                let found: Option<Uuid> =
                    found.bind(tenant).bind(name.as_str()).fetch_optional(&mut *transaction).await?;
                if found.is_none() {
                    return Ok(Put::UnknownTask);
                }
                found
            }
        };
        let done = sqlx::query(
            "INSERT INTO budgets AS b (tenant_id, name, budget_id, task_id, measure, period, amount, thresholds)
             SELECT $1, $2, $3, $4, $5, $6, $7, $8 WHERE EXISTS (SELECT 1 FROM budgets WHERE tenant_id = $1 AND name = $2)
               OR (SELECT count(*) FROM budgets WHERE tenant_id = $1) < $9
             ON CONFLICT (tenant_id, name) DO UPDATE SET task_id = excluded.task_id, measure = excluded.measure,
               period = excluded.period, amount = excluded.amount, thresholds = excluded.thresholds,
               updated_at = clock_timestamp(), looked_at = NULL,
               budget_id = CASE WHEN (b.task_id, b.measure, b.period) IS NOT DISTINCT FROM
                 (excluded.task_id, excluded.measure, excluded.period) THEN b.budget_id ELSE excluded.budget_id END",
        )
        .bind(tenant)
        .bind(budget.name.as_str())
        .bind(Uuid::now_v7())
        .bind(task)
        .bind(budget.measure.as_str())
        .bind(budget.period.as_str())
        .bind(budget.amount)
        .bind(&budget.thresholds)
        .bind(MAX_BUDGETS)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await.map_err(Error::from)?;
        Ok(if done.rows_affected() > 0 { Put::Done } else { Put::TooMany })
    }

    /// Delete a budget. False: there is none.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn budget_delete(&mut self, name: &TaskName) -> Result<bool> {
        let tenant = self.tenant();
        let done = sqlx::query("DELETE FROM budgets WHERE tenant_id = $1 AND name = $2")
            .bind(tenant)
            .bind(name.as_str())
            .execute(&mut **self)
            .await?;
        Ok(done.rows_affected() > 0)
    }

    /// This tenant's events, newest first, older than `after`; at most `limit`.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn events(&mut self, after: Option<Uuid>, limit: i64) -> Result<Vec<EventRow>> {
        let tenant = self.tenant();
        let rows = sqlx::query(
            "SELECT event_id, at, kind, data FROM events WHERE tenant_id = $1 AND ($2::uuid IS NULL OR event_id < $2)
             ORDER BY event_id DESC LIMIT $3",
        )
        .bind(tenant)
        .bind(after)
        .bind(limit)
        .fetch_all(&mut **self)
        .await?;
        rows.iter()
            .map(|row| {
                Ok(EventRow {
                    id: row.try_get("event_id")?,
                    at: row.try_get("at")?,
                    kind: row.try_get("kind")?,
                    data: row.try_get::<Json<_>, _>("data")?.0,
                })
            })
            .collect()
    }
}

impl WorkerStore {
    /// Look at budgets that nobody has looked at for `every`, at most `limit`, and write an event for each threshold that
    /// is reached in the period that runs, or in one that ended within the last hour. What has been an event is none
    /// again, whoever looks at the same time. Returns the new events, and how many budgets were looked at. Under the
    /// duty's fence.
    ///
    /// # Errors
    /// Postgres does not answer, or the duty is somebody else's by now.
    pub async fn budgets_look(
        &self,
        every: Duration,
        limit: i64,
    ) -> Result<(Vec<(TenantId, EventRow)>, u64)> {
        let mut transaction = self.begin().await?;
        let rows = sqlx::query(&format!(
            "WITH due AS (
               UPDATE budgets b SET looked_at = clock_timestamp() FROM (
                 SELECT tenant_id, name FROM budgets
                 WHERE looked_at IS NULL OR looked_at <= (SELECT clock_timestamp()) - make_interval(secs => $1)
                 ORDER BY looked_at NULLS FIRST LIMIT $2 FOR UPDATE SKIP LOCKED) o
               WHERE b.tenant_id = o.tenant_id AND b.name = o.name RETURNING b.*)
             SELECT d.tenant_id, d.name, d.budget_id, d.measure, d.period, d.amount, t.name AS task, {USED},
               ARRAY(SELECT h FROM unnest(d.thresholds) h WHERE s.used * 100 >= d.amount::numeric * h ORDER BY h) AS reached
             FROM due d LEFT JOIN tasks t ON t.tenant_id = d.tenant_id AND t.task_id = d.task_id
             CROSS JOIN unnest(ARRAY[interval '0', interval '1 hour']) back
             CROSS JOIN LATERAL budget_used(d.tenant_id, d.task_id, d.measure, d.period, clock_timestamp() - back) s
             ORDER BY s.starts_at"
        ))
        .bind(every.as_secs_f64())
        .bind(limit)
        .fetch_all(&mut *transaction)
        .await?;
        let mut events = Vec::new();
        for row in &rows {
            let reached: Vec<i16> = row.try_get("reached")?;
            for threshold in reached {
                events.extend(self.budget_event(&mut transaction, row, threshold).await?);
            }
        }
        transaction.commit().await?;
        // Each is looked at for two moments.
        Ok((events, rows.len() as u64 / 2))
    }

    async fn budget_event(
        &self,
        transaction: &mut sqlx::Transaction<'_, sqlx::Postgres>,
        row: &PgRow,
        threshold: i16,
    ) -> Result<Option<(TenantId, EventRow)>> {
        let tenant: TenantId = row.try_get("tenant_id")?;
        let starts_at: DateTime<Utc> = row.try_get("starts_at")?;
        let budget: Uuid = row.try_get("budget_id")?;
        let data = json!({
            "budget": row.try_get::<String, _>("name")?,
            "task": row.try_get::<Option<String>, _>("task")?,
            "measure": row.try_get::<String, _>("measure")?,
            "period": row.try_get::<String, _>("period")?,
            "starts_at": starts_at,
            "ends_at": row.try_get::<DateTime<Utc>, _>("ends_at")?,
            "threshold": threshold,
            "amount": row.try_get::<i64, _>("amount")?,
            "used": row.try_get::<i64, _>("used")?,
        });
        let id = Uuid::now_v7();
        let at: Option<DateTime<Utc>> = sqlx::query_scalar(
            "INSERT INTO events (tenant_id, event_id, kind, data, once) VALUES ($1, $2, $3, $4, $5)
             ON CONFLICT (tenant_id, once) DO NOTHING RETURNING at",
        )
        .bind(tenant)
        .bind(id)
        .bind(BUDGET_EVENT)
        .bind(&data)
        .bind(format!("budget {budget} {} {threshold}", starts_at.timestamp()))
        .fetch_optional(&mut **transaction)
        .await?;
        Ok(at.map(|at| (tenant, EventRow { id, at, kind: BUDGET_EVENT.to_owned(), data })))
    }

    /// Forget events after 400 days, at most `limit`. Returns how many.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn events_forget(&self, limit: i64) -> Result<u64> {
        let mut transaction = self.begin().await?;
        let done = sqlx::query(
            "DELETE FROM events e USING (SELECT tenant_id, event_id FROM events
               WHERE at < (SELECT clock_timestamp()) - interval '400 days' ORDER BY at LIMIT $1) o
             WHERE e.tenant_id = o.tenant_id AND e.event_id = o.event_id",
        )
        .bind(limit)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(done.rows_affected())
    }
}

/// The kind of an event that says that a threshold of a budget was reached.
pub const BUDGET_EVENT: &str = "budget-threshold";
