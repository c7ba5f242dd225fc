//! Reading what attempts left.

use crate::app::sealed::Part;
use crate::app::{App, Error, Result};
use crate::domain::ids::{InvocationId, TenantId};
use crate::store::artifact::ArtifactRow;

impl App {
    /// What the last attempt of an invocation left.
    ///
    /// # Errors
    /// It is not this tenant's.
    pub async fn artifacts(&self, tenant: TenantId, id: InvocationId) -> Result<Vec<ArtifactRow>> {
        let mut connection = self.tenant(tenant).await?;
        let rows = connection.artifact_list(id).await?;
        if rows.is_empty() {
            let kept = connection.invocation_kept(id).await?.ok_or(Error::InvocationNotFound(id))?;
            if kept.erased_at.is_some() {
                return Err(Error::PayloadsErased(id));
            }
        }
        Ok(rows)
    }

    /// One of them.
    ///
    /// # Errors
    /// There is no such invocation of this tenant, or no such file.
    pub async fn artifact(&self, tenant: TenantId, id: InvocationId, path: &str) -> Result<Vec<u8>> {
        // A name that no file can have, and that Postgres would not take.
        let found = match path.contains('\0') {
            true => None,
            false => self.tenant(tenant).await?.artifact_get(id, path).await?,
        };
        match found {
            Some((bytes, attempt, sealed)) => {
                self.open_part(tenant, id, sealed.as_deref(), attempt, Part::Artifact(path), bytes).await
            }
            None => {
                self.artifacts(tenant, id).await?;
                Err(Error::ArtifactNotFound(path.to_owned()))
            }
        }
    }
}
