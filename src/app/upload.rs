//! From uploaded bytes to a version that waits for its compilation. Looks at a module (host crate, no engine) and at
//! what it says about itself; never compiles: that is a background duty.

pub mod memory;

use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use sandbar_host::ModuleHash;
use sandbar_host::inspect::{Inspection, Rejection, RejectionCode, inspect};
use sandbar_host::limits::Limits;
use sandbar_host::manifest::Manifest;
use sha2::{Digest, Sha256};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::app::http::HttpTask;
use crate::app::{App, Error, Result, policy};
use crate::domain::ids::TenantId;
use crate::domain::names::TaskName;
use crate::domain::retry::RetryPolicy;
use crate::store::task::{Created, Kind, NewVersion, VersionRow, VersionState};
use crate::wire::task::HttpTask as Said;

/// Longest silence within an upload.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// Longest upload.
const MAX_UPLOAD: Duration = Duration::from_secs(900);
/// First and longest pause between two looks at a version that compiles.
const POLL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(200));

/// A version, and whether this upload made it.
#[derive(Debug)]
pub struct Uploaded {
    /// The version.
    pub version: VersionRow,
    /// False: the bytes were there before.
    pub created: bool,
}

impl App {
    /// Take a module as a version of `task`, made if need be; wait up to `wait` until it has been compiled.
    ///
    /// # Errors
    /// [`Error::ModuleRejected`], now or by an earlier compilation of the same bytes; too large, too slow, broken off; too
    /// many wait for their compilation already.
    pub async fn upload<E: std::fmt::Display>(
        &self,
        tenant: TenantId,
        task: &TaskName,
        declared: Option<u64>,
        body: impl Stream<Item = std::result::Result<Bytes, E>>,
        wait: Option<Duration>,
    ) -> Result<Uploaded> {
        let max = self.inner.settings.max_module_bytes;
        if declared.is_some_and(|bytes| bytes > max) {
            return Err(Error::ModuleTooLarge { max });
        }
        let deadline = Instant::now() + MAX_UPLOAD;
        let module = timeout_at(deadline, self.receive(tenant, max, body))
            .await
            .unwrap_or(Err(Error::UploadStalled { seconds: MAX_PAUSE.as_secs() }))?;
        let known = {
            let mut connection = self.tenant(tenant).await?;
            connection.version_by_hash(task, &module.hash).await?
        };
        let uploaded = match known {
            Some(version) => Uploaded { version, created: false },
            None => self.create(tenant, task, module).await?,
        };
        self.compiled(tenant, task, uploaded, wait).await
    }

    /// Take a request as a version of `task`, made if need be. It needs no compilation.
    ///
    /// # Errors
    /// It could never be sent; a quota is used up.
    pub async fn define(&self, tenant: TenantId, task: &TaskName, said: Said) -> Result<Uploaded> {
        let bytes = HttpTask::stored(&said).map_err(|error| Error::Internal(error.into()))?;
        let description = said.description.clone();
        HttpTask::check(said).map_err(|error| Error::InvalidFields(vec![error]))?;
        let hash = ModuleHash::of(&bytes);
        let known = self.tenant(tenant).await?.version_by_hash(task, &hash).await?;
        if let Some(version) = known {
            return Ok(Uploaded { version, created: false });
        }
        let manifest = description.map(|text| Manifest { description: Some(text), ..Manifest::default() });
        let new = NewVersion {
            task,
            hash,
            bytes: &bytes,
            kind: Kind::Http,
            manifest: manifest.as_ref(),
            max_compiling: self.inner.settings.max_compiling_of_one,
        };
        self.store_version(tenant, &new).await
    }

