//! What operators of the platform see and steer: workers and background duties. Belongs to no tenant; who may come here
//! is decided by `auth` before.

use serde_json::{Value, json};

use crate::app::{App, Error, FieldError, Result, audit};
use crate::domain::ids::WorkerId;
use crate::domain::worker::Wanted;
use crate::store::duty::{DutyChange, DutyRow};
use crate::store::worker::WorkerRow;

/// Shortest and longest time between runs of a duty, in milliseconds: a hundred times a second, and once a day.
pub const DUTY_INTERVAL_MS: (i64, i64) = (10, 86_400_000);

impl App {
    /// Every worker that runs, oldest first, then those that are gone, last first.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn workers(&self) -> Result<Vec<WorkerRow>> {
        Ok(self.inner.store.workers().await?)
    }

    /// Say what is wanted of a worker. It hears with its next heartbeat.
    ///
    /// # Errors
    /// No such worker runs.
    pub async fn worker_want(&self, worker: WorkerId, wanted: Wanted) -> Result<WorkerRow> {
        let row = self.inner.store.worker_want(worker, wanted).await?;
        let row = row.ok_or(Error::WorkerNotFound(worker))?;
        audit::changed(
            Value::Null,
            json!({"worker": row.worker, "host": row.host, "wanted": format!("{wanted:?}")}),
        );
        Ok(row)
    }

    /// Every background duty, by name.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn duties(&self) -> Result<Vec<DutyRow>> {
        Ok(self.inner.store.duties().await?)
    }

    /// Change a background duty. Its holder sees it within a tick of its scheduler.
    ///
    /// # Errors
    /// No such duty, or an interval out of its range.
    pub async fn duty_change(&self, name: &str, change: DutyChange) -> Result<DutyRow> {
        if let Some(Some(ms)) = change.interval_ms
            && !(DUTY_INTERVAL_MS.0..=DUTY_INTERVAL_MS.1).contains(&ms)
        {
            let (least, most) = DUTY_INTERVAL_MS;
            let detail = format!("must be from {least} to {most}, or null for the default");
            return Err(Error::InvalidFields(vec![FieldError::new("/interval_ms", detail)]));
        }
        let before = self.inner.store.duties().await?.into_iter().find(|duty| duty.name == name);
        // A name longer than any of ours needs no look, and would only fill the log.
        let row = if name.len() > 64 { None } else { self.inner.store.duty_change(name, change).await? };
        let row = row.ok_or_else(|| Error::DutyNotFound(name.chars().take(64).collect()))?;
        audit::changed(before.as_ref().map_or(Value::Null, settings), settings(&row));
        Ok(row)
    }
}

fn settings(duty: &DutyRow) -> Value {
    json!({"paused": duty.paused, "interval_ms": duty.interval_ms, "run_requested": duty.run_requested})
}
