//! What a task's name stands for, remembered for a second: one invocation after another needs the same answer.
//! What changes in this process is seen at once, what changes in another after that second.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sandbar_host::ModuleHash;
use sandbar_host::limits::PartialLimits;
use sandbar_host::manifest::Manifest;

use crate::app::policy::PartialRetry;
use crate::app::{App, Error, Result};
use crate::domain::ids::{TaskId, TenantId};
use crate::domain::names::TaskName;
use crate::store::task::{Kind, VersionState};

/// How old an answer may be.
const STALE_AFTER: Duration = Duration::from_secs(1);
/// Answers remembered.
const MAX_ENTRIES: usize = 10_000;

/// A version that may be invoked.
#[derive(Debug)]
pub struct Target {
    /// Its task.
    pub task: TaskId,
    /// Its number.
    pub number: i32,
    /// Its module.
    pub hash: ModuleHash,
    /// How it takes input.
    pub kind: Kind,
    /// What the module says about itself.
    pub manifest: Option<Arc<Manifest>>,
    /// Limits the module asks for.
    pub limits: PartialLimits,
    /// Retries the module asks for.
    pub retry: PartialRetry,
    /// Limits of the task, over the module's.
    pub task_limits: PartialLimits,
    /// Retries of the task, over the module's.
    pub task_retry: PartialRetry,
}

type Key = (TenantId, TaskName, Option<i32>);

#[derive(Debug)]
struct Entry {
    target: Arc<Target>,
    at: Instant,
    versions: u64,
}

/// Answers given lately.
#[derive(Debug, Default)]
pub struct Catalog {
    entries: Mutex<HashMap<Key, Entry>>,
}

impl Catalog {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, key: &Key, versions: u64, now: Instant) -> Option<Arc<Target>> {
        let entries = self.lock();
        let entry = entries.get(key)?;
        let fresh = entry.versions == versions && now.saturating_duration_since(entry.at) < STALE_AFTER;
        fresh.then(|| Arc::clone(&entry.target))
    }

    fn put(&self, key: Key, target: &Arc<Target>, versions: u64, now: Instant) {
        let mut entries = self.lock();
        if entries.len() >= MAX_ENTRIES && !entries.contains_key(&key) {
            entries.retain(|_, e| now.saturating_duration_since(e.at) < STALE_AFTER);
            if entries.len() >= MAX_ENTRIES {
                entries.clear();
            }
        }
        entries.insert(key, Entry { target: Arc::clone(target), at: now, versions });
    }
}

impl App {
    /// The version that an invocation of `task` runs: `version`, or the current one.
    ///
    /// # Errors
    /// There is none such, or it may not be invoked (yet).
    pub(super) async fn target(
        &self,
        tenant: TenantId,
        task: &TaskName,
        version: Option<i32>,
    ) -> Result<Arc<Target>> {
        let key = (tenant, task.clone(), version);
        let now = Instant::now();
        // Read before the question: a change in between makes the answer stale, not wrong.
        let versions = self.inner.signals.versions();
        if let Some(target) = self.inner.catalog.get(&key, versions, now) {
            return Ok(target);
        }
        let name = || task.as_str().to_owned();
        let resolved = self
            .tenant(tenant)
            .await?
            .task_resolve(task, version)
            .await?
            .ok_or_else(|| Error::TaskNotFound(name()))?;
        if !resolved.task.active {
            return Err(Error::TaskInactive(name()));
        }
        let found = match (resolved.version, version) {
            (Some(found), _) => found,
            (None, Some(version)) => {
                return Err(Error::VersionNotFound { task: name(), version });
            }
            // A task is made together with its first version.
            (None, None) => return Err(Error::TaskNotFound(name())),
        };
        match found.state {
            VersionState::Ready if found.quarantine.is_some() => {
                return Err(Error::VersionQuarantined { task: name(), version: found.number });
            }
            VersionState::Ready => {}
            VersionState::Compiling => {
                return Err(Error::VersionNotReady { task: name(), version: found.number });
            }
            VersionState::Rejected(rejection) => {
                return Err(Error::VersionRejected { task: name(), version: found.number, rejection });
            }
        }
        let limits = found.manifest.as_ref().map(|m| m.limits);
        let retry = found
            .manifest
            .as_ref()
            .and_then(|m| m.retry.clone())
            .map(serde_json::from_value)
            .transpose()
            // It was read once already, when the module came in.
            .map_err(|error| Error::Internal(error.into()))?;
        let target = Arc::new(Target {
            task: resolved.task.id,
            number: found.number,
            hash: found.hash,
            kind: found.kind,
            manifest: found.manifest.map(Arc::new),
            limits: limits.unwrap_or_default(),
            retry: retry.unwrap_or_default(),
            task_limits: resolved.task.limits,
            task_retry: resolved.task.retry,
        });
        self.inner.catalog.put(key, &target, versions, now);
        Ok(target)
    }
}
