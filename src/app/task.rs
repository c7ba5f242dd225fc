//! Reading, changing and deleting tasks; reading versions and their modules.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use sandbar_host::ModuleHash;
use sandbar_host::capability::call::{MAX_CONFIG, MAX_CONFIG_BYTES};
use sandbar_host::egress::client::forbidden;
use sandbar_host::egress::grant::HttpGrant;
use sandbar_host::limits::Limits;
use sandbar_host::manifest::MAX_NAMED_GRANTS;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::app::policy::{self, PartialRetry};
use crate::app::{App, Error, FieldError, Result, audit, secret};
use crate::domain::ids::TenantId;
use crate::domain::names::TaskName;
use crate::domain::retry::RetryPolicy;
use crate::store::grant::Grants;
use crate::store::task::{Change, Deleted, Setting, Stopped, TaskChange, TaskRow, VersionRow, VersionState};

/// Bytes of a task's description.
const MAX_DESCRIPTION: usize = 4 << 10;
/// Characters of a header's name.
const MAX_HEADER: usize = 64;
/// Bytes of a key of a task's configuration.
const MAX_CONFIG_KEY: usize = 128;
/// Invocations that one statement of a deletion cancels.
const CANCELS_PER_STATEMENT: i32 = 1_000;
/// Bytes of a module read from the database at once.
const MODULE_PIECE: i32 = 1 << 20;

impl App {
    /// One task.
    ///
    /// # Errors
    /// It is not this tenant's.
    pub async fn task(&self, tenant: TenantId, name: &TaskName) -> Result<TaskRow> {
        let found = self.tenant(tenant).await?.task_get(name).await?;
        self.shown(tenant, found.ok_or_else(|| Error::TaskNotFound(name.as_str().to_owned()))?).await
    }

    /// A task as its people see it.
    async fn shown(&self, tenant: TenantId, mut row: TaskRow) -> Result<TaskRow> {
        self.open_config(tenant, std::slice::from_mut(&mut row)).await?;
        Ok(row)
    }

    /// Change a task. Fields of `limits` and `retry` that are null go back to what the module says.
    ///
    /// # Errors
    /// There is no such task or version of this tenant; the version cannot be run; a value is out of range.
    pub async fn change_task(
        &self,
        tenant: TenantId,
        name: &TaskName,
        change: &TaskChange,
    ) -> Result<TaskRow> {
        check(change).map_err(|error| Error::InvalidFields(vec![error]))?;
        if let Change::Set(number) = change.version {
            let task = || name.as_str().to_owned();
            match self.version(tenant, name, number).await?.state {
                VersionState::Ready => {}
                VersionState::Compiling => {
                    return Err(Error::VersionNotReady { task: task(), version: number });
                }
                VersionState::Rejected(rejection) => {
                    return Err(Error::VersionRejected { task: task(), version: number, rejection });
                }
            }
        }
        let mut connection = self.tenant(tenant).await?;
        let unknown = || Error::TaskNotFound(name.as_str().to_owned());
        let before = connection.task_get(name).await?.ok_or_else(unknown)?;
        let mut change = change.clone();
        let mut sealed = false;
        if let Change::Set(patch) = &change.config {
            whole_config(&before, patch).map_err(|error| Error::InvalidFields(vec![error]))?;
            // No connection is held while another is asked for.
            drop(connection);
            sealed = self.seal_config(tenant, before.id, &mut change.config).await?;
            connection = self.tenant(tenant).await?;
        }
        let changed = connection.task_change(before.id, &change).await?;
        // Whatever this server remembers of the task is out of date.
        self.inner.signals.version_changed();
        let changed = changed.ok_or_else(unknown)?;
        audit::changed(settings(&before, sealed), settings(&changed, sealed));
        drop(connection);
        self.shown(tenant, changed).await
    }

    /// Delete a task; with `cancel`, cancel its open invocations first. What ended stays readable.
    ///
    /// # Errors
    /// There is no such task of this tenant; it has open invocations and they are not to be cancelled.
    pub async fn delete_task(&self, tenant: TenantId, name: &TaskName, cancel: bool) -> Result<()> {
        let mut connection = self.tenant(tenant).await?;
        let before = connection.task_get(name).await?;
        loop {
            let deleted = connection.task_delete(name, cancel, CANCELS_PER_STATEMENT).await?;
            self.inner.signals.version_changed();
            match deleted {
                Deleted::Unknown => return Err(Error::TaskNotFound(name.as_str().to_owned())),
                Deleted::InUse => return Err(Error::TaskInUse(name.as_str().to_owned())),
                Deleted::More(stopped) => self.stopped(&stopped),
                Deleted::Done(stopped) => {
                    self.stopped(&stopped);
                    // What is left behind goes with the next task that is deleted.
                    if let Err(error) = connection.kv_forget().await {
                        tracing::warn!(%tenant, task = %name, %error, "the store of a deleted task is still there");
                    }
                    audit::changed(
                        before.as_ref().map_or(Value::Null, |row| settings(row, false)),
                        Value::Null,
                    );
                    tracing::info!(%tenant, task = %name, "task deleted");
                    return Ok(());
                }
            }
        }
    }

