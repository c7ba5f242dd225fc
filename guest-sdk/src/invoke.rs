//! Starting other tasks of the same tenant.
//!
//! ```
//! use sandbar_guest::{TaskError, invoke, task};
//!
//! #[task]
//! fn fan_out(pages: Vec<String>) -> Result<usize, TaskError> {
//!     for page in &pages {
//!         // With a key, another attempt of this invocation starts it no second time.
//!         invoke::start("fetch-page", page, Some(page))?;
//!     }
//!     Ok(pages.len())
//! }
//!
//! let granted = invoke::grant(["fetch-page"]); // in a native test
//! fan_out(vec!["a".to_owned(), "b".to_owned(), "a".to_owned()]).unwrap();
//! assert_eq!(granted.started().len(), 2);
//! assert_eq!(granted.started()[0].input, b"\"a\"");
//! ```
//!
//! An admin of the tenant grants which tasks: `sandbar tasks update NAME --grant-invoke OTHER`. What is started is accepted by
//! the rules of any request (its schema, the tenant's quotas) and durable when the call returns; nobody waits for its
//! end. One invocation starts at most 100 others, everything that goes back to one invocation at most 1,000, and no chain
//! is longer than five.

use std::fmt;

use serde::Serialize;

/// Why nothing was started.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The task has no grant for that.
    Denied,
    /// It cannot be, in the host's words: there is no such task, the input does not fit, a bound or a quota is reached, or
    /// the key stands for something else.
    Refused(String),
    /// Something else, in the host's words; whether it was started may not be known. The same key makes asking again safe.
    Other(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Denied => f.write_str("the task has no grant to start that task"),
            Self::Refused(words) => write!(f, "not started: {words}"),
            Self::Other(words) => write!(f, "starting: {words}"),
        }
    }
}

impl std::error::Error for Error {}

/// Starts a task on an input that is written as JSON; returns the id of the invocation. `key`: 1 to 128 bytes; the same key
/// of the same invocation starts once and returns the same id.
///
/// # Errors
/// See [`Error`].
pub fn start(task: &str, input: &impl Serialize, key: Option<&str>) -> Result<String, Error> {
    let bytes = serde_json::to_vec(input).map_err(|error| Error::Refused(error.to_string()))?;
    host::start(task, &bytes, key)
}

/// Starts a task on bytes as they are; of a command, they are its stdin.
///
/// # Errors
/// See [`Error`].
pub fn start_bytes(task: &str, input: &[u8], key: Option<&str>) -> Result<String, Error> {
    host::start(task, input, key)
}

#[cfg(not(target_family = "wasm"))]
pub use host::{Granted, Start, grant};

#[cfg(target_family = "wasm")]
mod host {
    use super::Error;
    use crate::wasm::capabilities::sandbar::task::invoke;

    pub(super) fn start(task: &str, input: &[u8], key: Option<&str>) -> Result<String, Error> {
        invoke::start(task, input, key).map_err(|error| match error {
            invoke::Error::AccessDenied => Error::Denied,
            invoke::Error::Refused(words) => Error::Refused(words),
            invoke::Error::Other(words) => Error::Other(words),
        })
    }
}

#[cfg(not(target_family = "wasm"))]
mod host {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::Error;

    /// One invocation that a task started.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub struct Start {
        /// Name of the task.
        pub task: String,
        /// On what.
        pub input: Vec<u8>,
        /// Under which key.
        pub key: Option<String>,
    }

    #[derive(Default)]
    struct Book {
        tasks: Vec<String>,
        started: Vec<Start>,
    }

    type Shared = Rc<RefCell<Book>>;

    thread_local! {
        static GRANTED: RefCell<Option<Shared>> = const { RefCell::new(None) };
    }

    /// As long as it lives, tasks of this thread may start what [`grant`] names.
    #[must_use]
    pub struct Granted {
        book: Shared,
        before: Option<Shared>,
    }

    impl Granted {
        /// What was started, in order.
        #[must_use]
        pub fn started(&self) -> Vec<Start> {
            self.book.borrow().started.clone()
        }
    }

    impl Drop for Granted {
        fn drop(&mut self) {
            GRANTED.with(|slot| *slot.borrow_mut() = self.before.take());
        }
    }

    /// Lets the tasks of this thread start these tasks, in a native test: nothing runs, what was started is kept. Without
    /// it every start is denied.
    pub fn grant<T: Into<String>>(tasks: impl IntoIterator<Item = T>) -> Granted {
        let tasks = tasks.into_iter().map(Into::into).collect();
        let book = Shared::new(RefCell::new(Book { tasks, started: Vec::new() }));
        let before = GRANTED.with(|slot| slot.borrow_mut().replace(book.clone()));
        Granted { book, before }
    }

    pub(super) fn start(task: &str, input: &[u8], key: Option<&str>) -> Result<String, Error> {
        let book = GRANTED.with(|slot| slot.borrow().clone()).ok_or(Error::Denied)?;
        let mut book = book.borrow_mut();
        if !book.tasks.iter().any(|granted| granted == task) {
            return Err(Error::Denied);
        }
        let same = |start: &&Start| key.is_some() && start.key.as_deref() == key;
        if let Some((number, old)) = book.started.iter().enumerate().find(|(_, start)| same(start)) {
            if old.task != task || old.input != input {
                return Err(Error::Refused("the key stands for something else".to_owned()));
            }
            return Ok(format!("test-{number}"));
        }
        let key = key.map(str::to_owned);
        book.started.push(Start { task: task.to_owned(), input: input.to_vec(), key });
        Ok(format!("test-{}", book.started.len() - 1))
    }
}
