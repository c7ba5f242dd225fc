//! Compiled code on demand: the cache in front of the compile child.
//! One compilation per module and tenant at a time, few in all and fewer of one tenant, which take turns, so that
//! neither the machine nor a neighbour is starved.

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::artifact::{Artifact, ArtifactCache};
use crate::compile::{CompileError, CompileLimits, compile};
use crate::inspect::Rejection;
use crate::module::ModuleHash;
use crate::turns::Turns;
use bytes::Bytes;

/// An artifact could not be had. `E` is the error of the caller's fetch.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError<E> {
    /// The module's bytes could not be fetched.
    #[error("the module cannot be fetched: {0}")]
    Fetch(E),
    /// What was fetched is another module.
    #[error("the fetched bytes have the hash {found}, not {wanted}")]
    WrongBytes {
        /// Asked for.
        wanted: ModuleHash,
        /// Got.
        found: ModuleHash,
    },
    /// The module is not acceptable.
    #[error(transparent)]
    Rejected(Rejection),
    /// This machine failed.
    #[error("compiling failed: {0}")]
    Host(String),
}

/// Most compilations at once, whatever is asked for.
const MAX_PARALLEL: usize = 64;

/// Compiles and caches.
pub struct Compiler {
    program: PathBuf,
    limits: CompileLimits,
    cache: Arc<ArtifactCache>,
    turns: Arc<Turns>,
    flights: Flights,
}

impl Compiler {
    /// Compiles with children of `program`, `parallel` of them at the same time (1 to 64), also when all are for one
    /// tenant.
    #[must_use]
    pub fn new(program: PathBuf, limits: CompileLimits, cache: Arc<ArtifactCache>, parallel: usize) -> Self {
        let turns = Turns::new(parallel.min(MAX_PARALLEL), MAX_PARALLEL);
        Self { program, limits, cache, turns, flights: Mutex::default() }
    }

    /// At most so many at the same time for one tenant (at least 1).
    #[must_use]
    pub fn of_one_tenant(self, at_once: usize) -> Self {
        Self { turns: Turns::new(self.turns.at_once, at_once), ..self }
    }

    /// The artifact of `hash`: from the cache, or compiled from what `fetch` gives when it is `tenant`'s turn; so only
    /// what is being compiled is in memory. Callers that ask for the same module of a tenant at the same time share one
    /// compilation; another tenant's caller does not wait for their turn.
    ///
    /// # Errors
    /// See [`ArtifactError`]. A rejection is not remembered: the caller should.
    pub async fn artifact<E, F>(
        &self,
        tenant: u128,
        hash: &ModuleHash,
        fetch: impl FnOnce() -> F + Send,
    ) -> Result<Artifact, ArtifactError<E>>
    where
        F: Future<Output = Result<Bytes, E>> + Send,
    {
        if let Some(artifact) = self.cached(hash).await? {
            return Ok(artifact);
        }
        let flight = self.flight(tenant, hash);
        let _first = flight.turn.lock().await;
        self.build(tenant, hash, fetch).await
    }

    async fn build<E, F>(
        &self,
        tenant: u128,
        hash: &ModuleHash,
        fetch: impl FnOnce() -> F + Send,
    ) -> Result<Artifact, ArtifactError<E>>
    where
        F: Future<Output = Result<Bytes, E>> + Send,
    {
        let stopped = || ArtifactError::Host("the compiler is gone".to_owned());
        let turn = self.turns.take(tenant).await.ok_or_else(stopped)?;
        // Somebody else may have had it compiled in the meantime.
        if let Some(artifact) = self.cached(hash).await? {
            return Ok(artifact);
        }
        let bytes = fetch().await.map_err(ArtifactError::Fetch)?;
        let found = ModuleHash::of(&bytes);
        if found != *hash {
            return Err(ArtifactError::WrongBytes { wanted: *hash, found });
        }
        let artifact = match compile(&self.program, bytes, &self.limits).await {
            Ok(artifact) => Bytes::from(artifact),
            Err(CompileError::Rejected(rejection)) => {
                return Err(ArtifactError::Rejected(rejection));
            }
            Err(CompileError::Host(err)) => return Err(ArtifactError::Host(err.to_string())),
        };
        drop(turn);
        let (cache, key, stored) = (self.cache.clone(), *hash, artifact.clone());
        let put = tokio::task::spawn_blocking(move || cache.put(&key, &stored)).await;
        // Code that cannot be cached can still be run.
        match put {
            Ok(Ok(())) => {}
            Ok(Err(err)) => tracing::warn!(%hash, error = %err, "compiled code is not cached"),
            Err(err) => tracing::warn!(%hash, error = %err, "compiled code is not cached"),
        }
        Ok(Artifact::trusted(*hash, artifact))
    }

    async fn cached<E>(&self, hash: &ModuleHash) -> Result<Option<Artifact>, ArtifactError<E>> {
        let (cache, key) = (self.cache.clone(), *hash);
        tokio::task::spawn_blocking(move || cache.get(&key))
            .await
            .map_err(|err| ArtifactError::Host(err.to_string()))
    }

    fn flight(&self, tenant: u128, hash: &ModuleHash) -> Flight<'_> {
        let of = (tenant, *hash);
        let turn = self.flights.lock().unwrap_or_else(PoisonError::into_inner).entry(of).or_default().clone();
        Flight { flights: &self.flights, of, turn }
    }
}

type Flights = Mutex<HashMap<(u128, ModuleHash), Arc<tokio::sync::Mutex<()>>>>;

/// One caller's place in the queue for a module; the last one to leave removes the queue.
struct Flight<'a> {
    flights: &'a Flights,
    of: (u128, ModuleHash),
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        // The map's own and this one.
        if Arc::strong_count(&self.turn) <= 2 {
            flights.remove(&self.of);
        }
    }
}
