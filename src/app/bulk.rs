//! Bulk operations: accepted here, done page by page by the duty `bulk`, within the tenant's own rights.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::StreamExt as _;

use crate::app::task::page as cut;
use crate::app::{App, Error, FieldError, Result};
use crate::domain::announced::Announced;
use crate::domain::bulk::Action;
use crate::domain::ids::{BulkId, InvocationId, TenantId};
use crate::domain::invocation::State;
use crate::domain::names::{IdempotencyKey, TaskName};
use crate::store::WorkerStore;
use crate::store::bulk::{Filter, NewOperation, Operation, Outcome, PAGE, Page};
use crate::store::duty::Held;

/// Operations of one tenant that may be open at once.
const MAX_OPEN: i64 = 20;
/// Longest exact count of a dry run; beyond it, an estimate.
const COUNT_DRY_RUN: Duration = Duration::from_secs(5);
/// Longest exact count of an operation that is accepted.
const COUNT_ACCEPTED: Duration = Duration::from_secs(1);
/// Invocations that are run again at a time.
const RETRIES_AT_ONCE: usize = 32;
/// Shortest and longest pause of an operation that its tenant's quota holds up.
const HELD_UP: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Operations that one run of the duty looks at, each for a page.
const OPERATIONS: i64 = 20;
/// Longest run of the duty, but for the page it is at, and longest page where each invocation takes a token: it must end
/// well before its lease does, or another holder begins the page again.
const TURN: Duration = Duration::from_millis(800);

/// A request for a bulk operation.
#[derive(Debug, Clone)]
pub struct Request {
    /// What to do.
    pub action: Action,
    /// In these states; empty: those that the action is for.
    pub states: Vec<State>,
    /// Of this task.
    pub task: Option<TaskName>,
    /// With all of these tags.
    pub tags: BTreeMap<String, String>,
    /// Accepted after.
    pub created_after: Option<DateTime<Utc>>,
    /// Accepted before.
    pub created_before: Option<DateTime<Utc>>,
    /// Dead letters of this kind of failure.
    pub fingerprint: Option<Vec<u8>>,
    /// Dead letters with this reason.
    pub reason: Option<String>,
    /// The new priority.
    pub priority: Option<i16>,
    /// Another version.
    pub version: Option<i32>,
    /// So many a second.
    pub rate: Option<i32>,
}

/// What came of a request.
#[derive(Debug)]
pub enum Asked {
    /// Of a dry run: how many there are, and whether that was counted.
    Count(i64, bool),
    /// It will be done.
    Accepted(Box<Operation>),
}

/// What came of running a page again.
struct Retried {
    outcome: Outcome,
    /// So many of the page, from its first on.
    met: usize,
    /// The rest is for later: not before this time has passed.
    rest: Option<Duration>,
}

fn invalid(pointer: &str, detail: impl Into<String>) -> Error {
    Error::InvalidFields(vec![FieldError::new(pointer, detail)])
}

/// How long an operation waits that its tenant's quota holds up. A quota can be raised meanwhile.
fn postponement(error: &Error) -> Duration {
    let ahead = match error {
        Error::QuotaExceeded { resets_at: Some(at), .. } => (*at - Utc::now()).to_std().unwrap_or_default(),
        _ => Duration::ZERO,
    };
    ahead.clamp(HELD_UP.0, HELD_UP.1)
}

fn check(request: &Request) -> Result<Vec<State>> {
    let action = request.action;
    let allowed = action.states();
    if let Some(state) = request.states.iter().find(|state| !allowed.contains(state)) {
        let words: Vec<&str> = allowed.iter().map(|state| state.as_str()).collect();
        let detail = format!("`{}` is for {}, not for {state}", action.as_str(), words.join(", "));
        return Err(invalid("/filter/state", detail));
    }
    let states =
        if request.states.is_empty() { action.default_states().to_vec() } else { request.states.clone() };
    if (request.fingerprint.is_some() || request.reason.is_some()) && states != [State::Dead] {
        return Err(invalid(
            "/filter/state",
            "`fingerprint` and `reason` are of dead letters: the state must be dead",
        ));
    }
    match (action, request.priority) {
        (Action::Reprioritise, None) => return Err(invalid("/priority", "is needed to reprioritise")),
        (Action::Reprioritise, Some(priority)) if !(-100..=100).contains(&priority) => {
            return Err(invalid("/priority", "must be from -100 to 100"));
        }
        (Action::Reprioritise, Some(_)) | (_, None) => {}
        (_, Some(_)) => return Err(invalid("/priority", "is only for reprioritise")),
    }
    if request.version.is_some() && (action != Action::Retry || request.task.is_none()) {
        return Err(invalid("/version", "is only for retry, and of one task"));
    }
    if request.version.is_some_and(|version| version < 1) {
        return Err(invalid("/version", "must be the number of a version"));
    }
    if request.rate.is_some_and(|rate| !(1..=10_000).contains(&rate)) {
        return Err(invalid("/rate_per_second", "must be from 1 to 10,000"));
    }
    Ok(states)
}

