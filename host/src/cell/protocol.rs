//! What a parent and a cell say to each other: frames of a little-endian `u32` length and a run of
//! postcard messages. Owns encoding and its bounds; a length is checked before anything is allocated.

use std::io::{self, Read};
use std::time::Duration;

use postcard::ser_flavors::Flavor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::blob;
use crate::capability::call::{Answer, Ask};
use crate::control::{CancelReason, Progress};
use crate::egress::call::{FromGuest, ToGuest};
use crate::files::File;
use crate::log::Log;
use crate::module::ModuleHash;
use crate::outcome::{Frame, Outcome, Receipt, Termination, TrapKind};
use crate::run::Attempt;
use crate::walls::Walls;

/// Version of the protocol; the child refuses another.
pub const VERSION: u32 = 9;
/// Bytes of a frame's length.
pub const HEADER_BYTES: usize = 4;
/// A frame that has reached this size is closed and a new one begun.
const SOFT_FRAME_BYTES: usize = 256 << 10;
/// Bytes of log and results from which an outcome is large.
const LARGE_BYTES: usize = 32 << 10;
/// Bytes of compiled code in one message.
pub const CODE_CHUNK_BYTES: usize = 1 << 20;
/// Bytes of compiled code a cell accepts for one module.
pub const MAX_CODE_BYTES: u64 = 512 << 20;

/// From the parent.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToCell {
    /// First message, once.
    Configure(Configure),
    /// Compiled code of a module follows.
    Load {
        /// Of which module.
        hash: ModuleHash,
        /// Bytes in all.
        bytes: u64,
    },
    /// The next piece of the code.
    Code(#[serde(with = "blob")] Vec<u8>),
    /// The module is not needed until it is loaded again.
    Unload(ModuleHash),
    /// Run this.
    Submit {
        /// The parent's name for the attempt.
        token: u64,
        /// What to run.
        attempt: Box<Attempt>,
    },
    /// End this.
    Cancel {
        /// Which attempt.
        token: u64,
        /// Why.
        why: CancelReason,
    },
    /// About an HTTP call of a guest.
    Http {
        /// The cell's number of the call.
        call: u64,
        /// What.
        message: ToGuest,
    },
    /// The answer to a question of a guest.
    Answer {
        /// The cell's number of the question.
        call: u64,
        /// What.
        answer: Answer,
    },
    /// On how many threads at once tenants may run here for the next [`LIMITS_FOR`]; who is not named, on all. Replaces what
    /// was said before.
    Limits(Vec<Limit>),
}

/// How long limits hold when no others come: whatever happens to the parent, nobody stands still for longer.
pub const LIMITS_FOR: Duration = Duration::from_millis(50);
/// Tenants in one message about limits or use.
pub const MAX_TENANTS: usize = 4_096;

/// On how many threads a tenant may run at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Who, as in [`Attempt::tenant`].
    pub tenant: u64,
    /// On how many; 0: on none.
    pub threads: u32,
}

/// What a tenant's attempts in a cell used since the last report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Used {
    /// Who, as in [`Attempt::tenant`].
    pub tenant: u64,
    /// CPU time in nanoseconds.
    pub cpu_ns: u64,
    /// Attempts that could go on at once when it was counted.
    pub runnable: u32,
}

/// Numbers of the variants of [`ToCell`] that are sent without copying what they carry: postcard
/// writes a variant as its number and its fields, so a tuple that begins with the number is the same.
const CODE: u32 = 2;
/// See [`CODE`].
const SUBMIT: u32 = 4;

/// Borrowed bytes that serialize as one run.
struct Bytes<'a>(&'a [u8]);

impl Serialize for Bytes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        blob::serialize(self.0, serializer)
    }
}

/// What a cell is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configure {
    /// [`VERSION`].
    pub version: u32,
    /// Threads that run guests.
    pub threads: u32,
    /// Attempts at the same time.
    pub slots: u32,
    /// Slots that stay warm while unused.
    pub warm_slots: u32,
    /// Say what tenants use.
    pub report_use: bool,
    /// Bytes of one frame, both ways.
    pub max_frame_bytes: u64,
}

