//! A small installation under a virtual clock: clients, workers with guests, a scheduler and the network to the
//! database, everything decided by one seed. Workers are state machines around the code that really decides
//! ([`decide`], [`ending`], [`FairShare`], [`Validity`], [`free_slots`]); the database is the [`Db`] that the
//! differential test holds to the SQL functions. Any call may be lost before or after its commit, or take its time;
//! workers stand still, die and come back, some under their old id.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use sandbar::domain::admission::{Condition, UniquePolicy};
use sandbar::domain::fairness::Ask;
use sandbar::domain::ids::{InvocationId, LeaseId, TaskId, TenantId, WorkerId};
use sandbar::domain::retry::{Backoff, RetryPolicy};
use sandbar_host::outcome::Termination;
use uuid::Uuid;

mod worker;

use worker::Worker;

use super::model::{Cancelled, Db, Did, End, Enqueued, Gone, Item, Place, Row, Sabotage, Time};

/// What may run at once of a tenant and of a task, where that is capped.
type Caps = (Option<(TenantId, usize)>, Option<(TaskId, usize)>);

/// Silence after which a worker is dead, and time between heartbeats.
const DEAD_AFTER: Time = 900;
const HEARTBEAT: Time = 200;
/// Faults stop and calls are quick from here on; what is open must end soon after.
const QUIET_AT: Time = 8_000;
const LIMIT: Time = 200_000;
/// A client gives a call up after this, not knowing what became of it.
const PATIENCE: Time = 3_000;
/// No call arrives later than this after its client gave it up.
const FORGET: Time = 10_000;
const WORKERS: usize = 3;
const SLOTS: u32 = 6;
const MAX_HANDOVERS: i16 = 10;
/// Where nothing breaks, nobody whom no cap holds back waits longer than this for a first start; who has little weight, longer
/// by as much as the others have more.
const STARVES: Time = 5_000;

/// Something that must never be, in words.
pub type Violation = String;

#[derive(Debug, Clone)]
enum Call {
    Enqueue { client: usize, rows: Vec<Row> },
    Cancel(InvocationId),
    Register { at: usize, life: u64, sent: Time, worker: WorkerId, epoch: i64 },
    Beat { at: usize, life: u64, sent: Time, worker: WorkerId, epoch: i64 },
    Look { at: usize, life: u64 },
    Claim { at: usize, life: u64, worker: WorkerId, epoch: i64, lease: LeaseId, asks: Vec<Ask> },
    Recover { at: usize, life: u64, worker: WorkerId, epoch: i64, leases: Vec<LeaseId> },
    Ack { at: usize, life: u64, worker: WorkerId, epoch: i64, ends: Vec<End> },
    Reap(Option<WorkerId>),
    Promote,
    Expire,
    Settle,
}

#[derive(Debug, Clone)]
enum Answer {
    Enqueued(Vec<Enqueued>),
    Done,
    Registered(bool),
    Beat(Result<Vec<InvocationId>, Gone>),
    Tenants(Vec<(TenantId, Option<u32>)>),
    Claimed(Result<Vec<Item>, Gone>),
    Leased(Vec<Item>),
    Acked,
    /// Nobody knows what became of it.
    Error,
}

#[derive(Debug, Clone)]
enum Event {
    /// A client has something to queue, or asks again.
    Ask(usize, Vec<Row>),
    Cancel,
    /// A call reaches the database.
    Commit(u64),
    /// An answer reaches its caller.
    Reply(Call, Answer),
    Beat(usize, u64),
    Watch(usize, u64),
    Claim(usize, u64),
    Ended(usize, u64, u64),
    Tick,
    Fault,
    Resume(usize),
    Start(usize),
    Register(usize, u64),
}

