//! What a guest says: stdout, stderr and log records, under limits and cleaned.
//! Owns truncation and counting; never fails and never makes a guest fail for writing too much.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use wasmtime_wasi::cli::{IsTerminal, StdinStream, StdoutStream};
use wasmtime_wasi::p2::{InputStream, OutputStream, Pollable, StreamError, StreamResult};

use crate::log::{Line as Record, Log, Text};
use crate::outcome::LogLevel;

/// Bytes of one line of text; the rest of a longer line is dropped and counted.
pub(crate) const MAX_LINE: usize = 8 << 10;
/// Bytes of a log target.
pub(crate) const MAX_TARGET: usize = 256;
/// Fields of one record.
pub(crate) const MAX_FIELDS: usize = 64;
/// What a record costs of the log limit beyond its text, so that empty records are bounded too.
const RECORD_OVERHEAD: u64 = 32;
/// What a field of a record costs beyond its text: records of many empty fields are bounded too.
const FIELD_OVERHEAD: u64 = 8;
/// Bytes a stream accepts in one write.
const WRITE_PERMIT: usize = 64 << 10;

/// Whether there may be a control character other than tab in it. Looks at bytes, several at a time: 0xC2 begins the
/// control characters from U+0080 to U+009F, and others.
pub(crate) fn may_control(text: &str) -> bool {
    let odd = |byte: &u8| ((*byte < 0x20) & (*byte != b'\t')) | (*byte == 0x7f) | (*byte == 0xc2);
    text.as_bytes().chunks(32).any(|bytes| bytes.iter().fold(false, |any, byte| any | odd(byte)))
}

/// Makes guest text fit for storage and terminals: valid UTF-8, no control characters but tab,
/// newlines as `\n`, at most `max` bytes. Returns the text and how many input bytes were cut.
pub(crate) fn clean(bytes: &[u8], max: usize) -> (Cow<'_, str>, u64) {
    let kept = &bytes[..bytes.len().min(max)];
    let cut = (bytes.len() - kept.len()) as u64;
    if let Ok(text) = std::str::from_utf8(kept)
        && !may_control(text)
    {
        return (Cow::Borrowed(text), cut);
    }
    let mut text = String::with_capacity(kept.len());
    for c in String::from_utf8_lossy(kept).chars() {
        match c {
            '\t' => text.push('\t'),
            '\n' => text.push_str("\\n"),
            '\r' => {}
            c if c.is_control() => text.push(char::REPLACEMENT_CHARACTER),
            c => text.push(c),
        }
    }
    (Cow::Owned(text), cut)
}

/// What a record with so many fields costs of the log limit beyond its text.
pub(crate) fn overhead(fields: usize) -> u64 {
    RECORD_OVERHEAD + fields.min(MAX_FIELDS) as u64 * FIELD_OVERHEAD
}

/// Everything an attempt wrote so far.
#[derive(Debug)]
pub(crate) struct Capture {
    started: Instant,
    log_limit: u64,
    log_charged: u64,
    log_kept: u64,
    log_dropped: u64,
    full: bool,
    log: Log,
    /// Bytes and records of it that were given out while the attempt runs.
    told: (usize, usize),
    out_limit: u64,
    out: Vec<u8>,
    out_dropped: u64,
    stdout_line: Line,
    stderr_line: Line,
}

/// A line that is not complete yet.
#[derive(Debug, Default)]
struct Line {
    bytes: Vec<u8>,
    dropped: u64,
}

/// Where the bytes of a stream go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Kept as the result (stdout of commands).
    Result,
    /// Lines of the log under the target `stdout` (stdout of tasks).
    StdoutLines,
    /// Lines of the log under the target `stderr`.
    StderrLines,
}

/// The capture as the end of the attempt reports it.
#[derive(Debug, Default)]
pub(crate) struct Captured {
    pub(crate) out: Vec<u8>,
    pub(crate) out_dropped: u64,
    pub(crate) log: Log,
    pub(crate) log_kept: u64,
    pub(crate) log_dropped: u64,
}

