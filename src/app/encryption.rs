//! What servers do about payloads that are sealed at rest: seal inputs before they are queued, open what is read, erase
//! payloads and keys, and turn sealing on and off. What is sealed, and how it is bound to its place, is `sealed`.
//!
//! A tenant's key is remembered open with its quotas, for two seconds (`quota`). What a row was sealed by is in the row, so a
//! key that was remembered too long opens nothing that it should not, and one that does not fit is read anew.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::app::quota::Known;
use crate::app::sealed::task::TaskSealer;
use crate::app::sealed::{Part, Sealer, blank};
use crate::app::vault::{DataKey, Wrapped};
use crate::app::{App, Error, Result, audit};
use crate::domain::ids::{InvocationId, TaskId, TenantId};
use crate::store::TenantConn;
use crate::store::dead_letter::{DeadLetter, Group};
use crate::store::invocation::{Erased, Invocation, Repeatable};
use crate::store::log::Piece;
use crate::store::queue::NewInvocation;
use crate::store::secret::{KeyErased, WrappedRow};
use crate::store::start::OpenStart;
use crate::store::task::{Change, Setting, TaskRow};

/// What holds for a tenant's payloads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encryption {
    /// The tenant wants them sealed.
    pub tenant: bool,
    /// The installation wants all payloads sealed.
    pub installation: bool,
    /// The data key it has, and the master key that wraps it, by their fingerprints.
    pub key: Option<(String, String)>,
}

/// The key of the row is gone, or it is another's by now.
struct Gone;

/// An invocation as it may be queued: sealed, if it has to be. The only way to one is [`App::seal`].
pub(super) struct Ready {
    row: NewInvocation,
    /// The client's key, and the digest of its request as it is without a key of ours.
    request: Option<(String, [u8; 32])>,
}

impl Ready {
    /// What it is.
    pub(super) fn row(&self) -> &NewInvocation {
        &self.row
    }

    /// What is queued, and the request that it was.
    pub(super) fn into_parts(self) -> (NewInvocation, Option<(String, [u8; 32])>) {
        (self.row, self.request)
    }
}

impl App {
    /// The tenant's data key; made when it has none.
    pub(super) async fn data_key(&self, tenant: TenantId, connection: &mut TenantConn) -> Result<DataKey> {
        let vault = &self.inner.settings.vault;
        let (master, bytes) = match connection.data_key().await? {
            Some(found) => found,
            None => {
                let (_, made) = vault.make(tenant)?;
                // Whoever was quicker has made the one that counts.
                connection.data_key_put(&(made.master, made.bytes)).await?
            }
        };
        Ok(vault.unwrap(tenant, &Wrapped { master, bytes })?)
    }

    pub(super) fn unwrapped(&self, tenant: TenantId, key: Option<WrappedRow>) -> Result<Option<DataKey>> {
        let unwrap = |(master, bytes)| self.inner.settings.vault.unwrap(tenant, &Wrapped { master, bytes });
        Ok(key.map(unwrap).transpose()?)
    }

    /// What seals that which a tenant hands in now; `None`: nobody wants it sealed.
    async fn sealing_key(&self, tenant: TenantId) -> Result<Option<(String, DataKey)>> {
        let known = self.quotas_of(tenant).await?;
        if !known.seals {
            return Ok(None);
        }
        if let Some(key) = &known.key {
            return Ok(Some(key.open(&self.inner.settings.vault, tenant)?.clone()));
        }
        let key = self.data_key(tenant, &mut self.tenant(tenant).await?).await?;
        self.forget(tenant);
        Ok(Some((key.id(), key)))
    }

    /// Seal the configuration that a patch sets, if the tenant or the installation wants that. True: it is.
    pub(super) async fn seal_config(
        &self,
        tenant: TenantId,
        task: TaskId,
        change: &mut Change<Value>,
    ) -> Result<bool> {
        let Some((id, key)) = self.sealing_key(tenant).await? else { return Ok(false) };
        if let Change::Set(Value::Object(patch)) = change {
            let sealer = TaskSealer::new(&key, tenant, task);
            for (name, value) in patch.iter_mut() {
                if let Some(text) = value.as_str() {
                    let sealed = sealer.seal_setting(&id, name, text)?;
                    *value = serde_json::to_value(sealed).map_err(|error| Error::Internal(error.into()))?;
                }
            }
        }
        Ok(true)
    }

    /// Open the configuration of tasks. What nobody can open any more is left out.
    ///
    /// # Errors
    /// This server has no master key; or a text was changed or moved.
    pub(super) async fn open_config(&self, tenant: TenantId, tasks: &mut [TaskRow]) -> Result<()> {
        // Asked for once each: one that is gone is looked for in Postgres.
        let mut keys: HashMap<String, Option<DataKey>> = HashMap::new();
        for row in tasks {
            let mut gone = Vec::new();
            for (name, setting) in &mut row.config {
                let Setting::Sealed { sealed, data } = setting else { continue };
                if !keys.contains_key(sealed) {
                    keys.insert(sealed.clone(), self.key_by_id(tenant, sealed).await?.ok());
                }
                match keys.get(sealed).and_then(Option::as_ref) {
                    Some(key) => {
                        let text = TaskSealer::new(key, tenant, row.id).open_setting(name, data)?;
                        *setting = Setting::Plain(text);
                    }
                    None => gone.push(name.clone()),
                }
            }
            for name in gone {
                row.config.remove(&name);
            }
        }
        Ok(())
    }

