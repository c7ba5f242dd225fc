//! Starting other invocations: asked for here, seen to by a server (decision 0045).

use std::time::Duration;

use sandbar_host::capability::call::{Answer, Refusal};
use tokio::sync::Semaphore;
use tracing::warn;

use super::{lost, unavailable};
use crate::domain::ids::{StartId, TenantId};
use crate::store::WorkerStore;
use crate::store::kv::AttemptName;
use crate::store::start::{Asked, MAX_CHILDREN, MAX_FAMILY, NewStart, Started};

/// First and longest pause between two looks whether a start has been seen to.
const FIRST_LOOK: Duration = Duration::from_millis(5);
/// See [`FIRST_LOOK`].
const LAST_LOOK: Duration = Duration::from_millis(250);

/// Asks for an invocation.
pub(super) async fn begin(
    store: &WorkerStore,
    attempt: AttemptName,
    new: &NewStart<'_>,
) -> Result<StartId, Refusal> {
    match store.start_ask(attempt, new).await.map_err(|error| unavailable(&error))? {
        Asked::Open(id) => {
            if let Err(error) = store.start_notify().await {
                warn!(%error, "servers find a start by looking");
            }
            Ok(id)
        }
        Asked::Lost => Err(lost()),
        Asked::Denied => Err(Refusal::denied(format!("the task has no grant to start `{}`", new.task))),
        Asked::Conflict => {
            Err(Refusal::refused("the key was used for another task or another input by this invocation"))
        }
        Asked::TooMany => {
            Err(Refusal::refused(format!("an invocation may start at most {MAX_CHILDREN} others")))
        }
        Asked::FamilyTooLarge => Err(Refusal::refused(format!(
            "everything that goes back to one invocation may be at most {MAX_FAMILY} starts"
        ))),
    }
}

/// What came of it, once a server has seen to it. Each look takes a place of `turns`, the waiting none.
pub(super) async fn outcome(
    store: &WorkerStore,
    turns: &Semaphore,
    tenant: TenantId,
    begun: StartId,
) -> Result<Answer, Refusal> {
    let mut pause = FIRST_LOOK;
    loop {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_LOOK);
        let place = turns.acquire().await;
        let found = store.start_outcome(tenant, begun).await;
        drop(place);
        match found.map_err(|error| unavailable(&error))? {
            None => {}
            Some(Started::Invocation(id)) => return Ok(Answer::Started(id.to_string())),
            Some(Started::Refused(why)) => return Err(Refusal::refused(why)),
        }
    }
}
