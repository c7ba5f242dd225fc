//! What can go wrong with the embedded Postgres, said so that the reader knows what to do.

use std::path::{Path, PathBuf};

/// Why the embedded Postgres is not running.
#[derive(Debug, thiserror::Error)]
pub enum DevError {
    /// Another process owns the directory.
    #[error("another sandbar{} is using {dir}; stop it, or choose another directory with --data-dir",
        pid.map_or_else(String::new, |pid| format!(" (process {pid})")), dir = dir.display())]
    Locked {
        /// The directory.
        dir: PathBuf,
        /// Its owner, when known.
        pid: Option<u32>,
    },
    /// There is no Postgres to run.
    #[error(
        "no PostgreSQL server binaries found (looked in {looked}); install PostgreSQL {wanted} \
         (Debian: apt-get install postgresql; or `make setup`), set SANDBAR_PG_BIN to its bin directory, \
         or use an existing server with --database-url"
    )]
    NoBinaries {
        /// The places that were searched.
        looked: String,
        /// The version that is needed.
        wanted: String,
    },
    /// The directory cannot be used as it is.
    #[error("{0}")]
    Unusable(String),
    /// A file operation failed.
    #[error("cannot {what} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// `initdb` failed.
    #[error("cannot create a Postgres cluster in {cluster}: {output}", cluster = cluster.display())]
    Initdb {
        /// Where the cluster was to be.
        cluster: PathBuf,
        /// The end of what `initdb` said.
        output: String,
    },
    /// The server did not come up.
    #[error("Postgres did not start: {why}; the end of {log}:\n{tail}", log = log.display())]
    Start {
        /// It ended, or took too long.
        why: String,
        /// Its log file.
        log: PathBuf,
        /// The last lines of this start.
        tail: String,
    },
    /// The server did not stop in order.
    #[error(
        "Postgres (process {pid}) had to be stopped by force; the next start recovers its data from the log"
    )]
    Forced {
        /// The postmaster.
        pid: u32,
    },
    /// A statement failed.
    #[error("the embedded Postgres: {0}")]
    Database(#[source] sqlx::Error),
}

impl DevError {
    /// For `map_err` on file operations.
    pub(super) fn io(what: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { what, path, source }
    }
}
