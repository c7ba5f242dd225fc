//! Secrets of the tenant. Mostly a task need not see one: it writes `{{secret:NAME}}` where the secret belongs in a header of
//! an HTTP request, as [`header`] does, and the host puts it there on the way out, if an admin has granted that secret
//! in that header to that host.
//!
//! Where the task has to see the value, to sign something for instance, an admin grants that, and [`reveal`] says it:
//!
//! ```
//! use sandbar_guest::{TaskError, secrets, task};
//!
//! #[task(grants(secrets = ["SIGNING_KEY"]))]
//! fn sign(text: String) -> Result<usize, TaskError> {
//!     let key = secrets::reveal("SIGNING_KEY")?;
//!     Ok(text.len() ^ key.len())
//! }
//!
//! assert!(sign("a".to_owned()).is_err(), "nothing is granted");
//! let _granted = secrets::grant([("SIGNING_KEY", "hush")]); // in a native test
//! assert_eq!(sign("a".to_owned()).unwrap(), 5);
//! ```

use std::fmt;

/// Why a secret was not shown.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The task has no grant to see it.
    Denied,
    /// The grant is there, the secret is not.
    NotFound,
    /// Something else, in the host's words.
    Other(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Denied => f.write_str("the task has no grant to see this secret"),
            Self::NotFound => f.write_str("there is no such secret"),
            Self::Other(words) => write!(f, "secret: {words}"),
        }
    }
}

impl std::error::Error for Error {}

/// The current value of a secret. Keep it out of logs, results and errors: nobody takes it out again.
///
/// # Errors
/// See [`Error`].
pub fn reveal(name: &str) -> Result<Vec<u8>, Error> {
    host::reveal(name)
}

/// What stands for a secret in the value of a header, alone or with other text around it.
///
/// ```
/// let value = format!("Bearer {}", sandbar_guest::secrets::header("API_TOKEN"));
/// assert_eq!(value, "Bearer {{secret:API_TOKEN}}");
/// ```
#[must_use]
pub fn header(name: &str) -> String {
    format!("{{{{secret:{name}}}}}")
}

#[cfg(not(target_family = "wasm"))]
pub use host::{Granted, grant};

#[cfg(target_family = "wasm")]
mod host {
    use super::Error;
    use crate::wasm::capabilities::sandbar::task::secrets;

    pub(super) fn reveal(name: &str) -> Result<Vec<u8>, Error> {
        secrets::reveal(name).map_err(|error| match error {
            secrets::Error::AccessDenied => Error::Denied,
            secrets::Error::NotFound => Error::NotFound,
            secrets::Error::Other(words) => Error::Other(words),
        })
    }
}

#[cfg(not(target_family = "wasm"))]
mod host {
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    use super::Error;

    type Values = BTreeMap<String, Vec<u8>>;

    thread_local! {
        static GRANTED: RefCell<Values> = const { RefCell::new(BTreeMap::new()) };
    }

    /// As long as it lives, tasks of this thread see what [`grant`] was given.
    #[must_use]
    pub struct Granted(Values);

    impl Drop for Granted {
        fn drop(&mut self) {
            GRANTED.with(|granted| *granted.borrow_mut() = std::mem::take(&mut self.0));
        }
    }

    /// Lets the tasks of this thread see these secrets, in a native test. Without it every one is denied.
    pub fn grant<K: Into<String>, V: Into<Vec<u8>>>(pairs: impl IntoIterator<Item = (K, V)>) -> Granted {
        let values = pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        Granted(GRANTED.with(|slot| slot.replace(values)))
    }

    pub(super) fn reveal(name: &str) -> Result<Vec<u8>, Error> {
        GRANTED.with(|granted| granted.borrow().get(name).cloned()).ok_or(Error::Denied)
    }
}