impl App {
    /// Accept a bulk operation, or, on a dry run, count what it would meet.
    ///
    /// # Errors
    /// It contradicts itself; no such task; too many are open.
    pub async fn bulk(&self, tenant: TenantId, request: Request, dry_run: bool) -> Result<Asked> {
        let states = check(&request)?;
        let task = match &request.task {
            None => None,
            Some(name) => Some((self.task(tenant, name).await?.id, name.as_str().to_owned())),
        };
        let mut asked = NewOperation {
            id: BulkId::generate(),
            action: request.action,
            filter: Filter {
                states,
                task,
                tags: request.tags,
                created_after: request.created_after,
                created_before: request.created_before,
                fingerprint: request.fingerprint,
                reason: request.reason,
            },
            priority: request.priority,
            version: request.version,
            rate: request.rate,
            expected: (0, false),
        };
        let mut connection = self.tenant(tenant).await?;
        if dry_run {
            let (count, exact) = connection.bulk_count(&asked, COUNT_DRY_RUN).await?;
            return Ok(Asked::Count(count, exact));
        }
        asked.expected = connection.bulk_count(&asked, COUNT_ACCEPTED).await?;
        if !connection.bulk_insert(&asked, MAX_OPEN).await? {
            let limit = MAX_OPEN.unsigned_abs();
            return Err(Error::QuotaExceeded {
                name: "open-bulk-operations",
                whose: "tenant",
                limit,
                current: limit,
                resets_at: None,
            });
        }
        let id = asked.id;
        let accepted = connection.bulk_get(id).await?.ok_or(Error::BulkNotFound(id))?;
        Ok(Asked::Accepted(Box::new(accepted)))
    }

    /// One operation.
    ///
    /// # Errors
    /// It is not this tenant's.
    pub async fn bulk_get(&self, tenant: TenantId, id: BulkId) -> Result<Operation> {
        self.tenant(tenant).await?.bulk_get(id).await?.ok_or(Error::BulkNotFound(id))
    }

