//! The worker's one loop: claim what free slots can start, hand it to cells, take the ends. All its state is here and
//! single-threaded; whatever waits (database, compiler, loading) happens in tasks that report back. `start`: from the
//! claim to the cell; `said`: what cells report.

mod said;
mod start;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use sandbar_host::cell::{CancelReason, Cell, LoadError};
use sandbar_host::outcome::{Outcome, Termination};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::app::sealed::keys::Keys;
use crate::app::signals::Signals;
use crate::domain::announced::Announced;
use crate::domain::fairness::Charge;
use crate::domain::ids::{InvocationId, TaskId};
use crate::domain::lease::free_slots;
use crate::domain::retry::{Verdict as Become, decide};
use crate::domain::worker::Wanted;
use crate::store::queue::{Claimed, Finished, Withheld};
use crate::store::{Error, WorkerStore};
use crate::worker::ack;
use crate::worker::admission::Admission;
use crate::worker::attempt::{attempt_name, ending, host_fault, without_run};
use crate::worker::capability::Capabilities;
use crate::worker::cells::{Cells, Event, Place};
use crate::worker::claim::{self, Known, Turn};
use crate::worker::egress::{Allowance, Egress, Whose};
use crate::worker::http::{self, Http};
use crate::worker::journal::Journal;
use crate::worker::lease::Lease;
use crate::worker::live::{self, Live};
use crate::worker::modules::Modules;
use crate::worker::pace::Pace;
use crate::worker::{Settings, Stop};

/// What an attempt of a module in quarantine is denied.
const QUARANTINED: &str = "run: the module is in quarantine";
/// How an attempt ends that was handed back for want of memory, and how long its invocation then waits.
const HANDED_BACK: &str =
    "handed back: this worker had lent more memory than it has, and an older attempt needed it";
const HANDED_BACK_MS: u64 = 100;
/// How long an invocation waits for a worker that has the key to its input.
const WITHOUT_KEY_MS: u64 = 10_000;
/// Cells that may die under an attempt before it has begun to run; then another host shall try.
const MAX_PLACES: u8 = 3;
/// Tasks that are remembered as run before; beyond, memory starts anew.
const MAX_WARM: usize = 10_000;
/// How long an invocation stays away that has waited for a cell in vain.
const WITHOUT_CELL_MS: u64 = 1_000;

/// Why the loop ended.
pub enum Ended {
    /// Told to.
    Stopped,
    /// This identity is no longer valid; every guest has been stopped.
    LeaseLost,
}

/// An attempt between claim and end.
struct InFlight {
    claimed: Claimed,
    /// What its tenant was charged for it, until its receipt says what it cost.
    charge: Option<Charge>,
    /// `None` while its module is being made ready.
    place: Option<Place>,
    started_at: DateTime<Utc>,
    cancelled: bool,
    /// Cells that died before it began to run.
    displaced: u8,
    /// No cell was there for it.
    placeless: bool,
    live: Live,
    /// Its start is in the journal.
    announced: bool,
    /// For want of memory.
    handed_back: bool,
}

/// A report of a task that waited on the loop's behalf.
enum Report {
    Claimed(Box<ClaimReport>),
    Loaded { token: u64, place: Place, cell: Arc<Cell>, result: anyhow::Result<()> },
}

struct ClaimReport {
    known: Known,
    turn: Result<Turn, Error>,
    /// What claims without an answer turned out to have taken.
    stranded: Vec<Claimed>,
}

