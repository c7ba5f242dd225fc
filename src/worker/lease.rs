//! Whether this worker is still who the database thinks it is. Owns the identity (id and random epoch), the heartbeat
//! and the clock that says when to stop; never touches guests.
//!
//! The rule: others may declare us dead `dead_after` after the database *received* a heartbeat. We count from when we
//! *sent* the last one that was answered, which is earlier, on a clock that runs through suspension (CLOCK_BOOTTIME),
//! and stop a margin before. So our guests are gone before their work is given away, whatever the network or a
//! suspended machine does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::domain::ids::{InvocationId, WorkerId};
use crate::domain::lease::Validity;
use crate::domain::worker::Wanted;
use crate::store::worker::Registration;
use crate::store::{Error, WorkerStore};
use crate::worker::load::Gauge;
use crate::worker::{Settings, Stop};

/// Cancellations waiting to be looked at; more are dropped, and the next heartbeat brings them again.
const CANCEL_QUEUE: usize = 64;

/// Nanoseconds since boot, suspension included.
fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Whether the lease is held, for those who outlive a borrow of it.
#[derive(Debug, Clone)]
pub struct Held {
    /// When the last answered heartbeat was sent.
    sent_ns: Arc<AtomicU64>,
    /// How long after that guests may run.
    valid: Validity,
    lost: CancellationToken,
}

impl Held {
    /// May guests still run, by our own clock?
    pub fn is_held(&self) -> bool {
        !self.lost.is_cancelled() && self.valid.holds(self.sent_ns.load(Ordering::Acquire), boottime_ns())
    }
}

/// The identity under which a worker claims, and its heartbeat.
pub struct Lease {
    worker: WorkerId,
    epoch: i64,
    held: Held,
    stop: CancellationToken,
    /// Invocations that somebody wants cancelled, from heartbeats.
    pub cancels: tokio::sync::Mutex<mpsc::Receiver<Vec<InvocationId>>>,
    /// What heartbeats say of us.
    pub gauge: Arc<Gauge>,
    /// What operators want of us, as the last heartbeat brought it.
    pub wanted: watch::Receiver<Wanted>,
    has_peers: Arc<AtomicBool>,
}

impl Lease {
    /// The worker's id.
    pub fn worker(&self) -> WorkerId {
        self.worker
    }

    /// The worker's epoch.
    pub fn epoch(&self) -> i64 {
        self.epoch
    }

    /// May guests still run, by our own clock?
    pub fn is_held(&self) -> bool {
        self.held.is_held()
    }

    /// The same question, to be asked later.
    pub fn held(&self) -> Held {
        self.held.clone()
    }

    /// Whether other workers claimed too when the last heartbeat was answered.
    pub fn has_peers(&self) -> bool {
        self.has_peers.load(Ordering::Relaxed)
    }

    /// Resolves when the lease is lost.
    pub async fn lost(&self) {
        self.held.lost.cancelled().await;
    }

