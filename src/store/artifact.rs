//! Files that attempts left, as rows. Written before the attempt's end is acknowledged and shown only when that end
//! stands, so a worker that lost its lease leaves nothing that anybody sees.

use sqlx::Row;

use crate::domain::ids::InvocationId;
use crate::store::invocation::SEALED_BYTES;
use crate::store::queue::Finished;
use crate::store::{Result, TenantConn, WorkerStore};

/// An artifact as lists show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArtifactRow {
    /// From the root of the scratch directory.
    pub path: String,
    /// Size.
    pub size_bytes: i64,
}

/// Of the attempt that ended last, unless its worker was lost before it could say how.
const LAST: &str = "a.attempt = (SELECT max(t.attempt) FROM attempts t
    WHERE t.tenant_id = a.tenant_id AND t.invocation_id = a.invocation_id)
  AND NOT EXISTS (SELECT 1 FROM attempts t WHERE t.tenant_id = a.tenant_id AND t.invocation_id = a.invocation_id
    AND t.attempt = a.attempt AND t.termination ->> 'reason' = 'lease-lost')";

impl WorkerStore {
    /// Keep what these attempts left. Repeating it changes nothing.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn artifacts_put(&self, ended: &[Finished]) -> Result<()> {
        let left = || {
            ended.iter().flat_map(|end| end.outcome.artifacts.iter().map(move |file| (&end.claimed, file)))
        };
        if left().next().is_none() {
            return Ok(());
        }
        sqlx::query(
            "INSERT INTO artifacts (tenant_id, invocation_id, attempt, path, bytes)
             SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::smallint[], $4::text[], $5::bytea[])
             ON CONFLICT DO NOTHING",
        )
        .bind(left().map(|(claimed, _)| claimed.tenant.0).collect::<Vec<_>>())
        .bind(left().map(|(claimed, _)| claimed.invocation.0).collect::<Vec<_>>())
        .bind(left().map(|(claimed, _)| claimed.attempt).collect::<Vec<_>>())
        .bind(left().map(|(_, file)| file.path.as_str()).collect::<Vec<_>>())
        .bind(left().map(|(_, file)| file.bytes.as_slice()).collect::<Vec<_>>())
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

impl TenantConn {
    /// What the last attempt of an invocation left, in the order of paths.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn artifact_list(&mut self, id: InvocationId) -> Result<Vec<ArtifactRow>> {
        let tenant = self.tenant();
        let rows = sqlx::query(&format!(
            "SELECT a.path, octet_length(a.bytes)::bigint - CASE WHEN i.spec ? 'sealed' AND octet_length(a.bytes) > 0
               THEN {SEALED_BYTES} ELSE 0 END AS size
             FROM artifacts a JOIN invocations i ON i.tenant_id = a.tenant_id AND i.invocation_id = a.invocation_id
             WHERE a.tenant_id = $1 AND a.invocation_id = $2 AND {LAST} ORDER BY a.path COLLATE \"C\""
        ))
        .bind(tenant)
        .bind(id)
        .fetch_all(&mut **self)
        .await?;
        rows.iter()
            .map(|row| Ok(ArtifactRow { path: row.try_get("path")?, size_bytes: row.try_get("size")? }))
            .collect()
    }

    /// The bytes of one of them as they are stored, with the number of its attempt and the data key that seals them.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn artifact_get(
        &mut self,
        id: InvocationId,
        path: &str,
    ) -> Result<Option<(Vec<u8>, i16, Option<String>)>> {
        let tenant = self.tenant();
        Ok(sqlx::query_as(&format!(
            "SELECT a.bytes, a.attempt, i.spec ->> 'sealed' FROM artifacts a
             JOIN invocations i ON i.tenant_id = a.tenant_id AND i.invocation_id = a.invocation_id WHERE a.tenant_id = $1 AND a.invocation_id = $2 AND a.path = $3 AND {LAST}"
        ))
        .bind(tenant)
        .bind(id)
        .bind(path)
        .fetch_optional(&mut **self)
        .await?)
    }
}
