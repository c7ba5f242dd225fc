//! The queue protocol: enqueue, claim, ack, and the moves between waiting places. The SQL functions stand in the
//! migrations with their invariants; this file gives them types. Never decides what to claim or how an attempt ended.

mod moves;

use std::time::Duration;

use chrono::{DateTime, Utc};
use sandbar_host::outcome::Termination;
use serde::Serialize;
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{PgPool, Row};

use crate::domain::admission::Admission;
use crate::domain::ids::{InvocationId, LeaseId, TaskId, TenantId, WorkerId};
use crate::domain::invocation::State;
use crate::domain::retry::{MAX_HOST_FAULTS, Verdict};
use crate::store::breaker::Guard;
use crate::store::invocation::Spec;
use crate::store::lane::Lane;
use crate::store::{ApiStore, Error, Result, TenantConn, WorkerStore};

pub use moves::{Holds, Reaped, Settled};

/// Channel that says "there may be ready work". Payload: an [`Announced`](crate::domain::announced::Announced).
pub const READY_CHANNEL: &str = "sandbar_ready";
/// Channel that says "these ended". Payload: invocation ids, separated by spaces.
pub const DONE_CHANNEL: &str = "sandbar_done";
/// Channel that says "stop this one". Payload: one invocation id.
pub const CANCEL_CHANNEL: &str = "sandbar_cancel";

/// A notification. A transaction of nothing else waits for the disk like any other unless told not to, and others wait
/// behind it; what a crash takes, polling makes up for.
const NOTIFY: &str = "SELECT set_config('synchronous_commit', 'off', true), pg_notify($1, $2)";

/// [`Claimed::faults`] of an attempt `u`. Counted only where the difference of the numbers passes the parameter `$max`.
macro_rules! faults {
    ($max:literal) => {
        concat!(
            "CASE WHEN u.attempt - u.spent > ",
            $max,
            " THEN host_faults(u.tenant_id, u.invocation_id) ELSE u.attempt - u.spent - 1 END AS faults"
        )
    };
}

/// An invocation to be queued. Everything in it has been checked.
#[derive(Debug, Clone)]
pub struct NewInvocation {
    /// Whose.
    pub tenant: TenantId,
    /// Its id, made by the caller.
    pub id: InvocationId,
    /// What to run.
    pub task: TaskId,
    /// Which version of it.
    pub version: i32,
    /// −100 to 100; higher is served first within the tenant.
    pub priority: i16,
    /// Input of a task, stdin of a command.
    pub input: Vec<u8>,
    /// The rest of what the worker needs.
    pub spec: Spec,
    /// Labels.
    pub tags: std::collections::BTreeMap<String, String>,
    /// Not before.
    pub run_at: Option<DateTime<Utc>>,
    /// Not to be started after.
    pub expires_at: Option<DateTime<Utc>>,
    /// The client's key and the fingerprint of its request.
    pub idempotency: Option<(String, [u8; 32])>,
    /// Its place among others.
    pub admission: Admission,
}

/// What became of one row of an enqueue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enqueued {
    /// Durable under its own id.
    Accepted(InvocationId),
    /// Durable under its own id; waits for what it depends on.
    Waiting(InvocationId),
    /// The idempotency key was used before with the same request: the first invocation.
    Replayed(InvocationId),
    /// The idempotency key was used before with another request.
    Conflict,
    /// Not queued: this one holds its unique key and stands for it.
    Existing(InvocationId),
    /// Refused: this one holds its unique key.
    Duplicate(InvocationId),
    /// Refused: there is no such invocation to depend on.
    UnknownDependency(InvocationId),
}

impl ApiStore {
    /// Queue many invocations, of any tenants, in one durable statement. All or none.
    ///
    /// # Errors
    /// [`Error::Constraint`] when a row refers to something that is gone; then no row was queued.
    pub async fn enqueue(&self, rows: &[NewInvocation], key_ttl: Duration) -> Result<Vec<Enqueued>> {
        self.enqueuer().enqueue(rows, key_ttl).await
    }