    /// Open the input of something that an invocation starts.
    ///
    /// # Errors
    /// [`Error::PayloadsErased`]; or as [`App::open_payloads`].
    pub(super) async fn open_start(&self, start: &OpenStart) -> Result<Vec<u8>> {
        let Some(id) = &start.sealed else { return Ok(start.input.clone()) };
        let Ok(sealer) = self.opener(start.tenant, start.parent, id).await? else {
            return Err(Error::PayloadsErased(start.parent));
        };
        Ok(sealer.open(0, Part::Start(&start.name()), &start.input)?)
    }

    /// Seal an invocation that is about to be queued, if its tenant or the installation wants that.
    ///
    /// # Errors
    /// [`Error::SecretsUnavailable`]: it must be sealed, and this server has no master key.
    pub(super) async fn seal(&self, mut row: NewInvocation) -> Result<Ready> {
        let request = row.idempotency.clone();
        let Some((id, key)) = self.sealing_key(row.tenant).await? else { return Ok(Ready { row, request }) };
        if let Some((_, digest)) = &mut row.idempotency {
            *digest = key.digest(digest);
        }
        let sealer = Sealer::new(&key, row.tenant, row.id);
        sealer.seal_input(&id, &mut row.spec, &mut row.input)?;
        Ok(Ready { row, request })
    }

    /// An idempotency key met another digest. It may be that of the same request: made before the payloads of this tenant
    /// were sealed, or while they were. `digest` is the plain one.
    pub(super) async fn same_request(
        &self,
        tenant: TenantId,
        word: &str,
        digest: &[u8; 32],
    ) -> Result<Option<InvocationId>> {
        let known = self.quotas_of(tenant).await?;
        let Some(key) = &known.key else { return Ok(None) };
        let (_, key) = key.open(&self.inner.settings.vault, tenant)?;
        let Some((stored, id)) = self.tenant(tenant).await?.request_of(word).await? else { return Ok(None) };
        let same = stored == digest || stored == key.digest(digest);
        Ok(same.then_some(id))
    }

    /// What opens the payloads of an invocation that this key sealed.
    async fn opener(
        &self,
        tenant: TenantId,
        invocation: InvocationId,
        id: &str,
    ) -> Result<std::result::Result<Sealer, Gone>> {
        Ok(self.key_by_id(tenant, id).await?.map(|key| Sealer::new(&key, tenant, invocation)))
    }

    /// The tenant's data key, if it still is the one with this fingerprint.
    async fn key_by_id(&self, tenant: TenantId, id: &str) -> Result<std::result::Result<DataKey, Gone>> {
        let known: Arc<Known> = self.quotas_of(tenant).await?;
        if let Some(key) = &known.key {
            let (found, key) = key.open(&self.inner.settings.vault, tenant)?;
            if found == id {
                return Ok(Ok(key.clone()));
            }
        }
        // It may have been made this moment, by another server.
        let read = self.tenant(tenant).await?.data_key().await?;
        let key = self.unwrapped(tenant, read)?;
        Ok(key.filter(|key| key.id() == id).ok_or(Gone))
    }

    /// Open what is shown of an invocation. What nobody can open any more is left out.
    ///
    /// # Errors
    /// This server has no master key; or a payload was changed or moved.
    pub(super) async fn open_payloads(
        &self,
        tenant: TenantId,
        mut invocation: Invocation,
    ) -> Result<Invocation> {
        let Some(id) = invocation.kept.sealed.clone() else { return Ok(invocation) };
        if invocation.kept.erased_at.is_some() {
            blank(&mut invocation);
            return Ok(invocation);
        }
        match self.opener(tenant, invocation.summary.id, &id).await? {
            Ok(sealer) => sealer.open_invocation(&mut invocation)?,
            Err(Gone) => {
                blank(&mut invocation);
                invocation.lost = true;
            }
        }
        Ok(invocation)
    }

    /// Open one payload of an invocation.
    ///
    /// # Errors
    /// [`Error::PayloadsErased`]; or as [`App::open_payloads`].
    pub(super) async fn open_part(
        &self,
        tenant: TenantId,
        invocation: InvocationId,
        sealed: Option<&str>,
        attempt: i16,
        part: Part<'_>,
        bytes: Vec<u8>,
    ) -> Result<Vec<u8>> {
        let Some(id) = sealed else { return Ok(bytes) };
        match self.opener(tenant, invocation, id).await? {
            Ok(sealer) => Ok(sealer.open(attempt, part, &bytes)?),
            Err(Gone) => Err(Error::PayloadsErased(invocation)),
        }
    }

