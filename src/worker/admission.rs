//! Which claimed attempts may start: memory ([`Lending`]), suspicion after the death of a cell ([`Suspicion`]), and
//! modules in quarantine. Owns the queue of those that may not yet; never talks to cells, and writes only what it
//! has found out about modules.

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::{error, warn};

use crate::domain::budget::{Budget, Level};
use crate::domain::lending::{Lending, Need};
use crate::domain::suspicion::{Key, Suspicion};
use crate::store::WorkerStore;
use crate::worker::Settings;

/// Time between looks at which modules are in quarantine.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Between attempts to write a quarantine down.
const SAVE_AGAIN: Duration = Duration::from_secs(1);
/// What an attempt takes until some have said so themselves: the default limits.
const TYPICAL_BYTES: u64 = 68 << 20;

/// What becomes of an attempt that wants to start.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    Start,
    /// Not yet; [`Admission::next`] will name it.
    Wait,
    /// Its module is in quarantine.
    Quarantined,
    /// It declares more memory than this worker gives.
    TooLarge,
}

/// The doorkeeper of one dispatch loop.
pub struct Admission {
    store: WorkerStore,
    worker_bytes: u64,
    suspicion: Suspicion,
    /// As Postgres had it at the last look.
    quarantined: HashSet<Key>,
    /// When the last look began, and the last that has brought something.
    looked_at: Option<Instant>,
    seen_at: Option<Instant>,
    /// Somebody waits for a look.
    hurry: bool,
    found: mpsc::UnboundedSender<Look>,
    finds: mpsc::UnboundedReceiver<Look>,
    /// Found out here and not yet seen in Postgres.
    own: HashSet<Key>,
    /// Those that run.
    memory: Lending,
    waiting: VecDeque<Waiting>,
    /// The first of those that wait, waits for memory of the worker: nothing behind it may overtake it, and no more
    /// is claimed.
    full: bool,
}

struct Waiting {
    token: u64,
    key: Key,
    need: Need,
    since: Instant,
}

impl Admission {
    /// For a worker with these settings.
    ///
    /// # Errors
    /// Its cells alone take so much that not one ordinary attempt would ever fit.
    pub fn new(settings: &Settings, store: &WorkerStore) -> anyhow::Result<Self> {
        let own = settings.cells_bytes();
        let worker_bytes = settings.memory_bytes.saturating_sub(own);
        anyhow::ensure!(
            worker_bytes >= TYPICAL_BYTES,
            "worker.memory_bytes is {}, of which the cells may take {own} by themselves: no attempt of {TYPICAL_BYTES} \
             bytes would ever fit. Raise it, or lower worker.slots, worker.cells or worker.max_cells",
            settings.memory_bytes
        );
        let budget = Budget::new(worker_bytes, settings.tenant_memory_bytes, TYPICAL_BYTES);
        let (found, finds) = mpsc::unbounded_channel();
        Ok(Self {
            store: store.clone(),
            worker_bytes,
            suspicion: Suspicion::default(),
            quarantined: HashSet::new(),
            looked_at: None,
            seen_at: None,
            hurry: false,
            found,
            finds,
            own: HashSet::new(),
            memory: Lending::new(budget, settings.memory_overcommit),
            waiting: VecDeque::new(),
            full: false,
        })
    }

    /// Bytes for attempts in all.
    pub fn worker_bytes(&self) -> u64 {
        self.worker_bytes
    }

    /// How many more attempts it makes sense to claim, as far as memory goes.
    pub fn room(&self) -> u32 {
        if self.full { 0 } else { self.memory.room() }
    }

    /// An attempt wants to start.
    pub fn ask(&mut self, token: u64, key: Key, need: Need) -> Verdict {
        let one = Waiting { token, key, need, since: Instant::now() };
        if self.full {
            // Behind the others: nobody overtakes.
            self.waiting.push_back(one);
            return Verdict::Wait;
        }
        match self.decide(&one) {
            (Verdict::Wait, level) => {
                self.full |= level == Some(Level::Worker);
                self.waiting.push_back(one);
                Verdict::Wait
            }
            (verdict, _) => verdict,
        }
    }