/// From the cell.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromCell {
    /// Configured; attempts may come. With the walls that stand around the process.
    Ready(Walls),
    /// A module is loaded.
    Loaded(ModuleHash),
    /// A module cannot be loaded.
    NotLoaded {
        /// Which.
        hash: ModuleHash,
        /// Why.
        message: String,
    },
    /// An attempt ended. By the second socket if it has much to tell ([`is_large`]).
    Finished {
        /// Which.
        token: u64,
        /// How.
        #[serde(with = "outcome")]
        outcome: Box<Outcome>,
    },
    /// A guest reported progress.
    Progress {
        /// Which attempt.
        token: u64,
        /// The latest report.
        progress: Progress,
    },
    /// A running attempt logged. Its outcome brings these records again. By the second socket.
    Log {
        /// Which attempt.
        token: u64,
        /// Number of the first of them in the attempt's log, from 0.
        first: u32,
        /// In order.
        #[serde(with = "lines")]
        log: Log,
    },
    /// A guest says something about an HTTP call.
    Http {
        /// Of which attempt. It may have ended.
        token: u64,
        /// The cell's number of the call; never used twice.
        call: u64,
        /// What.
        message: FromGuest,
    },
    /// A guest asks something by a capability.
    Ask {
        /// Of which attempt. It may have ended.
        token: u64,
        /// The cell's number of the question; never used twice.
        call: u64,
        /// What.
        ask: Ask,
    },
    /// What tenants used since the last report; at most [`MAX_TENANTS`] of them.
    Used(Vec<Used>),
}

/// Whether an outcome goes by the second socket, and by that only. By what it is, not by what its receipt counts: a log of
/// empty lines counts no bytes.
#[must_use]
pub fn is_large(outcome: &Outcome) -> bool {
    let files: usize = outcome.artifacts.iter().map(|file| file.path.len() + file.bytes.len()).sum();
    outcome.logs.as_bytes().len() + outcome.output.len() + files >= LARGE_BYTES
}

/// A frame or message that cannot be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A frame that is longer than agreed.
    #[error("a frame of {len} bytes; at most {max} are allowed")]
    TooLong {
        /// Announced or needed.
        len: usize,
        /// Agreed.
        max: usize,
    },
    /// Bytes that are no message.
    #[error("malformed message: {0}")]
    Malformed(String),
}

/// Checks an announced length.
///
/// # Errors
/// It is more than `max`.
pub fn frame_len(header: [u8; HEADER_BYTES], max: usize) -> Result<usize, ProtocolError> {
    let len = u32::from_le_bytes(header) as usize;
    if len > max {
        return Err(ProtocolError::TooLong { len, max });
    }
    Ok(len)
}

/// Reads one frame without its length; false at the end of the stream.
///
/// # Errors
/// The stream breaks off or fails; [`io::ErrorKind::InvalidData`]: the frame is longer than `max`.
pub(super) fn read_frame(input: &mut impl Read, max: usize, frame: &mut Vec<u8>) -> io::Result<bool> {
    let mut header = [0u8; HEADER_BYTES];
    match input.read_exact(&mut header) {
        Ok(()) => {}
        Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        Err(err) => return Err(err),
    }
    let len = frame_len(header, max).map_err(|err| io::Error::new(io::ErrorKind::InvalidData, err))?;
    frame.clear();
    frame.resize(len, 0);
    input.read_exact(frame)?;
    Ok(true)
}

/// Messages on their way, packed into as few frames as sensible.
#[derive(Debug)]
pub struct Packer {
    bytes: Vec<u8>,
    messages: usize,
    /// Where the open frame begins.
    open: Option<usize>,
    max: usize,
}

impl Packer {
    /// Frames of up to `max` bytes.
    #[must_use]
    pub const fn new(max: usize) -> Self {
        Self { bytes: Vec::new(), messages: 0, open: None, max }
    }

    /// Adds a message.
    ///
    /// # Errors
    /// It does not fit a frame; nothing was added.
    pub fn push<M: Serialize>(&mut self, message: &M) -> Result<(), ProtocolError> {
        let start = match self.open {
            Some(start) if self.bytes.len() - start < SOFT_FRAME_BYTES => start,
            _ => self.begin(),
        };
        let before = self.bytes.len();
        if let Err(err) = self.encode(message) {
            self.cut(start, before);
            return Err(err);
        }
        let mut start = start;
        let mut len = self.bytes.len() - start - HEADER_BYTES;
        if len > self.max && before > start + HEADER_BYTES {
            // The message does not fit behind the others: give it a frame of its own.
            self.bytes.truncate(before);
            start = self.begin();
            if let Err(err) = self.encode(message) {
                self.cut(start, start);
                return Err(err);
            }
            len = self.bytes.len() - start - HEADER_BYTES;
        }
        if len > self.max {
            self.cut(start, before.max(start));
            return Err(ProtocolError::TooLong { len, max: self.max });
        }
        self.seal(start, len);
        self.messages += 1;
        Ok(())
    }

