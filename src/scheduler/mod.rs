//! Background duties: promotion, reaping, expiry, tidying, compilation. Each of the first four runs under a lease in
//! Postgres, so that one process of many does it; compilation is leased per version. Owns intervals; the work itself
//! is in `store`.

mod compile;

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use compile::run as compile;

use crate::app::signals::Signals;
use crate::domain::ids::WorkerId;
use crate::store::{Result, WorkerStore};

/// Rows that one run of a duty handles; what is left comes in the next, at once.
const BATCH: i32 = 1_000;
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
}

/// Run every duty until told to stop, then let go of their leases.
pub async fn run(settings: Settings, store: WorkerStore, signals: Arc<Signals>, stop: CancellationToken) {
    let duties = Duties { holder: WorkerId::generate(), settings, store, signals, stop };
    tokio::join!(
        duties.keep(Duty::Promote),
        duties.keep(Duty::Reap),
        duties.keep(Duty::Expire),
        duties.keep(Duty::Tidy),
    );
    let release = duties.store.duties_release(duties.holder);
    if let Ok(Err(error)) = tokio::time::timeout(Duration::from_secs(2), release).await {
        debug!(%error, "duties not released; their leases run out");
    }
}

/// The duties that run under a lease.
#[derive(Debug, Clone, Copy)]
enum Duty {
    /// What is due becomes ready.
    Promote,
    /// Silent workers are declared dead, and their work handed on.
    Reap,
    /// What waits past its expiry ends.
    Expire,
    /// Old idempotency keys and spent cancellations go.
    Tidy,
}

impl Duty {
    /// The name of its lease.
    fn name(self) -> &'static str {
        match self {
            Self::Promote => "promote",
            Self::Reap => "reap",
            Self::Expire => "expire",
            Self::Tidy => "tidy",
        }
    }
}

struct Duties {
    holder: WorkerId,
    settings: Settings,
    store: WorkerStore,
    signals: Arc<Signals>,
    stop: CancellationToken,
}

impl Duties {
    /// Hold the duty's lease and do it, again and again, until told to stop.
    async fn keep(&self, duty: Duty) {
        while !self.stop.is_cancelled() {
            let mut wait = self.settings.tick;
            match self.turn(duty).await {
                Ok(Some(sooner)) => wait = wait.min(sooner),
                Ok(None) => {}
                Err(error) => warn!(duty = duty.name(), %error, "duty failed; trying again"),
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.stop.cancelled() => {}
            }
        }
    }

    /// One run, if the lease is ours. May ask for an earlier next run.
    async fn turn(&self, duty: Duty) -> Result<Option<Duration>> {
        // Long enough for two missed runs, short enough that a killed holder is replaced soon.
        let ttl = self.settings.tick * 3 + Duration::from_secs(1);
        if !self.store.duty_hold(duty.name(), self.holder, ttl).await? {
            return Ok(None);
        }
        let result = self.work(duty).await;
        let error = result.as_ref().err().map(ToString::to_string);
        self.store.duty_ran(duty.name(), self.holder, error.as_deref()).await?;
        result
    }

    async fn work(&self, duty: Duty) -> Result<Option<Duration>> {
        // A full batch means that there is more: go on at once.
        let more = |full: bool| full.then_some(Duration::ZERO);
        match duty {
            Duty::Promote => {
                let (moved, next) = self.store.promote(BATCH).await?;
                if moved > 0 {
                    self.signals.ready.notify_one();
                }
                let until = |at: chrono::DateTime<chrono::Utc>| {
                    (at - chrono::Utc::now()).to_std().unwrap_or_default().max(PROMOTE_MIN)
                };
                Ok(more(moved >= i64::from(BATCH)).or(next.map(until)))
            }
            Duty::Reap => {
                let reaped =
                    self.store.reap(self.settings.dead_after, self.settings.max_handovers, None).await?;
                if reaped.workers > 0 {
                    info!(?reaped, "dead workers reaped");
                    self.signals.ready.notify_one();
                }
                // A worker dies at any time; looking more often than it may be silent finds it in time.
                Ok(Some(self.settings.dead_after / 6))
            }
            Duty::Expire => {
                let ended = self.store.expire(BATCH).await?;
                self.signals.done(&ended);
                Ok(more(ended.len() >= BATCH.unsigned_abs() as usize))
            }
            Duty::Tidy => {
                Ok(more(self.store.tidy(i64::from(BATCH)).await? >= u64::from(BATCH.unsigned_abs())))
            }
        }
    }
}