    /// One who enqueues again and again.
    #[must_use]
    pub fn enqueuer(&self) -> Enqueuer {
        Enqueuer { pool: self.pool.clone(), guard: self.guard.clone(), lane: Lane::default() }
    }

    /// Tell the workers of other processes that there may be work: an [`Announced`](crate::domain::announced::Announced), and who says so. Outside any
    /// transaction, so that no commit waits for it.
    ///
    /// # Errors
    /// Postgres does not answer; harmless, because workers poll as well.
    pub async fn notify_ready(&self, payload: &str) -> Result<()> {
        sqlx::query(NOTIFY).bind(READY_CHANNEL).bind(payload).execute(&self.pool).await?;
        Ok(())
    }
}

/// Enqueues on a connection that it keeps from one statement to the next.
#[derive(Debug)]
pub struct Enqueuer {
    pool: PgPool,
    guard: Guard,
    lane: Lane,
}

impl Enqueuer {
    /// Queue many invocations, of any tenants, in one durable statement. All or none.
    ///
    /// # Errors
    /// [`Error::Constraint`] when a row refers to something that is gone; then no row was queued.
    pub async fn enqueue(&mut self, rows: &[NewInvocation], key_ttl: Duration) -> Result<Vec<Enqueued>> {
        self.guard.call(enqueue(&self.lane, &self.pool, rows, key_ttl)).await
    }

    /// Whether it keeps a connection.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.lane.is_held()
    }

    /// Give the connection back.
    pub fn release(&mut self) {
        self.lane.release();
    }
}

async fn enqueue(
    lane: &Lane,
    pool: &PgPool,
    rows: &[NewInvocation],
    key_ttl: Duration,
) -> Result<Vec<Enqueued>> {
    let column = |f: fn(&NewInvocation) -> uuid::Uuid| rows.iter().map(f).collect::<Vec<_>>();
    let query = sqlx::query(
            "SELECT outcome, invocation_id FROM enqueue($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12, make_interval(secs => $13), $14) ORDER BY ord",
        )
        .bind(column(|r| r.tenant.0))
        .bind(column(|r| r.id.0))
        .bind(column(|r| r.task.0))
        .bind(rows.iter().map(|r| r.version).collect::<Vec<_>>())
        .bind(rows.iter().map(|r| r.priority).collect::<Vec<_>>())
        .bind(rows.iter().map(|r| r.input.as_slice()).collect::<Vec<_>>())
        .bind(rows.iter().map(|r| Json(&r.spec)).collect::<Vec<_>>())
        .bind(rows.iter().map(|r| Json(&r.tags)).collect::<Vec<_>>())
        .bind(rows.iter().map(|r| r.run_at).collect::<Vec<_>>())
        .bind(rows.iter().map(|r| r.expires_at).collect::<Vec<_>>())
        .bind(rows.iter().map(|r| r.idempotency.as_ref().map(|i| i.0.as_str())).collect::<Vec<_>>())
        .bind(rows.iter().map(|r| r.idempotency.as_ref().map(|i| i.1.as_slice())).collect::<Vec<_>>())
        .bind(key_ttl.as_secs_f64())
        .bind(rows.iter().map(|r| (!r.admission.is_plain()).then_some(Json(&r.admission))).collect::<Vec<_>>());
    let answers = lane.fetch_all(pool, query).await?;
    if answers.len() != rows.len() {
        return Err(Error::Corrupt(format!("enqueue answered {} of {} rows", answers.len(), rows.len())));
    }
    answers
        .iter()
        .map(|row| {
            let id = InvocationId(row.try_get("invocation_id")?);
            Ok(match row.try_get::<&str, _>("outcome")? {
                "accepted" => Enqueued::Accepted(id),
                "waiting" => Enqueued::Waiting(id),
                "replayed" => Enqueued::Replayed(id),
                "conflict" => Enqueued::Conflict,
                "existing" => Enqueued::Existing(id),
                "duplicate" => Enqueued::Duplicate(id),
                "unknown-dependency" => Enqueued::UnknownDependency(id),
                other => return Err(Error::Corrupt(format!("enqueue answered `{other}`"))),
            })
        })
        .collect()
}

