//! A context for native tests of tasks: facts from the test, reports kept for the test. Never
//! compiled into a component.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock, PoisonError};
use std::time::Duration;

use crate::context::{Context, Facts};
use crate::fields::fields;

/// What [`Context::test`] starts: the facts of an attempt, to be changed before [`build`].
///
/// ```
/// use sandbar_guest::{Context, TaskError, task};
///
/// #[task]
/// fn greet(ctx: &Context, name: String) -> Result<String, TaskError> {
///     sandbar_guest::log::info!(name = name.as_str(); "greeting");
///     ctx.progress(1, 1, "done");
///     Ok(format!("Hello {name}, attempt {}", ctx.attempt()))
/// }
///
/// let ctx = Context::test().attempt(2).capture_logs().build();
/// assert_eq!(greet(&ctx, "Ada".to_owned()).unwrap(), "Hello Ada, attempt 2");
/// assert_eq!(ctx.reported_progress()[0].message, "done");
/// assert_eq!(ctx.captured_logs()[0].fields, [("name".to_owned(), "Ada".to_owned())]);
/// ```
///
/// [`build`]: TestContext::build
#[derive(Debug)]
#[must_use]
pub struct TestContext {
    facts: Facts,
    remaining: Duration,
    checks: Option<u32>,
    capture: bool,
}

/// One report of progress, as [`Context::reported_progress`] returns it.
///
/// ```
/// let ctx = sandbar_guest::Context::test().build();
/// ctx.progress(1, 4, "a quarter");
/// let report = &ctx.reported_progress()[0];
/// assert_eq!((report.done, report.total, report.message.as_str()), (1, 4, "a quarter"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Units done.
    pub done: u64,
    /// Units in all; 0 means unknown.
    pub total: u64,
    /// What the task said with it.
    pub message: String,
}

/// One log record, as [`Context::captured_logs`] returns it.
///
/// ```
/// use sandbar_guest::{Context, log};
///
/// let ctx = Context::test().capture_logs().build();
/// log::error!(target: "mail", code = 550; "bounced");
/// let record = &ctx.captured_logs()[0];
/// assert_eq!((record.level, record.target.as_str()), (log::Level::Error, "mail"));
/// assert_eq!(record.fields, [("code".to_owned(), "550".to_owned())]);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRecord {
    /// How severe.
    pub level: log::Level,
    /// Where from, a module path unless the task chose otherwise.
    pub target: String,
    /// The formatted message.
    pub message: String,
    /// The key-values, formatted.
    pub fields: Vec<(String, String)>,
}

/// What a context of a test holds beside the facts.
#[derive(Debug, Default)]
pub(crate) struct State {
    remaining: Duration,
    /// How often [`Context::cancelled`] still says no; none: always.
    checks: Option<AtomicU32>,
    progress: Mutex<Vec<Progress>>,
    logs: Captured,
}

type Captured = Arc<Mutex<Vec<LogRecord>>>;

impl Context {
    /// Starts a context for a native test: invocation `test`, attempt 1 of 1, 60 s left, no tags, not
    /// cancelled. Not available in a component.
    pub fn test() -> TestContext {
        TestContext {
            facts: Facts {
                invocation_id: "test".to_owned(),
                task: "test".to_owned(),
                attempt: 1,
                max_attempts: 1,
                timeout: Duration::from_secs(60),
                tags: Vec::new(),
            },
            remaining: Duration::from_secs(60),
            checks: None,
            capture: false,
        }
    }

    /// Every progress report so far, in order. Only in native tests; the host keeps the latest.
    #[must_use]
    pub fn reported_progress(&self) -> Vec<Progress> {
        lock(&self.test.progress).clone()
    }

    /// The log records of this thread since this context was built with
    /// [`TestContext::capture_logs`], in order.
    #[must_use]
    pub fn captured_logs(&self) -> Vec<LogRecord> {
        lock(&self.test.logs).clone()
    }

    pub(crate) fn facts(&self) -> &Facts {
        self.facts.get_or_init(Facts::default)
    }

    pub(crate) fn host_remaining(&self) -> Duration {
        self.test.remaining
    }

    pub(crate) fn host_cancelled(&self) -> bool {
        let Some(checks) = &self.test.checks else { return false };
        checks.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err()
    }

