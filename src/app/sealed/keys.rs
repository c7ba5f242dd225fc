//! Data keys for workers and duties, which serve all tenants: remembered for two seconds, so that a claim and an ack ask
//! Postgres for none most of the time, and for those of a whole batch at once otherwise. What is not sealed costs nothing
//! here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sandbar_host::outcome::Outcome;

use crate::app::sealed::{Part, Sealer, message};
use crate::app::vault::{DataKey, Vault, VaultError, Wrapped};
use crate::domain::ids::{InvocationId, TenantId};
use crate::store::dead_letter::Unclassified;
use crate::store::invocation::encode_logs;
use crate::store::log::Said;
use crate::store::queue::{Claimed, Finished, Withheld};
use crate::store::{Result, WorkerStore};

/// A key that was erased is used at the longest for so long.
const STALE_AFTER: Duration = Duration::from_secs(2);
/// A key that does not fit is asked for again at the earliest after so long.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// Tenants remembered; beyond it all are forgotten, and asked for again when they are needed.
const MAX_TENANTS: usize = 10_000;

/// What is known of a tenant's key.
#[derive(Debug, Clone)]
struct Known {
    /// `None`: it has none.
    key: std::result::Result<Option<(String, DataKey)>, VaultError>,
    at: Instant,
}

/// The data keys of all tenants.
#[derive(Debug)]
pub struct Keys {
    store: WorkerStore,
    vault: Arc<Vault>,
    known: Mutex<HashMap<TenantId, Known>>,
}

impl Keys {
    /// Keys in this database, wrapped by these master keys.
    #[must_use]
    pub fn new(store: WorkerStore, vault: Arc<Vault>) -> Self {
        Self { store, vault, known: Mutex::default() }
    }

