//! The store in a component: `wasi:keyvalue`.

use super::Error;
use crate::wasm::capabilities::wasi::keyvalue::{atomics, batch, store};

fn error(error: store::Error) -> Error {
    match error {
        store::Error::AccessDenied => Error::Denied,
        store::Error::NoSuchStore => Error::Other("the host knows no store `default`".to_owned()),
        store::Error::Other(words) => Error::Other(words),
    }
}

#[derive(Debug)]
pub(super) struct Store(store::Bucket);

pub(super) struct Cas(atomics::Cas);

impl Store {
    pub(super) fn open() -> Result<Self, Error> {
        store::open("default").map(Self).map_err(error)
    }

    pub(super) fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        self.0.get(key).map_err(error)
    }

    pub(super) fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.0.set(key, value).map_err(error)
    }

    pub(super) fn delete(&self, key: &str) -> Result<(), Error> {
        self.0.delete(key).map_err(error)
    }

    pub(super) fn exists(&self, key: &str) -> Result<bool, Error> {
        self.0.exists(key).map_err(error)
    }

    pub(super) fn keys(&self, after: Option<&str>) -> Result<(Vec<String>, Option<String>), Error> {
        let page = self.0.list_keys(after).map_err(error)?;
        Ok((page.keys, page.cursor))
    }

    pub(super) fn increment(&self, key: &str, delta: i64) -> Result<i64, Error> {
        atomics::increment(&self.0, key, delta).map_err(error)
    }

    pub(super) fn cas(&self, key: &str) -> Result<Cas, Error> {
        atomics::Cas::new(&self.0, key).map(Cas).map_err(error)
    }

    pub(super) fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, Error> {
        let found = batch::get_many(&self.0, keys).map_err(error)?;
        Ok(found.into_iter().map(|(_, value)| value).collect())
    }

    pub(super) fn set_many(&self, pairs: &[(String, Vec<u8>)]) -> Result<(), Error> {
        batch::set_many(&self.0, pairs).map_err(error)
    }

    pub(super) fn delete_many(&self, keys: &[String]) -> Result<(), Error> {
        batch::delete_many(&self.0, keys).map_err(error)
    }
}

impl Cas {
    pub(super) fn current(&self) -> Result<Option<Vec<u8>>, Error> {
        self.0.current().map_err(error)
    }

    /// None: written. Otherwise the handle for the next try.
    pub(super) fn swap(self, value: &[u8]) -> Result<Option<Self>, Error> {
        match atomics::swap(self.0, value) {
            Ok(()) => Ok(None),
            Err(atomics::CasError::CasFailed(again)) => Ok(Some(Self(again))),
            Err(atomics::CasError::StoreError(why)) => Err(error(why)),
        }
    }
}
