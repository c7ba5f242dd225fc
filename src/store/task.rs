//! Tasks, versions and module bytes as rows. Owns what may follow what in a version's life (compiling, then ready or
//! rejected, for good); never looks into a module.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use sandbar_host::inspect::Rejection;
use sandbar_host::limits::PartialLimits;
use sandbar_host::manifest::Manifest;
use sandbar_host::{ModuleHash, ModuleKind};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{Acquire, Row};

use crate::domain::ids::{InvocationId, TaskId, TenantId};
use crate::domain::names::TaskName;
use crate::domain::retry::PartialRetry;
use crate::store::grant::Grants;
use crate::store::queue::CANCEL_CHANNEL;
use crate::store::{Error, Result, TenantConn, WorkerStore};

/// First half of the advisory locks under which a tenant's uploads are counted; the second is its tenant's.
const LOCK_UPLOADS: i32 = 7_260_002;
/// Bytes that sealing adds to a text of the configuration.
pub const SEALED_BYTES: usize = 45;

/// A text of a task's configuration, as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Setting {
    /// In the clear.
    Plain(String),
    /// Sealed.
    Sealed {
        /// Fingerprint of the data key.
        sealed: String,
        /// What it is, as base64.
        data: String,
    },
}

impl Setting {
    /// Bytes of the text in the clear.
    #[must_use]
    pub fn size(&self) -> usize {
        match self {
            Self::Plain(text) => text.len(),
            Self::Sealed { data, .. } => {
                let padding = data.bytes().rev().take_while(|byte| *byte == b'=').count();
                (data.len() / 4 * 3).saturating_sub(padding + SEALED_BYTES)
            }
        }
    }
}

/// A task as its row has it.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskRow {
    /// Its id.
    pub id: TaskId,
    /// Its name, unique in the tenant.
    pub name: String,
    /// What its newest module says about itself, or what a person wrote in its place.
    pub description: Option<String>,
    /// The version that plain invocations use: the pinned one, or the newest that is ready.
    pub current_version: Option<i32>,
    /// The version that somebody pinned.
    pub pinned_version: Option<i32>,
    /// False: nothing new is accepted.
    pub active: bool,
    /// Limits of its invocations, over the module's own.
    pub limits: PartialLimits,
    /// Retries of its invocations, over the module's own.
    pub retry: PartialRetry,
    /// What it has been given.
    pub grants: Grants,
    /// Texts that people have set on it.
    pub config: BTreeMap<String, Setting>,
    /// First upload.
    pub created_at: DateTime<Utc>,
    /// Last change of this row.
    pub updated_at: DateTime<Utc>,
}

/// Where a version stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VersionState {
    /// Uploaded and looked at; not yet compiled.
    Compiling,
    /// May be invoked.
    Ready,
    /// Does not compile, for good.
    Rejected(Rejection),
}

impl VersionState {
    /// The word used in the API and in the database.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Compiling => "compiling",
            Self::Ready => "ready",
            Self::Rejected(_) => "rejected",
        }
    }
}

/// What a version is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A module, by the door it comes through.
    Module(ModuleKind),
    /// No module: a request that the worker makes. Its bytes describe it (`app::http`).
    Http,
}

impl Kind {
    /// The word used in the API and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Module(kind) => kind.as_str(),
            Self::Http => "http",
        }
    }
}

/// One uploaded module of a task.
#[derive(Debug, Clone)]
pub struct VersionRow {
    /// From 1, without gaps.
    pub number: i32,
    /// Hash of the uploaded bytes.
    pub hash: ModuleHash,
    /// Size of the uploaded bytes.
    pub size_bytes: i64,
    /// What it is.
    pub kind: Kind,
    /// Where it stands.
    pub state: VersionState,
    /// What the module says about itself.
    pub manifest: Option<Manifest>,
    /// When it was uploaded.
    pub created_at: DateTime<Utc>,
    /// Since when, and why, nothing of it starts: it was running when two cells died.
    pub quarantine: Option<(DateTime<Utc>, String)>,
}

/// What is to become of one value of a task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Change<T> {
    /// It stays as it is.
    #[default]
    Keep,
    /// It goes back to its default.
    Reset,
    /// It becomes this. What has fields of its own keeps those that are not named.
    Set(T),
}

impl<T> Change<T> {
    /// Whether anything changes, and to what.
    fn parts(&self) -> (bool, Option<&T>) {
        match self {
            Self::Keep => (false, None),
            Self::Reset => (true, None),
            Self::Set(value) => (true, Some(value)),
        }
    }
}