impl Capture {
    pub(crate) fn new(started: Instant, log_limit: u64, out_limit: u64) -> Self {
        Self {
            started,
            log_limit,
            log_charged: 0,
            log_kept: 0,
            log_dropped: 0,
            full: false,
            log: Log::default(),
            told: (0, 0),
            out_limit,
            out: Vec::new(),
            out_dropped: 0,
            stdout_line: Line::default(),
            stderr_line: Line::default(),
        }
    }

    fn at_us(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Adds a structured record, or counts it as dropped. Once a record did not fit, none does:
    /// a log with holes would mislead.
    pub(crate) fn record(
        &mut self,
        level: LogLevel,
        target: &str,
        message: &str,
        fields: &[(String, String)],
    ) {
        let raw: usize =
            target.len() + message.len() + fields.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>();
        if self.full || raw as u64 + overhead(fields.len()) > self.log_limit - self.log_charged {
            self.full = true;
            self.log_dropped += raw as u64;
            return;
        }
        let (target, target_cut) = clean(target.as_bytes(), MAX_TARGET);
        let (message, message_cut) = clean(message.as_bytes(), MAX_LINE);
        let mut cut = target_cut + message_cut;
        let mut kept_fields = Vec::with_capacity(fields.len().min(MAX_FIELDS));
        for (index, (key, value)) in fields.iter().enumerate() {
            if index >= MAX_FIELDS {
                cut += (key.len() + value.len()) as u64;
                continue;
            }
            let (key, key_cut) = clean(key.as_bytes(), MAX_TARGET);
            let (value, value_cut) = clean(value.as_bytes(), MAX_LINE);
            cut += key_cut + value_cut;
            kept_fields.push((Text(key), Text(value)));
        }
        self.keep(raw as u64, cut, level, target, message, kept_fields);
    }

    fn keep(
        &mut self,
        raw: u64,
        cut: u64,
        level: LogLevel,
        target: Cow<'_, str>,
        message: Cow<'_, str>,
        fields: Vec<(Text<'_>, Text<'_>)>,
    ) {
        self.log_charged += raw - cut + overhead(fields.len());
        self.log_kept += raw - cut;
        self.log_dropped += cut;
        self.log.push(&Record { at_us: self.at_us(), level, target, message, fields });
    }

    pub(crate) fn write(&mut self, stream: Stream, bytes: &[u8]) {
        match stream {
            Stream::Result => {
                let room = self.out_limit.saturating_sub(self.out.len() as u64);
                let kept = bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX));
                self.out.extend_from_slice(&bytes[..kept]);
                self.out_dropped += (bytes.len() - kept) as u64;
            }
            Stream::StdoutLines => {
                let mut line = std::mem::take(&mut self.stdout_line);
                self.lines(&mut line, "stdout", bytes);
                self.stdout_line = line;
            }
            Stream::StderrLines => {
                let mut line = std::mem::take(&mut self.stderr_line);
                self.lines(&mut line, "stderr", bytes);
                self.stderr_line = line;
            }
        }
    }

    fn lines(&mut self, line: &mut Line, target: &str, mut bytes: &[u8]) {
        if self.full {
            self.log_dropped += bytes.len() as u64;
            return;
        }
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            line.push(&bytes[..end]);
            bytes = &bytes[end + 1..];
            self.finish_line(line, target);
        }
        line.push(bytes);
    }

    fn finish_line(&mut self, line: &mut Line, target: &str) {
        let raw = line.bytes.len() as u64;
        let cut = std::mem::take(&mut line.dropped);
        if self.full || raw + overhead(0) > self.log_limit - self.log_charged {
            self.full = true;
            self.log_dropped += raw + cut;
            line.bytes = Vec::new();
            return;
        }
        if line.bytes.last() == Some(&b'\r') {
            line.bytes.pop();
        }
        let (message, _) = clean(&line.bytes, MAX_LINE);
        self.keep(raw + cut, cut, LogLevel::Info, Cow::Borrowed(target), message, Vec::new());
        line.bytes.clear();
    }

    /// Whether there are records that [`Self::news`] has not given out.
    pub(crate) fn has_news(&self) -> bool {
        self.told.0 < self.log.as_bytes().len()
    }

    /// Records since the last call, as many as begin within `max_bytes`, and the number of the first of them. They are
    /// given out once more at the end, with all the others.
    pub(crate) fn news(&mut self, max_bytes: usize) -> Option<(u32, Log)> {
        let (from, first) = self.told;
        let rest = self.log.as_bytes().get(from..).filter(|rest| !rest.is_empty())?;
        // The last one that begins within goes whole.
        let last = rest.iter().skip(max_bytes.checked_sub(1)?).position(|byte| *byte == b'\n');
        let news = match last {
            Some(after) => rest.get(..max_bytes + after)?,
            None => rest,
        };
        let news = Log::of_lines(news.to_vec());
        self.told = (from + news.as_bytes().len(), first + news.count());
        Some((u32::try_from(first).ok()?, news))
    }

    /// Ends open lines and takes everything out.
    pub(crate) fn finish(&mut self) -> Captured {
        for (mut line, target) in [
            (std::mem::take(&mut self.stdout_line), "stdout"),
            (std::mem::take(&mut self.stderr_line), "stderr"),
        ] {
            if !line.bytes.is_empty() || line.dropped > 0 {
                self.finish_line(&mut line, target);
            }
        }
        self.told = (0, 0);
        Captured {
            out: std::mem::take(&mut self.out),
            out_dropped: self.out_dropped,
            log: std::mem::take(&mut self.log),
            log_kept: self.log_kept,
            log_dropped: self.log_dropped,
        }
    }
}

