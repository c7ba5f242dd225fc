//! Wake-ups between the roles that live in one process, and from other processes through Postgres.
//! Owns no state worth keeping: every signal may be lost, and whoever waits for one also looks by itself now and then.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::domain::announced::Announced;
use crate::domain::ids::InvocationId;
use crate::store::ApiStore;
use crate::store::queue::DONE_CHANNEL;
use crate::store::start::START_CHANNEL;

/// How long a waiter sleeps before it looks by itself.
pub const WAITER_RECHECK: Duration = Duration::from_millis(500);
/// Cancellations a slow listener may be behind before it misses some (heartbeats bring those again).
const CANCELLED_BACKLOG: usize = 1024;
/// Begins the name of a process in a notification; no id of a task begins like this.
const ORIGIN: &str = "by:";
/// First and longest pause before listening again after Postgres went away.
const RELISTEN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Wake-ups of one process. Cheap to share.
#[derive(Debug)]
pub struct Signals {
    /// Names this process in what it tells others, so that it does not hear itself: its own worker was told directly.
    origin: String,
    /// There may be ready work.
    pub ready: Ready,
    /// There may be a version to compile.
    pub compile: Notify,
    /// An attempt may have asked to start something.
    pub starts: Notify,
    cancelled: broadcast::Sender<InvocationId>,
    versions: watch::Sender<u64>,
    waiters: Mutex<HashMap<InvocationId, Vec<Arc<Notify>>>>,
}

/// Ready work that nobody has heard of yet. For one listener.
#[derive(Debug, Default)]
pub struct Ready {
    announced: Mutex<Option<Announced>>,
    wake: Notify,
}

impl Ready {
    /// There may be more of this.
    pub fn announce(&self, announced: &Announced) {
        match &mut *self.lock() {
            Some(all) => all.add(announced),
            none => *none = Some(announced.clone()),
        }
        self.wake.notify_one();
    }

