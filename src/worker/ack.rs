//! Ends of attempts on their way into the database, in batches: whatever is waiting when the last batch is done goes
//! into the next. Never gives up on an end while the lease is held, and never lets one bad row hold up the others.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sandbar_host::log::Log;
use sandbar_host::outcome::{Outcome, Termination};
use tokio::sync::{Notify, mpsc};
use tracing::{error, warn};

use crate::app::sealed::keys::Keys;
use crate::app::signals::Signals;
use crate::domain::announced::Announced;
use crate::domain::ids::InvocationId;
use crate::store::queue::{Acked, Finished};
use crate::store::{Error, WorkerStore};
use crate::worker::journal::Journal;
use crate::worker::lease::Lease;

/// Rows of one ack.
const MAX_ROWS: usize = 500;
/// Bytes of output and log in one ack; one attempt may exceed it alone.
const MAX_BYTES: usize = 16 << 20;
/// Ids waiting to be notified about; beyond that waiters find out by polling.
const MAX_NOTIFY: usize = 4096;

/// What was acknowledged and what came too late, for operators.
#[derive(Debug)]
pub struct Counts<'a> {
    /// Ends that the database accepted.
    pub accepted: AtomicU64,
    /// Ends of attempts whose lease was gone; they changed nothing.
    pub late: AtomicU64,
    /// Where each accepted end is written down.
    pub journal: &'a Journal,
}

/// Where ends go. Dropping it lets [`run`] finish what it has and return.
pub type Sender = mpsc::UnboundedSender<Finished>;

/// Acknowledge until the sender is dropped and everything is through, or the lease is lost.
pub async fn run(
    (store, keys): (&WorkerStore, &Keys),
    signals: &Arc<Signals>,
    lease: &Lease,
    mut ends: mpsc::UnboundedReceiver<Finished>,
    unacked: &AtomicU64,
    room: &Notify,
    counts: &Counts<'_>,
) {
    let (notify, heard) = mpsc::channel::<Vec<InvocationId>>(64);
    let notifier = tokio::spawn(notifier(store.clone(), heard));
    let wake = Arc::new(Notify::new());
    let waker = tokio::spawn(waker(store.clone(), wake.clone()));
    let mut waiting: Vec<Finished> = Vec::new();
    loop {
        if waiting.is_empty() && ends.recv_many(&mut waiting, MAX_ROWS).await == 0 {
            break;
        }
        // Up to the bound in bytes; the rest stays for the next turn.
        let mut bytes = 0;
        let fit = waiting
            .iter()
            .position(|end| {
                bytes += size(&end.outcome);
                bytes > MAX_BYTES
            })
            .unwrap_or(waiting.len())
            .max(1);
        let rest = waiting.split_off(fit);
        let batch = std::mem::replace(&mut waiting, rest);
        let size = batch.len() as u64;
        let (done, more) = acknowledge((store, keys), lease, batch, counts).await;
        unacked.fetch_sub(size, Ordering::AcqRel);
        room.notify_one();
        if more {
            signals.ready.announce(&Announced::Any);
            wake.notify_one();
        }
        if !done.is_empty() {
            signals.done(&done);
            let _ = notify.try_send(done); // full: waiters poll
        }
        if !lease.is_held() {
            break;
        }
    }
    drop(notify);
    waker.abort();
    let _ = tokio::time::timeout(Duration::from_secs(2), notifier).await;
}

/// Bytes of an outcome on their way into the database, about.
fn size(outcome: &Outcome) -> usize {
    outcome.output.len()
        + outcome.logs.as_bytes().len()
        + outcome.artifacts.iter().map(|file| file.bytes.len()).sum::<usize>()
}

