//! The parent's side of a cell: starts the process, sends attempts and code, receives outcomes.
//! Owns the book of what is loaded in the cell, so that no attempt is ever sent before its code.
//! What to do about attempts of a cell that died is the caller's decision.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};
use tokio::sync::{Notify, mpsc, oneshot};

use super::large::Large;
use super::present::{Present, Use};
use super::protocol::{
    CODE_CHUNK_BYTES, Configure, FromCell, HEADER_BYTES, Limit, MAX_CODE_BYTES, MAX_TENANTS, Packer,
    ProtocolError, ToCell, VERSION, frame_len, is_large, unpack,
};
use super::{CellConfig, MAX_FRAME_BYTES, MAX_SLOTS, MIN_FRAME_BYTES, SUBCOMMAND};
use crate::artifact::Artifact;
use crate::capability::call::{Answer, Ask};
use crate::control::{CancelReason, Progress};
use crate::egress::call::{FromGuest, ToGuest};
use crate::log::Log;
use crate::module::ModuleHash;
use crate::outcome::Outcome;
use crate::recheck::{self, Sent};
use crate::run::Attempt;
use crate::walls::Walls;

/// From start to ready.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// Frames of events that wait for a slow consumer before the cell is made to wait.
const MAX_WAITING_FRAMES: usize = 16;
/// Bytes that are read at once where no frame says that there are more.
const READ_BYTES: usize = 64 << 10;
/// Buffers that have grown beyond this are not kept.
pub(super) const HUGE_BYTES: usize = 4 << 20;
/// Attempts that may be in the cell for each slot it has; more would only wait there.
const MAX_QUEUE_PER_SLOT: usize = 4;
/// After the cell stopped reading: the wait for the outcomes it had sent.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long a killed process may take to be collected.
const REAP_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a cell is ended that says what it may not.
const BROKEN: &str = "it broke the protocol";

/// What a cell reports.
#[derive(Debug)]
pub enum CellEvent {
    /// An attempt ended.
    Finished {
        /// The caller's name for it.
        token: u64,
        /// How it ended.
        outcome: Box<Outcome>,
    },
    /// A guest reported progress.
    Progress {
        /// The caller's name for the attempt.
        token: u64,
        /// The latest report.
        progress: Progress,
    },
    /// A running attempt logged. Its outcome brings these records again. A cell that has been taken over may say
    /// anything here.
    Log {
        /// The caller's name for the attempt.
        token: u64,
        /// Number of the first of them in the attempt's log, from 0.
        first: u32,
        /// In order.
        log: Log,
    },
    /// A guest says something about an HTTP call. A cell that has been taken over may say anything here, also for any
    /// attempt that is in it.
    Http {
        /// The caller's name for the attempt, which may have ended.
        token: u64,
        /// The cell's number of the call.
        call: u64,
        /// What.
        message: FromGuest,
    },
    /// A guest asks something by a capability, and waits. The same goes for a cell that has been taken over.
    Ask {
        /// The caller's name for the attempt, which may have ended.
        token: u64,
        /// The cell's number of the question.
        call: u64,
        /// What.
        ask: Ask,
    },
    /// What tenants used since the last such event, as far as it is believed.
    Used(Vec<Use>),
    /// The process ended or broke the protocol. The last event. Attempts without an outcome are
    /// lost.
    Gone {
        /// For operators.
        reason: String,
    },
}

/// The process is not there any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the cell is gone")]
pub struct CellGone;

/// An attempt was not taken. It was not sent either.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The process is not there any more.
    #[error("the cell is gone")]
    Gone,
    /// Its code is not in the cell (any more): load it and submit again.
    #[error("the module is not loaded in the cell")]
    NotLoaded,
    /// The cell has as many attempts as it takes: wait for an outcome.
    #[error("the cell is full")]
    Full,
    /// An attempt with this token is in the cell.
    #[error("the token is in use")]
    TokenInUse,
    /// The attempt does not fit a frame.
    #[error("the attempt is larger than a frame")]
    TooLarge,
}

