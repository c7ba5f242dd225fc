//! Uploaded modules become ready or rejected. One version at a time, leased in its own row, compiled in a child
//! process; whoever dies over it leaves the row to be taken again. Tenants take turns (`store::compilation`).

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use sandbar_host::ModuleHash;
use sandbar_host::{ArtifactError, Compiler};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::app::signals::Signals;
use crate::store::compilation::ToCompile;
use crate::store::{Result, WorkerStore};

/// How long others leave a version alone that somebody compiles; the store adds what its size adds to the limits.
/// More than a compilation may take in all by default.
const LEASE: Duration = Duration::from_secs(120);
/// How long a version waits whose compilation failed on our side.
const LATER: Duration = Duration::from_secs(5);
/// How often to look when nothing was heard.
const POLL: Duration = Duration::from_secs(2);

/// Compile what waits until told to stop; of one tenant `of_one_tenant` at once, over all servers.
pub async fn run(
    store: WorkerStore,
    compiler: Arc<Compiler>,
    signals: Arc<Signals>,
    of_one_tenant: u32,
    stop: CancellationToken,
) {
    while !stop.is_cancelled() {
        match store.version_to_compile(LEASE, of_one_tenant).await {
            Ok(Some(version)) => {
                if let Err(error) = one(&store, &compiler, &signals, &version).await {
                    warn!(%error, "a version is left for later");
                }
                continue;
            }
            Ok(None) => {}
            Err(error) => warn!(%error, "cannot look for versions to compile"),
        }
        tokio::select! {
            () = signals.compile.notified() => {}
            () = tokio::time::sleep(POLL) => {}
            () = stop.cancelled() => {}
        }
    }
}

async fn one(store: &WorkerStore, compiler: &Compiler, signals: &Signals, version: &ToCompile) -> Result<()> {
    let hash = ModuleHash::from_bytes(version.sha256);
    let fetch = || async move {
        let bytes = store.module_bytes(version.tenant, &version.sha256).await?;
        bytes.map(Bytes::from).with_context(|| format!("module {hash} is not stored"))
    };
    match compiler.artifact(version.tenant.0.as_u128(), &hash, fetch).await {
        Ok(_) => {
            store.version_ready(version.tenant, version.task, version.number).await?;
            info!(task = %version.task, version = version.number, "version ready");
        }
        Err(ArtifactError::Rejected(rejection)) => {
            info!(task = %version.task, version = version.number, %rejection, "version rejected");
            store.version_rejected(version.tenant, version.task, version.number, &rejection).await?;
        }
        // Ours to mend, or this machine was too busy.
        Err(error) => {
            warn!(task = %version.task, version = version.number, %error, "compilation failed on our side");
            store.version_later(version, LATER).await?;
        }
    }
    signals.version_changed();
    Ok(())
}
