//! The API on its socket, plain or TLS: bounded heads, a drain that lets open requests finish, the end in order. No
//! route and no rule.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::http::header::{
    AUTHORIZATION, CONTENT_TYPE, ETAG, LOCATION, RETRY_AFTER, STRICT_TRANSPORT_SECURITY,
};
use axum::http::{HeaderName, HeaderValue, Method};
use axum_server::Handle;
use axum_server::accept::NoDelayAcceptor;
use axum_server::tls_rustls::RustlsAcceptor;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio_util::sync::CancellationToken;
use tower_http::cors::{AllowOrigin, CorsLayer};
use tower_http::set_header::SetResponseHeaderLayer;
use tracing::{info, warn};

use super::{ADDRESS_FILE, Urls, connect, tls};
use crate::app::signals::Signals;
use crate::app::vault::Vault;
use crate::app::{self, App};
use crate::config::Config;
use crate::domain::quota::{Amount, Level, Quota};
use crate::domain::rate::{Rate, Rates};
use crate::store::{ApiStore, patiently};
use crate::{api, config};

/// How long open requests may take to finish once we are told to stop.
const REQUEST_GRACE: Duration = Duration::from_secs(5);
/// Longest TLS handshake: a client on another continent needs less than a second.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a browser that came once over TLS refuses to come without: a year, what the preload lists ask for.
const HSTS: HeaderValue = HeaderValue::from_static("max-age=31536000");
/// How long a browser may remember what other origins are allowed.
const CORS_AGE: Duration = Duration::from_secs(600);

/// A running API.
pub(super) struct Http {
    serving: tokio::task::JoinHandle<std::io::Result<()>>,
    handle: Handle<SocketAddr>,
    /// Notifications, the drain, the watch over the certificate: they end with the API.
    helpers: Vec<tokio::task::JoinHandle<()>>,
    app: App,
    store: ApiStore,
    address_file: PathBuf,
}

impl Http {
    pub(super) async fn start(
        config: &Config,
        urls: &Urls,
        vault: Arc<Vault>,
        signals: Arc<Signals>,
        stop: CancellationToken,
    ) -> anyhow::Result<Self> {
        // Before anything is connected: a certificate that cannot be used should be told at once.
        let files = tls::Files::of(&config.server);
        let served = files.as_ref().map(tls::Files::load).transpose()?;
        let store = patiently(config.database.start_timeout(), async || {
            ApiStore::connect(&connect(config, &urls.api))
                .await
                .context("cannot connect to Postgres as sandbar_api")
        })
        .await?;
        let app = App::new(store.clone(), signals.clone(), settings(config, vault))
            .context("cannot start the application")?;
        // Those that an earlier version left in the clear are sealed now, and not at the first login.
        if let Err(error) = app.jwks().await {
            warn!("the keys that sign tokens cannot be read yet: {error}");
        }
        let mut helpers = vec![tokio::spawn(app::signals::listen(store.clone(), signals, stop.clone()))];

        let listener = std::net::TcpListener::bind(config.server.listen)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .with_context(|| format!("cannot listen on {}", config.server.listen))?;
        let address = listener.local_addr()?;
        let handle: Handle<SocketAddr> = Handle::new();
        let header_timeout = config.server.header_timeout();
        let mut router = api::router(app.clone());
        if let Some(cors) = cors(&config.server.cors_origins) {
            router = router.layer(cors);
        }
        let (scheme, serving) = match (files, served) {
            (Some(files), Some(served)) => {
                helpers.push(tokio::spawn(tls::keep_fresh(files, served.clone())));
                let router =
                    router.layer(SetResponseHeaderLayer::overriding(STRICT_TRANSPORT_SECURITY, HSTS));
                let acceptor =
                    RustlsAcceptor::new(served).handshake_timeout(HANDSHAKE).acceptor(NoDelayAcceptor::new());
                let mut server =
                    axum_server::from_tcp(listener)?.acceptor(acceptor).handle(handle.clone()).http1_only();
                bound(server.http_builder(), header_timeout);
                let service = router.into_make_service_with_connect_info::<SocketAddr>();
                ("https", tokio::spawn(server.serve(service)))
            }
            _ => {
                let mut server = axum_server::from_tcp(listener)?
                    .acceptor(NoDelayAcceptor::new())
                    .handle(handle.clone())
                    .http1_only();
                bound(server.http_builder(), header_timeout);
                let service = router.into_make_service_with_connect_info::<SocketAddr>();
                ("http", tokio::spawn(server.serve(service)))
            }
        };
        helpers.push(tokio::spawn(drain(stop, app.clone(), handle.clone())));
        let address_file = config.data_dir.join(ADDRESS_FILE);
        if let Err(error) = std::fs::write(&address_file, format!("{}\n", local_url(scheme, address))) {
            // Only the convenience is lost: commands have to be told the address.
            warn!("cannot write {}: {error}", address_file.display());
        }
        info!("listening on {scheme}://{address}");
        Ok(Self { serving, handle, helpers, app, store, address_file })
    }

    /// The application behind it.
    pub(super) fn app(&self) -> App {
        self.app.clone()
    }

