//! The reins of one running attempt: deadline, cancellation, progress.
//! Owns the flags and the waker; the ticker pulls them, the guarded future obeys.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::log::Log;
use crate::output::{SharedCapture, lock};
use crate::state::LiveSink;

/// Shortest time between two deliveries of what one attempt logs, and the age before which nothing is delivered: an
/// attempt that ends sooner costs nothing of this.
pub(crate) const LIVE_EVERY: Duration = Duration::from_millis(250);
/// How long a task that watches `cancelled` may clean up after a cancellation.
pub const CANCEL_GRACE: Duration = Duration::from_millis(500);

/// Why somebody else ends an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CancelReason {
    /// Somebody asked for the end of the invocation.
    Cancelled,
    /// The worker lost its lease; another attempt may begin at any moment.
    LeaseLost,
}

/// Why a guest was stopped from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stop {
    Cancelled = 1,
    LeaseLost = 2,
    Deadline = 3,
}

/// The latest progress a guest reported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Units done.
    pub done: u64,
    /// Units in all; 0 means unknown.
    pub total: u64,
    /// For people, at most 1,024 bytes.
    pub message: String,
}

/// Shared between the attempt, the ticker and whoever may cancel.
pub struct Control {
    /// The executor's name of the attempt; 0 outside a cell.
    pub(crate) token: u64,
    /// Whose it is.
    pub(crate) tenant: u64,
    stop: AtomicU8,
    cancel_asked: AtomicBool,
    watches_cancel: AtomicBool,
    /// Nanoseconds since `base` at which the ticker acts.
    due: AtomicU64,
    base: Instant,
    waker: Mutex<Option<Waker>>,
    progress: Mutex<Option<Progress>>,
    /// What it says, and who wants to hear of it while it runs.
    live: OnceLock<(SharedCapture, Arc<dyn LiveSink>)>,
    /// Somebody has been told that there is something to hear, and has not heard it yet.
    telling: AtomicBool,
    /// Nanoseconds since `base` before which nobody is told.
    tell_at: AtomicU64,
}

impl Control {
    /// Reins of an attempt that has not begun.
    #[must_use]
    pub fn new(token: u64, tenant: u64) -> Self {
        Self {
            token,
            tenant,
            stop: AtomicU8::new(0),
            cancel_asked: AtomicBool::new(false),
            watches_cancel: AtomicBool::new(false),
            due: AtomicU64::new(u64::MAX),
            base: Instant::now(),
            waker: Mutex::new(None),
            progress: Mutex::new(None),
            live: OnceLock::new(),
            telling: AtomicBool::new(false),
            tell_at: AtomicU64::new(nanos(LIVE_EVERY)),
        }
    }

    /// From now on `sink` is told of what is written to `capture`, by the ticker.
    pub(crate) fn listen(&self, capture: SharedCapture, sink: Arc<dyn LiveSink>) {
        let _ = self.live.set((capture, sink));
    }

    /// Tells the listener if there is something to hear and the attempt is no longer young. Called by the ticker.
    pub(crate) fn tell(self: &Arc<Self>, now: Instant) {
        let Some((capture, sink)) = self.live.get() else { return };
        let age = nanos(now.saturating_duration_since(self.base));
        if age < self.tell_at.load(Ordering::Relaxed) || self.telling.load(Ordering::Acquire) {
            return;
        }
        // A guest that is writing right now is heard the next time.
        let news = capture.try_lock().is_ok_and(|capture| capture.has_news());
        if news && !self.telling.swap(true, Ordering::AcqRel) {
            self.tell_at.store(age.saturating_add(nanos(LIVE_EVERY)), Ordering::Relaxed);
            sink.log(self);
        }
    }

    /// What was written since the last time; see [`crate::output::Capture::news`].
    pub(crate) fn take_log(&self, max_bytes: usize) -> Option<(u32, Log)> {
        self.telling.store(false, Ordering::Release);
        let (capture, _) = self.live.get()?;
        lock(capture).news(max_bytes)
    }

    /// Sets the deadline, counted from now.
    pub(crate) fn arm(&self, timeout: Duration) {
        self.due.fetch_min(self.elapsed_ns().saturating_add(nanos(timeout)), Ordering::AcqRel);
    }

    fn elapsed_ns(&self) -> u64 {
        nanos(self.base.elapsed())
    }

    /// Time until the ticker must act; zero when it is due.
    pub(crate) fn remaining(&self, now: Instant) -> Duration {
        let due = self.due.load(Ordering::Acquire);
        let elapsed = nanos(now.saturating_duration_since(self.base));
        Duration::from_nanos(due.saturating_sub(elapsed))
    }

