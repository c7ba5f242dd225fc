//! The queue protocol in memory: what the SQL functions promise, one method per function, each as one atomic step. The
//! differential test holds it to the real functions; the simulation builds on it. Switches take one safeguard away, for
//! the tests that prove that its loss is noticed.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sandbar::domain::admission::{Condition, UniquePolicy};
use sandbar::domain::ids::{InvocationId, LeaseId, TaskId, TenantId, WorkerId};
use sandbar::domain::invocation::State;
use sandbar::domain::retry::Verdict;

/// Virtual milliseconds.
pub type Time = u64;

/// A safeguard that is taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// Nothing is.
    None,
    /// An ack does not look whether its lease still stands.
    Fence,
    /// Claims and heartbeats do not look at the epoch.
    Epoch,
    /// Claims do not count what runs.
    Cap,
    /// A worker does not look for what a claim took whose answer was lost. (The simulated worker's, too.)
    Stranded,
    /// A worker trusts its lease until somebody tells it otherwise. (Not the model's: the simulated worker's.)
    Clock,
}

/// An invocation as it is queued.
#[derive(Debug, Clone)]
pub struct Row {
    pub tenant: TenantId,
    pub task: TaskId,
    pub id: InvocationId,
    pub priority: i16,
    pub run_at: Option<Time>,
    pub expires_at: Option<Time>,
    /// The client's key and fingerprint.
    pub key: Option<(String, u8)>,
    /// At most one unfinished invocation of the task under this key.
    pub unique: Option<(String, UniquePolicy)>,
    /// At most so many running of the task under this key.
    pub together: Option<(String, i64)>,
    /// Not before these have ended.
    pub depends_on: Vec<(InvocationId, Condition)>,
    /// What an unmet condition does: cancel, or let run.
    pub cancels: bool,
}

/// What became of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enqueued {
    Accepted(InvocationId),
    /// Accepted, and it waits for others.
    Waiting(InvocationId),
    Replayed(InvocationId),
    Conflict,
    /// This one holds the unique key, and stands for the request.
    Existing(InvocationId),
    /// This one holds the unique key.
    Duplicate(InvocationId),
    /// It depends on one that there is not.
    UnknownDependency(InvocationId),
}

/// A claimed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Item {
    pub tenant: TenantId,
    pub invocation: InvocationId,
    pub attempt: i16,
    pub spent: i16,
    pub task: TaskId,
    pub lease: LeaseId,
}

/// An attempt's end on its way.
#[derive(Debug, Clone, Copy)]
pub struct End {
    pub item: Item,
    pub verdict: Verdict,
    /// Termination reason.
    pub reason: &'static str,
}

/// The answer to a cancellation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    Now,
    Soon,
    TooLate,
    Unknown,
}

/// The worker is not known, or not in this epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone;

/// What a reaping did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reaped {
    pub workers: i64,
    pub handed_on: i64,
    pub given_up: i64,
}

/// Where an invocation is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Without a time: until others have ended.
    Scheduled {
        due: Option<Time>,
        attempt: i16,
        spent: i16,
    },
    Queued {
        attempt: i16,
        spent: i16,
    },
    Running {
        lease: LeaseId,
        attempt: i16,
        spent: i16,
    },
    Ended {
        state: State,
        reason: String,
    },
}

#[derive(Debug, Clone)]
struct Invocation {
    tenant: TenantId,
    task: TaskId,
    created_at: Time,
    run_at: Option<Time>,
    priority: i16,
    rank: i64,
    expires_at: Option<Time>,
    together: Option<(String, i64)>,
    place: Place,
}

/// When an invocation's turn comes.
fn rank_of(created_at: Time, run_at: Option<Time>, priority: i16) -> i64 {
    created_at.max(run_at.unwrap_or(0)) as i64 - i64::from(priority) * 60_000
}

#[derive(Debug, Clone)]
struct Lease {
    worker: WorkerId,
    epoch: i64,
    open: BTreeSet<(InvocationId, i16)>,
}