    /// What was announced since the last call; waits for something.
    pub async fn heard(&self) -> Announced {
        loop {
            self.wake.notified().await;
            // Taken by nobody but the listener: empty only when two announcements woke it once too often.
            if let Some(announced) = self.lock().take() {
                return announced;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Announced>> {
        self.announced.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Signals {
    fn default() -> Self {
        Self {
            origin: format!("{ORIGIN}{:032x}", rand::random::<u128>()),
            ready: Ready::default(),
            compile: Notify::new(),
            starts: Notify::new(),
            cancelled: broadcast::channel(CANCELLED_BACKLOG).0,
            versions: watch::Sender::new(0),
            waiters: Mutex::default(),
        }
    }
}

impl Signals {
    /// No waiters, nothing signalled.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// What other processes are told of new work.
    #[must_use]
    pub fn outgoing(&self, announced: &Announced) -> String {
        format!("{} {announced}", self.origin)
    }

    /// What a process says of new work, unless it is this one.
    #[must_use]
    pub fn incoming(&self, payload: &str) -> Option<Announced> {
        let announced = match payload.strip_prefix(ORIGIN) {
            None => payload,
            Some(_) if payload.starts_with(&self.origin) => return None,
            Some(named) => named.split_once(' ').map_or("", |(_, announced)| announced),
        };
        Some(Announced::from(announced))
    }

    /// Somebody asked for the end of a running invocation.
    pub fn cancelled(&self, id: InvocationId) {
        // An error says that nobody listens in this process.
        let _ = self.cancelled.send(id);
    }

    /// Cancellations asked for from now on.
    #[must_use]
    pub fn subscribe_cancelled(&self) -> broadcast::Receiver<InvocationId> {
        self.cancelled.subscribe()
    }

    /// A version became ready or was rejected: what is remembered about tasks is out of date.
    pub fn version_changed(&self) {
        self.versions.send_modify(|changes| *changes += 1);
    }

    /// Grows with every [`Signals::version_changed`].
    #[must_use]
    pub fn versions(&self) -> u64 {
        *self.versions.borrow()
    }

    /// Tells of every [`Signals::version_changed`] from now on.
    #[must_use]
    pub fn subscribe_versions(&self) -> watch::Receiver<u64> {
        self.versions.subscribe()
    }

    /// Be woken when `id` ends. Call this BEFORE reading its state: then an end between the two is not missed.
    #[must_use]
    pub fn wait_for(self: &Arc<Self>, id: InvocationId) -> Waiter {
        let wake = Arc::new(Notify::new());
        self.lock().entry(id).or_default().push(Arc::clone(&wake));
        Waiter { signals: Arc::clone(self), id, wake }
    }

    /// These ended.
    pub fn done(&self, ids: &[InvocationId]) {
        let waiters = self.lock();
        if waiters.is_empty() {
            return;
        }
        for wake in ids.iter().filter_map(|id| waiters.get(id)).flatten() {
            wake.notify_one();
        }
    }

    /// Signals may have been lost: everybody looks again.
    pub fn look_again(&self) {
        for wake in self.lock().values().flatten() {
            wake.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<InvocationId, Vec<Arc<Notify>>>> {
        // Nothing panics while it holds the lock, and the map is whole in any case.
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Someone waiting for the end of one invocation.
#[derive(Debug)]
pub struct Waiter {
    signals: Arc<Signals>,
    id: InvocationId,
    wake: Arc<Notify>,
}

impl Waiter {
    /// True: somebody says that the invocation ended, since the last call or since [`Signals::wait_for`]. False: it is
    /// time to look whether a signal was lost. Either way: look.
    pub async fn nudge(&self) -> bool {
        tokio::time::timeout(WAITER_RECHECK, self.wake.notified()).await.is_ok()
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut waiters = self.signals.lock();
        if let Some(list) = waiters.get_mut(&self.id) {
            list.retain(|wake| !Arc::ptr_eq(wake, &self.wake));
            if list.is_empty() {
                waiters.remove(&self.id);
            }
        }
    }
}

/// Pass on what other processes say on [`DONE_CHANNEL`], until `stop`.
pub async fn listen(store: ApiStore, signals: Arc<Signals>, stop: CancellationToken) {
    let hear = async {
        let mut pause = RELISTEN.0;
        loop {
            match hear(&store, &signals, &mut pause).await {
                Ok(()) => tracing::info!("listening for ended invocations again"),
                Err(error) => {
                    tracing::warn!(%error, "cannot listen for ended invocations; waiters poll");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RELISTEN.1);
                }
            }
            signals.look_again();
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = hear => {}
    }
}

/// Returns when the connection was lost, with an error when it could not be had.
async fn hear(store: &ApiStore, signals: &Signals, pause: &mut Duration) -> crate::store::Result<()> {
    let mut listener = store.listener().await?;
    listener.listen_all([DONE_CHANNEL, START_CHANNEL]).await?;
    *pause = RELISTEN.0;
    while let Some(notification) = listener.try_recv().await? {
        if notification.channel() == START_CHANNEL {
            signals.starts.notify_one();
            continue;
        }
        let ids: Vec<InvocationId> =
            notification.payload().split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
        signals.done(&ids);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::domain::ids::TaskId;

    #[tokio::test]
    async fn an_end_between_registration_and_waiting_is_not_lost() {
        let signals = Signals::new();
        let id = InvocationId::generate();
        let waiter = signals.wait_for(id);
        signals.done(&[InvocationId::generate(), id]);
        assert!(waiter.nudge().await, "the signal was kept");
        assert!(!waiter.nudge().await, "once; then only the fallback wakes");
    }

    #[tokio::test]
    async fn every_waiter_of_one_invocation_is_woken_and_forgotten() {
        let signals = Signals::new();
        let id = InvocationId::generate();
        let waiters: Vec<Waiter> = (0..3).map(|_| signals.wait_for(id)).collect();
        signals.done(&[id]);
        for waiter in &waiters {
            tokio::time::timeout(Duration::from_millis(100), waiter.wake.notified()).await.expect("woken");
        }
        drop(waiters);
        assert!(signals.lock().is_empty());
    }

    #[test]
    fn what_a_process_says_of_new_work_others_hear_and_it_does_not() {
        let (one, other) = (Signals::default(), Signals::default());
        for announced in [Announced::Any, Announced::of([TaskId::generate(), TaskId::generate()])] {
            let said = one.outgoing(&announced);
            assert_eq!(other.incoming(&said), Some(announced));
            assert_eq!(one.incoming(&said), None);
        }
        // By one that does not name itself.
        assert_eq!(one.incoming(""), Some(Announced::Any));
    }
}
