//! The ledger of usage, read: sums over hours and tasks. Who writes it is `queue` (an ack, in its own transaction).

use chrono::{DateTime, Utc};
use sqlx::Row;

use crate::store::{Result, TenantConn};

/// How the rows of an answer are grouped in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Period {
    /// Not at all.
    Whole,
    /// By hours.
    Hour,
    /// By days (UTC).
    Day,
}

/// What is asked for. Begin and end are full hours.
#[derive(Debug, Clone, Copy)]
pub struct Query {
    /// Begin.
    pub from: DateTime<Utc>,
    /// End, not included.
    pub to: DateTime<Utc>,
    /// Grouping in time.
    pub period: Period,
    /// Grouping by task.
    pub by_task: bool,
    /// Rows at most.
    pub limit: u32,
}

/// A sum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageRow {
    /// Begin of the hour or day.
    pub at: Option<DateTime<Utc>>,
    /// Name of the task.
    pub task: Option<String>,
    /// Attempts that ended with a receipt.
    pub attempts: u64,
    /// Of them, those that succeeded.
    pub succeeded: u64,
    /// Fuel.
    pub fuel: u64,
    /// CPU time.
    pub cpu_ns: u64,
    /// Wall time.
    pub wall_ns: u64,
    /// Bytes of inputs.
    pub input_bytes: u64,
    /// Bytes of outputs.
    pub output_bytes: u64,
    /// Bytes of logs.
    pub log_bytes: u64,
    /// Bytes to and from the outside.
    pub egress_bytes: u64,
}

impl TenantConn {
    /// What this tenant's attempts cost.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn usage(&mut self, query: &Query) -> Result<Vec<UsageRow>> {
        let tenant = self.tenant();
        let width = match query.period {
            Period::Whole => None,
            Period::Hour => Some("1 hour"),
            Period::Day => Some("1 day"),
        };
        // Sums of bigint are numeric; what does not fit any more is the greatest number there is.
        let rows = sqlx::query(
            "SELECT u.at, t.name AS task, u.sums FROM (
               SELECT CASE WHEN $4::text IS NOT NULL THEN date_bin($4::interval, hour, 'epoch') END AS at,
                 CASE WHEN $5 THEN task_id END AS task_id,
                 ARRAY(SELECT LEAST(x, 9223372036854775807)::bigint FROM unnest(ARRAY[
                   sum(attempts), sum(succeeded), sum(fuel), sum(cpu_ns), sum(wall_ns), sum(input_bytes), sum(output_bytes),
                   sum(log_bytes), sum(egress_bytes)]) WITH ORDINALITY AS s(x, n) ORDER BY n) AS sums
               FROM usage WHERE tenant_id = $1 AND hour >= $2 AND hour < $3 GROUP BY 1, 2) u
             LEFT JOIN tasks t ON t.tenant_id = $1 AND t.task_id = u.task_id
             ORDER BY u.at, t.name, u.task_id LIMIT $6",
        )
        .bind(tenant)
        .bind(query.from)
        .bind(query.to)
        .bind(width)
        .bind(query.by_task)
        .bind(i64::from(query.limit))
        .fetch_all(&mut **self)
        .await?;
        rows.iter()
            .map(|row| {
                let sums: Vec<i64> = row.try_get("sums")?;
                let sum = |n: usize| sums.get(n).map_or(0, |sum| u64::try_from(*sum).unwrap_or(0));
                Ok(UsageRow {
                    at: row.try_get("at")?,
                    task: row.try_get("task")?,
                    attempts: sum(0),
                    succeeded: sum(1),
                    fuel: sum(2),
                    cpu_ns: sum(3),
                    wall_ns: sum(4),
                    input_bytes: sum(5),
                    output_bytes: sum(6),
                    log_bytes: sum(7),
                    egress_bytes: sum(8),
                })
            })
            .collect()
    }
}
