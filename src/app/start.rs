//! What running attempts asked to start becomes invocations, by the rules of any request: schema, quotas, limits. Owns
//! which failures are final.

use futures_util::future::join_all;
use sandbar_host::ModuleKind;

use crate::app::invoke::{Part, Payload, Request, fingerprint};
use crate::app::{App, Error, Result};
use crate::domain::ids::InvocationId;
use crate::domain::names::{IdempotencyKey, TaskName};
use crate::store::WorkerStore;
use crate::store::start::{OpenStart, Started};
use crate::store::task::Kind;

/// Starts that one turn sees to, at the same time: they share the flushes of everybody.
const AT_ONCE: i64 = 32;
/// How long others leave alone what somebody has taken: longer than a request may take.
const LEASE: std::time::Duration = std::time::Duration::from_secs(30);
/// Characters of a refusal that the guest gets to see.
const MAX_WORDS: usize = 1_024;

impl App {
    /// See to some of what waits. True: there may be more.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn starts_turn(&self, store: &WorkerStore) -> Result<bool> {
        let open = store.starts_take(AT_ONCE, LEASE).await?;
        join_all(open.iter().map(|one| self.start(store, one))).await;
        Ok(open.len() as i64 >= AT_ONCE)
    }

    async fn start(&self, store: &WorkerStore, open: &OpenStart) {
        let started = match self.begin(open).await {
            Ok(id) => Started::Invocation(id),
            Err(error) if passes(&error) => {
                tracing::warn!(start = %open.id, %error, "a start is left for later");
                return;
            }
            Err(error) => Started::Refused(words(&error).chars().take(MAX_WORDS).collect()),
        };
        if let Err(error) = store.start_settle(open.tenant, open.id, &started).await {
            tracing::warn!(start = %open.id, %error, "what came of a start is written down later");
        }
    }

    async fn begin(&self, open: &OpenStart) -> Result<InvocationId> {
        let unknown = |_| Error::TaskNotFound(open.task.chars().take(64).collect());
        let task = TaskName::try_from(open.task.clone()).map_err(unknown)?;
        let target = self.target(open.tenant, &task, None).await?;
        let input = self.open_start(open).await?;
        let part = |pointer| Some(Part { pointer, bytes: input.clone() });
        let payload = match target.kind {
            Kind::Module(ModuleKind::Task) | Kind::Http => {
                Payload { input: part("/input"), ..Payload::default() }
            }
            Kind::Module(ModuleKind::CommandP1 | ModuleKind::CommandP2) => {
                Payload { stdin: part("/stdin"), ..Payload::default() }
            }
        };
        let key = IdempotencyKey::try_from(format!("start:{}", open.id))
            .map_err(|error| Error::Internal(anyhow::anyhow!("{error:?}")))?;
        let request = Request {
            payload,
            idempotency: Some((key, fingerprint(&task, &input))),
            family: Some(open.family),
            ..Request::default()
        };
        Ok(self.invoke(open.tenant, &task, request, None).await?.invocation.summary.id)
    }
}

/// What is wrong, field by field where it is about fields.
fn words(error: &Error) -> String {
    let fields = match error {
        Error::InputMismatch(fields) | Error::InvalidFields(fields) => fields.as_slice(),
        _ => &[],
    };
    let details = fields.iter().map(|field| format!("; {}: {}", field.pointer, field.detail));
    std::iter::once(error.to_string()).chain(details).collect()
}

/// Whether it may go better at the next try of ours. Everything else is told to the guest, who may try again.
fn passes(error: &Error) -> bool {
    matches!(error, Error::Unavailable(_) | Error::Overloaded(_) | Error::Internal(_))
}
