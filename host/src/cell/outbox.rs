//! What a cell has to tell its parent, and the thread that tells it.
//! Owns coalescing: whatever waits when the thread is free goes out in one write, at most one write
//! every [`PAUSE`]; what running attempts say at most every [`REPORTS_EVERY`].

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::protocol::{FromCell, Packer};
use crate::capability::call::Ask;
use crate::capability::guest::Asks;
use crate::control::Control;
use crate::egress::call::FromGuest;
use crate::egress::guest::Calls;
use crate::outcome::Outcome;
use crate::run::{LiveSink, host_fault};

/// Bytes of log that one delivery takes of one attempt, and of all; what is more comes in the next.
const LOG_BYTES: (usize, usize) = (64 << 10, 1 << 20);
/// Shortest time between two deliveries of progress and logs.
const REPORTS_EVERY: Duration = Duration::from_millis(50);
/// Pause after a write. Short attempts end every few microseconds; told one by one, each would cost four context
/// switches on the way to the parent and back, several times what the attempt itself costs. An outcome that comes
/// after a quiet moment is not delayed.
const PAUSE: Duration = Duration::from_micros(100);

/// Shared by everybody in the cell that has something to say.
pub(super) struct Outbox {
    /// HTTP calls of guests.
    pub(super) calls: Calls,
    /// Questions of guests.
    pub(super) asks: Asks,
    state: Mutex<State>,
    filled: Condvar,
}

struct State {
    packer: Packer,
    /// Attempts with a report or log records that were not sent. One may be here twice.
    reports: Vec<Arc<Control>>,
    waiting: bool,
}

impl Outbox {
    pub(super) fn new(max_frame_bytes: usize) -> Self {
        Self {
            calls: Calls::default(),
            asks: Asks::default(),
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
                *next_reports = now + REPORTS_EVERY;
                let mut room = LOG_BYTES.1;
                for control in std::mem::take(&mut state.reports) {
                    let token = control.token;
                    if let Some(progress) = control.take_progress() {
                        let _ = state.packer.push(&FromCell::Progress { token, progress });
                    }
                    // Beyond the room of this delivery the ticker brings it again. Of an attempt that has ended there
                    // is nothing left to take, so nothing can follow its outcome.
                    if let Some((first, records)) = control.take_log(LOG_BYTES.0.min(room)) {
                        let before = state.packer.len();
                        let _ = state.packer.push(&FromCell::Log { token, first, records });
                        room = room.saturating_sub(state.packer.len().saturating_sub(before));
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

impl Outbox {
    fn report(&self, control: &Arc<Control>) {
        let mut state = self.state();
        state.reports.push(control.clone());
        self.wake(&mut state);
    }
}

impl LiveSink for Outbox {
    fn progress(&self, control: &Arc<Control>) {
        self.report(control);
    }

    fn log(&self, control: &Arc<Control>) {
        self.report(control);
    }

    fn calls(&self) -> Option<&Calls> {
        Some(&self.calls)
    }

    fn http(&self, token: u64, call: u64, message: FromGuest) {
        self.send(&FromCell::Http { token, call, message });
    }

    fn asks(&self) -> Option<&Asks> {
        Some(&self.asks)
    }

    fn ask(&self, token: u64, call: u64, ask: Ask) {
        self.send(&FromCell::Ask { token, call, ask });
    }
}
