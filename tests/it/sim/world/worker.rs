//! A simulated worker: the life of `worker` (lease, claims, guests, acks) as reactions to events, around the code that
//! really decides.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::Rng as _;
use sandbar::domain::fairness::{Ask, Candidate, Charge, FairShare};
use sandbar::domain::ids::{InvocationId, LeaseId, TenantId, WorkerId};
use sandbar::domain::lease::{Validity, free_slots};
use sandbar::domain::retry::decide;
use sandbar::worker::ending;
use sandbar_host::outcome::Termination;

use super::super::model::{End, Item, Sabotage, Time};
use super::{Call, DEAD_AFTER, Event, FORGET, SLOTS, STARVES, Violation, World};

/// An attempt in a worker.
#[derive(Debug, Clone, Copy)]
pub struct Flight {
    pub item: Item,
    pub cancelled: bool,
    pub charge: Option<Charge>,
}

/// A worker process.
pub struct Worker {
    /// Which process it is: events of an earlier one are void.
    pub life: u64,
    /// The next one in its place has its id.
    pub keeps: bool,
    pub id: WorkerId,
    pub epoch: i64,
    /// When the last answered heartbeat was sent; `None` while not registered.
    pub sent: Option<Time>,
    pub up: bool,
    pub paused: bool,
    /// What happened to it while it stood still.
    pub deferred: Vec<Event>,
    pub flights: BTreeMap<u64, Flight>,
    pub share: FairShare,
    pub ends: Vec<End>,
    pub acking: usize,
    pub claiming: bool,
    /// Leases of claims that nobody knows the end of, with the time since when.
    pub uncertain: Vec<(LeaseId, Time)>,
}

impl World {
    /// May this worker's guests run, by its own clock?
    pub fn holds(&self, at: usize) -> bool {
        if self.sabotage == Sabotage::Clock {
            return self.workers[at].sent.is_some();
        }
        let valid = Validity::of(Duration::from_millis(DEAD_AFTER));
        self.workers[at].sent.is_some_and(|sent| valid.holds(sent * 1_000_000, self.now * 1_000_000))
    }

    pub fn start(&mut self, at: usize) {
        self.stop_guests(at);
        let id = if self.workers[at].keeps { self.workers[at].id } else { WorkerId(self.id()) };
        self.next += 1;
        let life = self.next;
        // Some hosts keep their id over a restart.
        let keeps = self.random.random_bool(0.5);
        self.workers[at] = Worker { life, keeps, up: true, ..Worker::new(id) };
        self.register(at);
    }

    pub fn register(&mut self, at: usize) {
        let epoch = self.random.random();
        let worker = &mut self.workers[at];
        worker.epoch = epoch;
        let (life, id) = (worker.life, worker.id);
        self.call(Call::Register { at, life, sent: self.now, worker: id, epoch });
    }

    /// The lease is lost: stop every guest, leave in order if possible, come back as somebody new.
    pub fn lose(&mut self, at: usize) {
        let (id, keeps) = (self.workers[at].id, self.workers[at].keeps);
        self.stop_guests(at);
        self.workers[at].up = false;
        // Whoever keeps an id must not hand on by it: the call may come late, and meet the next one of that id.
        if !keeps && self.random.random_bool(0.7) {
            self.call(Call::Reap(Some(id)));
        }
        self.after(20, Event::Start(at));
    }

    pub fn stop_guests(&mut self, at: usize) {
        self.running.retain(|_, by| *by != at);
        self.workers[at].flights.clear();
    }

    pub fn claim(&mut self, at: usize) {
        let (now, sabotage) = (self.now, self.sabotage);
        let worker = &mut self.workers[at];
        worker.uncertain.retain(|(_, since)| since + FORGET > now);
        if !worker.uncertain.is_empty() && sabotage != Sabotage::Stranded {
            let leases = worker.uncertain.iter().map(|u| u.0).collect();
            let (life, id, epoch) = (worker.life, worker.id, worker.epoch);
            self.call(Call::Recover { at, life, worker: id, epoch, leases });
        }
        let worker = &mut self.workers[at];
        let unacked = (worker.ends.len() + worker.acking) as u64;
        if worker.claiming || free_slots(SLOTS, worker.flights.len(), unacked) == 0 {
            return;
        }
        worker.claiming = true;
        let life = worker.life;
        self.call(Call::Look { at, life });
    }

