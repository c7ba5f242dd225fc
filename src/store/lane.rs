//! A connection that one kind of statement keeps from one time to the next: giving it back and taking it again costs a
//! round trip to Postgres each time, and another connection has other plans. Never shared by two statements at once.

use std::sync::{Mutex, MutexGuard, PoisonError};

use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{PgPool, Postgres};

/// Keeps at most one connection of a pool.
#[derive(Debug, Default)]
pub(super) struct Lane {
    kept: Mutex<Option<PoolConnection<Postgres>>>,
}

impl Lane {
    /// The rows of a query, on the connection that is kept, or on another while that is in use.
    pub(super) async fn fetch_all(
        &self,
        pool: &PgPool,
        query: Query<'_, Postgres, PgArguments>,
    ) -> sqlx::Result<Vec<PgRow>> {
        let kept = self.lock().take();
        let mut connection = match kept {
            Some(connection) => connection,
            None => pool.acquire().await?,
        };
        // One whose statement fails or is given up goes back to the pool, which looks whether it still works.
        let rows = query.fetch_all(&mut *connection).await?;
        *self.lock() = Some(connection);
        Ok(rows)
    }

    /// Whether a connection is kept.
    pub(super) fn is_held(&self) -> bool {
        self.lock().is_some()
    }

    /// Give the connection back.
    pub(super) fn release(&self) {
        self.lock().take();
    }

    fn lock(&self) -> MutexGuard<'_, Option<PoolConnection<Postgres>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
