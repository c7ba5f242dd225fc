//! Large outcomes of one cell, and what its attempts log while they run: they come by a socket of their own and are read
//! and checked on a thread that yields to guests. Thousands of log lines take milliseconds, and nobody's guests are to
//! wait for somebody's flood. Owns that thread; what is believed is `recheck`'s.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::client::{CellEvent, HUGE_BYTES, Shared};
use super::protocol::{FromCell, read_frame, unpack};

/// How long the thread may take with what waits when the cell is gone.
const LAST_FRAMES: Duration = Duration::from_secs(5);
/// Niceness of the threads, here and in the cell, that have to do with large outcomes: beside guests (10) they get a
/// third of what those get.
pub(super) const NICE: i32 = 15;

/// The thread.
pub(super) struct Large {
    socket: UnixStream,
    /// Dropped when it ends.
    done: oneshot::Receiver<()>,
}

impl Large {
    /// Read until the cell is gone, or breaks the rules: then `shared.broken` is told.
    ///
    /// # Errors
    /// There is no thread or no descriptor to be had.
    pub(super) fn start(
        shared: Arc<Shared>,
        events: mpsc::Sender<Vec<CellEvent>>,
        socket: UnixStream,
        max_frame: usize,
    ) -> io::Result<Self> {
        let mut reading = socket.try_clone()?;
        let (tell, done) = oneshot::channel();
        std::thread::Builder::new().name("sandbar-large".to_owned()).spawn(move || {
            let _ended: oneshot::Sender<()> = tell;
            // On Linux this is the niceness of the thread alone.
            let _ = rustix::process::nice(NICE);
            if !run(&shared, &mut reading, max_frame, &events) {
                shared.broken.notify_one();
            }
        })?;
        Ok(Self { socket, done })
    }

    /// Wait, for a while, until everything that the cell had sent is said. The cell is gone.
    pub(super) async fn finish(self) {
        // What is there is still read, and nothing more is waited for, whoever else may hold the other end.
        let _ = self.socket.shutdown(Shutdown::Read);
        let _ = tokio::time::timeout(LAST_FRAMES, self.done).await;
    }
}

/// Until no more frames come; false: one was not as it should be.
fn run(
    shared: &Shared,
    socket: &mut UnixStream,
    max_frame: usize,
    events: &mpsc::Sender<Vec<CellEvent>>,
) -> bool {
    let mut frame = Vec::new();
    loop {
        match read_frame(socket, max_frame, &mut frame) {
            Ok(true) => {}
            Err(err) if err.kind() == io::ErrorKind::InvalidData => return false,
            // The end of the cell, in the midst of a frame or not, is noticed elsewhere.
            Ok(false) | Err(_) => return true,
        }
        let (mut first, mut more) = (None, false);
        let read = unpack::<FromCell>(&frame, |message| {
            more |= first.is_some();
            first = Some(message);
        });
        let event = match (read, first, more) {
            (Ok(()), Some(FromCell::Finished { token, mut outcome }), false) => {
                let Some(sent) = shared.finished(token) else { return false };
                sent.outcome(&mut outcome);
                CellEvent::Finished { token, outcome }
            }
            (Ok(()), Some(FromCell::Log { token, first, mut log }), false) => {
                // A small outcome may have come by the other socket meanwhile: it has said all of this.
                let Some(mut sent) = shared.live(token) else { continue };
                sent.log(&mut log);
                shared.logged(token, sent);
                CellEvent::Log { token, first, log }
            }
            _ => return false,
        };
        if events.blocking_send(vec![event]).is_err() {
            return true;
        }
        if frame.capacity() > HUGE_BYTES {
            frame = Vec::new();
        }
    }
}