impl Line {
    fn push(&mut self, bytes: &[u8]) {
        let kept = bytes.len().min(MAX_LINE - self.bytes.len());
        self.bytes.extend_from_slice(&bytes[..kept]);
        self.dropped += (bytes.len() - kept) as u64;
    }
}

/// A capture shared between the host state and the streams handed to WASI.
pub(crate) type SharedCapture = Arc<Mutex<Capture>>;

/// Locks a capture; a panic of a host call while it was held leaves plain data behind.
pub(crate) fn lock(capture: &Mutex<Capture>) -> MutexGuard<'_, Capture> {
    capture.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A guest's stdout or stderr. Always ready, never an error.
#[derive(Clone)]
pub(crate) struct Writer {
    pub(crate) capture: SharedCapture,
    pub(crate) stream: Stream,
}

impl Writer {
    pub(crate) fn put(&self, bytes: &[u8]) {
        lock(&self.capture).write(self.stream, bytes);
    }
}

impl IsTerminal for Writer {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Writer {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

#[async_trait]
impl Pollable for Writer {
    async fn ready(&mut self) {}
}

impl OutputStream for Writer {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        lock(&self.capture).write(self.stream, &bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(WRITE_PERMIT)
    }
}

impl AsyncWrite for Writer {
    fn poll_write(
        self: std::pin::Pin<&mut Self>,
        _cx: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        lock(&self.capture).write(self.stream, bytes);
        std::task::Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(
        self: std::pin::Pin<&mut Self>,
        _cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn poll_shutdown(
        self: std::pin::Pin<&mut Self>,
        _cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }
}

/// A guest's stdin: the input, then end of file. All streams share one position.
#[derive(Clone)]
pub(crate) struct Reader(Arc<Mutex<Bytes>>);

impl Reader {
    pub(crate) fn new(input: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Bytes::from(input))))
    }

    pub(crate) fn take(&self, max: usize) -> Option<Bytes> {
        let mut rest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if rest.is_empty() {
            return None;
        }
        let len = rest.len().min(max);
        Some(rest.split_to(len))
    }
}

impl IsTerminal for Reader {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdinStream for Reader {
    fn async_stream(&self) -> Box<dyn AsyncRead + Send + Sync> {
        Box::new(self.clone())
    }