    /// End the heartbeat.
    pub fn stop(&self) {
        self.stop.cancel();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Register under a new identity and start the heartbeat. `wanted`: what operators wanted of the identity before, which
/// the new one takes over. Tries until it succeeds; `None` when told to stop.
pub async fn register(
    settings: &Settings,
    store: &WorkerStore,
    stop: &Stop,
    wanted: Wanted,
) -> Option<Lease> {
    let mut wait = Duration::from_millis(100);
    loop {
        if stop.drain.is_cancelled() || stop.now.is_cancelled() {
            return None;
        }
        let registration = Registration {
            worker: WorkerId::generate(),
            epoch: rand::random(),
            host: host_name(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            slots: i32::try_from(settings.slots).unwrap_or(i32::MAX),
        };
        let sent = boottime_ns();
        match store.worker_register(&registration).await {
            Ok(()) => {
                if wanted != Wanted::Active
                    && let Err(error) = store.worker_stays(registration.worker, wanted).await
                {
                    warn!(%error, %wanted, "cannot say what was wanted of this worker; it claims again");
                }
                return Some(start(settings, store, &registration, sent, wanted));
            }
            Err(error) => {
                warn!(%error, "cannot register; trying again");
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = stop.drain.cancelled() => return None,
                    () = stop.now.cancelled() => return None,
                }
                wait = (wait * 2).min(Duration::from_secs(2));
            }
        }
    }
}

fn start(settings: &Settings, store: &WorkerStore, r: &Registration, sent: u64, wanted: Wanted) -> Lease {
    let (cancels, receiver) = mpsc::channel(CANCEL_QUEUE);
    let (want, wanted) = watch::channel(wanted);
    let lease = Lease {
        worker: r.worker,
        epoch: r.epoch,
        held: Held {
            sent_ns: Arc::new(AtomicU64::new(sent)),
            valid: Validity::of(settings.dead_after),
            lost: CancellationToken::new(),
        },
        stop: CancellationToken::new(),
        cancels: tokio::sync::Mutex::new(receiver),
        gauge: Arc::default(),
        wanted,
        has_peers: Arc::default(),
    };
    let beat = Beat {
        store: store.clone(),
        worker: r.worker,
        epoch: r.epoch,
        every: settings.heartbeat,
        held: lease.held(),
        stop: lease.stop.clone(),
        cancels,
        gauge: lease.gauge.clone(),
        want,
        has_peers: lease.has_peers.clone(),
    };
    tokio::spawn(beat.clone().watch());
    tokio::spawn(beat.run());
    lease
}

#[derive(Clone)]
struct Beat {
    store: WorkerStore,
    worker: WorkerId,
    epoch: i64,
    every: Duration,
    held: Held,
    stop: CancellationToken,
    cancels: mpsc::Sender<Vec<InvocationId>>,
    gauge: Arc<Gauge>,
    want: watch::Sender<Wanted>,
    has_peers: Arc<AtomicBool>,
}

impl Beat {
    /// The heartbeat. A failed one is repeated sooner; only the clock decides that the lease is lost.
    async fn run(self) {
        loop {
            let sent = boottime_ns();
            let load = self.gauge.read();
            let wait = match self.store.worker_heartbeat(self.worker, self.epoch, load).await {
                Ok(orders) => {
                    self.held.sent_ns.fetch_max(sent, Ordering::AcqRel);
                    self.has_peers.store(orders.has_peers, Ordering::Relaxed);
                    if !orders.cancels.is_empty() {
                        let _ = self.cancels.try_send(orders.cancels); // full: the next heartbeat brings them again
                    }
                    self.want.send_if_modified(|wanted| {
                        let changed = *wanted != orders.wanted;
                        if changed {
                            info!(worker = %self.worker, wanted = %orders.wanted, "an operator wants something else");
                            *wanted = orders.wanted;
                        }
                        changed
                    });
                    self.every
                }
                Err(Error::WorkerGone) => {
                    error!(worker = %self.worker, "declared dead by the reaper");
                    self.held.lost.cancel();
                    return;
                }
                Err(error) => {
                    warn!(%error, "heartbeat failed");
                    self.every / 10
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.stop.cancelled() => return,
                () = self.held.lost.cancelled() => return,
            }
        }
    }

    /// The clock. Apart from the heartbeat, which may hang in a connection for longer than the lease lives.
    async fn watch(self) {
        let look = (self.every / 8).max(Duration::from_millis(5));
        loop {
            tokio::select! {
                () = tokio::time::sleep(look) => {}
                () = self.stop.cancelled() => return,
                () = self.held.lost.cancelled() => return,
            }
            let (sent, now) = (self.held.sent_ns.load(Ordering::Acquire), boottime_ns());
            if !self.held.valid.holds(sent, now) {
                let age_ms = now.saturating_sub(sent) / 1_000_000;
                error!(worker = %self.worker, age_ms, "no heartbeat answered in time");
                self.held.lost.cancel();
                return;
            }
        }
    }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
