//! The configuration of every role: one typed struct, read once at the start.
//!
//! Sources, later ones win: built-in defaults; `sandbar.toml` in the working directory (or the file named by
//! `--config` or `SANDBAR_CONFIG`); environment variables `SANDBAR_<SECTION>__<KEY>` and `SANDBAR_DATA_DIR`;
//! flags. An unknown key is an error that names it, and every number has a range ([`RANGES`]).
//!
//! This module never opens a connection, never creates a directory and never prints a secret.

mod load;
mod range;
mod secret;

#[cfg(test)]
mod reference;

#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use sandbar_host::egress::address::{Network, Networks};
use sandbar_host::walls::{Wall, Walls};
use serde::{Deserialize, Serialize};

use crate::domain::isolation::{Groups, Isolation};
use crate::domain::issuer::Issuer;

pub use load::{ConfigError, Overrides};
pub use range::{RANGES, Range};
pub use secret::Secret;

const MIB: u64 = 1024 * 1024;
const GIB: u64 = 1024 * MIB;
const TIB: u64 = 1024 * GIB;

/// The whole configuration. See each section for defaults and ranges.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Directory for everything kept on this machine: the embedded cluster, compiled modules, keys. Default
    /// `.sandbar`. A relative path is relative to the working directory.
    pub data_dir: PathBuf,
    /// Connections to Postgres.
    pub database: Database,
    /// The HTTP API.
    pub server: Server,
    /// How often callers may call.
    pub rate_limits: RateLimits,
    /// What a tenant may use.
    pub quotas: Quotas,
    /// Keys of secrets.
    pub secrets: Secrets,
    /// A worker and its cells.
    pub worker: Worker,
    /// People from elsewhere.
    pub identity: Identity,
    /// What guests may do by HTTP.
    pub egress: Egress,
    /// What guests may ask of the database.
    pub capabilities: Capabilities,
    /// Background duties.
    pub scheduler: Scheduler,
    /// The compiler of uploaded modules.
    pub compile: Compile,
    /// Log lines.
    pub log: Log,
    /// What the flags said, to read everything again.
    #[serde(skip)]
    pub source: Overrides,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from(".sandbar"),
            database: Database::default(),
            server: Server::default(),
            rate_limits: RateLimits::default(),
            quotas: Quotas::default(),
            secrets: Secrets::default(),
            worker: Worker::default(),
            identity: Identity::default(),
            egress: Egress::default(),
            capabilities: Capabilities::default(),
            scheduler: Scheduler::default(),
            compile: Compile::default(),
            log: Log::default(),
            source: Overrides::default(),
        }
    }
}

/// Section `database`: how to reach Postgres.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Database {
    /// URL of the role that owns the schema and runs migrations. Default none: `sandbar dev` starts its own
    /// Postgres.
    pub url: Option<Secret>,
    /// URL of a login that is, or may become, `sandbar_api`. Default none.
    pub api_url: Option<Secret>,
    /// URL of a login that is, or may become, `sandbar_worker`. Default none.
    pub worker_url: Option<Secret>,
    /// Connections per pool. Default 16, 6 to 500: a server keeps four for its flushers and for notifications.
    pub max_connections: u32,
    /// Longest statement, in milliseconds; Postgres cancels what takes longer. Default 30,000; 100 to 600,000.
    pub statement_timeout_ms: u64,
    /// Longest wait for a free connection, in milliseconds. Default 5,000; 10 to 60,000.
    pub acquire_timeout_ms: u64,
    /// How long a server or a worker that starts tries to reach a Postgres that is not there, in milliseconds. Default
    /// 30,000; 0 to 600,000.
    pub start_timeout_ms: u64,
}

impl Default for Database {
    fn default() -> Self {
        Self {
            url: None,
            api_url: None,
            worker_url: None,
            max_connections: 16,
            statement_timeout_ms: 30_000,
            acquire_timeout_ms: 5_000,
            start_timeout_ms: 30_000,
        }
    }
}

impl Database {
    /// Longest statement.
    pub fn statement_timeout(&self) -> Duration {
        Duration::from_millis(self.statement_timeout_ms)
    }

