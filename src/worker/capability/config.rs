//! What people have set on the task of an attempt.

use sandbar_host::capability::call::{Answer, Refusal};

use super::seal::Seals;
use super::{lost, unavailable};
use crate::store::WorkerStore;
use crate::store::kv::AttemptName;

/// All of it.
pub(super) async fn read(
    store: &WorkerStore,
    seals: &Seals,
    attempt: AttemptName,
) -> Result<Answer, Refusal> {
    let config = store.attempt_config(attempt).await.map_err(|error| unavailable(&error))?;
    let mut texts = Vec::new();
    for (name, setting) in config.ok_or_else(lost)? {
        let text = seals.setting(&name, setting).await?;
        texts.push((name, text));
    }
    Ok(Answer::Config(texts))
}