/// Run under one lease until told to stop or the lease is lost.
///
/// # Errors
/// Cells cannot be started.
pub async fn run(
    settings: &Settings,
    (store, keys, allowance): (&WorkerStore, &Arc<Keys>, &Arc<Allowance>),
    signals: &Arc<Signals>,
    modules: &Arc<Modules>,
    lease: &Lease,
    journal: &Journal,
    stop: &Stop,
) -> anyhow::Result<Ended> {
    let admission = Admission::new(settings, store)?;
    let (cells, mut events) = Cells::start(settings).await?;
    if let Err(error) = store.worker_walls(lease.worker(), lease.epoch(), cells.walls()).await {
        warn!(%error, "could not say which walls stand; only this log does");
    }
    let (ends, acks) = mpsc::unbounded_channel();
    let (live, said) = live::channel();
    let unacked = AtomicU64::new(0);
    let room = Notify::new();
    let counts = ack::Counts { accepted: AtomicU64::new(0), late: AtomicU64::new(0), journal };
    let (reports, mut reported) = mpsc::unbounded_channel();
    let (http, mut answered) = Http::new();
    let mut dispatch = Dispatch {
        settings,
        store,
        modules,
        keys,
        lease,
        journal,
        cells,
        egress: Egress::new(
            settings.egress.clone(),
            store.clone(),
            settings.vault.clone(),
            Arc::clone(allowance),
        )?,
        capabilities: Capabilities::new(
            settings.capabilities.clone(),
            Arc::clone(&settings.defaults),
            store.clone(),
            settings.vault.clone(),
            Arc::clone(keys),
        ),
        http,
        admission,
        ends: Some(ends),
        live,
        unacked: &unacked,
        room: &room,
        reports,
        in_flight: HashMap::new(),
        tokens: HashMap::new(),
        warm: BTreeSet::new(),
        next_token: 0,
        known: Some(Known::default()),
        settled: Vec::new(),
        claiming: None,
        pace: Pace::new(Instant::now()),
    };
    let acking = async {
        tokio::select! {
            () = ack::run((store, keys), signals, lease, acks, &unacked, &room, &counts) => {}
            // It goes with the acks: what attempts say comes once more with their outcomes.
            never = live::run(store, keys, lease, said) => match never {},
        }
    };
    let ended = {
        let looping = dispatch.run(signals, (&mut events, &mut reported, &mut answered), stop);
        tokio::pin!(acking, looping);
        tokio::select! {
            ended = &mut looping => {
                // The loop has dropped its sender; what it sent goes through, unless there is no point any more.
                match ended {
                    Ended::LeaseLost => {}
                    Ended::Stopped => tokio::select! {
                        () = &mut acking => {}
                        () = stop.now.cancelled() => {}
                        () = lease.lost() => {}
                    },
                }
                ended
            }
            () = &mut acking => Ended::LeaseLost, // it ends before the loop only then
        }
    };
    dispatch.cells.kill();
    info!(
        accepted = counts.accepted.load(Ordering::Relaxed),
        late = counts.late.load(Ordering::Relaxed),
        "dispatch ended"
    );
    Ok(ended)
}

struct Dispatch<'a> {
    settings: &'a Settings,
    store: &'a WorkerStore,
    modules: &'a Arc<Modules>,
    keys: &'a Arc<Keys>,
    lease: &'a Lease,
    journal: &'a Journal,
    cells: Cells,
    egress: Egress,
    capabilities: Capabilities,
    /// Attempts that no cell takes part in.
    http: Http,
    admission: Admission,
    /// Unbounded, yet never longer than the bound in [`Dispatch::free_slots`].
    ends: Option<ack::Sender>,
    live: live::Sender,
    unacked: &'a AtomicU64,
    /// Told after every ack: a full backlog has got shorter.
    room: &'a Notify,
    reports: mpsc::UnboundedSender<Report>,
    in_flight: HashMap<u64, InFlight>,
    tokens: HashMap<InvocationId, u64>,
    /// Tasks of which something was claimed: their modules are most likely in the cells.
    warm: BTreeSet<TaskId>,
    next_token: u64,
    /// Away while a claim is under way.
    known: Option<Known>,
    /// Receipts that came while it was away.
    settled: Vec<(Charge, Duration)>,
    claiming: Option<JoinHandle<()>>,
    pace: Pace,
}

