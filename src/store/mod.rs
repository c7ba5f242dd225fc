//! The only place with SQL: one file per aggregate, and `queue` for the protocol. Owns connections, roles and the
//! tenant setting; decides nothing (that is `app` and `domain`).
//!
//! Two stores, because there are two database roles: [`ApiStore`] sees one tenant at a time and only through
//! [`TenantConn`]; [`WorkerStore`] is for workers and background duties.

pub mod artifact;
pub mod audit;
mod breaker;
pub mod bulk;
pub mod compilation;
pub mod dead_letter;
pub mod duty;
pub mod grant;
pub mod invocation;
pub mod key;
pub mod kv;
mod lane;
pub mod log;
pub mod pause;
pub mod people;
pub mod queue;
pub mod quota;
pub mod reset;
pub mod retention;
pub mod secret;
mod shelf;
pub mod spending;
pub mod start;
pub mod task;
pub mod tenant;
pub mod usage;
pub mod why;
pub mod worker;

use std::ops::{Deref, DerefMut};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use sqlx::{Connection, PgConnection, PgPool, Postgres};

use crate::domain::ids::TenantId;
use crate::store::lane::Lane;
use crate::store::shelf::{Restarts, STARTED, Shelf};

/// What can go wrong between us and Postgres, as far as callers decide on it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Postgres does not answer, or not in time. Try again later; nothing is known about the statement's effect.
    #[error("the database is not available: {0}")]
    Unavailable(#[source] sqlx::Error),
    /// A row violates a constraint.
    #[error("constraint {constraint} is violated")]
    Constraint {
        /// Name of the constraint.
        constraint: String,
    },
    /// This worker, in this epoch, has been declared dead.
    #[error("this worker has been declared dead")]
    WorkerGone,
    /// The duty under whose fence this was to be written is somebody else's by now. Nothing was written.
    #[error("another process has taken this duty over")]
    FenceLost,
    /// Stored data is not what this version of the code wrote.
    #[error("stored data is not readable: {0}")]
    Corrupt(String),
    /// Anything else: our mistake.
    #[error("database error: {0}")]
    Other(#[source] sqlx::Error),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        if is_unavailable(&error) {
            return Self::Unavailable(error);
        }
        match error.as_database_error() {
            Some(db) if db.code().is_some_and(|code| code.starts_with("23")) => match db.constraint() {
                Some(constraint) => Self::Constraint { constraint: constraint.to_owned() },
                None => Self::Other(error),
            },
            _ => Self::Other(error),
        }
    }
}

/// Whether it passes by itself, as far as we can know.
fn is_unavailable(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::Protocol(_)
        | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(db) => {
            let code = db.code();
            let code = code.as_deref().unwrap_or_default();
            // 08 connection, 53 resources, 57 operator intervention (shutdown, cancel, timeout), 58 system, 40
            // rollback (deadlock, serialization): all pass. 55P03 lock timeout.
            ["08", "53", "57", "58", "40"].iter().any(|class| code.starts_with(class)) || code == "55P03"
        }
        _ => false,
    }
}

/// Result of a store call.
pub type Result<T> = std::result::Result<T, Error>;