    fn decide(&mut self, one: &Waiting) -> (Verdict, Option<Level>) {
        if self.own.contains(&one.key) {
            return (Verdict::Quarantined, None);
        }
        if self.quarantined.contains(&one.key) {
            // It may have been released since that look: ask again before its invocation dies of it.
            if self.seen_at.is_some_and(|at| at >= one.since) {
                return (Verdict::Quarantined, None);
            }
            self.hurry = true;
            return (Verdict::Wait, None);
        }
        if !self.suspicion.is_empty()
            && !self.suspicion.may_start(&one.key, self.memory.running(), one.since.elapsed())
        {
            return (Verdict::Wait, None);
        }
        match self.memory.start(one.token, one.key, one.need) {
            Ok(()) => (Verdict::Start, None),
            Err(Level::Never) => (Verdict::TooLarge, Some(Level::Never)),
            Err(level) => (Verdict::Wait, Some(level)),
        }
    }

    /// The next of those that wait whose turn has come, and what becomes of it.
    pub fn next(&mut self) -> Option<(u64, Verdict)> {
        let mut index = 0;
        self.full = false;
        while let Some(one) = self.waiting.remove(index) {
            let token = one.token;
            match self.decide(&one) {
                (Verdict::Wait, level) => {
                    self.waiting.insert(index, one);
                    if level == Some(Level::Worker) {
                        self.full = true;
                        return None;
                    }
                    index += 1;
                }
                (verdict, _) => return Some((token, verdict)),
            }
        }
        None
    }

    /// The memory of those that run.
    pub fn memory(&mut self) -> &mut Lending {
        &mut self.memory
    }

    /// An attempt is over, or will not start; `lived`: its cell is still there.
    pub fn ended(&mut self, token: u64, lived: bool) {
        match self.memory.ended(token) {
            Some(key) if lived => self.suspicion.ended(&key),
            Some(_) => {}
            None => self.waiting.retain(|one| one.token != token),
        }
    }

    /// A cell died with these attempts in it.
    pub fn died(&mut self, lost: &[u64], reason: &str) {
        let running: HashSet<Key> = lost.iter().filter_map(|token| self.memory.key(*token)).collect();
        if let Some(key) = self.suspicion.died(&running, Instant::now()) {
            let hash = sandbar_host::ModuleHash::from_bytes(key.1);
            error!(tenant = %key.0, module = %hash, reason, "quarantine: this module was running when two cells died");
            self.own.insert(key);
            tokio::spawn(save(self.store.clone(), self.found.clone(), key, reason.to_owned()));
        }
    }

    /// Look again, if it is time, at which modules are in quarantine; take in what the last look found.
    pub fn refresh(&mut self) {
        while let Ok(look) = self.finds.try_recv() {
            // What has been written down is Postgres's from now on: an operator may have released it since.
            self.own.retain(|key| !look.found.contains(key) && Some(key) != look.saved.as_ref());
            if self.seen_at.is_none_or(|at| at <= look.began) {
                self.seen_at = Some(look.began);
                self.quarantined = look.found;
            }
        }
        let under_way = self.looked_at > self.seen_at;
        let recent = self.looked_at.is_some_and(|at| at.elapsed() < LOOK_EVERY);
        if recent && (under_way || !self.hurry) {
            return;
        }
        let now = Instant::now();
        self.looked_at = Some(now);
        self.hurry = false;
        let (store, found) = (self.store.clone(), self.found.clone());
        tokio::spawn(async move {
            match store.quarantined().await {
                // Refused only when the loop has ended.
                Ok(keys) => {
                    drop(found.send(Look { began: now, found: keys.into_iter().collect(), saved: None }));
                }
                Err(error) => warn!(%error, "cannot see which modules are in quarantine"),
            }
        });
    }
}

/// What a look found.
#[derive(Debug)]
struct Look {
    began: Instant,
    found: HashSet<Key>,
    /// One that was written down just before.
    saved: Option<Key>,
}

/// Write it down, however long the database is away, and look again: until then only this worker knows.
async fn save(store: WorkerStore, found: mpsc::UnboundedSender<Look>, key: Key, reason: String) {
    let (tenant, sha256) = key;
    while let Err(error) = store.version_quarantine(tenant, &sha256, &reason).await {
        warn!(%error, "cannot write a quarantine down; trying again");
        tokio::time::sleep(SAVE_AGAIN).await;
    }
    loop {
        let began = Instant::now();
        match store.quarantined().await {
            // Refused only when the loop has ended.
            Ok(keys) => {
                return drop(found.send(Look { began, found: keys.into_iter().collect(), saved: Some(key) }));
            }
            Err(error) => warn!(%error, "cannot see which modules are in quarantine"),
        }
        tokio::time::sleep(SAVE_AGAIN).await;
    }
}
