//! Logs as rows: the whole log of an attempt that ended, and what a running one has said so far. Both are JSON lines
//! numbered from 0 within their attempt, the second always a beginning of the first, so that a place in one is a place
//! in the other.

use chrono::{DateTime, Utc};
use sandbar_host::cell::Progress;
use sandbar_host::log;
use sandbar_host::outcome::LogRecord;
use sqlx::Row;
use sqlx::types::Json;

use crate::domain::ids::{InvocationId, WorkerId};
use crate::store::queue::Claim;
use crate::store::{Result, TenantConn, WorkerStore};

/// A place in the log of an invocation: after this record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Number of the attempt.
    pub attempt: i16,
    /// Number of the record in it, from 0.
    pub index: i32,
}

/// Records in a row, of one attempt.
#[derive(Debug, Clone)]
pub struct Piece {
    /// Attempt that wrote them.
    pub attempt: i16,
    /// Number of the first of them in the attempt's log.
    pub first: i32,
    /// When the attempt began.
    pub started_at: DateTime<Utc>,
    /// The attempt may still run; pieces of a running one may come out of order.
    pub live: bool,
    /// It is the whole log of its attempt, as its end brought it.
    pub whole: bool,
    /// JSON lines, or what seals them.
    pub records: Vec<u8>,
}

/// What a running attempt said since the last time.
#[derive(Debug, Clone)]
pub struct Said {
    /// The right to say so.
    pub claim: Claim,
    /// When the guest was started.
    pub started_at: DateTime<Utc>,
    /// Records, and the number of the first of them.
    pub log: Option<(i32, Vec<u8>)>,
    /// The latest report, and when it came.
    pub progress: Option<(Progress, DateTime<Utc>)>,
}

impl TenantConn {
    /// The log of an invocation after `after`, in order, of one attempt if `attempt` is given: as many pieces as begin
    /// within the first `max_bytes`, and the data key that seals them. The first may begin before `after`. True: there
    /// are more. `None`: no such invocation.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn log_pieces(
        &mut self,
        id: InvocationId,
        attempt: Option<i16>,
        after: Option<Place>,
        max_bytes: i64,
    ) -> Result<Option<(Vec<Piece>, Option<String>, bool)>> {
        let tenant = self.tenant();
        let after = after.unwrap_or(Place { attempt: 0, index: -1 });
        let rows = sqlx::query(
            "SELECT attempt, first, started_at, live, whole, CASE WHEN before < $6 THEN records END AS records,
               (SELECT i.spec ->> 'sealed' FROM invocations i WHERE i.tenant_id = $1 AND i.invocation_id = $2) AS sealed FROM (
               SELECT p.*, sum(octet_length(p.records)) OVER (ORDER BY p.attempt, p.first) - octet_length(p.records) AS before
               FROM (
                 SELECT w.*, lead(w.first) OVER (PARTITION BY w.attempt ORDER BY w.first) AS next FROM (
                   SELECT l.attempt, GREATEST(l.chunk - 1, 0) AS first, a.started_at, false AS live, l.chunk = 0 AS whole, l.records
                   FROM logs l JOIN attempts a ON a.tenant_id = l.tenant_id AND a.invocation_id = l.invocation_id AND a.attempt = l.attempt
                   WHERE l.tenant_id = $1 AND l.invocation_id = $2 AND l.attempt >= $3 AND ($5::smallint IS NULL OR l.attempt = $5)
                   UNION ALL
                   SELECT v.attempt, v.first, v.started_at, true AS live, false AS whole, v.records FROM live_logs v
                   WHERE v.tenant_id = $1 AND v.invocation_id = $2 AND v.attempt >= $3 AND ($5::smallint IS NULL OR v.attempt = $5)
                     AND NOT EXISTS (SELECT 1 FROM logs k
                       WHERE k.tenant_id = $1 AND k.invocation_id = $2 AND k.attempt = v.attempt AND k.chunk = 0)
                 ) w
               ) p WHERE p.attempt > $3 OR p.next IS NULL OR p.next > $4 + 1
             ) q ORDER BY attempt, first",
        )
        .bind(tenant)
        .bind(id)
        .bind(after.attempt)
        .bind(after.index)
        .bind(attempt)
        .bind(max_bytes)
        .fetch_all(&mut **self)
        .await?;
        if rows.is_empty() {
            let known: bool = sqlx::query_scalar(
                "SELECT EXISTS (SELECT 1 FROM invocations WHERE tenant_id = $1 AND invocation_id = $2)",
            )
            .bind(tenant)
            .bind(id)
            .fetch_one(&mut **self)
            .await?;
            return Ok(known.then(|| (Vec::new(), None, false)));
        }
        let mut pieces = Vec::new();
        let sealed = rows.first().map(|row| row.try_get("sealed")).transpose()?.flatten();
        for row in &rows {
            let Some(records) = row.try_get("records")? else {
                return Ok(Some((pieces, sealed, true)));
            };
            pieces.push(Piece {
                attempt: row.try_get("attempt")?,
                first: row.try_get("first")?,
                started_at: row.try_get("started_at")?,
                live: row.try_get("live")?,
                whole: row.try_get("whole")?,
                records,
            });
        }
        Ok(Some((pieces, sealed, false)))
    }
}

/// The records of a piece with their numbers. A line that cannot be read was never written by this code; it is left
/// out, and keeps its number.
pub fn records(piece: &Piece) -> impl Iterator<Item = (i32, LogRecord)> {
    (piece.first..).zip(log::lines(&piece.records)).filter_map(|(index, line)| {
        match serde_json::from_slice(line) {
            Ok(record) => Some((index, record)),
            Err(_) => {
                tracing::warn!(attempt = piece.attempt, index, "a stored log line is not readable");
                None
            }
        }
    })
}

impl WorkerStore {
    /// Write what running attempts said. What is not this worker's any more is left out. Not waited for to be durable:
    /// an ack brings all of it again.
    ///
    /// # Errors
    /// Postgres does not answer: nothing is known, ask again (what was written is not written twice).
    pub async fn write_live(&self, worker: WorkerId, epoch: i64, said: &[Said]) -> Result<i32> {
        macro_rules! column {
            (|$s:ident| $e:expr) => {
                said.iter().map(|$s| $e).collect::<Vec<_>>()
            };
        }
        let mut tx = self.pool.begin().await?;
        sqlx::query("SET LOCAL synchronous_commit = off").execute(&mut *tx).await?;
        let written =
            sqlx::query_scalar("SELECT write_live($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)")
                .bind(worker)
                .bind(epoch)
                .bind(column!(|s| s.claim.lease))
                .bind(column!(|s| s.claim.slot))
                .bind(column!(|s| s.claim.tenant))
                .bind(column!(|s| s.claim.invocation))
                .bind(column!(|s| s.claim.attempt))
                .bind(column!(|s| s.log.as_ref().map(|(first, _)| *first)))
                .bind(column!(|s| s.log.as_ref().map(|(_, records)| records.as_slice())))
                .bind(column!(|s| s.started_at))
                .bind(column!(|s| s.progress.as_ref().map(|(report, _)| Json(report))))
                .bind(column!(|s| s.progress.as_ref().map(|(_, at)| *at)))
                .fetch_one(&mut *tx)
                .await?;
        tx.commit().await?;
        Ok(written)
    }

    /// Take live pieces of attempts that have ended out of the way, at most `limit`.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn settle_live(&self, limit: i32) -> Result<i64> {
        let mut transaction = self.begin().await?;
        let taken =
            sqlx::query_scalar("SELECT settle_live($1)").bind(limit).fetch_one(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(taken)
    }
}
