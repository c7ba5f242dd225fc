//! The queue of uploads that wait for their compilation: tenants take turns, so many of one tenant at once and so many
//! waiting. Owns what may follow `compiling` in a version's life; never compiles.

use std::time::Duration;

use sandbar_host::compile::WALL_PER_MIB;
use sandbar_host::inspect::Rejection;
use sqlx::Row;
use sqlx::types::Json;

use crate::domain::ids::{TaskId, TenantId};
use crate::store::task::hash;
use crate::store::{Result, TenantConn, WorkerStore};

/// The advisory lock under which the next version is chosen.
const LOCK_CHOOSE: i64 = 7_260_003;

/// A version that waits for its compilation, leased to the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToCompile {
    /// Whose.
    pub tenant: TenantId,
    /// Which task.
    pub task: TaskId,
    /// Which version.
    pub number: i32,
    /// Hash of the module.
    pub sha256: [u8; 32],
}

/// How many uploads wait for their compilation, those that are being compiled included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// Of the tenant.
    pub own: i64,
    /// Of all.
    pub in_all: i64,
}

impl TenantConn {
    /// How many uploads wait now.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn compilations_waiting(&mut self) -> Result<Waiting> {
        let (own, in_all) =
            sqlx::query_as("SELECT own, in_all FROM compilations_waiting()").fetch_one(&mut **self).await?;
        Ok(Waiting { own, in_all })
    }
}

impl WorkerStore {
    /// The version that is to be compiled next, leased for `lease` and what its size adds to the limits of compiling it:
    /// nobody else gets it before that has passed. Of one tenant at most `of_one_tenant` are leased at once, over all
    /// servers. Whoever has the fewest is next, then whose last began longest ago; within a tenant the one that has
    /// waited longest. `None`: nothing to do.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn version_to_compile(&self, lease: Duration, of_one_tenant: u32) -> Result<Option<ToCompile>> {
        let mut tx = self.begin().await?;
        // Two that choose at once would both find the tenant with a place left. A compilation takes far longer.
        sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(LOCK_CHOOSE).execute(&mut *tx).await?;
        let row = sqlx::query(
            "WITH open AS MATERIALIZED (
               SELECT v.tenant_id, v.task_id, v.number, v.compile_after, v.compile_after > clock_timestamp() AS leased
               FROM versions v JOIN tasks t ON t.tenant_id = v.tenant_id AND t.task_id = v.task_id
               WHERE v.state = 'compiling' AND t.deleted_at IS NULL),
             next AS (
               SELECT o.tenant_id FROM open o JOIN tenants n ON n.tenant_id = o.tenant_id
               GROUP BY o.tenant_id, n.compiled_at
               HAVING count(*) FILTER (WHERE o.leased) < $3 AND bool_or(NOT o.leased)
               ORDER BY count(*) FILTER (WHERE o.leased), n.compiled_at NULLS FIRST, min(o.compile_after) LIMIT 1),
             turn AS (
               UPDATE tenants n SET compiled_at = clock_timestamp() FROM next WHERE n.tenant_id = next.tenant_id),
             chosen AS (
               SELECT o.tenant_id, o.task_id, o.number FROM open o JOIN next ON next.tenant_id = o.tenant_id
               WHERE NOT o.leased ORDER BY o.compile_after LIMIT 1)
             UPDATE versions v
             SET compile_after = clock_timestamp() + make_interval(secs => $1 + $2 * (v.size_bytes >> 20))
             FROM chosen c
             WHERE v.tenant_id = c.tenant_id AND v.task_id = c.task_id AND v.number = c.number AND v.state = 'compiling'
             RETURNING v.tenant_id, v.task_id, v.number, v.sha256",
        )
        .bind(lease.as_secs_f64())
        .bind(WALL_PER_MIB.as_secs_f64())
        .bind(i64::from(of_one_tenant))
        .fetch_optional(&mut *tx)
        .await?;
        tx.commit().await?;
        row.map(|row| {
            Ok(ToCompile {
                tenant: row.try_get("tenant_id")?,
                task: row.try_get("task_id")?,
                number: row.try_get("number")?,
                sha256: hash(row.try_get("sha256")?)?,
            })
        })
        .transpose()
    }

    /// It could not be tried: it is to be taken up again after this time, and not only when its lease is over.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn version_later(&self, version: &ToCompile, after: Duration) -> Result<()> {
        sqlx::query(
            "UPDATE versions SET compile_after = clock_timestamp() + make_interval(secs => $4)
             WHERE tenant_id = $1 AND task_id = $2 AND number = $3 AND state = 'compiling'",
        )
        .bind(version.tenant)
        .bind(version.task)
        .bind(version.number)
        .bind(after.as_secs_f64())
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// The version compiles: it may be invoked, and is current unless a newer one is. False: somebody else said how
    /// its compilation ended.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn version_ready(&self, tenant: TenantId, task: TaskId, number: i32) -> Result<bool> {
        // GREATEST on the row itself: two versions that become ready at once cannot leave the older one current.
        let done = sqlx::query(
            "WITH ready AS (
               UPDATE versions SET state = 'ready'
               WHERE tenant_id = $1 AND task_id = $2 AND number = $3 AND state = 'compiling'
               RETURNING tenant_id, task_id, number)
             UPDATE tasks t SET current_version = GREATEST(t.current_version, r.number), updated_at = clock_timestamp()
             FROM ready r WHERE t.tenant_id = r.tenant_id AND t.task_id = r.task_id",
        )
        .bind(tenant)
        .bind(task)
        .bind(number)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// The version does not compile, for good. False: somebody else said how its compilation ended.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn version_rejected(
        &self,
        tenant: TenantId,
        task: TaskId,
        number: i32,
        rejection: &Rejection,
    ) -> Result<bool> {
        let rejection = Rejection {
            code: rejection.code,
            // NUL cannot be in jsonb, and a detail may quote the module.
            detail: rejection.detail.replace('\0', "\u{fffd}"),
        };
        let done = sqlx::query(
            "UPDATE versions SET state = 'rejected', rejection = $4
             WHERE tenant_id = $1 AND task_id = $2 AND number = $3 AND state = 'compiling'",
        )
        .bind(tenant)
        .bind(task)
        .bind(number)
        .bind(Json(&rejection))
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }
}
