//! The executor of a cell: own threads that poll guests in order of their tenants' virtual time.
//! Owns fairness inside a cell and the CPU accounting of receipts. A tenant is charged the measured
//! CPU time of its thread slices, divided by its weight; the tenant that was charged least goes
//! next; a slice ends at the epoch, and by its own clock where that is late. Between slices a thread gives way to whatever of
//! the machine waits for its core. What other cells do it does not know: the parent may say on how many threads a tenant
//! runs here for a while, by what it hears from all of them.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use super::outbox::Outbox;
use super::protocol::{LIMITS_FOR, Limit, MAX_TENANTS};
use crate::control::{CancelReason, Control};
use crate::outcome::{Outcome, Termination};
use crate::run::{Attempt, Loaded, Runtime, bare_outcome, host_fault, thread_cpu_ns};
use crate::ticker::TICK;

/// Niceness of the threads that run guests: the cell's own threads and the worker go first.
const NICE: i32 = 10;
/// CPU a tenant may be ahead of the others when it wakes up, in nanoseconds: lets a rarely active
/// tenant start at once among many busy ones.
const WAKE_CREDIT_NS: u64 = 5_000_000;
/// A tenant that is this much virtual time behind the others, in nanoseconds, is one that wakes up rarely: its slices do not
/// give way.
const BEHIND_NS: u64 = 1_000_000;
/// CPU time after which a thread gives way at the end of a slice, in nanoseconds.
const KEEPS_NS: u64 = 500_000;
/// The weight at which virtual time passes like CPU time.
const ORDINARY_WEIGHT: u64 = 100;
/// Largest weight that counts; beyond it a slice would cost nothing.
const MAX_WEIGHT: u32 = 10_000;
/// Tenants without attempts that are remembered; beyond it those that owe nothing are forgotten.
const MAX_IDLE_TENANTS: usize = 4_096;
/// Most threads of one cell.
const MAX_THREADS: usize = 256;

type Guest = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// Nobody polls it and nobody asked to.
const IDLE: u8 = 0;
/// In its tenant's queue.
const QUEUED: u8 = 1;
/// Being polled.
const RUNNING: u8 = 2;
/// Being polled, and to be polled again.
const RUNNING_WOKEN: u8 = 3;
/// Ended.
const DONE: u8 = 4;

/// A running executor. Its threads end with the process.
pub(super) struct Executor {
    shared: Arc<Shared>,
}

struct Shared {
    runtime: Runtime,
    slots: u32,
    outbox: Arc<Outbox>,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    tenants: HashMap<u64, Tenant>,
    /// Tenants with something to do, by virtual time.
    order: BTreeSet<(u64, u64)>,
    attempts: HashMap<u64, Entry>,
    /// Attempts that hold a slot.
    active: u32,
    /// Threads that wait for work.
    idle: usize,
    /// Submitted since the last flush.
    fresh: usize,
    /// Ever growing; orders attempts of one tenant.
    serial: u64,
    /// Virtual time of the last choice; never goes back.
    now: u64,
    /// Tenants with a limit, and until when it holds.
    limited: Vec<u64>,
    limited_until: Option<Instant>,
}

/// Where an attempt is, for cancellation.
enum Entry {
    Pending { tenant: u64 },
    Live { control: Arc<Control>, tenant: u64 },
}

#[derive(Default)]
struct Tenant {
    virtual_ns: u64,
    weight: u64,
    ready: VecDeque<(u64, Arc<Task>)>,
    pending: VecDeque<(u64, Job)>,
    /// Attempts pending or live.
    attempts: usize,
    /// Threads that run its attempts now.
    running: u32,
    /// On how many it may, while limits hold.
    limit: Option<u32>,
}

impl Tenant {
    fn has_work(&self) -> bool {
        !self.ready.is_empty() || !self.pending.is_empty()
    }
}

/// An attempt that has not started.
struct Job {
    token: u64,
    module: Arc<Loaded>,
    attempt: Box<Attempt>,
}

