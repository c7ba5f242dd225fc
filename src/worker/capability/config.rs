//! What people have set on the task of an attempt.

use sandbar_host::capability::call::{Answer, Refusal};

use super::{lost, unavailable};
use crate::store::WorkerStore;
use crate::store::kv::AttemptName;

/// All of it.
pub(super) async fn read(store: &WorkerStore, attempt: AttemptName) -> Result<Answer, Refusal> {
    let config = store.attempt_config(attempt).await.map_err(|error| unavailable(&error))?;
    Ok(Answer::Config(config.ok_or_else(lost)?.into_iter().collect()))
}
