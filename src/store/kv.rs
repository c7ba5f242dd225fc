//! Key-value stores of tasks, for attempts that run: each call is one statement, which looks by itself whether the attempt
//! is still this worker's and its task has the grant. The functions stand in `migrations/0022_capabilities.sql` and
//! `0034_sealed_values.sql`. Never opens what is sealed.

use std::collections::HashMap;

use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{Postgres, Row};

use crate::domain::ids::WorkerId;
use crate::store::queue::Claim;
use crate::store::{Error, Result, TenantConn, WorkerStore};

/// An attempt as its worker names it.
#[derive(Debug, Clone, Copy)]
pub struct AttemptName {
    /// Who runs it.
    pub worker: WorkerId,
    /// In which epoch.
    pub epoch: i64,
    /// What was claimed.
    pub claim: Claim,
}

/// What became of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome<T> {
    /// Done.
    Done(T),
    /// The attempt is not this worker's any more, or has ended. Nothing was done.
    Lost,
    /// Its task has no grant. Nothing was done.
    Denied,
    /// The tenant's quota has no room. Nothing was written.
    Full,
    /// The values have too many bytes together.
    Large,
    /// What is there is no number.
    NotANumber,
    /// The sum is too large or too small for a number.
    OutOfRange,
    /// What is there is sealed: whoever asks has to open it, and to add by itself.
    Sealed,
}

/// A value with its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The value; empty when only versions were asked for.
    pub value: Vec<u8>,
    /// The version, greater than 0.
    pub version: i64,
    /// The data key that seals it, by its fingerprint; `None`: it is in the clear.
    pub sealed: Option<String>,
}

/// What a swap came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Swapped {
    /// Written.
    Done,
    /// The version is another, this one; 0: the key is not there.
    Changed(i64),
}

fn outcome<T>(row: &PgRow, done: impl FnOnce() -> Result<T>) -> Result<Outcome<T>> {
    Ok(match row.try_get::<&str, _>("outcome")? {
        "ok" | "changed" => Outcome::Done(done()?),
        "lost" => Outcome::Lost,
        "denied" => Outcome::Denied,
        "full" => Outcome::Full,
        "large" => Outcome::Large,
        "nan" => Outcome::NotANumber,
        "range" => Outcome::OutOfRange,
        "sealed" => Outcome::Sealed,
        other => return Err(Error::Corrupt(format!("kv: {other}"))),
    })
}

impl AttemptName {
    /// As the parameters 1 to 7.
    pub(super) fn bind<'q>(self, sql: &'q str) -> Query<'q, Postgres, PgArguments> {
        sqlx::query(sql)
            .bind(self.worker)
            .bind(self.epoch)
            .bind(self.claim.lease)
            .bind(self.claim.slot)
            .bind(self.claim.tenant)
            .bind(self.claim.invocation)
            .bind(self.claim.attempt)
    }
}

