//! The key-value store of a task: what a guest asks of it, as statements. Owns what is sealed on the way in and opened on
//! the way out; what is written, and whether it may be, is the statement's.

use sandbar_host::capability::call::{
    KvAnswer, KvAsk, MAX_BATCH_BYTES, MAX_LISTED, Pair, Refusal, Value, check_batch_bytes,
};

use super::seal::Seals;
use super::{lost, unavailable};
use crate::app::sealed::task::{OVERHEAD, Place};
use crate::store::WorkerStore;
use crate::store::kv::{AttemptName, Entry, Outcome, Swapped};

/// One question about a store.
pub(super) struct Store<'a> {
    pub(super) store: &'a WorkerStore,
    pub(super) seals: &'a Seals,
    pub(super) attempt: AttemptName,
    /// Bytes that the tenant may store when nobody says otherwise.
    pub(super) quota: u64,
}

fn done<T>(outcome: Outcome<T>) -> Result<T, Refusal> {
    match outcome {
        Outcome::Done(done) => Ok(done),
        Outcome::Lost => Err(lost()),
        Outcome::Denied => Err(Refusal::denied("the task has no grant `kv`")),
        Outcome::Full => Err(Refusal::failed("the tenant's quota kv_bytes has no room for it")),
        Outcome::Large => {
            let words =
                format!("the values have more than {MAX_BATCH_BYTES} bytes together: ask for fewer keys");
            Err(Refusal::failed(words))
        }
        Outcome::NotANumber => Err(Refusal::failed("what is there is no whole number in decimal digits")),
        Outcome::OutOfRange => Err(Refusal::failed("the sum does not fit 64 bits")),
        Outcome::Sealed => Err(Refusal::failed("what is there is sealed")),
    }
}

/// The number that stands there, as Postgres reads it in what is not sealed.
fn number(bytes: &[u8]) -> Option<i128> {
    let digits = bytes.strip_prefix(b"-").unwrap_or(bytes);
    let fine = (1..=19).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(bytes).ok().filter(|_| fine)?.parse().ok()
}

