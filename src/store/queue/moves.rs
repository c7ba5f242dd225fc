//! Moves that no request and no attempt makes: background duties of the queue protocol. Each stands alone and may run
//! anywhere and twice; `scheduler` decides when.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::Row;

use crate::domain::ids::{InvocationId, TenantId, WorkerId};
use crate::domain::quota::Level;
use crate::store::{Result, WorkerStore};

/// What telling dependants did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settled {
    /// Invocations that became ready.
    pub released: i32,
    /// Invocations that were cancelled because a condition was not met.
    pub cancelled: i32,
    /// There is more to do at once.
    pub more: bool,
}

/// Tenants and tasks that a look found at the end of a quota, or not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Holds {
    /// Nothing more of them starts from now on.
    pub held: i32,
    /// They may start again.
    pub released: i32,
}

impl WorkerStore {
    /// Move what is due to ready; at most `limit`. Returns how many moved, and when the next is due.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn promote(&self, limit: i32) -> Result<(i64, Option<DateTime<Utc>>)> {
        let mut transaction = self.begin().await?;
        let moved: i64 =
            sqlx::query_scalar("SELECT promote($1)").bind(limit).fetch_one(&mut *transaction).await?;
        let next =
            sqlx::query_scalar("SELECT min(due_at) FROM scheduled").fetch_one(&mut *transaction).await?;
        transaction.commit().await?;
        if moved > 0 {
            self.notify_ready().await?;
        }
        Ok((moved, next))
    }

    /// Tell those who wait for ends; at most `limit` dependants.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn settle(&self, limit: i32) -> Result<Settled> {
        let mut transaction = self.begin().await?;
        let row = sqlx::query("SELECT released, cancelled, more FROM settle(NULL, NULL, $1)")
            .bind(limit)
            .fetch_one(&mut *transaction)
            .await?;
        transaction.commit().await?;
        let settled = Settled {
            released: row.try_get("released")?,
            cancelled: row.try_get("cancelled")?,
            more: row.try_get("more")?,
        };
        if settled.released > 0 {
            self.notify_ready().await?;
        }
        Ok(settled)
    }

    /// Bring parked invocations back whose gate has room; at most `limit`. Returns how many.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn unpark(&self, limit: i32) -> Result<i32> {
        let mut transaction = self.begin().await?;
        let back: i32 =
            sqlx::query_scalar("SELECT unpark($1)").bind(limit).fetch_one(&mut *transaction).await?;
        transaction.commit().await?;
        if back > 0 {
            self.notify_ready().await?;
        }
        Ok(back)
    }

    /// Add up to `limit` entries of the usage ledger to its hours. Returns how many, and whose they were.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn fold_usage(&self, limit: i32) -> Result<(i64, Vec<TenantId>)> {
        let mut transaction = self.begin().await?;
        let folded = sqlx::query_as("SELECT folded, tenants FROM fold_usage($1)")
            .bind(limit)
            .fetch_one(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(folded)
    }

    /// Let tenants and tasks that have used up a quota of a period wait until it ends, and let those go that have not any more:
    /// of `tenants`, of all that wait, and of those of whom something else was said in the last seconds, or (`all`)
    /// ever. `defaults`: what holds where nothing else is said.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn hold_spent(&self, tenants: &[TenantId], defaults: &Level, all: bool) -> Result<Holds> {
        let mut transaction = self.begin().await?;
        let (held, released) = sqlx::query_as("SELECT held, released FROM hold_spent($1, $2, $3)")
            .bind(tenants)
            .bind(defaults.to_json())
            .bind(all)
            .fetch_one(&mut *transaction)
            .await?;
        transaction.commit().await?;
        let holds = Holds { held, released };
        if holds.released > 0 {
            self.notify_ready().await?;
        }
        Ok(holds)
    }

    /// End waiting invocations whose expiry has passed; at most `limit`.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn expire(&self, limit: i32) -> Result<Vec<InvocationId>> {
        let mut transaction = self.begin().await?;
        let ended = sqlx::query_scalar("SELECT invocation_id FROM expire($1)")
            .bind(limit)
            .fetch_all(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(ended)
    }

    /// Declare silent workers dead and hand their work on. With `only`, that worker at once, whatever it says.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn reap(
        &self,
        dead_after: Duration,
        max_handovers: i32,
        only: Option<WorkerId>,
    ) -> Result<Reaped> {
        let mut transaction = self.begin().await?;
        let row =
            sqlx::query("SELECT workers, handed_on, given_up FROM reap(make_interval(secs => $1), $2, $3)")
                .bind(dead_after.as_secs_f64())
                .bind(max_handovers)
                .bind(only)
                .fetch_one(&mut *transaction)
                .await?;
        transaction.commit().await?;
        let reaped = Reaped {
            workers: row.try_get("workers")?,
            handed_on: row.try_get("handed_on")?,
            given_up: row.try_get("given_up")?,
        };
        if reaped.handed_on > 0 {
            self.notify_ready().await?;
        }
        Ok(reaped)
    }

    /// Forget idempotency keys past their time, cancellations of what has ended, idle concurrency keys, workers that are
    /// gone for a day, and notes of late acks after a month; at most `limit` each.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn tidy(&self, limit: i64) -> Result<u64> {
        let mut transaction = self.begin().await?;
        let forgotten: i64 =
            sqlx::query_scalar("SELECT tidy($1)").bind(limit).fetch_one(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(forgotten.unsigned_abs())
    }
}

/// What a reaping did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reaped {
    /// Workers declared dead.
    pub workers: i64,
    /// Open attempts ended as lease-lost.
    pub handed_on: i64,
    /// Of those, invocations given up because too many hosts were lost with them.
    pub given_up: i64,
}