    async fn receive<E: std::fmt::Display>(
        &self,
        tenant: TenantId,
        max: u64,
        body: impl Stream<Item = std::result::Result<Bytes, E>>,
    ) -> Result<Module<'_>> {
        let mut body = pin!(body);
        let mut bytes = Vec::new();
        let mut hasher = Sha256::new();
        let mut memory = self.inner.upload_memory.begin(tenant)?;
        loop {
            let chunk = match timeout(MAX_PAUSE, body.next()).await {
                Err(_) => {
                    return Err(Error::UploadStalled { seconds: MAX_PAUSE.as_secs() });
                }
                Ok(None) => break,
                Ok(Some(Err(error))) => return Err(Error::UploadBroken(error.to_string())),
                Ok(Some(Ok(chunk))) => chunk,
            };
            let total = (bytes.len() as u64).saturating_add(chunk.len() as u64);
            if total > max {
                return Err(Error::ModuleTooLarge { max });
            }
            memory.grow_to(total)?;
            hasher.update(&chunk);
            bytes.extend_from_slice(&chunk);
        }
        Ok(Module {
            hash: ModuleHash::from_bytes(hasher.finalize().into()),
            bytes: Bytes::from(bytes),
            _memory: memory,
        })
    }

    async fn create(&self, tenant: TenantId, task: &TaskName, module: Module<'_>) -> Result<Uploaded> {
        self.room_to_compile(tenant).await?;
        let inspection = self.inspect(tenant, module.bytes.clone()).await?;
        if let Some(manifest) = &inspection.manifest {
            self.check_manifest(manifest).await?;
        }
        let new = NewVersion {
            task,
            hash: module.hash,
            bytes: &module.bytes,
            kind: Kind::Module(inspection.kind),
            manifest: inspection.manifest.as_ref(),
            max_compiling: self.inner.settings.max_compiling_of_one,
        };
        self.store_version(tenant, &new).await
    }

    /// Whether one more may wait for its compilation. Asked before the bytes are looked at, which is the dearer; what
    /// counts for the tenant is asked again when the version is made.
    async fn room_to_compile(&self, tenant: TenantId) -> Result<()> {
        let settings = &self.inner.settings;
        let waiting = self.tenant(tenant).await?.compilations_waiting().await?;
        if waiting.own >= i64::from(settings.max_compiling_of_one) {
            return Err(Error::CompileQueueFull { limit: settings.max_compiling_of_one });
        }
        if waiting.in_all >= i64::from(settings.max_compiling) {
            return Err(Error::Overloaded("too many uploads wait for their compilation"));
        }
        Ok(())
    }

    /// Write a version that was looked at, within the quotas of modules.
    async fn store_version(&self, tenant: TenantId, new: &NewVersion<'_>) -> Result<Uploaded> {
        self.admit_module(tenant, new.hash.as_bytes(), new.bytes.len() as u64).await?;
        let (version, created) = match self.tenant(tenant).await?.version_create(new).await? {
            Created::New(version) => (version, true),
            Created::Known(version) => (version, false),
            Created::Full => return Err(Error::CompileQueueFull { limit: new.max_compiling }),
        };
        if created {
            let task = new.task;
            tracing::info!(%tenant, %task, version = version.number, hash = %new.hash, kind = new.kind.as_str(), "uploaded");
            let hash = new.hash.to_string();
            let made = serde_json::json!({"task": task, "version": version.number, "sha256": hash, "bytes": version.size_bytes});
            crate::app::audit::changed(serde_json::Value::Null, made);
            match version.state {
                // Whatever this server remembers of the task is out of date.
                VersionState::Ready => self.inner.signals.version_changed(),
                VersionState::Compiling | VersionState::Rejected(_) => {
                    self.inner.signals.compile.notify_one();
                }
            }
        }
        Ok(Uploaded { version, created })
    }

    /// When it is the tenant's turn.
    async fn inspect(&self, tenant: TenantId, bytes: Bytes) -> Result<Inspection> {
        let _turn = self.inner.inspections.take(tenant.0.as_u128()).await;
        tokio::task::spawn_blocking(move || inspect(&bytes))
            .await
            .map_err(|error| Error::Internal(error.into()))?
            .map_err(Error::ModuleRejected)
    }

    /// What a module says about itself must hold when it is invoked.
    async fn check_manifest(&self, manifest: &Manifest) -> Result<()> {
        if let Err(detail) = check_words(manifest) {
            return Err(bad_manifest(detail));
        }
        for (name, schema) in
            [("input_schema", &manifest.input_schema), ("output_schema", &manifest.output_schema)]
        {
            if let Some(schema) = schema {
                let verdict = self.inner.schemas.compile(schema.clone()).await?;
                verdict
                    .map_err(|why| bad_manifest(format!("`{name}` is not a usable JSON Schema: {why}")))?;
            }
        }
        Ok(())
    }

    /// The version once it is ready, or as it is when `wait` is over.
    async fn compiled(
        &self,
        tenant: TenantId,
        task: &TaskName,
        mut uploaded: Uploaded,
        wait: Option<Duration>,
    ) -> Result<Uploaded> {
        let deadline = Instant::now() + wait.unwrap_or_default();
        let mut changes = self.inner.signals.subscribe_versions();
        let mut pause = POLL.0;
        loop {
            match &uploaded.version.state {
                VersionState::Ready => return Ok(uploaded),
                VersionState::Rejected(rejection) => {
                    return Err(Error::ModuleRejected(rejection.clone()));
                }
                VersionState::Compiling
                    if Instant::now() >= deadline || self.inner.draining.is_cancelled() =>
                {
                    return Ok(uploaded);
                }
                VersionState::Compiling => {}
            }
            // Another process may compile it, and then nothing is heard of it here.
            tokio::select! {
                _ = changes.changed() => {}
                () = sleep_until(deadline.min(Instant::now() + pause)) => {}
            }
            pause = (pause * 2).min(POLL.1);
            uploaded.version = self.version(tenant, task, uploaded.version.number).await?;
        }
    }
}

