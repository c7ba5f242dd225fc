//! Many invocations in one request. Each has its own outcome; none depends on another. Owns their order: they are
//! queued in the order in which they stand.

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};

use crate::app::invoke::Request;
use crate::app::{App, Error, Result};
use crate::domain::ids::{InvocationId, TenantId};
use crate::domain::names::TaskName;
use crate::store::queue::{Enqueued, NewInvocation};

/// Invocations of one request.
pub const MAX_BATCH: usize = 1_000;
/// Requests of one batch that are resolved and checked at the same time.
const PREPARING: usize = 16;

/// What became of one of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepted {
    /// A new invocation.
    New(InvocationId),
    /// The same key and request were accepted before, as this one.
    Before(InvocationId),
}

impl App {
    /// Accept many invocations; durable on return. One that is refused has no effect on the others. They go through the flusher together, and are committed in as few statements as it takes.
    pub async fn invoke_batch(
        &self,
        tenant: TenantId,
        items: Vec<(TaskName, Request)>,
    ) -> Vec<Result<Accepted>> {
        let prepare = |(task, request): (TaskName, Request)| async move {
            let by = request.by;
            let target = self.target(tenant, &task, request.version).await?;
            Ok((self.prepare(tenant, &target, request).await?, by))
        };
        let prepared: Vec<Result<_>> =
            stream::iter(items.into_iter().map(prepare)).buffered(PREPARING).collect().await;
        // Ids say the order of service: given here, one after the other, and not as the checks came to their ends.
        let prepared = prepared
            .into_iter()
            .map(|one| one.map(|(row, by)| (NewInvocation { id: InvocationId::generate(), ..row }, by)));
        join_all(prepared.map(|one| async move {
            let (row, by) = one?;
            match self.enqueue_within_quota(self.seal(row).await?, by).await? {
                Enqueued::Accepted(id) | Enqueued::Waiting(id) => Ok(Accepted::New(id)),
                Enqueued::Replayed(id) | Enqueued::Existing(id) => Ok(Accepted::Before(id)),
                Enqueued::Conflict => Err(Error::IdempotencyKeyReused),
                Enqueued::Duplicate(holder) => Err(Error::UniqueKeyTaken { holder }),
                Enqueued::UnknownDependency(id) => Err(Error::DependencyNotFound(id)),
            }
        }))
        .await
    }
}