    /// Longest wait for a free connection.
    pub fn acquire_timeout(&self) -> Duration {
        Duration::from_millis(self.acquire_timeout_ms)
    }

    /// How long a start waits for Postgres.
    pub fn start_timeout(&self) -> Duration {
        Duration::from_millis(self.start_timeout_ms)
    }
}

/// Section `server`: the HTTP API and what it takes from callers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// Address to listen on. Default `127.0.0.1:7260`. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Certificate chain for HTTPS, a PEM file; read again when it changes. Default none: plain HTTP.
    pub tls_cert: Option<PathBuf>,
    /// Private key of the certificate, a PEM file. Default none.
    pub tls_key: Option<PathBuf>,
    /// Origins whose pages may call the API from a browser, such as `https://app.example.com`. Default none: browsers keep
    /// the pages of all other origins out. At most 32. As a variable: `["https://app.example.com"]`.
    pub cors_origins: Vec<String>,
    /// Networks of reverse proxies, such as `10.0.0.0/8`, whose `X-Forwarded-For` is believed. Default none: the address
    /// of a caller is the one its connection comes from. As a variable: `["10.0.0.0/8"]`.
    pub trusted_proxies: Vec<Proxies>,
    /// Admin key of the first tenant. Default none: one is made at the first start and kept in
    /// `<data_dir>/admin.key`. 16 to 200 visible ASCII characters.
    pub admin_key: Option<Secret>,
    /// Largest uploaded module, in bytes. Default 64 MiB; 1 KiB to 256 MiB.
    pub max_module_bytes: u64,
    /// Largest request body and input of an invocation, in bytes. Default 4 MiB; 1 KiB to 32 MiB.
    pub max_input_bytes: u64,
    /// Longest `Prefer: wait`, in seconds; a caller who asks for more gets this. Default 60, 1 to 600.
    pub max_wait_s: u64,
    /// How long an `Idempotency-Key` is remembered, in seconds. Default 86,400 (a day); 60 to 2,592,000 (30 days).
    pub idempotency_ttl_s: u64,
    /// Invocations of one tenant that may wait at once, where the tenant has no limit of its own; more are refused.
    /// Default 1,000,000; 1 to 1,000,000,000.
    pub max_queued: u64,
    /// Longest request, in seconds, not counting what its caller asked to wait for. Default 60, 1 to 3,600.
    pub request_timeout_s: u64,
    /// Longest wait for the head of a request, in seconds, and for the next request on a connection that is kept.
    /// Default 30, 1 to 600.
    pub header_timeout_s: u64,
}

/// A network of reverse proxies, such as `10.0.0.0/8`; one address is a network too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Proxies(pub IpNet);

impl TryFrom<String> for Proxies {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let one = || text.parse::<IpAddr>().map(IpNet::from);
        text.parse()
            .or_else(|_| one())
            .map(Self)
            .map_err(|_| format!("`{}` is no network", text.escape_debug()))
    }
}

impl From<Proxies> for String {
    fn from(network: Proxies) -> Self {
        network.0.to_string()
    }
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7260)),
            tls_cert: None,
            tls_key: None,
            cors_origins: Vec::new(),
            trusted_proxies: Vec::new(),
            admin_key: None,
            max_module_bytes: 64 * MIB,
            max_input_bytes: 4 * MIB,
            max_wait_s: 60,
            idempotency_ttl_s: 86_400,
            max_queued: 1_000_000,
            request_timeout_s: 60,
            header_timeout_s: 30,
        }
    }
}

impl Server {
    /// Longest `Prefer: wait`.
    pub fn max_wait(&self) -> Duration {
        Duration::from_secs(self.max_wait_s)
    }

    /// How long an `Idempotency-Key` is remembered.
    pub fn idempotency_ttl(&self) -> Duration {
        Duration::from_secs(self.idempotency_ttl_s)
    }

    /// Longest request, without the wait its caller asked for.
    pub fn request_timeout(&self) -> Duration {
        Duration::from_secs(self.request_timeout_s)
    }

    /// Longest wait for the head of a request.
    pub fn header_timeout(&self) -> Duration {
        Duration::from_secs(self.header_timeout_s)
    }
}

