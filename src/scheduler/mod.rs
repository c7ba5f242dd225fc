//! Background duties: each runs under a fenced lease in Postgres, so that one process of many does it, and can be seen,
//! paused, run and set through the API. And compilation, which is leased per version. Owns when a duty runs; the work
//! itself is in `store` and `app`, and the fence is explained in `store::duty`.

mod compile;
pub mod retention;
mod start;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use compile::run as compile;
pub use start::run as starts;

use crate::app::sealed::keys::Keys;
use crate::app::signals::Signals;
use crate::app::{self, App};
use crate::domain::announced::Announced;
use crate::domain::ids::WorkerId;
use crate::domain::quota::Level;
use crate::store::WorkerStore;
use crate::store::duty::Held;
use crate::store::queue::Holds;

/// Rows that one run of a duty handles; what is left comes in the next, at once.
const BATCH: i32 = 1_000;
/// How long the modules of a deleted task stay: servers remember tasks for a second, and what they accept meanwhile
/// runs like any other.
const FREE_AFTER: Duration = Duration::from_secs(600);
/// Deleted tasks that one run looks at.
const FREE_BATCH: i32 = 50;
/// Longest run of a duty.
const LONGEST: Duration = Duration::from_secs(120);
/// The shortest wait between promotions, however close the next is due.
const PROMOTE_MIN: Duration = Duration::from_millis(5);

/// What the duties need to know, checked by `config`.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Time between runs of a duty that has nothing better to go by.
    pub tick: Duration,
    /// Silence after which a worker is dead.
    pub dead_after: Duration,
    /// Handovers after which an invocation is given up.
    pub max_handovers: i32,
    /// Days that ended invocations are kept, where the tenant has no number of its own.
    pub retention_days: i32,
    /// Where to write what is deleted, before it is.
    pub export_dir: Option<PathBuf>,
}

/// Run every duty until told to stop, then let go of their leases.
/// `app` does what needs a tenant's rights.
pub async fn run(
    settings: Settings,
    (store, keys): (WorkerStore, Arc<Keys>),
    app: App,
    signals: Arc<Signals>,
    stop: CancellationToken,
) {
    let applied = Mutex::default();
    let duties = Duties { holder: WorkerId::generate(), settings, store, keys, app, signals, applied, stop };
    futures_util::future::join_all(Duty::ALL.into_iter().map(|duty| duties.keep(duty))).await;
    let release = duties.store.duties_release(duties.holder);
    if let Ok(Err(error)) = tokio::time::timeout(Duration::from_secs(2), release).await {
        debug!(%error, "duties not released; their leases run out");
    }
}

/// The duties that run under a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Duty {
    /// What is due becomes ready.
    Promote,
    /// Who waits for an end that came hears of it, where the end itself could not tell all.
    Settle,
    /// What is parked at a gate that has room comes back.
    Unpark,
    /// Silent workers are declared dead, and their work handed on.
    Reap,
    /// What waits past its expiry ends.
    Expire,
    /// Tenants whose deletion has come go.
    Erase,
    /// Old idempotency keys, spent cancellations and workers long gone are forgotten.
    Tidy,
    /// Usage is added up, and who has used up a quota of a period waits until it ends.
    Usage,
    /// Bulk operations are done, a page at a time.
    Bulk,
    /// New dead letters get their kind of failure.
    Classify,
    /// Thresholds of budgets that are reached become events.
    Budgets,
    /// What ended long ago is exported, if asked for, and deleted.
    Retention,
}

impl Duty {
    const ALL: [Self; 12] = [
        Self::Promote,
        Self::Settle,
        Self::Unpark,
        Self::Reap,
        Self::Expire,
        Self::Erase,
        Self::Tidy,
        Self::Usage,
        Self::Bulk,
        Self::Classify,
        Self::Budgets,
        Self::Retention,
    ];

