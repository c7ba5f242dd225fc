//! Logs of invocations: in pages, and as they grow. Owns filters and the places between records; a page or a stream
//! begins where another ended, whether the attempt ran then or runs now. Never holds a connection while a reader waits.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use futures_util::stream::{self, Stream};
use sandbar_host::outcome::{LogLevel, LogRecord};
use tokio::time::Instant;

use crate::app::signals::Waiter;
use crate::app::{App, Error, Result};
use crate::domain::ids::{InvocationId, TenantId};
use crate::domain::invocation::State;
use crate::store::invocation::{Invocation, ProgressRow, Summary};
use crate::store::log::{Place, records};

/// Stored bytes that one look at the database brings; a piece that begins within goes whole.
const LOOK_BYTES: i64 = 4 << 20;
/// Records of one look of a stream.
const STREAM_PAGE: usize = 500;
/// Streams of one server, and of one tenant on it. Each asks the database twice a second.
const MAX_STREAMS: (usize, usize) = (512, 128);
/// Longest stream; whoever wants more continues where it ended.
const MAX_STREAM_TIME: Duration = Duration::from_secs(3_600);
/// How long after the end of an invocation its last report of progress may come: workers write reports a few times per
/// second.
const LAST_REPORT: TimeDelta = TimeDelta::milliseconds(400);
/// How long a stream goes on without an answer of the database.
const MAX_SILENCE: Duration = Duration::from_secs(60);

/// Which records are wanted.
#[derive(Debug, Clone, Copy, Default)]
pub struct LogFilter {
    /// Of this attempt.
    pub attempt: Option<i16>,
    /// Of this level or a worse one.
    pub level: Option<LogLevel>,
    /// Not older than this.
    pub since: Option<DateTime<Utc>>,
}

/// A record and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// After which place the next one is.
    pub place: Place,
    /// When it was written.
    pub at: DateTime<Utc>,
    /// What was written.
    pub record: LogRecord,
}

/// What somebody hears who follows an invocation.
#[derive(Debug)]
pub enum Heard {
    /// It stands elsewhere now; the attempt that runs or ran last.
    State(State, Option<i16>),
    /// It logged this.
    Log(Box<Record>),
    /// It reported this.
    Progress(ProgressRow),
    /// It has ended. Nothing follows.
    End(Box<Summary>),
}

/// Places of streams that are taken.
#[derive(Debug, Default)]
pub struct Streams {
    taken: Arc<Mutex<HashMap<TenantId, usize>>>,
}

/// A place of one stream; given back when dropped.
#[derive(Debug)]
struct Seat {
    taken: Arc<Mutex<HashMap<TenantId, usize>>>,
    tenant: TenantId,
}

impl Streams {
    fn take(&self, tenant: TenantId) -> Result<Seat> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = taken.values().sum();
        let mine = taken.get(&tenant).copied().unwrap_or(0);
        if all >= MAX_STREAMS.0 || mine >= MAX_STREAMS.1 {
            return Err(Error::Overloaded("too many streams at once"));
        }
        taken.insert(tenant, mine + 1);
        drop(taken);
        Ok(Seat { taken: Arc::clone(&self.taken), tenant })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mine) = taken.get_mut(&self.tenant) {
            *mine -= 1;
            if *mine == 0 {
                taken.remove(&self.tenant);
            }
        }
    }
}

impl App {
    /// Up to `limit` records after the place `after`, and whether there are more now.
    ///
    /// # Errors
    /// The invocation is not this tenant's.
    pub async fn log(
        &self,
        tenant: TenantId,
        id: InvocationId,
        filter: LogFilter,
        after: Option<Place>,
        limit: usize,
    ) -> Result<(Vec<Record>, bool)> {
        let mut after = after;
        let mut found = Vec::new();
        // One more than asked for tells whether there are more.
        while found.len() <= limit {
            let (seen, more) = self.look(tenant, id, filter, &mut after, limit + 1 - found.len()).await?;
            found.extend(seen);
            if !more {
                break;
            }
        }
        let more = found.len() > limit;
        found.truncate(limit);
        Ok((found, more))
    }