impl Store<'_> {
    /// What stands under these keys, opened; at most so many bytes of it.
    async fn read(&self, keys: &[String], bytes: u64) -> Result<Vec<Option<Entry>>, Refusal> {
        let failed = |error| unavailable(&error);
        let mut found = done(self.store.kv_read(self.attempt, keys, true, bytes).await.map_err(failed)?)?;
        for (key, entry) in &mut found {
            if let Some(id) = entry.sealed.take() {
                let opener = self.seals.opener(&id).await?;
                entry.value = self.seals.open(&opener, Place::Value(key), &entry.value)?;
            }
        }
        // A key that is asked for twice is answered twice.
        Ok(keys.iter().map(|key| found.get(key).cloned()).collect())
    }

    async fn one(&self, key: &str) -> Result<Option<Entry>, Refusal> {
        Ok(self.read(&[key.to_owned()], u64::MAX).await?.into_iter().next().flatten())
    }

    async fn put(&self, pairs: &[Pair]) -> Result<(), Refusal> {
        let with = self.seals.key().await?;
        let mut keys = Vec::with_capacity(pairs.len());
        let mut values = Vec::with_capacity(pairs.len());
        for Pair { key, value } in pairs {
            keys.push(key.as_str());
            values.push(match value {
                Some(value) => Some(self.seals.seal(with.as_ref(), Place::Value(key), &value.0)?),
                None => None,
            });
        }
        let id = with.as_ref().map(|(id, _)| id.as_str());
        let put = self.store.kv_put(self.attempt, self.quota, &keys, &values, id).await;
        done(put.map_err(|error| unavailable(&error))?)
    }

    async fn swap(&self, key: &str, version: i64, value: &[u8]) -> Result<Swapped, Refusal> {
        let with = self.seals.key().await?;
        let value = self.seals.seal(with.as_ref(), Place::Value(key), value)?;
        let value = (value.as_slice(), with.as_ref().map(|(id, _)| id.as_str()));
        let swapped = self.store.kv_swap(self.attempt, self.quota, key, version, value).await;
        done(swapped.map_err(|error| unavailable(&error))?)
    }

    async fn increment(&self, key: &str, delta: i64) -> Result<i64, Refusal> {
        if self.seals.key().await?.is_none() {
            let sum = self.store.kv_increment(self.attempt, self.quota, key, delta).await;
            match sum.map_err(|error| unavailable(&error))? {
                Outcome::Sealed => {}
                other => return done(other),
            }
        }
        // Postgres cannot add to what it cannot read: look, add, and write if it is still what it was. Of those who try at
        // once one gets on each time, and the caller's deadline ends it for the others.
        loop {
            let (old, version) = match self.one(key).await? {
                Some(entry) => (number(&entry.value), entry.version),
                None => (Some(0), 0),
            };
            let old = old.map_or_else(|| done(Outcome::NotANumber), Ok)?;
            let sum = i64::try_from(old + i128::from(delta)).or_else(|_| done(Outcome::OutOfRange))?;
            if self.swap(key, version, sum.to_string().as_bytes()).await? == Swapped::Done {
                return Ok(sum);
            }
        }
    }

    /// The answer to a question.
    ///
    /// # Errors
    /// It is refused, or Postgres does not answer.
    pub(super) async fn answer(&self, ask: &KvAsk) -> Result<KvAnswer, Refusal> {
        let failed = |error| unavailable(&error);
        Ok(match ask {
            KvAsk::Open => {
                done(self.store.kv_may(self.attempt).await.map_err(failed)?)?;
                KvAnswer::Done
            }
            KvAsk::Get { key } => match self.one(key).await? {
                Some(entry) => KvAnswer::Value(Some(Value(entry.value)), entry.version),
                None => KvAnswer::Value(None, 0),
            },
            KvAsk::Version { key } => {
                let keys = [key.clone()];
                let found = self.store.kv_read(self.attempt, &keys, false, 0).await.map_err(failed)?;
                KvAnswer::Version(done(found)?.get(key).map_or(0, |entry| entry.version))
            }
            KvAsk::GetMany { keys } => {
                let found = self.read(keys, (MAX_BATCH_BYTES + keys.len() * OVERHEAD) as u64).await?;
                check_batch_bytes(found.iter().flatten().map(|entry| entry.value.len()).sum())?;
                KvAnswer::Values(
                    found.into_iter().map(|entry| entry.map(|entry| Value(entry.value))).collect(),
                )
            }
            KvAsk::List { after } => {
                let limit = i32::try_from(MAX_LISTED).unwrap_or(i32::MAX).saturating_add(1);
                let after = after.as_deref().unwrap_or_default();
                let mut keys = done(self.store.kv_list(self.attempt, after, limit).await.map_err(failed)?)?;
                let more = keys.len() > MAX_LISTED;
                keys.truncate(MAX_LISTED);
                KvAnswer::Keys(keys, more)
            }
            KvAsk::Put { pairs } => {
                self.put(pairs).await?;
                KvAnswer::Done
            }
            KvAsk::Increment { key, delta } => KvAnswer::Number(self.increment(key, *delta).await?),
            KvAsk::Swap { key, version, value } => match self.swap(key, *version, value).await? {
                Swapped::Done => KvAnswer::Done,
                Swapped::Changed(version) => KvAnswer::Changed(version),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn a_number_is_what_postgres_takes_for_one() {
        for (text, value) in [("0", 0), ("-0", 0), ("007", 7), ("-12", -12)] {
            assert_eq!(number(text.as_bytes()), Some(value), "{text}");
        }
        assert_eq!(number(b"9999999999999999999"), Some(9_999_999_999_999_999_999));
        for text in ["", "-", "+1", " 1", "1\n", "1.0", "--1", "99999999999999999999", "٣"] {
            assert_eq!(number(text.as_bytes()), None, "{text}");
        }
    }
}