    /// Ends the attempt. A spinning guest stops at its next yield, a waiting one at once. A task
    /// that has asked `cancelled` before gets [`CANCEL_GRACE`] to return; after a lost lease nobody
    /// gets any.
    pub(crate) fn cancel(&self, why: CancelReason) {
        match why {
            CancelReason::LeaseLost => self.stop(Stop::LeaseLost),
            CancelReason::Cancelled => {
                self.cancel_asked.store(true, Ordering::Release);
                if self.watches_cancel.load(Ordering::Acquire) {
                    self.arm(CANCEL_GRACE);
                } else {
                    self.stop(Stop::Cancelled);
                }
            }
        }
    }

    /// Whether a cancellation was asked for; from now on the guest counts as watching.
    pub(crate) fn watch_cancel(&self) -> bool {
        self.watches_cancel.store(true, Ordering::Release);
        self.cancel_asked()
    }

    pub(crate) fn cancel_asked(&self) -> bool {
        self.cancel_asked.load(Ordering::Acquire)
    }

    /// The ticker found `due` in the past.
    pub(crate) fn expire(&self) {
        if self.cancel_asked() {
            self.stop(Stop::Cancelled);
        } else {
            self.stop(Stop::Deadline);
        }
    }

    /// The first reason stays.
    fn stop(&self, why: Stop) {
        let _ = self.stop.compare_exchange(0, why as u8, Ordering::AcqRel, Ordering::Acquire);
        let waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(crate) fn stopped(&self) -> Option<Stop> {
        match self.stop.load(Ordering::Acquire) {
            0 => None,
            1 => Some(Stop::Cancelled),
            2 => Some(Stop::LeaseLost),
            _ => Some(Stop::Deadline),
        }
    }

    fn register(&self, waker: &Waker) {
        let mut slot = self.waker.lock().unwrap_or_else(PoisonError::into_inner);
        if !slot.as_ref().is_some_and(|old| old.will_wake(waker)) {
            *slot = Some(waker.clone());
        }
    }

    /// Lets go of whoever polled the attempt.
    pub(crate) fn release(&self) {
        *self.waker.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Keeps the latest report only. True when the one before has been taken.
    pub(crate) fn set_progress(&self, progress: Progress) -> bool {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).replace(progress).is_none()
    }

    pub(crate) fn take_progress(&self) -> Option<Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Runs `future` until it ends or `control` says stop; then the future is dropped here, which
/// unwinds the guest, and its store can be read afterwards.
pub(crate) async fn guard<F: Future>(control: &Control, future: F) -> Result<F::Output, Stop> {
    let mut future = pin!(future);
    let ended = std::future::poll_fn(move |cx| {
        if let Some(stop) = control.stopped() {
            return Poll::Ready(Err(stop));
        }
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(output));
        }
        // The waker is needed only by guests that wait; most end in their first poll.
        control.register(cx.waker());
        match control.stopped() {
            Some(stop) => Poll::Ready(Err(stop)),
            None => Poll::Pending,
        }
    })
    .await;
    control.release();
    ended
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_first_reason_to_stop_stays() {
        let control = Control::new(0, 0);
        control.cancel(CancelReason::LeaseLost);
        control.cancel(CancelReason::Cancelled);
        assert_eq!(control.stopped(), Some(Stop::LeaseLost));
    }

    #[test]
    fn a_watching_task_gets_grace_and_a_lost_lease_gives_none() {
        let control = Control::new(0, 0);
        assert!(!control.watch_cancel());
        control.cancel(CancelReason::Cancelled);
        assert_eq!(control.stopped(), None);
        assert!(control.watch_cancel());
        assert!(control.remaining(Instant::now()) <= CANCEL_GRACE);
        control.expire();
        assert_eq!(control.stopped(), Some(Stop::Cancelled));
        let control = Control::new(0, 0);
        control.watch_cancel();
        control.cancel(CancelReason::LeaseLost);
        assert_eq!(control.stopped(), Some(Stop::LeaseLost));
    }

    #[tokio::test]
    async fn a_waiting_future_is_dropped_as_soon_as_it_is_cancelled() {
        let control = std::sync::Arc::new(Control::new(0, 0));
        let other = control.clone();
        let task = tokio::spawn(async move { guard(&other, std::future::pending::<()>()).await });
        tokio::task::yield_now().await;
        control.cancel(CancelReason::Cancelled);
        assert_eq!(task.await.unwrap(), Err(Stop::Cancelled));
    }
}
