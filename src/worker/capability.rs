//! Calls of guests that end in the database: cells have none. Owns how many are under way, at what rate, and how long one
//! may take; the statement itself looks whether the attempt is still ours and its task has the grant, so a grant that
//! is taken away, or a lease that is lost, is so at once. Believes no cell: every question is checked again.

mod kv;
mod seal;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sandbar_host::capability::call::{Answer, Ask, MAX_AT_ONCE, Refusal, Value};
use sandbar_host::cell::Cell;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tracing::warn;

use crate::app::sealed::keys::Keys;
use crate::app::secret;
use crate::app::vault::Vault;
use crate::domain::ids::{StartId, TaskId, TenantId};
use crate::store::WorkerStore;
use crate::store::invocation::Family;
use crate::store::kv::AttemptName;
use crate::store::start::{Asked, MAX_CHILDREN, MAX_DEPTH, MAX_FAMILY, NewStart, Started};
use crate::worker::lease::Lease;
use seal::Seals;

/// Longest wait for the database, the wait for a turn included.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// What a tenant that was quiet may do at once beyond its rate, as a time.
const BURST: Duration = Duration::from_secs(1);

/// First and longest pause between two looks whether a start has been seen to.
const FIRST_LOOK: Duration = Duration::from_millis(5);
/// See [`FIRST_LOOK`].
const LAST_LOOK: Duration = Duration::from_millis(250);

/// What an operator sets.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Calls per second of one tenant in this worker; more of them wait.
    pub calls_per_s: u32,
    /// Connections that calls of guests may use at once, so that acks and claims keep theirs.
    pub connections: usize,
    /// Bytes that a tenant's key-value stores may take when nobody says otherwise; 0: no bound. Follows the configuration.
    pub kv_bytes: Arc<AtomicU64>,
    /// What tasks keep and start is sealed at rest, of every tenant.
    pub seal: bool,
}