    /// The name of its lease. The API describes each (`api::duty`).
    fn name(self) -> &'static str {
        match self {
            Self::Promote => "promote",
            Self::Settle => "settle",
            Self::Unpark => "unpark",
            Self::Reap => "reap",
            Self::Expire => "expire",
            Self::Erase => "erase",
            Self::Tidy => "tidy",
            Self::Usage => "usage",
            Self::Bulk => "bulk",
            Self::Classify => "classify",
            Self::Budgets => "budgets",
            Self::Retention => "retention",
        }
    }

    /// Time between runs when nobody has set another, and nothing asks for an earlier one.
    fn interval(self, settings: &Settings) -> Duration {
        match self {
            // A worker dies at any time; looking more often than it may be silent finds it in time.
            Self::Reap => settings.dead_after / 6,
            // It looks at each tenant once an hour; this is how soon it goes on to the next.
            Self::Retention => Duration::from_secs(60),
            // It looks at each budget now and then; this is how soon at one that was set or has its turn.
            Self::Budgets => Duration::from_secs(5),
            Self::Promote
            | Self::Settle
            | Self::Unpark
            | Self::Expire
            | Self::Erase
            | Self::Tidy
            | Self::Usage
            | Self::Bulk
            | Self::Classify => settings.tick,
        }
    }
}

/// What a run did.
#[derive(Debug, Default)]
struct Done {
    rows: u64,
    /// When it should run again, if sooner than its interval says.
    again: Option<Duration>,
}

impl Done {
    /// A full batch means that there is more: go on at once.
    fn batch(rows: u64) -> Self {
        let full = rows >= u64::from(BATCH.unsigned_abs());
        Self { rows, again: full.then_some(Duration::ZERO) }
    }
}

struct Duties {
    holder: WorkerId,
    settings: Settings,
    store: WorkerStore,
    keys: Arc<Keys>,
    app: App,
    signals: Arc<Signals>,
    /// Defaults of quotas that all tenants have been told of.
    applied: Mutex<Option<Level>>,
    stop: CancellationToken,
}

impl Duties {
    /// Hold the duty's lease and do it, again and again, until told to stop. Looks at least once a tick, so that what
    /// operators set is seen soon.
    async fn keep(&self, duty: Duty) {
        let mut announced = false;
        let mut again: Option<Instant> = None;
        while !self.stop.is_cancelled() {
            let mut wait = self.settings.tick;
            if !announced {
                let interval = duty.interval(&self.settings);
                announced = self.store.duty_announce(duty.name(), interval).await.is_ok();
            }
            let eager = again.is_some_and(|at| at <= Instant::now());
            match self.turn(duty, eager).await {
                Ok(Turn::Ran { due_in, again: sooner }) => {
                    again = sooner.map(|sooner| Instant::now() + sooner);
                    wait = wait.min(due_in);
                }
                // A paused one is due and does not run: at the next tick somebody may have asked for it.
                Ok(Turn::NotYet { due_in }) if !due_in.is_zero() => wait = wait.min(due_in),
                Ok(Turn::NotYet { .. }) => {}
                // Whoever has it goes by what it finds, not by what we found.
                Ok(Turn::Elsewhere) => again = None,
                Err(error) => {
                    again = None;
                    warn!(duty = duty.name(), error = format!("{error:#}"), "duty failed; trying again");
                }
            }
            if let Some(at) = again {
                wait = wait.min(at.saturating_duration_since(Instant::now()));
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.stop.cancelled() => {}
            }
        }
    }

    /// One run, if the lease is ours and it is time.
    async fn turn(&self, duty: Duty, eager: bool) -> anyhow::Result<Turn> {
        // Long enough for two missed looks, short enough that a killed holder is replaced soon.
        let ttl = self.settings.tick * 3 + Duration::from_secs(1);
        let Some(held) = self.store.duty_hold(duty.name(), self.holder, ttl, eager).await? else {
            return Ok(Turn::Elsewhere);
        };
        if !held.begun {
            return Ok(Turn::NotYet { due_in: held.due_in });
        }
        let began = Instant::now();
        // Postgres bounds each statement; this bounds a connection whose other side is gone.
        let work = tokio::time::timeout(LONGEST, self.work(duty, &held, &self.store.under(&held))).await;
        let result = work.unwrap_or_else(|_| {
            warn!(duty = duty.name(), "took too long; given up for now");
            Ok(Done::default())
        });
        let error = result.as_ref().err().map(|error| format!("{error:#}"));
        let rows = result.as_ref().map_or(0, |done| done.rows);
        self.store.duty_ran(&held, began.elapsed(), rows, error.as_deref()).await?;
        Ok(Turn::Ran { due_in: held.due_in, again: result?.again })
    }

