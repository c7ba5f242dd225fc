//! What a task may know about the attempt it serves, and what it may report on the way. Owns the
//! view; the facts come from the host, or from [`testing`](crate::testing) in native tests.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The attempt at hand. A task takes it as `ctx: &Context` before its input.
///
/// In native tests make one with [`Context::test`].
///
/// ```
/// use std::time::Duration;
/// use sandbar_guest::{Context, TaskError, log, task};
///
/// /// Works through a list until its time is nearly up.
/// #[task]
/// fn work(ctx: &Context, items: Vec<String>) -> Result<usize, TaskError> {
///     log::info!(invocation = ctx.invocation_id(), of = ctx.max_attempts(); "attempt {}", ctx.attempt());
///     for (done, item) in items.iter().enumerate() {
///         if ctx.cancelled() || ctx.remaining() < Duration::from_secs(1) {
///             return Ok(done);
///         }
///         ctx.progress(done as u64, items.len() as u64, item);
///     }
///     Ok(items.len())
/// }
///
/// let late = Context::test().remaining(Duration::from_millis(10)).build();
/// assert_eq!(work(&late, vec!["a".to_owned()]), Ok(0));
/// ```
#[derive(Debug)]
pub struct Context {
    /// Asked of the host when first needed: most tasks need none of it.
    pub(crate) facts: OnceLock<Facts>,
    #[cfg(not(target_family = "wasm"))]
    pub(crate) test: crate::testing::State,
}

/// What does not change during an attempt.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    pub(crate) invocation_id: String,
    pub(crate) task: String,
    pub(crate) attempt: u32,
    pub(crate) max_attempts: u32,
    pub(crate) timeout: Duration,
    pub(crate) tags: Vec<(String, String)>,
}

impl Context {
    /// Id of the invocation, the same for every attempt: the key that makes outside effects
    /// idempotent.
    #[must_use]
    pub fn invocation_id(&self) -> &str {
        &self.facts().invocation_id
    }

    /// Name of the task.
    #[must_use]
    pub fn task(&self) -> &str {
        &self.facts().task
    }

    /// Number of this attempt; the first is 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.facts().attempt
    }

    /// How many attempts the retry policy allows in all.
    #[must_use]
    pub fn max_attempts(&self) -> u32 {
        self.facts().max_attempts
    }

    /// Wall-clock time this attempt may take in all, host calls included.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.facts().timeout
    }

    /// Wall-clock time left before the attempt is stopped; zero when none is.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.host_remaining()
    }

    /// When the attempt will be stopped.
    ///
    /// ```
    /// # use std::time::{Duration, Instant};
    /// # use sandbar_guest::Context;
    /// let ctx = Context::test().timeout(Duration::from_secs(9)).build();
    /// assert!(ctx.deadline() > Instant::now() + Duration::from_secs(8));
    /// ```
    #[must_use]
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.remaining()
    }

    /// Tags given at invocation, in the order of their keys.
    ///
    /// ```
    /// # use sandbar_guest::Context;
    /// let ctx = Context::test().tag("region", "eu").build();
    /// assert_eq!((ctx.tag("region"), ctx.tag("colour")), (Some("eu"), None));
    /// assert_eq!(ctx.tags().len(), 1);
    /// ```
    #[must_use]
    pub fn tags(&self) -> &[(String, String)] {
        &self.facts().tags
    }

    /// The value of one tag.
    #[must_use]
    pub fn tag(&self, key: &str) -> Option<&str> {
        self.tags().iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// Whether a cancellation has been asked for. A task that returns soon afterwards may clean up;
    /// one that does not is stopped.
    #[must_use]
    pub fn cancelled(&self) -> bool {
        self.host_cancelled()
    }

    /// Reports progress; `total` 0 means unknown. The host keeps the latest report only, and the
    /// first 1,024 bytes of its message.
    pub fn progress(&self, done: u64, total: u64, message: impl AsRef<str>) {
        self.host_progress(done, total, message.as_ref());
    }
}