    pub(crate) fn host_progress(&self, done: u64, total: u64, message: &str) {
        lock(&self.test.progress).push(Progress { done, total, message: message.to_owned() });
    }
}

impl TestContext {
    /// Sets the id of the invocation.
    pub fn invocation_id(mut self, id: impl Into<String>) -> Self {
        self.facts.invocation_id = id.into();
        self
    }

    /// Sets the name of the task.
    pub fn task(mut self, name: impl Into<String>) -> Self {
        self.facts.task = name.into();
        self
    }

    /// Sets the number of the attempt, and raises the maximum to it where it is lower.
    pub fn attempt(mut self, attempt: u32) -> Self {
        self.facts.attempt = attempt;
        self.facts.max_attempts = self.facts.max_attempts.max(attempt);
        self
    }

    /// Sets how many attempts there may be.
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.facts.max_attempts = attempts;
        self
    }

    /// Sets the whole time of the attempt, and the time left to the same.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.facts.timeout = timeout;
        self.remaining = timeout;
        self
    }

    /// Sets the time left. It stands still: a test has no clock to wait for.
    pub fn remaining(mut self, remaining: Duration) -> Self {
        self.remaining = remaining;
        self
    }

    /// Adds a tag.
    pub fn tag(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.facts.tags.push((key.into(), value.into()));
        self.facts.tags.sort();
        self
    }

    /// Makes the context say that a cancellation has been asked for.
    pub fn cancelled(self) -> Self {
        self.cancelled_after(0)
    }

    /// Makes the context say no to the first `checks` calls of [`Context::cancelled`] and yes to all
    /// later ones: a cancellation in the midst of the work.
    ///
    /// ```
    /// use sandbar_guest::{Context, TaskError, task};
    ///
    /// #[task]
    /// fn count_up(ctx: &Context, to: u32) -> Result<u32, TaskError> {
    ///     for n in 0..to {
    ///         if ctx.cancelled() {
    ///             return Err(TaskError::fatal(format!("cancelled at {n}")));
    ///         }
    ///     }
    ///     Ok(to)
    /// }
    ///
    /// let ctx = Context::test().cancelled_after(3).build();
    /// assert_eq!(count_up(&ctx, 10).unwrap_err().message(), "cancelled at 3");
    /// ```
    pub fn cancelled_after(mut self, checks: u32) -> Self {
        self.checks = Some(checks);
        self
    }

    /// Keeps what the task logs, of every level, for [`Context::captured_logs`]; with the feature
    /// `tracing`, what it says through those macros too.
    ///
    /// The first call installs a logger for the process; nothing is captured if the test has
    /// installed another before. Records go to the context that was built last on the same thread.
    pub fn capture_logs(mut self) -> Self {
        self.capture = true;
        self
    }

    /// The context.
    #[must_use]
    pub fn build(self) -> Context {
        let logs = Captured::default();
        if self.capture {
            // Other tests' threads wait until both are there: an event between the two would come as
            // a plain record.
            static INSTALLED: Once = Once::new();
            INSTALLED.call_once(|| {
                if log::set_logger(&Capture).is_ok() {
                    #[cfg(feature = "tracing")]
                    crate::spans::install(log::LevelFilter::Trace, keep);
                    log::set_max_level(log::LevelFilter::Trace);
                }
            });
            CAPTURED.set(Some(Arc::clone(&logs)));
        }
        Context {
            facts: OnceLock::from(self.facts),
            test: State {
                remaining: self.remaining,
                checks: self.checks.map(AtomicU32::new),
                progress: Mutex::default(),
                logs,
            },
        }
    }
}

thread_local! {
    /// Tests run one per thread, so a thread's records are a test's records.
    static CAPTURED: RefCell<Option<Captured>> = const { RefCell::new(None) };
}

struct Capture;

impl log::Log for Capture {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        keep(record.level(), record.target(), &record.args().to_string(), fields(record));
    }

    fn flush(&self) {}
}

/// Keeps one record for the test of this thread, if there is one.
fn keep(level: log::Level, target: &str, message: &str, fields: Vec<(String, String)>) {
    CAPTURED.with_borrow(|captured| {
        if let Some(captured) = captured {
            let (target, message) = (target.to_owned(), message.to_owned());
            lock(captured).push(LogRecord { level, target, message, fields });
        }
    });
}

/// A panic in one test must not hide what another recorded.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
