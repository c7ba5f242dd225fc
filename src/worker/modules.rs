//! Compiled code for cells: from the disk cache, or compiled here from the stored module. Owns no cache of its own
//! beyond the compiler's.

use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use sandbar_host::artifact::Artifact;
use sandbar_host::{ArtifactError, Compiler};

use sandbar_host::ModuleHash;

use crate::domain::ids::TenantId;
use crate::store::WorkerStore;

/// Where a worker gets compiled code from.
pub struct Modules {
    compiler: Arc<Compiler>,
    store: WorkerStore,
}

impl Modules {
    /// Over a compiler with its cache, and the store that has the modules.
    pub fn new(compiler: Arc<Compiler>, store: WorkerStore) -> Self {
        Self { compiler, store }
    }

    /// The compiled form of a tenant's module; where it has to be compiled, when it is the tenant's turn on this host.
    ///
    /// # Errors
    /// In words for operators: the module is gone, the database is away, or it does not compile on this host.
    pub async fn artifact(&self, tenant: TenantId, hash: ModuleHash) -> anyhow::Result<Artifact> {
        let fetch = || async move {
            let bytes = self.store.module_bytes(tenant, hash.as_bytes()).await?;
            bytes.map(Bytes::from).with_context(|| format!("module {hash} is not stored"))
        };
        match self.compiler.artifact(tenant.0.as_u128(), &hash, fetch).await {
            Ok(artifact) => Ok(artifact),
            Err(ArtifactError::Fetch(error)) => Err(error),
            Err(error) => Err(anyhow!("{error}")),
        }
    }
}
