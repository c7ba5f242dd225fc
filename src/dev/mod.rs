//! The embedded Postgres of `sandbar dev` and of the tests: a cluster of its own in a directory, reachable
//! through a Unix socket only, never run as root, put right again after anything that was killed.
//!
//! What it keeps in the directory it is given:
//!
//! - `lock`: held while one process owns the directory;
//! - `secrets`: the passwords of the cluster's three logins, made once (mode 0600);
//! - `pg`: the cluster, or a link to it (see `home`);
//! - `run`: the socket, when its path is short enough;
//! - `postgres.log`: what the server says.
//!
//! Postgres runs in a process group of its own, so Ctrl-C in a terminal reaches only `sandbar`, which then stops
//! things in order. When the owning process is killed, a small watcher stops the server; when that is killed
//! too, the next start does.
//!
//! It never touches another cluster, never listens on a network, and knows nothing of the schema but the names
//! of the two roles that migrations create. Its few statements set up the server itself; all others are in
//! `store`.

mod error;
mod home;
mod install;
mod server;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sqlx::{Connection as _, PgConnection};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

pub use error::DevError;

use crate::config::Secret;
use home::{Home, Lock, Secrets};
use install::Installation;
use server::{Running, Server};

/// The superuser of the cluster.
const ADMIN: &str = "sandbar";
/// The login of the API; migrations create the role.
const API: &str = "sandbar_api";
/// The login of workers; migrations create the role.
const WORKER: &str = "sandbar_worker";
/// The database of `sandbar dev`.
const DATABASE: &str = "sandbar";
/// The database that every cluster has.
const MAINTENANCE: &str = "postgres";

/// First and longest pause between attempts to restart a server that died.
const RESTART_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// Whose login a URL is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Login {
    /// The superuser: migrations, `CREATE DATABASE`.
    Admin,
    /// `sandbar_api`; valid after [`EmbeddedPostgres::set_role_passwords`].
    Api,
    /// `sandbar_worker`; valid after [`EmbeddedPostgres::set_role_passwords`].
    Worker,
}

/// A running Postgres that belongs to this process.
///
/// A server that dies is started again. Call [`EmbeddedPostgres::stop`] at the end; a value that is only dropped
/// is stopped as well, but nobody waits for it.
pub struct EmbeddedPostgres {
    server: Arc<Server>,
    secrets: Secrets,
    pid: watch::Receiver<Option<u32>>,
    stop: oneshot::Sender<()>,
    supervisor: JoinHandle<Result<(), DevError>>,
    // Released last: whoever gets it next must find the server stopped.
    lock: Lock,
}

impl EmbeddedPostgres {
    /// Starts the cluster of a directory; makes directory, passwords, cluster and the database `sandbar` when
    /// they are missing. Takes well under a second on an existing cluster that was stopped in order.
    ///
    /// # Errors
    /// When another process owns the directory, no server binaries are found, or the server does not come up;
    /// every message says what to do about it.
    pub async fn start(dir: &Path) -> Result<Self, DevError> {
        let wanted = dir.to_owned();
        let (lock, secrets, home, installation) = blocking(move || {
            let lock = Lock::take(&wanted)?;
            let home = Home::locate(lock.dir())?;
            let secrets = Secrets::load_or_create(lock.dir(), home.is_initialized())?;
            let installation = Installation::find(home.cluster_version()?)?;
            Ok((lock, secrets, home, installation))
        })
        .await?;
        if !home.is_initialized() {
            home.initialize(&installation, ADMIN, &secrets.admin).await?;
        }
        let admin = url(&home.sockets, ADMIN, &secrets.admin, MAINTENANCE);
        let server = Arc::new(Server::new(home, installation, lock.dir().join("postgres.log"), admin));
        server.clear_leftovers().await?;
        let running = server.launch().await?;
        let (pid_sender, pid) = watch::channel(Some(running.pid()));
        let (stop, stopped) = oneshot::channel();
        let supervisor = tokio::spawn(supervise(Arc::clone(&server), running, stopped, pid_sender));
        let postgres = Self { server, secrets, pid, stop, supervisor, lock };
        match postgres.create_database().await {
            Ok(()) => Ok(postgres),
            Err(error) => {
                // The first error is the one to report.
                let _ = postgres.stop().await;
                Err(error)
            }
        }
    }

    /// The database `sandbar` as superuser: for migrations.
    pub fn admin_url(&self) -> Secret {
        self.url(Login::Admin, DATABASE)
    }

    /// The database `sandbar` as `sandbar_api`.
    pub fn api_url(&self) -> Secret {
        self.url(Login::Api, DATABASE)
    }

    /// The database `sandbar` as `sandbar_worker`.
    pub fn worker_url(&self) -> Secret {
        self.url(Login::Worker, DATABASE)
    }

    /// Any database of the cluster; the name must be plain (letters, digits, `_`, `-`).
    pub fn url(&self, login: Login, database: &str) -> Secret {
        let (user, password) = match login {
            Login::Admin => (ADMIN, &self.secrets.admin),
            Login::Api => (API, &self.secrets.api),
            Login::Worker => (WORKER, &self.secrets.worker),
        };
        url(&self.server.home.sockets, user, password, database)
    }