    /// The work of one run. Everything goes through `store`, which is fenced.
    async fn work(&self, duty: Duty, held: &Held, store: &WorkerStore) -> anyhow::Result<Done> {
        match duty {
            Duty::Promote => {
                let (moved, next) = store.promote(BATCH).await?;
                if moved > 0 {
                    self.signals.ready.announce(&Announced::Any);
                }
                let until = |at: chrono::DateTime<chrono::Utc>| {
                    (at - chrono::Utc::now()).to_std().unwrap_or_default().max(PROMOTE_MIN)
                };
                let done = Done::batch(moved.unsigned_abs());
                Ok(Done { again: done.again.or(next.map(until)), ..done })
            }
            Duty::Settle => {
                let settled = store.settle(BATCH).await?;
                if settled.released > 0 {
                    self.signals.ready.announce(&Announced::Any);
                }
                let rows = (settled.released + settled.cancelled).unsigned_abs();
                Ok(Done { rows: u64::from(rows), again: settled.more.then_some(Duration::ZERO) })
            }
            Duty::Unpark => {
                let back = store.unpark(BATCH).await?;
                if back > 0 {
                    self.signals.ready.announce(&Announced::Any);
                }
                Ok(Done::batch(u64::from(back.unsigned_abs())))
            }
            Duty::Reap => {
                let reaped = store.reap(self.settings.dead_after, self.settings.max_handovers, None).await?;
                if reaped.workers > 0 {
                    info!(?reaped, "dead workers reaped");
                    self.signals.ready.announce(&Announced::Any);
                }
                Ok(Done { rows: reaped.workers.unsigned_abs(), again: None })
            }
            Duty::Expire => {
                let ended = store.expire(BATCH).await?;
                self.signals.done(&ended);
                Ok(Done::batch(ended.len() as u64))
            }
            Duty::Erase => {
                let gone = store.erase_tenant(BATCH).await?;
                // As long as rows go there are more of them.
                Ok(Done { rows: gone, again: (gone > 0).then_some(Duration::ZERO) })
            }
            Duty::Tidy => {
                let tidied = store.tidy(i64::from(BATCH)).await?;
                let settled = store.settle_live(BATCH).await?.unsigned_abs();
                let freed = store.free_modules(FREE_AFTER, FREE_BATCH).await?.unsigned_abs();
                let forgotten = store.audit_forget(i64::from(BATCH)).await?
                    + store.people_tidy(i64::from(BATCH)).await?
                    + store.events_forget(i64::from(BATCH)).await?;
                let rows = tidied + settled + freed + forgotten;
                Ok(Done { rows, ..Done::batch(tidied.max(settled)) })
            }
            Duty::Usage => {
                let (folded, tenants) = store.fold_usage(BATCH).await?;
                let defaults = self.app.defaults_of_queues();
                let new = {
                    let applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
                    applied.as_ref() != Some(&defaults)
                };
                let holds = store.hold_spent(&tenants, &defaults, new).await?;
                *self.applied.lock().unwrap_or_else(PoisonError::into_inner) = Some(defaults);
                if holds.released > 0 {
                    self.signals.ready.announce(&Announced::Any);
                }
                if holds != Holds::default() {
                    info!(?holds, "quotas of periods");
                }
                Ok(Done::batch(folded.unsigned_abs()))
            }
            Duty::Bulk => {
                let (rows, again) = self.app.bulk_turn(held, store).await?;
                Ok(Done { rows, again })
            }
            Duty::Classify => {
                let rows = app::dead_letter::classify(store, &self.keys).await?;
                Ok(Done { rows, again: (rows > 0).then_some(Duration::ZERO) })
            }
            Duty::Budgets => {
                let (rows, more) = app::spending::watch(store).await?;
                Ok(Done { rows, again: more.then_some(Duration::ZERO) })
            }
            Duty::Retention => {
                let (rows, more) =
                    retention::turn(store, self.settings.retention_days, self.settings.export_dir.as_deref())
                        .await?;
                Ok(Done { rows, again: more.then_some(Duration::ZERO) })
            }
        }
    }
}

/// What a look at a duty came to.
enum Turn {
    /// Another process has it.
    Elsewhere,
    /// It is ours, and not its time.
    NotYet { due_in: Duration },
    /// It ran.
    Ran { due_in: Duration, again: Option<Duration> },
}