/// What a cancellation met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// It was waiting and has ended.
    Now,
    /// It runs; its worker has been told.
    Soon,
    /// It had ended before.
    TooLate,
    /// There is no such invocation.
    Unknown,
}

impl TenantConn {
    /// Cancel one invocation of this tenant, waiting or running.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invocation_cancel(&mut self, id: InvocationId) -> Result<Cancelled> {
        let word: String =
            sqlx::query_scalar("SELECT cancel_invocation($1)").bind(id).fetch_one(&mut **self).await?;
        Ok(match word.as_str() {
            "cancelled" => Cancelled::Now,
            "cancelling" => {
                // Heartbeats carry cancellations too; the notification only makes it quick.
                sqlx::query("SELECT pg_notify($1, $2)")
                    .bind(CANCEL_CHANNEL)
                    .bind(id.to_string())
                    .execute(&mut **self)
                    .await?;
                Cancelled::Soon
            }
            "finished" => Cancelled::TooLate,
            _ => Cancelled::Unknown,
        })
    }
}

/// One claimed attempt: the right to run it and to say how it ended. Only a claim makes one, and an ack takes it.
#[derive(Debug)]
pub struct Claimed {
    /// The batch it came with.
    pub lease: LeaseId,
    /// Its place in the batch, from 1.
    slot: i32,
    /// Whose.
    pub tenant: TenantId,
    /// Which invocation.
    pub invocation: InvocationId,
    /// Number of this attempt, from 1.
    pub attempt: i16,
    /// Earlier attempts that counted as failures.
    pub spent: i16,
    /// Earlier ones that ended by the fault of a host, or more where that is not many
    /// ([`MAX_HOST_FAULTS`](crate::domain::retry::MAX_HOST_FAULTS)).
    pub faults: i32,
    /// Its place in the order of service.
    pub rank: DateTime<Utc>,
    /// Share of the tenant, 1 to 10,000.
    pub weight: i32,
    /// Which task.
    pub task_id: TaskId,
    /// Name of the task.
    pub task: String,
    /// Which module.
    pub sha256: [u8; 32],
    /// Input of a task, stdin of a command.
    pub input: Vec<u8>,
    /// The rest.
    pub spec: Spec,
    /// Labels.
    pub tags: std::collections::BTreeMap<String, String>,
    /// Why its input cannot be had.
    pub withheld: Option<Withheld>,
}

/// Why a worker has no input for an attempt, though it was sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Withheld {
    /// This worker does not have the key.
    NoKey,
    /// Nobody has it any more.
    Erased,
    /// It does not open: the row was changed.
    Broken,
}

/// The name of a claimed attempt, for what is said of it while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// The batch it came with.
    pub(super) lease: LeaseId,
    /// Its place in the batch, from 1.
    pub(super) slot: i32,
    /// Whose.
    pub(super) tenant: TenantId,
    /// Which invocation.
    pub(super) invocation: InvocationId,
    /// Number of the attempt.
    pub(super) attempt: i16,
    /// Its payloads are sealed.
    pub(super) sealed: bool,
}

impl Claim {
    /// Whose.
    #[must_use]
    pub fn tenant(&self) -> TenantId {
        self.tenant
    }

    /// Number of the attempt.
    #[must_use]
    pub fn attempt(&self) -> i16 {
        self.attempt
    }

    /// Whether its payloads are sealed.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Which invocation.
    #[must_use]
    pub fn invocation(&self) -> InvocationId {
        self.invocation
    }
}

impl Claimed {
    /// Its name.
    #[must_use]
    pub fn claim(&self) -> Claim {
        Claim {
            lease: self.lease,
            slot: self.slot,
            tenant: self.tenant,
            invocation: self.invocation,
            attempt: self.attempt,
            sealed: self.spec.sealed.is_some(),
        }
    }
}