/// Do `work`, and again after a pause as long as Postgres is not there for it, until `patience` is over. For the start of
/// a process: a host brings its services up in any order, and a Postgres that restarts is back in seconds.
///
/// # Errors
/// What the last try says; at once when it is not about reaching Postgres.
pub async fn patiently<T>(
    patience: Duration,
    mut work: impl AsyncFnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + patience;
    let mut pause = START_PAUSE.0;
    loop {
        let error = match work().await {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        let passes = error.chain().any(|cause| match cause.downcast_ref::<sqlx::Error>() {
            // A certificate that is refused will be so tomorrow; rustls says it like this.
            Some(sqlx::Error::Io(error)) if error.kind() == std::io::ErrorKind::InvalidData => false,
            Some(error) => is_unavailable(error),
            None => matches!(cause.downcast_ref::<Error>(), Some(Error::Unavailable(_))),
        });
        if !passes || Instant::now() + pause > deadline {
            return Err(error);
        }
        tracing::warn!("Postgres is not there yet, trying again: {error:#}");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(START_PAUSE.1);
    }
}

/// How to reach Postgres in one role.
#[derive(Debug, Clone)]
pub struct Connect {
    /// `postgres://…`. If its user is not the role itself, the role is set when connecting.
    pub url: String,
    /// Connections at most.
    pub max_connections: u32,
    /// Longest wait for a free connection, and for a new one.
    pub acquire_timeout: Duration,
    /// Longest run of one statement.
    pub statement_timeout: Duration,
}

/// Counts the tries of a read whose connection may turn out to be dead. A Postgres that went away and came back leaves
/// as many dead connections in the pool as there were idle ones; checking each at checkout would cost every request a
/// round trip, and without trying again each would cost one request its answer.
struct Tries(u32);

impl Tries {
    fn of(pool: &PgPool) -> Self {
        Self(pool.options().get_max_connections())
    }

    /// The answer, or `None` to try again.
    fn settle<T>(&mut self, answer: std::result::Result<T, sqlx::Error>) -> Option<Result<T>> {
        let dead = match &answer {
            Err(sqlx::Error::Io(_)) => true,
            // admin_shutdown, crash_shutdown
            Err(sqlx::Error::Database(db)) => matches!(db.code().as_deref(), Some("57P01" | "57P02")),
            _ => false,
        };
        if dead && self.0 > 0 {
            self.0 -= 1;
            return None;
        }
        Some(answer.map_err(Error::from))
    }
}

/// First and longest pause between two tries to reach Postgres at the start.
const START_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

const API_ROLE: &str = "sandbar_api";
const WORKER_ROLE: &str = "sandbar_worker";

fn options(connect: &Connect, role: &str) -> Result<PgConnectOptions> {
    let options = PgConnectOptions::from_str(&connect.url).map_err(Error::Other)?;
    let millis = connect.statement_timeout.as_millis().to_string();
    let mut settings = vec![
        ("search_path", "sandbar".to_owned()),
        ("statement_timeout", millis),
        // Sooner, so that a wait for a lock says so.
        ("lock_timeout", (connect.statement_timeout / 2).as_millis().to_string()),
        // A transaction of ours never waits for anything but Postgres; one that idles has lost its process.
        ("idle_in_transaction_session_timeout", "15s".to_owned()),
        ("jit", "off".to_owned()),
    ];
    if options.get_username() != role {
        settings.push(("role", role.to_owned()));
    }
    Ok(options.application_name("sandbar").options(settings))
}

fn pool(connect: &Connect) -> PgPoolOptions {
    PgPoolOptions::new()
        .max_connections(connect.max_connections)
        .acquire_timeout(connect.acquire_timeout)
        .idle_timeout(Duration::from_secs(600))
        // A dead server is found by the statement's own failure; a ping per checkout would cost a round trip each.
        .test_before_acquire(false)
}

/// Postgres as the API's role.
#[derive(Debug, Clone)]
pub struct ApiStore {
    pool: PgPool,
    shelf: Shelf,
    guard: breaker::Guard,
}

impl ApiStore {
    /// Connect.
    ///
    /// # Errors
    /// The URL is not one, or Postgres does not answer in time.
    pub async fn connect(connect: &Connect) -> Result<Self> {
        let restarts = Restarts::default();
        let noted = restarts.clone();
        let pool = pool(connect)
            .after_connect(move |connection, _| {
                let noted = noted.clone();
                Box::pin(async move {
                    noted.note(sqlx::query_scalar(STARTED).fetch_one(connection).await?);
                    Ok(())
                })
            })
            .after_release(|connection, _| {
                Box::pin(async move {
                    sqlx::query("SELECT set_config('sandbar.tenant', '', false)").execute(connection).await?;
                    Ok(true)
                })
            })
            .connect_with(options(connect, API_ROLE)?)
            .await?;
        Ok(Self { shelf: Shelf::of(&pool, restarts), pool, guard: breaker::Guard::new(connect) })
    }

    /// A connection that sees this tenant and nobody else. The only way to tenant data.
    ///
    /// # Errors
    /// No connection in time.
    pub async fn tenant(&self, tenant: TenantId) -> Result<TenantConn> {
        // It has answered a moment ago; only while Postgres is away nobody gets past the breaker.
        if self.guard.away_for().is_zero()
            && let Some(connection) = self.shelf.set_to(tenant, self.guard.failed_at())
        {
            return Ok(TenantConn { connection: Some(connection), shelf: self.shelf.clone(), tenant });
        }
        let work = async {
            let mut tries = Tries::of(&self.pool);
            loop {
                if let Some(answer) = tries.settle(self.try_tenant(tenant).await) {
                    return answer;
                }
            }
        };
        self.guard.call(work).await
    }

    async fn try_tenant(&self, tenant: TenantId) -> std::result::Result<TenantConn, sqlx::Error> {
        let mut connection = self.shelf.any().await?;
        sqlx::query("SELECT set_config('sandbar.tenant', $1, false)")
            .bind(tenant.to_string())
            .execute(&mut *connection)
            .await?;
        Ok(TenantConn { connection: Some(connection), shelf: self.shelf.clone(), tenant })
    }

    /// One round trip, for readiness.
    ///
    /// # Errors
    /// Postgres does not answer in time.
    pub async fn ping(&self) -> Result<()> {
        let work = async {
            let mut tries = Tries::of(&self.pool);
            loop {
                if let Some(answer) = tries.settle(sqlx::query("SELECT 1").execute(&self.pool).await) {
                    return answer.map(drop);
                }
            }
        };
        self.guard.probe(work).await
    }

    /// How long calls have been refused because Postgres does not answer; zero while they go.
    #[must_use]
    pub fn away_for(&self) -> Duration {
        self.guard.away_for()
    }

    /// A connection of its own that hears notifications and reconnects by itself.
    ///
    /// # Errors
    /// Postgres does not answer in time.
    pub async fn listener(&self) -> Result<PgListener> {
        Ok(PgListener::connect_with(&self.pool).await?)
    }

    /// Give all connections back; waits for those in use.
    pub async fn close(&self) {
        self.shelf.clear();
        self.pool.close().await;
    }
}

/// A connection set to one tenant. Afterwards it waits for the same tenant's next use, or is reset and goes back to the
/// pool.
#[derive(Debug)]
pub struct TenantConn {
    /// There until the drop.
    connection: Option<PoolConnection<Postgres>>,
    shelf: Shelf,
    tenant: TenantId,
}

impl TenantConn {
    /// Whose it is.
    #[must_use]
    pub fn tenant(&self) -> TenantId {
        self.tenant
    }
}

impl Deref for TenantConn {
    type Target = PgConnection;
    fn deref(&self) -> &PgConnection {
        let Some(connection) = &self.connection else { unreachable!("taken only by the drop") };
        connection
    }
}

impl DerefMut for TenantConn {
    fn deref_mut(&mut self) -> &mut PgConnection {
        let Some(connection) = &mut self.connection else { unreachable!("taken only by the drop") };
        connection
    }
}

impl Drop for TenantConn {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.shelf.put(connection, self.tenant);
        }
    }
}