/// What the database did, for whoever watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Did {
    /// Accepted the end of an attempt.
    Accepted(InvocationId, i16),
    /// Ended an attempt as lost.
    Lost(InvocationId, i16),
    /// Ended an invocation.
    Terminal(InvocationId),
}

/// The database.
pub struct Db {
    pub now: Time,
    sabotage: Sabotage,
    invocations: BTreeMap<InvocationId, Invocation>,
    /// What is queued, in order of service.
    ready: BTreeSet<(TenantId, i64, InvocationId)>,
    scheduled: BTreeSet<(Time, InvocationId)>,
    expiring: BTreeSet<(Time, InvocationId)>,
    keys: BTreeMap<(TenantId, String), (u8, InvocationId, Time)>,
    pub cancels: BTreeSet<InvocationId>,
    pub attempts: BTreeMap<(InvocationId, i16), String>,
    leases: BTreeMap<LeaseId, Lease>,
    workers: BTreeMap<WorkerId, (i64, Time)>,
    tenant_caps: HashMap<TenantId, i64>,
    task_caps: HashMap<TaskId, i64>,
    running_tenant: HashMap<TenantId, i64>,
    running_task: HashMap<TaskId, i64>,
    running_key: BTreeMap<(TaskId, String), i64>,
    unique: BTreeMap<(TaskId, String), InvocationId>,
    /// Who waits for whom, and how: the one depended on first.
    pub dependencies: BTreeMap<(InvocationId, InvocationId), (Condition, bool)>,
    /// Ends whose dependants have not been told.
    noted: BTreeSet<InvocationId>,
    /// Ends that came after their lease was lost.
    pub late: i64,
    /// Accepted ends, and those that were successes.
    pub ledger: (i64, i64),
    /// More ran than a cap allows.
    over: Option<String>,
    /// Since somebody last looked.
    pub did: Vec<Did>,
}

/// How long an idempotency key is remembered.
pub const KEY_TTL: Time = 24 * 3_600_000;

impl Db {
    pub fn new(sabotage: Sabotage) -> Self {
        Self {
            now: 0,
            sabotage,
            invocations: BTreeMap::new(),
            ready: BTreeSet::new(),
            scheduled: BTreeSet::new(),
            expiring: BTreeSet::new(),
            keys: BTreeMap::new(),
            cancels: BTreeSet::new(),
            attempts: BTreeMap::new(),
            leases: BTreeMap::new(),
            workers: BTreeMap::new(),
            tenant_caps: HashMap::new(),
            task_caps: HashMap::new(),
            running_tenant: HashMap::new(),
            running_task: HashMap::new(),
            running_key: BTreeMap::new(),
            unique: BTreeMap::new(),
            dependencies: BTreeMap::new(),
            noted: BTreeSet::new(),
            late: 0,
            ledger: (0, 0),
            over: None,
            did: Vec::new(),
        }
    }

    pub fn cap_tenant(&mut self, tenant: TenantId, cap: i64) {
        self.tenant_caps.insert(tenant, cap);
    }

    pub fn cap_task(&mut self, task: TaskId, cap: i64) {
        self.task_caps.insert(task, cap);
    }

    /// `enqueue`. `at` is the transaction's time, which orders what was queued within one virtual instant. Within one
    /// call no idempotency key and no unique key comes twice.
    pub fn enqueue(&mut self, rows: &[Row], at: Time) -> Vec<Enqueued> {
        let mut answers: Vec<Enqueued> = rows.iter().map(|row| self.know(row)).collect();
        // Keys in order, as everybody who locks several; then what has none.
        let mut order: Vec<usize> = (0..rows.len()).collect();
        let place = |row: &Row| {
            let key = row.unique.as_ref().map(|(key, _)| key.clone());
            (row.tenant, row.task, key.is_none(), key)
        };
        order.sort_by_key(|n| place(&rows[*n]));
        for n in order {
            if answers[n] == Enqueued::Accepted(rows[n].id) {
                answers[n] = self.admit(&rows[n]);
                self.remember(&rows[n], answers[n]);
            }
        }
        for (row, answer) in rows.iter().zip(&answers) {
            if matches!(answer, Enqueued::Accepted(_) | Enqueued::Waiting(_)) {
                self.insert(row, at, matches!(answer, Enqueued::Waiting(_)));
            }
        }
        answers
    }

