//! The API's calls to Postgres behind a circuit breaker and a bound in time. Owns both; the rule when to open is
//! `domain::breaker`. A connection whose other side has vanished without a word would hold its caller for as long as
//! TCP does: hence the bound here, besides the timeouts that Postgres keeps.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::domain::breaker::Breaker;
use crate::store::{Connect, Error, Result};

/// What Postgres gets beyond its own timeouts to say that they have passed.
const MARGIN: Duration = Duration::from_secs(2);

/// Guards calls. Cheap to clone; clones share the state.
#[derive(Debug, Clone)]
pub(super) struct Guard {
    breaker: Arc<Mutex<Breaker>>,
    failed_at: Arc<Mutex<Option<Instant>>>,
    longest: Duration,
}

impl Guard {
    pub(super) fn new(connect: &Connect) -> Self {
        Self {
            breaker: Arc::default(),
            failed_at: Arc::default(),
            longest: connect.acquire_timeout + connect.statement_timeout + MARGIN,
        }
    }

    /// Do `work`, unless Postgres has not answered lately.
    ///
    /// # Errors
    /// What `work` says; [`Error::Unavailable`] at once while calls are refused, and when it takes too long.
    pub(super) async fn call<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        if !self.lock().admit(Instant::now()) {
            return Err(away("Postgres has not answered lately; not asking before it had a pause"));
        }
        self.probe(work).await
    }

    /// Do `work` in any case, and learn from it.
    ///
    /// # Errors
    /// What `work` says; [`Error::Unavailable`] when it takes too long.
    pub(super) async fn probe<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let answer = match tokio::time::timeout(self.longest, work).await {
            Ok(answer) => answer,
            Err(_) => Err(away("Postgres did not answer in time")),
        };
        let answered = !matches!(&answer, Err(error) if is_away(error));
        if !answered {
            *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
        if self.lock().note(Instant::now(), answered) {
            if answered {
                tracing::info!("Postgres answers again");
            } else {
                tracing::error!("Postgres does not answer; refusing calls, and trying one now and then");
            }
        }
        answer
    }

    /// When a call last got no answer.
    pub(super) fn failed_at(&self) -> Option<Instant> {
        *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn away_for(&self) -> Duration {
        self.lock().open_for(Instant::now())
    }

    fn lock(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn away(why: &'static str) -> Error {
    Error::Unavailable(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, why)))
}

/// Postgres as such does not answer. A statement that took too long, or met a lock or a deadlock, was answered.
fn is_away(error: &Error) -> bool {
    match error {
        Error::Unavailable(sqlx::Error::Database(db)) => {
            let code = db.code();
            let code = code.as_deref().unwrap_or_default();
            code.starts_with("08")
                || code.starts_with("53")
                || code.starts_with("57P")
                || code.starts_with("58")
        }
        Error::Unavailable(_) => true,
        _ => false,
    }
}
