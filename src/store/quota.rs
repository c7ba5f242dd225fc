//! Quotas as rows: plans, what a tenant and its tasks may use, and windows of quotas that all servers share. Decides
//! nothing: what holds is `domain::quota`.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::postgres::types::PgInterval;
use sqlx::types::Json;
use sqlx::{Connection as _, PgConnection, Row};

use crate::domain::ids::{KeyId, TaskId, TenantId};
use crate::domain::quota::{Amount, Level, Quota};
use crate::domain::tokens::Grant;
use crate::store::secret::WrappedRow;
use crate::store::{ApiStore, Error, Result, TenantConn, Tries, WorkerStore};

/// Tasks of a tenant that may have shares of their own: all of them are read together.
pub const MAX_TASK_SHARES: i64 = 1_000;

/// Lines of keys of a tenant that may have limits of their own: all of them are read together.
pub const MAX_KEY_SHARES: i64 = 1_000;

/// Plans of the platform.
pub const MAX_PLANS: i64 = 1_000;

/// What is said of a tenant, level by level.
#[derive(Debug, Clone, Default)]
pub struct TenantQuotas {
    /// Name of its plan.
    pub plan: Option<String>,
    /// What the plan says.
    pub of_plan: Level,
    /// What the platform says of this tenant.
    pub of_tenant: Level,
    /// What the tenant says of its tasks.
    pub of_tasks: Vec<(TaskId, Level)>,
    /// What the tenant says of its keys: the key, the first of its line, and the limits.
    pub of_keys: Vec<(KeyId, KeyId, Level)>,
    /// Whether it wants its payloads sealed.
    pub seal_payloads: bool,
    /// Its data key, if it has one.
    pub key: Option<WrappedRow>,
}

/// A plan.
#[derive(Debug, Clone)]
pub struct PlanRow {
    /// Its name.
    pub name: String,
    /// What it says.
    pub quotas: Level,
    /// Last change.
    pub updated_at: DateTime<Utc>,
}

/// What a tenant uses now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stored {
    /// Different modules.
    pub modules: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Whose quota is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Whose {
    /// The tenant as a whole.
    Tenant,
    /// One of its tasks.
    Task(TaskId),
    /// A line of its keys, by the first of them.
    Key(KeyId),
}

impl Whose {
    /// In words, for whoever is refused.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tenant => "tenant",
            Self::Task(_) => "task",
            Self::Key(_) => "key",
        }
    }

    fn row(self) -> uuid::Uuid {
        match self {
            Self::Tenant => uuid::Uuid::nil(),
            Self::Task(task) => task.0,
            Self::Key(key) => key.0,
        }
    }
}

/// A quota with a window that somebody wants some of.
#[derive(Debug, Clone, Copy)]
pub struct Want {
    /// Whose.
    pub whose: Whose,
    /// Which one.
    pub quota: Quota,
    /// Length of the window, in seconds; divides a day.
    pub window_s: u32,
    /// The bound in a window.
    pub limit: u64,
    /// How many at most. 0: only look.
    pub want: u64,
    /// Given back, of the window that began then.
    pub back: Option<(u64, DateTime<Utc>)>,
}

