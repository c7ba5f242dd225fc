//! Calls of guests that end in the database: cells have none. Owns how many are under way, at what rate, and how long one
//! may take; the statement itself looks whether the attempt is still ours and its task has the grant, so a grant that
//! is taken away, or a lease that is lost, is so at once. Believes no cell: every question is checked again. A file below
//! for each capability says how it is carried out.

mod config;
mod kv;
mod seal;
mod secrets;
mod start;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sandbar_host::capability::call::{Answer, Ask, MAX_AT_ONCE, Refusal};
use sandbar_host::cell::Cell;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tracing::warn;

use crate::app::sealed::keys::Keys;
use crate::app::vault::Vault;
use crate::domain::ids::{TaskId, TenantId};
use crate::domain::quota::{Defaults, Quota};
use crate::store::WorkerStore;
use crate::store::invocation::Family;
use crate::store::kv::AttemptName;
use crate::store::start::{MAX_DEPTH, NewStart};
use crate::worker::lease::Lease;
use seal::Seals;

/// Longest wait for the database, the wait for a turn included.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// What a tenant that was quiet may do at once beyond its rate, as a time.
const BURST: Duration = Duration::from_secs(1);

/// What an operator sets.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Calls per second of one tenant in this worker; more of them wait.
    pub calls_per_s: u32,
    /// Connections that calls of guests may use at once, so that acks and claims keep theirs.
    pub connections: usize,
    /// What tasks keep and start is sealed at rest, of every tenant.
    pub seal: bool,
}

/// Everything guests of this worker ask of the database. Dropping it ends nothing that the database has begun.
pub struct Capabilities {
    store: WorkerStore,
    vault: Arc<Vault>,
    keys: Arc<Keys>,
    settings: Settings,
    defaults: Arc<Defaults>,
    turns: Arc<Semaphore>,
    attempts: HashMap<u64, Arc<Attempt>>,
    tenants: HashMap<TenantId, Arc<Tenant>>,
}

#[derive(Default)]
struct Attempt {
    /// Questions that have no answer yet.
    asking: AtomicUsize,
    /// Nothing of it is asked any more.
    over: AtomicBool,
}

struct Tenant {
    turns: Semaphore,
    /// When the next call would be due if all came at the tenant's rate.
    due: Mutex<Instant>,
}

impl Tenant {
    /// How long the next call of this tenant has to wait.
    fn wait(&self, every: Duration) -> Duration {
        let now = Instant::now();
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        *due = (*due).max(now.checked_sub(BURST).unwrap_or(now)) + every;
        due.saturating_duration_since(now)
    }
}

/// One question less when it is dropped.
struct Asking(Arc<Attempt>);