/// The whole.
pub struct World {
    random: StdRng,
    db: Db,
    sabotage: Sabotage,
    faulty: bool,
    events: BinaryHeap<Reverse<(Time, u64)>>,
    queue: HashMap<u64, Event>,
    calls: HashMap<u64, (Call, bool)>,
    next: u64,
    now: Time,
    workers: Vec<Worker>,
    tenants: Vec<(TenantId, TaskId, u32)>,
    policies: RetryPolicy,
    /// What clients were told, by id.
    acknowledged: HashSet<InvocationId>,
    queued: Vec<InvocationId>,
    to_come: usize,
    /// When its client heard of it, or it fell due: from then on it waits for us.
    since: HashMap<InvocationId, Time>,
    /// Attempts with a guest that runs now.
    running: BTreeMap<(InvocationId, i16), usize>,
    started: HashSet<(InvocationId, i16)>,
    accepted: HashSet<(InvocationId, i16)>,
    lost: HashSet<(InvocationId, i16)>,
    terminal: HashSet<InvocationId>,
    caps: Caps,
    /// Work done, for those who want to know that something happened.
    pub starts: usize,
    pub handed_on: i64,
}

/// Run one seed to its end.
pub fn run(seed: u64, sabotage: Sabotage) -> Result<World, Violation> {
    let mut world = World::new(seed, sabotage);
    world.go()?;
    Ok(world)
}