/// Postgres as the role of workers and background duties.
#[derive(Debug, Clone)]
pub struct WorkerStore {
    pool: PgPool,
    lanes: Arc<Lanes>,
    /// Set while a background duty's run uses it: see [`WorkerStore::under`].
    fence: Option<duty::Held>,
}

/// The connections of the statements that a worker makes all the time.
#[derive(Debug, Default)]
struct Lanes {
    claim: Lane,
    ack: Lane,
}

impl WorkerStore {
    /// Connect.
    ///
    /// # Errors
    /// The URL is not one, or Postgres does not answer in time.
    pub async fn connect(connect: &Connect) -> Result<Self> {
        let pool = pool(connect).connect_with(options(connect, WORKER_ROLE)?).await?;
        Ok(Self { pool, lanes: Arc::default(), fence: None })
    }

    /// A connection of its own that hears notifications and reconnects by itself.
    ///
    /// # Errors
    /// Postgres does not answer in time.
    pub async fn listener(&self) -> Result<PgListener> {
        Ok(PgListener::connect_with(&self.pool).await?)
    }

    /// Give all connections back; waits for those in use.
    pub async fn close(&self) {
        self.lanes.claim.release();
        self.lanes.ack.release();
        self.pool.close().await;
    }
}

/// Bring the schema up to date. Safe to run from several processes at once.
///
/// # Errors
/// Postgres does not answer, the user may not create roles or tables, or a migration was changed after it ran.
pub async fn migrate(admin_url: &str, timeout: Duration) -> anyhow::Result<()> {
    use anyhow::Context;
    let options = PgConnectOptions::from_str(admin_url)
        .context("the database URL is not a postgres:// URL")?
        .application_name("sandbar migrate")
        // That something is there already is no news for whoever starts a server.
        .options([("search_path", "sandbar"), ("client_min_messages", "warning")]);
    let work = async {
        let mut connection =
            PgConnection::connect_with(&options).await.context("cannot connect to Postgres")?;
        // Two processes creating the schema at once would race in the catalogue.
        sqlx::query("SELECT pg_advisory_lock(7260001)").execute(&mut connection).await?;
        sqlx::query("CREATE SCHEMA IF NOT EXISTS sandbar")
            .execute(&mut connection)
            .await
            .context("cannot create the schema `sandbar`")?;
        sqlx::migrate!("./migrations").run(&mut connection).await.context("cannot migrate the schema")?;
        connection.close().await?;
        anyhow::Ok(())
    };
    tokio::time::timeout(timeout, work).await.context("migrating took too long")?
}
