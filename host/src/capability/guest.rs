//! The way of a question: out of the cell, and the guest waits for the answer. Owns the numbers of questions, what their
//! bytes count against the attempt's memory, and the line in its log for each refusal.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::call::{Answer, Ask, Refusal, RefusalKind};
use crate::outcome::LogLevel;
use crate::output::lock;
use crate::state::{Host, LiveSink};

/// Questions that wait for their answers.
#[derive(Default)]
pub struct Asks {
    next: AtomicU64,
    open: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
}

impl Asks {
    fn open(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<Answer>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The parent has answered; an answer that nobody waits for any more is forgotten.
    pub(crate) fn deliver(&self, call: u64, answer: Answer) {
        let waiting = self.open().remove(&call);
        if let Some(waiting) = waiting {
            let _ = waiting.send(answer);
        }
    }
}

/// A question that is under way. Dropped with the guest, at a deadline for instance, it waits no longer.
struct Waiting<'a> {
    asks: &'a Asks,
    call: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.asks.open().remove(&self.call);
    }
}

/// Puts a question; the answer is none when there comes none any more. `None`: nobody here answers questions.
pub(crate) fn question(
    sink: &Arc<dyn LiveSink>,
    token: u64,
    ask: Ask,
) -> Option<impl Future<Output = Option<Answer>> + Send + use<'_>> {
    let asks = sink.asks()?;
    let call = asks.next.fetch_add(1, Ordering::Relaxed);
    let (sender, answer) = oneshot::channel();
    asks.open().insert(call, sender);
    let waiting = Waiting { asks, call };
    sink.ask(token, call, ask);
    Some(async move {
        let _waiting = waiting;
        answer.await.ok()
    })
}

impl Host {
    /// Asks, and waits. Refusals stand in the attempt's log.
    pub(crate) async fn ask(&mut self, ask: Ask) -> Result<Answer, Refusal> {
        self.common.calls += 1;
        let capability = ask.capability();
        let answer = match self.carry(ask).await {
            Ok(Answer::Refused(refusal)) => Err(refusal),
            other => other,
        };
        if let Err(refusal) = &answer {
            let what = match refusal.kind {
                RefusalKind::Denied => "access denied",
                RefusalKind::Refused => "call refused",
                RefusalKind::Failed => "call failed",
            };
            let message = format!("{what}: {}", refusal.message);
            let target = format!("sandbar.{capability}");
            lock(&self.common.capture).record(LogLevel::Warn, &target, &message, &[]);
        }
        answer
    }

    async fn carry(&mut self, ask: Ask) -> Result<Answer, Refusal> {
        ask.check()?;
        // A guest has one question at a time: the largest so far is what it holds.
        let bytes = ask.held_bytes();
        if bytes > self.asking_bytes {
            let more = bytes - self.asking_bytes;
            if !self.common.limiter.hold(more) {
                return Err(Refusal::failed(format!(
                    "the attempt has no {more} bytes of memory left for the buffers of this call"
                )));
            }
            self.asking_bytes = bytes;
        }
        let Some(answer) =
            self.asker.as_ref().and_then(|sink| question(sink, self.common.control.token, ask))
        else {
            return Err(Refusal::denied("nobody here answers calls of capabilities"));
        };
        answer.await.ok_or_else(|| Refusal::failed("the worker ended the call"))
    }
}
