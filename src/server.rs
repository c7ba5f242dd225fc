//! Roles put together in one process, and taken apart in order. Owns start, stop and signals; no rule of any role.

mod exports;
mod http;
mod reload;
mod tls;
mod vault;

pub use exports::open as open_export;
pub use tls::local_certificate;
pub use vault::{make as make_master_key, rewrap};

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use base64::Engine as _;
use sandbar_host::Compiler;
use sandbar_host::artifact::{ArtifactCache, ArtifactKey};
use sandbar_host::compile::CompileLimits;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use crate::app::sealed::keys::Keys;
use crate::app::signals::Signals;
use crate::config::{Config, Secret};
use crate::domain::isolation::Rules;
use crate::domain::quota::Defaults;
use crate::store::{Connect, WorkerStore, patiently};
use crate::worker::Stop;
use crate::{app, scheduler, worker};
use http::Http;

/// File in the data directory with the address of the API while it runs: how commands find it without being told.
pub const ADDRESS_FILE: &str = "address";

/// The certificate that `sandbar dev --tls` makes, in the data directory: commands on this machine trust it.
pub const LOCAL_CERTIFICATE: &str = "tls/cert.pem";

/// What this process does.
#[derive(Debug, Clone, Copy)]
pub struct Roles {
    /// API and scheduler.
    pub server: bool,
    /// Attempts.
    pub worker: bool,
}

/// How each database role is reached.
#[derive(Debug, Clone)]
pub struct Urls {
    /// As `sandbar_api`.
    pub api: Secret,
    /// As `sandbar_worker`.
    pub worker: Secret,
}

/// Run the roles until told to stop.
///
/// # Errors
/// Postgres cannot be reached within `database.start_timeout_ms`, the address is taken, or cells cannot be started.
pub async fn run(config: &Config, urls: &Urls, roles: Roles, stop: Stop) -> anyhow::Result<()> {
    let signals = Arc::new(Signals::default());
    let vault = vault::load(config).await?;
    let store = patiently(config.database.start_timeout(), async || {
        WorkerStore::connect(&connect(config, &urls.worker))
            .await
            .context("cannot connect to Postgres as sandbar_worker")
    })
    .await?;
    let compiler = Arc::new(compiler(config)?);
    let keys = Arc::new(Keys::new(store.clone(), Arc::clone(&vault)));

    let duties_stop = CancellationToken::new();
    let mut duties = Vec::new();
    let mut http = None;
    if roles.server {
        let started = Http::start(config, urls, vault.clone(), signals.clone(), stop.drain.clone()).await?;
        let settings = scheduler::Settings {
            tick: config.scheduler.tick(),
            dead_after: config.worker.dead_after(),
            max_handovers: i32::try_from(config.scheduler.max_handovers)?,
            retention_days: i32::try_from(config.scheduler.retention_days)?,
            export_dir: config.scheduler.export_dir.clone(),
        };
        duties.push(tokio::spawn(scheduler::run(
            settings,
            (store.clone(), Arc::clone(&keys)),
            started.app(),
            signals.clone(),
            duties_stop.clone(),
        )));
        duties.push(tokio::spawn(scheduler::starts(
            store.clone(),
            started.app(),
            signals.clone(),
            duties_stop.clone(),
        )));
        for _ in 0..config.compile.parallel {
            let (store, compiler) = (store.clone(), compiler.clone());
            duties.push(tokio::spawn(scheduler::compile(
                store,
                compiler,
                signals.clone(),
                config.compile.parallel_per_tenant,
                duties_stop.clone(),
            )));
        }
        http = Some(started);
    }
    let defaults = Arc::new(Defaults::new(http::quotas(&config.quotas)));
    let app = http.as_ref().map(Http::app);
    duties.push(reload::on_hangup(config, app, defaults.clone(), duties_stop.clone())?);

    let result = if roles.worker {
        let settings = worker_settings(config, roles, vault, defaults)?;
        // On the runtime's own threads: the thread that waits for a role is woken by the kernel for each event.
        let running =
            worker::run(settings, store.clone(), signals.clone(), compiler.clone(), keys, stop.clone());
        let running = AbortOnDropHandle::new(tokio::spawn(running));
        let running = async { running.await.context("the worker panicked")? };
        if let Some(http) = &mut http {
            tokio::select! {
                result = running => result,
                result = http.failed(&stop.drain) => result,
            }
        } else {
            running.await
        }
    } else if let Some(http) = &mut http {
        tokio::select! {
            () = stop.drain.cancelled() => Ok(()),
            () = stop.now.cancelled() => Ok(()),
            result = http.failed(&stop.drain) => result,
        }
    } else {
        Ok(())
    };

    stop.drain.cancel(); // also when a role failed: the others stop too
    if let Some(http) = http {
        http.finish().await;
    }
    duties_stop.cancel();
    for duty in duties {
        let _ = tokio::time::timeout(Duration::from_secs(5), duty).await;
    }
    let _ = tokio::time::timeout(Duration::from_secs(5), store.close()).await;
    info!("stopped");
    result
}

fn connect(config: &Config, url: &Secret) -> Connect {
    Connect {
        url: url.expose().to_owned(),
        max_connections: config.database.max_connections,
        acquire_timeout: config.database.acquire_timeout(),
        statement_timeout: config.database.statement_timeout(),
    }
}