impl Drop for Asking {
    fn drop(&mut self) {
        self.0.asking.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub struct Asker {
    /// The attempt.
    pub attempt: AttemptName,
    /// The tenant.
    pub tenant: TenantId,
    /// The task.
    pub task: TaskId,
    /// The place of its invocation.
    pub family: Family,
}

impl Capabilities {
    /// Nothing under way.
    /// `defaults`: what tenants may use of whom nothing is said.
    pub fn new(
        settings: Settings,
        defaults: Arc<Defaults>,
        store: WorkerStore,
        vault: Arc<Vault>,
        keys: Arc<Keys>,
    ) -> Self {
        Self {
            defaults,
            store,
            vault,
            keys,
            turns: Arc::new(Semaphore::new(settings.connections.max(1))),
            settings,
            attempts: HashMap::new(),
            tenants: HashMap::new(),
        }
    }

    /// A guest asks. The caller has made sure that the attempt is in this cell.
    pub fn hear(
        &mut self,
        lease: &Lease,
        asker: Asker,
        cell: &Arc<Cell>,
        (token, call): (u64, u64),
        ask: Ask,
    ) {
        let state = self.attempts.entry(token).or_default().clone();
        let refusal = if state.over.load(Ordering::Acquire) || !lease.is_held() {
            Some(lost())
        } else if state.asking.load(Ordering::Acquire) >= MAX_AT_ONCE {
            Some(Refusal::failed("the attempt has as many calls under way as it may"))
        } else {
            ask.check().err()
        };
        if let Some(refusal) = refusal {
            cell.answer(call, Answer::Refused(refusal));
            return;
        }
        state.asking.fetch_add(1, Ordering::AcqRel);
        let asking = Asking(state);
        let connections = self.settings.connections;
        let of_tenant = self.tenants.entry(asker.tenant).or_insert_with(|| {
            // Half of them, so that one tenant never has all.
            let turns = Semaphore::new(connections.div_ceil(2).max(1));
            Arc::new(Tenant { turns, due: Mutex::new(Instant::now()) })
        });
        let every = Duration::from_secs(1) / self.settings.calls_per_s.max(1);
        let wait = of_tenant.wait(every);
        let question = Question {
            asker,
            asking,
            of_tenant: of_tenant.clone(),
            turns: self.turns.clone(),
            store: self.store.clone(),
            vault: self.vault.clone(),
            defaults: self.defaults.clone(),
            seals: Seals { keys: Arc::clone(&self.keys), asker, all: self.settings.seal },
        };
        let cell = cell.clone();
        tokio::spawn(async move {
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            let answer =
                tokio::time::timeout(ANSWER_WITHIN, question.answer(&ask)).await.unwrap_or_else(|_| {
                    Err(Refusal::failed(
                        "the database did not answer in time; whether it was done is not known",
                    ))
                });
            // Before the guest hears of it, who may ask again at once.
            drop(question);
            cell.answer(call, answer.unwrap_or_else(Answer::Refused));
        });
    }

    /// The attempt is handed on: nothing more of it is asked.
    pub fn close(&mut self, token: u64) {
        self.attempts.entry(token).or_default().over.store(true, Ordering::Release);
    }

    /// The attempt has ended.
    pub fn end(&mut self, token: u64) {
        if let Some(attempt) = self.attempts.remove(&token) {
            attempt.over.store(true, Ordering::Release);
        }
        // One whose rate is behind is remembered, or ending would start it anew.
        let now = Instant::now();
        self.tenants.retain(|_, tenant| {
            Arc::strong_count(tenant) > 1
                || *tenant.due.lock().unwrap_or_else(PoisonError::into_inner) + BURST > now
        });
    }

    /// Nothing goes on.
    pub fn abandon(&mut self) {
        for (_, attempt) in self.attempts.drain() {
            attempt.over.store(true, Ordering::Release);
        }
        self.tenants.clear();
    }
}

/// One question on its way to the database.
struct Question {
    asker: Asker,
    asking: Asking,
    of_tenant: Arc<Tenant>,
    turns: Arc<Semaphore>,
    store: WorkerStore,
    vault: Arc<Vault>,
    defaults: Arc<Defaults>,
    seals: Seals,
}

impl Question {
    async fn answer(&self, ask: &Ask) -> Result<Answer, Refusal> {
        let Asker { attempt, tenant, family, .. } = self.asker;
        let begun = {
            let turn = self.of_tenant.turns.acquire().await;
            let place = self.turns.acquire().await;
            if self.asking.0.over.load(Ordering::Acquire) || turn.is_err() || place.is_err() {
                return Err(lost());
            }
            match ask {
                Ask::Kv(ask) => {
                    let quota = self.defaults.bound(Quota::KvBytes).unwrap_or(u64::MAX);
                    let of_task = kv::Store { store: &self.store, seals: &self.seals, attempt, quota };
                    return of_task.answer(ask).await.map(Answer::Kv);
                }
                // The dispatcher answers it.
                Ask::Memory { .. } => return Err(Refusal::refused("memory is not asked for here")),
                Ask::Config => return config::read(&self.store, &self.seals, attempt).await,
                Ask::Secret { name } => {
                    return secrets::reveal(&self.store, &self.vault, (attempt, tenant), name).await;
                }
                Ask::Start { task, input, key } => {
                    let family = Family { depth: family.depth.saturating_add(1), ..family };
                    // Before anything is sealed for it.
                    if family.depth > MAX_DEPTH {
                        return Err(Refusal::refused(format!(
                            "a chain of starts is at most {MAX_DEPTH} long"
                        )));
                    }
                    let start = self.seals.start(input, key.as_deref()).await?;
                    let new = NewStart {
                        id: start.id,
                        family,
                        task,
                        input: &start.input,
                        sealed: start.sealed.as_deref(),
                        hashes: &start.hashes,
                        key: key.as_deref(),
                    };
                    start::begin(&self.store, attempt, &new).await?
                }
            }
        };
        // A server sees to it meanwhile; nobody's turn is taken by the waiting.
        start::outcome(&self.store, &self.turns, tenant, begun).await
    }
}

fn lost() -> Refusal {
    Refusal::failed("the attempt is to end: its worker may do nothing more for it")
}

fn unavailable(error: &crate::store::Error) -> Refusal {
    warn!(%error, "a call of a guest failed");
    Refusal::failed("the database cannot answer now; whether it was done is not known")
}