/// Counts are never negative; whoever stored one did not mean it.
fn count(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

fn bigint(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

async fn read(connection: &mut PgConnection, tenant: TenantId) -> Result<TenantQuotas> {
    let row = sqlx::query(
        "SELECT t.seal_payloads, k.master, k.wrapped,
           q.plan, q.quotas, p.quotas AS of_plan,
           (SELECT jsonb_agg(jsonb_build_array(s.task_id, s.quotas))
            FROM (SELECT * FROM task_quotas WHERE tenant_id = $1 LIMIT $2) s) AS of_tasks,
           (SELECT jsonb_agg(jsonb_build_array(a.key_id, s.key_id, s.quotas))
            FROM (SELECT * FROM key_quotas WHERE tenant_id = $1 LIMIT $3) s
            JOIN api_keys a ON a.tenant_id = $1 AND COALESCE(a.line, a.key_id) = s.key_id
            WHERE a.revoked_at IS NULL AND (a.expires_at IS NULL OR a.expires_at > clock_timestamp())) AS of_keys
         FROM tenants t LEFT JOIN quotas q USING (tenant_id) LEFT JOIN plans p ON p.name = q.plan
         LEFT JOIN tenant_keys k USING (tenant_id)
         WHERE t.tenant_id = $1",
    )
    .bind(tenant)
    .bind(MAX_TASK_SHARES)
    .bind(MAX_KEY_SHARES)
    .fetch_optional(connection)
    .await?;
    let Some(row) = row else { return Ok(TenantQuotas::default()) };
    let level = |name: &str| -> Result<Level> {
        Ok(row.try_get::<Option<Value>, _>(name)?.map(|value| Level::from_json(&value)).unwrap_or_default())
    };
    let of_tasks: Option<Json<Vec<(TaskId, Value)>>> = row.try_get("of_tasks")?;
    let of_tasks = of_tasks.map(|json| json.0).unwrap_or_default();
    let of_keys: Option<Json<Vec<(KeyId, KeyId, Value)>>> = row.try_get("of_keys")?;
    let of_keys = of_keys.map(|json| json.0).unwrap_or_default();
    Ok(TenantQuotas {
        plan: row.try_get("plan")?,
        of_plan: level("of_plan")?,
        of_tenant: level("quotas")?,
        of_tasks: of_tasks.into_iter().map(|(task, quotas)| (task, Level::from_json(&quotas))).collect(),
        of_keys: of_keys.into_iter().map(|(key, line, said)| (key, line, Level::from_json(&said))).collect(),
        seal_payloads: row.try_get("seal_payloads")?,
        key: row.try_get::<Option<String>, _>("master")?.zip(row.try_get("wrapped")?),
    })
}

/// Until this transaction ends, no other one comes past here for the same tenant: counts hold.
pub(super) async fn one_at_a_time(connection: &mut PgConnection, tenant: TenantId) -> Result<()> {
    sqlx::query("SELECT 1 FROM tenants WHERE tenant_id = $1 FOR NO KEY UPDATE")
        .bind(tenant)
        .execute(connection)
        .await?;
    Ok(())
}

/// Change the limits of a line of keys, given by its first. False: [`MAX_KEY_SHARES`] other lines have limits already.
pub(super) async fn key_quotas_change(
    connection: &mut PgConnection,
    tenant: TenantId,
    line: KeyId,
    changes: &[(Quota, Option<Amount>)],
) -> Result<bool> {
    one_at_a_time(connection, tenant).await?;
    let found: Option<Value> =
        sqlx::query_scalar("SELECT quotas FROM key_quotas WHERE tenant_id = $1 AND key_id = $2")
            .bind(tenant)
            .bind(line)
            .fetch_optional(&mut *connection)
            .await?;
    let mut level = found.as_ref().map(Level::from_json).unwrap_or_default();
    for (quota, amount) in changes {
        level.set(*quota, *amount).map_err(Error::Corrupt)?;
    }
    if level == Level::default() {
        sqlx::query("DELETE FROM key_quotas WHERE tenant_id = $1 AND key_id = $2")
            .bind(tenant)
            .bind(line)
            .execute(connection)
            .await?;
        return Ok(true);
    }
    // A line whose keys are all revoked has no use for its limits, nor for its count.
    sqlx::query(
        "WITH gone AS (
           DELETE FROM key_quotas q WHERE q.tenant_id = $1 AND NOT EXISTS (SELECT 1 FROM api_keys a
             WHERE a.tenant_id = $1 AND COALESCE(a.line, a.key_id) = q.key_id AND a.revoked_at IS NULL)
           RETURNING q.key_id)
         DELETE FROM quota_windows w USING gone WHERE w.tenant_id = $1 AND w.task_id = gone.key_id",
    )
    .bind(tenant)
    .execute(&mut *connection)
    .await?;
    let done = sqlx::query(
        "INSERT INTO key_quotas (tenant_id, key_id, quotas)
         SELECT $1, $2, $3 WHERE (SELECT count(*) FROM key_quotas WHERE tenant_id = $1 AND key_id <> $2) < $4
         ON CONFLICT (tenant_id, key_id) DO UPDATE SET quotas = EXCLUDED.quotas",
    )
    .bind(tenant)
    .bind(line)
    .bind(level.to_json())
    .bind(MAX_KEY_SHARES)
    .execute(connection)
    .await?;
    Ok(done.rows_affected() > 0)
}

impl ApiStore {
    /// The tenant with this name or id, for the platform.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn tenant_named(&self, name: &str) -> Result<Option<TenantId>> {
        let mut tries = Tries::of(&self.pool);
        loop {
            let answer = sqlx::query_scalar("SELECT tenant_named($1)").bind(name).fetch_one(&self.pool).await;
            if let Some(answer) = tries.settle(answer) {
                return answer;
            }
        }
    }

    /// Every plan, by name.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn plans(&self) -> Result<Vec<PlanRow>> {
        let mut tries = Tries::of(&self.pool);
        let rows = loop {
            let answer = sqlx::query("SELECT name, quotas, updated_at FROM plans ORDER BY name")
                .fetch_all(&self.pool)
                .await;
            if let Some(answer) = tries.settle(answer) {
                break answer?;
            }
        };
        rows.iter()
            .map(|row| {
                Ok(PlanRow {
                    name: row.try_get("name")?,
                    quotas: Level::from_json(&row.try_get::<Value, _>("quotas")?),
                    updated_at: row.try_get("updated_at")?,
                })
            })
            .collect()
    }

    /// Make a plan, or let an existing one say this. False: there are [`MAX_PLANS`] others already.
    ///
    /// # Errors
    /// The name is none; Postgres does not answer.
    pub async fn plan_put(&self, name: &str, quotas: &Level) -> Result<bool> {
        let done = sqlx::query(
            "INSERT INTO plans (name, quotas)
             SELECT $1, $2 WHERE (SELECT count(*) FROM plans WHERE name <> $1) < $3
             ON CONFLICT (name) DO UPDATE SET quotas = EXCLUDED.quotas, updated_at = clock_timestamp()",
        )
        .bind(name)
        .bind(quotas.to_json())
        .bind(MAX_PLANS)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() > 0)
    }
}