    /// Make the keys of these tenants known, if they are not, or not freshly enough.
    async fn fetch(&self, tenants: impl Iterator<Item = TenantId>, age: Duration) -> Result<()> {
        let mut missing: Vec<TenantId> = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            tenants.filter(|t| known.get(t).is_none_or(|known| known.at.elapsed() >= age)).collect()
        };
        missing.sort_unstable();
        missing.dedup();
        if missing.is_empty() {
            return Ok(());
        }
        // Taken before the question, so that an answer is never older than it claims.
        let at = Instant::now();
        let mut found: HashMap<_, _> = self.store.data_keys(&missing).await?.into_iter().collect();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() + missing.len() > MAX_TENANTS {
            known.clear();
        }
        for tenant in missing {
            let key = found.remove(&tenant).map(|(master, bytes)| {
                self.vault.unwrap(tenant, &Wrapped { master, bytes }).map(|key| (key.id(), key))
            });
            known.insert(tenant, Known { key: key.transpose(), at });
        }
        Ok(())
    }

    /// What seals the payloads of an invocation, by what is known now.
    fn sealer(
        &self,
        tenant: TenantId,
        invocation: InvocationId,
        id: &str,
    ) -> std::result::Result<Sealer, Withheld> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match known.get(&tenant).map(|known| &known.key) {
            Some(Ok(Some((found, key)))) if found == id => Ok(Sealer::new(key, tenant, invocation)),
            Some(Ok(_)) => Err(Withheld::Erased),
            Some(Err(_)) | None => Err(Withheld::NoKey),
        }
    }

    /// What seals the payloads of one invocation.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn sealer_of(
        &self,
        tenant: TenantId,
        invocation: InvocationId,
        id: &str,
    ) -> Result<std::result::Result<Sealer, Withheld>> {
        self.ready(&[(tenant, invocation, id.to_owned())]).await?;
        Ok(self.sealer(tenant, invocation, id))
    }

    /// Make the keys of these invocations known. A key that does not fit may be an old one: it is asked for again.
    async fn ready(&self, wanted: &[(TenantId, InvocationId, String)]) -> Result<()> {
        self.fetch(wanted.iter().map(|(tenant, _, _)| *tenant), STALE_AFTER).await?;
        let unfit: Vec<TenantId> = wanted
            .iter()
            .filter(|(tenant, invocation, id)| self.sealer(*tenant, *invocation, id).is_err())
            .map(|(tenant, _, _)| *tenant)
            .collect();
        self.fetch(unfit.into_iter(), ASK_AGAIN).await
    }

    /// Open the inputs of what was claimed. Where that cannot be done, the claim says why.
    pub async fn open_claimed<'a>(&self, claimed: impl Iterator<Item = &'a mut Claimed>) {
        let mut sealed: Vec<_> = claimed.filter(|one| one.spec.sealed.is_some()).collect();
        if sealed.is_empty() {
            return;
        }
        let wanted: Vec<_> = sealed.iter().filter_map(|one| key_of(one)).collect();
        let ready = self.ready(&wanted).await;
        if let Err(error) = &ready {
            tracing::warn!(%error, "data keys cannot be read: attempts are handed back");
        }
        for one in &mut sealed {
            let Some((tenant, invocation, id)) = key_of(one) else { continue };
            let opened = match (&ready, self.sealer(tenant, invocation, &id)) {
                (Ok(()), Ok(sealer)) => {
                    sealer.open_input(&mut one.spec, &mut one.input).map_err(|_| Withheld::Broken)
                }
                (Ok(()), Err(why)) => Err(why),
                (Err(_), _) => Err(Withheld::NoKey),
            };
            one.withheld = opened.err();
        }
    }

    /// Seal what these attempts left. Where the key is gone, what they left goes too.
    ///
    /// # Errors
    /// Postgres does not answer; then nothing has been changed.
    pub async fn seal_ends(&self, ends: &mut [Finished]) -> Result<()> {
        let wanted: Vec<_> = ends.iter().filter_map(|end| key_of(&end.claimed)).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        self.ready(&wanted).await?;
        for end in ends {
            let Some((tenant, invocation, id)) = key_of(&end.claimed) else { continue };
            let attempt = end.claimed.attempt;
            let log = encode_logs(&end.outcome.logs).unwrap_or_default();
            end.outcome.logs.clear();
            let sealed = self
                .sealer(tenant, invocation, &id)
                .ok()
                .and_then(|sealer| seal_outcome(&sealer, attempt, &mut end.outcome, &log).ok());
            if sealed.is_none() {
                tracing::warn!(%invocation, "its key is gone: what the attempt left is not kept");
                strip(&mut end.outcome);
            }
            end.sealed_log = sealed.filter(|log| !log.is_empty());
        }
        Ok(())
    }

    /// Seal what running attempts said. Where the key is gone, nobody hears it.
    ///
    /// # Errors
    /// Postgres does not answer; then nothing has been changed.
    pub async fn seal_said(&self, said: &mut Vec<Said>) -> Result<()> {
        if !said.iter().any(|said| said.claim.is_sealed()) {
            return Ok(());
        }
        let tenants: Vec<TenantId> =
            said.iter().filter(|said| said.claim.is_sealed()).map(|said| said.claim.tenant()).collect();
        self.fetch(tenants.into_iter(), STALE_AFTER).await?;
        said.retain_mut(|said| !said.claim.is_sealed() || self.seal_one(said).is_some());
        Ok(())
    }

    /// By the key that the tenant has now. Whether that is the one that the invocation names, its readers see.
    fn seal_one(&self, said: &mut Said) -> Option<()> {
        let (tenant, invocation) = (said.claim.tenant(), said.claim.invocation());
        let attempt = said.claim.attempt();
        let key = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.get(&tenant)?.key.as_ref().ok()?.as_ref()?.1.clone()
        };
        let sealer = Sealer::new(&key, tenant, invocation);
        if let Some((first, records)) = &mut said.log {
            *records = sealer.seal(attempt, Part::Piece(*first), records).ok()?;
        }
        if let Some((report, _)) = &mut said.progress {
            report.message = sealer.seal_text(attempt, Part::Progress, &report.message).ok()?;
        }
        Some(())
    }

    /// Open what says how these died.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn open_letters(&self, letters: &mut [Unclassified]) -> Result<Vec<Option<Sealer>>> {
        let wanted: Vec<_> =
            letters.iter().filter_map(|l| Some((l.tenant, l.id, l.sealed.clone()?))).collect();
        if !wanted.is_empty() {
            self.ready(&wanted).await?;
        }
        let mut sealers = Vec::with_capacity(letters.len());
        for letter in letters {
            let Some(id) = &letter.sealed else {
                sealers.push(None);
                continue;
            };
            let sealer = self.sealer(letter.tenant, letter.id, id).ok();
            let opened = sealer.as_ref().is_some_and(|sealer| {
                let termination = &mut letter.termination;
                let message = termination.as_mut().map(|t| sealer.open_termination(letter.attempt, t));
                message.is_none_or(|opened| opened.is_ok())
                    && sealer.open_backtrace(letter.attempt, &mut letter.backtrace).is_ok()
            });
            if !opened {
                // What cannot be read says nothing about the kind of failure but its reason.
                if let Some(text) = letter.termination.as_mut().and_then(message) {
                    text.clear();
                }
                letter.backtrace.clear();
            }
            sealers.push(sealer);
        }
        Ok(sealers)
    }
}

fn key_of(claimed: &Claimed) -> Option<(TenantId, InvocationId, String)> {
    Some((claimed.tenant, claimed.invocation, claimed.spec.sealed.clone()?))
}

/// All of an outcome that is a payload; returns the log.
fn seal_outcome(
    sealer: &Sealer,
    attempt: i16,
    outcome: &mut Outcome,
    log: &[u8],
) -> std::result::Result<Vec<u8>, VaultError> {
    sealer.seal_termination(attempt, &mut outcome.termination)?;
    sealer.seal_backtrace(attempt, &mut outcome.backtrace)?;
    outcome.output = sealer.seal(0, Part::Output, &outcome.output)?;
    for file in &mut outcome.artifacts {
        file.bytes = sealer.seal(attempt, Part::Artifact(&file.path), &file.bytes)?;
    }
    sealer.seal(attempt, Part::Log, log)
}

fn strip(outcome: &mut Outcome) {
    if let Some(text) = message(&mut outcome.termination) {
        text.clear();
    }
    outcome.backtrace.clear();
    outcome.output.clear();
    outcome.artifacts.clear();
    outcome.logs.clear();
}