    pub fn choose(&mut self, at: usize, life: u64, tenants: &[(TenantId, Option<u32>)]) {
        let weight = |tenant: TenantId| self.tenants.iter().find(|t| t.0 == tenant).map_or(1, |t| t.2);
        let candidates: Vec<Candidate> = tenants
            .iter()
            .map(|(tenant, free)| Candidate { tenant: *tenant, weight: weight(*tenant), free: *free })
            .collect();
        let worker = &mut self.workers[at];
        let unacked = (worker.ends.len() + worker.acking) as u64;
        let free = free_slots(SLOTS, worker.flights.len(), unacked);
        let asks = worker.share.choose(&candidates, free);
        if asks.is_empty() {
            worker.claiming = false;
            return;
        }
        let (id, epoch) = (worker.id, worker.epoch);
        let lease = LeaseId(self.id());
        self.call(Call::Claim { at, life, worker: id, epoch, lease, asks });
    }

    /// What a claim brought is charged, what it did not is given back. A charge per item.
    pub fn charge(&mut self, at: usize, asks: &[Ask], items: &[Item]) -> Vec<Option<Charge>> {
        let share = &mut self.workers[at].share;
        let mut charges = vec![None; items.len()];
        for ask in asks {
            let of: Vec<usize> = (0..items.len()).filter(|n| items[*n].tenant == ask.tenant).collect();
            let tasks: Vec<_> = of.iter().map(|n| items[*n].task).collect();
            for (n, charge) in of.into_iter().zip(share.claimed(ask, &tasks)) {
                charges[n] = Some(charge);
            }
        }
        charges
    }

    /// A claimed attempt is about to be handed to a cell.
    pub fn begin(&mut self, at: usize, item: Item, charge: Option<Charge>) -> Result<(), Violation> {
        if !self.holds(at) {
            self.finish(at, item, &Termination::LeaseLost);
            return Ok(());
        }
        let key = (item.invocation, item.attempt);
        if !self.started.insert(key) {
            return Err(format!("attempt {} of {} started twice", item.attempt, item.invocation));
        }
        if let Some(((_, other), by)) =
            self.running.range((item.invocation, 0)..=(item.invocation, i16::MAX)).next()
        {
            return Err(format!(
                "attempt {} of {} starts in worker {at} while attempt {other} runs in worker {by}",
                item.attempt, item.invocation
            ));
        }
        for earlier in 1..item.attempt {
            let before = (item.invocation, earlier);
            if self.started.contains(&before)
                && !self.lost.contains(&before)
                && !self.accepted.contains(&before)
            {
                return Err(format!(
                    "attempt {} of {} starts, and nothing says what became of {earlier}",
                    item.attempt, item.invocation
                ));
            }
        }
        let free =
            self.caps.0.is_none_or(|c| c.0 != item.tenant) && self.caps.1.is_none_or(|c| c.0 != item.task);
        if !self.faulty && free && item.attempt == 1 {
            let waited = self.since.get(&item.invocation).map_or(0, |since| self.now.saturating_sub(*since));
            let weights: Time = self.tenants.iter().map(|(_, _, weight)| Time::from(*weight)).sum();
            let own = self.tenants.iter().find(|(tenant, ..)| *tenant == item.tenant);
            let own = own.map_or(1, |(_, _, weight)| Time::from(*weight));
            // A hundredth of all weights is a share that counts; with less, most of the time is others'.
            if waited > STARVES + STARVES * weights / (own * 100) {
                return Err(format!(
                    "{} of tenant {} (weight {own} of {weights}) waited {waited} ms for its first start",
                    item.invocation, item.tenant
                ));
            }
        }
        self.running.insert(key, at);
        self.starts += 1;
        self.guests_under_caps(item)?;
        self.next += 1;
        let token = self.next;
        let life = self.workers[at].life;
        self.workers[at].flights.insert(token, Flight { item, cancelled: false, charge });
        let takes = if self.random.random_ratio(1, 20) { 1_500 } else { self.random.random_range(1..120) };
        self.after(takes, Event::Ended(at, life, token));
        Ok(())
    }