impl TenantConn {
    /// What is said of this tenant.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn quotas(&mut self) -> Result<TenantQuotas> {
        let tenant = self.tenant();
        read(self, tenant).await
    }

    /// Change this tenant's plan (`Some(None)`: none) and its own quotas. False: there is no such plan, and nothing has
    /// changed. `defaults`: what holds of queues where neither says anything.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn quotas_change(
        &mut self,
        plan: Option<Option<&str>>,
        changes: &[(Quota, Option<Amount>)],
        defaults: &Level,
    ) -> Result<bool> {
        let tenant = self.tenant();
        let mut transaction = self.begin().await?;
        one_at_a_time(&mut transaction, tenant).await?;
        let found = read(&mut transaction, tenant).await?;
        let plan = plan.map_or(found.plan, |plan| plan.map(str::to_owned));
        let known: bool =
            sqlx::query_scalar("SELECT $1::text IS NULL OR EXISTS (SELECT 1 FROM plans WHERE name = $1)")
                .bind(&plan)
                .fetch_one(&mut *transaction)
                .await?;
        if !known {
            return Ok(false);
        }
        let mut own = found.of_tenant;
        for (quota, amount) in changes {
            own.set(*quota, *amount).map_err(Error::Corrupt)?;
        }
        sqlx::query(
            "INSERT INTO quotas (tenant_id, plan, quotas) VALUES ($1, $2, $3)
             ON CONFLICT (tenant_id) DO UPDATE SET plan = EXCLUDED.plan, quotas = EXCLUDED.quotas, updated_at = clock_timestamp()",
        )
        .bind(tenant)
        .bind(plan)
        .bind(own.to_json())
        .execute(&mut *transaction)
        .await?;
        sqlx::query("SELECT apply_quotas(ARRAY[$1::uuid], $2)")
            .bind(tenant)
            .bind(defaults.to_json())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// Change the shares that a task has of its tenant's quotas; what it has then. `None`: [`MAX_TASK_SHARES`] other
    /// tasks have shares already, and nothing has changed.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn task_quotas_change(
        &mut self,
        task: TaskId,
        changes: &[(Quota, Option<Amount>)],
    ) -> Result<Option<Level>> {
        let tenant = self.tenant();
        let mut transaction = self.begin().await?;
        one_at_a_time(&mut transaction, tenant).await?;
        let found: Option<Value> =
            sqlx::query_scalar("SELECT quotas FROM task_quotas WHERE tenant_id = $1 AND task_id = $2")
                .bind(tenant)
                .bind(task)
                .fetch_optional(&mut *transaction)
                .await?;
        let mut level = found.as_ref().map(Level::from_json).unwrap_or_default();
        for (quota, amount) in changes {
            level.set(*quota, *amount).map_err(Error::Corrupt)?;
        }
        if level == Level::default() {
            sqlx::query("DELETE FROM task_quotas WHERE tenant_id = $1 AND task_id = $2")
                .bind(tenant)
                .bind(task)
                .execute(&mut *transaction)
                .await?;
        } else {
            // A deleted task has no use for its share.
            sqlx::query(
                "DELETE FROM task_quotas k USING tasks t WHERE k.tenant_id = $1 AND t.tenant_id = $1
                   AND t.task_id = k.task_id AND t.deleted_at IS NOT NULL",
            )
            .bind(tenant)
            .execute(&mut *transaction)
            .await?;
            let done = sqlx::query(
                "INSERT INTO task_quotas (tenant_id, task_id, quotas)
                 SELECT $1, $2, $3
                 WHERE (SELECT count(*) FROM task_quotas WHERE tenant_id = $1 AND task_id <> $2) < $4
                 ON CONFLICT (tenant_id, task_id) DO UPDATE SET quotas = EXCLUDED.quotas, updated_at = clock_timestamp()",
            )
            .bind(tenant)
            .bind(task)
            .bind(level.to_json())
            .bind(MAX_TASK_SHARES)
            .execute(&mut *transaction)
            .await?;
            if done.rows_affected() == 0 {
                return Ok(None);
            }
        }
        transaction.commit().await?;
        Ok(Some(level))
    }

    /// What this tenant has stored.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn stored(&mut self) -> Result<Stored> {
        let tenant = self.tenant();
        let (modules, bytes): (i64, i64) = sqlx::query_as(
            "SELECT count(*), COALESCE(sum(size_bytes), 0)::bigint FROM (
               SELECT DISTINCT ON (v.sha256) v.size_bytes FROM versions v JOIN blobs b USING (tenant_id, sha256)
               WHERE v.tenant_id = $1 AND b.freed_at IS NULL) s",
        )
        .bind(tenant)
        .fetch_one(&mut **self)
        .await?;
        Ok(Stored { modules: count(modules), bytes: count(bytes) })
    }

    /// Whether this tenant has stored this module.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn has_module(&mut self, hash: &[u8; 32]) -> Result<bool> {
        let tenant = self.tenant();
        Ok(sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM blobs WHERE tenant_id = $1 AND sha256 = $2 AND freed_at IS NULL)",
        )
        .bind(tenant)
        .bind(hash.as_slice())
        .fetch_one(&mut **self)
        .await?)
    }

    /// Log bytes kept since midnight (UTC).
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn log_bytes_today(&mut self) -> Result<u64> {
        let tenant = self.tenant();
        let bytes: i64 = sqlx::query_scalar(
            "SELECT COALESCE(sum(log_bytes), 0)::bigint FROM usage
             WHERE tenant_id = $1 AND hour >= date_bin('1 day', clock_timestamp(), 'epoch')",
        )
        .bind(tenant)
        .fetch_one(&mut **self)
        .await?;
        Ok(count(bytes))
    }

    /// What this tenant's ledger says of a quota of a period, and when that ends. `None`: it is not one.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn spent(&mut self, quota: Quota) -> Result<Option<(u64, DateTime<Utc>)>> {
        let Some((measure, period)) = quota.of_period() else { return Ok(None) };
        let tenant = self.tenant();
        let (used, ends_at): (i64, DateTime<Utc>) = sqlx::query_as(
            "SELECT LEAST(used, 9223372036854775807)::bigint, ends_at
             FROM budget_used($1, NULL, $2, $3, clock_timestamp())",
        )
        .bind(tenant)
        .bind(measure.as_str())
        .bind(period.as_str())
        .fetch_one(&mut **self)
        .await?;
        Ok(Some((count(used), ends_at)))
    }

    /// Bytes of memory that this tenant's attempts which run now declare together; known only where that is bounded.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn memory_in_use(&mut self) -> Result<u64> {
        let tenant = self.tenant();
        let used: Option<i64> = sqlx::query_scalar(
            "SELECT memory_used FROM caps WHERE tenant_id = $1 AND scope = 0 AND memory_cap IS NOT NULL",
        )
        .bind(tenant)
        .fetch_optional(&mut **self)
        .await?;
        Ok(count(used.unwrap_or(0)))
    }

    /// Take some of a quota that all servers share.
    ///
    /// # Errors
    /// Postgres does not answer: then some may have been taken that nobody uses.
    pub async fn take_quota(&mut self, want: &Want) -> Result<Grant> {
        let (back, back_window) = want.back.unzip();
        let window = PgInterval { months: 0, days: 0, microseconds: i64::from(want.window_s) * 1_000_000 };
        let row = sqlx::query(
            "SELECT granted, used, window_start, ends_in_ms FROM take_quota($1, $2, $3, $4, $5, $6, $7)",
        )
        .bind(want.whose.row())
        .bind(want.quota.as_str())
        .bind(window)
        .bind(bigint(want.limit))
        .bind(bigint(want.want))
        .bind(bigint(back.unwrap_or(0)))
        .bind(back_window)
        .fetch_one(&mut **self)
        .await?;
        Ok(Grant {
            granted: count(row.try_get("granted")?),
            used: count(row.try_get("used")?),
            window: row.try_get("window_start")?,
            ends_in_ms: count(row.try_get("ends_in_ms")?),
        })
    }
}