/// A change of a task, checked.
#[derive(Debug, Clone, Default)]
pub struct TaskChange {
    /// For people. Reset: what the current module says about itself.
    pub description: Change<String>,
    /// Limits as a merge patch: a field that is null goes.
    pub limits: Change<serde_json::Value>,
    /// Retries as a merge patch: a field that is null goes.
    pub retry: Change<serde_json::Value>,
    /// Reset: active.
    pub active: Change<bool>,
    /// Grants as a merge patch: a kind that is null goes.
    pub grants: Change<serde_json::Value>,
    /// Texts as a merge patch: a key that is null goes.
    pub config: Change<serde_json::Value>,
    /// The pinned version. Reset: none.
    pub version: Change<i32>,
}

/// How far the deletion of a task came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deleted {
    /// There is no such task.
    Unknown,
    /// It has open invocations, and they were not to be cancelled.
    InUse,
    /// Some were cancelled; there may be more.
    More(Stopped),
    /// It is gone.
    Done(Stopped),
}

/// Invocations that a deletion cancelled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stopped {
    /// These waited, and have ended.
    pub ended: Vec<InvocationId>,
    /// These run, and are asked to stop.
    pub stopping: Vec<InvocationId>,
}

/// A task together with one of its versions.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The task.
    pub task: TaskRow,
    /// The version asked for, or the current one, or (when none is ready) the newest.
    pub version: Option<VersionRow>,
}

/// A module that was looked at and may become a version.
#[derive(Debug)]
pub struct NewVersion<'a> {
    /// Name of the task, created if need be.
    pub task: &'a TaskName,
    /// Hash of `bytes`.
    pub hash: ModuleHash,
    /// The module.
    pub bytes: &'a [u8],
    /// What it is: only modules are compiled.
    pub kind: Kind,
    /// Its own words.
    pub manifest: Option<&'a Manifest>,
    /// How many of the tenant may wait for their compilation, this one included.
    pub max_compiling: u32,
}

/// What became of bytes that were to be a version.
#[derive(Debug, Clone)]
pub enum Created {
    /// This version, which is new.
    New(VersionRow),
    /// This version, which they were already.
    Known(VersionRow),
    /// Nothing: as many as may wait for their compilation.
    Full,
}

/// Modules in quarantine that workers keep in mind: the latest. Older ones are refused at the door all the same.
const MAX_QUARANTINED: i64 = 10_000;

/// Cancellations of one notifying statement.
const CANCEL_NOTIFICATIONS: usize = 500;

const TASK_COLUMNS: &str =
    "t.task_id, t.name, t.description, COALESCE(t.pinned_version, t.current_version) AS current_version,
  t.pinned_version, t.active, t.limits, t.retry, t.grants, t.config, t.created_at AS task_created_at, t.updated_at";

const VERSION_COLUMNS: &str =
    "v.number, v.sha256, v.size_bytes, v.kind, v.state, v.rejection, v.manifest, v.created_at,
  v.quarantined_at, v.quarantine_reason";

fn corrupt(what: &str) -> Error {
    Error::Corrupt(what.to_owned())
}

pub(super) fn hash(bytes: Vec<u8>) -> Result<[u8; 32]> {
    bytes.try_into().map_err(|_| corrupt("a module hash is not 32 bytes"))
}

fn kind(word: &str) -> Result<Kind> {
    [ModuleKind::Task, ModuleKind::CommandP1, ModuleKind::CommandP2]
        .into_iter()
        .map(Kind::Module)
        .chain([Kind::Http])
        .find(|kind| kind.as_str() == word)
        .ok_or_else(|| corrupt("unknown kind of version"))
}

fn version(row: &PgRow) -> Result<VersionRow> {
    let state = match row.try_get::<&str, _>("state")? {
        "compiling" => VersionState::Compiling,
        "ready" => VersionState::Ready,
        "rejected" => VersionState::Rejected(
            row.try_get::<Option<Json<Rejection>>, _>("rejection")?
                .ok_or_else(|| corrupt("a rejected version without its rejection"))?
                .0,
        ),
        _ => return Err(corrupt("unknown state of a version")),
    };
    Ok(VersionRow {
        number: row.try_get("number")?,
        hash: ModuleHash::from_bytes(hash(row.try_get("sha256")?)?),
        size_bytes: row.try_get("size_bytes")?,
        kind: kind(row.try_get("kind")?)?,
        state,
        manifest: row.try_get::<Option<Json<Manifest>>, _>("manifest")?.map(|json| json.0),
        created_at: row.try_get("created_at")?,
        quarantine: row
            .try_get::<Option<DateTime<Utc>>, _>("quarantined_at")?
            .map(|since| {
                Ok::<_, Error>((
                    since,
                    row.try_get::<Option<String>, _>("quarantine_reason")?.unwrap_or_default(),
                ))
            })
            .transpose()?,
    })
}