/// Code was not loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The process is not there any more.
    #[error("the cell is gone")]
    Gone,
    /// The cell's engine does not take it.
    #[error("the cell cannot load the module: {0}")]
    Refused(String),
}

/// Events of one cell, ending with [`CellEvent::Gone`].
pub struct CellEvents {
    frames: mpsc::Receiver<Vec<CellEvent>>,
    /// The rest of a frame.
    rest: std::vec::IntoIter<CellEvent>,
}

impl CellEvents {
    /// The next event; none after [`CellEvent::Gone`].
    pub async fn recv(&mut self) -> Option<CellEvent> {
        loop {
            if let Some(event) = self.rest.next() {
                return Some(event);
            }
            self.rest = self.frames.recv().await?.into_iter();
        }
    }

    /// The next events, as many as came together; none after [`CellEvent::Gone`].
    pub async fn recv_all(&mut self) -> Option<Vec<CellEvent>> {
        if self.rest.len() > 0 {
            return Some(std::mem::take(&mut self.rest).collect());
        }
        self.frames.recv().await
    }
}

/// A running cell. Dropping it kills the process.
pub struct Cell {
    shared: Arc<Shared>,
    pid: u32,
    walls: Walls,
}

pub(super) struct Shared {
    gone: AtomicBool,
    /// Something waits for the writer.
    filled: Notify,
    kill: Notify,
    /// A large frame was not as it should be.
    pub(super) broken: Notify,
    max_attempts: usize,
    code_cache_bytes: u64,
    book: Mutex<Book>,
}

/// What is in the cell, and what is on its way there.
struct Book {
    out: Packer,
    attempts: HashMap<u64, Out>,
    tenants: Present,
    modules: HashMap<ModuleHash, Module>,
    code_bytes: u64,
    clock: u64,
}

/// An attempt in the cell.
struct Out {
    module: ModuleHash,
    tenant: u64,
    sent: Sent,
}

struct Module {
    bytes: u64,
    attempts: usize,
    used: u64,
    /// Present until the cell has answered.
    waiting: Option<Vec<oneshot::Sender<Result<(), LoadError>>>>,
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// An attempt ended; what was remembered of it, unless it was not there.
    pub(super) fn finished(&self, token: u64) -> Option<Sent> {
        self.book().finished(token)
    }

    /// What is remembered of an attempt for what it logs while it runs.
    pub(super) fn live(&self, token: u64) -> Option<Sent> {
        self.book().attempts.get(&token).map(|out| out.sent.clone())
    }

    /// Remembers that it logged.
    pub(super) fn logged(&self, token: u64, sent: Sent) {
        if let Some(out) = self.book().attempts.get_mut(&token) {
            out.sent = sent;
        }
    }
}

