//! What is said of an attempt, as far as its worker believes it. A cell cleans and counts what its guest says; but
//! the guest may have taken it over. So whatever comes out of one is brought back under the attempt's limits here:
//! sizes, text without control characters, counts that can be. Owns these second bounds; never decides what an end
//! means, and cannot know whether a plausible lie is one.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use crate::engine::BACKTRACE_FRAMES;
use crate::files::{MAX_ARTIFACTS, check_path};
use crate::limits::Limits;
use crate::log::{self, Log};
use crate::outcome::{Outcome, Termination};
use crate::output::{MAX_FIELDS, MAX_LINE, MAX_TARGET, may_control, media_type, overhead};
use crate::run::{Attempt, MAX_RETRY_AFTER_MS};

/// Bytes that cleaning makes of one byte at the most: U+FFFD in place of a control character.
const GROWTH: usize = 3;
/// Bytes of a message in a termination, before it grows.
const MAX_MESSAGE: usize = 4_096;
/// Bytes of a function or file name in a backtrace, before it grows.
const MAX_SYMBOL: usize = 512;
/// Bytes of a progress message.
const MAX_PROGRESS: usize = 1_024;
/// Clocks of two processes, and rounding.
const SLACK: Duration = Duration::from_millis(100);
/// The largest count that everything behind this can hold.
const MAX_COUNT: u64 = i64::MAX as u64;

/// What must be remembered of an attempt to judge what is said about it.
#[derive(Debug, Clone)]
pub struct Sent {
    limits: Limits,
    collects: bool,
    at: Instant,
    /// What it may still log while it runs.
    live_room: u64,
}

impl Sent {
    /// Of an attempt that goes to a cell now.
    pub(crate) fn new(attempt: &Attempt) -> Self {
        let collects = attempt.options.scratch.as_ref().is_some_and(|scratch| !scratch.collect.is_empty());
        Self::under(attempt.limits, collects)
    }

    /// Of one that begins now, under these limits. `collects`: files may come back.
    #[must_use]
    pub fn under(limits: Limits, collects: bool) -> Self {
        Self { limits, collects, at: Instant::now(), live_room: log_room(&limits) }
    }

    /// Brings an outcome under the limits of its attempt. What is under them already stays as it is.
    pub fn outcome(&self, outcome: &mut Outcome) {
        let limits = &self.limits;
        termination(&mut outcome.termination);
        let room = usize::try_from(limits.output_bytes).unwrap_or(usize::MAX);
        outcome.output.truncate(room);
        outcome.content_type = media_type(std::mem::take(&mut outcome.content_type));
        records(&mut outcome.logs, &mut log_room(limits));
        outcome.backtrace.truncate(BACKTRACE_FRAMES);
        for frame in &mut outcome.backtrace {
            tidy(&mut frame.function, MAX_SYMBOL * GROWTH);
            if let Some(file) = &mut frame.file {
                tidy(file, MAX_SYMBOL * GROWTH);
            }
        }
        let mut room = limits.output_bytes.saturating_sub(outcome.output.len() as u64);
        let mut last: Option<String> = None;
        let mut count = 0;
        outcome.artifacts.retain(|file| {
            let size = (file.path.len() + file.bytes.len()) as u64;
            let fits = self.collects
                && count < MAX_ARTIFACTS
                && size <= room
                && check_path(&file.path).is_ok()
                // In order, so none comes twice.
                && last.as_ref().is_none_or(|last| *last < file.path);
            if fits {
                room -= size;
                count += 1;
                last = Some(file.path.clone());
            }
            fits
        });

        let elapsed = u64::try_from((self.at.elapsed() + SLACK).as_nanos()).unwrap_or(u64::MAX);
        let artifacts: usize = outcome.artifacts.iter().map(|file| file.bytes.len()).sum();
        let receipt = &mut outcome.receipt;
        receipt.fuel = receipt.fuel.min(limits.fuel);
        receipt.peak_memory_bytes = receipt.peak_memory_bytes.min(limits.memory_bytes);
        receipt.cpu_ns = receipt.cpu_ns.min(elapsed);
        receipt.wall_ns = receipt.wall_ns.min(elapsed);
        receipt.log_bytes = receipt.log_bytes.min(limits.log_bytes);
        receipt.output_bytes = (outcome.output.len() + artifacts) as u64;
        for count in [
            &mut receipt.input_bytes,
            &mut receipt.output_dropped_bytes,
            &mut receipt.log_dropped_bytes,
            &mut receipt.egress_bytes,
            &mut receipt.host_calls,
        ] {
            *count = (*count).min(MAX_COUNT);
        }
    }

    /// The same for records that come while the attempt runs.
    pub(crate) fn log(&mut self, news: &mut Log) {
        records(news, &mut self.live_room);
    }
}