/// Section `rate_limits`: how often somebody may call one server; several servers let through as many times that. Read
/// again by SIGHUP. A rate of 0 lets everything through.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RateLimits {
    /// Calls per second of one address (of a /64 in IPv6) without a credential that is known to be valid. Default 100, 0 to 1,000,000.
    pub address_per_s: u32,
    /// Calls at once of one address after a pause. Default 1,000, 1 to 10,000,000.
    pub address_burst: u32,
    /// Calls per second of one key. Default 100,000, 0 to 1,000,000: more than a server answers.
    pub key_per_s: u32,
    /// Calls at once of one key after a pause. Default 200,000, 1 to 10,000,000.
    pub key_burst: u32,
    /// Calls per second of one tenant by all of its keys. Default 100,000, 0 to 1,000,000.
    pub tenant_per_s: u32,
    /// Calls at once of one tenant after a pause. Default 200,000, 1 to 10,000,000.
    pub tenant_burst: u32,
}

impl Default for RateLimits {
    fn default() -> Self {
        Self {
            address_per_s: 100,
            address_burst: 1_000,
            key_per_s: 100_000,
            key_burst: 200_000,
            tenant_per_s: 100_000,
            tenant_burst: 200_000,
        }
    }
}

/// Section `quotas`: what a tenant may use when neither its plan nor the platform says otherwise. 0: no bound.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Quotas {
    /// Invocations accepted per second, over all servers. Default 0, 0 to 1,000,000.
    pub invocations_per_s: u64,
    /// Invocations accepted per day (UTC), over all servers. Default 0, 0 to 10¹².
    pub invocations_per_day: u64,
    /// Different modules stored. Default 10,000, 0 to 1,000,000.
    pub modules: u64,
    /// Bytes of all modules stored. Default 100 GiB, 0 to 10¹⁵.
    pub module_bytes: u64,
    /// Memory that one attempt may ask for, in bytes. Default 4 GiB, 64 KiB to 4 GiB.
    pub attempt_memory_bytes: u64,
    /// Log bytes kept per day (UTC). Default 0, 0 to 10¹⁵.
    pub log_bytes_per_day: u64,
    /// Bytes in all key-value stores. Default 1 GiB, 0 to 10¹⁵.
    pub kv_bytes: u64,
    /// Attempts that run at once, over all workers. Default 0, 0 to 1,000,000.
    pub concurrency: u64,
    /// Memory that attempts that run at once declare together, over all workers, in bytes. Default 0, 0 to 10¹⁵.
    pub memory_bytes: u64,
    /// Fuel that attempts use per day (UTC). Default 0, 0 to 10¹⁸.
    pub fuel_per_day: u64,
    /// Fuel that attempts use per month (UTC). Default 0, 0 to 10¹⁸.
    pub fuel_per_month: u64,
    /// Seconds of CPU that attempts use per day (UTC). Default 0, 0 to 10⁹.
    pub cpu_s_per_day: u64,
    /// Seconds of CPU that attempts use per month (UTC). Default 0, 0 to 10⁹.
    pub cpu_s_per_month: u64,
    /// HTTP requests that tasks send per day (UTC). Default 0, 0 to 10¹².
    pub egress_requests_per_day: u64,
    /// Bytes of bodies that HTTP requests of tasks send and receive per day (UTC). Default 0, 0 to 10¹⁵.
    pub egress_bytes_per_day: u64,
}

impl Default for Quotas {
    fn default() -> Self {
        Self {
            invocations_per_s: 0,
            invocations_per_day: 0,
            modules: 10_000,
            module_bytes: 100 * GIB,
            attempt_memory_bytes: 4 * GIB,
            log_bytes_per_day: 0,
            kv_bytes: GIB,
            concurrency: 0,
            memory_bytes: 0,
            fuel_per_day: 0,
            fuel_per_month: 0,
            cpu_s_per_day: 0,
            cpu_s_per_month: 0,
            egress_requests_per_day: 0,
            egress_bytes_per_day: 0,
        }
    }
}

