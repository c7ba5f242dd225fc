//! The key-value store of a task: one question, one statement of the database.

use sandbar_host::capability::call::{KvAnswer, KvAsk, MAX_BATCH_BYTES, MAX_LISTED, Pair, Refusal, Value};

use super::{lost, unavailable};
use crate::store::WorkerStore;
use crate::store::kv::{AttemptName, Outcome, Swapped};

/// Carries a question out. `quota`: bytes that the tenant's stores may take.
pub(super) async fn answer(
    store: &WorkerStore,
    attempt: AttemptName,
    quota: u64,
    ask: &KvAsk,
) -> Result<KvAnswer, Refusal> {
    let failed = |error| unavailable(&error);
    let one = |key: &String| [key.clone()];
    Ok(match ask {
        KvAsk::Open => {
            done(store.kv_may(attempt).await.map_err(failed)?)?;
            KvAnswer::Done
        }
        KvAsk::Get { key } => {
            let found = store.kv_read(attempt, &one(key), true, u64::MAX).await.map_err(failed)?;
            match done(found)?.remove(key) {
                Some(entry) => KvAnswer::Value(Some(Value(entry.value)), entry.version),
                None => KvAnswer::Value(None, 0),
            }
        }
        KvAsk::Version { key } => {
            let found = store.kv_read(attempt, &one(key), false, 0).await.map_err(failed)?;
            KvAnswer::Version(done(found)?.get(key).map_or(0, |entry| entry.version))
        }
        KvAsk::GetMany { keys } => {
            let found = store.kv_read(attempt, keys, true, MAX_BATCH_BYTES as u64).await.map_err(failed)?;
            let found = done(found)?;
            // A key that is asked for twice is answered twice, within the bytes of one call.
            let values: Vec<_> =
                keys.iter().map(|key| found.get(key).map(|entry| entry.value.as_slice())).collect();
            let bytes = values.iter().flatten().map(|value| value.len()).sum();
            sandbar_host::capability::call::check_batch_bytes(bytes)?;
            KvAnswer::Values(values.into_iter().map(|value| value.map(|v| Value(v.to_vec()))).collect())
        }
        KvAsk::List { after } => {
            let limit = i32::try_from(MAX_LISTED).unwrap_or(i32::MAX).saturating_add(1);
            let after = after.as_deref().unwrap_or_default();
            let mut keys = done(store.kv_list(attempt, after, limit).await.map_err(failed)?)?;
            let more = keys.len() > MAX_LISTED;
            keys.truncate(MAX_LISTED);
            KvAnswer::Keys(keys, more)
        }
        KvAsk::Put { pairs } => {
            let (keys, values): (Vec<&str>, Vec<Option<&[u8]>>) = pairs
                .iter()
                .map(|Pair { key, value }| (key.as_str(), value.as_ref().map(|value| value.0.as_slice())))
                .unzip();
            done(store.kv_put(attempt, quota, &keys, &values).await.map_err(failed)?)?;
            KvAnswer::Done
        }
        KvAsk::Increment { key, delta } => {
            let sum = store.kv_increment(attempt, quota, key, *delta).await.map_err(failed)?;
            KvAnswer::Number(done(sum)?)
        }
        KvAsk::Swap { key, version, value } => {
            let swapped = store.kv_swap(attempt, quota, key, *version, value).await.map_err(failed)?;
            match done(swapped)? {
                Swapped::Done => KvAnswer::Done,
                Swapped::Changed(version) => KvAnswer::Changed(version),
            }
        }
    })
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
    }
}
