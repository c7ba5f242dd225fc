//! What a cell has to tell its parent, and the thread that tells it.
//! Owns coalescing: whatever waits when the thread is free goes out in one write, at most one write
//! every [`PAUSE`]; progress reports at most every [`PROGRESS_EVERY`].

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::protocol::{FromCell, Packer};
use crate::control::Control;
use crate::outcome::Outcome;
use crate::run::{ProgressSink, host_fault};

/// Shortest time between two deliveries of progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);
/// Pause after a write. Short attempts end every few microseconds; told one by one, each would cost four context
/// switches on the way to the parent and back, several times what the attempt itself costs. An outcome that comes
/// after a quiet moment is not delayed.
const PAUSE: Duration = Duration::from_micros(100);

/// Shared by everybody in the cell that has something to say.
pub(super) struct Outbox {
    state: Mutex<State>,
    filled: Condvar,
}

struct State {
    packer: Packer,
    /// Attempts with a progress report that was not sent.
    reports: Vec<Arc<Control>>,
    waiting: bool,
}

impl Outbox {
    pub(super) fn new(max_frame_bytes: usize) -> Self {
        Self {
            state: Mutex::new(State {
                packer: Packer::new(max_frame_bytes),
                reports: Vec::new(),
                waiting: false,
            }),
            filled: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, state: &mut State) {
        if std::mem::take(&mut state.waiting) {
            self.filled.notify_one();
        }
    }

    pub(super) fn send(&self, message: &FromCell) {
        let mut state = self.state();
        // Only outcomes can be too large, and they have their own way.
        if state.packer.push(message).is_ok() {
            self.wake(&mut state);
        }
    }

    /// Sends an outcome, and before it a progress report that was not sent yet.
    pub(super) fn finished(&self, token: u64, control: Option<&Control>, outcome: Box<Outcome>) {
        let mut state = self.state();
        if let Some(progress) = control.and_then(Control::take_progress) {
            let _ = state.packer.push(&FromCell::Progress { token, progress });
        }
        let message = FromCell::Finished { token, outcome };
        if state.packer.push(&message).is_err() {
            let outcome = Box::new(host_fault("the outcome is larger than a frame"));
            let _ = state.packer.push(&FromCell::Finished { token, outcome });
        }
        self.wake(&mut state);
    }

    /// Writes until the parent is gone.
    pub(super) fn run(&self, stream: &mut UnixStream) {
        let mut spare = Vec::new();
        let mut next_reports = Instant::now();
        loop {
            let bytes = self.next(&mut next_reports, spare);
            if stream.write_all(&bytes).is_err() {
                return;
            }
            std::thread::sleep(PAUSE);
            // A buffer that once was huge is not kept.
            spare = if bytes.capacity() <= 4 << 20 { bytes } else { Vec::new() };
        }
    }

    fn next(&self, next_reports: &mut Instant, spare: Vec<u8>) -> Vec<u8> {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            if !state.reports.is_empty() && now >= *next_reports {
                *next_reports = now + PROGRESS_EVERY;
                for control in std::mem::take(&mut state.reports) {
                    if let Some(progress) = control.take_progress() {
                        let token = control.token;
                        let _ = state.packer.push(&FromCell::Progress { token, progress });
                    }
                }
            }
            if !state.packer.is_empty() {
                return state.packer.take(spare);
            }
            state.waiting = true;
            state = if state.reports.is_empty() {
                self.filled.wait(state).unwrap_or_else(PoisonError::into_inner)
            } else {
                self.filled
                    .wait_timeout(state, next_reports.saturating_duration_since(now))
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            };
        }
    }
}

impl ProgressSink for Outbox {
    fn progress(&self, control: &Arc<Control>) {
        let mut state = self.state();
        state.reports.push(control.clone());
        self.wake(&mut state);
    }
}
