//! The bill: ranges and pages of the ledger. Owns their bounds.

use chrono::{DateTime, DurationRound, TimeDelta, Utc};

use crate::app::{App, Result};
use crate::domain::ids::TenantId;
use crate::store::usage::{Period, Query, UsageRow};

/// Rows of one answer.
pub const MAX_ROWS: u32 = 10_000;
/// Longest range.
pub const MAX_RANGE: TimeDelta = TimeDelta::days(400);

/// One answer.
#[derive(Debug)]
pub struct Bill {
    /// What was asked for, in full hours.
    pub query: Query,
    /// The sums.
    pub rows: Vec<UsageRow>,
    /// Where the next answer begins.
    pub next: Option<DateTime<Utc>>,
}

/// The full hour that a time is in.
#[must_use]
pub fn hour(time: DateTime<Utc>) -> DateTime<Utc> {
    time.duration_trunc(TimeDelta::hours(1)).unwrap_or(time)
}

impl App {
    /// What attempts of this tenant cost. Of a longer answer, as many whole hours or days as fit.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn usage(&self, tenant: TenantId, query: Query) -> Result<Bill> {
        let wanted = Query { limit: MAX_ROWS + 1, ..query };
        let mut rows = self.tenant(tenant).await?.usage(&wanted).await?;
        let mut next = None;
        if rows.len() > MAX_ROWS as usize {
            next = rows
                .last()
                .and_then(|row| row.at)
                .filter(|at| query.period != Period::Whole && *at > query.from);
            match next {
                Some(at) => rows.retain(|row| row.at.is_some_and(|row| row < at)),
                // More tasks than anybody has: the first ones.
                None => rows.truncate(MAX_ROWS as usize),
            }
        }
        Ok(Bill { query, rows, next })
    }
}
