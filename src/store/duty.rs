//! Leases of background duties: one holder at a time, visible to people. A duty's work is safe under two holders
//! (every statement stands alone); the lease saves work and says who does it.

use std::time::Duration;

use crate::domain::ids::WorkerId;
use crate::store::{Result, WorkerStore};

impl WorkerStore {
    /// Take or keep the lease of `name` for `ttl`. True when `holder` has it now.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn duty_hold(&self, name: &str, holder: WorkerId, ttl: Duration) -> Result<bool> {
        let held = sqlx::query(
            "INSERT INTO duties AS d (name, holder, expires_at) VALUES ($1, $2, clock_timestamp() + make_interval(secs => $3))
             ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at
             WHERE d.holder = excluded.holder OR d.expires_at < clock_timestamp()",
        )
        .bind(name)
        .bind(holder)
        .bind(ttl.as_secs_f64())
        .execute(&self.pool)
        .await?;
        Ok(held.rows_affected() == 1)
    }

    /// Note that the duty ran, and how.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn duty_ran(&self, name: &str, holder: WorkerId, error: Option<&str>) -> Result<()> {
        sqlx::query(
            "UPDATE duties SET runs = runs + 1, last_run_at = clock_timestamp(), last_error = $3 WHERE name = $1 AND holder = $2",
        )
        .bind(name)
        .bind(holder)
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
        sqlx::query("UPDATE duties SET expires_at = clock_timestamp() WHERE holder = $1")
            .bind(holder)
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}
