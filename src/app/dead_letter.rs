//! Dead letters: what died, grouped by what killed it, run again or deleted for good.

use sandbar_host::outcome::Termination;

use crate::app::sealed::Part;
use crate::app::sealed::keys::Keys;
use crate::app::task::page;
use crate::app::{App, Error, Result};
use crate::domain::fingerprint::{Failure, fingerprint, summary};
use crate::domain::ids::{InvocationId, TenantId};
use crate::store::WorkerStore;
use crate::store::dead_letter::{DeadLetter, Filter, Group, Unclassified};

/// Dead letters classified in one run of the duty.
const CLASSIFY: i64 = 500;

impl App {
    /// Dead letters that pass the filter, newest first; and whether there are more.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn dead_letters(
        &self,
        tenant: TenantId,
        filter: &Filter,
        limit: u16,
    ) -> Result<(Vec<DeadLetter>, bool)> {
        let rows = self.tenant(tenant).await?.dead_letters(filter, i64::from(limit) + 1).await?;
        let (mut rows, more) = page(rows, limit);
        self.open_letters(tenant, &mut rows).await?;
        Ok((rows, more))
    }

    /// Dead letters by task and kind of failure, the largest group first.
    ///
    /// # Errors
    /// Postgres does not answer in time.
    pub async fn dead_letter_groups(&self, tenant: TenantId, filter: &Filter) -> Result<Vec<Group>> {
        let mut groups = self.tenant(tenant).await?.dead_letter_groups(filter).await?;
        self.open_groups(tenant, &mut groups).await?;
        Ok(groups)
    }

    /// Note that a dead letter was run again. The new invocation is durable already: a note that fails is only missing.
    pub(super) async fn redriven(&self, tenant: TenantId, id: InvocationId, again: InvocationId) {
        let note = async { Result::Ok(self.tenant(tenant).await?.dead_letters_redriven(id, again).await?) };
        if let Err(error) = note.await {
            tracing::warn!(%id, %error, "cannot note that a dead letter was run again");
        }
    }

    /// Delete a dead letter for good, with everything that is kept of its invocation.
    ///
    /// # Errors
    /// It is no dead letter of this tenant.
    pub async fn dead_letter_purge(&self, tenant: TenantId, id: InvocationId) -> Result<()> {
        let purged = self.tenant(tenant).await?.dead_letters_purge(&[id]).await?;
        if purged.is_empty() { Err(Error::DeadLetterNotFound(id)) } else { Ok(()) }
    }
}

/// Find out which kind of failure the new dead letters are. Returns how many were looked at.
///
/// # Errors
/// Postgres does not answer, or the duty under which `store` writes is somebody else's by now.
pub async fn classify(store: &WorkerStore, keys: &Keys) -> crate::store::Result<u64> {
    let mut new = store.dead_letters_unclassified(CLASSIFY).await?;
    if new.is_empty() {
        return Ok(0);
    }
    let sealers = keys.open_letters(&mut new).await?;
    let mut found: Vec<_> = new.iter().map(classified).collect();
    for ((found, letter), sealer) in found.iter_mut().zip(&new).zip(&sealers) {
        if letter.sealed.is_some() {
            let sealed = sealer.as_ref().and_then(|s| s.seal_text(0, Part::Summary, &found.3).ok());
            // Without the key there is nothing secret in it, and nobody would open it.
            found.3 = sealed.unwrap_or_default();
        }
    }
    store.dead_letters_classify(&found).await?;
    Ok(found.len() as u64)
}

fn classified(letter: &Unclassified) -> (TenantId, InvocationId, [u8; 8], String) {
    let frames: Vec<String> = letter.backtrace.iter().map(|frame| frame.function.clone()).collect();
    let mut kind = String::new();
    let mut message = "";
    match &letter.termination {
        Some(Termination::GuestError { retryable, message: said, .. }) => {
            if *retryable { "retryable" } else { "fatal" }.clone_into(&mut kind);
            message = said;
        }
        Some(Termination::ExitCode { code }) => kind = code.to_string(),
        Some(Termination::Trap { kind: trap, message: said }) => {
            kind = serde_json::to_value(trap)
                .ok()
                .and_then(|v| v.as_str().map(str::to_owned))
                .unwrap_or_default();
            message = said;
        }
        Some(Termination::QuotaExceeded { quota }) => kind.clone_from(quota),
        Some(Termination::Denied { capability }) => kind.clone_from(capability),
        Some(Termination::HostFault { message: said }) => message = said,
        Some(
            Termination::Succeeded
            | Termination::OutOfFuel
            | Termination::OutOfMemory
            | Termination::StackOverflow
            | Termination::Deadline
            | Termination::OutputTooLarge
            | Termination::Cancelled
            | Termination::LeaseLost,
        )
        | None => {}
    }
    let failure = Failure { reason: &letter.reason, kind: &kind, message, frames: &frames };
    (letter.tenant, letter.id, fingerprint(&failure), summary(&failure))
}