fn task(row: &PgRow) -> Result<TaskRow> {
    Ok(TaskRow {
        id: row.try_get("task_id")?,
        name: row.try_get("name")?,
        description: row.try_get("description")?,
        current_version: row.try_get("current_version")?,
        pinned_version: row.try_get("pinned_version")?,
        active: row.try_get("active")?,
        limits: row.try_get::<Option<Json<_>>, _>("limits")?.map(|json| json.0).unwrap_or_default(),
        retry: row.try_get::<Option<Json<_>>, _>("retry")?.map(|json| json.0).unwrap_or_default(),
        grants: row.try_get::<Option<Json<_>>, _>("grants")?.map(|json| json.0).unwrap_or_default(),
        config: row.try_get::<Option<Json<_>>, _>("config")?.map(|json| json.0).unwrap_or_default(),
        created_at: row.try_get("task_created_at")?,
        updated_at: row.try_get("updated_at")?,
    })
}

impl TenantConn {
    /// Let attempts of this version's module start again. False: it was not in quarantine, or there is no such version.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn version_release(&mut self, task: TaskId, number: i32) -> Result<bool> {
        let tenant = self.tenant();
        let done = sqlx::query(
            "UPDATE versions SET quarantined_at = NULL, quarantine_reason = NULL
             WHERE tenant_id = $1 AND quarantined_at IS NOT NULL AND sha256 =
               (SELECT v.sha256 FROM versions v WHERE v.tenant_id = $1 AND v.task_id = $2 AND v.number = $3)",
        )
        .bind(tenant)
        .bind(task)
        .bind(number)
        .execute(&mut **self)
        .await?;
        Ok(done.rows_affected() > 0)
    }

    /// One task by name.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn task_get(&mut self, name: &TaskName) -> Result<Option<TaskRow>> {
        let tenant = self.tenant();
        sqlx::query(&format!(
            "SELECT {TASK_COLUMNS} FROM tasks t WHERE t.tenant_id = $1 AND t.name = $2 AND t.deleted_at IS NULL"
        ))
        .bind(tenant)
        .bind(name.as_str())
        .fetch_optional(&mut **self)
        .await?
        .as_ref()
        .map(task)
        .transpose()
    }

    /// Tasks in the order of their names, after `after`; at most `limit`.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn task_list(&mut self, after: &str, limit: i64) -> Result<Vec<TaskRow>> {
        let tenant = self.tenant();
        sqlx::query(&format!(
            "SELECT {TASK_COLUMNS} FROM tasks t WHERE t.tenant_id = $1 AND t.name > $2 AND t.deleted_at IS NULL
             ORDER BY t.name LIMIT $3"
        ))
        .bind(tenant)
        .bind(after)
        .bind(limit)
        .fetch_all(&mut **self)
        .await?
        .iter()
        .map(task)
        .collect()
    }

    /// A task and the version to run: `number`, or without it the current one; when no version is ready yet, the
    /// newest, so that the caller can say what it waits for. `None`: no such task.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn task_resolve(&mut self, name: &TaskName, number: Option<i32>) -> Result<Option<Resolved>> {
        let tenant = self.tenant();
        let row = sqlx::query(&format!(
            "SELECT {TASK_COLUMNS}, {VERSION_COLUMNS} FROM tasks t
             LEFT JOIN versions v ON v.tenant_id = t.tenant_id AND v.task_id = t.task_id
               AND v.number = COALESCE($3, t.pinned_version, t.current_version,
                 (SELECT max(n.number) FROM versions n WHERE n.tenant_id = t.tenant_id AND n.task_id = t.task_id))
             WHERE t.tenant_id = $1 AND t.name = $2 AND t.deleted_at IS NULL"
        ))
        .bind(tenant)
        .bind(name.as_str())
        .bind(number)
        .fetch_optional(&mut **self)
        .await?;
        let Some(row) = row else { return Ok(None) };
        let found: Option<i32> = row.try_get("number")?;
        Ok(Some(Resolved { task: task(&row)?, version: found.map(|_| version(&row)).transpose()? }))
    }

    /// The version of a task with these bytes.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn version_by_hash(
        &mut self,
        name: &TaskName,
        hash: &ModuleHash,
    ) -> Result<Option<VersionRow>> {
        let tenant = self.tenant();
        sqlx::query(&format!(
            "SELECT {VERSION_COLUMNS} FROM tasks t
             JOIN versions v ON v.tenant_id = t.tenant_id AND v.task_id = t.task_id AND v.sha256 = $3
             WHERE t.tenant_id = $1 AND t.name = $2 AND t.deleted_at IS NULL"
        ))
        .bind(tenant)
        .bind(name.as_str())
        .bind(hash.as_bytes().as_slice())
        .fetch_optional(&mut **self)
        .await?
        .as_ref()
        .map(version)
        .transpose()
    }

    /// Versions of a task, newest first, with numbers below `before`; at most `limit`.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn version_list(&mut self, task: TaskId, before: i32, limit: i64) -> Result<Vec<VersionRow>> {
        let tenant = self.tenant();
        sqlx::query(&format!(
            "SELECT {VERSION_COLUMNS} FROM versions v
             WHERE v.tenant_id = $1 AND v.task_id = $2 AND v.number < $3 ORDER BY v.number DESC LIMIT $4"
        ))
        .bind(tenant)
        .bind(task)
        .bind(before)
        .bind(limit)
        .fetch_all(&mut **self)
        .await?
        .iter()
        .map(version)
        .collect()
    }

    /// Make a version of a module, its task too if it is the first, in one transaction. The same bytes give the
    /// version they already have. A new module waits for its compilation; what is none is ready, and current unless a
    /// newer one is.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn version_create(&mut self, new: &NewVersion<'_>) -> Result<Created> {
        let tenant = self.tenant();
        let mut tx = self.begin().await?;
        sqlx::query(
            "INSERT INTO tasks (tenant_id, task_id, name, description) VALUES ($1, $2, $3, $4)
             ON CONFLICT (tenant_id, name) WHERE deleted_at IS NULL DO NOTHING",
        )
        .bind(tenant)
        .bind(TaskId::generate())
        .bind(new.task.as_str())
        .bind(new.manifest.and_then(|m| m.description.as_deref()))
        .execute(&mut *tx)
        .await?;
        // Two uploads to one task wait for each other here, so numbers have no gaps and bytes no second version.
        let task: TaskId = sqlx::query_scalar(
            "SELECT task_id FROM tasks WHERE tenant_id = $1 AND name = $2 AND deleted_at IS NULL FOR UPDATE",
        )
        .bind(tenant)
        .bind(new.task.as_str())
        .fetch_one(&mut *tx)
        .await?;
        let existing = sqlx::query(&format!(
            "SELECT {VERSION_COLUMNS} FROM versions v WHERE v.tenant_id = $1 AND v.task_id = $2 AND v.sha256 = $3"
        ))
        .bind(tenant)
        .bind(task)
        .bind(new.hash.as_bytes().as_slice())
        .fetch_optional(&mut *tx)
        .await?;
        if let Some(row) = existing {
            let found = version(&row)?;
            tx.commit().await?;
            return Ok(Created::Known(found));
        }
        // Another task of the tenant may have the bytes: then they need not travel again. The lock keeps them from being
        // freed before the new version is there to need them.
        let stored: Option<bool> = sqlx::query_scalar(
            "SELECT freed_at IS NULL FROM blobs WHERE tenant_id = $1 AND sha256 = $2 FOR SHARE",
        )
        .bind(tenant)
        .bind(new.hash.as_bytes().as_slice())
        .fetch_optional(&mut *tx)
        .await?;
        if stored != Some(true) {
            sqlx::query(
                "INSERT INTO blobs AS b (tenant_id, sha256, bytes) VALUES ($1, $2, $3)
                 ON CONFLICT (tenant_id, sha256) DO UPDATE SET bytes = EXCLUDED.bytes, freed_at = NULL
                 WHERE b.freed_at IS NOT NULL",
            )
            .bind(tenant)
            .bind(new.hash.as_bytes().as_slice())
            .bind(new.bytes)
            .execute(&mut *tx)
            .await?;
        }
        // A new module describes the task anew, unless a person has.
        sqlx::query(
            "UPDATE tasks SET description = $3, updated_at = clock_timestamp()
             WHERE tenant_id = $1 AND task_id = $2 AND NOT described AND $3 IS NOT NULL AND description IS DISTINCT FROM $3",
        )
        .bind(tenant)
        .bind(task)
        .bind(new.manifest.and_then(|m| m.description.as_deref()))
        .execute(&mut *tx)
        .await?;
        if new.kind != Kind::Http {
            // Uploads of one tenant follow each other from here, so none passes the bound; those of others do not wait.
            sqlx::query("SELECT pg_advisory_xact_lock($1, hashtext($2::text))")
                .bind(LOCK_UPLOADS)
                .bind(tenant)
                .execute(&mut *tx)
                .await?;
            let waiting: i64 =
                sqlx::query_scalar("SELECT own FROM compilations_waiting()").fetch_one(&mut *tx).await?;
            if waiting >= i64::from(new.max_compiling) {
                return Ok(Created::Full);
            }
        }
        let row = sqlx::query(&format!(
            "INSERT INTO versions AS v (tenant_id, task_id, number, sha256, size_bytes, kind, state, manifest)
             SELECT $1, $2, COALESCE(max(n.number), 0) + 1, $3, $4, $5, $7, $6
             FROM versions n WHERE n.tenant_id = $1 AND n.task_id = $2
             RETURNING {VERSION_COLUMNS}"
        ))
        .bind(tenant)
        .bind(task)
        .bind(new.hash.as_bytes().as_slice())
        .bind(i64::try_from(new.bytes.len()).unwrap_or(i64::MAX))
        .bind(new.kind.as_str())
        .bind(new.manifest.map(Json))
        .bind(if new.kind == Kind::Http { "ready" } else { "compiling" })
        .fetch_one(&mut *tx)
        .await?;
        let created = version(&row)?;
        if created.state == VersionState::Ready {
            sqlx::query(
                "UPDATE tasks SET current_version = GREATEST(current_version, $3), updated_at = clock_timestamp()
                 WHERE tenant_id = $1 AND task_id = $2",
            )
            .bind(tenant)
            .bind(task)
            .bind(created.number)
            .execute(&mut *tx)
            .await?;
        }
        tx.commit().await?;
        Ok(Created::New(created))
    }

    /// Change a task. `None`: no such task, or another by now.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn task_change(&mut self, id: TaskId, change: &TaskChange) -> Result<Option<TaskRow>> {
        let tenant = self.tenant();
        let (describe, description) = change.description.parts();
        let (limit, limits) = change.limits.parts();
        let (retrying, retry) = change.retry.parts();
        let (activate, active) = change.active.parts();
        let (pin, pinned) = change.version.parts();
        let (grant, grants) = change.grants.parts();
        let (configure, config) = change.config.parts();
        sqlx::query(&format!(
            "UPDATE tasks t SET updated_at = clock_timestamp(),
               described = CASE WHEN $3 THEN $4 IS NOT NULL ELSE described END,
               description = CASE WHEN NOT $3 THEN description WHEN $4 IS NOT NULL THEN $4 ELSE
                 (SELECT v.manifest ->> 'description' FROM versions v WHERE v.tenant_id = t.tenant_id
                   AND v.task_id = t.task_id AND v.manifest ->> 'description' IS NOT NULL ORDER BY v.number DESC LIMIT 1) END,
               limits = CASE WHEN NOT $5 THEN limits WHEN $6 IS NOT NULL
                 THEN NULLIF(jsonb_strip_nulls(COALESCE(limits, '{{}}') || $6), '{{}}') END,
               retry = CASE WHEN NOT $7 THEN retry WHEN $8 IS NOT NULL
                 THEN NULLIF(jsonb_strip_nulls(COALESCE(retry, '{{}}') || $8), '{{}}') END,
               active = CASE WHEN $9 THEN COALESCE($10, true) ELSE active END,
               pinned_version = CASE WHEN $11 THEN $12 ELSE pinned_version END,
               grants = CASE WHEN NOT $13 THEN grants WHEN $14 IS NOT NULL
                 THEN NULLIF(jsonb_strip_nulls(COALESCE(grants, '{{}}') || $14), '{{}}') END,
               config = CASE WHEN NOT $15 THEN config WHEN $16 IS NOT NULL
                 THEN NULLIF(jsonb_strip_nulls(COALESCE(config, '{{}}') || $16), '{{}}') END
             WHERE t.tenant_id = $1 AND t.task_id = $2 AND t.deleted_at IS NULL
             RETURNING {TASK_COLUMNS}"
        ))
        .bind(tenant)
        .bind(id)
        .bind(describe)
        .bind(description)
        .bind(limit)
        .bind(limits.map(Json))
        .bind(retrying)
        .bind(retry.map(Json))
        .bind(activate)
        .bind(active)
        .bind(pin)
        .bind(pinned)
        .bind(grant)
        .bind(grants.map(Json))
        .bind(configure)
        .bind(config.map(Json))
        .fetch_optional(&mut **self)
        .await?
        .as_ref()
        .map(task)
        .transpose()
    }

    /// Delete a task, or with `cancel` cancel up to `limit` of its open invocations and delete it when that was all.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn task_delete(&mut self, name: &TaskName, cancel: bool, limit: i32) -> Result<Deleted> {
        let row = sqlx::query("SELECT outcome, ended, stopping FROM delete_task($1, $2, $3)")
            .bind(name.as_str())
            .bind(cancel)
            .bind(limit)
            .fetch_one(&mut **self)
            .await?;
        let stopped = Stopped { ended: row.try_get("ended")?, stopping: row.try_get("stopping")? };
        for ids in stopped.stopping.chunks(CANCEL_NOTIFICATIONS) {
            // Heartbeats carry cancellations too; the notification only makes it quick.
            sqlx::query("SELECT pg_notify($1, id::text) FROM unnest($2::uuid[]) id")
                .bind(CANCEL_CHANNEL)
                .bind(ids)
                .execute(&mut **self)
                .await?;
        }
        Ok(match row.try_get::<&str, _>("outcome")? {
            "unknown" => Deleted::Unknown,
            "in-use" => Deleted::InUse,
            "more" => Deleted::More(stopped),
            _ => Deleted::Done(stopped),
        })
    }

    /// A piece of a module's bytes, from `offset` on; empty after the end. `None`: no such module of this tenant.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn module_piece(
        &mut self,
        hash: &ModuleHash,
        offset: i32,
        bytes: i32,
    ) -> Result<Option<Vec<u8>>> {
        let tenant = self.tenant();
        Ok(sqlx::query_scalar(
            "SELECT substring(bytes FROM $3 FOR $4) FROM blobs
             WHERE tenant_id = $1 AND sha256 = $2 AND freed_at IS NULL",
        )
        .bind(tenant)
        .bind(hash.as_bytes().as_slice())
        .bind(offset.saturating_add(1))
        .bind(bytes)
        .fetch_optional(&mut **self)
        .await?)
    }
}

