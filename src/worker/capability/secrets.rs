//! Secrets that a task may see. Those that it may only have sent are `egress`'s.

use sandbar_host::capability::call::{Answer, Refusal, Value};
use tracing::warn;

use super::{lost, unavailable};
use crate::app::secret;
use crate::app::vault::Vault;
use crate::domain::ids::TenantId;
use crate::store::WorkerStore;
use crate::store::kv::AttemptName;

/// The value of a secret that the task may see.
pub(super) async fn reveal(
    store: &WorkerStore,
    vault: &Vault,
    (attempt, tenant): (AttemptName, TenantId),
    name: &str,
) -> Result<Answer, Refusal> {
    let held = store.attempt_secrets(attempt, &[name.to_owned()]).await;
    let (grants, sealed) = held.map_err(|error| unavailable(&error))?.ok_or_else(lost)?;
    if !grants.secrets.iter().any(|granted| granted == name) {
        return Err(Refusal::denied(format!("the task has no grant to see the secret `{name}`")));
    }
    let opened = secret::open(vault, tenant, &sealed).map_err(|error| {
        warn!(%error, "a secret does not open on this worker");
        Refusal::failed("the secret does not open on this worker: see its log")
    })?;
    Ok(Answer::Secret(opened.into_iter().next().map(|(_, value)| Value(value.to_vec()))))
}
