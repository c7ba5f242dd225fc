//! Group commit of new invocations. What comes to an idle server is committed at once; what comes while a statement is
//! under way goes together in the next, so a busy server commits hundreds at a time.
//!
//! Owns the order of service (round robin over tenants) and the bounds of what waits. Never looks into a row.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::app::signals::{Ready, Signals};
use crate::domain::announced::Announced;
use crate::domain::ids::TenantId;
use crate::store::queue::{Enqueued, Enqueuer, NewInvocation};
use crate::store::{ApiStore, Error};

/// Statements in flight at once: while one waits for its commit, others gather.
const FLUSHERS: usize = 3;
/// Rows worth a statement beside one that is under way. Fewer would cost as much as many, and wait for the end of that one.
const WORTH_ANOTHER: usize = 32;
/// How long they wait for it at most: it may be waiting for a lock itself, and others' rows are not to pay for that.
const PATIENCE: Duration = Duration::from_millis(5);
/// Rows of one statement.
const MAX_ROWS: usize = 500;
/// Bytes of one statement (a single larger row still goes, alone).
const MAX_BYTES: usize = 8 << 20;
/// Rows that may wait, of all tenants.
const MAX_WAITING: usize = 10_000;
/// Rows that may wait of one tenant, so that one cannot take all the places.
const MAX_WAITING_PER_TENANT: usize = 5_000;
/// Bytes that may wait.
const MAX_WAITING_BYTES: usize = 256 << 20;
/// How long an idle flusher keeps its connection.
const IDLE: Duration = Duration::from_secs(1);
/// How long rows are held when Postgres does not answer.
const HOLD: Duration = Duration::from_secs(4);
/// First and longest pause between two tries within [`HOLD`]. The first are quick: a pool may hold several dead
/// connections.
const HOLD_PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(250));
/// What a row takes besides its input, arguments and variables.
const ROW_OVERHEAD: usize = 512;

/// Why a row was not queued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many wait already, or the server is stopping. Nothing was queued.
    #[error("too many invocations wait to be queued")]
    Overloaded,
    /// Postgres does not answer. The row may or may not be queued.
    #[error("the database is not available: {0}")]
    Unavailable(String),
    /// The task or version is gone.
    #[error("the row refers to something that is gone: {0}")]
    Gone(String),
    /// Our mistake.
    #[error("{0}")]
    Failed(String),
}

/// Queues invocations. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Flusher {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: ApiStore,
    backlog: Mutex<Backlog<Waiting>>,
    more: Notify,
    stop: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Debug)]
struct Waiting {
    row: NewInvocation,
    answer: oneshot::Sender<Result<Enqueued, Refused>>,
}

