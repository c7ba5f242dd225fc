//! Quotas at the door: what holds for a tenant, remembered for two seconds, and tokens of quotas per second and day,
//! which this server takes from Postgres some at a time. Never loses what was accepted: a quota that is hit refuses what
//! comes, and what waits already keeps its place.
//!
//! No window is passed, however many servers there are: a token is granted once. A server holds at most a fiftieth of a
//! quota ahead, so that much may be left unused when others are refused; a server that is killed takes what it holds
//! with it until the window ends.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use sandbar_host::limits::Limits;
use serde_json::{Value, json};

use crate::app::encryption::Ready;
use crate::app::vault::{DataKey, Vault, VaultError, Wrapped};
use crate::app::{App, Error, Inner, Result, audit};
use crate::domain::ids::{KeyId, TaskId, TenantId};
use crate::domain::names::TaskName;
use crate::domain::quota::{Amount, Level, Levels, Quota, Source};
use crate::domain::tokens::{Taken, Window};
use crate::store::key::KeyRow;
use crate::store::queue::Enqueued;
use crate::store::quota::{MAX_PLANS, MAX_TASK_SHARES, PlanRow, Stored, Want, Whose};
use crate::store::secret::WrappedRow;

/// A change made elsewhere is seen at the latest after this time.
const STALE_AFTER: Duration = Duration::from_secs(2);
/// Tenants remembered; beyond it, those are forgotten that hold no tokens.
const MAX_TENANTS: usize = 10_000;
/// What is known of a tenant is forgotten, and its open data key wiped, when nobody has asked for so long.
const IDLE: Duration = Duration::from_secs(5);
/// Tokens of one quota that a server takes ahead at the most.
const MOST_AHEAD: u64 = 10_000;
/// Longest time for giving tokens back when the server stops.
const GIVE_BACK: Duration = Duration::from_secs(2);

/// Windows remembered of a tenant; beyond it, those are forgotten that are over.
const MAX_WINDOWS: usize = 4_096;

/// Length of a quota's window, in seconds; `None` when it has none.
fn window_s(quota: Quota) -> Option<u32> {
    match quota {
        Quota::InvocationsPerSecond => Some(1),
        Quota::InvocationsPerDay | Quota::EgressRequestsPerDay | Quota::EgressBytesPerDay => Some(86_400),
        _ => None,
    }
}

/// A data key as it is stored and, from its first use on, open: unwrapping is as dear as sealing a small input. It is
/// wiped with what else is known of its tenant.
#[derive(Debug)]
pub(super) struct KnownKey {
    wrapped: WrappedRow,
    open: OnceLock<(String, DataKey)>,
}

impl KnownKey {
    fn new(wrapped: WrappedRow) -> Self {
        Self { wrapped, open: OnceLock::new() }
    }

    /// The key, with its fingerprint.
    ///
    /// # Errors
    /// The master key is not here, or it does not open.
    pub(super) fn open(
        &self,
        vault: &Vault,
        tenant: TenantId,
    ) -> std::result::Result<&(String, DataKey), VaultError> {
        if let Some(open) = self.open.get() {
            return Ok(open);
        }
        let (master, bytes) = self.wrapped.clone();
        let key = vault.unwrap(tenant, &Wrapped { master, bytes })?;
        Ok(self.open.get_or_init(|| (key.id(), key)))
    }
}

/// What is known of a tenant.
#[derive(Debug)]
pub struct Known {
    /// Name of its plan.
    pub plan: Option<String>,
    /// What holds for it.
    pub levels: Levels,
    tasks: HashMap<TaskId, Level>,
    /// Keys with limits: the first of the line, by which it is counted, and the limits.
    keys: HashMap<KeyId, (KeyId, Level)>,
    /// Log bytes that may still be kept today.
    log_left: Option<u64>,
    /// Payloads are sealed.
    pub(super) seals: bool,
    /// Its data key.
    pub(super) key: Option<KnownKey>,
    at: Instant,
}

