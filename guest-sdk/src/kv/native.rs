//! The store in native tests: in memory, for whoever the test grants it, with the host's bounds and without its quota.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::Error;

const MAX_KEY: usize = 256;
const MAX_VALUE: usize = 256 << 10;
const MAX_BATCH: usize = 100;
const PAGE: usize = 1_000;

/// Keys with their values, and the number of writes.
#[derive(Default)]
struct Memory {
    pairs: BTreeMap<String, (Vec<u8>, u64)>,
    writes: u64,
}

type Shared = Rc<RefCell<Memory>>;

thread_local! {
    static GRANTED: RefCell<Option<Shared>> = const { RefCell::new(None) };
}

/// As long as it lives, tasks of this thread have a store: see [`grant`].
#[must_use]
pub struct Granted {
    memory: Shared,
    before: Option<Shared>,
}

impl Granted {
    /// What a task left under a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.memory.borrow().pairs.get(key).map(|(value, _)| value.clone())
    }

    /// Puts something there before the task runs.
    pub fn set(&self, key: &str, value: &[u8]) {
        self.memory.borrow_mut().put(key, Some(value));
    }

    /// All keys, in the order of their bytes.
    #[must_use]
    pub fn keys(&self) -> Vec<String> {
        self.memory.borrow().pairs.keys().cloned().collect()
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        GRANTED.with(|slot| *slot.borrow_mut() = self.before.take());
    }
}

/// Gives the tasks of this thread an empty store, in a native test. Without it every call is denied.
pub fn grant() -> Granted {
    let memory = Shared::default();
    let before = GRANTED.with(|slot| slot.borrow_mut().replace(memory.clone()));
    Granted { memory, before }
}

impl Memory {
    fn put(&mut self, key: &str, value: Option<&[u8]>) {
        match value {
            Some(value) => {
                self.writes += 1;
                self.pairs.insert(key.to_owned(), (value.to_vec(), self.writes));
            }
            None => _ = self.pairs.remove(key),
        }
    }
}

fn check(key: &str, value: &[u8]) -> Result<(), Error> {
    if key.is_empty() || key.len() > MAX_KEY || key.contains('\0') {
        return Err(Error::Other(format!("a key has 1 to {MAX_KEY} bytes and no NUL")));
    }
    if value.len() > MAX_VALUE {
        return Err(Error::Other(format!("a value has at most {MAX_VALUE} bytes")));
    }
    Ok(())
}

fn check_count(keys: usize) -> Result<(), Error> {
    if keys > MAX_BATCH {
        return Err(Error::Other(format!("one call is for at most {MAX_BATCH} keys")));
    }
    Ok(())
}

#[derive(Debug)]
pub(super) struct Store(());

pub(super) struct Cas {
    key: String,
    version: RefCell<u64>,
}

fn memory() -> Result<Shared, Error> {
    GRANTED.with(|slot| slot.borrow().clone()).ok_or(Error::Denied)
}

impl Store {
    pub(super) fn open() -> Result<Self, Error> {
        memory().map(|_| Self(()))
    }

    pub(super) fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        check(key, b"")?;
        Ok(memory()?.borrow().pairs.get(key).map(|(value, _)| value.clone()))
    }

    pub(super) fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        check(key, value)?;
        memory()?.borrow_mut().put(key, Some(value));
        Ok(())
    }

    pub(super) fn delete(&self, key: &str) -> Result<(), Error> {
        check(key, b"")?;
        memory()?.borrow_mut().put(key, None);
        Ok(())
    }

    pub(super) fn exists(&self, key: &str) -> Result<bool, Error> {
        self.get(key).map(|value| value.is_some())
    }

    pub(super) fn keys(&self, after: Option<&str>) -> Result<(Vec<String>, Option<String>), Error> {
        let memory = memory()?;
        let memory = memory.borrow();
        let mut keys = memory.pairs.keys().filter(|key| after.is_none_or(|after| key.as_str() > after));
        let page: Vec<String> = keys.by_ref().take(PAGE).cloned().collect();
        let next = keys.next().and(page.last().cloned());
        Ok((page, next))
    }

    pub(super) fn increment(&self, key: &str, delta: i64) -> Result<i64, Error> {
        let old = self.get(key)?;
        let number = match &old {
            None => Some(0),
            Some(digits) => std::str::from_utf8(digits).ok().and_then(|text| text.parse::<i64>().ok()),
        };
        let number = number
            .ok_or_else(|| Error::Other("what is there is no whole number in decimal digits".into()))?;
        let sum =
            number.checked_add(delta).ok_or_else(|| Error::Other("the sum does not fit 64 bits".into()))?;
        self.set(key, sum.to_string().as_bytes())?;
        Ok(sum)
    }

    pub(super) fn cas(&self, key: &str) -> Result<Cas, Error> {
        check(key, b"")?;
        let cas = Cas { key: key.to_owned(), version: RefCell::default() };
        cas.current()?;
        Ok(cas)
    }

    pub(super) fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, Error> {
        check_count(keys.len())?;
        keys.iter().map(|key| self.get(key)).collect()
    }

    pub(super) fn set_many(&self, pairs: &[(String, Vec<u8>)]) -> Result<(), Error> {
        check_count(pairs.len())?;
        pairs.iter().try_for_each(|(key, value)| check(key, value))?;
        pairs.iter().try_for_each(|(key, value)| self.set(key, value))
    }

    pub(super) fn delete_many(&self, keys: &[String]) -> Result<(), Error> {
        check_count(keys.len())?;
        keys.iter().try_for_each(|key| check(key, b""))?;
        keys.iter().try_for_each(|key| self.delete(key))
    }
}

impl Cas {
    pub(super) fn current(&self) -> Result<Option<Vec<u8>>, Error> {
        let memory = memory()?;
        let found = memory.borrow().pairs.get(&self.key).cloned();
        *self.version.borrow_mut() = found.as_ref().map_or(0, |(_, version)| *version);
        Ok(found.map(|(value, _)| value))
    }

    pub(super) fn swap(self, value: &[u8]) -> Result<Option<Self>, Error> {
        check(&self.key, value)?;
        let memory = memory()?;
        let now = memory.borrow().pairs.get(&self.key).map_or(0, |(_, version)| *version);
        if now != *self.version.borrow() {
            return Ok(Some(self));
        }
        memory.borrow_mut().put(&self.key, Some(value));
        Ok(None)
    }
}