/// An attempt that ended, on its way into the database.
#[derive(Debug)]
pub struct Finished {
    /// The right to say so.
    pub claimed: Claimed,
    /// What becomes of the invocation.
    pub verdict: Verdict,
    /// When the guest was started.
    pub started_at: DateTime<Utc>,
    /// How it ended, what it cost, what it said.
    pub outcome: sandbar_host::outcome::Outcome,
    /// Its log, sealed; the outcome has none then.
    pub sealed_log: Option<Vec<u8>>,
}

/// An ack that was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acked {
    /// Which invocation.
    pub invocation: InvocationId,
    /// Where it now stands.
    pub state: State,
}

/// What an ack did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Acks {
    /// Ends that were accepted.
    pub accepted: Vec<Acked>,
    /// Other work has become claimable by them: a slot under a cap is free, a dependant is ready.
    pub wake: bool,
}

/// What to take for one tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// Whose.
    pub tenant: TenantId,
    /// At most so many.
    pub count: i32,
    /// Only from this place in the order of service on; `None`: from the first. Spares the claim the way over rows that
    /// are gone but that an old snapshot keeps. What lies below must be looked for now and then.
    pub after: Option<DateTime<Utc>>,
}

impl Want {
    /// So many of this tenant's, from the first.
    #[must_use]
    pub fn of(tenant: TenantId, count: i32) -> Self {
        Self { tenant, count, after: None }
    }
}

/// A tenant that may have ready work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadyTenant {
    /// Who.
    pub tenant: TenantId,
    /// Its share, 1 to 10,000.
    pub weight: i32,
    /// How many more of its invocations may run; `None`: any number.
    pub free: Option<i32>,
}

impl WorkerStore {
    /// [`WorkerStore::claim_under`] a new lease, for those who do not care what became of a claim without an answer.
    ///
    /// # Errors
    /// As there.
    pub async fn claim(&self, worker: WorkerId, epoch: i64, wanted: &[Want]) -> Result<Vec<Claimed>> {
        self.claim_under(worker, epoch, LeaseId::generate(), wanted).await
    }

    /// Take ready invocations under this new lease; durable on return. Caps hold over all workers; what a task's or
    /// key's cap keeps out is parked on the way.
    ///
    /// # Errors
    /// [`Error::WorkerGone`] when this worker, in this epoch, has been declared dead. After any other error nobody knows
    /// whether something was taken, or will be: ask [`WorkerStore::leased`] until no call can arrive any more.
    pub async fn claim_under(
        &self,
        worker: WorkerId,
        epoch: i64,
        lease: LeaseId,
        wanted: &[Want],
    ) -> Result<Vec<Claimed>> {
        let query = sqlx::query(concat!(
            "SELECT $3 AS lease_id, slot, tenant_id, invocation_id, attempt, spent, ",
            faults!("$7"),
            ", rank, weight, task_id, task, sha256, input, spec, tags
             FROM claim($1, $2, $3, $4, $5, ARRAY(SELECT COALESCE(a, '-infinity') FROM unnest($6::timestamptz[]) a)) u",
        ))
        .bind(worker)
        .bind(epoch)
        .bind(lease)
        .bind(wanted.iter().map(|w| w.tenant).collect::<Vec<_>>())
        .bind(wanted.iter().map(|w| w.count).collect::<Vec<_>>())
        .bind(wanted.iter().map(|w| w.after).collect::<Vec<_>>())
        .bind(i32::from(MAX_HOST_FAULTS));
        let rows = self.lanes.claim.fetch_all(&self.pool, query).await.map_err(worker_gone)?;
        rows.iter().map(claimed).collect()
    }

