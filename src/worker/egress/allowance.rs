//! What tenants may still send by HTTP today: tokens of `egress_requests_per_day` and `egress_bytes_per_day`, which this
//! worker takes from Postgres some at a time, for the tenant and for the share that its task may have. No day's quota is
//! passed, however many workers there are; a worker that is killed takes what it holds with it until midnight (UTC).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sandbar_host::egress::call::{Code, Refusal};
use tracing::warn;

use crate::domain::ids::{TaskId, TenantId};
use crate::domain::quota::{Defaults, Quota};
use crate::domain::tokens::{Taken, Window};
use crate::store::WorkerStore;
use crate::store::quota::Whose;

/// That there is no bound is believed for so long.
const UNBOUNDED_FOR: Duration = Duration::from_secs(2);
/// Requests that are taken ahead at the most.
const MOST_REQUESTS: u64 = 1_000;
/// Bytes that are taken ahead at the most.
const MOST_BYTES: u64 = 16 << 20;
/// Counts remembered; beyond it, those are forgotten that hold no tokens.
const MAX_COUNTS: usize = 20_000;
/// Longest time for giving tokens back when the worker stops.
const GIVE_BACK: Duration = Duration::from_secs(2);

type Slot = (TenantId, Whose, Quota);

/// Why something is not sent.
#[derive(Debug, Clone)]
pub enum Short {
    /// A quota of the day is used up.
    UsedUp {
        /// Which one.
        quota: Quota,
        /// Whose: `tenant` or `task`.
        whose: &'static str,
        /// How much there is in a day.
        bound: u64,
    },
    /// It cannot be counted now.
    Unknown,
}

impl Short {
    /// As a guest hears it.
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::UsedUp { quota, whose, bound } => Refusal::new(
                Code::HttpRequestDenied,
                format!(
                    "the {whose}'s quota {} of {bound} is used up until midnight (UTC); the platform can raise it",
                    quota.as_str()
                ),
            ),
            Self::Unknown => Refusal::new(Code::InternalError, "what is sent cannot be counted now"),
        }
    }
}

#[derive(Debug, Default)]
struct Count {
    window: Window,
    /// The bound, when last heard; `None`: there was none.
    bound: Option<u64>,
    /// Until then, there is no bound.
    unbounded_until: Option<Instant>,
}

/// What this worker holds of its tenants' days.
pub struct Allowance {
    store: WorkerStore,
    defaults: Arc<Defaults>,
    counts: Mutex<HashMap<Slot, Arc<tokio::sync::Mutex<Count>>>>,
}

impl Allowance {
    /// Nothing held. `defaults`: what holds of tenants of whom nothing is said.
    pub fn new(store: WorkerStore, defaults: Arc<Defaults>) -> Self {
        Self { store, defaults, counts: Mutex::default() }
    }

    /// Take `n` of a quota, of the task's share and of the tenant, all or nothing.
    ///
    /// # Errors
    /// One of them has not so many left today, or Postgres does not answer.
    pub async fn take(&self, (tenant, task): (TenantId, TaskId), quota: Quota, n: u64) -> Result<(), Short> {
        self.take_one((tenant, Whose::Task(task), quota), n).await?;
        let of_tenant = self.take_one((tenant, Whose::Tenant, quota), n).await;
        if of_tenant.is_err() {
            self.put_back_one((tenant, Whose::Task(task), quota), n).await;
        }
        of_tenant
    }

    /// Put back what was taken for something that was not done.
    pub async fn put_back(&self, (tenant, task): (TenantId, TaskId), quota: Quota, n: u64) {
        self.put_back_one((tenant, Whose::Task(task), quota), n).await;
        self.put_back_one((tenant, Whose::Tenant, quota), n).await;
    }

    fn count(&self, slot: Slot) -> Arc<tokio::sync::Mutex<Count>> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.len() >= MAX_COUNTS && !counts.contains_key(&slot) {
            counts.retain(|_, count| {
                Arc::strong_count(count) > 1
                    || count.try_lock().is_ok_and(|count| count.window.left().is_some())
            });
            if counts.len() >= MAX_COUNTS {
                counts.clear();
            }
        }
        Arc::clone(counts.entry(slot).or_default())
    }

    async fn take_one(&self, slot: Slot, n: u64) -> Result<(), Short> {
        let (_, whose, quota) = slot;
        let count = self.count(slot);
        // Whoever comes while Postgres is asked waits for its answer, and most likely needs none of its own.
        let mut count = count.lock().await;
        let now = Instant::now();
        if count.unbounded_until.is_some_and(|until| now < until) {
            return Ok(());
        }
        let most = if quota == Quota::EgressBytesPerDay { MOST_BYTES } else { MOST_REQUESTS };
        // Of a bound that is not known yet only what is needed.
        let known = count.bound.unwrap_or(0);
        let ask = match count.window.take(n, known, most, now) {
            Taken::Yes(_) => return Ok(()),
            Taken::No => return Err(used_up(quota, whose, known)),
            Taken::Ask(ask) => ask,
        };
        let default = self.defaults.bound(quota);
        let answer = self.store.take_quota_per_day(slot, default, ask, None).await.map_err(|error| {
            warn!(%error, quota = quota.as_str(), "what guests send cannot be counted");
            Short::Unknown
        })?;
        let Some((bound, grant)) = answer else {
            *count = Count { unbounded_until: Some(now + UNBOUNDED_FOR), ..Count::default() };
            return Ok(());
        };
        (count.bound, count.unbounded_until) = (Some(bound), None);
        let taken = count.window.granted(&grant, n, bound, now);
        taken.map(|_| ()).ok_or_else(|| used_up(quota, whose, bound))
    }

    async fn put_back_one(&self, slot: Slot, n: u64) {
        let count = self.count(slot);
        let mut count = count.lock().await;
        // What had no bound was not counted; a window that is over takes its tokens with it.
        if let Some(began) = count.window.began().filter(|_| !count.window.is_over(Instant::now())) {
            count.window.put_back(n, began);
        }
    }

    /// Give back all tokens, before this worker stops.
    pub async fn give_back(&self) {
        let counts: Vec<_> = {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            counts.drain().collect()
        };
        let work = async {
            for (slot, count) in counts {
                let count = count.lock().await;
                if let back @ Some(_) = count.window.left() {
                    self.store.take_quota_per_day(slot, self.defaults.bound(slot.2), 0, back).await?;
                }
            }
            crate::store::Result::Ok(())
        };
        match tokio::time::timeout(GIVE_BACK, work).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "what guests may send was not given back"),
            Err(_) => warn!("giving back what guests may send took too long"),
        }
    }
}

fn used_up(quota: Quota, whose: Whose, bound: u64) -> Short {
    Short::UsedUp { quota, whose: whose.as_str(), bound }
}
