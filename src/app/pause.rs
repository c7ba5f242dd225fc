//! Pausing and resuming a tenant, a task or a tag.

use crate::app::{App, Error, Result};
use crate::domain::announced::Announced;
use crate::domain::ids::{PauseId, TenantId};
use crate::store::pause::{Pause, Target};

impl App {
    /// Pause something: what waits of it waits on, what comes waits too, what runs goes on. True: it was not paused.
    ///
    /// # Errors
    /// No such task.
    pub async fn pause(&self, tenant: TenantId, target: Target) -> Result<(Pause, bool)> {
        let mut connection = self.tenant(tenant).await?;
        let Some((id, new)) = connection.pause(&target).await? else {
            let name = if let Target::Task(name) = target { name } else { String::new() };
            return Err(Error::TaskNotFound(name));
        };
        let found = connection.pauses().await?.into_iter().find(|pause| pause.id == id);
        found.map(|pause| (pause, new)).ok_or(Error::PauseNotFound(id))
    }

    /// Every pause of this tenant, oldest first.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn pauses(&self, tenant: TenantId) -> Result<Vec<Pause>> {
        Ok(self.tenant(tenant).await?.pauses().await?)
    }

    /// End a pause. What waited is claimable within a second or so.
    ///
    /// # Errors
    /// It is not this tenant's.
    pub async fn resume(&self, tenant: TenantId, id: PauseId) -> Result<()> {
        if !self.tenant(tenant).await?.unpause(id).await? {
            return Err(Error::PauseNotFound(id));
        }
        self.inner.signals.ready.announce(&Announced::Any);
        Ok(())
    }
}