impl WorkerStore {
    /// Take some of a quota per day of a tenant, or of the share that one of its tasks has; `default`: what holds of a tenant
    /// of whom nothing else is said. `back`: given back, of the window that began then. `None`: there is no bound.
    ///
    /// # Errors
    /// Postgres does not answer: then some may have been taken that nobody uses.
    pub async fn take_quota_per_day(
        &self,
        (tenant, whose, quota): (TenantId, Whose, Quota),
        default: Option<u64>,
        want: u64,
        back: Option<(u64, DateTime<Utc>)>,
    ) -> Result<Option<(u64, Grant)>> {
        let (back, back_window) = back.unzip();
        let row = sqlx::query(
            "SELECT bound, granted, used, window_start, ends_in_ms FROM take_quota_per_day($1, $2, $3, $4, $5, $6, $7)",
        )
        .bind(tenant)
        .bind(whose.row())
        .bind(quota.as_str())
        .bind(default.map(bigint))
        .bind(bigint(want))
        .bind(bigint(back.unwrap_or(0)))
        .bind(back_window)
        .fetch_one(&self.pool)
        .await?;
        let Some(bound) = row.try_get::<Option<i64>, _>("bound")? else { return Ok(None) };
        let grant = Grant {
            granted: count(row.try_get("granted")?),
            used: count(row.try_get("used")?),
            window: row.try_get("window_start")?,
            ends_in_ms: count(row.try_get("ends_in_ms")?),
        };
        Ok(Some((count(bound), grant)))
    }
}
