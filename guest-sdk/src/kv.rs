//! The key-value store of the task: what it keeps from one invocation to the next.
//!
//! ```
//! use sandbar_guest::{TaskError, kv, task};
//!
//! /// Counts how often it has seen a word.
//! #[task(grants(kv))]
//! fn seen(word: String) -> Result<i64, TaskError> {
//!     let store = kv::open()?;
//!     Ok(store.increment(&word, 1)?)
//! }
//!
//! let granted = kv::grant(); // in a native test: a store in memory
//! assert_eq!(seen("a".to_owned()).unwrap(), 1);
//! assert_eq!(seen("a".to_owned()).unwrap(), 2);
//! assert_eq!(granted.get("a").unwrap(), b"2");
//! ```
//!
//! Every invocation of the task sees the same keys, and no other task does. The grant is given by an admin of the tenant;
//! without it every call fails with [`Error::Denied`]. A write that was answered is durable. One that failed may
//! have happened all the same if the database did not answer: write so that twice does no harm, or use
//! [`Store::update`].
//!
//! A key has 1 to 256 bytes, a value at most 256 KiB, one call at most 100 keys and 512 KiB of values. All keys of a tenant
//! together are bounded by its quota `kv_bytes`.

#[cfg(target_family = "wasm")]
mod component;
#[cfg(not(target_family = "wasm"))]
mod native;

use std::fmt;

#[cfg(target_family = "wasm")]
use component as host;
#[cfg(not(target_family = "wasm"))]
use native as host;
#[cfg(not(target_family = "wasm"))]
pub use native::{Granted, grant};

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The task has no grant.
    Denied,
    /// Something else, in the host's words: a bound, the tenant's quota, a database that does not answer.
    Other(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Denied => f.write_str("the task has no grant for its key-value store"),
            Self::Other(words) => write!(f, "key-value store: {words}"),
        }
    }
}

impl std::error::Error for Error {}

/// How often [`Store::update`] tries before it gives up.
const MAX_TRIES: u32 = 1_000;

/// The opened store.
#[derive(Debug)]
pub struct Store(host::Store);

/// Opens the store of the task.
///
/// # Errors
/// [`Error::Denied`] without the grant.
pub fn open() -> Result<Store, Error> {
    host::Store::open().map(Store)
}

impl Store {
    /// The value of a key, if it is there.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        self.0.get(key)
    }

    /// Writes a value.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.0.set(key, value)
    }

    /// Takes a key away, if it is there.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn delete(&self, key: &str) -> Result<(), Error> {
        self.0.delete(key)
    }

    /// Whether a key is there.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn exists(&self, key: &str) -> Result<bool, Error> {
        self.0.exists(key)
    }

    /// One page of keys in the order of their bytes, and where the next begins.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn keys(&self, after: Option<&str>) -> Result<(Vec<String>, Option<String>), Error> {
        self.0.keys(after)
    }

    /// Adds to a number that is kept in decimal digits, as one step; an absent key counts as 0. Returns the sum.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn increment(&self, key: &str, delta: i64) -> Result<i64, Error> {
        self.0.increment(key, delta)
    }

    /// Makes a new value of the one that is there, as one step: when somebody else wrote meanwhile, `change` is asked
    /// again. `None` from it leaves everything as it is. Returns what was written.
    ///
    /// ```
    /// # use sandbar_guest::kv;
    /// # let _granted = kv::grant();
    /// let store = kv::open()?;
    /// let append = |old: Option<Vec<u8>>| Some([old.unwrap_or_default(), b"x".to_vec()].concat());
    /// assert_eq!(store.update("log", append)?.unwrap(), b"x");
    /// assert_eq!(store.update("log", append)?.unwrap(), b"xx");
    /// assert_eq!(store.update("log", |_| None)?, None);
    /// # Ok::<(), kv::Error>(())
    /// ```
    ///
    /// # Errors
    /// See [`Error`]; also when others are quicker a thousand times in a row.
    pub fn update(
        &self,
        key: &str,
        mut change: impl FnMut(Option<Vec<u8>>) -> Option<Vec<u8>>,
    ) -> Result<Option<Vec<u8>>, Error> {
        let mut cas = self.0.cas(key)?;
        for _ in 0..MAX_TRIES {
            let Some(value) = change(cas.current()?) else { return Ok(None) };
            match cas.swap(&value)? {
                None => return Ok(Some(value)),
                Some(again) => cas = again,
            }
        }
        Err(Error::Other(format!("{key}: somebody else wrote before each of {MAX_TRIES} tries")))
    }

    /// Values of several keys, in their order.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, Error> {
        self.0.get_many(keys)
    }

    /// Writes several values, all or none.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn set_many(&self, pairs: &[(String, Vec<u8>)]) -> Result<(), Error> {
        self.0.set_many(pairs)
    }

    /// Takes several keys away, all or none.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn delete_many(&self, keys: &[String]) -> Result<(), Error> {
        self.0.delete_many(keys)
    }
}
