//! How much of each tenant waits, and whether more may come. Counts in memory what this server admits, between samples
//! from Postgres; never refuses anything that was accepted.
//!
//! A sample is a count, bounded by the tenant's limit, of what waits in Postgres; a tenant is sampled about once a second
//! while it enqueues here, but never so often that counting takes more than a twentieth of the time. Between two samples
//! every server adds what it admits itself and does not know what others admit: several servers may pass the limit by
//! what they take in between two samples, and no further.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::app::{App, Error, Result};
use crate::domain::ids::TenantId;
use crate::store::queue::{Enqueued, NewInvocation};
use crate::store::{self, ApiStore};

/// Shortest time between two samples of a tenant.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// The next sample waits this many times as long as the last one took.
const SAMPLE_COST: u32 = 20;
/// A sample older than this says nothing: whoever comes waits for a new one.
const STALE_AFTER: Duration = Duration::from_secs(60);
/// Tenants remembered; the longest unused are forgotten first.
const MAX_TENANTS: usize = 10_000;
/// What a refused caller is told to wait: by then the next sample is there.
pub const RETRY_AFTER_S: u32 = 1;

/// What is known of each tenant that enqueues here.
#[derive(Debug, Default)]
pub struct Depths {
    tenants: Mutex<HashMap<TenantId, Arc<Depth>>>,
}

#[derive(Debug, Default)]
struct Depth {
    state: Mutex<Known>,
    sampled: Notify,
}

#[derive(Debug, Default, Clone, Copy)]
struct Known {
    /// Waiting in Postgres at the last sample, counted up to the limit.
    counted: u64,
    limit: u64,
    /// When the last sample was begun; `None`: never.
    at: Option<Instant>,
    /// No sample before this.
    next: Option<Instant>,
    sampling: bool,
    /// Admitted here, ever.
    admitted: u64,
    /// Of those, the ones whose enqueueing is over, one way or the other.
    settled: u64,
    /// `settled` when the last sample was begun: those are in its count.
    settled_at_sample: u64,
    used: Option<Instant>,
}

impl Known {
    /// What waits now, as far as this server knows: too much rather than too little.
    fn current(&self) -> u64 {
        self.counted.saturating_add(self.admitted - self.settled_at_sample)
    }

    fn is_fresh(&self, now: Instant) -> bool {
        self.at.is_some_and(|at| now.saturating_duration_since(at) < STALE_AFTER)
    }

    /// Whether it is time to sample; if so, the caller has to.
    fn begin(&mut self, now: Instant) -> bool {
        if self.sampling || self.next.is_some_and(|next| now < next) {
            return false;
        }
        self.sampling = true;
        true
    }

    fn finish(&mut self, began: Instant, settled: u64, took: Duration, sample: Option<(u64, u64)>) {
        self.sampling = false;
        self.next = Some(began + SAMPLE_EVERY.max(took * SAMPLE_COST));
        if let Some((counted, limit)) = sample {
            (self.counted, self.limit, self.at) = (counted, limit, Some(began));
            self.settled_at_sample = settled;
        }
    }
}

impl Depth {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Depths {
    fn of(&self, tenant: TenantId) -> Arc<Depth> {
        let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        if tenants.len() >= MAX_TENANTS && !tenants.contains_key(&tenant) {
            let oldest = tenants.iter().min_by_key(|(_, depth)| depth.lock().used).map(|(tenant, _)| *tenant);
            oldest.map(|tenant| tenants.remove(&tenant));
        }
        Arc::clone(tenants.entry(tenant).or_default())
    }
}

/// The right to enqueue some invocations. Dropped when they are enqueued, or will not be.
#[derive(Debug)]
struct Admitted {
    depth: Arc<Depth>,
    count: u64,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.depth.lock().settled += self.count;
    }
}

impl App {
    /// Queue an invocation if there is room for it; durable on return. The one way into the flusher; submissions come
    /// by [`App::enqueue_within_quota`].
    ///
    /// # Errors
    /// [`Error::QueueFull`]; or what the flusher refuses.
    pub(super) async fn enqueue(&self, row: NewInvocation) -> Result<Enqueued> {
        let admitted = self.admit(row.tenant, 1).await?;
        let queued = self.inner.flusher.enqueue(row).await;
        drop(admitted);
        Ok(queued?)
    }