    /// What the idempotency key says.
    fn know(&mut self, row: &Row) -> Enqueued {
        let Some((key, print)) = &row.key else { return Enqueued::Accepted(row.id) };
        let slot = (row.tenant, key.clone());
        match self.keys.get(&slot) {
            Some((old, id, expires)) if *expires > self.now => {
                if *old == *print {
                    Enqueued::Replayed(*id)
                } else {
                    Enqueued::Conflict
                }
            }
            _ => {
                self.keys.insert(slot, (*print, row.id, self.now + KEY_TTL));
                Enqueued::Accepted(row.id)
            }
        }
    }

    /// A request that was refused may be repeated; one that was answered with another invocation is, with the same.
    fn remember(&mut self, row: &Row, answer: Enqueued) {
        let Some((key, _)) = &row.key else { return };
        let slot = (row.tenant, key.clone());
        match answer {
            Enqueued::Duplicate(_) | Enqueued::UnknownDependency(_) => drop(self.keys.remove(&slot)),
            Enqueued::Existing(holder) => {
                if let Some((_, id, _)) = self.keys.get_mut(&slot) {
                    *id = holder;
                }
            }
            _ => {}
        }
    }

    /// What its dependencies and its unique key say.
    fn admit(&mut self, row: &Row) -> Enqueued {
        let known = |id: &InvocationId| self.invocations.get(id).is_some_and(|i| i.tenant == row.tenant);
        if let Some((unknown, _)) = row.depends_on.iter().find(|(id, _)| !known(id)) {
            return Enqueued::UnknownDependency(*unknown);
        }
        let waits = row.depends_on.iter().any(|(id, condition)| self.met(*id, *condition) != Some(true));
        let fresh = if waits { Enqueued::Waiting(row.id) } else { Enqueued::Accepted(row.id) };
        let Some((key, policy)) = &row.unique else { return fresh };
        let slot = (row.task, key.clone());
        let Some(holder) = self.unique.get(&slot).copied() else {
            self.unique.insert(slot, row.id);
            return fresh;
        };
        let starts = matches!(self.invocations[&holder].place, Place::Running { .. });
        match policy {
            UniquePolicy::Return => Enqueued::Existing(holder),
            UniquePolicy::Replace if !starts => {
                self.unplace(holder);
                self.end(holder, State::Cancelled, "replaced");
                self.unique.insert(slot, row.id);
                fresh
            }
            UniquePolicy::Debounce if starts => {
                self.unique.insert(slot, row.id);
                fresh
            }
            UniquePolicy::Debounce => {
                self.put_off(holder, row.run_at);
                Enqueued::Existing(holder)
            }
            UniquePolicy::Reject | UniquePolicy::Replace => Enqueued::Duplicate(holder),
        }
    }

    /// `debounce`.
    fn put_off(&mut self, id: InvocationId, run_at: Option<Time>) {
        self.unplace(id);
        let Some(invocation) = self.invocations.get_mut(&id) else { return };
        invocation.run_at = run_at;
        invocation.rank = rank_of(invocation.created_at, run_at, invocation.priority);
        let (due, attempt, spent) = match invocation.place {
            Place::Scheduled { due: None, attempt, spent } => (None, attempt, spent),
            Place::Scheduled { attempt, spent, .. } | Place::Queued { attempt, spent } => {
                (run_at, attempt, spent)
            }
            _ => panic!("it does not wait"),
        };
        invocation.place = Place::Scheduled { due, attempt, spent };
        if let Some(due) = due {
            self.scheduled.insert((due, id));
        }
    }

    /// Whether a condition is met; `None` until the end.
    fn met(&self, on: InvocationId, condition: Condition) -> Option<bool> {
        let Some(Place::Ended { state, .. }) = self.whereabouts(on) else { return None };
        Some(match condition {
            Condition::Finished => true,
            Condition::Succeeded => *state == State::Succeeded,
            Condition::Failed => *state != State::Succeeded,
        })
    }

