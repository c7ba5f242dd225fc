//! What a cell has to tell its parent, and the thread that tells it.
//! Owns coalescing: whatever waits when the thread is free goes out in one write, at most one write
//! every [`PAUSE`], and fewer while much is said ([`pause`]); what running attempts say at most every [`REPORTS_EVERY`], what
//! tenants use every [`USES_EVERY`].

use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::protocol::{FromCell, MAX_TENANTS, Packer, ProtocolError, Used, is_large};
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
/// Shortest time between two reports of what tenants use.
const USES_EVERY: Duration = Duration::from_millis(10);
/// Pause after a write. Short attempts end every few microseconds; told one by one, each would cost four context
/// switches on the way to the parent and back, several times what the attempt itself costs. An outcome that comes
/// after a quiet moment is not delayed.
const PAUSE: Duration = Duration::from_micros(100);
/// Longest pause: what waits for it has waited longer in the queue of the cell.
const LONGEST_PAUSE: Duration = Duration::from_millis(1);
/// Messages that one write should carry while many are said.
const MESSAGES: f64 = 16.0;
/// With fewer messages in a second, the pause is the shortest.
const MANY_PER_S: f64 = 5_000.0;

/// The pause after a write, by how many messages there were in each second lately.
fn pause(per_s: f64) -> Duration {
    if per_s < MANY_PER_S {
        return PAUSE;
    }
    Duration::from_secs_f64(MESSAGES / per_s).clamp(PAUSE, LONGEST_PAUSE)
}

/// Messages in a second, of late: each span counts by how long it was, against [`Rate::OVER`].
struct Rate {
    per_s: f64,
    since: Instant,
}

impl Rate {
    /// What is longer ago than this counts for little.
    const OVER: f64 = 0.01;

    fn note(&mut self, messages: usize, now: Instant) -> f64 {
        let span = now.saturating_duration_since(self.since).as_secs_f64().max(1e-6);
        self.since = now;
        let keep = (-span / Self::OVER).exp();
        self.per_s = self.per_s * keep + messages as f64 / span * (1.0 - keep);
        self.per_s
    }
}

/// What is large on its way, complete frames each: outcomes ([`is_large`]), and what attempts log while they run. It goes
/// out by a socket and a thread of its own, and tenants take turns with theirs. So what a flood of logs has to wait for is
/// the flood. Bounded by what the attempts in the slots may log and leave: for the parent, a slot is free when it has the
/// outcome.
#[derive(Default)]
struct Large {
    by_tenant: HashMap<u64, VecDeque<Vec<u8>>>,
    /// Whose is next; each tenant of the other once.
    turns: VecDeque<u64>,
}

impl Large {
    fn push(&mut self, tenant: u64, frame: Vec<u8>) {
        let queue = self.by_tenant.entry(tenant).or_default();
        if queue.is_empty() {
            self.turns.push_back(tenant);
        }
        queue.push_back(frame);
    }

    fn next(&mut self) -> Option<Vec<u8>> {
        let tenant = self.turns.pop_front()?;
        let queue = self.by_tenant.get_mut(&tenant)?;
        let frame = queue.pop_front();
        if queue.is_empty() {
            self.by_tenant.remove(&tenant);
        } else {
            self.turns.push_back(tenant);
        }
        frame
    }
}

/// What became of an outcome.
pub(super) struct Told {
    /// It was large: putting it on its way was work that counts.
    pub(super) large: bool,
    /// It woke the thread that writes.
    pub(super) woke: bool,
}

/// Shared by everybody in the cell that has something to say.
pub(super) struct Outbox {
    /// HTTP calls of guests.
    pub(super) calls: Calls,
    /// Questions of guests.
    pub(super) asks: Asks,
    state: Mutex<State>,
    filled: Condvar,
    /// Never locked together with `state`.
    large: Mutex<Large>,
    large_filled: Condvar,
    max_frame_bytes: usize,
    /// Whether the parent wants to know who uses how much.
    report_use: bool,
    /// CPU time that was not reported yet, and attempts that could go on. Never locked for longer than an addition.
    uses: Mutex<HashMap<u64, (u64, u32)>>,
}

/// When what is bounded in frequency may be sent next.
struct Next {
    reports: Instant,
    uses: Instant,
}

struct State {
    packer: Packer,
    /// Attempts with a report or log records that were not sent. One may be here twice.
    reports: Vec<Arc<Control>>,
    /// Somebody used something that was not reported.
    used: bool,
    waiting: bool,
}