    /// Operations, newest first; and whether there are more.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn bulk_list(
        &self,
        tenant: TenantId,
        after: Option<BulkId>,
        limit: u16,
    ) -> Result<(Vec<Operation>, bool)> {
        let rows = self.tenant(tenant).await?.bulk_list(after, i64::from(limit) + 1).await?;
        Ok(cut(rows, limit))
    }

    /// Stop an operation. What is done stays done; one that is over stays what it is.
    ///
    /// # Errors
    /// It is not this tenant's.
    pub async fn bulk_cancel(&self, tenant: TenantId, id: BulkId) -> Result<Operation> {
        let mut connection = self.tenant(tenant).await?;
        connection.bulk_cancel(id).await?;
        connection.bulk_get(id).await?.ok_or(Error::BulkNotFound(id))
    }

    /// One run of the duty: a page of each open operation whose time has come, again and again for less than a second.
    /// Returns how many invocations were met, and when to come again.
    ///
    /// # Errors
    /// Postgres does not answer, or the duty is somebody else's by now.
    pub async fn bulk_turn(&self, held: &Held, store: &WorkerStore) -> Result<(u64, Option<Duration>)> {
        let began = tokio::time::Instant::now();
        let mut met = 0;
        loop {
            let (due, next) = store.bulk_open(OPERATIONS).await?;
            if due.is_empty() {
                return Ok((met, next));
            }
            for (tenant, id) in due {
                met += self.bulk_step(held, tenant, id).await?;
                if began.elapsed() > TURN {
                    return Ok((met, Some(Duration::ZERO)));
                }
            }
        }
    }

    async fn bulk_step(&self, held: &Held, tenant: TenantId, id: BulkId) -> Result<u64> {
        let mut connection = self.tenant(tenant).await?;
        let Some(op) = connection.bulk_get(id).await? else { return Ok(0) };
        // With a rate, a page is what a second may bring; so a slow operation is no burst a minute.
        let most = op.asked.rate.map_or(PAGE, |rate| usize::try_from(rate).unwrap_or(PAGE).clamp(1, PAGE));
        let page = connection.bulk_page(&op, most).await?;
        let met = page.ids.len() as u64;
        if op.asked.action == Action::Retry {
            drop(connection); // running again takes connections of its own
            let Retried { outcome, met, rest } = self.bulk_retry(tenant, &op, &page).await?;
            let mut connection = self.tenant(tenant).await?;
            match rest {
                None => connection.bulk_advance(held, &op, &page, &outcome).await?,
                // It is this tenant's own affair: its operation waits, and those of others go on.
                Some(wait) => connection.bulk_hold_up(held, &op, &page, met, &outcome, wait).await?,
            };
            return Ok(met as u64);
        }
        if let Some(outcome) = connection.bulk_apply(held, &op, &page).await? {
            self.inner.signals.done(&outcome.ended);
            for id in &outcome.stopping {
                self.inner.signals.cancelled(*id); // of other processes, heartbeats tell them
            }
            if outcome.wake {
                self.inner.signals.ready.announce(&Announced::Any);
            }
        }
        Ok(met)
    }

    /// Run a page again. Each has an idempotency key of its own: repeated after a crash, it gives the same new one.
    /// Stops where the tenant's quota, or what may wait of it, lets no more through, and when it has taken long enough.
    async fn bulk_retry(&self, tenant: TenantId, op: &Operation, page: &Page) -> Result<Retried> {
        let again = |id: InvocationId| async move {
            let key = IdempotencyKey::try_from(format!("bulk-{}-{id}", op.asked.id)).ok();
            self.retry(tenant, id, op.asked.version, key, None).await
        };
        // One after the other where each takes a token: what comes behind the one that gets none has not begun, and what
        // was run again before, which takes one until it is known as such, refuses no other.
        let at_once = if self.quotas_of(tenant).await?.counts() { 1 } else { RETRIES_AT_ONCE };
        let mut results = futures_util::stream::iter(page.ids.clone()).map(again).buffered(at_once);
        let (mut outcome, mut met, mut rest) = (Outcome::default(), 0, None);
        let began = tokio::time::Instant::now();
        while let Some(result) = results.next().await {
            match result {
                Ok(_) => outcome.done += 1,
                Err(Error::InvocationNotFound(_) | Error::NotRetryable(_)) => outcome.skipped += 1,
                // It will pass: the page is repeated, and what is done of it is found done.
                Err(error @ (Error::Unavailable(_) | Error::Overloaded(_))) => return Err(error),
                Err(error @ (Error::QueueFull { .. } | Error::QuotaExceeded { .. })) => {
                    tracing::debug!(operation = %op.asked.id, %error, "a bulk operation is held up");
                    rest = Some(postponement(&error));
                    break;
                }
                Err(error) => {
                    outcome.failed += 1;
                    outcome.error =
                        Some(error.to_string().chars().filter(|c| *c != '\0').take(500).collect());
                }
            }
            met += 1;
            if at_once == 1 && met < page.ids.len() && began.elapsed() > TURN {
                rest = Some(Duration::ZERO);
                break;
            }
        }
        Ok(Retried { outcome, met, rest })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn request(action: Action) -> Request {
        Request {
            action,
            states: Vec::new(),
            task: None,
            tags: BTreeMap::new(),
            created_after: None,
            created_before: None,
            fingerprint: None,
            reason: None,
            priority: None,
            version: None,
            rate: None,
        }
    }

    #[test]
    fn an_operation_waits_for_the_quota_but_never_long() {
        let quota =
            |resets_at| Error::QuotaExceeded { name: "x", whose: "tenant", limit: 1, current: 1, resets_at };
        let in_s = |seconds| Some(Utc::now() + chrono::TimeDelta::seconds(seconds));
        assert_eq!(postponement(&Error::QueueFull { limit: 1, current: 1 }), HELD_UP.0);
        assert_eq!(postponement(&quota(in_s(-5))), HELD_UP.0);
        assert_eq!(postponement(&quota(in_s(86_400))), HELD_UP.1);
        assert!(postponement(&quota(in_s(30))) > Duration::from_secs(25));
    }

    #[test]
    fn what_contradicts_its_action_is_refused_and_an_absent_state_means_what_the_action_is_for() {
        assert_eq!(check(&request(Action::Retry)).unwrap(), [State::Dead]);
        assert_eq!(check(&request(Action::Cancel)).unwrap().len(), 3);
        let reprioritise = Request { priority: Some(7), ..request(Action::Reprioritise) };
        assert!(check(&reprioritise).is_ok());
        for bad in [
            Request { states: vec![State::Succeeded], ..request(Action::Cancel) },
            Request { states: vec![State::Cancelled], ..request(Action::Purge) },
            Request { priority: Some(1), ..request(Action::Cancel) },
            request(Action::Reprioritise),
            Request { priority: Some(101), ..request(Action::Reprioritise) },
            Request { version: Some(1), ..request(Action::Retry) },
            Request { rate: Some(0), ..request(Action::Retry) },
            Request { fingerprint: Some(vec![0; 8]), ..request(Action::Cancel) },
        ] {
            assert!(matches!(check(&bad), Err(Error::InvalidFields(_))), "{bad:?}");
        }
    }
}
