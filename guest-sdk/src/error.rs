//! How a task fails: once more or for good.

use std::fmt;
use std::time::Duration;

/// Why a task did not succeed, and whether another attempt may.
///
/// Every [`std::error::Error`] becomes a retryable `TaskError` through `?`, with the messages of its
/// sources: what fails by surprise is mostly a network or a neighbour, and the attempts are bounded.
/// Where another attempt cannot help, say so:
///
/// ```
/// use sandbar_guest::TaskError;
///
/// fn parse(text: &str) -> Result<u32, TaskError> {
///     Ok(text.trim().parse().map_err(TaskError::fatal)?)
/// }
///
/// assert!(!parse("seven").unwrap_err().is_retryable());
/// ```
///
/// Like `anyhow::Error` it does not implement [`std::error::Error`] itself, which is what makes that
/// conversion possible.
#[derive(Clone, PartialEq, Eq)]
pub struct TaskError {
    message: String,
    retryable: bool,
    retry_after: Option<Duration>,
}

impl TaskError {
    /// A failure after which the host runs the invocation again, as its retry policy says.
    ///
    /// The host keeps the first 4,096 bytes of the message.
    pub fn retryable(message: impl fmt::Display) -> Self {
        Self { message: message.to_string(), retryable: true, retry_after: None }
    }

    /// A failure that no other attempt can mend: the invocation is dead at once.
    ///
    /// The host keeps the first 4,096 bytes of the message.
    pub fn fatal(message: impl fmt::Display) -> Self {
        Self { message: message.to_string(), retryable: false, retry_after: None }
    }

    /// Asks for the next attempt no earlier than `delay` from now, in place of the policy's backoff.
    ///
    /// For what a server says in `Retry-After`. Without effect on a fatal error.
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// The message, for people.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Whether another attempt may succeed.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.retryable
    }

    /// The delay that was asked for with [`TaskError::retry_after`].
    #[must_use]
    pub fn delay(&self) -> Option<Duration> {
        self.retry_after
    }
}

impl fmt::Display for TaskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl fmt::Debug for TaskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.retryable { "retryable" } else { "fatal" };
        write!(f, "{kind}: {}", self.message)?;
        match self.retry_after {
            Some(delay) => write!(f, " (retry after {delay:?})"),
            None => Ok(()),
        }
    }
}

impl<E: std::error::Error> From<E> for TaskError {
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let cause_message = cause.to_string();
            // Many errors already end with what their source says.
            if !message.ends_with(&cause_message) {
                message.push_str(": ");
                message.push_str(&cause_message);
            }
            source = cause.source();
        }
        Self::retryable(message)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[derive(Debug)]
    struct Outer(std::num::ParseIntError);

    impl fmt::Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("reading the count")
        }
    }

    impl std::error::Error for Outer {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn an_error_through_the_question_mark_is_retryable_and_tells_its_causes() {
        let cause = "x".parse::<u8>().unwrap_err();
        let fail = || -> Result<(), TaskError> { Err(Outer(cause))? };
        let error = fail().unwrap_err();
        assert!(error.is_retryable());
        assert_eq!(error.message(), "reading the count: invalid digit found in string");
        assert_eq!(error.delay(), None);
    }

    #[test]
    fn a_task_error_passes_the_question_mark_unchanged() {
        let error = TaskError::fatal("no such order");
        let fail = || -> Result<(), TaskError> { Err(error.clone())? };
        assert_eq!(fail(), Err(error.clone()));
    }

    #[test]
    fn retry_after_is_kept_and_shown() {
        let error = TaskError::retryable("busy").retry_after(Duration::from_secs(3));
        assert_eq!(error.delay(), Some(Duration::from_secs(3)));
        assert_eq!(format!("{error:?}"), "retryable: busy (retry after 3s)");
    }
}