    fn insert(&mut self, row: &Row, at: Time, waits: bool) {
        let rank = rank_of(at, row.run_at, row.priority);
        let place = match row.run_at {
            _ if waits => {
                for (on, condition) in &row.depends_on {
                    self.dependencies.entry((*on, row.id)).or_insert((*condition, row.cancels));
                    self.noted.insert(*on);
                }
                Place::Scheduled { due: None, attempt: 1, spent: 0 }
            }
            Some(due) if due > self.now => {
                self.scheduled.insert((due, row.id));
                Place::Scheduled { due: Some(due), attempt: 1, spent: 0 }
            }
            _ => {
                self.ready.insert((row.tenant, rank, row.id));
                Place::Queued { attempt: 1, spent: 0 }
            }
        };
        if let Some(expires) = row.expires_at {
            self.expiring.insert((expires, row.id));
        }
        let invocation = Invocation {
            tenant: row.tenant,
            task: row.task,
            created_at: at,
            run_at: row.run_at,
            priority: row.priority,
            rank,
            expires_at: row.expires_at,
            together: row.together.clone(),
            place,
        };
        self.invocations.insert(row.id, invocation);
    }

    /// `settle`: of these ends, or of all that were noted.
    pub fn settle(&mut self, of: Option<&[InvocationId]>) {
        let ends: Vec<InvocationId> =
            self.noted.iter().copied().filter(|id| of.is_none_or(|of| of.contains(id))).collect();
        for on in ends {
            self.noted.remove(&on);
            if self.met(on, Condition::Finished).is_none() {
                continue; // whoever ends it sees its dependants
            }
            let dependants: Vec<(InvocationId, Condition, bool)> = self
                .dependencies
                .range((on, InvocationId(uuid::Uuid::nil()))..)
                .take_while(|((of, _), _)| *of == on)
                .map(|((_, id), (condition, cancels))| (*id, *condition, *cancels))
                .collect();
            for (id, condition, cancels) in dependants {
                self.dependencies.remove(&(on, id));
                if cancels && self.met(on, condition) == Some(false) {
                    self.unplace(id);
                    self.end(id, State::Cancelled, "dependency-unmet");
                } else if !self.dependencies.keys().any(|(_, waiting)| *waiting == id)
                    && let Place::Scheduled { due: None, attempt, spent } = self.invocations[&id].place
                {
                    let run_at = self.invocations[&id].run_at.unwrap_or(0);
                    self.again(id, run_at.saturating_sub(self.now), attempt, spent, run_at > self.now);
                }
            }
        }
    }

    /// `worker_register`. False: the id is taken.
    pub fn register(&mut self, worker: WorkerId, epoch: i64) -> bool {
        if self.workers.contains_key(&worker) {
            return false;
        }
        self.workers.insert(worker, (epoch, self.now));
        true
    }

    fn knows(&self, worker: WorkerId, epoch: i64) -> bool {
        self.workers.get(&worker).is_some_and(|(e, _)| *e == epoch || self.sabotage == Sabotage::Epoch)
    }

    /// `worker_heartbeat`.
    pub fn heartbeat(&mut self, worker: WorkerId, epoch: i64) -> Result<Vec<InvocationId>, Gone> {
        if !self.knows(worker, epoch) {
            return Err(Gone);
        }
        if let Some((_, at)) = self.workers.get_mut(&worker) {
            *at = self.now;
        }
        Ok(self.cancels.iter().copied().collect())
    }

    /// `ready_tenants`: each with how many more of it may run.
    pub fn ready_tenants(&self) -> Vec<(TenantId, Option<u32>)> {
        let mut tenants: Vec<TenantId> = self.ready.iter().map(|(t, _, _)| *t).collect();
        tenants.dedup();
        tenants
            .into_iter()
            .map(|t| {
                let free = self
                    .tenant_caps
                    .get(&t)
                    .map(|cap| cap - self.running_tenant.get(&t).copied().unwrap_or(0));
                (t, free.map(|n| u32::try_from(n).unwrap_or(0)))
            })
            .filter(|(_, free)| *free != Some(0) || self.sabotage == Sabotage::Cap)
            .collect()
    }

