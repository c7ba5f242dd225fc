//! A Sandbar task in Rust, with the SDK.

use sandbar_guest::{Context, Schema, TaskError, task, tracing};
use serde::{Deserialize, Serialize};

/// The text to look at.
#[derive(Deserialize, Schema)]
struct Input {
    /// Any text.
    text: String,
}

/// What was found.
#[derive(Serialize, Schema, Debug, PartialEq)]
struct Stats {
    /// Lines; the last one counts whether or not it ends with a line feed.
    lines: usize,
    /// Words: what stands between spaces, tabs and line breaks.
    words: usize,
    /// The longest word by bytes; the first of equals.
    longest: String,
}

/// Counts the lines and words of a text and finds its longest word.
#[task(limits(timeout = "10s"), retry(max_attempts = 2))]
fn text_stats(ctx: &Context, input: Input) -> Result<Stats, TaskError> {
    let words = || input.text.split([' ', '\t', '\r', '\n']).filter(|word| !word.is_empty());
    let longest = words().reduce(|best, word| if word.len() > best.len() { word } else { best });
    let stats = Stats {
        lines: input.text.lines().count(),
        words: words().count(),
        longest: longest.unwrap_or_default().to_owned(),
    };
    ctx.progress(1, 1, "counted");
    tracing::info!(words = stats.words, attempt = ctx.attempt(), "counted the words");
    Ok(stats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_word_is_the_first_of_equals() {
        let ctx = Context::test().capture_logs().build();
        let stats = text_stats(&ctx, Input { text: "one two\nthree seven\n".to_owned() });
        assert_eq!(stats, Ok(Stats { lines: 2, words: 4, longest: "three".to_owned() }));
        assert_eq!(ctx.captured_logs()[0].fields[0], ("words".to_owned(), "4".to_owned()));
        assert_eq!(ctx.reported_progress().len(), 1);
    }
}