/// The quota as SQL has it.
fn bigint(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

impl WorkerStore {
    /// Whether an attempt may use its task's store.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn kv_may(&self, attempt: AttemptName) -> Result<Outcome<()>> {
        Ok(match self.kv_read(attempt, &[], false, 0).await? {
            Outcome::Done(_) => Outcome::Done(()),
            Outcome::Lost => Outcome::Lost,
            _ => Outcome::Denied,
        })
    }

    /// What stands under these keys, without those that are not there; at most `max_bytes` of values.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn kv_read(
        &self,
        attempt: AttemptName,
        keys: &[String],
        values: bool,
        max_bytes: u64,
    ) -> Result<Outcome<HashMap<String, Entry>>> {
        let rows = attempt
            .bind(
                "SELECT outcome, key, value, version, sealed
                 FROM kv_values(ROW($1, $2, $3, $4, $5, $6, $7)::attempt_name, $8, $9, $10)",
            )
            .bind(keys)
            .bind(values)
            .bind(bigint(max_bytes))
            .fetch_all(&self.pool)
            .await?;
        let first = rows.first().ok_or_else(|| Error::Corrupt("kv: no outcome".to_owned()))?;
        outcome(first, || {
            rows.iter()
                .filter_map(|row| row.try_get::<Option<String>, _>("key").transpose().map(|key| (row, key)))
                .map(|(row, key)| {
                    let value = row.try_get::<Option<Vec<u8>>, _>("value")?.unwrap_or_default();
                    let (version, sealed) = (row.try_get("version")?, row.try_get("sealed")?);
                    Ok((key?, Entry { value, version, sealed }))
                })
                .collect()
        })
    }

    /// Keys behind `after`, in the order of their bytes.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn kv_list(
        &self,
        attempt: AttemptName,
        after: &str,
        limit: i32,
    ) -> Result<Outcome<Vec<String>>> {
        let row = attempt
            .bind("SELECT outcome, keys FROM kv_list(ROW($1, $2, $3, $4, $5, $6, $7)::attempt_name, $8, $9)")
            .bind(after)
            .bind(limit)
            .fetch_one(&self.pool)
            .await?;
        outcome(&row, || Ok(row.try_get("keys")?))
    }

    /// Write pairs, all or none; `None` takes a key away. `quota`: what the tenant may store if nobody says otherwise.
    /// `sealed`: the data key that seals the values, by its fingerprint.
    ///
    /// # Errors
    /// Postgres does not answer; whether something was written is not known then.
    pub async fn kv_put(
        &self,
        attempt: AttemptName,
        quota: u64,
        keys: &[&str],
        values: &[Option<Vec<u8>>],
        sealed: Option<&str>,
    ) -> Result<Outcome<()>> {
        let row = attempt
            .bind("SELECT kv_put(ROW($1, $2, $3, $4, $5, $6, $7)::attempt_name, $8, $9, $10, $11) AS outcome")
            .bind(bigint(quota))
            .bind(keys)
            .bind(values)
            .bind(sealed)
            .fetch_one(&self.pool)
            .await?;
        outcome(&row, || Ok(()))
    }

    /// Write a value if the version of what is there is this one; 0: nothing is.
    ///
    /// # Errors
    /// Postgres does not answer; whether something was written is not known then.
    pub async fn kv_swap(
        &self,
        attempt: AttemptName,
        quota: u64,
        key: &str,
        version: i64,
        (value, sealed): (&[u8], Option<&str>),
    ) -> Result<Outcome<Swapped>> {
        let row = attempt
            .bind(
                "SELECT outcome, version
                 FROM kv_swap(ROW($1, $2, $3, $4, $5, $6, $7)::attempt_name, $8, $9, $10, $11, $12)",
            )
            .bind(bigint(quota))
            .bind(key)
            .bind(version)
            .bind(value)
            .bind(sealed)
            .fetch_one(&self.pool)
            .await?;
        outcome(&row, || {
            Ok(match row.try_get::<&str, _>("outcome")? {
                "changed" => Swapped::Changed(row.try_get("version")?),
                _ => Swapped::Done,
            })
        })
    }

    /// Add to the number under a key; returns the sum.
    ///
    /// # Errors
    /// Postgres does not answer; whether it was added is not known then.
    pub async fn kv_increment(
        &self,
        attempt: AttemptName,
        quota: u64,
        key: &str,
        delta: i64,
    ) -> Result<Outcome<i64>> {
        let row = attempt
            .bind(
                "SELECT outcome, total
                 FROM kv_increment(ROW($1, $2, $3, $4, $5, $6, $7)::attempt_name, $8, $9, $10)",
            )
            .bind(bigint(quota))
            .bind(key)
            .bind(delta)
            .fetch_one(&self.pool)
            .await?;
        outcome(&row, || Ok(row.try_get("total")?))
    }
}

impl TenantConn {
    /// Take away the stores of this tenant's deleted tasks. Returns how many keys went.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn kv_forget(&mut self) -> Result<i64> {
        Ok(sqlx::query_scalar("SELECT kv_forget()").fetch_one(&mut **self).await?)
    }

    /// Bytes that this tenant's stores take, as its quota counts them.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn kv_bytes(&mut self) -> Result<u64> {
        let tenant = self.tenant();
        let bytes: Option<i64> = sqlx::query_scalar("SELECT bytes FROM kv_usage WHERE tenant_id = $1")
            .bind(tenant)
            .fetch_optional(&mut **self)
            .await?;
        Ok(u64::try_from(bytes.unwrap_or(0)).unwrap_or(0))
    }
}
