//! Texts that people have set on the task: `sandbar tasks update NAME --config KEY=VALUE`. They are read once in an attempt,
//! so what one attempt sees is of one moment.
//!
//! ```
//! use sandbar_guest::{TaskError, config, task};
//!
//! #[task]
//! fn greet(name: String) -> Result<String, TaskError> {
//!     let greeting = config::get("greeting")?.unwrap_or_else(|| "Hello".to_owned());
//!     Ok(format!("{greeting} {name}"))
//! }
//!
//! assert_eq!(greet("Ada".to_owned()).unwrap(), "Hello Ada");
//! let _set = config::set([("greeting", "Servus")]); // in a native test
//! assert_eq!(greet("Ada".to_owned()).unwrap(), "Servus Ada");
//! ```
//!
//! Nothing secret belongs there: whoever may see the task sees it.

use std::fmt;

/// The host could not say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "configuration: {}", self.0)
    }
}

impl std::error::Error for Error {}

/// What stands under a key, if anything does.
///
/// # Errors
/// The host cannot say now.
pub fn get(key: &str) -> Result<Option<String>, Error> {
    host::get(key)
}

/// All keys with their texts, in the order of the keys.
///
/// # Errors
/// The host cannot say now.
pub fn all() -> Result<Vec<(String, String)>, Error> {
    host::all()
}

#[cfg(not(target_family = "wasm"))]
pub use host::{Set, set};

#[cfg(target_family = "wasm")]
mod host {
    use super::Error;
    use crate::wasm::capabilities::wasi::config::store;

    fn error(error: store::Error) -> Error {
        match error {
            store::Error::Upstream(words) | store::Error::Io(words) => Error(words),
        }
    }

    pub(super) fn get(key: &str) -> Result<Option<String>, Error> {
        store::get(key).map_err(error)
    }

    pub(super) fn all() -> Result<Vec<(String, String)>, Error> {
        store::get_all().map_err(error)
    }
}

#[cfg(not(target_family = "wasm"))]
mod host {
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    use super::Error;

    thread_local! {
        static TEXTS: RefCell<BTreeMap<String, String>> = const { RefCell::new(BTreeMap::new()) };
    }

    /// As long as it lives, tasks of this thread see what [`set`] was given.
    #[must_use]
    pub struct Set(BTreeMap<String, String>);

    impl Drop for Set {
        fn drop(&mut self) {
            TEXTS.with(|texts| *texts.borrow_mut() = std::mem::take(&mut self.0));
        }
    }

    /// Sets the texts of the tasks of this thread, in a native test; without it there are none.
    pub fn set<K: Into<String>, V: Into<String>>(pairs: impl IntoIterator<Item = (K, V)>) -> Set {
        let texts = pairs.into_iter().map(|(key, value)| (key.into(), value.into())).collect();
        Set(TEXTS.with(|slot| slot.replace(texts)))
    }

    pub(super) fn get(key: &str) -> Result<Option<String>, Error> {
        Ok(TEXTS.with(|texts| texts.borrow().get(key).cloned()))
    }

    pub(super) fn all() -> Result<Vec<(String, String)>, Error> {
        Ok(TEXTS.with(|texts| texts.borrow().clone().into_iter().collect()))
    }
}