impl Dispatch<'_> {
    async fn run(
        &mut self,
        signals: &Signals,
        (events, reported, answered): (
            &mut mpsc::Receiver<Event>,
            &mut mpsc::UnboundedReceiver<Report>,
            &mut mpsc::UnboundedReceiver<http::Ended>,
        ),
        stop: &Stop,
    ) -> Ended {
        let mut cancels = signals.subscribe_cancelled();
        let mut heartbeat_cancels = self.lease.cancels.lock().await;
        let mut wanted = self.lease.wanted.clone();
        self.lease.gauge.cells(self.cells.pids());
        let mut poll = tokio::time::interval(self.settings.poll);
        poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut give_back_at: Option<Instant> = None;
        let mut drain_said = false;
        loop {
            self.admission.refresh();
            self.relieve();
            self.start_waiting();
            self.place_waiting();
            let draining = stop.drain.is_cancelled();
            let wish = *wanted.borrow_and_update();
            self.lease.gauge.running(self.in_flight.len());
            self.lease.gauge.room(self.admission.room());
            if wish == Wanted::Draining
                && self.settings.leave_when_drained
                && self.in_flight.is_empty()
                && self.claiming.is_none()
            {
                info!("drained by an operator: leaving");
                self.ends = None;
                return Ended::Stopped;
            }
            if draining {
                // A claim that was under way still brings what it took.
                if !drain_said && self.claiming.is_none() {
                    info!(running = self.in_flight.len(), "draining: no new claims");
                    drain_said = true;
                }
                if self.in_flight.is_empty() && self.claiming.is_none() {
                    self.ends = None;
                    return Ended::Stopped;
                }
                if give_back_at.is_none() {
                    give_back_at = Some(Instant::now() + self.settings.drain_grace);
                }
            } else if wish == Wanted::Active {
                self.claim();
            }
            let wake_at = self.pace.wake_at(Instant::now()).into_iter().chain(self.cells.wake_at()).min();
            tokio::select! {
                biased;
                () = self.lease.lost() => {
                    self.abandon();
                    return Ended::LeaseLost;
                }
                () = stop.now.cancelled() => {
                    self.abandon();
                    return Ended::Stopped;
                }
                Some(event) = events.recv() => {
                    self.event(event);
                    // Cells report in bursts; claiming once per burst gives larger batches.
                    while let Ok(event) = events.try_recv() {
                        self.event(event);
                    }
                }
                Some(report) = reported.recv() => self.report(report),
                Some(ended) = answered.recv() => self.end(ended.token, *ended.outcome),
                cancel = cancels.recv() => {
                    // A lagging receiver has missed some; the next heartbeat brings them.
                    if let Ok(id) = cancel {
                        self.cancel(id, CancelReason::Cancelled);
                    }
                }
                Some(ids) = heartbeat_cancels.recv() => {
                    for id in ids {
                        self.cancel(id, CancelReason::Cancelled);
                    }
                }
                announced = signals.ready.heard() => self.hear(&announced),
                () = self.room.notified() => {}
                _ = poll.tick() => self.pace.ask_at(Instant::now()),
                () = stop.drain.cancelled(), if !draining => {}
                // An error says that the heartbeat has ended, which the lease says too.
                Ok(()) = wanted.changed() => {}
                () = sleep_until(give_back_at), if give_back_at.is_some() => {
                    info!(running = self.in_flight.len(), "grace time over: giving the rest back");
                    let ids: Vec<_> = self.tokens.keys().copied().collect();
                    for id in ids {
                        self.cancel(id, CancelReason::LeaseLost);
                    }
                    give_back_at = Some(Instant::now() + Duration::from_secs(3600));
                }
                () = sleep_until(wake_at), if wake_at.is_some() => {}
            }
        }
    }

    /// Slots a claim could fill now, as far as memory goes too.
    fn free_slots(&self) -> u32 {
        if !self.cells.can_place() {
            return 0;
        }
        free_slots(self.settings.slots, self.in_flight.len(), self.unacked.load(Ordering::Acquire))
            .min(self.admission.room())
    }

    /// Start a claim if there may be work, there is room, and none is under way.
    fn claim(&mut self) {
        let free = self.free_slots();
        if free == 0 || self.claiming.is_some() || !self.pace.is_due(Instant::now()) {
            return;
        }
        let Some(mut known) = self.known.take() else {
            return;
        };
        for (charge, cpu) in self.settled.drain(..) {
            known.share.settle(charge, cpu);
        }
        self.pace.begin();
        let (store, keys) = (self.store.clone(), Arc::clone(self.keys));
        let (worker, epoch) = (self.lease.worker(), self.lease.epoch());
        let reports = self.reports.clone();
        let idle = self.in_flight.is_empty();
        let reach = self.cells.reach();
        self.claiming = Some(tokio::spawn(async move {
            let stranded = known.unanswered.find(&store, (worker, epoch)).await;
            let mut turn =
                claim::turn(&store, &mut known, (free, reach.as_ref()), idle, (worker, epoch)).await;
            if let Ok(turn) = &mut turn {
                keys.open_claimed(turn.taken.iter_mut().map(|(one, _)| one)).await;
            }
            // Refused only when the loop has ended.
            let _ = reports.send(Report::Claimed(Box::new(ClaimReport { known, turn, stranded })));
        }));
    }

    fn report(&mut self, report: Report) {
        match report {
            Report::Claimed(report) => {
                self.known = Some(report.known);
                self.claiming = None;
                for one in report.stranded {
                    let token = self.register(one, None);
                    self.end(token, without_run(Termination::LeaseLost));
                }
                match report.turn {
                    Ok(turn) => {
                        if let Some(at) = turn.next {
                            self.pace.ask_at(at);
                        }
                        for (one, charge) in turn.taken {
                            self.start(one, charge);
                        }
                    }
                    // The heartbeat finds out as well and ends the loop.
                    Err(Error::WorkerGone) => warn!("claim refused: declared dead"),
                    Err(error) => {
                        warn!(%error, "cannot claim; trying again");
                        self.pace.failed(Instant::now());
                    }
                }
            }
            Report::Loaded { token, place, cell, result } => {
                if !self.in_flight.contains_key(&token) {
                    self.cells.give_back(place);
                    return;
                }
                match result {
                    Ok(()) => self.submit(token, place, cell),
                    Err(error) if error.downcast_ref() == Some(&LoadError::Gone) => {
                        self.displace(token, place, &cell);
                    }
                    Err(error) => {
                        self.cells.give_back(place);
                        warn!(error = format!("{error:#}"), "a module cannot be made ready");
                        self.end(
                            token,
                            host_fault(&format!("its module could not be made ready: {error:#}")),
                        );
                    }
                }
            }
        }
    }

    /// Claim at once what was announced; but what no cell of ours has run yet, after a head start for others, which is
    /// shorter than loading its module takes.
    fn hear(&mut self, announced: &Announced) {
        let cold = match announced {
            Announced::Any => false,
            Announced::Of(tasks) => tasks.is_disjoint(&self.warm),
        };
        if cold && self.lease.has_peers() {
            self.pace.ask_at(Instant::now() + self.settings.head_start);
        } else {
            self.pace.hear();
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Up(place, cell) => {
                self.cells.up(place, cell);
                self.lease.gauge.cells(self.cells.pids());
                self.pace.hear();
            }
            Event::Left(place) => {
                self.cells.left(place);
                self.lease.gauge.cells(self.cells.pids());
            }
            Event::Cell(place, said) => {
                for one in said {
                    self.said(place, one);
                }
            }
        }
    }

    /// Somebody wants this invocation to end, or we do.
    fn cancel(&mut self, id: InvocationId, reason: CancelReason) {
        let Some(token) = self.tokens.get(&id).copied() else {
            return;
        };
        let Some(flight) = self.in_flight.get_mut(&token) else {
            return;
        };
        if self.http.cancel(token, reason) {
            flight.cancelled = true;
            return;
        }
        match flight.place.and_then(|place| self.cells.get(place)) {
            Some(cell) if !flight.cancelled => {
                flight.cancelled = true;
                cell.cancel(token, reason);
                self.egress.close(token);
                // One that watches for its cancellation may still put things in order.
                if reason == CancelReason::LeaseLost {
                    self.capabilities.close(token);
                }
            }
            Some(_) => {}
            // Not started yet: it ends here.
            None => self.end(
                token,
                without_run(match reason {
                    CancelReason::Cancelled => Termination::Cancelled,
                    CancelReason::LeaseLost => Termination::LeaseLost,
                }),
            ),
        }
    }

    /// An attempt has ended: decide what becomes of the invocation and send it to the ack.
    fn end(&mut self, token: u64, mut outcome: Outcome) {
        outcome.receipt.egress_bytes = self.egress.end(token);
        self.capabilities.end(token);
        self.http.end(token);
        let Some(flight) = self.in_flight.remove(&token) else {
            return;
        };
        let handed_back = flight.handed_back && outcome.termination == Termination::LeaseLost;
        if handed_back {
            outcome.termination = Termination::HostFault { message: HANDED_BACK.to_owned() };
        } else {
            self.admission.memory().used(token, outcome.receipt.peak_memory_bytes);
        }
        self.journal.ended(&flight.claimed, &outcome);
        self.tokens.remove(&flight.claimed.invocation);
        self.admission.ended(token, true);
        match flight.place {
            Some(place) => self.cells.give_back(place),
            None => self.cells.forget(flight.claimed.tenant, token),
        }
        if let Some(charge) = flight.charge {
            self.settled.push((charge, Duration::from_nanos(outcome.receipt.cpu_ns)));
        }
        let spent = u16::try_from(flight.claimed.spent).unwrap_or(u16::MAX);
        let faults = u16::try_from(flight.claimed.faults).unwrap_or(u16::MAX);
        let verdict = match flight.claimed.withheld {
            // A mistake in this worker's configuration costs the invocation nothing, however often it happens.
            Some(Withheld::NoKey) => Become::HandBack { delay_ms: WITHOUT_KEY_MS },
            // Nor does the crowd that it met here.
            None if flight.placeless => Become::HandBack { delay_ms: WITHOUT_CELL_MS },
            // No doing of its own, however often: it is ended by those that are older, and some day it is the oldest.
            _ if handed_back => Become::HandBack { delay_ms: HANDED_BACK_MS },
            _ => {
                let ending = ending(&outcome.termination);
                decide(ending, &flight.claimed.spec.retry, spent, faults, rand::random())
            }
        };
        if let Some(ends) = &self.ends {
            self.unacked.fetch_add(1, Ordering::AcqRel);
            // The receiver lives as long as this loop.
            let _ = ends.send(Finished {
                claimed: flight.claimed,
                verdict,
                started_at: flight.started_at,
                outcome,
                sealed_log: None,
            });
        }
    }

    /// Stop every guest now and forget everything: it is no longer ours, or is about to be handed on.
    fn abandon(&mut self) {
        self.egress.abandon();
        self.http.abandon();
        self.capabilities.abandon();
        self.cells.kill();
        if !self.in_flight.is_empty() {
            warn!(attempts = self.in_flight.len(), "attempts abandoned");
        }
        self.in_flight.clear();
        self.tokens.clear();
        self.ends = None;
        self.journal.abandoned();
        if let Some(claiming) = self.claiming.take() {
            claiming.abort();
        }
    }
}

/// Whose request it is.
fn whose(lease: &Lease, claimed: &Claimed) -> Whose {
    Whose {
        tenant: claimed.tenant,
        task: claimed.task_id,
        invocation: claimed.invocation,
        attempt: attempt_name(lease, claimed),
    }
}

async fn sleep_until(at: Option<Instant>) {
    if let Some(at) = at {
        tokio::time::sleep_until(at).await;
    }
}