    /// Guests themselves, not what the database believes.
    pub fn guests_under_caps(&self, item: Item) -> Result<(), Violation> {
        let running =
            |of: &dyn Fn(InvocationId) -> bool| self.running.keys().filter(|(id, _)| of(*id)).count();
        let tenant_of = |id: InvocationId| self.db.tenant_of(id);
        if let Some((tenant, cap)) = self.caps.0
            && item.tenant == tenant
            && running(&|id| tenant_of(id).is_some_and(|t| t.0 == tenant)) > cap
        {
            return Err(format!("more guests of {tenant} run than its cap of {cap}"));
        }
        if let Some((task, cap)) = self.caps.1
            && item.task == task
            && running(&|id| tenant_of(id).is_some_and(|t| t.1 == task)) > cap
        {
            return Err(format!("more guests of task {task} run than its cap of {cap}"));
        }
        if let Some((key, limit)) = self.db.together(item.invocation) {
            let same = |id| {
                tenant_of(id).is_some_and(|t| t.1 == item.task)
                    && self.db.together(id).is_some_and(|(other, _)| other == key)
            };
            if running(&same) as i64 > *limit {
                return Err(format!("more guests under {key} run than its cap of {limit}"));
            }
        }
        Ok(())
    }

    /// A guest has ended.
    pub fn ended(&mut self, at: usize, token: u64) {
        let Some(flight) = self.workers[at].flights.remove(&token) else { return };
        self.running.remove(&(flight.item.invocation, flight.item.attempt));
        if let Some(charge) = flight.charge {
            let cpu = Duration::from_micros(self.random.random_range(20..20_000));
            self.workers[at].share.settle(charge, cpu);
        }
        let termination = if flight.cancelled {
            Termination::Cancelled
        } else {
            match self.random.random_range(0..20) {
                0 => Termination::GuestError {
                    retryable: true,
                    message: String::new(),
                    retry_after_ms: Some(30),
                },
                1 => Termination::Deadline,
                2 => {
                    Termination::GuestError { retryable: false, message: String::new(), retry_after_ms: None }
                }
                3 => Termination::HostFault { message: String::new() },
                _ => Termination::Succeeded,
            }
        };
        self.finish(at, flight.item, &termination);
    }

    pub fn finish(&mut self, at: usize, item: Item, termination: &Termination) {
        let random = self.random.random();
        let verdict = decide(
            ending(termination),
            &self.policies,
            item.spent.unsigned_abs(),
            (item.attempt - item.spent - 1).unsigned_abs(),
            random,
        );
        let reason = match termination {
            Termination::Succeeded => "succeeded",
            Termination::Deadline => "deadline",
            Termination::Cancelled => "cancelled",
            Termination::LeaseLost => "lease-lost",
            Termination::HostFault { .. } => "host-fault",
            _ => "guest-error",
        };
        self.workers[at].ends.push(End { item, verdict, reason });
        self.acknowledge(at);
    }

    pub fn acknowledge(&mut self, at: usize) {
        let worker = &mut self.workers[at];
        if worker.acking > 0 || worker.ends.is_empty() {
            return;
        }
        let ends = std::mem::take(&mut worker.ends);
        worker.acking = ends.len();
        let (life, id, epoch) = (worker.life, worker.id, worker.epoch);
        self.call(Call::Ack { at, life, worker: id, epoch, ends });
    }
}

impl Worker {
    pub fn new(id: WorkerId) -> Self {
        Self {
            life: 0,
            keeps: false,
            id,
            epoch: 0,
            sent: None,
            up: false,
            paused: false,
            deferred: Vec::new(),
            flights: BTreeMap::new(),
            share: FairShare::default(),
            ends: Vec::new(),
            acking: 0,
            claiming: false,
            uncertain: Vec::new(),
        }
    }
}