    /// Adds a piece of compiled code.
    ///
    /// # Errors
    /// It does not fit a frame.
    pub fn push_code(&mut self, code: &[u8]) -> Result<(), ProtocolError> {
        self.push(&(CODE, Bytes(code)))
    }

    /// Adds an attempt.
    ///
    /// # Errors
    /// It does not fit a frame.
    pub fn push_attempt(&mut self, token: u64, attempt: &Attempt) -> Result<(), ProtocolError> {
        self.push(&(SUBMIT, token, attempt))
    }

    fn encode<M: Serialize>(&mut self, message: &M) -> Result<(), ProtocolError> {
        postcard::serialize_with_flavor(message, Sink(&mut self.bytes))
            .map_err(|err| ProtocolError::Malformed(err.to_string()))
    }

    fn begin(&mut self) -> usize {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; HEADER_BYTES]);
        self.open = Some(start);
        start
    }

    fn cut(&mut self, start: usize, before: usize) {
        let keep = if before <= start + HEADER_BYTES {
            self.open = None;
            start
        } else {
            before
        };
        self.bytes.truncate(keep);
    }

    fn seal(&mut self, start: usize, len: usize) {
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        if let Some(header) = self.bytes.get_mut(start..start + HEADER_BYTES) {
            header.copy_from_slice(&len.to_le_bytes());
        }
    }

    /// Bytes that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Messages that wait.
    #[must_use]
    pub fn messages(&self) -> usize {
        self.messages
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Takes all complete frames, leaving `spare` as the next buffer.
    pub fn take(&mut self, mut spare: Vec<u8>) -> Vec<u8> {
        spare.clear();
        self.messages = 0;
        self.open = None;
        std::mem::replace(&mut self.bytes, spare)
    }
}

/// Lets postcard append to a borrowed vector.
struct Sink<'a>(&'a mut Vec<u8>);

impl Flavor for Sink<'_> {
    type Output = ();

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

/// Calls `each` for every message of a frame.
///
/// # Errors
/// Bytes that are no message of type `M`.
pub fn unpack<'de, M: Deserialize<'de>>(
    mut frame: &'de [u8],
    mut each: impl FnMut(M),
) -> Result<(), ProtocolError> {
    while !frame.is_empty() {
        let (message, rest) =
            postcard::take_from_bytes(frame).map_err(|err| ProtocolError::Malformed(err.to_string()))?;
        each(message);
        frame = rest;
    }
    Ok(())
}

/// [`Termination`] as postcard needs it: the public shape is tagged for JSON, which takes a format
/// that describes itself.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Termination")]
enum TerminationDef {
    Succeeded,
    GuestError { retryable: bool, message: String, retry_after_ms: Option<u64> },
    ExitCode { code: i32 },
    Trap { kind: TrapKind, message: String },
    OutOfFuel,
    OutOfMemory,
    StackOverflow,
    Deadline,
    OutputTooLarge,
    QuotaExceeded { quota: String },
    Denied { capability: String },
    Cancelled,
    LeaseLost,
    HostFault { message: String },
}

/// A [`Log`] as it is; what a worker reads of it, it checks.
mod lines {
    use super::*;

