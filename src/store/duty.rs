//! Background duties as rows: who holds each, its settings, its statistics, and the fence.
//!
//! The fence is a number that grows whenever the lease changes hands. Every transaction of a run begins with
//! `duty_check`, which finds the row with holder and fence unchanged and keeps a KEY SHARE lock on it until the
//! transaction ends. Taking over needs FOR UPDATE on that row, which waits for nobody (SKIP LOCKED): while a transaction
//! of the old holder is open nobody takes over, and once somebody has, none of the old holder's can begin. So the writes
//! of two holders never overlap, whatever their clocks say and however long one of them was suspended. Changing settings
//! touches other columns (NO KEY UPDATE) and waits for no run.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Postgres, Row, Transaction};

use crate::domain::ids::WorkerId;
use crate::store::{ApiStore, Error, Result, WorkerStore};

/// The lease of a duty, as it was when taken or renewed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    name: &'static str,
    holder: WorkerId,
    fence: i64,
    /// A run has begun with this.
    pub begun: bool,
    /// Time until its interval is over.
    pub due_in: Duration,
}

impl Held {
    /// First statement of a transaction of this duty's run, on whatever connection: nobody takes the duty over until the
    /// transaction ends.
    ///
    /// # Errors
    /// [`Error::FenceLost`] when the duty is somebody else's by now.
    pub async fn check(&self, connection: &mut PgConnection) -> Result<()> {
        let ours: bool = sqlx::query_scalar("SELECT duty_check($1, $2, $3)")
            .bind(self.name)
            .bind(self.holder)
            .bind(self.fence)
            .fetch_one(connection)
            .await?;
        if ours { Ok(()) } else { Err(Error::FenceLost) }
    }
}

/// A duty as operators see it.
#[derive(Debug, Clone)]
pub struct DutyRow {
    /// Its name.
    pub name: String,
    /// Who holds its lease now, and since when.
    pub holder: Option<(WorkerId, DateTime<Utc>)>,
    /// It runs only when asked to.
    pub paused: bool,
    /// A run is under way, as far as its holder said.
    pub running: bool,
    /// Somebody asked for a run that has not begun.
    pub run_requested: bool,
    /// Milliseconds between runs, if set; `None`: the default.
    pub interval_ms: Option<i64>,
    /// Milliseconds between runs by the holder's configuration.
    pub default_interval_ms: i64,
    /// Runs that ended, well or not.
    pub runs: i64,
    /// Runs that failed.
    pub failures: i64,
    /// Rows handled by all runs.
    pub rows_handled: i64,
    /// When the last run began.
    pub last_run_at: Option<DateTime<Utc>>,
    /// How long it took.
    pub last_duration_ms: Option<i64>,
    /// Rows it handled.
    pub last_rows: Option<i64>,
    /// Why it failed, if it did.
    pub last_error: Option<String>,
}

/// What is to change about a duty; `None` leaves it.
#[derive(Debug, Clone, Copy, Default)]
pub struct DutyChange {
    /// Pause or resume.
    pub paused: Option<bool>,
    /// Ask for a run now.
    pub run: bool,
    /// Milliseconds between runs; `Some(None)`: back to the default.
    pub interval_ms: Option<Option<i64>>,
}

