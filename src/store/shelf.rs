//! Connections between two uses by the same tenant: they keep their setting, so that the next use costs no round trip to
//! set it. Owns which connection goes to whom while it is not with the pool; never hands one out under another tenant's
//! setting. The pool gets back whatever it may need: see [`Shelf::put`].

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use sqlx::pool::PoolConnection;
use sqlx::{Connection, PgPool, Postgres};

use crate::domain::ids::TenantId;

/// A connection that was used this recently is taken to be alive; one that lay longer shows it by setting its tenant anew.
const HOT: Duration = Duration::from_secs(1);
/// One that lay longer goes back to the pool when somebody looks.
const LONGEST: Duration = Duration::from_secs(30);
/// What a connection gets to finish what its last user may have left under way.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks a new connection when its Postgres began.
pub(super) const STARTED: &str = "SELECT pg_postmaster_start_time()";

/// When Postgres was last found to be another than before: connections from before are dead, though for a request or two a
/// backend may outlive its postmaster, and look alive.
#[derive(Debug, Clone, Default)]
pub(super) struct Restarts(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    started: Option<DateTime<Utc>>,
    at: Option<Instant>,
}

impl Restarts {
    /// A new connection is to a Postgres that began then.
    pub(super) fn note(&self, started: DateTime<Utc>) {
        let mut seen = self.lock();
        if seen.started.replace(started).is_some_and(|before| before != started) {
            seen.at = Some(Instant::now());
        }
    }

    /// A connection was found dead.
    fn one_died(&self) {
        self.lock().at = Some(Instant::now());
    }

    fn seen_at(&self) -> Option<Instant> {
        self.lock().at
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// At most half of a pool's connections. Cheap to clone; clones share them.
#[derive(Debug, Clone)]
pub(super) struct Shelf {
    pool: PgPool,
    /// The longest here first.
    kept: Arc<Mutex<VecDeque<Kept>>>,
    restarts: Restarts,
    capacity: usize,
}

#[derive(Debug)]
struct Kept {
    connection: PoolConnection<Postgres>,
    tenant: TenantId,
    since: Instant,
}

impl Shelf {
    pub(super) fn of(pool: &PgPool, restarts: Restarts) -> Self {
        let capacity = pool.options().get_max_connections() as usize / 2;
        Self { pool: pool.clone(), kept: Arc::default(), restarts, capacity }
    }

    /// One that is set to this tenant. Since `failed_at`, since one of them was found dead, and since a new connection met a
    /// Postgres that had started anew, none that was here before is
    /// taken to be alive: a Postgres that was away has left as many dead ones as there are.
    pub(super) fn set_to(
        &self,
        tenant: TenantId,
        failed_at: Option<Instant>,
    ) -> Option<PoolConnection<Postgres>> {
        let failed_at = failed_at.max(self.restarts.seen_at());
        let alive = |one: &Kept| one.since.elapsed() < HOT && failed_at.is_none_or(|at| one.since > at);
        let mut kept = self.lock();
        // The last one used has the warmest plans.
        let index = kept.iter().rposition(|one| one.tenant == tenant && alive(one))?;
        kept.remove(index).map(|one| one.connection)
    }

    /// One to set to another tenant: of the pool as long as it has some, or else the one that lay here longest.
    pub(super) async fn any(&self) -> sqlx::Result<PoolConnection<Postgres>> {
        let idle = {
            let mut kept = self.lock();
            while kept.front().is_some_and(|one| one.since.elapsed() > LONGEST) {
                kept.pop_front();
            }
            if kept.len() >= self.capacity || !self.pool_serves() { kept.pop_front() } else { None }
        };
        match idle {
            Some(one) => Ok(one.connection),
            None => self.pool.acquire().await,
        }
    }

    /// After use: here, if the pool needs it not, or else to the pool, which resets the tenant. Whatever was left under
    /// way (a request that was given up, a transaction to roll back) ends first.
    pub(super) fn put(&self, mut connection: PoolConnection<Postgres>, tenant: TenantId) {
        let shelf = self.clone();
        tokio::spawn(async move {
            let settled = tokio::time::timeout(PATIENCE, connection.ping()).await;
            if !matches!(settled, Ok(Ok(()))) {
                shelf.restarts.one_died();
                return;
            }
            // Somebody may wait for the pool: then it is not for us to keep.
            if !shelf.pool_serves() || shelf.pool.is_closed() {
                return;
            }
            let mut kept = shelf.lock();
            let too_many = if kept.len() >= shelf.capacity { kept.pop_front() } else { None };
            if shelf.capacity > 0 {
                kept.push_back(Kept { connection, tenant, since: Instant::now() });
            }
            drop(kept);
            drop(too_many);
        });
    }

    /// Give all of them to the pool.
    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.lock());
        drop(all);
    }

    /// Whether nobody waits for a connection of the pool.
    fn pool_serves(&self) -> bool {
        self.pool.num_idle() > 0 || self.pool.size() < self.pool.options().get_max_connections()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