/// An attempt that has.
struct Task {
    shared: Arc<Shared>,
    control: Arc<Control>,
    tenant: u64,
    state: AtomicU8,
    cpu_ns: AtomicU64,
    guest: Mutex<Option<Guest>>,
}

/// What to do next.
struct Pick {
    what: Turn,
    /// Its tenant is behind the others by more than [`BEHIND_NS`].
    behind: bool,
}

enum Turn {
    Start(Job, Arc<Control>),
    Resume(Arc<Task>),
}

impl Executor {
    /// Starts the threads and a small Tokio runtime for the timers of waiting guests.
    pub(super) fn start(
        runtime: Runtime,
        threads: usize,
        slots: u32,
        outbox: Arc<Outbox>,
    ) -> std::io::Result<Self> {
        let timers = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(1)
            .thread_name("sandbar-timer")
            .enable_time()
            .build()?;
        let timers = Arc::new(timers);
        let shared = Arc::new(Shared {
            runtime,
            slots: slots.max(1),
            outbox,
            state: Mutex::default(),
            work: Condvar::new(),
        });
        let threads = threads.clamp(1, MAX_THREADS);
        // What a thread does at its start, it may not do any more behind the walls: they go up after that.
        let started = Arc::new(Barrier::new(threads + 1));
        for index in 0..threads {
            let (shared, timers, started) = (shared.clone(), timers.clone(), started.clone());
            std::thread::Builder::new().name(format!("sandbar-guest-{index}")).spawn(move || {
                // On Linux this is the niceness of the thread alone.
                let _ = rustix::process::nice(NICE);
                let _timers = timers.enter();
                started.wait();
                work(&shared);
            })?;
        }
        started.wait();
        Ok(Self { shared })
    }

    /// Queues an attempt. Call [`Self::flush`] after the last one of a batch.
    pub(super) fn submit(&self, token: u64, module: Arc<Loaded>, attempt: Box<Attempt>) {
        let mut state = self.shared.state();
        if state.attempts.contains_key(&token) {
            drop(state);
            self.shared.outbox.refused(token, host_fault("the token is in use"));
            return;
        }
        state.serial += 1;
        let serial = state.serial;
        let (id, weight) = (attempt.tenant, u64::from(attempt.weight.clamp(1, MAX_WEIGHT)));
        state.attempts.insert(token, Entry::Pending { tenant: id });
        state.awake(id, Some(weight));
        if let Some(tenant) = state.tenants.get_mut(&id) {
            tenant.attempts += 1;
            tenant.pending.push_back((serial, Job { token, module, attempt }));
        }
        state.enqueue(id);
        state.fresh += 1;
    }

    /// Wakes as many threads as there is new work for.
    pub(super) fn flush(&self) {
        let wake = {
            let mut state = self.shared.state();
            std::mem::take(&mut state.fresh).min(state.idle)
        };
        for _ in 0..wake {
            self.shared.work.notify_one();
        }
    }

    /// Says on how many threads at once tenants may run for the next [`LIMITS_FOR`]; who is not named, on all.
    pub(super) fn limit(&self, limits: &[Limit]) {
        let mut state = self.shared.state();
        for id in std::mem::take(&mut state.limited) {
            if let Some(tenant) = state.tenants.get_mut(&id) {
                tenant.limit = None;
            }
        }
        for limit in limits.iter().take(MAX_TENANTS) {
            if let Some(tenant) = state.tenants.get_mut(&limit.tenant) {
                tenant.limit = Some(limit.threads);
                state.limited.push(limit.tenant);
            }
        }
        state.limited_until = (!state.limited.is_empty()).then(|| Instant::now() + LIMITS_FOR);
        if state.idle > 0 {
            drop(state);
            self.shared.work.notify_all();
        }
    }