/// A progress message as it may be shown.
pub(crate) fn progress(message: &mut String) {
    tidy(message, MAX_PROGRESS * GROWTH);
}

fn termination(termination: &mut Termination) {
    match termination {
        Termination::GuestError { message, retry_after_ms, .. } => {
            tidy(message, MAX_MESSAGE * GROWTH);
            *retry_after_ms = retry_after_ms.map(|wait| wait.min(MAX_RETRY_AFTER_MS));
        }
        Termination::Trap { message, .. } | Termination::HostFault { message } => {
            tidy(message, MAX_MESSAGE * GROWTH);
        }
        Termination::QuotaExceeded { quota: words } | Termination::Denied { capability: words } => {
            tidy(words, MAX_MESSAGE);
        }
        Termination::Succeeded
        | Termination::ExitCode { .. }
        | Termination::OutOfFuel
        | Termination::OutOfMemory
        | Termination::StackOverflow
        | Termination::Deadline
        | Termination::OutputTooLarge
        | Termination::Cancelled
        | Termination::LeaseLost => {}
    }
}

/// Bytes of records that the log limit allows, as the capture counts them, if each byte of text grows at cleaning.
fn log_room(limits: &Limits) -> u64 {
    limits.log_bytes.saturating_mul(GROWTH as u64)
}

/// As many records as there is room for, up to one that is none. What is not in our form to the last byte is written anew.
fn records(log: &mut Log, room: &mut u64) {
    let said = std::mem::take(log);
    let mut kept = Log::with_capacity(said.as_bytes().len());
    for line in log::lines(said.as_bytes()) {
        if let Some((target, message)) = log::plain(line)
            && target.len() <= MAX_TARGET
            && message.len() <= MAX_LINE
            && !may_control(message)
            && !may_control(target)
        {
            let Some(left) = room.checked_sub(cost(target.len() + message.len(), 0)) else { break };
            *room = left;
            kept.push_raw(line);
            continue;
        }
        let Some(mut record) = log::read(line) else { break };
        tidy_cow(&mut record.target, MAX_TARGET * GROWTH);
        tidy_cow(&mut record.message, MAX_LINE * GROWTH);
        record.fields.truncate(MAX_FIELDS);
        for (key, value) in &mut record.fields {
            tidy_cow(&mut key.0, MAX_TARGET * GROWTH);
            tidy_cow(&mut value.0, MAX_LINE * GROWTH);
        }
        record.at_us = record.at_us.min(MAX_COUNT);
        let words: usize = record.fields.iter().map(|(key, value)| key.0.len() + value.0.len()).sum();
        let Some(left) =
            room.checked_sub(cost(record.target.len() + record.message.len() + words, record.fields.len()))
        else {
            break;
        };
        *room = left;
        kept.push(&record);
    }
    *log = kept;
}

/// What a record costs of the log's room. The streams' own targets are not charged.
fn cost(words: usize, fields: usize) -> u64 {
    (words as u64 + overhead(fields)).saturating_sub("stderr".len() as u64)
}

fn tidy(text: &mut String, max: usize) {
    if let Some(tidied) = tidied(text, max) {
        *text = tidied;
    }
}

/// [`tidy`] for words that are borrowed as long as nothing is wrong with them.
fn tidy_cow(text: &mut Cow<'_, str>, max: usize) {
    if let Some(tidied) = tidied(text, max) {
        *text = Cow::Owned(tidied);
    }
}