    /// Resolves when the API ends without having been told to; a drain of the worker must not be cut short by an API
    /// that has already drained.
    pub(super) async fn failed(&mut self, told: &CancellationToken) -> anyhow::Result<()> {
        let ended = (&mut self.serving).await;
        if told.is_cancelled() {
            std::future::pending::<()>().await;
        }
        ended.context("the API failed")?.context("the API failed")
    }

    pub(super) async fn finish(mut self) {
        let _ = std::fs::remove_file(&self.address_file);
        if !self.serving.is_finished()
            && tokio::time::timeout(REQUEST_GRACE, &mut self.serving).await.is_err()
        {
            warn!("requests were still open; closing them");
            self.handle.shutdown();
        }
        for helper in &self.helpers {
            helper.abort();
        }
        self.app.shutdown().await;
        let _ = tokio::time::timeout(Duration::from_secs(5), self.store.close()).await;
    }
}

/// Once told to stop: nobody waits any longer, and no new connection is taken.
async fn drain(stop: CancellationToken, app: App, handle: Handle<SocketAddr>) {
    stop.cancelled().await;
    app.drain();
    handle.graceful_shutdown(None);
}

/// A connection that sends no head in time, or only a part of one, is closed.
fn bound(builder: &mut Builder<TokioExecutor>, header_timeout: Duration) {
    builder.http1().timer(TokioTimer::new()).header_read_timeout(header_timeout);
}

/// What pages of other origins may do; nothing unless they are named.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    let origins: Vec<HeaderValue> =
        origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()).collect();
    if origins.is_empty() {
        return None;
    }
    let own = |names: &[&'static str]| names.iter().copied().map(HeaderName::from_static).collect::<Vec<_>>();
    let sent = own(&["x-api-key", "prefer", "idempotency-key", "last-event-id", "x-request-id"]);
    let seen = own(&["x-request-id", "preference-applied", "ratelimit", "ratelimit-policy"]);
    let layer = CorsLayer::new()
        .allow_origin(AllowOrigin::list(origins))
        .allow_methods([Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
        .allow_headers([vec![AUTHORIZATION, CONTENT_TYPE], sent].concat())
        .expose_headers([vec![LOCATION, RETRY_AFTER, ETAG], seen].concat())
        .max_age(CORS_AGE);
    Some(layer)
}

/// How the API is reached from this machine.
fn local_url(scheme: &str, address: SocketAddr) -> String {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    format!("{scheme}://{}", SocketAddr::new(ip, address.port()))
}

/// The rates of the configuration.
pub(super) fn rates(limits: &config::RateLimits) -> Rates {
    let rate = |per_s, burst| Rate { per_s, burst };
    Rates {
        address: rate(limits.address_per_s, limits.address_burst),
        key: rate(limits.key_per_s, limits.key_burst),
        tenant: rate(limits.tenant_per_s, limits.tenant_burst),
    }
}

/// The platform's quotas of the configuration, where 0 is no bound.
pub(super) fn quotas(quotas: &config::Quotas) -> Level {
    let mut level = Level::default();
    for (quota, bound) in [
        (Quota::InvocationsPerSecond, quotas.invocations_per_s),
        (Quota::InvocationsPerDay, quotas.invocations_per_day),
        (Quota::Modules, quotas.modules),
        (Quota::ModuleBytes, quotas.module_bytes),
        (Quota::AttemptMemoryBytes, quotas.attempt_memory_bytes),
        (Quota::LogBytesPerDay, quotas.log_bytes_per_day),
        (Quota::KvBytes, quotas.kv_bytes),
        (Quota::Concurrency, quotas.concurrency),
        (Quota::MemoryBytes, quotas.memory_bytes),
        (Quota::FuelPerDay, quotas.fuel_per_day),
        (Quota::FuelPerMonth, quotas.fuel_per_month),
        (Quota::CpuSecondsPerDay, quotas.cpu_s_per_day),
        (Quota::CpuSecondsPerMonth, quotas.cpu_s_per_month),
        (Quota::EgressRequestsPerDay, quotas.egress_requests_per_day),
        (Quota::EgressBytesPerDay, quotas.egress_bytes_per_day),
    ] {
        let amount = if bound == 0 { Amount::Unlimited } else { Amount::At(bound) };
        // Their ranges are those of the configuration, which has been checked.
        let _ = level.set(quota, Some(amount));
    }
    level
}

fn settings(config: &Config, vault: Arc<Vault>) -> app::Settings {
    let server = &config.server;
    app::Settings {
        max_module_bytes: server.max_module_bytes,
        max_compiling: config.compile.waiting,
        max_compiling_of_one: config.compile.waiting_per_tenant,
        max_input_bytes: server.max_input_bytes,
        max_wait: server.max_wait(),
        request_timeout: server.request_timeout(),
        idempotency_ttl: server.idempotency_ttl(),
        max_queued: server.max_queued,
        retention_days: config.scheduler.retention_days.into(),
        issuers: config.identity.issuers.clone(),
        rates: rates(&config.rate_limits),
        quotas: quotas(&config.quotas),
        vault,
        seal_payloads: config.secrets.seal_payloads,
        trusted_proxies: server.trusted_proxies.iter().map(|proxy| proxy.0).collect(),
        limits: sandbar_host::limits::Limits::default(),
    }
}