impl WorkerStore {
    /// Make the duty known, so that operators see and may set it before anybody has held it.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn duty_announce(&self, name: &'static str, default_interval: Duration) -> Result<()> {
        sqlx::query(
            "INSERT INTO duties (name, expires_at, default_interval_ms) VALUES ($1, '-infinity', $2)
             ON CONFLICT (name) DO UPDATE SET default_interval_ms = excluded.default_interval_ms
             WHERE duties.default_interval_ms <> excluded.default_interval_ms",
        )
        .bind(name)
        .bind(millis(default_interval))
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Take or keep the lease of `name` for `ttl`, and begin a run if it is time: because its interval is over, somebody
    /// asked for a run, or the holder itself wants one now (`eager`). A paused duty runs only when asked to. `None`:
    /// somebody else has it.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn duty_hold(
        &self,
        name: &'static str,
        holder: WorkerId,
        ttl: Duration,
        eager: bool,
    ) -> Result<Option<Held>> {
        let row = sqlx::query(
            "WITH mine AS (
               SELECT name, run_requested OR (NOT paused AND ($4 OR last_run_at IS NULL OR clock_timestamp() >=
                 last_run_at + COALESCE(interval_ms, default_interval_ms) * interval '1 millisecond')) AS begun
               FROM duties WHERE name = $1 AND (holder = $2 OR expires_at < clock_timestamp())
               FOR UPDATE SKIP LOCKED)
             UPDATE duties d SET holder = $2, expires_at = clock_timestamp() + make_interval(secs => $3),
               fence = d.fence + CASE WHEN d.holder = $2 AND d.expires_at >= clock_timestamp() THEN 0 ELSE 1 END,
               held_since = CASE WHEN d.holder = $2 THEN d.held_since ELSE clock_timestamp() END,
               running = mine.begun, run_requested = d.run_requested AND NOT mine.begun,
               last_run_at = CASE WHEN mine.begun THEN clock_timestamp() ELSE d.last_run_at END
             FROM mine WHERE d.name = mine.name
             RETURNING d.fence, mine.begun, GREATEST(0, extract(epoch FROM d.last_run_at - clock_timestamp()) * 1000
               + COALESCE(d.interval_ms, d.default_interval_ms))::bigint AS due_in_ms",
        )
        .bind(name)
        .bind(holder)
        .bind(ttl.as_secs_f64())
        .bind(eager)
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| {
            // None for a paused duty that has never run.
            let due_in: Option<i64> = row.try_get("due_in_ms")?;
            Ok(Held {
                name,
                holder,
                fence: row.try_get("fence")?,
                begun: row.try_get("begun")?,
                due_in: due_in.map_or(Duration::MAX, |ms| Duration::from_millis(ms.unsigned_abs())),
            })
        })
        .transpose()
    }

    /// This store, as far as a duty's run goes: everything that begins with [`WorkerStore::begin`] is fenced by `held`.
    #[must_use]
    pub fn under(&self, held: &Held) -> Self {
        Self { fence: Some(held.clone()), ..self.clone() }
    }

    /// A transaction; under a duty, one that only its holder can have, and that nobody takes the duty over during.
    ///
    /// # Errors
    /// [`Error::FenceLost`] when the duty is somebody else's by now.
    pub async fn begin(&self) -> Result<Transaction<'static, Postgres>> {
        let mut transaction = self.pool.begin().await?;
        if let Some(held) = &self.fence {
            held.check(&mut transaction).await?;
        }
        Ok(transaction)
    }

    /// Note that the run ended, and how. Nothing, when the duty is somebody else's by now.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn duty_ran(&self, held: &Held, took: Duration, rows: u64, error: Option<&str>) -> Result<()> {
        sqlx::query(
            "UPDATE duties SET running = false, runs = runs + 1, rows_handled = rows_handled + $4, last_rows = $4,
               last_duration_ms = $5, last_error = $6, failures = failures + CASE WHEN $6 IS NULL THEN 0 ELSE 1 END
             WHERE name = $1 AND holder = $2 AND fence = $3",
        )
        .bind(held.name)
        .bind(held.holder)
        .bind(held.fence)
        .bind(i64::try_from(rows).unwrap_or(i64::MAX))
        .bind(millis(took))
        .bind(error)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Let go of every duty of this holder, so that another takes over at once.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn duties_release(&self, holder: WorkerId) -> Result<()> {
        sqlx::query(
            "UPDATE duties SET expires_at = clock_timestamp(), holder = NULL, held_since = NULL, running = false
             WHERE holder = $1",
        )
        .bind(holder)
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

const COLUMNS: &str = "name, CASE WHEN expires_at >= clock_timestamp() THEN holder END AS holder, held_since, paused,
  running AND expires_at >= clock_timestamp() AS running, run_requested, interval_ms, default_interval_ms, runs, failures,
  rows_handled, last_run_at, last_duration_ms, last_rows, last_error";

fn duty(row: &PgRow) -> Result<DutyRow> {
    let holder: Option<WorkerId> = row.try_get("holder")?;
    let since: Option<DateTime<Utc>> = row.try_get("held_since")?;
    Ok(DutyRow {
        name: row.try_get("name")?,
        holder: holder.zip(since),
        paused: row.try_get("paused")?,
        running: row.try_get("running")?,
        run_requested: row.try_get("run_requested")?,
        interval_ms: row.try_get("interval_ms")?,
        default_interval_ms: row.try_get("default_interval_ms")?,
        runs: row.try_get("runs")?,
        failures: row.try_get("failures")?,
        rows_handled: row.try_get("rows_handled")?,
        last_run_at: row.try_get("last_run_at")?,
        last_duration_ms: row.try_get("last_duration_ms")?,
        last_rows: row.try_get("last_rows")?,
        last_error: row.try_get("last_error")?,
    })
}

impl ApiStore {
    /// Every duty that a server has announced, by name.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn duties(&self) -> Result<Vec<DutyRow>> {
        let sql = format!("SELECT {COLUMNS} FROM duties ORDER BY name");
        sqlx::query(&sql).fetch_all(&self.pool).await?.iter().map(duty).collect()
    }

    /// Change a duty. Its holder sees it with its next look, within a second or so. `None`: no such duty.
    ///
    /// # Errors
    /// Postgres does not answer, or the interval is out of its range.
    pub async fn duty_change(&self, name: &str, change: DutyChange) -> Result<Option<DutyRow>> {
        let sql = format!(
            "UPDATE duties SET paused = COALESCE($2, paused), run_requested = run_requested OR $3,
               interval_ms = CASE WHEN $4 THEN $5 ELSE interval_ms END
             WHERE name = $1 RETURNING {COLUMNS}"
        );
        let row = sqlx::query(&sql)
            .bind(name)
            .bind(change.paused)
            .bind(change.run)
            .bind(change.interval_ms.is_some())
            .bind(change.interval_ms.flatten())
            .fetch_optional(&self.pool)
            .await?;
        row.as_ref().map(duty).transpose()
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
