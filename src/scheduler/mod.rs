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
pub async fn run(
    settings: Settings,
    store: WorkerStore,
    signals: Arc<Signals>,
    stop: CancellationToken,
) {
    let holder = WorkerId::generate();
    let duty = |name| Duty {
        name,
        holder,
        store: store.clone(),
        tick: settings.tick,
        stop: stop.clone(),
    };
    let (promote, reap, expire, tidy) = (duty("promote"), duty("reap"), duty("expire"), duty("tidy"));
    tokio::join!(
        promote.keep(async |store| {
            let (moved, next) = store.promote(BATCH).await?;
            if moved > 0 {
                signals.ready.notify_one();
            }
            Ok(if moved >= i64::from(BATCH) {
                Some(Duration::ZERO)
            } else {
                next.map(|at| (at - chrono::Utc::now()).to_std().unwrap_or_default().max(PROMOTE_MIN))
            })
        }),
        reap.keep(async |store| {
            let reaped = store.reap(settings.dead_after, settings.max_handovers, None).await?;
            if reaped.workers > 0 {
                info!(?reaped, "dead workers reaped");
                signals.ready.notify_one();
            }
            // A worker dies at any time; looking more often than it may be silent finds it in time.
            Ok(Some(settings.dead_after / 6))
        }),
        expire.keep(async |store| {
            let ended = store.expire(BATCH).await?;
            signals.done(&ended);
            Ok((ended.len() >= BATCH.unsigned_abs() as usize).then_some(Duration::ZERO))
        }),
        tidy.keep(async |store| {
            let gone = store.tidy(i64::from(BATCH)).await?;
            Ok((gone >= u64::from(BATCH.unsigned_abs())).then_some(Duration::ZERO))
        }),
    );
    if let Ok(Err(error)) =
        tokio::time::timeout(Duration::from_secs(2), store.duties_release(holder)).await
    {
        debug!(%error, "duties not released; their leases run out");
    }
}

struct Duty {
    name: &'static str,
    holder: WorkerId,
    store: WorkerStore,
    tick: Duration,
    stop: CancellationToken,
}

impl Duty {
    /// Hold the lease and work; the work may ask for an earlier next run.
    async fn keep(&self, work: impl AsyncFn(&WorkerStore) -> Result<Option<Duration>>) {
        // Long enough for two missed runs, short enough that a killed holder is replaced soon.
        let ttl = self.tick * 3 + Duration::from_secs(1);
        while !self.stop.is_cancelled() {
            let mut wait = self.tick;
            match self.turn(ttl, &work).await {
                Ok(Some(sooner)) => wait = wait.min(sooner),
                Ok(None) => {}
                Err(error) => warn!(duty = self.name, %error, "duty failed; trying again"),
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.stop.cancelled() => {}
            }
        }
    }

    async fn turn(
        &self,
        ttl: Duration,
        work: &impl AsyncFn(&WorkerStore) -> Result<Option<Duration>>,
    ) -> Result<Option<Duration>> {
        if !self.store.duty_hold(self.name, self.holder, ttl).await? {
            return Ok(None);
        }
        let result = work(&self.store).await;
        let error = result.as_ref().err().map(ToString::to_string);
        self.store.duty_ran(self.name, self.holder, error.as_deref()).await?;
        result
    }
}