    /// `claim`.
    pub fn claim(
        &mut self,
        worker: WorkerId,
        epoch: i64,
        lease: LeaseId,
        asks: &[(TenantId, u32)],
    ) -> Result<Vec<Item>, Gone> {
        if !self.knows(worker, epoch) {
            return Err(Gone);
        }
        let mut taken = Vec::new();
        for (tenant, count) in asks {
            let queued: Vec<_> = self
                .ready
                .range((*tenant, i64::MIN, InvocationId(uuid::Uuid::nil()))..)
                .take_while(|(t, _, _)| t == tenant)
                .copied()
                .collect();
            let mut left = *count;
            for (tenant, rank, id) in queued {
                if left == 0 {
                    break;
                }
                if self.sabotage != Sabotage::Cap && !self.has_room(id) {
                    continue;
                }
                let invocation = &self.invocations[&id];
                let task = invocation.task;
                let Place::Queued { attempt, spent } = invocation.place else {
                    panic!("ready, yet elsewhere")
                };
                self.ready.remove(&(tenant, rank, id));
                self.place(id, Place::Running { lease, attempt, spent });
                taken.push(Item { tenant, invocation: id, attempt, spent, task, lease });
                left -= 1;
            }
        }
        if !taken.is_empty() {
            let open = taken.iter().map(|i| (i.invocation, i.attempt)).collect();
            self.leases.insert(lease, Lease { worker, epoch, open });
        }
        Ok(taken)
    }

    /// Whether no cap keeps this invocation from running.
    fn has_room(&self, id: InvocationId) -> bool {
        let Invocation { tenant, task, together, .. } = &self.invocations[&id];
        let room = |cap: Option<&i64>, running: Option<&i64>| {
            cap.is_none_or(|cap| running.copied().unwrap_or(0) < *cap)
        };
        room(self.tenant_caps.get(tenant), self.running_tenant.get(tenant))
            && room(self.task_caps.get(task), self.running_task.get(task))
            && together
                .as_ref()
                .is_none_or(|(key, limit)| room(Some(limit), self.running_key.get(&(*task, key.clone()))))
    }

    /// Tenants of which something may start.
    pub fn startable(&self) -> BTreeSet<TenantId> {
        self.ready.iter().filter(|(_, _, id)| self.has_room(*id)).map(|(tenant, _, _)| *tenant).collect()
    }

    /// `leased`: what is open under these leases of this worker.
    pub fn leased(&self, worker: WorkerId, epoch: i64, leases: &[LeaseId]) -> Vec<Item> {
        let mut items = Vec::new();
        for lease in leases {
            let Some(held) = self.leases.get(lease).filter(|l| l.worker == worker && l.epoch == epoch) else {
                continue;
            };
            for (id, attempt) in &held.open {
                let invocation = &self.invocations[id];
                let Place::Running { spent, .. } = invocation.place else { panic!("leased, yet elsewhere") };
                let (tenant, task) = (invocation.tenant, invocation.task);
                items.push(Item { tenant, invocation: *id, attempt: *attempt, spent, task, lease: *lease });
            }
        }
        items
    }