    /// Open pieces of a log.
    ///
    /// # Errors
    /// As [`App::open_part`].
    pub(super) async fn open_pieces(
        &self,
        tenant: TenantId,
        invocation: InvocationId,
        sealed: Option<&str>,
        pieces: &mut [Piece],
    ) -> Result<()> {
        let Some(id) = sealed else { return Ok(()) };
        let Ok(sealer) = self.opener(tenant, invocation, id).await? else {
            return Err(Error::PayloadsErased(invocation));
        };
        for piece in pieces {
            sealer.open_piece(piece)?;
        }
        Ok(())
    }

    /// Open the input of an invocation that is to run again.
    ///
    /// # Errors
    /// As [`App::open_part`].
    pub(super) async fn open_input(
        &self,
        tenant: TenantId,
        invocation: InvocationId,
        old: &mut Repeatable,
    ) -> Result<()> {
        if old.erased {
            return Err(Error::PayloadsErased(invocation));
        }
        let Some(id) = old.spec.sealed.take() else { return Ok(()) };
        match self.opener(tenant, invocation, &id).await? {
            Ok(sealer) => Ok(sealer.open_input(&mut old.spec, &mut old.input)?),
            Err(Gone) => Err(Error::PayloadsErased(invocation)),
        }
    }

    async fn open_summary(
        &self,
        tenant: TenantId,
        invocation: InvocationId,
        sealed: Option<&str>,
        summary: &mut Option<String>,
    ) -> Result<()> {
        if let (Some(id), Some(text)) = (sealed, summary.as_mut()) {
            match self.opener(tenant, invocation, id).await? {
                Ok(sealer) => *text = sealer.open_text(0, Part::Summary, text)?,
                Err(Gone) => *summary = None,
            }
        }
        Ok(())
    }

    pub(super) async fn open_letters(&self, tenant: TenantId, letters: &mut [DeadLetter]) -> Result<()> {
        for one in letters {
            self.open_summary(tenant, one.id, one.sealed.as_deref(), &mut one.summary).await?;
        }
        Ok(())
    }

    pub(super) async fn open_groups(&self, tenant: TenantId, groups: &mut [Group]) -> Result<()> {
        for one in groups {
            self.open_summary(tenant, one.newest, one.sealed.as_deref(), &mut one.summary).await?;
        }
        Ok(())
    }

    /// What holds for this tenant's payloads.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn encryption(&self, tenant: TenantId) -> Result<Encryption> {
        let found = self.tenant(tenant).await?.quotas().await?;
        let master = found.key.as_ref().map(|(master, _)| master.clone());
        // Without its master key this server cannot name it.
        let key = self.unwrapped(tenant, found.key).ok().flatten().map(|key| key.id());
        Ok(Encryption {
            tenant: found.seal_payloads,
            installation: self.inner.settings.seal_payloads,
            key: key.zip(master),
        })
    }

    /// Seal this tenant's payloads from now on, or do not. What was accepted before stays as it is.
    ///
    /// # Errors
    /// [`Error::SecretsUnavailable`]; or Postgres does not answer.
    pub async fn set_encryption(&self, tenant: TenantId, seal: bool) -> Result<Encryption> {
        let before = self.encryption(tenant).await?;
        let mut connection = self.tenant(tenant).await?;
        if seal {
            // There must be a key that this server opens, or nothing could be accepted any more.
            self.data_key(tenant, &mut connection).await?;
        }
        connection.seal_payloads(seal).await?;
        drop(connection);
        self.forget(tenant);
        audit::changed(json!({"seal_payloads": before.tenant}), json!({"seal_payloads": seal}));
        self.encryption(tenant).await
    }

    /// Erase the payloads of an invocation that has ended, for good.
    ///
    /// # Errors
    /// It is not this tenant's, or has not ended: cancel it first.
    pub async fn erase_payloads(&self, tenant: TenantId, id: InvocationId) -> Result<Invocation> {
        let erased = self.tenant(tenant).await?.invocation_erase(id).await?;
        let now = self.invocation(tenant, id, 0).await?;
        match erased {
            Erased::Done => {
                audit::changed(json!({"invocation": id}), json!({"invocation": id, "payloads": null}));
                Ok(now)
            }
            Erased::Open => Err(Error::NotFinished(now.summary.state)),
            Erased::Unknown => Err(Error::InvocationNotFound(id)),
        }
    }

    /// Erase the data key of a tenant that is not active: nothing that it sealed opens again, exports included.
    ///
    /// # Errors
    /// There is no such tenant, or it is active.
    pub async fn erase_tenant_key(&self, tenant: TenantId) -> Result<()> {
        match self.inner.store.erase_tenant_key(tenant).await? {
            KeyErased::Done => {
                self.forget(tenant);
                audit::changed(json!({"tenant": tenant}), json!({"tenant": tenant, "key": null}));
                Ok(())
            }
            KeyErased::Active => Err(Error::TenantActive),
            KeyErased::Unknown => Err(Error::TenantNotFound(tenant.to_string())),
        }
    }
}
