//! The range of every number in the configuration, in one table: the validation reads it, and so can whoever
//! writes the reference.

use sandbar_host::egress::address::MAX_NETWORKS;

use crate::domain::isolation::Rules;
use crate::domain::issuer::{Issuer, MAX_ISSUERS};

use super::{Config, ConfigError, GIB, MIB, TIB};

/// The range of one numeric setting, both ends included.
pub struct Range {
    /// Full key, for example `server.max_wait_s`.
    pub key: &'static str,
    /// Smallest value.
    pub min: u64,
    /// Largest value.
    pub max: u64,
    /// Reads the value from a configuration.
    pub get: fn(&Config) -> u64,
}

const fn range(key: &'static str, min: u64, max: u64, get: fn(&Config) -> u64) -> Range {
    Range { key, min, max, get }
}

/// Every numeric setting with its range. A test checks that none is missing and that the defaults lie inside.
pub const RANGES: &[Range] = &[
    range("database.max_connections", 6, 500, |c| c.database.max_connections.into()),
    range("database.statement_timeout_ms", 100, 600_000, |c| c.database.statement_timeout_ms),
    range("database.acquire_timeout_ms", 10, 60_000, |c| c.database.acquire_timeout_ms),
    range("database.start_timeout_ms", 0, 600_000, |c| c.database.start_timeout_ms),
    range("server.max_module_bytes", 1024, 256 * MIB, |c| c.server.max_module_bytes),
    range("server.max_input_bytes", 1024, 32 * MIB, |c| c.server.max_input_bytes),
    range("server.max_wait_s", 1, 600, |c| c.server.max_wait_s),
    range("server.idempotency_ttl_s", 60, 2_592_000, |c| c.server.idempotency_ttl_s),
    range("server.max_queued", 1, 1_000_000_000, |c| c.server.max_queued),
    range("server.request_timeout_s", 1, 3_600, |c| c.server.request_timeout_s),
    range("server.header_timeout_s", 1, 600, |c| c.server.header_timeout_s),
    range("rate_limits.address_per_s", 0, 1_000_000, |c| c.rate_limits.address_per_s.into()),
    range("rate_limits.address_burst", 1, 10_000_000, |c| c.rate_limits.address_burst.into()),
    range("rate_limits.key_per_s", 0, 1_000_000, |c| c.rate_limits.key_per_s.into()),
    range("rate_limits.key_burst", 1, 10_000_000, |c| c.rate_limits.key_burst.into()),
    range("rate_limits.tenant_per_s", 0, 1_000_000, |c| c.rate_limits.tenant_per_s.into()),
    range("rate_limits.tenant_burst", 1, 10_000_000, |c| c.rate_limits.tenant_burst.into()),
    range("quotas.invocations_per_s", 0, 1_000_000, |c| c.quotas.invocations_per_s),
    range("quotas.invocations_per_day", 0, 1_000_000_000_000, |c| c.quotas.invocations_per_day),
    range("quotas.modules", 0, 1_000_000, |c| c.quotas.modules),
    range("quotas.module_bytes", 0, 1_000_000_000_000_000, |c| c.quotas.module_bytes),
    range("quotas.attempt_memory_bytes", 64 * 1024, 4 * GIB, |c| c.quotas.attempt_memory_bytes),
    range("quotas.log_bytes_per_day", 0, 1_000_000_000_000_000, |c| c.quotas.log_bytes_per_day),
    range("quotas.kv_bytes", 0, 1_000_000_000_000_000, |c| c.quotas.kv_bytes),
    range("quotas.concurrency", 0, 1_000_000, |c| c.quotas.concurrency),
    range("quotas.memory_bytes", 0, 1_000_000_000_000_000, |c| c.quotas.memory_bytes),
    range("quotas.fuel_per_day", 0, 1_000_000_000_000_000_000, |c| c.quotas.fuel_per_day),
    range("quotas.fuel_per_month", 0, 1_000_000_000_000_000_000, |c| c.quotas.fuel_per_month),
    range("quotas.cpu_s_per_day", 0, 1_000_000_000, |c| c.quotas.cpu_s_per_day),
    range("quotas.cpu_s_per_month", 0, 1_000_000_000, |c| c.quotas.cpu_s_per_month),
    range("quotas.egress_requests_per_day", 0, 1_000_000_000_000, |c| c.quotas.egress_requests_per_day),
    range("quotas.egress_bytes_per_day", 0, 1_000_000_000_000_000, |c| c.quotas.egress_bytes_per_day),
    range("worker.slots", 1, 4_096, |c| c.worker.slots.into()),
    range("worker.cells", 1, 64, |c| c.worker.cells.into()),
    range("worker.max_cells", 1, 64, |c| c.worker.max_cells.into()),
    range("worker.cell_idle_ms", 100, 3_600_000, |c| c.worker.cell_idle_ms),
    range("worker.threads_per_cell", 1, 256, |c| c.worker.threads_per_cell.into()),
    range("worker.heartbeat_ms", 100, 60_000, |c| c.worker.heartbeat_ms),
    range("worker.dead_after_ms", 300, 600_000, |c| c.worker.dead_after_ms),
    range("worker.drain_grace_ms", 0, 3_600_000, |c| c.worker.drain_grace_ms),
    range("worker.memory_bytes", 512 * MIB, 16 * TIB, |c| c.worker.memory_bytes),
    range("worker.tenant_memory_bytes", 64 * MIB, 16 * TIB, |c| c.worker.tenant_memory_bytes),
    range("worker.poll_ms", 10, 60_000, |c| c.worker.poll_ms),
    range("worker.head_start_ms", 0, 10_000, |c| c.worker.head_start_ms),
    range("capabilities.calls_per_s", 1, 100_000, |c| c.capabilities.calls_per_s.into()),
    range("egress.max_sent_bytes", 0, 16 * GIB, |c| c.egress.max_sent_bytes),
    range("egress.max_received_bytes", 0, 16 * GIB, |c| c.egress.max_received_bytes),
    range("scheduler.tick_ms", 10, 60_000, |c| c.scheduler.tick_ms),
    range("scheduler.max_handovers", 1, 1_000, |c| c.scheduler.max_handovers.into()),
    range("scheduler.retention_days", 1, 3_650, |c| c.scheduler.retention_days.into()),
    range("compile.address_space_bytes", 256 * MIB, 64 * GIB, |c| c.compile.address_space_bytes),
    range("compile.cpu_seconds", 1, 600, |c| c.compile.cpu_seconds),
    range("compile.wall_ms", 1_000, 900_000, |c| c.compile.wall_ms),
    range("compile.cache_bytes", 64 * MIB, 1024 * GIB, |c| c.compile.cache_bytes),
    range("compile.parallel", 1, 64, |c| c.compile.parallel.into()),
    range("compile.parallel_per_tenant", 1, 64, |c| c.compile.parallel_per_tenant.into()),
    range("compile.waiting", 1, 100_000, |c| c.compile.waiting.into()),
    range("compile.waiting_per_tenant", 1, 10_000, |c| c.compile.waiting_per_tenant.into()),
];