impl Flusher {
    /// Start the flushing tasks. `key_ttl`: how long idempotency keys are remembered.
    #[must_use]
    pub fn start(store: &ApiStore, signals: &Arc<Signals>, key_ttl: Duration) -> Self {
        let shared = Arc::new(Shared {
            store: store.clone(),
            backlog: Mutex::default(),
            more: Notify::new(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        let announce = Arc::new(Ready::default());
        for _ in 0..FLUSHERS {
            let flush = Flush {
                store: store.enqueuer(),
                signals: Arc::clone(signals),
                announce: Arc::clone(&announce),
                key_ttl,
            };
            shared.tasks.spawn(run(Arc::clone(&shared), flush));
        }
        shared.tasks.spawn(announcer(store.clone(), announce, Arc::clone(signals), shared.stop.clone()));
        shared.tasks.close();
        Self { shared }
    }

    /// Queue one invocation; durable on return.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn enqueue(&self, row: NewInvocation) -> Result<Enqueued, Refused> {
        // Within HOLD rows are held over a restart of Postgres; beyond it nobody is kept waiting.
        if self.shared.store.away_for() > HOLD {
            return Err(Refused::Unavailable("it has not answered for some time".to_owned()));
        }
        let (answer, answered) = oneshot::channel();
        let (tenant, bytes) = (row.tenant, size(&row));
        let pushed = {
            let mut backlog = self.shared.lock();
            // Under the lock, as in `run`: a row pushed here is seen by the last look of a stopping flusher.
            !self.shared.stop.is_cancelled() && backlog.push(tenant, bytes, Waiting { row, answer })
        };
        if !pushed {
            return Err(Refused::Overloaded);
        }
        self.shared.more.notify_one();
        answered.await.unwrap_or_else(|_| Err(Refused::Failed("a flush was abandoned".to_owned())))
    }

    /// Refuse new rows, queue those that wait, and stop.
    pub async fn shutdown(&self) {
        self.shared.stop.cancel();
        self.shared.tasks.wait().await;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Backlog<Waiting>> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn size(row: &NewInvocation) -> usize {
    use crate::store::invocation::InputKind;
    let spec = match &row.spec.input {
        InputKind::Task | InputKind::Http => 0,
        InputKind::Command { args, env } => {
            args.iter().map(String::len).sum::<usize>()
                + env.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>()
        }
    };
    row.input.len() + spec + ROW_OVERHEAD
}

/// One flushing task's tools.
struct Flush {
    store: Enqueuer,
    signals: Arc<Signals>,
    announce: Arc<Ready>,
    key_ttl: Duration,
}

/// Whether rows that wait go now, with so many statements under way. `impatient`: they have waited for [`PATIENCE`].
fn goes_now(under_way: usize, rows: usize, impatient: bool) -> bool {
    under_way == 0 || impatient || rows >= WORTH_ANOTHER
}

async fn run(shared: Arc<Shared>, mut flush: Flush) {
    // When the rows seen waiting behind another's statement have waited for it long enough.
    let mut patient_until: Option<Instant> = None;
    loop {
        let (batch, left, stopping) = {
            let mut backlog = shared.lock();
            let stopping = shared.stop.is_cancelled();
            let impatient = patient_until.is_some_and(|until| Instant::now() >= until);
            let batch = if goes_now(backlog.under_way, backlog.rows, impatient) {
                backlog.take(MAX_ROWS, MAX_BYTES)
            } else {
                Vec::new()
            };
            if !batch.is_empty() {
                backlog.under_way += 1;
            }
            (batch, !backlog.is_empty(), stopping)
        };
        if !batch.is_empty() {
            patient_until = None;
            if left {
                shared.more.notify_one();
            }
            flush.batch(batch).await;
            shared.lock().under_way -= 1;
        } else if left {
            // Whoever is under way takes them when it is done, and we if that takes too long.
            let until = *patient_until.get_or_insert_with(|| Instant::now() + PATIENCE);
            tokio::select! {
                () = shared.more.notified() => {}
                () = tokio::time::sleep_until(until) => {}
            }
        } else if stopping {
            return;
        } else {
            patient_until = None;
            tokio::select! {
                () = shared.more.notified() => {}
                () = tokio::time::sleep(IDLE), if flush.store.is_held() => flush.store.release(),
                () = shared.stop.cancelled() => {}
            }
        }
    }
}

impl Flush {
    async fn batch(&mut self, batch: Vec<Waiting>) {
        let (rows, answers): (Vec<_>, Vec<_>) = batch.into_iter().map(|w| (w.row, w.answer)).unzip();
        let announced = Announced::of(rows.iter().map(|row| row.task));
        let mut outcome = self.store.enqueue(&rows, self.key_ttl).await;
        // Postgres restarts in a second or two: hold the rows that long instead of sending their callers away.
        // Repeating is safe, because rows carry their ids.
        let deadline = Instant::now() + HOLD;
        let mut pause = HOLD_PAUSE.0;
        while let Err(Error::Unavailable(_)) = &outcome {
            if Instant::now() + pause > deadline {
                break;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(HOLD_PAUSE.1);
            outcome = self.store.enqueue(&rows, self.key_ttl).await;
        }
        match outcome {
            Ok(outcomes) => {
                self.wake(&announced);
                for (answer, outcome) in answers.into_iter().zip(outcomes) {
                    // Whoever asked may have gone; the row is queued all the same.
                    let _ = answer.send(Ok(outcome));
                }
            }
            Err(error) => {
                tracing::warn!(%error, rows = rows.len(), "a flush failed; its rows go one by one");
                self.one_by_one(rows, answers).await;
            }
        }
    }

    /// After a failed flush, so that only the row at fault fails. Also right when the failed statement did commit and
    /// only its answer was lost: the row's own id is then taken.
    async fn one_by_one(
        &mut self,
        rows: Vec<NewInvocation>,
        answers: Vec<oneshot::Sender<Result<Enqueued, Refused>>>,
    ) {
        let announced = Announced::of(rows.iter().map(|row| row.task));
        let mut down: Option<String> = None;
        for (row, answer) in rows.into_iter().zip(answers) {
            let outcome = match &down {
                // One failure to reach Postgres is enough; the others would only wait for theirs.
                Some(why) => Err(Refused::Unavailable(why.clone())),
                None => self.one(row).await,
            };
            if let Err(Refused::Unavailable(why)) = &outcome {
                down = Some(why.clone());
            }
            let _ = answer.send(outcome);
        }
        self.wake(&announced);
    }

    async fn one(&mut self, row: NewInvocation) -> Result<Enqueued, Refused> {
        let id = row.id;
        match self.store.enqueue(&[row], self.key_ttl).await {
            Ok(outcomes) => outcomes
                .first()
                .copied()
                .ok_or_else(|| Refused::Failed("enqueue answered nothing".to_owned())),
            Err(Error::Constraint { constraint }) if constraint == "invocations_pkey" => {
                Ok(Enqueued::Accepted(id))
            }
            Err(Error::Constraint { constraint }) => Err(Refused::Gone(constraint)),
            Err(Error::Unavailable(error)) => Err(Refused::Unavailable(error.to_string())),
            Err(error) => Err(Refused::Failed(error.to_string())),
        }
    }

    fn wake(&self, announced: &Announced) {
        self.signals.ready.announce(announced);
        self.announce.announce(announced);
    }
}

/// Tells workers of other processes. One notification in flight at a time: what comes meanwhile shares the next.
async fn announcer(store: ApiStore, announce: Arc<Ready>, signals: Arc<Signals>, stop: CancellationToken) {
    loop {
        tokio::select! {
            announced = announce.heard() => {
                if let Err(error) = store.notify_ready(&signals.outgoing(&announced)).await {
                    tracing::debug!(%error, "cannot notify workers; they poll");
                }
            }
            () = stop.cancelled() => return,
        }
    }
}

/// What waits, by tenant. Takes from each in turn, so a tenant with one row waits for one round and not for another
/// tenant's thousands.
#[derive(Debug)]
struct Backlog<T> {
    queues: HashMap<TenantId, VecDeque<(usize, T)>>,
    /// Tenants with something waiting, next one first. Exactly the keys of `queues`.
    turns: VecDeque<TenantId>,
    rows: usize,
    bytes: usize,
    /// Statements that carry what was taken. The flushers' to count.
    under_way: usize,
}

impl<T> Default for Backlog<T> {
    fn default() -> Self {
        Self { queues: HashMap::new(), turns: VecDeque::new(), rows: 0, bytes: 0, under_way: 0 }
    }
}

impl<T> Backlog<T> {
    /// False: no place.
    fn push(&mut self, tenant: TenantId, bytes: usize, item: T) -> bool {
        let mine = self.queues.get(&tenant).map_or(0, VecDeque::len);
        if self.rows >= MAX_WAITING
            || mine >= MAX_WAITING_PER_TENANT
            || self.bytes.saturating_add(bytes) > MAX_WAITING_BYTES
        {
            return false;
        }
        if mine == 0 {
            self.turns.push_back(tenant);
        }
        self.queues.entry(tenant).or_default().push_back((bytes, item));
        self.rows += 1;
        self.bytes += bytes;
        true
    }

    /// Up to `max_rows` items; stops before `max_bytes` is passed, but gives at least one.
    fn take(&mut self, max_rows: usize, max_bytes: usize) -> Vec<T> {
        let mut taken = Vec::new();
        let mut bytes = 0usize;
        while taken.len() < max_rows {
            let Some(tenant) = self.turns.front().copied() else {
                break;
            };
            let Some(queue) = self.queues.get_mut(&tenant) else {
                self.turns.pop_front();
                continue;
            };
            let Some((size, _)) = queue.front() else {
                self.turns.pop_front();
                self.queues.remove(&tenant);
                continue;
            };
            if !taken.is_empty() && bytes.saturating_add(*size) > max_bytes {
                break;
            }
            self.turns.pop_front();
            if let Some((size, item)) = queue.pop_front() {
                bytes += size;
                self.rows -= 1;
                self.bytes -= size;
                taken.push(item);
            }
            if queue.is_empty() {
                self.queues.remove(&tenant);
            } else {
                self.turns.push_back(tenant);
            }
        }
        taken
    }

    fn is_empty(&self) -> bool {
        self.rows == 0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    fn tenant(n: u8) -> TenantId {
        TenantId(uuid::Uuid::from_u128(u128::from(n)))
    }

    #[test]
    fn a_tenant_with_one_row_goes_in_the_next_flush_whatever_another_has_waiting() {
        let mut backlog = Backlog::default();
        for i in 0..4000 {
            assert!(backlog.push(tenant(1), 100, (1, i)));
        }
        assert!(backlog.push(tenant(2), 100, (2, 0)));
        let batch = backlog.take(10, MAX_BYTES);
        assert_eq!(batch[..3], [(1, 0), (2, 0), (1, 1)]);
        assert_eq!(batch.len(), 10);
    }

    #[test]
    fn few_rows_wait_for_the_statement_under_way_and_many_or_old_ones_do_not() {
        assert!(goes_now(0, 1, false));
        assert!(!goes_now(1, 1, false) && !goes_now(2, WORTH_ANOTHER - 1, false));
        assert!(goes_now(1, WORTH_ANOTHER, false) && goes_now(1, 1, true));
    }

    #[test]
    fn one_tenant_cannot_take_every_place() {
        let mut backlog = Backlog::default();
        let fits = (0..MAX_WAITING).filter(|_| backlog.push(tenant(1), 1, ())).count();
        assert_eq!(fits, MAX_WAITING_PER_TENANT);
        assert!(backlog.push(tenant(2), 1, ()));
    }

    #[test]
    fn a_row_larger_than_a_flush_goes_alone() {
        let mut backlog = Backlog::default();
        assert!(backlog.push(tenant(1), 3 * MAX_BYTES, 1));
        assert!(backlog.push(tenant(2), 1, 2));
        assert_eq!(backlog.take(MAX_ROWS, MAX_BYTES), [1]);
        assert_eq!(backlog.take(MAX_ROWS, MAX_BYTES), [2]);
        assert!(!backlog.push(tenant(1), MAX_WAITING_BYTES + 1, 3));
    }

    proptest! {
        #[test]
        fn everything_comes_out_once_in_order_per_tenant(
            rows in prop::collection::vec((0u8..5, 1usize..1000), 0..300),
            max_rows in 1usize..50, max_bytes in 1usize..5000,
        ) {
            let mut backlog = Backlog::default();
            for (i, (t, bytes)) in rows.iter().enumerate() {
                prop_assert!(backlog.push(tenant(*t), *bytes, (*t, i, *bytes)));
            }
            let mut out = Vec::new();
            while !backlog.is_empty() {
                let batch = backlog.take(max_rows, max_bytes);
                prop_assert!(!batch.is_empty() && batch.len() <= max_rows);
                prop_assert!(batch.len() == 1 || batch.iter().map(|r| r.2).sum::<usize>() <= max_bytes);
                out.extend(batch);
            }
            prop_assert_eq!(out.len(), rows.len());
            prop_assert_eq!((backlog.bytes, backlog.queues.len(), backlog.turns.len()), (0, 0, 0));
            for t in 0..5 {
                let mine: Vec<usize> = out.iter().filter(|r| r.0 == t).map(|r| r.1).collect();
                prop_assert!(mine.is_sorted());
            }
        }
    }
}
