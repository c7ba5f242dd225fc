//! Data keys for workers and duties, which serve all tenants: remembered for two seconds, so that a claim and an ack ask
//! Postgres for none most of the time, and for those of a whole batch at once otherwise. What is not sealed costs nothing
//! here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sandbar_host::log::Log;
use sandbar_host::outcome::Outcome;

use crate::app::sealed::{Part, Sealer, message};
use crate::app::vault::{DataKey, Vault, VaultError, Wrapped};
use crate::domain::ids::{InvocationId, TenantId};
use crate::store::dead_letter::Unclassified;
use crate::store::log::Said;
use crate::store::queue::{Claimed, Finished, Withheld};
use crate::store::{Result, WorkerStore};

/// A key that was erased is used at the longest for so long.
const STALE_AFTER: Duration = Duration::from_secs(2);
/// A key that does not fit is asked for again at the earliest after so long.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// Tenants remembered; beyond it all are forgotten, and asked for again when they are needed.
const MAX_TENANTS: usize = 10_000;
/// Keys that nobody has asked for so long are wiped when any is asked for.
const IDLE: Duration = Duration::from_secs(5);

/// What is known of a tenant's key.
#[derive(Debug, Clone)]
struct Known {
    /// The tenant wants what it hands in sealed.
    seals: bool,
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
    /// When idle keys were wiped last.
    wiped: Mutex<Option<Instant>>,
}

impl Keys {
    /// Keys in this database, wrapped by these master keys.
    #[must_use]
    pub fn new(store: WorkerStore, vault: Arc<Vault>) -> Self {
        Self { store, vault, known: Mutex::default(), wiped: Mutex::default() }
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
        let mut wiped = self.wiped.lock().unwrap_or_else(PoisonError::into_inner);
        if wiped.is_none_or(|at| at.elapsed() >= IDLE) {
            known.retain(|_, known| known.at.elapsed() < IDLE);
            *wiped = Some(at);
        }
        drop(wiped);
        for tenant in missing {
            let (seals, wrapped) = found.remove(&tenant).unwrap_or_default();
            let key = wrapped.map(|(master, bytes)| {
                self.vault.unwrap(tenant, &Wrapped { master, bytes }).map(|key| (key.id(), key))
            });
            known.insert(tenant, Known { seals, key: key.transpose(), at });
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

    /// Whether this tenant wants what its tasks leave behind sealed from now on.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn wants_sealed(&self, tenant: TenantId) -> Result<bool> {
        self.fetch(std::iter::once(tenant), STALE_AFTER).await?;
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(known.get(&tenant).is_some_and(|known| known.seals))
    }

    /// The data key that a tenant has now, with its fingerprint; `None`: it has none.
    fn held(&self, tenant: TenantId) -> std::result::Result<Option<(String, DataKey)>, Withheld> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match known.get(&tenant).map(|known| &known.key) {
            Some(Ok(key)) => Ok(key.clone()),
            Some(Err(_)) | None => Err(Withheld::NoKey),
        }
    }

    /// The data key that a tenant has now, as far as this process can open it.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn current(&self, tenant: TenantId) -> Result<Option<(String, DataKey)>> {
        self.fetch(std::iter::once(tenant), STALE_AFTER).await?;
        Ok(self.held(tenant).ok().flatten())
    }

    /// The data key for what a tenant's tasks leave behind; made when it has none.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn current_or_new(
        &self,
        tenant: TenantId,
    ) -> Result<std::result::Result<(String, DataKey), Withheld>> {
        self.fetch(std::iter::once(tenant), STALE_AFTER).await?;
        match self.held(tenant) {
            Ok(Some(found)) => return Ok(Ok(found)),
            Ok(None) => {}
            Err(why) => return Ok(Err(why)),
        }
        let Ok((_, made)) = self.vault.make(tenant) else { return Ok(Err(Withheld::NoKey)) };
        if !self.store.data_key_make(tenant, &(made.master, made.bytes)).await? {
            return Ok(Err(Withheld::Erased));
        }
        // Whoever was quicker has made the one that counts.
        self.fetch(std::iter::once(tenant), Duration::ZERO).await?;
        Ok(self.held(tenant).and_then(|found| found.ok_or(Withheld::Erased)))
    }

    /// The data key with this fingerprint.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn by_id(&self, tenant: TenantId, id: &str) -> Result<std::result::Result<DataKey, Withheld>> {
        for age in [STALE_AFTER, ASK_AGAIN] {
            self.fetch(std::iter::once(tenant), age).await?;
            if let Ok(Some((found, key))) = self.held(tenant)
                && found == id
            {
                return Ok(Ok(key));
            }
        }
        Ok(Err(self.held(tenant).err().unwrap_or(Withheld::Erased)))
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
            let log = std::mem::take(&mut end.outcome.logs).into_bytes();
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
    outcome.logs = Log::default();
}