/// Section `secrets`: the master key, which wraps the data keys that seal tenants' secrets and payloads. 32 random bytes as base64
/// (`head -c 32 /dev/urandom | base64`), the same for every server. One of the first three; without any,
/// `<data_dir>/master.key` if it is there, which `sandbar dev` makes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Secrets {
    /// The key itself. Default none.
    pub master_key: Option<Secret>,
    /// File with the key. Default none.
    pub master_key_file: Option<PathBuf>,
    /// Program and arguments that print the key, run once at the start for at most 10 s. Default none. As a variable:
    /// `["/usr/bin/get-key", "sandbar"]`.
    pub master_key_command: Vec<String>,
    /// Files with keys that wrapped before, until `sandbar rewrap` has replaced them. Default none.
    pub previous_master_key_files: Vec<PathBuf>,
    /// Seal inputs, results, artifacts, logs and messages of every tenant in Postgres; false: of those that ask for it.
    /// Servers and workers need the master key. What was accepted before stays as it is. Default false.
    pub seal_payloads: bool,
}

/// Section `worker`: how much one worker runs, and how it proves that it lives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Worker {
    /// Attempts that run at once in this worker, over all of its cells. Default 64, 1 to 4,096.
    pub slots: u32,
    /// Sandbox processes that all tenants share. Default 1, 1 to 64. With `isolation = "tenant"` there are none.
    pub cells: u32,
    /// Who shares a sandbox process with whom: `shared` (default), all tenants those of `cells`; or `tenant`, each tenant has
    /// one of its own, started when it has something to run.
    pub isolation: Isolation,
    /// Tenants (by id) that share a sandbox process with each other and with nobody else, whatever `isolation` says; each
    /// group under a name. Default none. In the file a table: `[worker.trust_groups]` with
    /// `partners = ["<tenant id>", "<tenant id>"]`; as a variable: `{partners=["<tenant id>","<tenant id>"]}`. At most 256
    /// groups of 10,000 tenants in all.
    pub trust_groups: Groups,
    /// Sandbox processes of single tenants and of groups at once, besides those of `cells`; who finds none free waits.
    /// Default 8, 1 to 64.
    pub max_cells: u32,
    /// How long the process of a tenant or a group stays without work, in milliseconds. Default 60,000; 100 to 3,600,000.
    pub cell_idle_ms: u64,
    /// Guest threads per cell. Default: the cores this process may use. 1 to 256.
    pub threads_per_cell: u32,
    /// Time between heartbeats, in milliseconds. Default 2,000; 100 to 60,000.
    pub heartbeat_ms: u64,
    /// Silence after which a worker counts as dead and its attempts run elsewhere, in milliseconds. Default
    /// 6,000; 300 to 600,000, and at least three heartbeats. All workers and schedulers of a deployment must agree.
    pub dead_after_ms: u64,
    /// How long a stopping worker lets running attempts finish, in milliseconds. Default 30,000; 0 to 3,600,000.
    pub drain_grace_ms: u64,
    /// Time between looks at the queue when no notification arrives, in milliseconds. Default 1,000; 10 to 60,000.
    pub poll_ms: u64,
    /// By how much other workers may go first with new work of a task that this one has not run yet, in milliseconds:
    /// they have its module loaded. Only while other workers claim. Default 2; 0 to 10,000.
    pub head_start_ms: u64,
    /// Memory for cells and for all that guests may make them hold, in bytes: attempts whose declared limits do not
    /// fit next to those that run, wait. Default: three quarters of this machine's (or control group's) memory. 512
    /// MiB to 16 TiB.
    pub memory_bytes: u64,
    /// Of this memory, what the attempts of one tenant may have at once, in bytes. Default 16 TiB: no less than the
    /// worker has. 64 MiB to 16 TiB.
    pub tenant_memory_bytes: u64,
    /// Let attempts in by what the last of their module have used instead of what they declare, so that more of them run at
    /// once. What is declared is still what each may use; when all want it at the same time the youngest are handed back and
    /// begin anew elsewhere or later, which costs them no retry. Default false.
    pub memory_overcommit: bool,
    /// Walls of the kernel without which no cell and no compilation is started: `no_new_privileges`, `seccomp`,
    /// `landlock`, `pagemap_scan`. Default none: each goes up where the kernel grants it. As a variable: `[seccomp,landlock]`.
    pub require_walls: Vec<Wall>,
    /// File to which the worker appends one line for each start, end and accepted end of an attempt: a witness outside
    /// the database, for tests of faults and for an operator who doubts. It grows without bound. Default none.
    pub journal: Option<PathBuf>,
}