    fn stopped(&self, stopped: &Stopped) {
        self.inner.signals.done(&stopped.ended);
        for id in &stopped.stopping {
            self.inner.signals.cancelled(*id);
        }
    }

    /// The bytes of a module, piece by piece.
    pub fn module(
        &self,
        tenant: TenantId,
        hash: ModuleHash,
    ) -> impl Stream<Item = Result<Bytes>> + Send + 'static {
        let app = self.clone();
        stream::try_unfold(0i32, move |offset| {
            let app = app.clone();
            async move {
                // No connection is held while the client reads.
                let piece = app.tenant(tenant).await?.module_piece(&hash, offset, MODULE_PIECE).await?;
                let piece =
                    piece.ok_or_else(|| Error::Internal(anyhow::anyhow!("module {hash} is not stored")))?;
                if piece.is_empty() {
                    return Ok(None);
                }
                let next = offset.saturating_add(i32::try_from(piece.len()).unwrap_or(i32::MAX));
                Ok(Some((Bytes::from(piece), next)))
            }
        })
    }

    /// Tasks in the order of their names, after the name `after`; and whether there are more.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn tasks(
        &self,
        tenant: TenantId,
        after: Option<&TaskName>,
        limit: u16,
    ) -> Result<(Vec<TaskRow>, bool)> {
        let rows = self
            .tenant(tenant)
            .await?
            .task_list(after.map_or("", TaskName::as_str), i64::from(limit) + 1)
            .await?;
        let (mut rows, more) = page(rows, limit);
        self.open_config(tenant, &mut rows).await?;
        Ok((rows, more))
    }

    /// One version.
    ///
    /// # Errors
    /// There is no such task or version of this tenant.
    pub async fn version(&self, tenant: TenantId, task: &TaskName, version: i32) -> Result<VersionRow> {
        let resolved = self
            .tenant(tenant)
            .await?
            .task_resolve(task, Some(version))
            .await?
            .ok_or_else(|| Error::TaskNotFound(task.as_str().to_owned()))?;
        resolved.version.ok_or_else(|| Error::VersionNotFound { task: task.as_str().to_owned(), version })
    }

    /// Take a version out of quarantine, if it is there.
    ///
    /// # Errors
    /// There is no such task or version of this tenant.
    pub async fn version_release(
        &self,
        tenant: TenantId,
        task: &TaskName,
        version: i32,
    ) -> Result<VersionRow> {
        let mut connection = self.tenant(tenant).await?;
        let found =
            connection.task_get(task).await?.ok_or_else(|| Error::TaskNotFound(task.as_str().to_owned()))?;
        if connection.version_release(found.id, version).await? {
            tracing::warn!(%tenant, %task, version, "released from quarantine");
        }
        drop(connection);
        self.version(tenant, task, version).await
    }

    /// Versions of a task, newest first, below the number `before`; and whether there are more.
    ///
    /// # Errors
    /// There is no such task of this tenant.
    pub async fn versions(
        &self,
        tenant: TenantId,
        task: &TaskName,
        before: Option<i32>,
        limit: u16,
    ) -> Result<(Vec<VersionRow>, bool)> {
        let mut connection = self.tenant(tenant).await?;
        let found =
            connection.task_get(task).await?.ok_or_else(|| Error::TaskNotFound(task.as_str().to_owned()))?;
        let rows =
            connection.version_list(found.id, before.unwrap_or(i32::MAX), i64::from(limit) + 1).await?;
        Ok(page(rows, limit))
    }
}

/// What people set of a task, for the audit log. Of configuration that is sealed, or is about to be, it shows which key
/// has another text by now, and no text.
fn settings(task: &TaskRow, sealed: bool) -> Value {
    let text = |setting: &Setting| match setting {
        Setting::Plain(_) if sealed => json!("not shown"),
        Setting::Plain(text) => json!(text),
        Setting::Sealed { data, .. } => {
            let digest = Sha256::digest(data.as_bytes());
            let mark: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            json!({ "sealed": mark })
        }
    };
    let config: Map<String, Value> =
        task.config.iter().map(|(key, value)| (key.clone(), text(value))).collect();
    json!({
        "name": task.name, "description": task.description, "active": task.active, "version": task.pinned_version,
        "limits": task.limits, "retry": task.retry, "grants": task.grants,
        "config": config,
    })
}

