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

    /// The same, as far as they can be read.
    pub(crate) fn read(&self) -> impl Iterator<Item = Option<Line<'_>>> {
        lines(&self.lines).map(|line| serde_json::from_slice(line).ok())
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
            for line in log.read() {
                again.push(&line.unwrap());
            }
            prop_assert_eq!(again, log);
        }
    }
}