    fn p2_stream(&self) -> Box<dyn InputStream> {
        Box::new(self.clone())
    }
}

#[async_trait]
impl Pollable for Reader {
    async fn ready(&mut self) {}
}

impl InputStream for Reader {
    fn read(&mut self, size: usize) -> StreamResult<Bytes> {
        if size == 0 {
            return Ok(Bytes::new());
        }
        self.take(size).ok_or(StreamError::Closed)
    }
}

impl AsyncRead for Reader {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        _cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        if let Some(bytes) = self.take(buf.remaining()) {
            buf.put_slice(&bytes);
        }
        std::task::Poll::Ready(Ok(()))
    }
}

/// The media type a guest gave, or the neutral one if it cannot be one.
pub(crate) fn media_type(given: String) -> String {
    let plausible = given.len() <= 255
        && given.contains('/')
        && given.bytes().all(|b| b.is_ascii_graphic() || b == b' ' || b == b'\t');
    if plausible { given } else { OCTET_STREAM.to_owned() }
}

/// The media type of bytes nothing is known about.
pub(crate) const OCTET_STREAM: &str = "application/octet-stream";

/// The media type of a command's stdout.
pub(crate) fn text_type(bytes: &[u8]) -> &'static str {
    if std::str::from_utf8(bytes).is_ok() { "text/plain; charset=utf-8" } else { OCTET_STREAM }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn capture(log: u64, out: u64) -> Capture {
        Capture::new(Instant::now(), log, out)
    }

    #[test]
    fn a_result_is_cut_at_its_limit_and_the_rest_is_counted() {
        let mut capture = capture(0, 5);
        capture.write(Stream::Result, b"abc");
        capture.write(Stream::Result, b"defg");
        let got = capture.finish();
        assert_eq!(got.out, b"abcde");
        assert_eq!(got.out_dropped, 2);
    }

    #[test]
    fn lines_are_joined_over_writes_and_the_last_needs_no_newline() {
        let mut capture = capture(1000, 0);
        capture.write(Stream::StderrLines, b"one\r\nt");
        capture.write(Stream::StderrLines, b"wo\nthree");
        let got = capture.finish();
        let messages: Vec<_> = got.log.records().map(|r| r.message).collect();
        assert_eq!(messages, ["one", "two", "three"]);
        assert!(got.log.records().all(|r| r.target == "stderr"));
    }

    #[test]
    fn garbage_becomes_valid_text_without_control_characters() {
        let mut capture = capture(1000, 0);
        capture.write(Stream::StderrLines, b"\xff\x00a\tb\x1b[31m\n");
        let got = capture.finish();
        let message = got.log.records().next().unwrap().message;
        assert!(message.contains("a\tb"), "{message:?}");
        assert!(!message.contains(|c: char| c.is_control() && c != '\t'));
    }

    #[test]
    fn a_long_line_is_cut_and_the_cut_is_counted() {
        let mut capture = capture(100_000, 0);
        capture.write(Stream::StderrLines, &vec![b'x'; MAX_LINE + 10]);
        capture.write(Stream::StderrLines, b"yy\n");
        let got = capture.finish();
        assert_eq!(got.log.records().next().unwrap().message.len(), MAX_LINE);
        assert_eq!(got.log_dropped, 12);
        assert_eq!(got.log_kept, MAX_LINE as u64);
    }

    #[test]
    fn once_the_log_is_full_everything_later_is_dropped_and_counted() {
        let mut capture = capture(50, 0);
        capture.record(LogLevel::Info, "t", "0123456789", &[]);
        capture.record(LogLevel::Info, "t", "0123456789", &[]);
        capture.write(Stream::StderrLines, b"x\n");
        let got = capture.finish();
        assert_eq!(got.log.count(), 1);
        assert_eq!((got.log_kept, got.log_dropped), (11, 13));
    }