impl Known {
    fn task_bound(&self, task: TaskId, quota: Quota) -> Option<u64> {
        self.tasks.get(&task)?.get(quota)?.bound()
    }

    /// Whether submissions are counted: each takes a token of the tenant's, or of its task's.
    pub(super) fn counts(&self) -> bool {
        [Quota::InvocationsPerSecond, Quota::InvocationsPerDay].into_iter().any(|quota| {
            self.levels.bound(quota).is_some()
                || self
                    .tasks
                    .values()
                    .any(|level| level.get(quota).is_some_and(|said| said.bound().is_some()))
        })
    }

    /// Hold the limits of one attempt to what may be. `asked`: whether somebody named the memory, or it is the default.
    ///
    /// # Errors
    /// More memory was named than may be.
    pub(super) fn hold(&self, task: TaskId, limits: &mut Limits, asked: bool) -> Result<()> {
        let of_attempt = |bound| (Quota::AttemptMemoryBytes, bound);
        let bounds = [
            self.levels.bound(Quota::AttemptMemoryBytes).map(of_attempt),
            self.task_bound(task, Quota::AttemptMemoryBytes).map(of_attempt),
            // What wants more than all may have would never start.
            self.levels.bound(Quota::MemoryBytes).map(|bound| (Quota::MemoryBytes, bound)),
        ];
        if let Some((quota, max)) = bounds.into_iter().flatten().min_by_key(|(_, bound)| *bound)
            && limits.memory_bytes > max
        {
            if asked {
                return Err(Error::OverQuota {
                    name: quota.as_str(),
                    limit: max,
                    wanted: limits.memory_bytes,
                });
            }
            limits.memory_bytes = max;
        }
        if let Some(left) = self.log_left {
            limits.log_bytes = limits.log_bytes.min(left);
        }
        Ok(())
    }
}

type Slot = (Whose, Quota);

#[derive(Debug, Default)]
struct Tenant {
    known: Mutex<Option<Arc<Known>>>,
    loading: tokio::sync::Mutex<()>,
    windows: tokio::sync::Mutex<HashMap<Slot, Window>>,
}

impl Tenant {
    fn fresh(&self) -> Option<Arc<Known>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.as_ref().filter(|known| known.at.elapsed() < STALE_AFTER).cloned()
    }
}

/// Tenants seen lately.
#[derive(Debug, Default)]
pub struct Quotas {
    tenants: Mutex<HashMap<TenantId, Arc<Tenant>>>,
}

impl Quotas {
    fn of(&self, tenant: TenantId) -> Arc<Tenant> {
        let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        if tenants.len() >= MAX_TENANTS && !tenants.contains_key(&tenant) {
            tenants.retain(|_, tenant| {
                // In use, or with tokens that would be lost.
                Arc::strong_count(tenant) > 1
                    || tenant
                        .windows
                        .try_lock()
                        .is_ok_and(|windows| windows.values().any(|window| window.left().is_some()))
            });
            if tenants.len() >= MAX_TENANTS {
                tenants.clear();
            }
        }
        Arc::clone(tenants.entry(tenant).or_default())
    }

    /// Forget what is out of date. Tokens stay.
    fn forget_idle(&self) {
        let tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        for tenant in tenants.values() {
            let mut known = tenant.known.lock().unwrap_or_else(PoisonError::into_inner);
            if known.as_ref().is_some_and(|known| known.at.elapsed() >= IDLE) {
                *known = None;
            }
        }
    }
}

/// Tokens that were taken. Given back when what they were for did not come about.
struct Tokens {
    tenant: Arc<Tenant>,
    taken: Vec<(Slot, DateTime<Utc>)>,
}

impl Tokens {
    async fn give_back(self) {
        if self.taken.is_empty() {
            return;
        }
        let mut windows = self.tenant.windows.lock().await;
        for (slot, began) in self.taken {
            if let Some(window) = windows.get_mut(&slot) {
                window.put_back(1, began);
            }
        }
    }
}