    /// One look: up to `limit` records after `after`, which moves on, and whether another look may find more now.
    async fn look(
        &self,
        tenant: TenantId,
        id: InvocationId,
        filter: LogFilter,
        after: &mut Option<Place>,
        limit: usize,
    ) -> Result<(Vec<Record>, bool)> {
        let answer = self.tenant(tenant).await?.log_pieces(id, filter.attempt, *after, LOOK_BYTES).await?;
        let (mut pieces, sealed, mut more) = answer.ok_or(Error::InvocationNotFound(id))?;
        self.open_pieces(tenant, id, sealed.as_deref(), &mut pieces).await?;
        let (before, mut found) = (*after, Vec::new());
        'pieces: for piece in &pieces {
            // What comes between is not written yet; it will be, at the latest with the end of the attempt.
            let next = after.filter(|at| at.attempt == piece.attempt).map_or(0, |at| at.index + 1);
            if piece.live && piece.first > next {
                more = false;
                break;
            }
            for (index, record) in records(piece) {
                let place = Place { attempt: piece.attempt, index };
                if after.is_some_and(|after| place <= after) {
                    continue;
                }
                if found.len() == limit {
                    more = true;
                    break 'pieces;
                }
                *after = Some(place);
                let micros = TimeDelta::microseconds(i64::try_from(record.at_us).unwrap_or(i64::MAX));
                let at = piece.started_at.checked_add_signed(micros).unwrap_or(piece.started_at);
                let wanted = filter.level.is_none_or(|level| record.level >= level)
                    && filter.since.is_none_or(|since| at >= since);
                if wanted {
                    found.push(Record { place, at, record });
                }
            }
        }
        if more && *after == before {
            // All that came had been seen, and behind it begins another attempt.
            *after = pieces.last().map(|last| Place { attempt: last.attempt.saturating_add(1), index: -1 });
        }
        Ok((found, more))
    }

    /// What happens to an invocation from now on, and what it logged after `after`, until it ends. The stream also ends
    /// when the server drains, and after an hour.
    ///
    /// # Errors
    /// The invocation is not this tenant's; too many streams.
    pub async fn follow(
        &self,
        tenant: TenantId,
        id: InvocationId,
        filter: LogFilter,
        after: Option<Place>,
    ) -> Result<impl Stream<Item = Heard> + Send + 'static> {
        let seat = self.inner.streams.take(tenant)?;
        let waiter = self.inner.signals.wait_for(id);
        let first = self.invocation(tenant, id, 0).await?;
        let follower = Follower {
            app: self.clone(),
            tenant,
            id,
            filter,
            after,
            waiter,
            first: Some(first),
            state: None,
            progress: None,
            heard: VecDeque::new(),
            again: false,
            waited: false,
            ended: false,
            until: Instant::now() + MAX_STREAM_TIME,
            silent_since: None,
            _seat: seat,
        };
        Ok(stream::unfold(follower, |mut follower| async move {
            let heard = follower.next().await?;
            Some((heard, follower))
        }))
    }
}

/// One who follows an invocation.
struct Follower {
    app: App,
    tenant: TenantId,
    id: InvocationId,
    filter: LogFilter,
    after: Option<Place>,
    waiter: Waiter,
    /// Read before the stream began, so that what is not there is refused with a status.
    first: Option<Invocation>,
    state: Option<(State, Option<i16>)>,
    progress: Option<ProgressRow>,
    heard: VecDeque<Heard>,
    /// There is more than one look brought.
    again: bool,
    /// The last report has been waited for.
    waited: bool,
    ended: bool,
    until: Instant,
    silent_since: Option<Instant>,
    _seat: Seat,
}

impl Follower {
    /// What comes next; `None` at the end of the stream.
    async fn next(&mut self) -> Option<Heard> {
        loop {
            if let Some(heard) = self.heard.pop_front() {
                return Some(heard);
            }
            if self.ended || Instant::now() > self.until || self.app.inner.draining.is_cancelled() {
                return None;
            }
            if self.first.is_none() && !self.again {
                tokio::select! {
                    _ = self.waiter.nudge() => {}
                    () = self.app.inner.draining.cancelled() => return None,
                }
            }
            match self.turn().await {
                Ok(()) => self.silent_since = None,
                Err(Error::Unavailable(_)) => {
                    let since = *self.silent_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > MAX_SILENCE {
                        return None;
                    }
                }
                Err(error) => {
                    tracing::warn!(id = %self.id, %error, "a stream breaks off");
                    return None;
                }
            }
        }
    }

    /// First where it stands, then its log: what was logged before the end is heard before the end.
    async fn turn(&mut self) -> Result<()> {
        let now = match self.first.take() {
            Some(first) => first,
            None => self.app.invocation(self.tenant, self.id, 0).await?,
        };
        let attempt = now.running.map(|r| r.attempt).or(now.attempts.last().map(|a| a.attempt));
        let state = (now.summary.state, attempt);
        if self.state != Some(state) {
            self.state = Some(state);
            self.heard.push_back(Heard::State(state.0, state.1));
        }
        let (records, more) =
            self.app.look(self.tenant, self.id, self.filter, &mut self.after, STREAM_PAGE).await?;
        self.heard.extend(records.into_iter().map(|record| Heard::Log(Box::new(record))));
        if now.progress.is_some() && self.progress != now.progress {
            self.progress.clone_from(&now.progress);
            self.heard.extend(now.progress.map(Heard::Progress));
        }
        self.again = more;
        if !more && now.summary.state.is_terminal() {
            // The last report is written apart from the end, and may come a moment later.
            let fresh = now.summary.finished_at.is_some_and(|at| Utc::now() - at < LAST_REPORT * 2);
            if fresh && self.progress.is_some() && !std::mem::replace(&mut self.waited, true) {
                tokio::time::sleep(LAST_REPORT.to_std().unwrap_or_default()).await;
                self.again = true;
                return Ok(());
            }
            self.heard.push_back(Heard::End(Box::new(now.summary)));
            self.ended = true;
        }
        Ok(())
    }
}