impl Default for Worker {
    fn default() -> Self {
        Self {
            slots: 64,
            cells: 1,
            isolation: Isolation::Shared,
            trust_groups: Groups::new(),
            max_cells: 8,
            cell_idle_ms: 60_000,
            threads_per_cell: available_cores(),
            heartbeat_ms: 2_000,
            dead_after_ms: 6_000,
            drain_grace_ms: 30_000,
            poll_ms: 1_000,
            head_start_ms: 2,
            memory_bytes: three_quarters_of_memory(),
            tenant_memory_bytes: 16 * TIB,
            memory_overcommit: false,
            require_walls: Vec::new(),
            journal: None,
        }
    }
}

impl Worker {
    /// Time between heartbeats.
    pub fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms)
    }

    /// Silence after which a worker counts as dead.
    pub fn dead_after(&self) -> Duration {
        Duration::from_millis(self.dead_after_ms)
    }

    /// How long a stopping worker lets running attempts finish.
    pub fn drain_grace(&self) -> Duration {
        Duration::from_millis(self.drain_grace_ms)
    }

    /// How long the cell of a tenant or a group stays without work.
    pub fn cell_idle(&self) -> Duration {
        Duration::from_millis(self.cell_idle_ms)
    }

    /// Walls without which no cell and no compilation is started.
    pub fn walls(&self) -> Walls {
        self.require_walls.iter().copied().collect()
    }

    /// Time between looks at the queue when no notification arrives.
    pub fn poll(&self) -> Duration {
        Duration::from_millis(self.poll_ms)
    }
}

/// Three quarters of what this machine, or the control group of this process, has.
fn three_quarters_of_memory() -> u64 {
    let info = rustix::system::sysinfo();
    #[allow(clippy::useless_conversion)] // 32 bits on some machines
    let machine = u64::from(info.totalram).saturating_mul(u64::from(info.mem_unit));
    let limit = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let group = limit("/sys/fs/cgroup/memory.max")
        .or_else(|| limit("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
        .unwrap_or(u64::MAX);
    // Within the range of the setting, so that the default is always valid.
    (machine.min(group) / 4 * 3).clamp(512 * MIB, 16 * TIB)
}

/// Cores this process may use; 1 when the system does not say.
fn available_cores() -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    // The upper bound of the setting, so that the default is always valid.
    u32::try_from(cores).unwrap_or(u32::MAX).min(256)
}

/// Section `identity`: people who prove who they are elsewhere. Read by servers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Identity {
    /// Issuers whose tokens are believed besides our own, each a table `[[identity.issuers]]` in the file: see
    /// [operations](operations.md#single-sign-on). Default none. At most 16.
    pub issuers: Vec<Issuer>,
}

/// Section `egress`: what guests may do by HTTP beyond what their tenants grant them. Read by workers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Egress {
    /// Private networks that guests may reach, such as `10.1.0.0/16`, where a tenant grants a host in them. Default
    /// none: loopback, private, link-local and all other addresses that are not public are refused. A metadata address
    /// of a cloud is refused whatever stands here. At most 64. As a variable: `[10.1.0.0/16,fd00:1::/32]`.
    pub private_networks: Vec<Network>,
    /// File with certificates (PEM) of authorities that HTTPS requests of guests trust besides those of the system, such
    /// as a company's own. Read when a worker starts; one that is no certificate ends the start. Default none.
    pub extra_roots: Option<PathBuf>,
    /// Bytes that the bodies of one attempt's requests may have in all. Default 16 MiB; 0 to 16 GiB.
    pub max_sent_bytes: u64,
    /// Bytes that the bodies of one attempt's responses may have in all. Default 64 MiB; 0 to 16 GiB.
    pub max_received_bytes: u64,
}