    /// What is open under these leases of this worker: claims whose answers were lost.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn leased(&self, worker: WorkerId, epoch: i64, leases: &[LeaseId]) -> Result<Vec<Claimed>> {
        let rows = sqlx::query(concat!(
            "SELECT l.lease_id, u.slot::int AS slot, u.tenant_id, u.invocation_id, u.attempt, u.spent, ",
            faults!("$4"),
            ", rank_of(i.created_at, i.run_at, i.priority) AS rank, o.weight, i.task_id, t.name AS task, v.sha256, i.input, i.spec, i.tags
             FROM leases l
             CROSS JOIN LATERAL unnest(l.tenants, l.invocations, l.attempts, l.spent) WITH ORDINALITY
               AS u(tenant_id, invocation_id, attempt, spent, slot)
             JOIN invocations i ON i.tenant_id = u.tenant_id AND i.invocation_id = u.invocation_id
             JOIN tasks t ON t.tenant_id = i.tenant_id AND t.task_id = i.task_id
             JOIN versions v ON v.tenant_id = i.tenant_id AND v.task_id = i.task_id AND v.number = i.version
             JOIN tenants o ON o.tenant_id = u.tenant_id
             WHERE l.worker_id = $1 AND l.epoch = $2 AND l.lease_id = ANY ($3)
               AND NOT EXISTS (SELECT 1 FROM attempts a
                 WHERE a.tenant_id = u.tenant_id AND a.invocation_id = u.invocation_id AND a.attempt = u.attempt)",
        ))
        .bind(worker)
        .bind(epoch)
        .bind(leases)
        .bind(i32::from(MAX_HOST_FAULTS))
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(claimed).collect()
    }

    /// Say how attempts ended. Returns those that were accepted; what is missing came after the lease was lost and
    /// has changed nothing.
    ///
    /// # Errors
    /// Postgres does not answer: nothing is known, ask again (an accepted ack is not accepted twice).
    #[allow(clippy::cast_possible_wrap)] // counts come from the host and stay far below 2^63
    pub async fn ack(&self, worker: WorkerId, epoch: i64, items: &[Finished]) -> Result<Acks> {
        macro_rules! column {
            (|$i:ident| $e:expr) => {
                items.iter().map(|$i| $e).collect::<Vec<_>>()
            };
        }
        macro_rules! receipt {
            ($field:ident) => {
                column!(|i| i.outcome.receipt.$field as i64)
            };
        }
        let backtraces = column!(|i| (!i.outcome.backtrace.is_empty()).then_some(Json(&i.outcome.backtrace)));
        let logs = column!(|i| {
            let lines = i.sealed_log.as_deref().unwrap_or_else(|| i.outcome.logs.as_bytes());
            Some(lines).filter(|lines| !lines.is_empty())
        });
        let query = sqlx::query(
            "SELECT invocation_id, state, wake FROM ack($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12,$13,$14,$15,$16,$17,$18,$19,$20,$21,$22,$23,$24,$25,$26,$27,$28,$29)",
        )
        .bind(worker)
        .bind(epoch)
        .bind(column!(|i| i.claimed.lease))
        .bind(column!(|i| i.claimed.slot))
        .bind(column!(|i| i.claimed.tenant))
        .bind(column!(|i| i.claimed.invocation))
        .bind(column!(|i| i.claimed.attempt))
        .bind(column!(|i| i.claimed.spent))
        .bind(column!(|i| i.claimed.task_id))
        .bind(column!(|i| i.verdict.as_str()))
        .bind(column!(|i| match i.verdict {
            Verdict::Retry { delay_ms }
            | Verdict::Release { delay_ms }
            | Verdict::HandBack { delay_ms } => delay_ms as i64,
            _ => 0,
        }))
        .bind(column!(|i| i.started_at))
        .bind(column!(|i| Json(Ended {
            termination: &i.outcome.termination,
            handed_back: matches!(i.verdict, Verdict::HandBack { .. }).then_some(true),
        })))
        .bind(receipt!(fuel))
        .bind(column!(|i| i.outcome.receipt.fuel_exact))
        .bind(receipt!(cpu_ns))
        .bind(receipt!(wall_ns))
        .bind(receipt!(peak_memory_bytes))
        .bind(receipt!(input_bytes))
        .bind(receipt!(output_bytes))
        .bind(receipt!(output_dropped_bytes))
        .bind(receipt!(log_bytes))
        .bind(receipt!(log_dropped_bytes))
        .bind(receipt!(egress_bytes))
        .bind(receipt!(host_calls))
        .bind(backtraces)
        .bind(column!(|i| i.outcome.output.as_slice()))
        .bind(column!(|i| i.outcome.content_type.as_str()))
        .bind(logs);
        let rows = self.lanes.ack.fetch_all(&self.pool, query).await?;
        let mut acks = Acks::default();
        for row in &rows {
            let state: String = row.try_get("state")?;
            acks.wake |= row.try_get::<bool, _>("wake")?;
            acks.accepted.push(Acked {
                invocation: row.try_get("invocation_id")?,
                state: state
                    .parse()
                    .map_err(|e: crate::domain::invocation::UnknownState| Error::Corrupt(e.to_string()))?,
            });
        }
        Ok(acks)
    }

    /// Tell the servers which invocations ended. Ids beyond what one notification carries go in further ones.
    ///
    /// # Errors
    /// Postgres does not answer; harmless, because waiters poll as well.
    pub async fn notify_done(&self, ids: &[InvocationId]) -> Result<()> {
        // A payload is below 8,000 bytes; an id and its space are 37.
        let payloads: Vec<String> = ids
            .chunks(200)
            .map(|chunk| chunk.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
            .collect();
        sqlx::query("SELECT set_config('synchronous_commit', 'off', true), pg_notify($1, p) FROM unnest($2::text[]) p")
            .bind(DONE_CHANNEL)
            .bind(payloads)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Tell workers of other processes that there may be work.
    ///
    /// # Errors
    /// Postgres does not answer; harmless, because workers poll as well.
    pub async fn notify_ready(&self) -> Result<()> {
        sqlx::query(NOTIFY).bind(READY_CHANNEL).bind("").execute(&self.pool).await?;
        Ok(())
    }

    /// Tenants that may have ready work and may run more of it; at most `limit`.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn ready_tenants(&self, limit: i32) -> Result<Vec<ReadyTenant>> {
        let rows = sqlx::query("SELECT tenant_id, weight, free FROM ready_tenants($1)")
            .bind(limit)
            .fetch_all(&self.pool)
            .await?;
        rows.iter()
            .map(|row| {
                Ok(ReadyTenant {
                    tenant: row.try_get("tenant_id")?,
                    weight: row.try_get("weight")?,
                    free: row.try_get("free")?,
                })
            })
            .collect()
    }
}