impl Outbox {
    pub(super) fn new(max_frame_bytes: usize, report_use: bool) -> Self {
        Self {
            calls: Calls::default(),
            asks: Asks::default(),
            state: Mutex::new(State {
                packer: Packer::new(max_frame_bytes),
                reports: Vec::new(),
                used: false,
                waiting: false,
            }),
            filled: Condvar::new(),
            large: Mutex::default(),
            large_filled: Condvar::new(),
            max_frame_bytes,
            report_use,
            uses: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was waiting.
    fn wake(&self, state: &mut State) -> bool {
        let waiting = std::mem::take(&mut state.waiting);
        if waiting {
            self.filled.notify_one();
        }
        waiting
    }

    pub(super) fn send(&self, message: &FromCell) {
        let mut state = self.state();
        // Only outcomes can be too large, and they have their own way.
        if state.packer.push(message).is_ok() {
            self.wake(&mut state);
        }
    }

    /// Sends an outcome of an attempt that never ran.
    pub(super) fn refused(&self, token: u64, outcome: Outcome) {
        self.send(&FromCell::Finished { token, outcome: Box::new(outcome) });
    }

    /// Sends an outcome, and before it a progress report that was not sent yet.
    pub(super) fn finished(&self, token: u64, tenant: u64, control: &Control, outcome: Outcome) -> Told {
        if let Some(progress) = control.take_progress() {
            self.send(&FromCell::Progress { token, progress });
        }
        let large = is_large(&outcome);
        let message = FromCell::Finished { token, outcome: Box::new(outcome) };
        let mut woke = false;
        let sent = if large {
            self.send_large(tenant, &message)
        } else {
            let mut state = self.state();
            let sent = state.packer.push(&message);
            woke = self.wake(&mut state);
            sent
        };
        if sent.is_err() {
            self.refused(token, host_fault("the outcome is larger than a frame"));
        }
        Told { large, woke }
    }

    fn send_large(&self, tenant: u64, message: &FromCell) -> Result<(), ProtocolError> {
        // Nobody waits for the lock meanwhile.
        let mut packer = Packer::new(self.max_frame_bytes);
        packer.push(message)?;
        self.large().push(tenant, packer.take(Vec::new()));
        self.large_filled.notify_one();
        Ok(())
    }

    fn large(&self) -> MutexGuard<'_, Large> {
        self.large.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes large outcomes until the parent is gone.
    pub(super) fn run_large(&self, stream: &mut impl Write) {
        loop {
            let frame = {
                let mut large = self.large();
                loop {
                    if let Some(frame) = large.next() {
                        break frame;
                    }
                    large = self.large_filled.wait(large).unwrap_or_else(PoisonError::into_inner);
                }
            };
            if stream.write_all(&frame).is_err() {
                return;
            }
        }
    }

    /// A tenant used so much CPU time, and so many of its attempts can go on.
    pub(super) fn used(&self, tenant: u64, cpu_ns: u64, runnable: u32) {
        if !self.report_use {
            return;
        }
        let first = {
            let mut uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
            let first = uses.is_empty();
            let (sum, can) = uses.entry(tenant).or_default();
            *sum = sum.saturating_add(cpu_ns);
            *can = runnable;
            first
        };
        if first {
            let mut state = self.state();
            state.used = true;
            self.wake(&mut state);
        }
    }

    fn take_uses(&self) -> Vec<Used> {
        let uses = std::mem::take(&mut *self.uses.lock().unwrap_or_else(PoisonError::into_inner));
        let used = |(tenant, (cpu_ns, runnable))| Used { tenant, cpu_ns, runnable };
        // A cell has far fewer tenants at once; of more, the rest is heard of when they use something again.
        uses.into_iter().map(used).take(MAX_TENANTS).collect()
    }

    /// Writes until the parent is gone.
    pub(super) fn run(&self, stream: &mut UnixStream) {
        let mut spare = Vec::new();
        let now = Instant::now();
        let mut next = Next { reports: now, uses: now };
        let mut rate = Rate { per_s: 0.0, since: now };
        loop {
            let (messages, bytes) = self.next(&mut next, spare);
            if stream.write_all(&bytes).is_err() {
                return;
            }
            std::thread::sleep(pause(rate.note(messages, Instant::now())));
            // A buffer that once was huge is not kept.
            spare = if bytes.capacity() <= 4 << 20 { bytes } else { Vec::new() };
        }
    }

    /// How many messages there are to send, and they.
    fn next(&self, next: &mut Next, spare: Vec<u8>) -> (usize, Vec<u8>) {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            if state.used && now >= next.uses {
                next.uses = now + USES_EVERY;
                state.used = false;
                let _ = state.packer.push(&FromCell::Used(self.take_uses()));
            }
            if !state.reports.is_empty() && now >= next.reports {
                next.reports = now + REPORTS_EVERY;
                let mut room = LOG_BYTES.1;
                let reports = std::mem::take(&mut state.reports);
                for control in &reports {
                    if let Some(progress) = control.take_progress() {
                        let _ = state.packer.push(&FromCell::Progress { token: control.token, progress });
                    }
                }
                // Those that have ended meanwhile do not wait for the lock.
                drop(state);
                for control in &reports {
                    // Beyond the room of this delivery the ticker brings it again. Of an attempt that has ended there
                    // is nothing left to take; of one that ends at this moment it may follow the outcome, which has
                    // it too, and is ignored.
                    if let Some((first, log)) = control.take_log(LOG_BYTES.0.min(room)) {
                        room = room.saturating_sub(log.as_bytes().len());
                        let _ = self
                            .send_large(control.tenant, &FromCell::Log { token: control.token, first, log });
                    }
                }
                state = self.state();
            }
            if !state.packer.is_empty() {
                let messages = state.packer.messages();
                return (messages, state.packer.take(spare));
            }
            state.waiting = true;
            let reports = (!state.reports.is_empty()).then_some(next.reports);
            let uses = state.used.then_some(next.uses);
            state = match reports.into_iter().chain(uses).min() {
                None => self.filled.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(at) => {
                    self.filled
                        .wait_timeout(state, at.saturating_duration_since(now))
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
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