impl World {
    fn new(seed: u64, sabotage: Sabotage) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut db = Db::new(sabotage);
        let tenants: Vec<(TenantId, TaskId, u32)> = (1..=4u128)
            .map(|n| {
                (TenantId(Uuid::from_u128(n)), TaskId(Uuid::from_u128(100 + n)), random.random_range(1..=400))
            })
            .collect();
        let tenant_cap = random.random_bool(0.6).then(|| (tenants[0].0, random.random_range(1..=4)));
        let task_cap = random.random_bool(0.6).then(|| (tenants[1].1, random.random_range(1..=4)));
        if let Some((tenant, cap)) = tenant_cap {
            db.cap_tenant(tenant, cap as i64);
        }
        if let Some((task, cap)) = task_cap {
            db.cap_task(task, cap as i64);
        }
        let mut world = Self {
            db,
            sabotage,
            // One seed in eight shows that things work when nothing breaks.
            faulty: random.random_ratio(7, 8),
            events: BinaryHeap::new(),
            queue: HashMap::new(),
            calls: HashMap::new(),
            next: 0,
            now: 0,
            workers: Vec::new(),
            tenants,
            policies: RetryPolicy {
                max_attempts: 3,
                backoff: Backoff::Exponential,
                initial_ms: 50,
                factor: 2.0,
                max_ms: 1_000,
                jitter: 0.5,
            },
            acknowledged: HashSet::new(),
            queued: Vec::new(),
            to_come: random.random_range(60..160),
            since: HashMap::new(),
            running: BTreeMap::new(),
            started: HashSet::new(),
            accepted: HashSet::new(),
            lost: HashSet::new(),
            terminal: HashSet::new(),
            caps: (tenant_cap, task_cap),
            starts: 0,
            handed_on: 0,
            random,
        };
        for at in 0..WORKERS {
            let id = WorkerId(world.id());
            world.workers.push(Worker::new(id));
            world.at(0, Event::Start(at));
        }
        for client in 0..3 {
            world.at(client as Time, Event::Ask(client, Vec::new()));
        }
        world.at(50, Event::Tick);
        world.at(300, Event::Cancel);
        if world.faulty {
            world.at(400, Event::Fault);
        }
        world
    }

    fn id(&mut self) -> Uuid {
        self.next += 1;
        Uuid::from_u128(u128::from(self.next) << 32)
    }

    fn at(&mut self, time: Time, event: Event) {
        self.next += 1;
        self.queue.insert(self.next, event);
        self.events.push(Reverse((time, self.next)));
    }

    fn after(&mut self, delay: Time, event: Event) {
        self.at(self.now + delay, event);
    }

    fn go(&mut self) -> Result<(), Violation> {
        while let Some(Reverse((time, number))) = self.events.pop() {
            self.now = time;
            self.db.now = time;
            let Some(event) = self.queue.remove(&number) else { continue };
            self.event(event)?;
            self.check()?;
            let quiet = self.now > QUIET_AT && self.to_come == 0;
            if quiet && self.db.open().next().is_none() && self.asked() {
                break;
            }
            if self.now > LIMIT {
                let open: Vec<_> =
                    self.db.open().map(|id| (id, self.db.whereabouts(id).cloned())).take(5).collect();
                return Err(format!("not ended long after everything was well: {open:?}"));
            }
        }
        for id in &self.acknowledged {
            if !self.terminal.contains(id) || !matches!(self.db.whereabouts(*id), Some(Place::Ended { .. })) {
                return Err(format!("acknowledged and without an end: {id}"));
            }
        }
        Ok(())
    }

    /// Every client has heard of what it asked for.
    fn asked(&self) -> bool {
        !self.queue.values().any(|e| match e {
            Event::Ask(_, rows) => !rows.is_empty(),
            Event::Reply(Call::Enqueue { .. }, _) => true,
            _ => false,
        }) && !self.calls.values().any(|(call, _)| matches!(call, Call::Enqueue { .. }))
    }

    /// What must hold after every step.
    fn check(&mut self) -> Result<(), Violation> {
        for did in std::mem::take(&mut self.db.did) {
            match did {
                Did::Accepted(id, attempt) => {
                    if !self.accepted.insert((id, attempt)) {
                        return Err(format!("two acks of attempt {attempt} of {id} were accepted"));
                    }
                    if self.lost.contains(&(id, attempt)) {
                        return Err(format!(
                            "attempt {attempt} of {id} was accepted after it had been handed on"
                        ));
                    }
                }
                Did::Lost(id, attempt) => {
                    self.handed_on += 1;
                    if self.accepted.contains(&(id, attempt)) || !self.lost.insert((id, attempt)) {
                        return Err(format!("attempt {attempt} of {id} was handed on after its end"));
                    }
                }
                Did::Terminal(id) => {
                    if !self.terminal.insert(id) {
                        return Err(format!("{id} ended twice"));
                    }
                }
            }
        }
        if let Some(over) = self.db.over_cap() {
            return Err(over);
        }
        Ok(())
    }

    // ------------------------------------------------------------ the network

    /// Send a call to the database.
    fn call(&mut self, call: Call) {
        let stormy = self.faulty && self.now < QUIET_AT;
        let fate = if stormy { self.random.random_range(0..100) } else { 99 };
        let way = self.random.random_range(0..4);
        match fate {
            // Lost on its way: the caller waits in vain.
            0..=2 => self.after(PATIENCE, Event::Reply(call, Answer::Error)),
            // Slow, perhaps slower than anybody waits for.
            3..=7 => {
                let slow = self.random.random_range(200..6_000);
                self.commit(call, slow, true);
            }
            // It commits, and the answer is lost.
            8..=10 => self.commit(call, way, false),
            _ => self.commit(call, way, true),
        }
    }

    fn commit(&mut self, call: Call, way: Time, heard: bool) {
        self.next += 1;
        let number = self.next;
        self.calls.insert(number, (call.clone(), heard && way < PATIENCE));
        self.after(way, Event::Commit(number));
        if !heard || way >= PATIENCE {
            self.after(PATIENCE, Event::Reply(call, Answer::Error));
        }
    }

    fn reach(&mut self, number: u64) {
        let Some((call, heard)) = self.calls.remove(&number) else { return };
        let now = self.now;
        let answer = match &call {
            Call::Enqueue { rows, .. } => Answer::Enqueued(self.db.enqueue(rows, now)),
            Call::Cancel(id) => {
                if self.db.cancel(*id) == Cancelled::Unknown && self.acknowledged.contains(id) {
                    panic!("acknowledged and unknown");
                }
                Answer::Done
            }
            Call::Register { worker, epoch, .. } => Answer::Registered(self.db.register(*worker, *epoch)),
            Call::Beat { worker, epoch, .. } => Answer::Beat(self.db.heartbeat(*worker, *epoch)),
            Call::Look { .. } => Answer::Tenants(self.db.ready_tenants()),
            Call::Claim { worker, epoch, lease, asks, .. } => {
                let wanted: Vec<(TenantId, u32)> = asks.iter().map(|a| (a.tenant, a.count)).collect();
                Answer::Claimed(self.db.claim(*worker, *epoch, *lease, &wanted))
            }
            Call::Recover { worker, epoch, leases, .. } => {
                Answer::Leased(self.db.leased(*worker, *epoch, leases))
            }
            Call::Ack { worker, epoch, ends, .. } => {
                self.db.ack(*worker, *epoch, ends);
                Answer::Acked
            }
            Call::Reap(only) => {
                self.db.reap(DEAD_AFTER, MAX_HANDOVERS, *only);
                Answer::Done
            }
            Call::Promote => {
                self.db.promote(20);
                Answer::Done
            }
            Call::Expire => {
                self.db.expire(20);
                Answer::Done
            }
            Call::Settle => {
                self.db.settle(None);
                Answer::Done
            }
        };
        if heard {
            let way = self.random.random_range(0..4);
            self.after(way, Event::Reply(call, answer));
        }
    }

    // ------------------------------------------------------------ what happens

    fn event(&mut self, event: Event) -> Result<(), Violation> {
        // What concerns a worker that stands still waits with it.
        let whom = match &event {
            Event::Beat(at, life)
            | Event::Watch(at, life)
            | Event::Claim(at, life)
            | Event::Ended(at, life, _)
            | Event::Register(at, life) => Some((*at, *life)),
            Event::Reply(
                Call::Register { at, life, .. }
                | Call::Beat { at, life, .. }
                | Call::Look { at, life }
                | Call::Claim { at, life, .. }
                | Call::Recover { at, life, .. }
                | Call::Ack { at, life, .. },
                _,
            ) => Some((*at, *life)),
            _ => None,
        };
        if let Some((at, life)) = whom {
            if self.workers[at].life != life || !self.workers[at].up {
                return Ok(());
            }
            if self.workers[at].paused {
                self.workers[at].deferred.push(event);
                return Ok(());
            }
        }
        match event {
            Event::Ask(client, rows) => self.ask(client, rows),
            Event::Cancel => {
                if !self.queued.is_empty() {
                    let id = self.queued[self.random.random_range(0..self.queued.len())];
                    self.call(Call::Cancel(id));
                }
                if self.now < QUIET_AT {
                    let pause = self.random.random_range(50..900);
                    self.after(pause, Event::Cancel);
                }
            }
            Event::Commit(number) => self.reach(number),
            Event::Reply(call, answer) => return self.reply(call, answer),
            Event::Tick => {
                for call in [Call::Promote, Call::Reap(None), Call::Expire, Call::Settle] {
                    self.call(call);
                }
                let pause = self.random.random_range(20..150);
                self.after(pause, Event::Tick);
            }
            Event::Beat(at, life) => {
                let worker = &self.workers[at];
                let (id, epoch, sent) = (worker.id, worker.epoch, self.now);
                self.call(Call::Beat { at, life, sent, worker: id, epoch });
            }
            Event::Watch(at, life) => {
                if !self.holds(at) {
                    self.lose(at);
                    return Ok(());
                }
                self.after(HEARTBEAT / 8, Event::Watch(at, life));
            }
            Event::Claim(at, life) => {
                self.claim(at);
                let pause = self.random.random_range(20..100);
                self.after(pause, Event::Claim(at, life));
            }
            Event::Ended(at, _, token) => self.ended(at, token),
            Event::Fault => self.fault(),
            Event::Resume(at) => self.resume(at),
            Event::Start(at) => self.start(at),
            Event::Register(at, _) => self.register(at),
        }
        Ok(())
    }

    fn ask(&mut self, client: usize, rows: Vec<Row>) {
        if !rows.is_empty() {
            self.call(Call::Enqueue { client, rows });
            return;
        }
        if self.to_come == 0 {
            return;
        }
        let size = self.random.random_range(1..=6usize).min(self.to_come);
        self.to_come -= size;
        let mut rows = Vec::new();
        let mut keys = HashSet::new();
        for _ in 0..size {
            let row = self.row();
            // Of two requests with one unique key in the same call the first stands for both; not simulated.
            if row.unique.as_ref().is_none_or(|(key, _)| keys.insert((row.task, key.clone()))) {
                rows.push(row);
            }
        }
        self.call(Call::Enqueue { client, rows });
    }

    fn row(&mut self) -> Row {
        // One tenant has most of the work.
        let (tenant, task, _) = self.tenants[[0, 0, 0, 0, 1, 1, 2, 3][self.random.random_range(0..8)]];
        let now = self.now;
        let id = InvocationId(self.id());
        let random = &mut self.random;
        let mut run_at = random.random_ratio(1, 6).then(|| now + random.random_range(1..3_000));
        let unique = random.random_ratio(1, 12).then(|| {
            use UniquePolicy::{Debounce, Reject, Replace, Return};
            let policy = [Reject, Return, Replace, Debounce][random.random_range(0..4)];
            (format!("unique-{}", random.random_range(0..3)), policy)
        });
        if matches!(unique, Some((_, UniquePolicy::Debounce))) {
            run_at = Some(now + random.random_range(1..1_000));
        }
        let together = random.random_ratio(1, 8).then(|| {
            let limit = random.random_range(1..=3);
            (format!("key-{limit}"), limit)
        });
        let mut depends_on = Vec::new();
        while depends_on.len() < 3 && !self.queued.is_empty() && random.random_ratio(1, 10) {
            let on = self.queued[random.random_range(0..self.queued.len())];
            let known = self.db.tenant_of(on).is_some_and(|of| of.0 == tenant);
            if known && depends_on.iter().all(|(id, _)| *id != on) {
                use Condition::{Failed, Finished, Succeeded};
                depends_on.push((on, [Finished, Succeeded, Failed][random.random_range(0..3)]));
            }
        }
        Row {
            tenant,
            task,
            id,
            priority: random.random_range(-3..=3),
            run_at,
            expires_at: random.random_ratio(1, 10).then(|| now + random.random_range(1..4_000)),
            key: Some((id.to_string(), 1)),
            unique,
            together,
            depends_on,
            cancels: random.random_bool(0.5),
        }
    }

    fn reply(&mut self, call: Call, answer: Answer) -> Result<(), Violation> {
        match (call, answer) {
            (Call::Enqueue { client, rows }, Answer::Enqueued(answers)) => {
                for (row, answer) in rows.iter().zip(answers) {
                    match answer {
                        Enqueued::Accepted(id)
                        | Enqueued::Waiting(id)
                        | Enqueued::Replayed(id)
                        | Enqueued::Existing(id) => {
                            self.acknowledged.insert(id);
                            self.queued.push(id);
                            // What waits for others, or may be put off, waits for good reason.
                            if row.unique.is_none() && row.together.is_none() && row.depends_on.is_empty() {
                                self.since.insert(id, self.now.max(row.run_at.unwrap_or(0)));
                            }
                        }
                        Enqueued::Duplicate(_) => {}
                        Enqueued::Conflict | Enqueued::UnknownDependency(_) => {
                            return Err(format!("a request without a fault was refused: {}", row.id));
                        }
                    }
                }
                let pause = self.random.random_range(1..400);
                self.after(pause, Event::Ask(client, Vec::new()));
            }
            // The client asks again under the same keys, for new ids.
            (Call::Enqueue { client, rows }, _) => {
                let rows = rows.into_iter().map(|row| Row { id: InvocationId(self.id()), ..row }).collect();
                self.after(50, Event::Ask(client, rows));
            }
            (Call::Register { at, life, sent, .. }, Answer::Registered(true)) => {
                self.workers[at].sent = Some(sent);
                for event in [Event::Beat(at, life), Event::Watch(at, life), Event::Claim(at, life)] {
                    self.after(1, event);
                }
            }
            // Its id is taken: by its predecessor, or by a call whose answer was lost. The reaper will see to it.
            (Call::Register { at, life, .. }, Answer::Registered(false)) => {
                self.after(100, Event::Register(at, life));
            }
            (Call::Register { at, .. }, _) => self.register(at),
            (Call::Beat { at, life, sent, .. }, Answer::Beat(Ok(cancels))) => {
                let worker = &mut self.workers[at];
                worker.sent = Some(worker.sent.unwrap_or(0).max(sent));
                let doomed: Vec<u64> = worker
                    .flights
                    .iter()
                    .filter(|(_, f)| cancels.contains(&f.item.invocation) && !f.cancelled)
                    .map(|(token, _)| *token)
                    .collect();
                for token in doomed {
                    if let Some(flight) = self.workers[at].flights.get_mut(&token) {
                        flight.cancelled = true;
                    }
                    self.after(1, Event::Ended(at, life, token));
                }
                self.after(HEARTBEAT, Event::Beat(at, life));
            }
            (Call::Beat { at, .. }, Answer::Beat(Err(Gone))) => self.lose(at),
            (Call::Beat { at, life, .. }, _) => self.after(HEARTBEAT / 10, Event::Beat(at, life)),
            (Call::Look { at, life }, Answer::Tenants(tenants)) => self.choose(at, life, &tenants),
            (Call::Claim { at, asks, .. }, Answer::Claimed(Ok(items))) => {
                self.workers[at].claiming = false;
                let charges = self.charge(at, &asks, &items);
                for (item, charge) in items.into_iter().zip(charges) {
                    self.begin(at, item, charge)?;
                }
            }
            (Call::Claim { at, asks, .. }, Answer::Claimed(Err(Gone))) => {
                self.workers[at].claiming = false;
                self.charge(at, &asks, &[]);
            }
            // It may have been taken all the same, now or when a late call arrives.
            (Call::Claim { at, lease, asks, .. }, _) => {
                self.workers[at].claiming = false;
                self.charge(at, &asks, &[]);
                self.workers[at].uncertain.push((lease, self.now));
            }
            (Call::Look { at, .. }, _) => self.workers[at].claiming = false,
            (Call::Recover { at, .. }, Answer::Leased(items)) => {
                let uncertain = &mut self.workers[at].uncertain;
                let found: HashSet<LeaseId> =
                    items.iter().map(|i| i.lease).filter(|l| uncertain.iter().any(|u| u.0 == *l)).collect();
                uncertain.retain(|u| !found.contains(&u.0));
                for item in items.into_iter().filter(|i| found.contains(&i.lease)) {
                    self.finish(at, item, &Termination::LeaseLost);
                }
            }
            (Call::Ack { at, ends, .. }, Answer::Acked) => {
                self.workers[at].acking -= ends.len();
                self.acknowledge(at);
            }
            // Nothing is known: the same again, as long as the lease stands.
            (Call::Ack { at, ends, .. }, _) => {
                self.workers[at].acking -= ends.len();
                if self.holds(at) {
                    self.workers[at].ends.splice(0..0, ends);
                    self.acknowledge(at);
                } else {
                    self.lose(at);
                }
            }
            _ => {}
        }
        Ok(())
    }

    // ------------------------------------------------------------ what goes wrong

    fn fault(&mut self) {
        if self.now >= QUIET_AT {
            return;
        }
        let at = self.random.random_range(0..WORKERS);
        match self.random.random_range(0..3) {
            0 if self.workers[at].up => {
                self.stop_guests(at);
                self.workers[at].up = false;
                let away = self.random.random_range(10..2_500);
                self.after(away, Event::Start(at));
            }
            1 if self.workers[at].up && !self.workers[at].paused => {
                self.workers[at].paused = true;
                // They stand still too; whether they go on afterwards is the watch's to decide.
                self.running.retain(|_, by| *by != at);
                let stands = self.random.random_range(50..4_000);
                self.after(stands, Event::Resume(at));
            }
            _ => {}
        }
        let pause = self.random.random_range(100..1_500);
        self.after(pause, Event::Fault);
    }

    /// Everything that was due meanwhile happens at once, in whatever order.
    fn resume(&mut self, at: usize) {
        self.workers[at].paused = false;
        let mut deferred = std::mem::take(&mut self.workers[at].deferred);
        while !deferred.is_empty() {
            let event = deferred.swap_remove(self.random.random_range(0..deferred.len()));
            self.after(1, event);
        }
    }
}