    /// Ends an attempt, started or not. Unknown tokens have ended already.
    pub(super) fn cancel(&self, token: u64, why: CancelReason) {
        let mut state = self.shared.state();
        match state.attempts.get(&token) {
            None => {}
            Some(Entry::Live { control, tenant }) => {
                let (control, id) = (control.clone(), *tenant);
                // Its end is not to wait for what other cells do.
                if let Some(tenant) = state.tenants.get_mut(&id) {
                    tenant.limit = None;
                }
                drop(state);
                self.shared.runtime.cancel(&control, why);
            }
            Some(Entry::Pending { tenant }) => {
                let id = *tenant;
                state.attempts.remove(&token);
                if let Some(tenant) = state.tenants.get_mut(&id) {
                    tenant.attempts -= 1;
                    tenant.pending.retain(|(_, job)| job.token != token);
                    if !tenant.has_work() {
                        let key = (tenant.virtual_ns, id);
                        state.order.remove(&key);
                    }
                }
                drop(state);
                let outcome = bare_outcome(match why {
                    CancelReason::Cancelled => Termination::Cancelled,
                    CancelReason::LeaseLost => Termination::LeaseLost,
                });
                self.shared.outbox.refused(token, outcome);
            }
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a task back into its tenant's queue.
    fn requeue(&self, task: Arc<Task>, woken: bool) {
        let mut state = self.state();
        let id = task.tenant;
        if woken {
            state.awake(id, None);
        }
        state.serial += 1;
        let serial = state.serial;
        if let Some(tenant) = state.tenants.get_mut(&id) {
            tenant.ready.push_back((serial, task));
        }
        state.enqueue(id);
        if state.idle > 0 {
            drop(state);
            self.work.notify_one();
        }
    }
}

impl State {
    /// A tenant comes into play: it begins at the present, or at most the credit behind it.
    fn awake(&mut self, id: u64, weight: Option<u64>) {
        let now = self.now;
        if self.tenants.len() > MAX_IDLE_TENANTS && !self.tenants.contains_key(&id) {
            self.tenants.retain(|_, tenant| tenant.attempts > 0 || tenant.virtual_ns > now);
        }
        let tenant = self.tenants.entry(id).or_insert_with(|| Tenant {
            virtual_ns: now,
            weight: ORDINARY_WEIGHT,
            ..Tenant::default()
        });
        if let Some(weight) = weight {
            tenant.weight = weight;
        }
        if !tenant.has_work() {
            let credit = WAKE_CREDIT_NS * ORDINARY_WEIGHT / tenant.weight;
            tenant.virtual_ns = tenant.virtual_ns.max(now.saturating_sub(credit));
        }
    }

    fn enqueue(&mut self, id: u64) {
        if let Some(tenant) = self.tenants.get(&id) {
            self.order.insert((tenant.virtual_ns, id));
        }
    }

    /// The next piece of work: of the tenant with the least virtual time that can go on, the one
    /// that waits longest.
    fn pick(&mut self, slots: u32) -> Option<Pick> {
        let free = self.active < slots;
        let limited = self.limits_hold().is_some();
        let id = self.order.iter().map(|(_, id)| *id).find(|id| {
            self.tenants.get(id).is_some_and(|tenant| {
                (!tenant.ready.is_empty() || free)
                    && !(limited && tenant.limit.is_some_and(|limit| tenant.running >= limit))
            })
        })?;
        let tenant = self.tenants.get_mut(&id)?;
        let behind = tenant.virtual_ns.saturating_add(BEHIND_NS) <= self.now;
        tenant.running += 1;
        self.now = self.now.max(tenant.virtual_ns);
        let ready = tenant.ready.front().map(|(serial, _)| *serial);
        let pending = tenant.pending.front().filter(|_| free).map(|(serial, _)| *serial);
        let start = match (ready, pending) {
            (Some(ready), Some(pending)) => pending < ready,
            (None, Some(_)) => true,
            _ => false,
        };
        let what = if start {
            tenant.pending.pop_front().map(|(_, job)| {
                // Under the same lock that takes it from the queue: a cancellation finds it in one
                // place or in the other.
                let control = Arc::new(Control::new(job.token, id));
                self.attempts.insert(job.token, Entry::Live { control: control.clone(), tenant: id });
                Turn::Start(job, control)
            })
        } else {
            tenant.ready.pop_front().map(|(_, task)| Turn::Resume(task))
        };
        if !tenant.has_work() {
            let key = (tenant.virtual_ns, id);
            self.order.remove(&key);
        }
        if start {
            self.active += 1;
        }
        what.map(|what| Pick { what, behind })
    }

    /// Until when the limits hold, if they do.
    fn limits_hold(&mut self) -> Option<Instant> {
        let until = self.limited_until?;
        if Instant::now() < until {
            return Some(until);
        }
        self.limited_until = None;
        None
    }

    /// A slice is over; `again`: its attempt can go on at once. Returns how many of the tenant's can.
    fn charge(&mut self, id: u64, cpu_ns: u64, again: bool) -> u32 {
        let Some(tenant) = self.tenants.get_mut(&id) else {
            return 0;
        };
        tenant.running = tenant.running.saturating_sub(1);
        let runnable = u32::try_from(tenant.ready.len() + tenant.pending.len()).unwrap_or(u32::MAX);
        let runnable = runnable.saturating_add(tenant.running).saturating_add(again.into());
        self.charge_more(id, cpu_ns);
        runnable
    }

    /// Something was done for a tenant.
    fn charge_more(&mut self, id: u64, cpu_ns: u64) {
        let Some(tenant) = self.tenants.get_mut(&id) else {
            return;
        };
        let old = (tenant.virtual_ns, id);
        tenant.virtual_ns += cpu_ns.saturating_mul(ORDINARY_WEIGHT) / tenant.weight;
        if self.order.remove(&old) {
            let new = (tenant.virtual_ns, id);
            self.order.insert(new);
        }
    }
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        let mut state = self.state.load(Ordering::Acquire);
        loop {
            let next = match state {
                IDLE => QUEUED,
                RUNNING => RUNNING_WOKEN,
                _ => return,
            };
            match self.state.compare_exchange(state, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(IDLE) => {
                    let shared = self.shared.clone();
                    shared.requeue(self, true);
                    return;
                }
                Ok(_) => return,
                Err(found) => state = found,
            }
        }
    }
}

/// One thread that runs guests.
fn work(shared: &Arc<Shared>) {
    let mut clock = thread_cpu_ns();
    // CPU time since the thread last gave way.
    let mut kept_ns = 0;
    loop {
        let Pick { what, behind } = {
            let mut state = shared.state();
            loop {
                if let Some(pick) = state.pick(shared.slots) {
                    break pick;
                }
                let until = state.limits_hold();
                state.idle += 1;
                state = match until {
                    None => shared.work.wait(state).unwrap_or_else(PoisonError::into_inner),
                    Some(until) => {
                        let rest = until.saturating_duration_since(Instant::now());
                        shared.work.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0
                    }
                };
                state.idle -= 1;
            }
        };
        let task = match what {
            Turn::Resume(task) => task,
            Turn::Start(job, control) => start(shared, job, control),
        };
        let ended = slice(&task);
        // Everything since the last reading was done for this attempt: choosing it, building its
        // instance, running it, taking it down.
        let before = clock;
        clock = thread_cpu_ns();
        let used = clock.saturating_sub(before);
        let cpu_ns = task.cpu_ns.fetch_add(used, Ordering::Relaxed) + used;
        // Linux lets a thread that runs have its core until the next tick, 4 ms on many machines, whatever wakes meanwhile
        // and however much nicer this one is: those that bring work and carry ends, the clock of the epochs, the
        // worker, a database beside it. Not after a slice of a tenant that is behind: it would wait for those that take
        // up the core on behalf of its neighbours.
        kept_ns += used;
        let mut give_way = !behind && kept_ns >= KEEPS_NS;
        match ended {
            Some(mut outcome) => {
                outcome.receipt.cpu_ns = cpu_ns;
                finish(shared, &task, used);
                let token = task.control.token;
                let told = shared.outbox.finished(token, task.tenant, &task.control, outcome);
                if told.large {
                    // Not for whoever comes next to pay.
                    let before = clock;
                    clock = thread_cpu_ns();
                    shared.state().charge_more(task.tenant, clock.saturating_sub(before));
                }
                // The end is not to wait for the slice of whoever is next.
                give_way |= told.woke;
            }
            None => {
                let again = task.state.load(Ordering::Acquire) == RUNNING_WOKEN;
                let runnable = shared.state().charge(task.tenant, used, again);
                shared.outbox.used(task.tenant, used, runnable);
                settle(&task);
            }
        }
        if give_way {
            kept_ns = 0;
            std::thread::yield_now();
        }
    }
}

fn start(shared: &Arc<Shared>, job: Job, control: Arc<Control>) -> Arc<Task> {
    let tenant = job.attempt.tenant;
    let guest =
        shared.runtime.bare_attempt(job.module, *job.attempt, control.clone(), Some(shared.outbox.clone()));
    Arc::new(Task {
        shared: shared.clone(),
        control,
        tenant,
        state: AtomicU8::new(QUEUED),
        cpu_ns: AtomicU64::new(0),
        guest: Mutex::new(Some(Box::pin(guest))),
    })
}

/// Polls until the attempt ends, waits, or its slice is over. A fuel yield within the slice costs
/// one more poll, not a turn in the queue.
fn slice(task: &Arc<Task>) -> Option<Outcome> {
    let runtime = &task.shared.runtime;
    let epoch = runtime.epoch();
    let waker = Waker::from(task.clone());
    let mut cx = Context::from_waker(&waker);
    let mut slot = task.guest.lock().unwrap_or_else(PoisonError::into_inner);
    let began = Instant::now();
    loop {
        task.state.store(RUNNING, Ordering::Release);
        let guest = slot.as_mut()?;
        match catch_unwind(AssertUnwindSafe(|| guest.as_mut().poll(&mut cx))) {
            Ok(Poll::Pending) => {
                let again = task.state.load(Ordering::Acquire) == RUNNING_WOKEN;
                // The clock of the epochs may itself have to wait for a core.
                if !(again && runtime.epoch() == epoch && began.elapsed() < TICK) {
                    return None;
                }
            }
            Ok(Poll::Ready(outcome)) => {
                task.state.store(DONE, Ordering::Release);
                drop_guest(&mut slot);
                return Some(outcome);
            }
            Err(panic) => {
                task.state.store(DONE, Ordering::Release);
                drop_guest(&mut slot);
                let words = panic
                    .downcast_ref::<&str>()
                    .copied()
                    .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
                    .unwrap_or("no message");
                tracing::error!(panic = words, "a host call panicked; the attempt is lost");
                return Some(host_fault(&format!("the host panicked: {words}")));
            }
        }
    }
}

/// Dropping the store of a broken attempt may panic again; the cell must not.
fn drop_guest(slot: &mut Option<Guest>) {
    let guest = slot.take();
    let _ = catch_unwind(AssertUnwindSafe(move || drop(guest)));
}

/// After an unfinished slice: back into the queue if somebody woke it meanwhile.
fn settle(task: &Arc<Task>) {
    let idle = task.state.compare_exchange(RUNNING, IDLE, Ordering::AcqRel, Ordering::Acquire);
    if idle.is_err() {
        task.state.store(QUEUED, Ordering::Release);
        task.shared.requeue(task.clone(), false);
    }
}

fn finish(shared: &Shared, task: &Task, used: u64) {
    // The waker in there holds the task, which holds the reins: after a panic nobody else breaks
    // that ring.
    task.control.release();
    let mut state = shared.state();
    let runnable = state.charge(task.tenant, used, false);
    state.attempts.remove(&task.control.token);
    state.active -= 1;
    if let Some(tenant) = state.tenants.get_mut(&task.tenant) {
        tenant.attempts -= 1;
    }
    // A slot is free: somebody who waits may start.
    let wake = state.idle > 0 && !state.order.is_empty();
    drop(state);
    if wake {
        shared.work.notify_one();
    }
    shared.outbox.used(task.tenant, used, runnable);
}