/// Text cut and without control characters, unless it is so; as a cell in order sends it, it is only looked at.
fn tidied(text: &str, max: usize) -> Option<String> {
    let end = (0..=max.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    let control = |c: char| c.is_control() && c != '\t';
    (end < text.len() || (may_control(text) && text.contains(control)))
        .then(|| text[..end].replace(control, "?"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::files::File;
    use crate::outcome::{Frame, LogLevel, LogRecord, Receipt};
    use proptest::prelude::*;

    fn outcome(text: &str, number: u64, count: usize, bytes: usize) -> Outcome {
        let words = || text.to_owned();
        Outcome {
            termination: Termination::GuestError {
                retryable: true,
                message: words(),
                retry_after_ms: Some(number),
            },
            receipt: Receipt {
                fuel: number,
                fuel_exact: true,
                cpu_ns: number,
                wall_ns: number,
                peak_memory_bytes: number,
                input_bytes: number,
                output_bytes: number,
                output_dropped_bytes: number,
                log_bytes: number,
                log_dropped_bytes: number,
                egress_bytes: number,
                host_calls: number,
            },
            output: vec![7; bytes],
            content_type: words(),
            logs: (0..count)
                .map(|n| LogRecord {
                    at_us: number,
                    level: LogLevel::Info,
                    target: words(),
                    message: words(),
                    fields: vec![(words(), words()); if n == 0 { MAX_FIELDS + 1 } else { n % 2 }],
                })
                .collect::<Vec<_>>()
                .iter()
                .collect(),
            backtrace: vec![
                Frame { function: words(), file: Some(words()), line: None, module_offset: None };
                count
            ],
            artifacts: (0..count)
                .map(|n| File { path: format!("{text}{}", n / 2), bytes: vec![1; bytes] })
                .collect(),
        }
    }

    fn texts(outcome: &Outcome) -> Vec<String> {
        let Termination::GuestError { message, .. } = &outcome.termination else { panic!() };
        let mut texts = vec![message.clone(), outcome.content_type.clone()];
        for record in outcome.logs.records() {
            texts.extend([record.target, record.message]);
            texts.extend(record.fields.into_iter().flat_map(|(k, v)| [k, v]));
        }
        for frame in &outcome.backtrace {
            texts.extend([frame.function.clone(), frame.file.clone().unwrap()]);
        }
        texts
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_a_cell_says_is_clean_and_within_the_limits_afterwards(
            text in "(?s).{0,60}", long in 0usize..200, number in any::<u64>(), count in 0usize..40, bytes in 0usize..3_000,
            limit in 0u64..5_000, collects in any::<bool>(),
        ) {
            let limits = Limits { output_bytes: limit, log_bytes: limit, ..Limits::default() };
            let mut said = outcome(&text.repeat(long), number, count, bytes);
            Sent::under(limits, collects).outcome(&mut said);
            for text in texts(&said) {
                prop_assert!(!text.contains(|c: char| c.is_control() && c != '\t'), "{text:?}");
                prop_assert!(text.len() <= MAX_LINE * GROWTH);
            }
            let kept: u64 = said.artifacts.iter().map(|file| file.bytes.len() as u64).sum();
            prop_assert!(said.output.len() as u64 + kept <= limit);
            prop_assert!(said.artifacts.is_empty() || collects);
            prop_assert!(said.artifacts.windows(2).all(|pair| pair[0].path < pair[1].path));
            prop_assert_eq!(said.receipt.output_bytes, said.output.len() as u64 + kept);
            prop_assert!(said.receipt.fuel <= limits.fuel && said.receipt.wall_ns < 60_000_000_000);
            prop_assert!(said.receipt.host_calls <= MAX_COUNT && said.receipt.log_bytes <= limit);
            let logged: usize = said.logs.records().map(|record| record.message.len()).sum();
            prop_assert!(logged as u64 <= limit * GROWTH as u64 && said.logs.count() as u64 <= limit * 3 / 26 + 1);
        }

        #[test]
        fn what_a_cell_in_order_says_of_any_stream_stays_as_it_is(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..30), limit in 100u64..4_000,
        ) {
            let limits = Limits { log_bytes: limit, ..Limits::default() };
            let capture = crate::output::Capture::new(Instant::now(), limit, 0);
            let capture = std::sync::Arc::new(std::sync::Mutex::new(capture));
            let writer = crate::output::Writer {
                capture: capture.clone(),
                stream: crate::output::Stream::StderrLines,
            };
            for piece in &pieces {
                writer.put(piece);
                let text = String::from_utf8_lossy(piece).into_owned();
                crate::output::lock(&capture).record(LogLevel::Warn, &text, &text, &[(text.clone(), text.clone())]);
            }
            let logs = crate::output::lock(&capture).finish().log;
            let mut said = Outcome { logs, ..outcome("text/plain", 5, 1, 10) };
            let before = Outcome { artifacts: Vec::new(), receipt: Receipt { output_bytes: 10, ..said.receipt }, ..said.clone() };
            Sent::under(limits, false).outcome(&mut said);
            prop_assert_eq!(said, before);
        }
    }
    #[test]
    fn a_log_in_a_form_that_is_not_ours_is_written_in_ours_up_to_what_is_no_record() {
        let odd = format!(
            "{{ \"level\":\"info\",{}\"target\":\"t\",\"message\":\"a\\u0007b\\u0041\",\"at_us\":1,\"more\":[1] }}\n",
            " ".repeat(9_000)
        );
        for behind in ["nonsense\n", "{}\n", "\u{7f}\n", "{\"at_us\":-1}"] {
            let mut log = Log::of_lines(format!("{odd}{behind}{odd}").into_bytes());
            records(&mut log, &mut 1_000);
            let ours = LogRecord {
                at_us: 1,
                level: LogLevel::Info,
                target: "t".to_owned(),
                message: "a?bA".to_owned(),
                fields: Vec::new(),
            };
            assert_eq!(log, [ours].iter().collect(), "{behind}");
        }
    }
}
