//! Worker processes as rows: registration, heartbeat, what is wanted of them, who was there. Owns no timing (that is
//! `worker::lease`).

use chrono::{DateTime, Utc};
use sandbar_host::walls::Walls;
use sqlx::Row;
use sqlx::postgres::PgRow;
use sqlx::types::Json;

use crate::domain::ids::{InvocationId, WorkerId};
use crate::domain::worker::{UnknownWanted, Wanted};
use crate::store::{ApiStore, Error, Result, WorkerStore};

/// Workers that a list shows: all that run, and the last of those that are gone.
const MAX_LISTED: i64 = 1_000;

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

/// What a heartbeat carries up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Attempts it has: running, or being made ready.
    pub running: i32,
    /// Attempts of the usual size for which its memory has room; `None` before it said so.
    pub room: Option<i32>,
    /// Resident memory of the worker's own process, in bytes; `None` where the system does not say.
    pub worker_bytes: Option<i64>,
    /// Resident memory of its cells, in bytes.
    pub cells_bytes: Option<i64>,
    /// Memory of its machine or its control group, in bytes: whichever is less.
    pub host_bytes: Option<i64>,
}

/// What a heartbeat brings down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orders {
    /// Invocations that somebody wants cancelled (of any worker: the list is short, and the worker knows its own).
    pub cancels: Vec<InvocationId>,
    /// What is wanted of the worker.
    pub wanted: Wanted,
    /// Other workers claim as well.
    pub has_peers: bool,
}

/// A worker as operators see it.
#[derive(Debug, Clone)]
pub struct WorkerRow {
    /// Its id.
    pub worker: WorkerId,
    /// Host name.
    pub host: String,
    /// Version of its binary.
    pub version: String,
    /// Attempts it can run at once.
    pub slots: i32,
    /// When it registered.
    pub started_at: DateTime<Utc>,
    /// Its last heartbeat.
    pub seen_at: DateTime<Utc>,
    /// What is wanted of it and what it said last; `None` once it is gone.
    pub live: Option<(Wanted, Load)>,
    /// Which walls of the kernel stand around its cells; `None` before it said so, and once it is gone.
    pub walls: Option<Walls>,
    /// When it left or was declared dead.
    pub gone_at: Option<DateTime<Utc>>,
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

    /// Say "alive" and how much there is to do, and hear what is wanted.
    ///
    /// # Errors
    /// [`Error::WorkerGone`] when this worker, in this epoch, has been declared dead.
    pub async fn worker_heartbeat(&self, worker: WorkerId, epoch: i64, load: Load) -> Result<Orders> {
        let row = sqlx::query(
            "WITH beat AS (
               UPDATE workers SET heartbeat_at = clock_timestamp(), running = $3, worker_bytes = $4, cells_bytes = $5,
                 host_bytes = $6, room = $7
               WHERE worker_id = $1 AND epoch = $2 RETURNING wanted)
             SELECT (SELECT wanted FROM beat) AS wanted,
               EXISTS (SELECT 1 FROM workers WHERE worker_id <> $1 AND wanted = 'active') AS has_peers,
               ARRAY(SELECT invocation_id FROM cancels ORDER BY requested_at DESC LIMIT 10000) AS cancels",
        )
        .bind(worker)
        .bind(epoch)
        .bind(load.running)
        .bind(load.worker_bytes)
        .bind(load.cells_bytes)
        .bind(load.host_bytes)
        .bind(load.room)
        .fetch_one(&self.pool)
        .await?;
        let Some(wanted) = row.try_get::<Option<&str>, _>("wanted")? else {
            return Err(Error::WorkerGone);
        };
        Ok(Orders {
            cancels: row.try_get::<Vec<uuid::Uuid>, _>("cancels")?.into_iter().map(InvocationId).collect(),
            wanted: parse(wanted)?,
            has_peers: row.try_get("has_peers")?,
        })
    }

    /// Carry over to a new identity what was wanted of the old one.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn worker_stays(&self, worker: WorkerId, wanted: Wanted) -> Result<()> {
        sqlx::query("UPDATE workers SET wanted = $2 WHERE worker_id = $1")
            .bind(worker)
            .bind(wanted.as_str())
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}

fn parse(word: &str) -> Result<Wanted> {
    word.parse().map_err(|e: UnknownWanted| Error::Corrupt(e.to_string()))
}

const LIVE: &str = "worker_id, host, version, slots, started_at, heartbeat_at, wanted, running, worker_bytes,
  cells_bytes, host_bytes, room, walls, NULL::timestamptz AS gone_at";

fn worker(row: &PgRow) -> Result<WorkerRow> {
    let gone_at: Option<DateTime<Utc>> = row.try_get("gone_at")?;
    let live = match gone_at {
        Some(_) => None,
        None => Some((
            parse(row.try_get("wanted")?)?,
            Load {
                running: row.try_get("running")?,
                room: row.try_get("room")?,
                worker_bytes: row.try_get("worker_bytes")?,
                cells_bytes: row.try_get("cells_bytes")?,
                host_bytes: row.try_get("host_bytes")?,
            },
        )),
    };
    Ok(WorkerRow {
        worker: row.try_get("worker_id")?,
        host: row.try_get("host")?,
        version: row.try_get("version")?,
        slots: row.try_get("slots")?,
        started_at: row.try_get("started_at")?,
        seen_at: row.try_get("heartbeat_at")?,
        walls: match gone_at {
            Some(_) => None,
            None => row.try_get::<Option<Json<_>>, _>("walls")?.map(|json| json.0),
        },
        live,
        gone_at,
    })
}

impl ApiStore {
    /// Every worker that runs, oldest first, then those that are gone, last first.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn workers(&self) -> Result<Vec<WorkerRow>> {
        let sql = format!("SELECT {LIVE} FROM workers ORDER BY started_at, worker_id LIMIT $1");
        let rows = sqlx::query(&sql).bind(MAX_LISTED).fetch_all(&self.pool).await?;
        let mut workers = rows.iter().map(worker).collect::<Result<Vec<_>>>()?;
        let left = MAX_LISTED - i64::try_from(workers.len()).unwrap_or(MAX_LISTED);
        let rows = sqlx::query(
            "SELECT worker_id, host, version, slots, started_at, heartbeat_at, gone_at FROM workers_gone
             ORDER BY gone_at DESC LIMIT $1",
        )
        .bind(left)
        .fetch_all(&self.pool)
        .await?;
        for row in &rows {
            workers.push(worker(row)?);
        }
        Ok(workers)
    }

    /// Say what is wanted of a worker; it hears with its next heartbeat. `None`: no such worker runs.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn worker_want(&self, id: WorkerId, wanted: Wanted) -> Result<Option<WorkerRow>> {
        let sql = format!("UPDATE workers SET wanted = $2 WHERE worker_id = $1 RETURNING {LIVE}");
        let row = sqlx::query(&sql).bind(id).bind(wanted.as_str()).fetch_optional(&self.pool).await?;
        row.as_ref().map(worker).transpose()
    }
}
