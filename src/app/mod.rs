//! The rules that decide and write: upload, invoke, cancel, read. Knows the store and the domain; never HTTP (what
//! comes in and goes out are types of this module, and `api` translates them).

pub mod artifact;
pub mod audit;
pub mod auth;
pub mod batch;
pub mod bulk;
pub mod catalog;
pub mod dead_letter;
pub mod depth;
pub mod encryption;
pub mod error;
pub mod files;
pub mod flush;
pub mod http;
pub mod invocation;
pub mod invoke;
pub mod key;
pub mod log;
pub mod operate;
pub mod pause;
pub mod people;
pub mod policy;
pub mod quota;
pub mod reset;
pub mod retry;
pub mod schema;
pub mod sealed;
pub mod secret;
pub mod signals;
pub mod spending;
mod start;
pub mod task;
pub mod tenant;
pub mod token;
pub mod upload;
pub mod usage;
pub mod vault;

use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use sandbar_host::limits::Limits;
use sandbar_host::turns::Turns;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::domain::ids::TenantId;
use crate::domain::issuer::Issuer;
use crate::domain::quota::{Amount, Defaults, Level, Quota};
use crate::domain::rate::Rates;
use crate::store::{ApiStore, TenantConn};

pub use error::{Error, FieldError, Result};

/// Modules that are looked at in parallel. Looking is CPU-bound and takes memory of the module's size.
const INSPECTIONS: usize = 2;
/// Of one tenant: another's upload finds a place.
const INSPECTIONS_OF_ONE: usize = 1;

/// What the operator decides.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Bytes of an uploaded module.
    pub max_module_bytes: u64,
    /// Uploads that may wait for their compilation.
    pub max_compiling: u32,
    /// Of one tenant.
    pub max_compiling_of_one: u32,
    /// Bytes of an input, or of stdin with arguments and variables.
    pub max_input_bytes: u64,
    /// Longest `Prefer: wait=…`.
    pub max_wait: Duration,
    /// Longest a request may take besides waiting and uploading.
    pub request_timeout: Duration,
    /// How long an idempotency key is remembered.
    pub idempotency_ttl: Duration,
    /// Invocations of a tenant that may wait, where the tenant has no limit of its own.
    pub max_queued: u64,
    /// Days that ended invocations are kept, where nothing else is said.
    pub retention_days: u64,
    /// Whose tokens are believed besides our own.
    pub issuers: Vec<Issuer>,
    /// What one server lets through.
    pub rates: Rates,
    /// What a tenant may use when neither its plan nor the platform says otherwise.
    pub quotas: Level,
    /// The master keys.
    pub vault: Arc<vault::Vault>,
    /// All payloads are sealed at rest, whatever tenants say.
    pub seal_payloads: bool,
    /// Networks of proxies that are believed about whom they speak for.
    pub trusted_proxies: Vec<IpNet>,
    /// Limits of an attempt when neither the task nor the request names any.
    pub limits: Limits,
}

impl Default for Settings {
    /// 64 MiB modules, 1,000 of them waiting to be compiled and 100 of one tenant, 4 MiB inputs, 60 s of waiting, 30 s per
    /// request, keys for a day, a million of a tenant waiting, any rate, no other quota, no master key.
    fn default() -> Self {
        Self {
            max_module_bytes: 64 << 20,
            max_compiling: 1_000,
            max_compiling_of_one: 100,
            max_input_bytes: 4 << 20,
            max_wait: Duration::from_secs(60),
            request_timeout: Duration::from_secs(30),
            idempotency_ttl: Duration::from_secs(86_400),
            max_queued: 1_000_000,
            retention_days: 30,
            issuers: Vec::new(),
            rates: Rates::UNLIMITED,
            quotas: Level::default(),
            vault: Arc::default(),
            seal_payloads: false,
            trusted_proxies: Vec::new(),
            limits: Limits::default(),
        }
    }
}