    /// `ack`. What is not in the answer came too late.
    pub fn ack(&mut self, worker: WorkerId, epoch: i64, ends: &[End]) -> Vec<(InvocationId, State)> {
        let mut answers = Vec::new();
        for end in ends {
            let Item { invocation: id, attempt, spent, lease, .. } = end.item;
            let stands = self
                .leases
                .get(&lease)
                .is_some_and(|l| l.worker == worker && l.epoch == epoch && l.open.contains(&(id, attempt)));
            if !stands && self.sabotage != Sabotage::Fence {
                let held = self.leases.get(&lease).is_some_and(|l| l.worker == worker && l.epoch == epoch);
                let lost = self.attempts.get(&(id, attempt)).is_none_or(|reason| reason == "lease-lost");
                self.late += i64::from(!held && lost);
                continue;
            }
            self.ledger.0 += 1;
            self.ledger.1 += i64::from(end.verdict == Verdict::Succeeded);
            self.did.push(Did::Accepted(id, attempt));
            self.attempts.insert((id, attempt), end.reason.to_owned());
            self.close(lease, id, attempt);
            self.unplace(id);
            let cancelled = self.cancels.contains(&id);
            let state = match end.verdict {
                Verdict::Retry { .. } | Verdict::Release { .. } | Verdict::HandBack { .. } if cancelled => {
                    self.end(id, State::Cancelled, "cancelled")
                }
                Verdict::Succeeded => self.end(id, State::Succeeded, end.reason),
                Verdict::Dead => self.end(id, State::Dead, end.reason),
                Verdict::Cancelled => self.end(id, State::Cancelled, "cancelled"),
                Verdict::Retry { delay_ms } => self.again(id, delay_ms, attempt + 1, spent + 1, true),
                Verdict::Release { delay_ms } | Verdict::HandBack { delay_ms } => {
                    self.again(id, delay_ms, attempt + 1, spent, delay_ms > 0)
                }
            };
            answers.push((id, state));
        }
        let ended: Vec<InvocationId> =
            answers.iter().filter(|(_, state)| state.is_terminal()).map(|(id, _)| *id).collect();
        self.settle(Some(&ended));
        answers
    }

    /// `cancel_invocation`.
    pub fn cancel(&mut self, id: InvocationId) -> Cancelled {
        match self.invocations.get(&id).map(|i| &i.place) {
            None => Cancelled::Unknown,
            Some(Place::Ended { .. }) => Cancelled::TooLate,
            Some(Place::Running { .. }) => {
                self.cancels.insert(id);
                Cancelled::Soon
            }
            Some(Place::Scheduled { .. } | Place::Queued { .. }) => {
                self.unplace(id);
                self.end(id, State::Cancelled, "cancelled");
                self.settle(Some(&[id]));
                Cancelled::Now
            }
        }
    }

    /// `promote`.
    pub fn promote(&mut self, limit: usize) -> i64 {
        let due: Vec<InvocationId> = self
            .scheduled
            .iter()
            .take_while(|(due, _)| *due <= self.now)
            .take(limit)
            .map(|(_, id)| *id)
            .collect();
        for id in &due {
            let Place::Scheduled { attempt, spent, .. } = self.invocations[id].place else {
                panic!("not scheduled")
            };
            self.unplace(*id);
            if self.cancels.contains(id) {
                self.end(*id, State::Cancelled, "cancelled");
            } else {
                self.again(*id, 0, attempt, spent, false);
            }
        }
        due.len() as i64
    }

    /// `expire`.
    pub fn expire(&mut self, limit: usize) -> Vec<InvocationId> {
        let due: Vec<InvocationId> = self
            .expiring
            .iter()
            .take_while(|(at, _)| *at <= self.now)
            .map(|(_, id)| *id)
            .filter(|id| matches!(self.invocations[id].place, Place::Scheduled { .. } | Place::Queued { .. }))
            .take(limit)
            .collect();
        for id in &due {
            self.unplace(*id);
            self.end(*id, State::Expired, "expired");
        }
        due
    }

