//! The clock of a runtime: one thread that advances the engine's epoch every millisecond (which is
//! what preempts guests) and looks for deadlines that have passed. Sleeps while nothing runs.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use wasmtime::Engine;

use crate::control::Control;

/// Length of an epoch: the slice after which a guest yields.
pub(crate) const TICK: Duration = Duration::from_millis(1);
/// Time between two rounds of telling what running attempts log; of each one it is told less often.
const TELL_EVERY: Duration = Duration::from_millis(100);
/// Idle ticks before the thread parks; waking it costs more than a few idle ticks.
const IDLE_TICKS: u32 = 100;

/// A running clock. Dropping it ends the thread.
pub(crate) struct Ticker {
    shared: Arc<Shared>,
    thread: Thread,
}

struct Shared {
    ended: AtomicBool,
    parked: AtomicBool,
    active: AtomicU32,
    ticks: AtomicU64,
    started: Instant,
    /// Nanoseconds since `started` of the earliest deadline; scans happen only when it has passed.
    earliest: AtomicU64,
    watched: Mutex<Watched>,
}

/// A slab of the attempts that run.
#[derive(Default)]
struct Watched {
    slots: Vec<Option<Arc<Control>>>,
    free: Vec<usize>,
}

impl Shared {
    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at(&self, now: Instant, ahead: Duration) -> u64 {
        let at = now.saturating_duration_since(self.started).saturating_add(ahead);
        u64::try_from(at.as_nanos()).unwrap_or(u64::MAX)
    }

    fn scan(&self, now: Instant) {
        if self.at(now, Duration::ZERO) < self.earliest.load(Ordering::Acquire) {
            return;
        }
        let watched = self.watched();
        let mut earliest = u64::MAX;
        for control in watched.slots.iter().flatten() {
            let remaining = control.remaining(now);
            if remaining.is_zero() {
                if control.stopped().is_none() {
                    control.expire();
                }
            } else {
                earliest = earliest.min(self.at(now, remaining));
            }
        }
        // Under the lock: `watch` and `hurry` lower it under the same lock.
        self.earliest.store(earliest, Ordering::Release);
    }

    /// Whoever listens to what running attempts log is told.
    fn tell(&self, now: Instant) {
        // Not under the lock: a listener has locks of its own.
        let running: Vec<Arc<Control>> = self.watched().slots.iter().flatten().cloned().collect();
        for control in running {
            control.tell(now);
        }
    }
}

impl Ticker {
    pub(crate) fn start(engine: Engine) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            ended: AtomicBool::new(false),
            parked: AtomicBool::new(false),
            active: AtomicU32::new(0),
            ticks: AtomicU64::new(0),
            started: Instant::now(),
            earliest: AtomicU64::new(u64::MAX),
            watched: Mutex::default(),
        });
        let own = shared.clone();
        let handle =
            thread::Builder::new().name("sandbar-ticker".to_owned()).spawn(move || run(&own, &engine))?;
        Ok(Self { shared, thread: handle.thread().clone() })
    }

    /// The number of the current epoch.
    pub(crate) fn now(&self) -> u64 {
        self.shared.ticks.load(Ordering::Relaxed)
    }

    /// Watches the deadline of `control` until the guard is dropped.
    pub(crate) fn watch(self: &Arc<Self>, control: &Arc<Control>) -> Watch {
        let shared = &self.shared;
        let now = Instant::now();
        let slot = {
            let mut watched = shared.watched();
            shared.earliest.fetch_min(shared.at(now, control.remaining(now)), Ordering::AcqRel);
            if let Some(slot) = watched.free.pop() {
                watched.slots[slot] = Some(control.clone());
                slot
            } else {
                watched.slots.push(Some(control.clone()));
                watched.slots.len() - 1
            }
        };
        shared.active.fetch_add(1, Ordering::SeqCst);
        if shared.parked.load(Ordering::SeqCst) {
            self.thread.unpark();
        }
        Watch { ticker: self.clone(), slot }
    }

    /// A deadline moved closer: look again at the next tick.
    pub(crate) fn hurry(&self) {
        let _watched = self.shared.watched();
        self.shared.earliest.store(0, Ordering::Release);
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.thread.unpark();
    }
}

/// One attempt under watch.
pub(crate) struct Watch {
    ticker: Arc<Ticker>,
    slot: usize,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let shared = &self.ticker.shared;
        {
            let mut watched = shared.watched();
            if let Some(slot) = watched.slots.get_mut(self.slot) {
                *slot = None;
            }
            watched.free.push(self.slot);
        }
        shared.active.fetch_sub(1, Ordering::SeqCst);
    }
}

fn run(shared: &Shared, engine: &Engine) {
    let mut idle = 0;
    let mut next_tell = Instant::now();
    while !shared.ended.load(Ordering::SeqCst) {
        thread::sleep(TICK);
        engine.increment_epoch();
        shared.ticks.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        shared.scan(now);
        if now >= next_tell {
            next_tell = now + TELL_EVERY;
            shared.tell(now);
        }
        if shared.active.load(Ordering::SeqCst) > 0 {
            idle = 0;
            continue;
        }
        idle += 1;
        if idle < IDLE_TICKS {
            continue;
        }
        idle = 0;
        shared.parked.store(true, Ordering::SeqCst);
        // Looked at after `parked` is visible, so that no beginning attempt is missed.
        if shared.active.load(Ordering::SeqCst) == 0 && !shared.ended.load(Ordering::SeqCst) {
            thread::park();
        }
        shared.parked.store(false, Ordering::SeqCst);
    }
}