/// The application behind the API. Cheap to clone.
#[derive(Debug, Clone)]
pub struct App {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: ApiStore,
    signals: Arc<signals::Signals>,
    settings: Settings,
    rates: watch::Sender<Rates>,
    quotas: quota::Quotas,
    default_quotas: Defaults,
    flusher: flush::Flusher,
    catalog: catalog::Catalog,
    keys: auth::Keys,
    audit: audit::Audit,
    hashing: people::Hashing,
    issuer: token::Issuer,
    issuers: token::outside::Issuers,
    depths: depth::Depths,
    schemas: schema::Checker,
    inspections: Arc<Turns>,
    upload_memory: upload::memory::Memory,
    draining: CancellationToken,
    streams: log::Streams,
}

impl App {
    /// Start the flushers and the schema threads. Within a Tokio runtime.
    ///
    /// # Errors
    /// The operating system refuses threads.
    pub fn new(store: ApiStore, signals: Arc<signals::Signals>, settings: Settings) -> std::io::Result<Self> {
        let flusher = flush::Flusher::start(&store, &signals, settings.idempotency_ttl);
        let app = Self {
            inner: Arc::new(Inner {
                flusher,
                catalog: catalog::Catalog::default(),
                keys: auth::Keys::default(),
                audit: audit::Audit::start(&store),
                hashing: people::Hashing::default(),
                issuer: token::Issuer::default(),
                issuers: token::outside::Issuers::new(settings.issuers.clone())?,
                depths: depth::Depths::default(),
                schemas: schema::Checker::start()?,
                inspections: Turns::new(INSPECTIONS, INSPECTIONS_OF_ONE),
                upload_memory: upload::memory::Memory::new(settings.max_module_bytes),
                draining: CancellationToken::new(),
                streams: log::Streams::default(),
                rates: watch::Sender::new(settings.rates),
                quotas: quota::Quotas::default(),
                default_quotas: Defaults::new(settings.quotas.clone()),
                store,
                signals,
                settings,
            }),
        };
        tokio::spawn(Self::keep_uses(Arc::downgrade(&app.inner)));
        tokio::spawn(Self::keep_keys_short(Arc::downgrade(&app.inner)));
        Ok(app)
    }

    /// Answer everybody who waits for an end with where it stands now. What is asked from now on does not wait.
    pub fn drain(&self) {
        self.inner.draining.cancel();
    }

    /// Queue what was accepted, refuse what comes, and return when nothing is left to queue.
    pub async fn shutdown(&self) {
        self.inner.flusher.shutdown().await;
        self.audit_flush().await;
        if let Err(error) = self.write_uses().await {
            tracing::debug!(%error, "cannot write when keys were used");
        }
        self.give_back_tokens().await;
    }

    /// What the operator decided.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.inner.settings
    }

    /// What this server lets through, now and when it is changed.
    #[must_use]
    pub fn rates(&self) -> watch::Receiver<Rates> {
        self.inner.rates.subscribe()
    }

    /// Let other rates hold from now on.
    pub fn set_rates(&self, rates: Rates) {
        self.inner.rates.send_replace(rates);
    }

    /// What tenants may use from now on, where nothing else is said. Holds within two seconds.
    pub fn set_default_quotas(&self, quotas: Level) {
        self.inner.default_quotas.set(quotas);
    }

    fn default_quotas(&self) -> Level {
        let mut level = self.inner.default_quotas.level();
        // What `depth` and the duty `retention` go by. Where one is out of the quota's range, only this list does without it.
        let _ = level.set(Quota::QueueDepth, Some(Amount::At(self.inner.settings.max_queued)));
        let _ = level.set(Quota::RetentionDays, Some(Amount::At(self.inner.settings.retention_days)));
        level
    }

    /// What of the defaults the database goes by.
    #[must_use]
    pub fn defaults_of_queues(&self) -> Level {
        self.inner.default_quotas.of_queues()
    }

    /// Whether requests can be served.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn ready(&self) -> Result<()> {
        Ok(self.inner.store.ping().await?)
    }

    async fn tenant(&self, tenant: TenantId) -> Result<TenantConn> {
        Ok(self.inner.store.tenant(tenant).await?)
    }
}