    pub(super) fn serialize<S: Serializer>(log: &Log, serializer: S) -> Result<S::Ok, S::Error> {
        blob::serialize(log.as_bytes(), serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Log, D::Error> {
        Ok(Log::of_lines(blob::deserialize(deserializer)?))
    }
}

/// [`Outcome`] as postcard needs it: no skipped fields, byte runs.
mod outcome {
    use super::*;

    type FrameOut<'a> = (&'a str, Option<&'a str>, Option<u32>, Option<u64>);
    type FrameIn = (String, Option<String>, Option<u32>, Option<u64>);

    #[derive(Serialize)]
    struct Out<'a> {
        #[serde(with = "TerminationDef")]
        termination: &'a Termination,
        receipt: &'a Receipt,
        output: Bytes<'a>,
        content_type: &'a str,
        #[serde(with = "lines")]
        logs: &'a Log,
        backtrace: Vec<FrameOut<'a>>,
        artifacts: &'a [File],
    }

    #[derive(Deserialize)]
    struct In {
        #[serde(with = "TerminationDef")]
        termination: Termination,
        receipt: Receipt,
        #[serde(with = "blob")]
        output: Vec<u8>,
        content_type: String,
        #[serde(with = "lines")]
        logs: Log,
        backtrace: Vec<FrameIn>,
        artifacts: Vec<File>,
    }

    pub(super) fn serialize<S: Serializer>(outcome: &Outcome, serializer: S) -> Result<S::Ok, S::Error> {
        Out {
            termination: &outcome.termination,
            receipt: &outcome.receipt,
            output: Bytes(&outcome.output),
            content_type: &outcome.content_type,
            logs: &outcome.logs,
            backtrace: outcome
                .backtrace
                .iter()
                .map(|frame| {
                    (frame.function.as_str(), frame.file.as_deref(), frame.line, frame.module_offset)
                })
                .collect(),
            artifacts: &outcome.artifacts,
        }
        .serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Box<Outcome>, D::Error> {
        let parts = In::deserialize(deserializer)?;
        Ok(Box::new(Outcome {
            termination: parts.termination,
            receipt: parts.receipt,
            output: parts.output,
            content_type: parts.content_type,
            logs: parts.logs,
            backtrace: parts
                .backtrace
                .into_iter()
                .map(|(function, file, line, module_offset)| Frame { function, file, line, module_offset })
                .collect(),
            artifacts: parts.artifacts,
        }))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::limits::Limits;
    use crate::run::{Context, Input, Options};

    fn attempt(bytes: usize) -> Attempt {
        Attempt {
            module: ModuleHash::of(b"m"),
            tenant: 7,
            weight: 100,
            input: Input::Task { bytes: vec![1; bytes] },
            limits: Limits::default(),
            context: Context {
                invocation_id: "i".into(),
                task: "t".into(),
                attempt: 1,
                max_attempts: 2,
                tags: vec![("a".into(), "b".into())],
            },
            options: Options::default(),
        }
    }

    fn full_outcome() -> Outcome {
        Outcome {
            termination: Termination::GuestError {
                retryable: true,
                message: "m".into(),
                retry_after_ms: None,
            },
            receipt: Receipt { fuel: 5, fuel_exact: true, ..Receipt::default() },
            output: vec![0, 1, 2],
            content_type: "a/b".into(),
            logs: Log::of_lines(b"{}\n".to_vec()),
            backtrace: vec![Frame { function: "f".into(), file: None, line: Some(3), module_offset: None }],
            artifacts: vec![File { path: "a/b".into(), bytes: vec![0, 9] }],
        }
    }

    fn frames(mut bytes: &[u8], max: usize) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while !bytes.is_empty() {
            let len = frame_len(bytes[..4].try_into().unwrap(), max).unwrap();
            frames.push(bytes[4..4 + len].to_vec());
            bytes = &bytes[4 + len..];
        }
        frames
    }

    #[test]
    fn attempts_survive_the_borrowed_encoding() {
        let mut packer = Packer::new(1 << 20);
        packer.push_attempt(3, &attempt(10)).unwrap();
        packer.push_code(b"abc").unwrap();
        packer.push(&ToCell::Cancel { token: 3, why: CancelReason::LeaseLost }).unwrap();
        let bytes = packer.take(Vec::new());
        let frames = frames(&bytes, 1 << 20);
        assert_eq!(frames.len(), 1, "small messages share a frame");
        let mut messages = Vec::new();
        unpack::<ToCell>(&frames[0], |message| messages.push(message)).unwrap();
        assert_eq!(messages[0], ToCell::Submit { token: 3, attempt: Box::new(attempt(10)) });
        assert_eq!(messages[1], ToCell::Code(b"abc".to_vec()));
    }

    #[test]
    fn every_outcome_survives() {
        let mut terminations = vec![
            Termination::Succeeded,
            Termination::ExitCode { code: 3 },
            Termination::Trap { kind: TrapKind::Arithmetic, message: "m".into() },
            Termination::QuotaExceeded { quota: "q".into() },
            Termination::HostFault { message: "m".into() },
        ];
        terminations.push(full_outcome().termination);
        for termination in terminations {
            let message =
                FromCell::Finished { token: 9, outcome: Box::new(Outcome { termination, ..full_outcome() }) };
            let mut packer = Packer::new(1 << 20);
            packer.push(&message).unwrap();
            let bytes = packer.take(Vec::new());
            let mut got = Vec::new();
            unpack::<FromCell>(&bytes[4..], |message| got.push(message)).unwrap();
            assert_eq!(got, [message]);
        }
    }

    #[test]
    fn an_outcome_is_large_by_what_it_carries_whatever_its_receipt_says() {
        let plain = || Outcome { artifacts: Vec::new(), ..full_outcome() };
        let file = |bytes| File { path: "a".into(), bytes: vec![0; bytes] };
        assert!(!is_large(&plain()));
        let lines = Log::of_lines(b"{}\n".repeat(LARGE_BYTES / 3 + 1));
        assert!(is_large(&Outcome { logs: lines, ..plain() }));
        assert!(is_large(&Outcome { output: vec![0; LARGE_BYTES], ..plain() }));
        assert!(is_large(&Outcome { artifacts: vec![file(LARGE_BYTES / 2); 2], ..plain() }));
        assert!(is_large(&Outcome {
            artifacts: vec![File { path: "a".repeat(LARGE_BYTES), ..file(0) }],
            ..plain()
        }));
    }

    #[test]
    fn records_survive() {
        let message = FromCell::Log { token: 9, first: 7, log: full_outcome().logs };
        let mut packer = Packer::new(1 << 20);
        packer.push(&message).unwrap();
        let bytes = packer.take(Vec::new());
        let mut got = Vec::new();
        unpack::<FromCell>(&bytes[4..], |message| got.push(message)).unwrap();
        assert_eq!(got, [message]);
    }

    #[test]
    fn limits_and_use_survive() {
        let limits = ToCell::Limits(vec![Limit { tenant: u64::MAX, threads: 0 }]);
        let used = FromCell::Used(vec![Used { tenant: 7, cpu_ns: 1 << 40, runnable: 3 }]);
        let mut packer = Packer::new(1 << 20);
        packer.push(&limits).unwrap();
        let bytes = packer.take(Vec::new());
        unpack::<ToCell>(&bytes[4..], |message| assert_eq!(message, limits)).unwrap();
        packer.push(&used).unwrap();
        let bytes = packer.take(Vec::new());
        unpack::<FromCell>(&bytes[4..], |message| assert_eq!(message, used)).unwrap();
    }

    #[test]
    fn a_message_that_does_not_fit_behind_others_gets_its_own_frame() {
        let mut packer = Packer::new(2_000);
        packer.push_attempt(1, &attempt(1_000)).unwrap();
        packer.push_attempt(2, &attempt(1_500)).unwrap();
        let bytes = packer.take(Vec::new());
        assert_eq!(frames(&bytes, 2_000).len(), 2);
    }

    #[test]
    fn a_message_that_fits_no_frame_is_refused_and_leaves_the_others() {
        let mut packer = Packer::new(2_000);
        packer.push_attempt(1, &attempt(100)).unwrap();
        assert!(packer.push_attempt(2, &attempt(5_000)).is_err());
        packer.push_attempt(3, &attempt(100)).unwrap();
        let bytes = packer.take(Vec::new());
        let mut tokens = Vec::new();
        for frame in frames(&bytes, 2_000) {
            unpack::<ToCell>(&frame, |message| {
                if let ToCell::Submit { token, .. } = message {
                    tokens.push(token);
                }
            })
            .unwrap();
        }
        assert_eq!(tokens, [1, 3]);
    }

    #[test]
    fn garbage_is_an_error_and_a_long_frame_is_refused_by_its_header() {
        assert!(unpack::<FromCell>(&[0xff; 20], |_| {}).is_err());
        assert!(frame_len(u32::MAX.to_le_bytes(), 1 << 20).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let _ = unpack::<ToCell>(&bytes, |_| {});
            let _ = unpack::<FromCell>(&bytes, |_| {});
        }
    }
}