    /// `reap`.
    pub fn reap(&mut self, dead_after: Time, max_handovers: i16, only: Option<WorkerId>) -> Reaped {
        let mut reaped = Reaped::default();
        let dead: Vec<(WorkerId, i64)> = self
            .workers
            .iter()
            .filter(|(id, (_, at))| match only {
                Some(only) => **id == only,
                None => at + dead_after < self.now,
            })
            .map(|(id, (epoch, _))| (*id, *epoch))
            .collect();
        for (worker, epoch) in dead {
            reaped.workers += 1;
            self.workers.remove(&worker);
            let leases: Vec<LeaseId> = self
                .leases
                .iter()
                .filter(|(_, l)| l.worker == worker && l.epoch == epoch)
                .map(|(id, _)| *id)
                .collect();
            for lease in leases {
                let open = self.leases[&lease].open.clone();
                for (id, attempt) in open {
                    let Place::Running { spent, .. } = self.invocations[&id].place else {
                        panic!("leased, yet elsewhere")
                    };
                    self.did.push(Did::Lost(id, attempt));
                    self.attempts.insert((id, attempt), "lease-lost".to_owned());
                    self.close(lease, id, attempt);
                    self.unplace(id);
                    reaped.handed_on += 1;
                    if self.cancels.contains(&id) {
                        self.end(id, State::Cancelled, "cancelled");
                    } else if attempt - spent > max_handovers {
                        reaped.given_up += 1;
                        self.end(id, State::Dead, "lease-lost");
                    } else {
                        self.again(id, 0, attempt + 1, spent, false);
                    }
                }
            }
        }
        reaped
    }

    /// `tidy`: idempotency keys past their time.
    pub fn tidy(&mut self) {
        let now = self.now;
        self.keys.retain(|_, (_, _, expires)| *expires > now);
    }

    fn place(&mut self, id: InvocationId, place: Place) {
        let starts = matches!(place, Place::Running { .. });
        if let Some(invocation) = self.invocations.get_mut(&id) {
            if starts {
                *self.running_tenant.entry(invocation.tenant).or_default() += 1;
                *self.running_task.entry(invocation.task).or_default() += 1;
                if let Some((key, _)) = &invocation.together {
                    *self.running_key.entry((invocation.task, key.clone())).or_default() += 1;
                }
            }
            invocation.place = place;
        }
        if starts && self.over.is_none() {
            self.over = self.look_at_caps(id);
        }
    }

    /// Out of whichever place it is in; the caller says where to.
    fn unplace(&mut self, id: InvocationId) {
        let Some(invocation) = self.invocations.get(&id) else { return };
        let (tenant, task, rank) = (invocation.tenant, invocation.task, invocation.rank);
        match invocation.place {
            Place::Scheduled { due: Some(due), .. } => drop(self.scheduled.remove(&(due, id))),
            Place::Queued { .. } => drop(self.ready.remove(&(tenant, rank, id))),
            Place::Running { .. } => {
                *self.running_tenant.entry(tenant).or_default() -= 1;
                *self.running_task.entry(task).or_default() -= 1;
                if let Some((key, _)) = &invocation.together {
                    *self.running_key.entry((task, key.clone())).or_default() -= 1;
                }
            }
            Place::Scheduled { due: None, .. } | Place::Ended { .. } => {}
        }
    }

    fn close(&mut self, lease: LeaseId, id: InvocationId, attempt: i16) {
        if let Some(held) = self.leases.get_mut(&lease) {
            held.open.remove(&(id, attempt));
            if held.open.is_empty() {
                self.leases.remove(&lease);
            }
        }
    }

    fn again(&mut self, id: InvocationId, delay: Time, attempt: i16, spent: i16, waits: bool) -> State {
        if waits {
            let due = self.now + delay;
            self.scheduled.insert((due, id));
            self.place(id, Place::Scheduled { due: Some(due), attempt, spent });
            State::Scheduled
        } else {
            let (tenant, rank) = (self.invocations[&id].tenant, self.invocations[&id].rank);
            self.ready.insert((tenant, rank, id));
            self.place(id, Place::Queued { attempt, spent });
            State::Queued
        }
    }

    fn end(&mut self, id: InvocationId, state: State, reason: &str) -> State {
        self.did.push(Did::Terminal(id));
        self.cancels.remove(&id);
        if let Some(expires) = self.invocations[&id].expires_at {
            self.expiring.remove(&(expires, id));
        }
        self.unique.retain(|_, holder| *holder != id);
        self.dependencies.retain(|(_, waiting), _| *waiting != id);
        if self
            .dependencies
            .range((id, InvocationId(uuid::Uuid::nil()))..)
            .next()
            .is_some_and(|(k, _)| k.0 == id)
        {
            self.noted.insert(id);
        }
        self.place(id, Place::Ended { state, reason: reason.to_owned() });
        state
    }