fn compiler(config: &Config) -> anyhow::Result<Compiler> {
    let dir = config.data_dir.join("artifacts");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let key = ArtifactKey::load_or_create(&config.data_dir.join("artifact.key"))
        .context("cannot read or make the key that authenticates compiled modules")?;
    let cache = ArtifactCache::open(&dir, key, config.compile.cache_bytes)
        .context("cannot open the cache of compiled modules")?;
    let limits = CompileLimits {
        address_space_bytes: config.compile.address_space_bytes,
        cpu_seconds: config.compile.cpu_seconds,
        wall: config.compile.wall(),
        require_walls: config.worker.walls(),
        ..CompileLimits::default()
    };
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let compiler = Compiler::new(program, limits, Arc::new(cache), config.compile.parallel as usize);
    Ok(compiler.of_one_tenant(config.compile.parallel_per_tenant as usize))
}

/// The part of a worker's connections that calls of guests may use.
const CAPABILITY_CONNECTIONS: u32 = 4;

fn worker_settings(
    config: &Config,
    roles: Roles,
    vault: Arc<app::vault::Vault>,
    defaults: Arc<Defaults>,
) -> anyhow::Result<worker::Settings> {
    Ok(worker::Settings {
        program: std::env::current_exe().context("cannot find this program's own file")?,
        slots: config.worker.slots,
        cells: config.worker.cells,
        isolation: Arc::new(
            Rules::new(config.worker.isolation, &config.worker.trust_groups)
                .context("worker.trust_groups")?,
        ),
        max_cells: config.worker.max_cells,
        cell_idle: config.worker.cell_idle(),
        threads_per_cell: config.worker.threads_per_cell as usize,
        heartbeat: config.worker.heartbeat(),
        dead_after: config.worker.dead_after(),
        drain_grace: config.worker.drain_grace(),
        poll: config.worker.poll(),
        head_start: Duration::from_millis(config.worker.head_start_ms),
        require_walls: config.worker.walls(),
        memory_bytes: config.worker.memory_bytes,
        tenant_memory_bytes: config.worker.tenant_memory_bytes,
        memory_overcommit: config.worker.memory_overcommit,
        max_handovers: i32::try_from(config.scheduler.max_handovers)?,
        egress: worker::egress::Settings {
            private_networks: config.egress.networks(),
            roots: tls::extra_roots(&config.egress)?,
            sent_bytes: config.egress.max_sent_bytes,
            received_bytes: config.egress.max_received_bytes,
        },
        vault,
        defaults,
        capabilities: worker::capability::Settings {
            calls_per_s: config.capabilities.calls_per_s,
            connections: (config.database.max_connections / CAPABILITY_CONNECTIONS).max(1) as usize,
            seal: config.secrets.seal_payloads,
        },
        // Draining the worker of a process that is a server too must not stop the server.
        leave_when_drained: !roles.server,
        journal: config.worker.journal.clone(),
    })
}

/// Whether this configuration could be started with, as far as that shows without starting anything.
///
/// # Errors
/// A certificate or a master key cannot be used, or the log filter is none.
pub fn check(config: &Config) -> anyhow::Result<()> {
    if let Some(files) = tls::Files::of(&config.server) {
        files.load()?;
    }
    tls::extra_roots(&config.egress)?;
    vault::check(config)?;
    crate::telemetry::check(&config.log)?;
    Ok(())
}

/// SIGINT or SIGTERM: drain. A second one: at once.
///
/// # Errors
/// The handlers cannot be installed.
pub fn stop_on_signals() -> anyhow::Result<Stop> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = Stop::default();
    let tokens = stop.clone();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        };
        next().await;
        info!("stopping; a second signal stops at once");
        tokens.drain.cancel();
        next().await;
        warn!("stopping at once");
        tokens.now.cancel();
    });
    Ok(stop)
}

/// Make sure that somebody can get in: the configured admin key, the one kept in the data directory, or, in an
/// installation without any key, a new one.
///
/// # Errors
/// Postgres does not answer, or the file cannot be read or written.
pub async fn admin_key(config: &Config, admin_url: &str) -> anyhow::Result<()> {
    let path = config.data_dir.join("admin.key");
    let key = match &config.server.admin_key {
        Some(key) => key.expose().to_owned(),
        None => match std::fs::read_to_string(&path) {
            Ok(text) => text.trim().to_owned(),
            Err(_) if crate::store::tenant::has_keys(admin_url).await? => return Ok(()),
            Err(_) => {
                let random: [u8; 32] = rand::random();
                let key = format!("sbk_{}", base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(random));
                write_secret(&path, &key)?;
                info!("admin key made: {}", path.display());
                key
            }
        },
    };
    crate::store::tenant::bootstrap(admin_url, &key).await
}

/// Make a user with this role in a tenant, or give an existing one a new password and this role: how the first admin comes in,
/// and how one who lost the password comes back.
///
/// # Errors
/// The address or the password cannot be one, there is no such tenant, or Postgres does not answer.
pub async fn make_user(
    admin_url: &str,
    tenant: &str,
    email: &str,
    name: &str,
    password: &str,
    role: crate::domain::permission::Role,
) -> anyhow::Result<()> {
    let email = app::people::email(email).map_err(|detail| anyhow::anyhow!("the address {detail}"))?;
    app::people::password(password).map_err(|detail| anyhow::anyhow!("the password {detail}"))?;
    let hash = app::people::hash(password)?;
    crate::store::people::make_user(admin_url, tenant, &email, name, &hash, role).await
}

/// A one-time token for a new password of the user with this address, and until when it can be used.
///
/// # Errors
/// Nobody has the address, or Postgres does not answer.
pub async fn make_reset(
    admin_url: &str,
    email: &str,
) -> anyhow::Result<(String, chrono::DateTime<chrono::Utc>)> {
    app::reset::make_on_the_server(admin_url, email).await
}

/// A new file that only its owner may read.
fn write_secret(path: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    writeln!(file, "{text}")?;
    file.sync_all()?;
    Ok(())
}
