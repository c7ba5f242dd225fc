//! Large outcomes of one cell, unpacked on a thread of the lowest priority: thousands of log lines take milliseconds, and
//! nobody's guests are to wait for somebody's flood. Owns that thread; what is believed of an outcome is `client`'s.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::client::{CellEvent, Shared};
use super::protocol::{FromCell, unpack};

/// Frames that wait for the thread before the cell is made to wait, besides the one in its hands.
const MAX_WAITING: usize = 1;
/// How long the thread may take with what waits when the cell is gone.
const LAST_FRAMES: Duration = Duration::from_secs(5);
/// Below guests: what they can do at the same time, they do first.
const NICE: i32 = 19;

/// The thread, from the first large outcome on.
pub(super) struct Large {
    shared: Arc<Shared>,
    events: mpsc::Sender<Vec<CellEvent>>,
    thread: Option<Thread>,
}

struct Thread {
    frames: mpsc::Sender<Bytes>,
    /// Dropped when it ends.
    done: oneshot::Receiver<()>,
}

impl Large {
    pub(super) fn new(shared: Arc<Shared>, events: mpsc::Sender<Vec<CellEvent>>) -> Self {
        Self { shared, events, thread: None }
    }

    /// Hand a frame over; waits while another one waits.
    ///
    /// # Errors
    /// There is no thread to be had, or it has ended: an earlier frame was not as it should be, or nobody listens.
    pub(super) async fn unpack(&mut self, frame: Bytes) -> io::Result<()> {
        if self.thread.is_none() {
            let (frames, waiting) = mpsc::channel(MAX_WAITING);
            let (tell, done) = oneshot::channel();
            let (shared, events) = (self.shared.clone(), self.events.clone());
            std::thread::Builder::new().name("sandbar-large".to_owned()).spawn(move || {
                let _ended = tell;
                if !run(&shared, waiting, &events) {
                    shared.broken.notify_one();
                }
            })?;
            self.thread = Some(Thread { frames, done });
        }
        let sent = match &self.thread {
            Some(thread) => thread.frames.send(frame).await.is_ok(),
            None => false,
        };
        if sent { Ok(()) } else { Err(io::Error::other("nobody unpacks its large frames")) }
    }

    /// Wait until everything that was handed over is unpacked and said, for a while.
    pub(super) async fn finish(self) {
        if let Some(Thread { frames, done }) = self.thread {
            drop(frames);
            let _ = tokio::time::timeout(LAST_FRAMES, done).await;
        }
    }
}

/// Until no more frames come; false: one was not as it should be.
fn run(
    shared: &Arc<Shared>,
    mut frames: mpsc::Receiver<Bytes>,
    events: &mpsc::Sender<Vec<CellEvent>>,
) -> bool {
    // On Linux this is the niceness of the thread alone.
    let _ = rustix::process::nice(NICE);
    while let Some(frame) = frames.blocking_recv() {
        let (mut first, mut more) = (None, false);
        let read = unpack::<FromCell>(&frame, |message| {
            more |= first.is_some();
            first = Some(message);
        });
        drop(frame);
        let (Ok(()), Some(FromCell::Large { token, mut outcome }), false) = (read, first, more) else {
            return false;
        };
        let Some(sent) = shared.finished(token) else { return false };
        sent.outcome(&mut outcome);
        if events.blocking_send(vec![CellEvent::Finished { token, outcome }]).is_err() {
            return true;
        }
    }
    true
}