    /// Admit `count` more invocations of this tenant, all or none, if that keeps what waits within its limit.
    ///
    /// # Errors
    /// [`Error::QueueFull`]; or Postgres does not answer and nothing is known of this tenant.
    async fn admit(&self, tenant: TenantId, count: u64) -> Result<Admitted> {
        let depth = self.inner.depths.of(tenant);
        loop {
            let now = Instant::now();
            let wait = depth.sampled.notified();
            let (fresh, sample) = {
                let mut known = depth.lock();
                known.used = Some(now);
                (known.is_fresh(now), known.begin(now))
            };
            if sample {
                let work =
                    sample_now(self.inner.store.clone(), tenant, Arc::clone(&depth), self.default_depth());
                if fresh {
                    // Nobody waits for it: what was known, and what came since, is good for this one.
                    tokio::spawn(work);
                } else {
                    work.await?;
                }
            } else if !fresh {
                // Somebody else samples; or has just failed to, and it is too early to try again.
                let sampling = depth.lock().sampling;
                if !sampling {
                    return Err(Error::Unavailable(anyhow::anyhow!(
                        "what waits of this tenant is not known"
                    )));
                }
                let _ = tokio::time::timeout(SAMPLE_EVERY, wait).await;
                continue;
            }
            let mut known = depth.lock();
            let (current, limit) = (known.current(), known.limit);
            if current.saturating_add(count) > limit {
                return Err(Error::QueueFull { limit, current: current.min(limit) });
            }
            known.admitted += count;
            drop(known);
            return Ok(Admitted { depth: Arc::clone(&depth), count });
        }
    }

    fn default_depth(&self) -> u64 {
        self.inner.settings.max_queued
    }
}

async fn sample_now(
    store: ApiStore,
    tenant: TenantId,
    depth: Arc<Depth>,
    default: u64,
) -> std::result::Result<(), store::Error> {
    let began = Instant::now();
    let settled = depth.lock().settled;
    let sample = async { store.tenant(tenant).await?.queue_depth(default).await }.await;
    if let Err(error) = &sample {
        tracing::debug!(%tenant, %error, "cannot count what waits; going by the last count");
    }
    depth.lock().finish(began, settled, began.elapsed(), sample.as_ref().ok().copied());
    depth.sampled.notify_waiters();
    sample.map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_on_its_way_during_a_sample_is_counted_and_what_is_in_it_not_twice() {
        let now = Instant::now();
        let mut known = Known::default();
        assert!(!known.is_fresh(now) && known.begin(now));
        assert!(!known.begin(now), "one sample at a time");
        // Ten were enqueued before it began, five are on their way.
        (known.admitted, known.settled) = (15, 10);
        known.finish(now, 10, Duration::from_millis(1), Some((10, 100)));
        assert_eq!(known.current(), 15);
        assert!(known.is_fresh(now + STALE_AFTER / 2) && !known.is_fresh(now + STALE_AFTER));
        assert!(!known.begin(now + SAMPLE_EVERY / 2) && known.begin(now + SAMPLE_EVERY));
    }

    #[test]
    fn counting_never_takes_more_than_a_twentieth_of_the_time() {
        let now = Instant::now();
        let mut known = Known::default();
        assert!(known.begin(now));
        known.finish(now, 0, Duration::from_millis(500), Some((0, 1)));
        assert!(!known.begin(now + Duration::from_millis(9_999)));
        assert!(known.begin(now + Duration::from_secs(10)));
    }

    proptest! {
        /// Against the truth: rows are admitted, then become visible, and a sample sees those that are.
        #[test]
        fn one_server_alone_never_believes_in_less_than_there_is(steps in prop::collection::vec(0u8..4, 1..200)) {
            let now = Instant::now();
            let mut known = Known::default();
            let (mut in_flight, mut visible) = (0u64, 0u64);
            let mut sampling: Option<u64> = None;
            for step in steps {
                match step {
                    0 => { known.admitted += 1; in_flight += 1; }
                    1 if in_flight > 0 => { in_flight -= 1; visible += 1; known.settled += 1; }
                    2 if sampling.is_none() => sampling = Some(known.settled),
                    3 => if let Some(settled) = sampling.take() {
                        known.finish(now, settled, Duration::ZERO, Some((visible, u64::MAX)));
                    },
                    _ => {}
                }
                prop_assert!(known.current() >= visible + in_flight);
            }
        }
    }
}
