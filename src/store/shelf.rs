//! Connections between two uses by the same tenant: they keep their setting, so that the next use costs no round trip to
//! set it. Owns which connection goes to whom while it is not with the pool; never hands one out under another tenant's
//! setting. The pool gets back whatever it may need: see [`Shelf::put`].

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::{Connection, PgPool, Postgres};

use crate::domain::ids::TenantId;

/// A connection that was used this recently is taken to be alive; one that lay longer shows it by setting its tenant anew.
const HOT: Duration = Duration::from_secs(1);
/// One that lay longer goes back to the pool when somebody looks.
const LONGEST: Duration = Duration::from_secs(30);
/// What a connection gets to finish what its last user may have left under way.
const PATIENCE: Duration = Duration::from_secs(5);

/// At most half of a pool's connections. Cheap to clone; clones share them.
#[derive(Debug, Clone)]
pub(super) struct Shelf {
    pool: PgPool,
    /// The longest here first.
    kept: Arc<Mutex<VecDeque<Kept>>>,
    /// When one of them turned out to be dead.
    died_at: Arc<Mutex<Option<Instant>>>,
    capacity: usize,
}

#[derive(Debug)]
struct Kept {
    connection: PoolConnection<Postgres>,
    tenant: TenantId,
    since: Instant,
}

impl Shelf {
    pub(super) fn of(pool: &PgPool) -> Self {
        let capacity = pool.options().get_max_connections() as usize / 2;
        Self { pool: pool.clone(), kept: Arc::default(), died_at: Arc::default(), capacity }
    }

    /// One that is set to this tenant. Since `failed_at`, or since one of them was found dead, none that was here before is
    /// taken to be alive: a Postgres that was away has left as many dead ones as there are.
    pub(super) fn set_to(
        &self,
        tenant: TenantId,
        failed_at: Option<Instant>,
    ) -> Option<PoolConnection<Postgres>> {
        let failed_at = failed_at.max(*self.died_at.lock().unwrap_or_else(PoisonError::into_inner));
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
                *shelf.died_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
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