    /// Where an invocation is.
    pub fn whereabouts(&self, id: InvocationId) -> Option<&Place> {
        self.invocations.get(&id).map(|i| &i.place)
    }

    /// The key under which only so many of an invocation's task run.
    pub fn together(&self, id: InvocationId) -> Option<&(String, i64)> {
        self.invocations.get(&id).and_then(|i| i.together.as_ref())
    }

    /// Whose and of which task an invocation is.
    pub fn tenant_of(&self, id: InvocationId) -> Option<(TenantId, TaskId)> {
        self.invocations.get(&id).map(|i| (i.tenant, i.task))
    }

    /// Every invocation with its place.
    pub fn places(&self) -> impl Iterator<Item = (InvocationId, &Place)> {
        self.invocations.iter().map(|(id, i)| (*id, &i.place))
    }

    /// Those that have not ended.
    pub fn open(&self) -> impl Iterator<Item = InvocationId> {
        self.places().filter(|(_, p)| !matches!(p, Place::Ended { .. })).map(|(id, _)| id)
    }

    /// Expiries that are still watched.
    pub fn expiries(&self) -> BTreeSet<InvocationId> {
        self.expiring.iter().map(|(_, id)| *id).collect()
    }

    /// Keys that are remembered, with whose they are.
    pub fn remembered(&self) -> BTreeSet<(TenantId, String, InvocationId)> {
        self.keys.iter().map(|((t, k), (_, id, _))| (*t, k.clone(), *id)).collect()
    }

    /// Whether dependants have not been told of an end.
    pub fn unsettled(&self) -> bool {
        !self.noted.is_empty()
    }

    /// Unique keys that are held.
    pub fn holders(&self) -> BTreeSet<(TaskId, String, InvocationId)> {
        self.unique.iter().map(|((task, key), id)| (*task, key.clone(), *id)).collect()
    }

    /// What runs of everything that is counted: tenant or task, key, how many.
    pub fn counted(&self) -> BTreeSet<(i16, uuid::Uuid, String, i64)> {
        let tenants =
            self.tenant_caps.keys().map(|t| (0, t.0, String::new(), self.running_tenant.get(t).copied()));
        let tasks = self.task_caps.keys().map(|t| (1, t.0, String::new(), self.running_task.get(t).copied()));
        let keys = self.running_key.iter().map(|((t, key), n)| (2, t.0, key.clone(), Some(*n)));
        let all = tenants.chain(tasks).chain(keys);
        all.map(|(scope, id, key, n)| (scope, id, key, n.unwrap_or(0))).filter(|c| c.3 != 0).collect()
    }

    /// Registered workers.
    pub fn alive(&self) -> BTreeSet<WorkerId> {
        self.workers.keys().copied().collect()
    }

    /// Leases with how many items of each are open.
    pub fn held(&self) -> BTreeMap<LeaseId, usize> {
        self.leases.iter().map(|(id, l)| (*id, l.open.len())).collect()
    }

    /// A tenant, task or key of which more ran than its cap allows.
    pub fn over_cap(&self) -> Option<String> {
        self.over.clone()
    }

    fn look_at_caps(&self, id: InvocationId) -> Option<String> {
        let Invocation { tenant, task, together, .. } = &self.invocations[&id];
        let over = |what: String, cap: Option<&i64>, running: Option<&i64>| {
            let (cap, running) = (cap?, running.copied().unwrap_or(0));
            (running > *cap).then(|| format!("{running} of {what} run, cap {cap}"))
        };
        over(format!("tenant {tenant}"), self.tenant_caps.get(tenant), self.running_tenant.get(tenant))
            .or_else(|| over(format!("task {task}"), self.task_caps.get(task), self.running_task.get(task)))
            .or_else(|| {
                let (key, limit) = together.as_ref()?;
                over(format!("key {key}"), Some(limit), self.running_key.get(&(*task, key.clone())))
            })
    }
}