impl Cell {
    /// Starts a cell and waits until it is ready, at most 10 s. Needs a Tokio runtime.
    ///
    /// # Errors
    /// The process cannot be started, or does not answer as it should.
    pub async fn spawn(config: &CellConfig) -> io::Result<(Self, CellEvents)> {
        let (ours, theirs) = StdUnixStream::pair()?;
        let (large, large_theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut child = Command::new(&config.program)
            .arg(SUBCOMMAND)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .stdout(Stdio::from(std::os::fd::OwnedFd::from(large_theirs)))
            .stderr(Stdio::inherit())
            // Ctrl-C in a terminal is for the parent, which ends its children in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let pid = child.id().ok_or_else(|| io::Error::other("the cell ended at once"))?;
        let max_frame = config.max_frame_bytes.clamp(MIN_FRAME_BYTES, MAX_FRAME_BYTES);
        let (reader, mut writer) = UnixStream::from_std(ours)?.into_split();
        let mut input = Input { reader, max_frame, buffer: BytesMut::new() };
        let slots = config.slots.clamp(1, MAX_SLOTS);
        let threads = u32::try_from(config.threads.clamp(1, 256)).unwrap_or(1);
        let hello = async {
            let mut packer = Packer::new(max_frame);
            packer
                .push(&ToCell::Configure(Configure {
                    version: VERSION,
                    threads,
                    slots,
                    warm_slots: config.warm_slots.min(slots),
                    report_use: config.report_use,
                    max_frame_bytes: max_frame as u64,
                }))
                .map_err(protocol)?;
            writer.write_all(&packer.take(Vec::new())).await?;
            let mut messages = Vec::new();
            if let Some(frame) = input.frame().await? {
                messages_of(&frame, &mut messages)?;
            }
            let [FromCell::Ready(walls)] = messages.as_slice() else {
                return Err(io::Error::other("the cell did not get ready"));
            };
            let walls = *walls;
            match walls.missing(config.require_walls) {
                missing if missing.is_empty() => Ok(walls),
                missing => Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!("this kernel does not grant cells the required walls: {}", missing.join(", ")),
                )),
            }
        };
        let walls = match tokio::time::timeout(READY_TIMEOUT, hello).await {
            Ok(Ok(walls)) => walls,
            Ok(Err(err)) => {
                let end = end_of(&mut child).await;
                return Err(io::Error::new(err.kind(), format!("{err}; {end}")));
            }
            Err(_) => {
                let end = end_of(&mut child).await;
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("the cell was not ready in time; {end}"),
                ));
            }
        };
        let shared = Arc::new(Shared {
            gone: AtomicBool::new(false),
            filled: Notify::new(),
            kill: Notify::new(),
            broken: Notify::new(),
            max_attempts: (slots as usize).saturating_mul(MAX_QUEUE_PER_SLOT),
            code_cache_bytes: config.code_cache_bytes,
            book: Mutex::new(Book {
                out: Packer::new(max_frame),
                attempts: HashMap::new(),
                tenants: Present::new(threads, Instant::now()),
                modules: HashMap::new(),
                code_bytes: 0,
                clock: 0,
            }),
        });
        let (events, frames) = mpsc::channel(MAX_WAITING_FRAMES);
        let large = Large::start(shared.clone(), events.clone(), large, max_frame)?;
        tokio::spawn(supervise(shared.clone(), child, input, writer, events, large));
        Ok((Self { shared, pid, walls }, CellEvents { frames, rest: Vec::new().into_iter() }))
    }

    /// Makes sure that the code of a module is in the cell; sends it at most once while it stays
    /// there. Other modules that no attempt uses may be unloaded for it.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub async fn load(&self, artifact: &Artifact) -> Result<(), LoadError> {
        if artifact.bytes.len() as u64 > MAX_CODE_BYTES {
            return Err(LoadError::Refused("the code is too large".to_owned()));
        }
        let answer = {
            let mut book = self.shared.book();
            if self.shared.is_gone() {
                return Err(LoadError::Gone);
            }
            let answer = book.load(artifact, self.shared.code_cache_bytes);
            match answer {
                None => return Ok(()),
                Some(answer) => answer,
            }
        };
        self.shared.filled.notify_one();
        answer.await.unwrap_or(Err(LoadError::Gone))
    }

    /// Sends an attempt. Whatever is submitted before the writer is free shares one write.
    ///
    /// # Errors
    /// See [`SubmitError`]; the attempt was not sent then.
    pub fn submit(&self, token: u64, attempt: &Attempt) -> Result<(), SubmitError> {
        {
            let mut book = self.shared.book();
            if self.shared.is_gone() {
                return Err(SubmitError::Gone);
            }
            book.submit(token, attempt, self.shared.max_attempts)?;
        }
        self.shared.filled.notify_one();
        Ok(())
    }

    /// Ends an attempt; its outcome comes as an event like any other.
    pub fn cancel(&self, token: u64, why: CancelReason) {
        {
            let mut book = self.shared.book();
            if !book.attempts.contains_key(&token) {
                return;
            }
            let _ = book.out.push(&ToCell::Cancel { token, why });
        }
        self.shared.filled.notify_one();
    }

    /// Says something about an HTTP call of a guest. Once the cell is gone nobody hears it.
    pub fn http(&self, call: u64, message: ToGuest) {
        {
            let mut book = self.shared.book();
            if self.shared.is_gone() {
                return;
            }
            let _ = book.out.push(&ToCell::Http { call, message });
        }
        self.shared.filled.notify_one();
    }

    /// Answers a question of a guest. Once the cell is gone nobody hears it.
    pub fn answer(&self, call: u64, answer: Answer) {
        {
            let mut book = self.shared.book();
            if self.shared.is_gone() {
                return;
            }
            let _ = book.out.push(&ToCell::Answer { call, answer });
        }
        self.shared.filled.notify_one();
    }

    /// Says on how many threads at once tenants may run for the next 50 ms; who is not named, on all. At most
    /// [`MAX_TENANTS`] are heard.
    pub fn limit(&self, mut limits: Vec<Limit>) {
        limits.truncate(MAX_TENANTS);
        {
            let mut book = self.shared.book();
            if self.shared.is_gone() {
                return;
            }
            let _ = book.out.push(&ToCell::Limits(limits));
        }
        self.shared.filled.notify_one();
    }

    /// Kills the process. [`CellEvent::Gone`] follows.
    pub fn kill(&self) {
        self.shared.kill.notify_one();
    }

    /// Process id.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// The walls that stand around the process.
    #[must_use]
    pub const fn walls(&self) -> Walls {
        self.walls
    }

    /// Attempts in the cell, running or waiting there.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.shared.book().attempts.len()
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Book {
    /// None if the code is in the cell; otherwise where the cell's answer will come.
    fn load(
        &mut self,
        artifact: &Artifact,
        max_bytes: u64,
    ) -> Option<oneshot::Receiver<Result<(), LoadError>>> {
        self.clock += 1;
        if let Some(module) = self.modules.get_mut(&artifact.hash) {
            module.used = self.clock;
            let waiting = module.waiting.as_mut()?;
            let (tell, answer) = oneshot::channel();
            waiting.push(tell);
            return Some(answer);
        }
        let bytes = artifact.bytes.len() as u64;
        self.make_room(bytes, max_bytes);
        let (tell, answer) = oneshot::channel();
        let sent = self.send_code(artifact);
        if let Err(err) = sent {
            let _ = tell.send(Err(LoadError::Refused(err.to_string())));
            return Some(answer);
        }
        self.code_bytes += bytes;
        self.modules.insert(
            artifact.hash,
            Module { bytes, attempts: 0, used: self.clock, waiting: Some(vec![tell]) },
        );
        Some(answer)
    }

    fn send_code(&mut self, artifact: &Artifact) -> Result<(), ProtocolError> {
        self.out.push(&ToCell::Load { hash: artifact.hash, bytes: artifact.bytes.len() as u64 })?;
        for piece in artifact.bytes.chunks(CODE_CHUNK_BYTES) {
            self.out.push_code(piece)?;
        }
        Ok(())
    }

    /// Unloads the least recently used modules that no attempt needs.
    fn make_room(&mut self, bytes: u64, max_bytes: u64) {
        while self.code_bytes.saturating_add(bytes) > max_bytes {
            let Some(hash) = self
                .modules
                .iter()
                .filter(|(_, module)| module.attempts == 0 && module.waiting.is_none())
                .min_by_key(|(_, module)| module.used)
                .map(|(hash, _)| *hash)
            else {
                return;
            };
            if self.out.push(&ToCell::Unload(hash)).is_err() {
                return;
            }
            self.forget(&hash);
        }
    }

    fn forget(&mut self, hash: &ModuleHash) -> Option<Module> {
        let module = self.modules.remove(hash)?;
        self.code_bytes = self.code_bytes.saturating_sub(module.bytes);
        Some(module)
    }

    fn submit(&mut self, token: u64, attempt: &Attempt, max: usize) -> Result<(), SubmitError> {
        if self.attempts.len() >= max {
            return Err(SubmitError::Full);
        }
        if self.attempts.contains_key(&token) {
            return Err(SubmitError::TokenInUse);
        }
        self.clock += 1;
        let clock = self.clock;
        let Some(module) = self.modules.get_mut(&attempt.module) else {
            return Err(SubmitError::NotLoaded);
        };
        self.out.push_attempt(token, attempt).map_err(|_| SubmitError::TooLarge)?;
        module.attempts += 1;
        module.used = clock;
        self.tenants.came(attempt.tenant, attempt.weight, Instant::now());
        let out = Out { module: attempt.module, tenant: attempt.tenant, sent: Sent::new(attempt) };
        self.attempts.insert(token, out);
        Ok(())
    }

    /// An attempt ended; what was remembered of it, unless it was not there.
    fn finished(&mut self, token: u64) -> Option<Sent> {
        let out = self.attempts.remove(&token)?;
        self.tenants.ended(out.tenant, Instant::now());
        if let Some(module) = self.modules.get_mut(&out.module) {
            module.attempts = module.attempts.saturating_sub(1);
        }
        Some(out.sent)
    }

    /// The cell answered about a module; false if it was not asked.
    fn loaded(&mut self, hash: &ModuleHash, result: &Result<(), LoadError>) -> bool {
        let Some(waiting) = self.modules.get_mut(hash).and_then(|module| module.waiting.take()) else {
            return false;
        };
        if result.is_err() {
            self.forget(hash);
        }
        for tell in waiting {
            let _ = tell.send(result.clone());
        }
        true
    }
}

