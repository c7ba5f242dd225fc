//! Worker processes as rows: registration, heartbeat, leave. Owns no timing (that is `worker::lease`).

use sandbar_host::walls::Walls;
use sqlx::Row;
use sqlx::types::Json;

use crate::domain::ids::{InvocationId, WorkerId};
use crate::store::{Error, Result, WorkerStore};

/// What a worker says of itself when it registers.
#[derive(Debug, Clone)]
pub struct Registration {
    /// Its id, new for every process.
    pub worker: WorkerId,
    /// Random; a worker that registers again takes a new one.
    pub epoch: i64,
    /// Host name, for people.
    pub host: String,
    /// Version of the binary.
    pub version: String,
    /// Attempts it can run at once.
    pub slots: i32,
}

impl WorkerStore {
    /// Become a worker that may claim.
    ///
    /// # Errors
    /// Postgres does not answer, or the id is taken.
    pub async fn worker_register(&self, r: &Registration) -> Result<()> {
        sqlx::query(
            "INSERT INTO workers (worker_id, epoch, host, version, slots) VALUES ($1, $2, $3, $4, $5)",
        )
        .bind(r.worker)
        .bind(r.epoch)
        .bind(&r.host)
        .bind(&r.version)
        .bind(r.slots)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Say which walls of the kernel stand around this worker's cells.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn worker_walls(&self, worker: WorkerId, epoch: i64, walls: Walls) -> Result<()> {
        sqlx::query("UPDATE workers SET walls = $3 WHERE worker_id = $1 AND epoch = $2")
            .bind(worker)
            .bind(epoch)
            .bind(Json(walls))
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Say "alive", and hear which invocations somebody wants cancelled (of any worker: the list is short, and the
    /// worker knows its own).
    ///
    /// # Errors
    /// [`Error::WorkerGone`] when this worker, in this epoch, has been declared dead.
    pub async fn worker_heartbeat(&self, worker: WorkerId, epoch: i64) -> Result<Vec<InvocationId>> {
        let row = sqlx::query(
            "WITH beat AS (
               UPDATE workers SET heartbeat_at = clock_timestamp() WHERE worker_id = $1 AND epoch = $2 RETURNING 1)
             SELECT EXISTS (SELECT 1 FROM beat) AS alive,
               ARRAY(SELECT invocation_id FROM cancels ORDER BY requested_at DESC LIMIT 10000) AS cancels",
        )
        .bind(worker)
        .bind(epoch)
        .fetch_one(&self.pool)
        .await?;
        if !row.try_get::<bool, _>("alive")? {
            return Err(Error::WorkerGone);
        }
        Ok(row.try_get::<Vec<uuid::Uuid>, _>("cancels")?.into_iter().map(InvocationId).collect())
    }
}