impl WorkerStore {
    /// Empty the modules that only tasks deleted longer than `after` ago refer to; looks at up to `limit` tasks.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn free_modules(&self, after: Duration, limit: i32) -> Result<i64> {
        let mut transaction = self.begin().await?;
        let looked_at = sqlx::query_scalar("SELECT free_modules(make_interval(secs => $1), $2)")
            .bind(after.as_secs_f64())
            .bind(limit)
            .fetch_one(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(looked_at)
    }

    /// No attempt of this module of the tenant starts any more.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn version_quarantine(&self, tenant: TenantId, sha256: &[u8; 32], reason: &str) -> Result<()> {
        sqlx::query(
            "UPDATE versions SET quarantined_at = clock_timestamp(), quarantine_reason = left($3, 1024)
             WHERE tenant_id = $1 AND sha256 = $2 AND quarantined_at IS NULL",
        )
        .bind(tenant)
        .bind(sha256.as_slice())
        .bind(reason.replace('\0', "\u{fffd}"))
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Modules in quarantine, of all tenants; at most [`MAX_QUARANTINED`].
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn quarantined(&self) -> Result<Vec<(TenantId, [u8; 32])>> {
        let rows: Vec<(TenantId, Vec<u8>)> = sqlx::query_as(
            "SELECT tenant_id, sha256 FROM versions WHERE quarantined_at IS NOT NULL
             ORDER BY quarantined_at DESC LIMIT $1",
        )
        .bind(MAX_QUARANTINED)
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(|(tenant, sha256)| Ok((tenant, hash(sha256)?))).collect()
    }

    /// The bytes of a tenant's module.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn module_bytes(&self, tenant: TenantId, sha256: &[u8; 32]) -> Result<Option<Vec<u8>>> {
        Ok(sqlx::query_scalar("SELECT bytes FROM blobs WHERE tenant_id = $1 AND sha256 = $2")
            .bind(tenant)
            .bind(sha256.as_slice())
            .fetch_optional(&self.pool)
            .await?)
    }
}