    proptest::proptest! {
        #[test]
        fn no_control_character_is_overlooked(text: String) {
            let control = text.contains(|c: char| c.is_control() && c != '\t');
            proptest::prop_assert!(!control || may_control(&text));
            let cleaned = clean(text.as_bytes(), MAX_LINE).0;
            proptest::prop_assert!(!cleaned.contains(|c: char| c.is_control() && c != '\t'));
            proptest::prop_assert!(control || cleaned == text);
        }

        #[test]
        fn whatever_is_written_in_whatever_pieces_the_log_is_clean_bounded_and_counted(
            pieces in proptest::collection::vec(proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200), 0..40),
            limit in 0u64..2_000,
        ) {
            let mut capture = capture(limit, 0);
            for piece in &pieces {
                capture.write(Stream::StderrLines, piece);
            }
            let got = capture.finish();
            proptest::prop_assert!(got.log_kept <= limit);
            for record in got.log.records() {
                proptest::prop_assert!(!record.message.contains(|c: char| c.is_control() && c != '\t'));
                proptest::prop_assert!(record.message.len() <= 3 * MAX_LINE);
            }
            let newlines = pieces.iter().flatten().filter(|byte| **byte == b'\n').count() as u64;
            let written: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
            // The newlines of lines that were kept count nowhere, those behind a full log as dropped.
            let counted = got.log_kept + got.log_dropped;
            proptest::prop_assert!(counted <= written && counted + newlines >= written, "{counted} of {written}");
        }
    }

    #[test]
    fn news_come_in_order_and_once_and_the_end_has_all_of_them() {
        let mut capture = capture(1000, 0);
        assert!(!capture.has_news() && capture.news(10).is_none());
        for text in ["one", "two", "three"] {
            capture.record(LogLevel::Info, "t", text, &[]);
        }
        let texts = |news: Option<(u32, Log)>| {
            news.map(|(first, log)| (first, log.records().map(|r| r.message).collect::<Vec<_>>()))
        };
        let line = capture.log.as_bytes().len() / 3;
        // The second begins within, the third does not.
        assert_eq!(texts(capture.news(line + 5)), Some((0, vec!["one".to_owned(), "two".to_owned()])));
        assert!(capture.news(0).is_none());
        assert_eq!(texts(capture.news(1)), Some((2, vec!["three".to_owned()])));
        assert!(capture.news(5).is_none());
        capture.record(LogLevel::Info, "t", "four", &[]);
        assert!(capture.has_news());
        assert_eq!(capture.finish().log.count(), 4);
        assert!(!capture.has_news() && capture.news(5).is_none());
    }

    #[test]
    fn empty_lines_cannot_fill_memory() {
        let mut capture = capture(1 << 10, 0);
        capture.write(Stream::StderrLines, &vec![b'\n'; 1 << 20]);
        assert!(capture.finish().log.count() <= 32);
    }

    #[test]
    fn whatever_records_are_made_of_they_take_at_most_three_bytes_for_each_of_the_limit() {
        let many = |text: &str| vec![(text.to_owned(), text.to_owned()); MAX_FIELDS + 10];
        for fields in [many(""), many("\0"), many("\n"), many("\"\n"), Vec::new()] {
            for words in ["", "\n\n\n", "\u{1b}[0m"] {
                let mut capture = capture(1 << 16, 0);
                for _ in 0..10_000 {
                    capture.record(LogLevel::Error, words, words, &fields);
                }
                let taken = capture.finish().log.as_bytes().len();
                assert!(taken <= 3 << 16, "{taken} bytes of {words:?} and {:?}", fields.first());
            }
        }
    }

    #[test]
    fn a_media_type_with_a_newline_is_replaced() {
        assert_eq!(media_type("application/json".into()), "application/json");
        assert_eq!(media_type("a/b\r\nX: y".into()), OCTET_STREAM);
        assert_eq!(media_type("nonsense".into()), OCTET_STREAM);
    }
}