/// Everything guests of this worker ask of the database. Dropping it ends nothing that the database has begun.
pub struct Capabilities {
    store: WorkerStore,
    vault: Arc<Vault>,
    keys: Arc<Keys>,
    settings: Settings,
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
    pub fn new(settings: Settings, store: WorkerStore, vault: Arc<Vault>, keys: Arc<Keys>) -> Self {
        Self {
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
        let Asker { attempt, tenant, .. } = asker;
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
        let of_tenant = self.tenants.entry(tenant).or_insert_with(|| {
            // Half of them, so that one tenant never has all.
            let turns = Semaphore::new(connections.div_ceil(2).max(1));
            Arc::new(Tenant { turns, due: Mutex::new(Instant::now()) })
        });
        let every = Duration::from_secs(1) / self.settings.calls_per_s.max(1);
        let wait = of_tenant.wait(every);
        let (of_tenant, turns, cell) = (of_tenant.clone(), self.turns.clone(), cell.clone());
        let (store, vault) = (self.store.clone(), self.vault.clone());
        let quota = self.settings.kv_bytes.clone();
        let seals = Seals { keys: Arc::clone(&self.keys), asker, all: self.settings.seal };
        tokio::spawn(async move {
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            let answer = async {
                let begun = {
                    let turn = of_tenant.turns.acquire().await;
                    let place = turns.acquire().await;
                    if asking.0.over.load(Ordering::Acquire) || turn.is_err() || place.is_err() {
                        return Err(lost());
                    }
                    let quota = match quota.load(Ordering::Acquire) {
                        0 => u64::MAX,
                        bytes => bytes,
                    };
                    match &ask {
                        Ask::Kv(ask) => {
                            let of_task = kv::Store { store: &store, seals: &seals, attempt, quota };
                            return of_task.answer(ask).await.map(Answer::Kv);
                        }
                        Ask::Config => return config(&store, &seals, attempt).await,
                        Ask::Secret { name } => return reveal(&store, &vault, (attempt, tenant), name).await,
                        Ask::Start { task, input, key } => {
                            let family =
                                Family { depth: asker.family.depth.saturating_add(1), ..asker.family };
                            if family.depth > MAX_DEPTH {
                                let words = format!("a chain of starts is at most {MAX_DEPTH} long");
                                return Err(Refusal::refused(words));
                            }
                            let start = seals.start(input, key.as_deref()).await?;
                            let new = NewStart {
                                id: start.id,
                                family,
                                task,
                                input: &start.input,
                                sealed: start.sealed.as_deref(),
                                hashes: &start.hashes,
                                key: key.as_deref(),
                            };
                            begin(&store, attempt, &new).await?
                        }
                    }
                };
                // A server sees to it meanwhile; nobody's turn is taken by the waiting.
                let mut pause = FIRST_LOOK;
                loop {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LAST_LOOK);
                    let place = turns.acquire().await;
                    let found = store.start_outcome(tenant, begun).await;
                    drop(place);
                    match found.map_err(|error| unavailable(&error))? {
                        None => {}
                        Some(Started::Invocation(id)) => return Ok(Answer::Started(id.to_string())),
                        Some(Started::Refused(why)) => return Err(Refusal::refused(why)),
                    }
                }
            };
            let answer = tokio::time::timeout(ANSWER_WITHIN, answer).await.unwrap_or_else(|_| {
                Err(Refusal::failed("the database did not answer in time; whether it was done is not known"))
            });
            // Before the guest hears of it, who may ask again at once.
            drop(asking);
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

fn lost() -> Refusal {
    Refusal::failed("the attempt is to end: its worker may do nothing more for it")
}

async fn config(store: &WorkerStore, seals: &Seals, attempt: AttemptName) -> Result<Answer, Refusal> {
    let config = store.attempt_config(attempt).await.map_err(|error| unavailable(&error))?;
    let mut texts = Vec::new();
    for (name, setting) in config.ok_or_else(lost)? {
        let text = seals.setting(&name, setting).await?;
        texts.push((name, text));
    }
    Ok(Answer::Config(texts))
}

/// The value of a secret that the task may see.
async fn reveal(
    store: &WorkerStore,
    vault: &Vault,
    (attempt, tenant): (AttemptName, TenantId),
    name: &str,
) -> Result<Answer, Refusal> {
    let held = store.attempt_secrets(attempt, &[name.to_owned()]).await;
    let (grants, sealed) = held.map_err(|error| unavailable(&error))?.ok_or_else(lost)?;
    if !grants.secrets.iter().any(|granted| granted == name) {
        return Err(Refusal::denied(format!("the task has no grant to see the secret `{name}`")));
    }
    let opened = secret::open(vault, tenant, &sealed).map_err(|error| {
        warn!(%error, "a secret does not open on this worker");
        Refusal::failed("the secret does not open on this worker: see its log")
    })?;
    Ok(Answer::Secret(opened.into_iter().next().map(|(_, value)| Value(value.to_vec()))))
}

/// Asks for an invocation.
async fn begin(store: &WorkerStore, attempt: AttemptName, new: &NewStart<'_>) -> Result<StartId, Refusal> {
    match store.start_ask(attempt, new).await.map_err(|error| unavailable(&error))? {
        Asked::Open(id) => {
            if let Err(error) = store.start_notify().await {
                warn!(%error, "servers find a start by looking");
            }
            Ok(id)
        }
        Asked::Lost => Err(lost()),
        Asked::Denied => Err(Refusal::denied(format!("the task has no grant to start `{}`", new.task))),
        Asked::Conflict => {
            Err(Refusal::refused("the key was used for another task or another input by this invocation"))
        }
        Asked::TooMany => {
            Err(Refusal::refused(format!("an invocation may start at most {MAX_CHILDREN} others")))
        }
        Asked::FamilyTooLarge => Err(Refusal::refused(format!(
            "everything that goes back to one invocation may be at most {MAX_FAMILY} starts"
        ))),
    }
}

fn unavailable(error: &crate::store::Error) -> Refusal {
    warn!(%error, "a call of a guest failed");
    Refusal::failed("the database cannot answer now; whether it was done is not known")
}