/// Bytes in memory, paid for.
struct Module<'a> {
    hash: ModuleHash,
    bytes: Bytes,
    _memory: memory::Held<'a>,
}

fn bad_manifest(detail: String) -> Error {
    Error::ModuleRejected(Rejection { code: RejectionCode::BadManifest, detail })
}

/// Everything about a manifest that can be checked without compiling its schemas.
fn check_words(manifest: &Manifest) -> std::result::Result<(), String> {
    let json = serde_json::to_value(manifest).map_err(|error| error.to_string())?;
    if has_nul(&json) {
        return Err("the self-description has a NUL character, which cannot be stored".to_owned());
    }
    policy::limits(Limits::default(), &manifest.limits).map_err(|e| e.detail)?;
    if let Some(retry) = &manifest.retry {
        let wanted = serde_json::from_value(retry.clone())
            .map_err(|error| format!("`retry` is not a retry policy: {error}"))?;
        policy::retry(&RetryPolicy::default(), &wanted).map_err(|e| e.detail)?;
    }
    Ok(())
}

fn has_nul(value: &serde_json::Value) -> bool {
    use serde_json::Value;
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(items) => items.iter().any(has_nul),
        Value::Object(map) => map.iter().any(|(k, v)| k.contains('\0') || has_nul(v)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use serde_json::json;

    fn verdict(manifest: serde_json::Value) -> std::result::Result<(), String> {
        check_words(&serde_json::from_value(manifest).unwrap())
    }

    #[test]
    fn a_self_description_that_could_not_be_stored_or_honoured_is_refused() {
        assert_eq!(verdict(json!({"description": "ok", "retry": {"max_attempts": 5}})), Ok(()));
        for bad in [
            json!({"description": "a\u{0}b"}),
            json!({"input_schema": {"title": "\u{0}"}}),
            json!({"input_schema": {"\u{0}": 1}}),
            json!({"limits": {"timeout_ms": 0}}),
            json!({"retry": {"max_attempts": 0}}),
            json!({"retry": {"tries": 3}}),
            json!({"retry": 3}),
        ] {
            assert!(verdict(bad.clone()).is_err(), "{bad}");
        }
    }
}