/// The receiving half.
struct Input {
    reader: OwnedReadHalf,
    max_frame: usize,
    /// Read and not unpacked.
    buffer: BytesMut,
}

impl Input {
    /// Reads one frame; `None` at the end of the stream. What comes behind it in the same moment is read with it and kept
    /// for the next call.
    async fn frame(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            let mut missing = READ_BYTES;
            if let Some(header) = self.buffer.first_chunk::<HEADER_BYTES>() {
                let whole = HEADER_BYTES + frame_len(*header, self.max_frame).map_err(protocol)?;
                if self.buffer.len() >= whole {
                    let mut frame = self.buffer.split_to(whole).freeze();
                    frame.advance(HEADER_BYTES);
                    // A buffer that once was huge is not kept.
                    if whole > HUGE_BYTES && self.buffer.is_empty() {
                        self.buffer = BytesMut::new();
                    }
                    return Ok(Some(frame));
                }
                missing = missing.max(whole - self.buffer.len());
            }
            self.buffer.reserve(missing);
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                if self.buffer.is_empty() {
                    return Ok(None);
                }
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// Adds the messages of a frame.
fn messages_of(frame: &[u8], messages: &mut Vec<FromCell>) -> io::Result<()> {
    unpack::<FromCell>(frame, |message| messages.push(message)).map_err(protocol)
}

fn protocol(err: ProtocolError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, err)
}

/// Everything that goes on with one cell, until it is gone.
async fn supervise(
    shared: Arc<Shared>,
    mut child: Child,
    input: Input,
    writer: OwnedWriteHalf,
    events: mpsc::Sender<Vec<CellEvent>>,
    large: Large,
) {
    let why = tokio::select! {
        why = receive(&shared, input, &events) => why,
        why = send(&shared, writer) => why,
        () = shared.broken.notified() => BROKEN.to_owned(),
        () = shared.kill.notified() => "it was killed by its worker".to_owned(),
    };
    shared.gone.store(true, Ordering::Release);
    let waiting: Vec<_> = {
        let mut book = shared.book();
        book.code_bytes = 0;
        book.out.take(Vec::new());
        book.modules.drain().filter_map(|(_, module)| module.waiting).flatten().collect()
    };
    for tell in waiting {
        let _ = tell.send(Err(LoadError::Gone));
    }
    let end = end_of(&mut child).await;
    // What the cell had sent counts, also when it is gone.
    large.finish().await;
    shared.book().attempts.clear();
    let reason = format!("{why}; {end}");
    let _ = events.send(vec![CellEvent::Gone { reason }]).await;
}

async fn receive(shared: &Shared, mut input: Input, events: &mpsc::Sender<Vec<CellEvent>>) -> String {
    let mut messages = Vec::new();
    loop {
        let read = match input.frame().await {
            Ok(Some(frame)) => messages_of(&frame, &mut messages),
            Ok(None) => return "it closed its socket".to_owned(),
            Err(err) => Err(err),
        };
        if let Err(err) = read {
            return format!("its socket: {err}");
        }
        if !note(shared, &mut messages) {
            return BROKEN.to_owned();
        }
        let frame: Vec<_> = messages.drain(..).filter_map(|message| event(shared, message)).collect();
        if !frame.is_empty() && events.send(frame).await.is_err() {
            return "nobody listens to it".to_owned();
        }
    }
}

/// What the consumer hears of a message.
fn event(shared: &Shared, message: FromCell) -> Option<CellEvent> {
    Some(match message {
        FromCell::Finished { token, outcome } => CellEvent::Finished { token, outcome },
        FromCell::Progress { token, progress } => CellEvent::Progress { token, progress },
        FromCell::Http { token, call, message } => CellEvent::Http { token, call, message },
        FromCell::Ask { token, call, ask } => CellEvent::Ask { token, call, ask },
        FromCell::Used(report) => CellEvent::Used(shared.book().tenants.believe(&report, Instant::now())),
        FromCell::Ready(_) | FromCell::Loaded(_) | FromCell::NotLoaded { .. } | FromCell::Log { .. } => {
            return None;
        }
    })
}

/// Enters what a frame says into the book, and brings it under the limits of its attempt; false if it says what a cell
/// may not say.
fn note(shared: &Shared, messages: &mut [FromCell]) -> bool {
    let mut book = shared.book();
    messages.iter_mut().all(|message| match message {
        // The first is said before, the second by the other socket.
        FromCell::Ready(_) | FromCell::Log { .. } => false,
        FromCell::Loaded(hash) => book.loaded(hash, &Ok(())),
        FromCell::NotLoaded { hash, message } => book.loaded(hash, &Err(LoadError::Refused(message.clone()))),
        // A large one has its own socket, so that reading it is in nobody's way.
        FromCell::Finished { token, outcome } => {
            !is_large(outcome) && book.finished(*token).map(|sent| sent.outcome(outcome)).is_some()
        }
        // A call is let go of a little later than its attempt ends, and a large outcome may overtake what was said before it.
        FromCell::Http { .. } | FromCell::Ask { .. } => true,
        FromCell::Used(report) => report.len() <= MAX_TENANTS,
        FromCell::Progress { progress, .. } => {
            recheck::progress(&mut progress.message);
            true
        }
    })
}

async fn send(shared: &Shared, mut writer: OwnedWriteHalf) -> String {
    let mut spare = Vec::new();
    loop {
        let bytes = shared.book().out.take(spare);
        if bytes.is_empty() {
            spare = bytes;
            shared.filled.notified().await;
            continue;
        }
        if let Err(err) = writer.write_all(&bytes).await {
            // What it said before it died is still to be read, and that ends this wait early.
            tokio::time::sleep(LAST_WORDS).await;
            return format!("its socket: {err}");
        }
        spare = if bytes.capacity() <= HUGE_BYTES { bytes } else { Vec::new() };
    }
}

/// Kills the process if it still runs, and says how it ended.
async fn end_of(child: &mut Child) -> String {
    // A process that is ending by itself tells more by its own status than by our signal.
    let own = tokio::time::timeout(Duration::from_millis(100), child.wait()).await;
    let ended = match own {
        Ok(ended) => ended,
        Err(_) => {
            let _ = child.start_kill();
            match tokio::time::timeout(REAP_TIMEOUT, child.wait()).await {
                Ok(ended) => ended,
                Err(_) => return "the process does not end".to_owned(),
            }
        }
    };
    match ended {
        Ok(status) => describe(status),
        Err(err) => format!("its status cannot be had: {err}"),
    }
}

fn describe(status: ExitStatus) -> String {
    format!("the process ended with {status}")
}