/// Everything that can be said without the database. Ranges hold field by field, so what is merged holds them too.
fn check(change: &TaskChange) -> std::result::Result<(), FieldError> {
    if let Change::Set(text) = &change.description {
        if text.len() > MAX_DESCRIPTION {
            return Err(FieldError::new("/description", "may have at most 4096 bytes"));
        }
        if text.contains('\0') {
            return Err(FieldError::new("/description", "may not contain NUL"));
        }
    }
    if let Change::Set(patch) = &change.limits {
        let wanted = serde_json::from_value(patch.clone())
            .map_err(|error| FieldError::new("/limits", error.to_string()))?;
        policy::limits(Limits::default(), &wanted)?;
    }
    if let Change::Set(patch) = &change.grants {
        let wanted: Grants = serde_json::from_value(without_nulls(patch))
            .map_err(|error| FieldError::new("/grants", error.to_string()))?;
        grants(&wanted)?;
    }
    if let Change::Set(patch) = &change.config {
        config(patch)?;
    }
    if let Change::Set(patch) = &change.retry {
        let wanted: PartialRetry = serde_json::from_value(patch.clone())
            .map_err(|error| FieldError::new("/retry", error.to_string()))?;
        policy::retry(&RetryPolicy::default(), &wanted)?;
    }
    Ok(())
}

/// What a patch sets, without what it takes away.
fn without_nulls(patch: &Value) -> Value {
    match patch {
        Value::Object(fields) => {
            fields.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect()
        }
        other => other.clone(),
    }
}

fn grants(wanted: &Grants) -> std::result::Result<(), FieldError> {
    if wanted.http.len() > MAX_NAMED_GRANTS {
        return Err(FieldError::new("/grants/http", format!("may have at most {MAX_NAMED_GRANTS} entries")));
    }
    for (place, text) in wanted.http.iter().enumerate() {
        HttpGrant::parse(text)
            .map_err(|error| FieldError::new(format!("/grants/http/{place}"), error.to_string()))?;
    }
    for (what, len) in [
        ("invoke", wanted.invoke.len()),
        ("secrets", wanted.secrets.len()),
        ("secret_headers", wanted.secret_headers.len()),
    ] {
        if len > MAX_NAMED_GRANTS {
            let words = format!("may have at most {MAX_NAMED_GRANTS} entries");
            return Err(FieldError::new(format!("/grants/{what}"), words));
        }
    }
    const NAME: &str = "a secret's name has 1 to 64 letters, digits and `_`, and no digit first";
    for (place, name) in wanted.invoke.iter().enumerate() {
        if let Err(error) = TaskName::try_from(name.clone()) {
            return Err(FieldError::new(format!("/grants/invoke/{place}"), error.to_string()));
        }
    }
    for (place, name) in wanted.secrets.iter().enumerate() {
        if !secret::is_name(name) {
            return Err(FieldError::new(format!("/grants/secrets/{place}"), NAME));
        }
    }
    for (place, grant) in wanted.secret_headers.iter().enumerate() {
        let at = |field: &str| format!("/grants/secret_headers/{place}/{field}");
        if !secret::is_name(&grant.secret) {
            return Err(FieldError::new(at("secret"), NAME));
        }
        if !header(&grant.header) {
            let words = "must be the name of a header, in lower case, that a request may set";
            return Err(FieldError::new(at("header"), words));
        }
        HttpGrant::parse(&grant.host).map_err(|error| FieldError::new(at("host"), error.to_string()))?;
    }
    Ok(())
}

fn header(name: &str) -> bool {
    let token = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"!#$%&'*+-.^_`|~".contains(&b);
    (1..=MAX_HEADER).contains(&name.len()) && name.bytes().all(token) && !forbidden(name)
}

/// What a patch sets, key by key.
fn config(patch: &Value) -> std::result::Result<(), FieldError> {
    for (key, value) in patch.as_object().into_iter().flatten() {
        let at = || format!("/config/{}", key.replace('~', "~0").replace('/', "~1"));
        if key.is_empty() || key.len() > MAX_CONFIG_KEY || key.contains('\0') {
            let words = format!("a key has 1 to {MAX_CONFIG_KEY} bytes and no NUL");
            return Err(FieldError::new("/config", words));
        }
        if value.as_str().is_some_and(|text| text.contains('\0')) {
            return Err(FieldError::new(at(), "may not contain NUL"));
        }
    }
    Ok(())
}

/// What will be there after a patch. Two patches at once may pass the bounds together; the table has a last one.
fn whole_config(before: &TaskRow, patch: &Value) -> std::result::Result<(), FieldError> {
    let mut config: BTreeMap<&String, usize> =
        before.config.iter().map(|(key, value)| (key, value.size())).collect();
    for (key, value) in patch.as_object().into_iter().flatten() {
        match value.as_str() {
            Some(text) => _ = config.insert(key, text.len()),
            None => _ = config.remove(key),
        }
    }
    let bytes: usize = config.iter().map(|(key, size)| key.len() + size).sum();
    if config.len() > MAX_CONFIG || bytes > MAX_CONFIG_BYTES {
        let words = format!("may have at most {MAX_CONFIG} keys and {MAX_CONFIG_BYTES} bytes in all");
        return Err(FieldError::new("/config", words));
    }
    Ok(())
}

/// A page of at most `limit` from one row more than that, and whether that row was there.
pub(super) fn page<T>(mut rows: Vec<T>, limit: u16) -> (Vec<T>, bool) {
    let more = rows.len() > usize::from(limit);
    rows.truncate(usize::from(limit));
    (rows, more)
}
