//! Invocations that running attempts start: asked for here under their leases, and made by a server. What may be started,
//! and how many, stands in `migrations/0024_starts.sql` and `0034_sealed_values.sql`.

use std::time::Duration;

use sqlx::Row as _;
use sqlx::postgres::PgRow;

use crate::domain::ids::{InvocationId, StartId, TenantId};
use crate::store::invocation::Family;
use crate::store::kv::AttemptName;
use crate::store::{Error, Result, WorkerStore};

/// Channel that says "somebody asks for an invocation". Payload: empty.
pub const START_CHANNEL: &str = "sandbar_start";
/// Invocations that one may start.
pub const MAX_CHILDREN: i32 = 100;
/// Starts in one family: of everything that goes back to one invocation that nobody started.
pub const MAX_FAMILY: i32 = 1_000;
/// How deep a family goes.
pub const MAX_DEPTH: u16 = 5;

/// What an attempt wants to start.
#[derive(Debug, Clone, Copy)]
pub struct NewStart<'a> {
    /// What it is called, unless it was asked for before.
    pub id: StartId,
    /// Its place in its family.
    pub family: Family,
    /// Name of the task.
    pub task: &'a str,
    /// Input, or stdin.
    pub input: &'a [u8],
    /// The data key that seals it, by its fingerprint.
    pub sealed: Option<&'a str>,
    /// Digests of the plain input: the one to keep, and the one that may have been kept before.
    pub hashes: &'a [Vec<u8>],
    /// Under this key it is started once, whoever asks again.
    pub key: Option<&'a str>,
}

/// What became of asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Somebody will see to it.
    Open(StartId),
    /// The attempt is not this worker's any more, or has ended.
    Lost,
    /// Its task has no grant for that.
    Denied,
    /// The key stands for something else.
    Conflict,
    /// The invocation has started as many as it may.
    TooMany,
    /// Its family has.
    FamilyTooLarge,
}

/// Something that a server is to start.
#[derive(Debug, Clone)]
pub struct OpenStart {
    /// Whose.
    pub tenant: TenantId,
    /// Which.
    pub id: StartId,
    /// The invocation that asks.
    pub parent: InvocationId,
    /// The key that its guest gave it.
    pub key: Option<String>,
    /// Its place in its family.
    pub family: Family,
    /// Name of the task.
    pub task: String,
    /// Input, or stdin.
    pub input: Vec<u8>,
    /// The data key that seals it, by its fingerprint.
    pub sealed: Option<String>,
}

/// What a start is to the invocation that asks for it, whichever attempt asks: what its input is bound to.
#[must_use]
pub fn name(key: Option<&str>, id: StartId) -> String {
    key.map_or_else(|| format!("id:{id}"), |key| format!("key:{key}"))
}

impl OpenStart {
    /// See [`name`].
    #[must_use]
    pub fn name(&self) -> String {
        name(self.key.as_deref(), self.id)
    }
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Started {
    /// This one.
    Invocation(InvocationId),
    /// Nothing, and why.
    Refused(String),
}

fn open(row: &PgRow) -> Result<OpenStart> {
    let depth: i16 = row.try_get("depth")?;
    Ok(OpenStart {
        tenant: row.try_get("tenant_id")?,
        id: row.try_get("start_id")?,
        parent: row.try_get("parent_id")?,
        key: row.try_get("key")?,
        family: Family { root: row.try_get("root_id")?, depth: u16::try_from(depth).unwrap_or(u16::MAX) },
        task: row.try_get("task")?,
        input: row.try_get("input")?,
        sealed: row.try_get("sealed")?,
    })
}

impl WorkerStore {
    /// Ask for an invocation.
    ///
    /// # Errors
    /// Postgres does not answer; whether it was asked for is not known then.
    pub async fn start_ask(&self, attempt: AttemptName, new: &NewStart<'_>) -> Result<Asked> {
        let row = attempt
            .bind(
                "SELECT outcome, start_id
                 FROM start_ask(ROW($1, $2, $3, $4, $5, $6, $7)::attempt_name, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)",
            )
            .bind(new.id)
            .bind(new.family.root)
            .bind(i16::try_from(new.family.depth).unwrap_or(i16::MAX))
            .bind(new.task)
            .bind(new.input)
            .bind(new.sealed)
            .bind(new.hashes)
            .bind(new.key)
            .bind(MAX_CHILDREN)
            .bind(MAX_FAMILY)
            .fetch_one(&self.pool)
            .await?;
        Ok(match row.try_get::<&str, _>("outcome")? {
            "ok" => Asked::Open(row.try_get("start_id")?),
            "lost" => Asked::Lost,
            "denied" => Asked::Denied,
            "conflict" => Asked::Conflict,
            "children" => Asked::TooMany,
            "family" => Asked::FamilyTooLarge,
            other => return Err(Error::Corrupt(format!("starts: {other}"))),
        })
    }

    /// Say that something waits. Outside of any transaction, so that no commit waits for it.
    ///
    /// # Errors
    /// Postgres does not answer; harmless, because servers look as well.
    pub async fn start_notify(&self) -> Result<()> {
        sqlx::query("SELECT pg_notify($1, '')").bind(START_CHANNEL).execute(&self.pool).await?;
        Ok(())
    }

    /// What came of it; `None`: nothing yet.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn start_outcome(&self, tenant: TenantId, id: StartId) -> Result<Option<Started>> {
        let row =
            sqlx::query("SELECT invocation_id, refused FROM starts WHERE tenant_id = $1 AND start_id = $2")
                .bind(tenant)
                .bind(id)
                .fetch_optional(&self.pool)
                .await?;
        let Some(row) = row else { return Ok(None) };
        let refused = row.try_get::<Option<String>, _>("refused")?.map(Started::Refused);
        Ok(row.try_get::<Option<_>, _>("invocation_id")?.map(Started::Invocation).or(refused))
    }

    /// Take what waits, the oldest first; nobody else gets it before `lease` is over.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn starts_take(&self, limit: i64, lease: Duration) -> Result<Vec<OpenStart>> {
        let rows = sqlx::query(
            "UPDATE starts s SET taken_until = clock_timestamp() + make_interval(secs => $2)
             FROM (SELECT tenant_id, start_id FROM starts
                   WHERE invocation_id IS NULL AND refused IS NULL
                     AND (taken_until IS NULL OR taken_until < clock_timestamp())
                   ORDER BY asked_at LIMIT $1 FOR UPDATE SKIP LOCKED) o
             WHERE s.tenant_id = o.tenant_id AND s.start_id = o.start_id
             RETURNING s.tenant_id, s.start_id, s.parent_id, s.key, s.root_id, s.depth, s.task, s.input, s.sealed",
        )
        .bind(limit)
        .bind(lease.as_secs_f64())
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(open).collect()
    }

    /// Write down what came of it.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn start_settle(&self, tenant: TenantId, id: StartId, started: &Started) -> Result<()> {
        let (invocation, refused) = match started {
            Started::Invocation(id) => (Some(*id), None),
            Started::Refused(why) => (None, Some(why.as_str())),
        };
        sqlx::query(
            "UPDATE starts SET invocation_id = $3, refused = $4, input = '', taken_until = NULL
             WHERE tenant_id = $1 AND start_id = $2 AND invocation_id IS NULL AND refused IS NULL",
        )
        .bind(tenant)
        .bind(id)
        .bind(invocation)
        .bind(refused)
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}
