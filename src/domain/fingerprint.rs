//! Which failures are the same failure. Owns the hash that groups dead letters: it must not change from one failure of a
//! kind to the next, nor from one release of ours to the next.

use sha2::{Digest, Sha256};

/// Innermost frames of a backtrace that count; those below them belong to whoever called.
const FRAMES: usize = 5;
/// Characters of a message that count.
const MESSAGE: usize = 160;
/// Characters of a summary.
const SUMMARY: usize = 200;

/// A failure, as far as its kind goes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Failure<'a> {
    /// Reason of the termination, such as `trap`.
    pub reason: &'a str,
    /// Its kind within the reason: of a trap, an exit code, the quota or the capability. May be empty.
    pub kind: &'a str,
    /// What was said. May be empty.
    pub message: &'a str,
    /// Names of the guest's functions, innermost first. May be empty.
    pub frames: &'a [String],
}

/// Eight bytes that are the same for failures of the same kind: the same reason and kind, at the same place in the code
/// where that is known, and otherwise with the same message but for its numbers and names.
#[must_use]
pub fn fingerprint(failure: &Failure<'_>) -> [u8; 8] {
    let mut hash = Sha256::new();
    hash.update("1\0"); // the version of this very rule
    hash.update(failure.reason);
    hash.update([0]);
    hash.update(failure.kind);
    hash.update([0]);
    if failure.frames.is_empty() {
        hash.update(normalised(failure.message));
    } else {
        for frame in failure.frames.iter().take(FRAMES) {
            hash.update(without_hash(frame));
            hash.update([0]);
        }
    }
    let digest = hash.finalize();
    let mut short = [0; 8];
    short.copy_from_slice(&digest[..8]);
    short
}

/// The failure in one line, for people.
#[must_use]
pub fn summary(failure: &Failure<'_>) -> String {
    let mut text = failure.reason.to_owned();
    if !failure.kind.is_empty() {
        text.push_str(&format!(" ({})", failure.kind));
    }
    let line = failure.message.lines().map(str::trim).find(|line| !line.is_empty());
    if let Some(line) = line {
        text.push_str(": ");
        text.push_str(line);
    }
    if let Some(frame) = failure.frames.first() {
        text.push_str(&format!(" in {}", without_hash(frame)));
    }
    // Neither a line break nor a NUL: it goes into lists, and into a column of text.
    text.chars().filter(|c| !c.is_control()).take(SUMMARY).collect()
}

/// A message without what differs from one failure to the next: words with a digit in them, and what stands in quotes.
fn normalised(message: &str) -> String {
    let mut out = String::new();
    let mut chars = message.chars().peekable();
    let mut count = 0;
    while let Some(c) = chars.next() {
        if count >= MESSAGE {
            break;
        }
        count += 1;
        if matches!(c, '"' | '\'' | '`') {
            // Up to its partner; a lone apostrophe is only itself.
            let rest: String = chars.clone().collect();
            if let Some((quoted, _)) = rest.split_once(c)
                && !quoted.contains('\n')
                && (c != '\'' || !out.ends_with(char::is_alphabetic))
            {
                for _ in 0..=quoted.chars().count() {
                    chars.next();
                }
                out.push('?');
                continue;
            }
        }
        if c.is_alphanumeric() || c == '_' {
            let mut word = String::from(c);
            while let Some(next) = chars.peek()
                && (next.is_alphanumeric() || matches!(next, '_' | '-'))
            {
                word.push(*next);
                chars.next();
            }
            if word.chars().any(|c| c.is_ascii_digit()) {
                out.push('#');
            } else {
                out.push_str(&word);
            }
        } else if c.is_whitespace() {
            if !out.ends_with(' ') {
                out.push(' ');
            }
        } else {
            out.push(c);
        }
    }
    out
}

/// A function's name without the hash that compilers put at its end, which changes with every build.
fn without_hash(name: &str) -> &str {
    match name.rsplit_once("::h") {
        Some((plain, hash)) if hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => plain,
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    fn said(message: &str) -> [u8; 8] {
        fingerprint(&Failure { reason: "guest-error", kind: "fatal", message, ..Failure::default() })
    }

    #[test]
    fn numbers_ids_and_quoted_names_do_not_tell_failures_apart_and_words_do() {
        let one = said("order 17: no customer \"Ann Lee\" in 0x3fa9 (id 018f-aa)");
        assert_eq!(one, said("order 4711: no customer \"B\" in 0x1  (id 7-c3)"));
        assert_ne!(one, said("order 17: no address \"Ann Lee\" in 0x3fa9 (id 018f-aa)"));
        assert_ne!(said("can't reach it"), said("can't find it"));
        assert_eq!(said("user 'x' is gone"), said("user 'other one' is gone"));
    }

    #[test]
    fn a_trap_is_told_by_its_place_and_not_by_the_build_or_the_callers_far_below() {
        let at = |frames: &[&str], message| {
            let frames: Vec<String> = frames.iter().map(|f| (*f).to_owned()).collect();
            fingerprint(&Failure { reason: "trap", kind: "unreachable", message, frames: &frames })
        };
        let one = at(&["a::b::h0123456789abcdef", "c", "d", "e", "f", "main"], "wasm trap 1");
        assert_eq!(one, at(&["a::b::hfedcba9876543210", "c", "d", "e", "f", "other"], "wasm trap 2"));
        assert_ne!(one, at(&["a::x", "c", "d", "e", "f"], "wasm trap 1"));
    }

    #[test]
    fn the_rule_does_not_change_unnoticed() {
        let hex = |bytes: [u8; 8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        insta::assert_snapshot!(hex(said("it broke after 3 tries")));
    }

    proptest! {
        #[test]
        fn any_message_has_a_fingerprint_and_a_summary_of_one_short_line(message in ".{0,400}", kind in "[a-z]{0,8}") {
            let failure = Failure { reason: "guest-error", kind: &kind, message: &message, frames: &[] };
            let _ = fingerprint(&failure);
            let line = summary(&failure);
            prop_assert!(line.chars().count() <= SUMMARY && !line.contains(['\n', '\0']));
        }
    }
}
