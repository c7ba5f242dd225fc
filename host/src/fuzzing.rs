//! A door for `fuzz/` and the test that builds its targets to what is private. Nobody else goes through it.

use std::time::Instant;

use crate::output::{Capture, Stream};

/// Writes these pieces to the log of an attempt and looks at what is kept.
///
/// # Panics
/// It is more than the limit, or not clean.
pub fn log(limit: u64, pieces: &[Vec<u8>]) {
    let mut capture = Capture::new(Instant::now(), limit, 0);
    for piece in pieces {
        capture.write(Stream::StderrLines, piece);
    }
    let kept = capture.finish();
    assert!(kept.log_kept <= limit);
    for record in kept.log.records() {
        assert!(!record.message.contains(|c: char| c.is_control() && c != '\t'));
    }
}