    /// Lets the roles that migrations created log in with the passwords of this cluster. Call it after
    /// migrations; harmless when repeated.
    ///
    /// # Errors
    /// When a role is missing or the server does not answer.
    pub async fn set_role_passwords(&self) -> Result<(), DevError> {
        let mut admin = self.connect(DATABASE).await?;
        for (role, password) in [(API, &self.secrets.api), (WORKER, &self.secrets.worker)] {
            // ALTER ROLE takes no parameters. Both texts are ours: constant names and hexadecimal digits.
            let statement = format!("ALTER ROLE {role} LOGIN PASSWORD '{}'", password.expose());
            sqlx::raw_sql(&statement).execute(&mut admin).await.map_err(DevError::Database)?;
        }
        admin.close().await.map_err(DevError::Database)
    }

    /// Process id of the postmaster; `None` while a server that died is being started again.
    pub fn pid(&self) -> Option<u32> {
        *self.pid.borrow()
    }

    /// The directory that was given to [`EmbeddedPostgres::start`], as an absolute path.
    pub fn dir(&self) -> &Path {
        self.lock.dir()
    }

    /// Where the cluster is: `<dir>/pg`, or the directory that it links to.
    pub fn cluster(&self) -> &Path {
        &self.server.home.cluster
    }

    /// Stops the server: a fast shutdown, after 10 s an immediate one, after 5 s more SIGKILL. Connections are
    /// closed, so stop what uses it first. Returns when the server is gone.
    ///
    /// # Errors
    /// When a fast shutdown did not do; no data is lost, the next start takes longer.
    pub async fn stop(self) -> Result<(), DevError> {
        // An error means that the supervisor is gone already, and the next line says how.
        let _ = self.stop.send(());
        match self.supervisor.await {
            Ok(result) => result,
            Err(error) => Err(DevError::Unusable(format!("the supervisor of Postgres failed: {error}"))),
        }
    }

    async fn connect(&self, database: &str) -> Result<PgConnection, DevError> {
        let options = server::connect_options(&self.url(Login::Admin, database))?;
        PgConnection::connect_with(&options).await.map_err(DevError::Database)
    }

    async fn create_database(&self) -> Result<(), DevError> {
        let mut admin = self.connect(MAINTENANCE).await?;
        let exists: Option<i32> = sqlx::query_scalar("SELECT 1 FROM pg_database WHERE datname = $1")
            .bind(DATABASE)
            .fetch_optional(&mut admin)
            .await
            .map_err(DevError::Database)?;
        if exists.is_none() {
            let statement = format!("CREATE DATABASE {DATABASE}");
            sqlx::raw_sql(&statement).execute(&mut admin).await.map_err(DevError::Database)?;
        }
        admin.close().await.map_err(DevError::Database)
    }
}

impl std::fmt::Debug for EmbeddedPostgres {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddedPostgres")
            .field("dir", &self.dir())
            .field("pid", &self.pid())
            .finish_non_exhaustive()
    }
}

/// Owns the server process until it is told to stop, or its owner is dropped; restarts what dies.
async fn supervise(
    server: Arc<Server>,
    mut running: Running,
    mut stop: oneshot::Receiver<()>,
    pid: watch::Sender<Option<u32>>,
) -> Result<(), DevError> {
    loop {
        tokio::select! {
            _ = &mut stop => return running.stop().await,
            status = running.ended() => {
                pid.send_replace(None);
                tracing::error!(%status, "Postgres ended by itself, starting it again");
            }
        }
        let mut pause = RESTART_PAUSE.0;
        running = loop {
            let restarted = async {
                server.clear_leftovers().await?;
                server.launch().await
            };
            let result = tokio::select! {
                // A launch that is dropped half-way leaves the watcher to stop what it started.
                _ = &mut stop => return Ok(()),
                result = restarted => result,
            };
            match result {
                Ok(running) => break running,
                Err(error) => tracing::error!(%error, "Postgres did not start, trying again"),
            }
            tokio::select! {
                _ = &mut stop => return Ok(()),
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(RESTART_PAUSE.1);
        };
        pid.send_replace(Some(running.pid()));
        tracing::info!(pid = running.pid(), "Postgres is back");
    }
}

/// A URL over the Unix socket that sqlx and libpq both take. Port and TLS mode are spelled out, because
/// both clients would otherwise take them from the environment.
fn url(sockets: &Path, user: &str, password: &Secret, database: &str) -> Secret {
    use std::fmt::Write as _;
    use std::os::unix::ffi::OsStrExt as _;
    let mut host = String::new();
    for byte in sockets.as_os_str().as_bytes() {
        // Writing to a String cannot fail.
        let _ = match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-' => {
                write!(host, "{}", char::from(*byte))
            }
            other => write!(host, "%{other:02X}"),
        };
    }
    let port = home::PORT;
    Secret::new(format!(
        "postgres://{user}:{}@localhost:{port}/{database}?host={host}&sslmode=disable",
        password.expose()
    ))
}

/// Runs file work off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DevError> + Send + 'static,
) -> Result<T, DevError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => {
            Err(DevError::io("run a blocking task for", PathBuf::new())(std::io::Error::other(error)))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn a_url_survives_a_directory_with_odd_characters() {
        let secret = url(Path::new("/a b/ü&?=%/run"), "sandbar", &Secret::new("00ff"), "db");
        let options = server::connect_options(&secret).unwrap();
        assert_eq!(options.get_socket().unwrap(), Path::new("/a b/ü&?=%/run"));
        assert_eq!(options.get_database(), Some("db"));
        assert_eq!(options.get_username(), "sandbar");
        assert_eq!(options.get_port(), 5432);
    }
}
