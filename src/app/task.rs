//! Reading tasks and versions.

use crate::app::{App, Error, Result};
use crate::domain::ids::TenantId;
use crate::domain::names::TaskName;
use crate::store::task::{TaskRow, VersionRow};

impl App {
    /// One task.
    ///
    /// # Errors
    /// It is not this tenant's.
    pub async fn task(&self, tenant: TenantId, name: &TaskName) -> Result<TaskRow> {
        let found = self.tenant(tenant).await?.task_get(name).await?;
        found.ok_or_else(|| Error::TaskNotFound(name.as_str().to_owned()))
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
        Ok(page(rows, limit))
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

/// A page of at most `limit` from one row more than that, and whether that row was there.
pub(super) fn page<T>(mut rows: Vec<T>, limit: u16) -> (Vec<T>, bool) {
    let more = rows.len() > usize::from(limit);
    rows.truncate(usize::from(limit));
    (rows, more)
}
