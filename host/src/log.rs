//! A log on its way from the guest that writes it to whoever reads it: records as JSON lines, the form in which they are
//! stored as well. Owns that form. Each record is written into it once, where it is said, and once more where a worker
//! checks what its cell sent; in between and behind it nobody takes it apart.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::outcome::{LogLevel, LogRecord};

/// Records in order, each one line that ends with a newline.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Log {
    lines: Vec<u8>,
}

/// A record that borrows its words; the same on the wire as [`LogRecord`].
#[derive(Serialize, Deserialize)]
pub(crate) struct Line<'a> {
    pub(crate) at_us: u64,
    pub(crate) level: LogLevel,
    #[serde(borrow)]
    pub(crate) target: Cow<'a, str>,
    #[serde(borrow)]
    pub(crate) message: Cow<'a, str>,
    #[serde(borrow, default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) fields: Vec<(Text<'a>, Text<'a>)>,
}

/// Words of a field.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Text<'a>(#[serde(borrow)] pub(crate) Cow<'a, str>);

impl Log {
    /// With room for so many bytes.
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Self { lines: Vec::with_capacity(bytes) }
    }

    /// Takes lines as they are: from a cell, to be checked, or a part of what was written here.
    pub(crate) fn of_lines(lines: Vec<u8>) -> Self {
        Self { lines }
    }

    pub(crate) fn push(&mut self, line: &Line<'_>) {
        self.write(line);
    }

    /// Adds a line as it is.
    pub(crate) fn push_raw(&mut self, line: &[u8]) {
        self.lines.extend_from_slice(line);
        self.lines.push(b'\n');
    }

    fn write(&mut self, record: &impl Serialize) {
        // Writing words and numbers into memory cannot fail; a record that did would only be missing.
        if serde_json::to_writer(&mut self.lines, record).is_ok() {
            self.lines.push(b'\n');
        }
    }

    /// The lines.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.lines
    }

    /// The lines.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.lines
    }

    /// Whether nothing was said.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// How many records there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lines.iter().filter(|byte| **byte == b'\n').count()
    }

    /// The records, taken apart again.
    pub fn records(&self) -> impl Iterator<Item = LogRecord> + '_ {
        lines(&self.lines).filter_map(|line| serde_json::from_slice(line).ok())
    }
}

impl<'a> FromIterator<&'a LogRecord> for Log {
    fn from_iter<I: IntoIterator<Item = &'a LogRecord>>(records: I) -> Self {
        let mut log = Self::default();
        for record in records {
            log.write(record);
        }
        log
    }
}

/// A line, as far as it is a record.
pub(crate) fn read(line: &[u8]) -> Option<Line<'_>> {
    serde_json::from_slice(line).ok()
}

/// The words of a line that is written exactly as [`Log`] writes a record without fields and without anything to escape:
/// target and message. `None`: it may be a record all the same. Most lines are such, and this is several times as fast as
/// reading them.
pub(crate) fn plain(line: &[u8]) -> Option<(&str, &str)> {
    const LEVELS: [&str; 5] = ["trace", "debug", "info", "warn", "error"];
    let text = std::str::from_utf8(line).ok()?;
    let (at_us, rest) = text.strip_prefix("{\"at_us\":")?.split_once(',')?;
    let digits = (1..=18).contains(&at_us.len()) && at_us.bytes().all(|byte| byte.is_ascii_digit());
    if !digits || (at_us.len() > 1 && at_us.starts_with('0')) {
        return None;
    }
    let (level, rest) = rest.strip_prefix("\"level\":\"")?.split_once('"')?;
    let (target, rest) = rest.strip_prefix(",\"target\":\"")?.split_once('"')?;
    let (message, rest) = rest.strip_prefix(",\"message\":\"")?.split_once('"')?;
    let escaped = |text: &str| text.bytes().any(|byte| (byte == b'\\') | (byte < 0x20));
    (rest == "}" && LEVELS.contains(&level) && !escaped(target) && !escaped(message))
        .then_some((target, message))
}

/// The lines of a log, without their ends.
pub fn lines(log: &[u8]) -> impl Iterator<Item = &[u8]> {
    log.split(|byte| *byte == b'\n').filter(|line| !line.is_empty())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn records_come_back_as_they_were_written_whether_their_words_are_borrowed_or_not(
            said in prop::collection::vec(
                (any::<u64>(), any::<String>(), any::<String>(), prop::collection::vec((any::<String>(), any::<String>()), 0..3)),
                0..8,
            ),
        ) {
            let records: Vec<_> = said
                .into_iter()
                .map(|(at_us, target, message, fields)| LogRecord { at_us, level: LogLevel::Warn, target, message, fields })
                .collect();
            let log: Log = records.iter().collect();
            prop_assert_eq!(log.count(), records.len());
            prop_assert_eq!(&log.records().collect::<Vec<_>>(), &records);
            let mut again = Log::default();
            for line in lines(log.as_bytes()) {
                again.push(&read(line).unwrap());
            }
            prop_assert_eq!(again, log);
        }

        /// Lines of ours, and lines of ours with a few bytes changed.
        #[test]
        fn a_plain_line_is_what_is_written_of_what_is_read_of_it(
            at_us in prop_oneof![any::<u64>(), 0u64..3], target in "[a-z:é]{0,5}", message in "[ -~é\u{85}\t]{0,12}",
            fields in prop::collection::vec(("[a-z]{1,2}", "[a-z]{1,2}"), 0..2),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        ) {
            let record = LogRecord { at_us, level: LogLevel::Info, target, message, fields };
            let log: Log = [&record].into_iter().collect();
            let mut line = log.as_bytes().strip_suffix(b"\n").unwrap().to_vec();
            let easy = record.fields.is_empty() && at_us < 1_000_000_000_000_000_000 && !record.message.contains(['"', '\\', '\t']);
            prop_assert_eq!(plain(&line).is_some(), easy);
            for (place, byte) in changes {
                let place = place.index(line.len());
                line[place] = byte;
            }
            if let Some((target, message)) = plain(&line) {
                let read = read(&line).unwrap();
                prop_assert_eq!((target, message), (&*read.target, &*read.message));
                let mut again = Log::default();
                again.push(&read);
                prop_assert_eq!(again.as_bytes().strip_suffix(b"\n").unwrap(), line.as_slice());
            }
        }
    }
}
