//! `wasi:keyvalue`: the store of a task. Owns the handles; values and their rules are the worker's and the database's.

use wasmtime::component::Resource;

use super::call::{Answer, Ask, KvAnswer, KvAsk, Pair, Refusal, RefusalKind, Value};
use super::generated::wasi::keyvalue::{atomics, batch, store};
use crate::state::Host;
use store::Error;

/// Names of the one store that a task has.
const NAMES: [&str; 2] = ["", "default"];
/// Stores and compare-and-swap handles that an attempt may hold at once.
const MAX_HANDLES: usize = 64;

/// An opened store.
#[derive(Debug)]
pub struct Bucket;

/// A key as it was when it was looked at.
#[derive(Debug)]
pub struct Cas {
    key: String,
    version: i64,
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal.kind {
            RefusalKind::Denied => Self::AccessDenied,
            RefusalKind::Refused | RefusalKind::Failed => Self::Other(refusal.message),
        }
    }
}

/// An answer of another kind than the question: the worker is of another version.
fn odd<T>() -> Result<T, Error> {
    Err(Error::Other("the worker's answer is not understood".to_owned()))
}

impl Host {
    async fn kv(&mut self, ask: KvAsk) -> Result<KvAnswer, Error> {
        match self.ask(Ask::Kv(ask)).await? {
            Answer::Kv(answer) => Ok(answer),
            _ => odd(),
        }
    }

    async fn put(&mut self, pairs: Vec<Pair>) -> Result<(), Error> {
        match self.kv(KvAsk::Put { pairs }).await? {
            KvAnswer::Done => Ok(()),
            _ => odd(),
        }
    }

    fn handle<T: Send + 'static>(&mut self, held: T) -> Result<Resource<T>, Error> {
        if self.kv_handles >= MAX_HANDLES {
            return Err(Error::Other(format!("an attempt holds at most {MAX_HANDLES} handles of its store")));
        }
        let handle = self.table.push(held).map_err(|_| Error::Other("too many resources".to_owned()))?;
        self.kv_handles += 1;
        Ok(handle)
    }

    fn release<T: 'static>(&mut self, handle: Resource<T>) -> wasmtime::Result<T> {
        self.kv_handles = self.kv_handles.saturating_sub(1);
        Ok(self.table.delete(handle)?)
    }
}

impl store::Host for Host {
    async fn open(&mut self, identifier: String) -> Result<Resource<Bucket>, Error> {
        if !NAMES.contains(&identifier.as_str()) {
            self.common.calls += 1;
            return Err(Error::NoSuchStore);
        }
        match self.kv(KvAsk::Open).await? {
            KvAnswer::Done => self.handle(Bucket),
            _ => odd(),
        }
    }
}

impl store::HostBucket for Host {
    async fn get(&mut self, _: Resource<Bucket>, key: String) -> Result<Option<Vec<u8>>, Error> {
        match self.kv(KvAsk::Get { key }).await? {
            KvAnswer::Value(value, _) => Ok(value.map(|value| value.0)),
            _ => odd(),
        }
    }

    async fn set(&mut self, _: Resource<Bucket>, key: String, value: Vec<u8>) -> Result<(), Error> {
        self.put(vec![Pair { key, value: Some(Value(value)) }]).await
    }

    async fn delete(&mut self, _: Resource<Bucket>, key: String) -> Result<(), Error> {
        self.put(vec![Pair { key, value: None }]).await
    }

    async fn exists(&mut self, _: Resource<Bucket>, key: String) -> Result<bool, Error> {
        match self.kv(KvAsk::Version { key }).await? {
            KvAnswer::Version(version) => Ok(version != 0),
            _ => odd(),
        }
    }

    async fn list_keys(
        &mut self,
        _: Resource<Bucket>,
        cursor: Option<String>,
    ) -> Result<store::KeyResponse, Error> {
        match self.kv(KvAsk::List { after: cursor }).await? {
            KvAnswer::Keys(keys, more) => {
                let cursor = keys.last().filter(|_| more).cloned();
                Ok(store::KeyResponse { keys, cursor })
            }
            _ => odd(),
        }
    }

    async fn drop(&mut self, handle: Resource<Bucket>) -> wasmtime::Result<()> {
        self.release(handle).map(drop)
    }
}

impl atomics::Host for Host {
    async fn increment(&mut self, _: Resource<Bucket>, key: String, delta: i64) -> Result<i64, Error> {
        match self.kv(KvAsk::Increment { key, delta }).await? {
            KvAnswer::Number(sum) => Ok(sum),
            _ => odd(),
        }
    }

    async fn swap(&mut self, handle: Resource<Cas>, value: Vec<u8>) -> Result<(), atomics::CasError> {
        use atomics::CasError::{CasFailed, StoreError};
        let lost = |_| StoreError(Error::Other("there is no such handle".to_owned()));
        let Cas { key, version } = self.release(handle).map_err(lost)?;
        let ask = KvAsk::Swap { key: key.clone(), version, value };
        match self.kv(ask).await.map_err(StoreError)? {
            KvAnswer::Done => Ok(()),
            KvAnswer::Changed(version) => {
                Err(self.handle(Cas { key, version }).map_or_else(StoreError, CasFailed))
            }
            _ => odd().map_err(StoreError),
        }
    }
}

impl atomics::HostCas for Host {
    async fn new(&mut self, _: Resource<Bucket>, key: String) -> Result<Resource<Cas>, Error> {
        match self.kv(KvAsk::Version { key: key.clone() }).await? {
            KvAnswer::Version(version) => self.handle(Cas { key, version }),
            _ => odd(),
        }
    }

    async fn current(&mut self, handle: Resource<Cas>) -> Result<Option<Vec<u8>>, Error> {
        let lost = || Error::Other("there is no such handle".to_owned());
        let key = self.table.get(&handle).map_err(|_| lost())?.key.clone();
        match self.kv(KvAsk::Get { key }).await? {
            KvAnswer::Value(value, version) => {
                self.table.get_mut(&handle).map_err(|_| lost())?.version = version;
                Ok(value.map(|value| value.0))
            }
            _ => odd(),
        }
    }

    async fn drop(&mut self, handle: Resource<Cas>) -> wasmtime::Result<()> {
        self.release(handle).map(drop)
    }
}

impl batch::Host for Host {
    async fn get_many(
        &mut self,
        _: Resource<Bucket>,
        keys: Vec<String>,
    ) -> Result<Vec<(String, Option<Vec<u8>>)>, Error> {
        match self.kv(KvAsk::GetMany { keys: keys.clone() }).await? {
            KvAnswer::Values(values) if values.len() == keys.len() => {
                Ok(keys.into_iter().zip(values.into_iter().map(|value| value.map(|value| value.0))).collect())
            }
            _ => odd(),
        }
    }

    async fn set_many(
        &mut self,
        _: Resource<Bucket>,
        key_values: Vec<(String, Vec<u8>)>,
    ) -> Result<(), Error> {
        let pairs = key_values.into_iter().map(|(key, value)| Pair { key, value: Some(Value(value)) });
        self.put(pairs.collect()).await
    }

    async fn delete_many(&mut self, _: Resource<Bucket>, keys: Vec<String>) -> Result<(), Error> {
        self.put(keys.into_iter().map(|key| Pair { key, value: None }).collect()).await
    }
}