/// Fewer heartbeats than this in `worker.dead_after_ms`, and one lost packet would cost a worker its leases.
const MIN_HEARTBEATS_BEFORE_DEATH: u64 = 3;

/// Shortest and longest admin key, in characters.
const ADMIN_KEY_LENGTH: std::ops::RangeInclusive<usize> = 16..=200;

/// Origins that may call from a browser: each request's origin is compared with all of them.
const MAX_ORIGINS: usize = 32;

/// `http` or `https`, host, and port if it has one. `*` is none: whoever wants everybody in has a proxy to say so.
fn is_origin(text: &str) -> bool {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    host.is_some_and(|host| {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.:[]".contains(c);
        !host.is_empty() && host.chars().all(plain)
    })
}

/// Checks every rule that types cannot express. Reports all that is wrong, not only the first.
pub(super) fn validate(config: &Config) -> Result<(), ConfigError> {
    let mut problems = Vec::new();
    for Range { key, min, max, get } in RANGES {
        let value = get(config);
        if !(*min..=*max).contains(&value) {
            problems.push(format!("{key} is {value}, allowed is {min} to {max}"));
        }
    }
    let worker = &config.worker;
    if worker.dead_after_ms < worker.heartbeat_ms.saturating_mul(MIN_HEARTBEATS_BEFORE_DEATH) {
        problems.push(format!(
            "worker.dead_after_ms is {}, it must be at least {MIN_HEARTBEATS_BEFORE_DEATH} times worker.heartbeat_ms ({})",
            worker.dead_after_ms, worker.heartbeat_ms
        ));
    }
    if worker.cells > worker.slots {
        problems.push(format!(
            "worker.cells is {}, more than worker.slots ({}): some cells could never run anything",
            worker.cells, worker.slots
        ));
    }
    if let Err(problem) = Rules::new(worker.isolation, &worker.trust_groups) {
        problems.push(format!("worker.trust_groups: {problem}"));
    }
    if config.server.tls_cert.is_some() != config.server.tls_key.is_some() {
        problems.push("server.tls_cert and server.tls_key are set together or not at all".to_owned());
    }
    let secrets = &config.secrets;
    let named = [
        secrets.master_key.is_some(),
        secrets.master_key_file.is_some(),
        !secrets.master_key_command.is_empty(),
    ];
    if named.into_iter().filter(|named| *named).count() > 1 {
        problems.push(
            "set one of secrets.master_key, secrets.master_key_file and secrets.master_key_command"
                .to_owned(),
        );
    }
    let origins = &config.server.cors_origins;
    if origins.len() > MAX_ORIGINS {
        problems.push(format!("server.cors_origins names {}, at most {MAX_ORIGINS} may", origins.len()));
    }
    for origin in origins {
        if !is_origin(origin) {
            problems.push(format!(
                "server.cors_origins: `{}` is no origin; write scheme, host and port only, like https://app.example.com",
                origin.escape_debug()
            ));
        }
    }
    if config.egress.private_networks.len() > MAX_NETWORKS {
        problems.push(format!("egress.private_networks has more than {MAX_NETWORKS} entries"));
    }
    if config.identity.issuers.len() > MAX_ISSUERS {
        problems.push(format!("identity.issuers has more than {MAX_ISSUERS} entries"));
    }
    problems.extend(config.identity.issuers.iter().flat_map(Issuer::problems));
    if config.data_dir.as_os_str().is_empty() {
        problems.push("data_dir is empty".to_owned());
    }
    let database = &config.database;
    for (key, url) in [
        ("database.url", &database.url),
        ("database.api_url", &database.api_url),
        ("database.worker_url", &database.worker_url),
    ] {
        // The text itself stays out of the message: it may hold a password.
        if let Some(url) = url
            && !(url.expose().starts_with("postgres://") || url.expose().starts_with("postgresql://"))
        {
            problems.push(format!("{key} must start with postgres:// or postgresql://"));
        }
    }
    if let Some(key) = &config.server.admin_key {
        let key = key.expose();
        if !ADMIN_KEY_LENGTH.contains(&key.len()) || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            problems.push(format!(
                "server.admin_key must have {} to {} visible ASCII characters",
                ADMIN_KEY_LENGTH.start(),
                ADMIN_KEY_LENGTH.end()
            ));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(ConfigError::Invalid { problems }) }
}