/// One batch, repeated until the database has said yes or no, or the lease is gone. Returns the invocations that ended,
/// and whether other work has become claimable.
async fn acknowledge(
    (store, keys): (&WorkerStore, &Keys),
    lease: &Lease,
    mut batch: Vec<Finished>,
    counts: &Counts<'_>,
) -> (Vec<InvocationId>, bool) {
    let mut done = Vec::new();
    let mut wake = false;
    let mut wait = Duration::from_millis(20);
    // Once and for all tries: what is sealed looks like any other payload from here on.
    while let Err(error) = keys.seal_ends(&mut batch).await {
        if !lease.is_held() {
            warn!(lost = batch.len(), "lease lost while the database was away");
            return (done, wake);
        }
        warn!(%error, "cannot read data keys; trying again");
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(Duration::from_millis(500));
    }
    let mut pending = vec![batch];
    while let Some(mut batch) = pending.pop() {
        let told = async {
            store.artifacts_put(&batch).await?;
            store.ack(lease.worker(), lease.epoch(), &batch).await
        };
        match told.await {
            Ok(acked) => {
                let accepted = acked.accepted;
                wake |= acked.wake;
                counts.accepted.fetch_add(accepted.len() as u64, Ordering::Relaxed);
                journal_accepted(counts.journal, &batch, &accepted);
                let late = batch.len() - accepted.len();
                if late > 0 {
                    counts.late.fetch_add(late as u64, Ordering::Relaxed);
                    warn!(late, "ends of attempts came after their lease was lost; they changed nothing");
                }
                done.extend(accepted.iter().filter(|a| a.state.is_terminal()).map(|a| a.invocation));
                wait = Duration::from_millis(20);
            }
            Err(Error::Unavailable(error)) => {
                if !lease.is_held() {
                    warn!(lost = batch.len(), "lease lost while the database was away");
                    return (done, wake);
                }
                warn!(%error, "cannot acknowledge; trying again");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(Duration::from_millis(500));
                pending.push(batch);
            }
            // A row that Postgres refuses: find it by halves, so that it alone pays.
            Err(_) if batch.len() > 1 => {
                let tail = batch.split_off(batch.len() / 2);
                pending.push(tail);
                pending.push(batch);
            }
            Err(error) => {
                let Some(end) = batch.pop() else { continue };
                if matches!(end.outcome.termination, Termination::HostFault { .. }) {
                    error!(%error, invocation = %end.claimed.invocation, "an end cannot be stored even without its content; it stays open until this worker leaves");
                    continue;
                }
                error!(%error, invocation = %end.claimed.invocation, "an end cannot be stored; it ends as a host fault");
                pending.push(vec![Finished {
                    outcome: Outcome {
                        termination: Termination::HostFault {
                            // Of a sealed one not a word: who reads it expects it sealed.
                            message: match end.claimed.spec.sealed {
                                None => "the outcome could not be stored".to_owned(),
                                Some(_) => String::new(),
                            },
                        },
                        output: Vec::new(),
                        content_type: String::new(),
                        logs: Log::default(),
                        backtrace: Vec::new(),
                        artifacts: Vec::new(),
                        receipt: end.outcome.receipt,
                    },
                    sealed_log: None,
                    ..end
                }]);
            }
        }
    }
    (done, wake)
}

/// Tell workers of other processes that there may be work, one notification at a time.
async fn waker(store: WorkerStore, wake: Arc<Notify>) {
    loop {
        wake.notified().await;
        if let Err(error) = store.notify_ready().await {
            warn!(%error, "could not notify workers; they find out by polling");
        }
    }
}

fn journal_accepted(journal: &Journal, batch: &[Finished], acked: &[Acked]) {
    if !journal.is_on() {
        return;
    }
    let attempts: HashMap<_, _> =
        batch.iter().map(|end| (end.claimed.invocation, end.claimed.attempt)).collect();
    for one in acked {
        journal.accepted(one.invocation, attempts.get(&one.invocation).copied().unwrap_or(0), one.state);
    }
}

/// Tell other processes, one notification at a time; what gathers meanwhile goes together.
async fn notifier(store: WorkerStore, mut heard: mpsc::Receiver<Vec<InvocationId>>) {
    let mut batches = Vec::new();
    while heard.recv_many(&mut batches, 64).await > 0 {
        let mut ids: Vec<InvocationId> = batches.drain(..).flatten().collect();
        ids.truncate(MAX_NOTIFY);
        if let Err(error) = store.notify_done(&ids).await {
            warn!(%error, "could not notify; waiters will find out by polling");
        }
    }
}