/// What a tenant may use, what it uses, and since when it counts.
#[derive(Debug, Clone)]
pub struct Standing {
    /// Which quota.
    pub quota: Quota,
    /// How much.
    pub amount: Amount,
    /// Who said so.
    pub source: Source,
    /// How much is used, where that is known.
    pub used: Option<u64>,
    /// When it is counted from 0 again.
    pub resets_at: Option<DateTime<Utc>>,
}

/// How a key stands to its limits, from what its row has: quota, amount, what is used of it, and when it is counted anew.
pub fn key_standing(row: &KeyRow, now: DateTime<Utc>) -> Vec<(Quota, Amount, u64, Option<DateTime<Utc>>)> {
    let limited = Quota::ALL.iter().filter_map(|quota| Some((*quota, row.quotas.get(*quota)?)));
    limited
        .map(|(quota, amount)| {
            let window = TimeDelta::seconds(window_s(quota).unwrap_or(1).into());
            let used = row.used.iter().find(|(of, _, began)| *of == quota && *began + window > now);
            (quota, amount, used.map_or(0, |(_, used, _)| *used), used.map(|(_, _, began)| *began + window))
        })
        .collect()
}

/// A change of a quota: `None` inherits again.
pub type Change = (Quota, Option<Amount>);

impl App {
    /// What holds for this tenant.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub(super) async fn quotas_of(&self, tenant: TenantId) -> Result<Arc<Known>> {
        let entry = self.inner.quotas.of(tenant);
        self.known(tenant, &entry).await
    }

    async fn known(&self, tenant: TenantId, entry: &Tenant) -> Result<Arc<Known>> {
        if let Some(known) = entry.fresh() {
            return Ok(known);
        }
        let _one_at_a_time = entry.loading.lock().await;
        if let Some(known) = entry.fresh() {
            return Ok(known);
        }
        // Taken before the question, so that an answer is never older than it claims.
        let at = Instant::now();
        let mut connection = self.tenant(tenant).await?;
        let found = connection.quotas().await?;
        let levels = Levels { default: self.default_quotas(), plan: found.of_plan, tenant: found.of_tenant };
        let log_left = match levels.bound(Quota::LogBytesPerDay) {
            Some(bound) => Some(bound.saturating_sub(connection.log_bytes_today().await?)),
            None => None,
        };
        let tasks = found.of_tasks.into_iter().collect();
        let seals = found.seal_payloads || self.inner.settings.seal_payloads;
        let key = found.key.map(KnownKey::new);
        let keys = found.of_keys.into_iter().map(|(key, line, said)| (key, (line, said))).collect();
        let known = Arc::new(Known { plan: found.plan, levels, tasks, keys, log_left, seals, key, at });
        *entry.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&known));
        Ok(known)
    }

    /// Queue an invocation if its tenant, its task and the key that brings it may have one more, and there is room for it;
    /// durable on return. Tokens come first: what they refuse does not count as waiting.
    ///
    /// # Errors
    /// A quota is used up; [`Error::QueueFull`]; or what the flusher refuses.
    pub(super) async fn enqueue_within_quota(&self, ready: Ready, by: Option<KeyId>) -> Result<Enqueued> {
        let (row, request) = ready.into_parts();
        let tenant = row.tenant;
        let taken = self.take(tenant, row.task, by).await?;
        match self.enqueue(row).await {
            Ok(accepted @ (Enqueued::Accepted(_) | Enqueued::Waiting(_))) => Ok(accepted),
            Ok(other) => {
                taken.give_back().await;
                if let (Enqueued::Conflict, Some((key, digest))) = (other, &request)
                    && let Some(first) = self.same_request(tenant, key, digest).await?
                {
                    return Ok(Enqueued::Replayed(first));
                }
                Ok(other)
            }
            Err(error) => {
                // When Postgres does not answer, nobody knows whether it was accepted: it counts.
                if !matches!(error, Error::Unavailable(_)) {
                    taken.give_back().await;
                }
                Err(error)
            }
        }
    }

    async fn take(&self, tenant: TenantId, task: TaskId, by: Option<KeyId>) -> Result<Tokens> {
        let entry = self.inner.quotas.of(tenant);
        let known = self.known(tenant, &entry).await?;
        let mut taken = Tokens { tenant: Arc::clone(&entry), taken: Vec::new() };
        let limited = by.and_then(|key| known.keys.get(&key));
        // The shares of key and task first: they are the smaller ones.
        for quota in [Quota::InvocationsPerSecond, Quota::InvocationsPerDay] {
            let of_key =
                limited.and_then(|(line, said)| Some((Whose::Key(*line), said.get(quota)?.bound()?)));
            let of_task = known.task_bound(task, quota).map(|bound| (Whose::Task(task), bound));
            let of_tenant = known.levels.bound(quota).map(|bound| (Whose::Tenant, bound));
            for (whose, limit) in [of_key, of_task, of_tenant].into_iter().flatten() {
                match self.take_one(tenant, &entry, (whose, quota), limit).await {
                    Ok(began) => taken.taken.push(((whose, quota), began)),
                    Err(error) => {
                        taken.give_back().await;
                        return Err(error);
                    }
                }
            }
        }
        Ok(taken)
    }

    async fn take_one(
        &self,
        tenant: TenantId,
        entry: &Tenant,
        slot: Slot,
        limit: u64,
    ) -> Result<DateTime<Utc>> {
        let (whose, quota) = slot;
        let seconds = window_s(quota).unwrap_or(1);
        // Whoever comes now waits for this answer, and most likely needs none of its own.
        let mut windows = entry.windows.lock().await;
        let now = Instant::now();
        if windows.len() >= MAX_WINDOWS {
            windows.retain(|_, window| !window.is_over(now));
        }
        let window = windows.entry(slot).or_default();
        let began = match window.take(1, limit, MOST_AHEAD, now) {
            Taken::Yes(began) => Some(began),
            Taken::No => None,
            Taken::Ask(want) => {
                let want = Want { whose, quota, window_s: seconds, limit, want, back: None };
                let grant = self.tenant(tenant).await?.take_quota(&want).await?;
                window.granted(&grant, 1, limit, now)
            }
        };
        began.ok_or_else(|| used_up(slot, limit, window, seconds))
    }

    /// Give back all tokens, before this server stops.
    pub(super) async fn give_back_tokens(&self) {
        let tenants: Vec<(TenantId, Arc<Tenant>)> = {
            let mut tenants = self.inner.quotas.tenants.lock().unwrap_or_else(PoisonError::into_inner);
            tenants.drain().collect()
        };
        let work = async {
            for (tenant, entry) in tenants {
                for ((whose, quota), window) in entry.windows.lock().await.drain() {
                    // Those of a second are gone before anybody could use them.
                    let left = window.left().filter(|_| quota != Quota::InvocationsPerSecond);
                    let Some(back) = left else { continue };
                    let want = Want {
                        whose,
                        quota,
                        window_s: window_s(quota).unwrap_or(1),
                        limit: 0,
                        want: 0,
                        back: Some(back),
                    };
                    self.tenant(tenant).await?.take_quota(&want).await?;
                }
            }
            Result::Ok(())
        };
        match tokio::time::timeout(GIVE_BACK, work).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "tokens of quotas were not given back"),
            Err(_) => tracing::warn!("giving tokens of quotas back took too long"),
        }
    }

    /// Whether this tenant may store one more module of this size. Uploads at the same time may pass the quota together.
    ///
    /// # Errors
    /// [`Error::OverQuota`]; or Postgres does not answer.
    pub(super) async fn admit_module(&self, tenant: TenantId, hash: &[u8; 32], bytes: u64) -> Result<()> {
        let known = self.quotas_of(tenant).await?;
        let bounds = (known.levels.bound(Quota::Modules), known.levels.bound(Quota::ModuleBytes));
        if bounds == (None, None) {
            return Ok(());
        }
        let mut connection = self.tenant(tenant).await?;
        if connection.has_module(hash).await? {
            return Ok(());
        }
        let Stored { modules, bytes: stored } = connection.stored().await?;
        for (quota, bound, wanted) in [
            (Quota::Modules, bounds.0, modules.saturating_add(1)),
            (Quota::ModuleBytes, bounds.1, stored.saturating_add(bytes)),
        ] {
            if let Some(limit) = bound.filter(|limit| wanted > *limit) {
                return Err(Error::OverQuota { name: quota.as_str(), limit, wanted });
            }
        }
        Ok(())
    }

    /// What this tenant may use, and what it does.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn quotas(&self, tenant: TenantId) -> Result<(Option<String>, Vec<Standing>)> {
        let mut connection = self.tenant(tenant).await?;
        let found = connection.quotas().await?;
        let levels = Levels { default: self.default_quotas(), plan: found.of_plan, tenant: found.of_tenant };
        let stored = connection.stored().await?;
        let mut standings = Vec::with_capacity(Quota::ALL.len());
        for quota in Quota::ALL.iter().copied() {
            let (amount, source) = levels.holds(quota);
            let mut resets_at = None;
            let used = match quota {
                Quota::InvocationsPerSecond
                | Quota::InvocationsPerDay
                | Quota::EgressRequestsPerDay
                | Quota::EgressBytesPerDay => match amount.bound() {
                    Some(limit) => {
                        let window_s = window_s(quota).unwrap_or(1);
                        let want = Want { whose: Whose::Tenant, quota, window_s, limit, want: 0, back: None };
                        let grant = connection.take_quota(&want).await?;
                        resets_at = Some(grant.window + TimeDelta::seconds(window_s.into()));
                        Some(grant.used)
                    }
                    None => None,
                },
                Quota::Modules => Some(stored.modules),
                Quota::ModuleBytes => Some(stored.bytes),
                Quota::LogBytesPerDay => Some(connection.log_bytes_today().await?),
                Quota::KvBytes => Some(connection.kv_bytes().await?),
                Quota::FuelPerDay
                | Quota::FuelPerMonth
                | Quota::CpuSecondsPerDay
                | Quota::CpuSecondsPerMonth => {
                    let spent = connection.spent(quota).await?;
                    resets_at = spent.map(|(_, ends_at)| ends_at);
                    spent.map(|(used, _)| used)
                }
                Quota::MemoryBytes => match amount.bound() {
                    Some(_) => Some(connection.memory_in_use().await?),
                    None => None,
                },
                Quota::QueueDepth
                | Quota::AttemptMemoryBytes
                | Quota::Concurrency
                | Quota::RetentionDays
                | Quota::Weight => None,
            };
            standings.push(Standing { quota, amount, source, used, resets_at });
        }
        Ok((found.plan, standings))
    }

    /// Change what a tenant may use. `plan`: another, or none.
    ///
    /// # Errors
    /// [`Error::InvalidFields`]; or Postgres does not answer.
    pub async fn change_quotas(
        &self,
        tenant: TenantId,
        plan: Option<Option<String>>,
        changes: &[Change],
    ) -> Result<()> {
        check(changes, |_| true)?;
        let defaults = self.defaults_of_queues();
        let changed = self
            .tenant(tenant)
            .await?
            .quotas_change(plan.as_ref().map(Option::as_deref), changes, &defaults)
            .await?;
        if !changed {
            let name = plan.flatten().unwrap_or_default();
            return Err(crate::app::invoke::invalid("/plan", format!("there is no plan `{name}`")));
        }
        self.forget(tenant);
        let mut after = json!({"tenant": tenant, "quotas": said(changes)});
        if let Some(plan) = &plan {
            after["plan"] = json!(plan);
        }
        audit::changed(Value::Null, after);
        Ok(())
    }

    /// What a tenant says of one of its tasks.
    ///
    /// # Errors
    /// No such task; or Postgres does not answer.
    pub async fn task_quotas(&self, tenant: TenantId, task: &TaskName) -> Result<Level> {
        let id = self.task(tenant, task).await?.id;
        let found = self.tenant(tenant).await?.quotas().await?;
        let said = found.of_tasks.into_iter().find(|(task, _)| *task == id);
        Ok(said.map(|(_, level)| level).unwrap_or_default())
    }

    /// Give a task shares of its tenant's quotas.
    ///
    /// # Errors
    /// No such task; [`Error::InvalidFields`]; [`Error::OverQuota`]; or Postgres does not answer.
    pub async fn change_task_quotas(
        &self,
        tenant: TenantId,
        task: &TaskName,
        changes: &[Change],
    ) -> Result<Level> {
        check(changes, Quota::of_tasks)?;
        let id = self.task(tenant, task).await?.id;
        let changed = self.tenant(tenant).await?.task_quotas_change(id, changes).await?;
        let level = changed.ok_or_else(|| full("task_shares", MAX_TASK_SHARES))?;
        self.forget(tenant);
        audit::changed(Value::Null, json!({"task": task, "quotas": level.to_json()}));
        Ok(level)
    }

    /// The plans of the platform.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn plans(&self) -> Result<Vec<PlanRow>> {
        Ok(self.inner.store.plans().await?)
    }

    /// Make a plan, or let one say something else.
    ///
    /// # Errors
    /// [`Error::InvalidFields`]; [`Error::OverQuota`]; or Postgres does not answer.
    pub async fn set_plan(&self, name: &TaskName, changes: &[Change]) -> Result<()> {
        check(changes, |_| true)?;
        let mut level = Level::default();
        for (quota, amount) in changes {
            level.set(*quota, *amount).map_err(|why| invalid(*quota, why))?;
        }
        if !self.inner.store.plan_put(name.as_str(), &level).await? {
            return Err(full("plans", MAX_PLANS));
        }
        audit::changed(Value::Null, json!({"plan": name, "quotas": level.to_json()}));
        Ok(())
    }

    /// The tenant with this name or id.
    ///
    /// # Errors
    /// There is none; or Postgres does not answer.
    pub async fn tenant_named(&self, name: &str) -> Result<TenantId> {
        let found = self.inner.store.tenant_named(name).await?;
        found.ok_or_else(|| Error::TenantNotFound(name.chars().take(64).collect()))
    }

    /// Forget what is out of date, as long as the application is there.
    pub(super) async fn keep_keys_short(inner: Weak<Inner>) {
        loop {
            tokio::time::sleep(IDLE).await;
            let Some(inner) = inner.upgrade() else { return };
            inner.quotas.forget_idle();
        }
    }

    /// What was changed here holds here at once.
    pub(super) fn forget(&self, tenant: TenantId) {
        let entry = self.inner.quotas.of(tenant);
        *entry.known.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn used_up((whose, quota): Slot, limit: u64, window: &Window, seconds: u32) -> Error {
    Error::QuotaExceeded {
        name: quota.as_str(),
        whose: whose.as_str(),
        limit,
        current: window.used().min(limit),
        resets_at: window.began().map(|began| began + TimeDelta::seconds(seconds.into())),
    }
}

pub(super) fn full(name: &'static str, most: i64) -> Error {
    let limit = most.unsigned_abs();
    Error::OverQuota { name, limit, wanted: limit + 1 }
}

fn invalid(quota: Quota, why: impl Into<String>) -> Error {
    crate::app::invoke::invalid(&format!("/quotas/{}", quota.as_str()), why)
}

/// Changes, for the audit log.
fn said(changes: &[Change]) -> Value {
    let pairs = changes.iter().map(|(quota, amount)| (quota.as_str().to_owned(), json!(amount)));
    Value::Object(pairs.collect())
}

/// Every change is one that may be made, of an amount that may be.
pub(super) fn check(changes: &[Change], may: impl Fn(Quota) -> bool) -> Result<()> {
    for (quota, amount) in changes {
        if !may(*quota) {
            return Err(invalid(*quota, "cannot be set here"));
        }
        Level::default().set(*quota, *amount).map_err(|why| invalid(*quota, why))?;
    }
    Ok(())
}
