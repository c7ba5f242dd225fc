//! A whole task: typed input, typed output, doc comments that become the description and the
//! schemas, and native tests.

use std::collections::HashMap;

use sandbar_guest::{Context, Schema, TaskError, log, task};
use serde::{Deserialize, Serialize};

/// How many words are listed where the input does not say.
const DEFAULT_TOP: u32 = 10;

/// The text to count, and how much of the result to list.
#[derive(Deserialize, Schema)]
#[serde(deny_unknown_fields)]
struct Input {
    /// The text to count.
    text: String,
    /// How many of the most frequent words to list; 10 if absent.
    top: Option<u32>,
}

/// What was counted.
#[derive(Serialize, Schema, Debug, PartialEq)]
struct Counts {
    /// Words in all.
    total: u64,
    /// Different words.
    distinct: u64,
    /// The most frequent words, most frequent first, equally frequent ones by the alphabet.
    top: Vec<Word>,
}

/// A word and how often it occurs.
#[derive(Serialize, Schema, Debug, PartialEq)]
struct Word {
    /// The word, in lower case.
    word: String,
    /// How often it occurs.
    count: u64,
}

/// Counts the words of a text and lists the most frequent.
///
/// A word is a run of letters and digits; apostrophes inside it belong to it, and upper and lower
/// case are the same.
#[task(limits(memory = "64MiB", timeout = "10s"), retry(max_attempts = 3))]
fn word_count(ctx: &Context, input: Input) -> Result<Counts, TaskError> {
    let mut counts: HashMap<String, u64> = HashMap::new();
    let mut total = 0;
    for word in words(&input.text) {
        *counts.entry(word).or_default() += 1;
        total += 1;
    }
    ctx.progress(1, 2, "counted");

    let distinct = counts.len() as u64;
    let mut top: Vec<Word> = counts.into_iter().map(|(word, count)| Word { word, count }).collect();
    top.sort_unstable_by(|a, b| b.count.cmp(&a.count).then_with(|| a.word.cmp(&b.word)));
    top.truncate(input.top.unwrap_or(DEFAULT_TOP) as usize);
    ctx.progress(2, 2, "sorted");

    log::info!(total, distinct; "counted the words of {} bytes", input.text.len());
    Ok(Counts { total, distinct, top })
}

/// The words of a text in lower case.
fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(|c: char| !c.is_alphanumeric() && c != '\'' && c != '’')
        .map(|word| word.trim_matches(['\'', '’']))
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(text: &str, top: Option<u32>) -> Counts {
        word_count(&Context::test().build(), Input { text: text.to_owned(), top }).unwrap()
    }

    fn word(word: &str, count: u64) -> Word {
        Word { word: word.to_owned(), count }
    }

    #[test]
    fn case_and_punctuation_do_not_matter_and_apostrophes_do() {
        let counts = count("Don't panic! 'Don't', said Ärger: ÄRGER, panic.", None);
        assert_eq!((counts.total, counts.distinct), (7, 4));
        assert_eq!(counts.top, [word("don't", 2), word("panic", 2), word("ärger", 2), word("said", 1)]);
    }

    #[test]
    fn the_list_is_as_long_as_asked_for() {
        let text: String = (0..20).map(|n| format!("w{n} ")).collect();
        assert_eq!(count(&text, None).top.len(), 10);
        assert_eq!(count(&text, Some(3)).top.len(), 3);
        assert_eq!(count(&text, Some(100)).top.len(), 20);
    }

    #[test]
    fn a_text_without_words_counts_zero() {
        assert_eq!(count(" -- ", None), Counts { total: 0, distinct: 0, top: Vec::new() });
    }

    #[test]
    fn the_task_describes_itself() {
        let manifest = sandbar_guest::manifest!(word_count);
        assert!(
            manifest.starts_with(r#"{"name":"word-count","description":"Counts the words"#),
            "{manifest}"
        );
    }
}
