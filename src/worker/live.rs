//! What running attempts log and report, on its way into the database: of all attempts together, a few times per
//! second. Never in the way of an end: nothing waits for it, and whatever is given up here comes again with the
//! outcome.

use std::borrow::Cow;
use std::collections::HashMap;
use std::convert::Infallible;
use std::time::Duration;

use chrono::{DateTime, Utc};
use sandbar_host::cell::Progress;
use sandbar_host::limits::Limits;
use sandbar_host::log::Log;
use tokio::sync::mpsc;
use tracing::{debug, warn};

use crate::app::sealed::keys::Keys;
use crate::store::log::Said;
use crate::store::queue::Claimed;
use crate::store::{Error, WorkerStore};
use crate::worker::lease::Lease;

/// Shortest time between two writes.
const EVERY: Duration = Duration::from_millis(250);
/// Longest time between two tries when the database does not answer.
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Rows of one write.
const MAX_ROWS: usize = 500;
/// Bytes of log of one write; one piece may exceed it alone.
const MAX_BYTES: usize = 4 << 20;
/// Pieces that wait; beyond that logs are given up until their attempts end.
const QUEUE: usize = 2_048;
/// Bytes of a report's message.
const MAX_MESSAGE: usize = 1_024;
/// What the log of an attempt may take here for each byte that its limit allows: names, numbers, escapes.
const STORED_PER_BYTE: u64 = 8;
/// The same beyond its limit: records of nearly nothing.
const STORED_SLACK: u64 = 64 << 10;

/// Where pieces go.
pub type Sender = mpsc::Sender<Said>;

/// A queue for pieces.
pub fn channel() -> (Sender, mpsc::Receiver<Said>) {
    mpsc::channel(QUEUE)
}

/// What is known of one attempt's live log.
#[derive(Debug, Clone, Copy, Default)]
pub struct Live {
    /// Number of the next record.
    next: u32,
    /// Bytes that have been passed on.
    stored: u64,
    /// Something was given up: the rest comes with the outcome.
    over: bool,
}

impl Live {
    /// Pass on records that begin with number `first`. A cell is believed only as far as it keeps to the order and to
    /// the attempt's limit.
    pub fn log(
        &mut self,
        sender: &Sender,
        claimed: &Claimed,
        started_at: DateTime<Utc>,
        first: u32,
        log: Log,
    ) {
        if self.over {
            return;
        }
        let count = u32::try_from(log.count()).unwrap_or(u32::MAX);
        let next = self.next.checked_add(count).filter(|next| i32::try_from(*next).is_ok());
        let limits: &Limits = &claimed.spec.limits;
        let room = limits.log_bytes.saturating_mul(STORED_PER_BYTE).saturating_add(STORED_SLACK);
        let bytes = log.into_bytes();
        let stored = self.stored.saturating_add(bytes.len() as u64);
        let (Some(next), Ok(place)) =
            (next.filter(|_| first == self.next && stored <= room), i32::try_from(first))
        else {
            self.over = true;
            warn!(invocation = %claimed.invocation, first, expected = self.next, stored, "a live log is given up");
            return;
        };
        if bytes.is_empty() {
            return;
        }
        let said = Said { claim: claimed.claim(), started_at, log: Some((place, bytes)), progress: None };
        if sender.try_send(said).is_err() {
            self.over = true;
            debug!(invocation = %claimed.invocation, "too much is logged at once: the rest comes at the end");
            return;
        }
        self.next = next;
        self.stored = stored;
    }
}

/// Pass on a report. One that finds no room is lost; the next one comes soon.
pub fn progress(sender: &Sender, claimed: &Claimed, started_at: DateTime<Utc>, report: &Progress) {
    let mut message: String = report
        .message
        .chars()
        .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
        .collect();
    while message.len() > MAX_MESSAGE {
        message.pop();
    }
    let report = Progress { done: report.done, total: report.total, message };
    let said = Said { claim: claimed.claim(), started_at, log: None, progress: Some((report, Utc::now())) };
    let _ = sender.try_send(said);
}

/// Write for as long as it is polled. A lost lease needs no word: the database leaves out what is said under it.
pub async fn run(
    store: &WorkerStore,
    keys: &Keys,
    lease: &Lease,
    mut said: mpsc::Receiver<Said>,
) -> Infallible {
    let mut waiting: Vec<Said> = Vec::new();
    let mut pause = EVERY;
    loop {
        if waiting.is_empty() && said.recv_many(&mut waiting, MAX_ROWS).await == 0 {
            return std::future::pending().await;
        }
        while waiting.len() < MAX_ROWS
            && let Ok(more) = said.try_recv()
        {
            waiting.push(more);
        }
        let batch = latest(batch(&mut waiting));
        // A copy, so that a batch that comes again is sealed once each time.
        let mut sealed = Cow::Borrowed(batch.as_slice());
        if batch.iter().any(|said| said.claim.is_sealed())
            && let Err(error) = keys.seal_said(sealed.to_mut()).await
        {
            debug!(%error, "cannot read data keys; trying again");
            pause = (pause * 2).min(RETRY_MAX);
            waiting.splice(0..0, batch);
            tokio::time::sleep(pause).await;
            continue;
        }
        match store.write_live(lease.worker(), lease.epoch(), &sealed).await {
            Ok(_) => pause = EVERY,
            Err(Error::Unavailable(error)) => {
                debug!(%error, "cannot write live logs; trying again");
                pause = (pause * 2).min(RETRY_MAX);
                waiting.splice(0..0, batch);
            }
            Err(error) => {
                warn!(%error, pieces = batch.len(), "live logs cannot be written");
            }
        }
        tokio::time::sleep(pause).await;
    }
}

/// Up to the bound in bytes, in order; the rest stays.
fn batch(waiting: &mut Vec<Said>) -> Vec<Said> {
    let mut bytes = 0;
    let fit = waiting
        .iter()
        .position(|said| {
            bytes += said.log.as_ref().map_or(0, |(_, records)| records.len());
            bytes > MAX_BYTES
        })
        .unwrap_or(waiting.len())
        .max(1);
    let rest = waiting.split_off(fit.min(waiting.len()));
    std::mem::replace(waiting, rest)
}

/// Of several reports of one invocation only the last: a statement writes a row once.
fn latest(mut batch: Vec<Said>) -> Vec<Said> {
    let mut last = HashMap::new();
    for (place, said) in batch.iter().enumerate() {
        if said.progress.is_some() {
            last.insert(said.claim.invocation(), place);
        }
    }
    let mut place = 0;
    batch.retain(|said| {
        let keep = said.progress.is_none() || last.get(&said.claim.invocation()) == Some(&place);
        place += 1;
        keep
    });
    batch
}