/// How an attempt ended, as it is stored.
#[derive(Serialize)]
struct Ended<'a> {
    #[serde(flatten)]
    termination: &'a Termination,
    /// No fault: the count of an invocation's faults passes over it.
    #[serde(skip_serializing_if = "Option::is_none")]
    handed_back: Option<bool>,
}

/// A row of a claim.
fn claimed(row: &PgRow) -> Result<Claimed> {
    let sha256: Vec<u8> = row.try_get("sha256")?;
    Ok(Claimed {
        lease: row.try_get("lease_id")?,
        slot: row.try_get("slot")?,
        tenant: row.try_get("tenant_id")?,
        invocation: row.try_get("invocation_id")?,
        attempt: row.try_get("attempt")?,
        spent: row.try_get("spent")?,
        faults: row.try_get("faults")?,
        rank: row.try_get("rank")?,
        task_id: row.try_get("task_id")?,
        weight: row.try_get("weight")?,
        task: row.try_get("task")?,
        sha256: sha256.try_into().map_err(|_| Error::Corrupt("a module hash is not 32 bytes".to_owned()))?,
        input: row.try_get("input")?,
        spec: row.try_get::<Json<Spec>, _>("spec")?.0,
        tags: row.try_get::<Json<_>, _>("tags")?.0,
        withheld: None,
    })
}

/// A lease refers to its worker; that row gone means: declared dead.
fn worker_gone(error: sqlx::Error) -> Error {
    match Error::from(error) {
        Error::Constraint { constraint } if constraint.starts_with("leases_worker_id_epoch") => {
            Error::WorkerGone
        }
        other => other,
    }
}