impl Default for Egress {
    fn default() -> Self {
        Self {
            private_networks: Vec::new(),
            extra_roots: None,
            max_sent_bytes: 16 * MIB,
            max_received_bytes: 64 * MIB,
        }
    }
}

impl Egress {
    /// Private networks that guests may reach.
    pub fn networks(&self) -> Networks {
        Networks::new(self.private_networks.clone())
    }
}

/// Section `capabilities`: what guests may ask of the database beyond what their tenants grant them. Read by workers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Capabilities {
    /// Calls per second of one tenant's attempts in one worker; more of them wait. Default 1,000, 1 to 100,000.
    pub calls_per_s: u32,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self { calls_per_s: 1_000 }
    }
}

/// Section `scheduler`: background duties.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Scheduler {
    /// Time between rounds of timers and reaping, in milliseconds. Default 1,000; 10 to 60,000.
    pub tick_ms: u64,
    /// How often an attempt may be handed to another worker because its own died, before the invocation is
    /// dead. Default 10, 1 to 1,000.
    pub max_handovers: u32,
    /// Days that ended invocations are kept, with input, attempts, result and log, where the tenant has no number of its
    /// own. Default 30, 1 to 3,650.
    pub retention_days: u32,
    /// Directory that history is written to, as compressed JSON lines, before retention deletes it. Default none: it is
    /// deleted without.
    pub export_dir: Option<PathBuf>,
}

impl Default for Scheduler {
    fn default() -> Self {
        Self { tick_ms: 1_000, max_handovers: 10, retention_days: 30, export_dir: None }
    }
}

impl Scheduler {
    /// Time between rounds of timers and reaping.
    pub fn tick(&self) -> Duration {
        Duration::from_millis(self.tick_ms)
    }
}

/// Section `compile`: what compiling one uploaded module may take, and what is kept of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Compile {
    /// Address space of the compiling process, in bytes. Default 2 GiB; 256 MiB to 64 GiB.
    pub address_space_bytes: u64,
    /// CPU time of one compilation, in seconds; each MiB of the module adds 4. Default 20, 1 to 600.
    pub cpu_seconds: u64,
    /// Wall time of one compilation, in milliseconds; each MiB of the module adds 8,000. Default 30,000; 1,000 to
    /// 900,000.
    pub wall_ms: u64,
    /// Disk space for compiled modules, in bytes. Default 2 GiB; 64 MiB to 1 TiB.
    pub cache_bytes: u64,
    /// Compilations at once, on each host. Default 1, 1 to 64.
    pub parallel: u32,
    /// Compilations of one tenant at once: of its uploads over all servers, of what a worker has to compile again on
    /// each host. Default 1, 1 to 64.
    pub parallel_per_tenant: u32,
    /// Uploads that may wait for their compilation. Beyond it 503 `overloaded`; uploads that come in the same moment
    /// may pass it by a few. Default 1,000, 1 to 100,000.
    pub waiting: u32,
    /// Uploads of one tenant that may wait for their compilation. Beyond it 429 `compile-queue-full`. Default 100, 1 to
    /// 10,000.
    pub waiting_per_tenant: u32,
}

impl Default for Compile {
    fn default() -> Self {
        Self {
            address_space_bytes: 2 * GIB,
            cpu_seconds: 20,
            wall_ms: 30_000,
            cache_bytes: 2 * GIB,
            parallel: 1,
            parallel_per_tenant: 1,
            waiting: 1_000,
            waiting_per_tenant: 100,
        }
    }
}

impl Compile {
    /// Wall time of one compilation.
    pub fn wall(&self) -> Duration {
        Duration::from_millis(self.wall_ms)
    }
}

/// Section `log`: what is written to standard error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// `text` for people (default) or `json` for machines.
    pub format: LogFormat,
    /// What is logged, in the language of `tracing`: a level (`info`, the default), or a list such as
    /// `warn,sandbar::worker=debug`.
    pub filter: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".to_owned() }
    }
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One readable line.
    Text,
    /// One JSON object per line.
    Json,
}
