//! Names and tags that users choose: checked once, here, and typed afterwards.
//! Owns the alphabet and the bounds; knows no table and no request.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a name, key or tag was refused. The text tells the user what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {problem}")]
pub struct InvalidName {
    /// What was being named.
    pub what: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

/// Name of a task: 1 to 63 of `a-z 0-9 - _`, beginning with a letter or a digit.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TaskName(String);

impl TaskName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for TaskName {
    type Error = InvalidName;
    fn try_from(text: String) -> Result<Self, InvalidName> {
        let ok = (1..=63).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
            && !text.starts_with(['-', '_']);
        if ok {
            Ok(Self(text))
        } else {
            Err(InvalidName {
                what: "a task name",
                problem:
                    "must be 1 to 63 characters of a-z, 0-9, - and _, and begin with a letter or a digit"
                        .to_owned(),
            })
        }
    }
}

impl From<TaskName> for String {
    fn from(name: TaskName) -> Self {
        name.0
    }
}

impl fmt::Display for TaskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Labels of an invocation: at most 16, keys of 1 to 64 and values of up to 256 bytes, no control characters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>", into = "BTreeMap<String, String>")]
pub struct Tags(BTreeMap<String, String>);

impl Tags {
    /// How many tags an invocation may have.
    pub const MAX_COUNT: usize = 16;
    /// Bytes of a key.
    pub const MAX_KEY: usize = 64;
    /// Bytes of a value.
    pub const MAX_VALUE: usize = 256;

    /// Keys and values in the order of the keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }
}

impl TryFrom<BTreeMap<String, String>> for Tags {
    type Error = InvalidName;
    fn try_from(map: BTreeMap<String, String>) -> Result<Self, InvalidName> {
        let refuse = |problem: &str| Err(InvalidName { what: "tags", problem: problem.to_owned() });
        if map.len() > Self::MAX_COUNT {
            return refuse("may be at most 16");
        }
        for (key, value) in &map {
            if key.is_empty() || key.len() > Self::MAX_KEY || key.contains([':', '=']) {
                return refuse("need keys of 1 to 64 bytes without ':' and '='");
            }
            if value.len() > Self::MAX_VALUE {
                return refuse("need values of at most 256 bytes");
            }
            // NUL cannot be stored as text; the others are never meant.
            if key.chars().chain(value.chars()).any(char::is_control) {
                return refuse("may not contain control characters");
            }
        }
        Ok(Self(map))
    }
}

impl From<Tags> for BTreeMap<String, String> {
    fn from(tags: Tags) -> Self {
        tags.0
    }
}

/// A client's key for one request: 1 to 255 visible ASCII characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyKey(String);

impl IdempotencyKey {
    /// The key as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for IdempotencyKey {
    type Error = InvalidName;
    fn try_from(text: String) -> Result<Self, InvalidName> {
        if (1..=255).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) {
            Ok(Self(text))
        } else {
            Err(InvalidName {
                what: "an Idempotency-Key",
                problem: "must be 1 to 255 visible ASCII characters without spaces".to_owned(),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn task_names_outside_the_alphabet_are_refused() {
        for bad in ["", "-a", "_a", "A", "a b", "a/b", "ä", &"a".repeat(64)] {
            assert!(TaskName::try_from(bad.to_owned()).is_err(), "{bad}");
        }
        for good in ["a", "0", "word-count", "a_b", &"a".repeat(63)] {
            assert!(TaskName::try_from(good.to_owned()).is_ok(), "{good}");
        }
    }

    #[test]
    fn tags_with_nul_or_too_long_are_refused() {
        let one = |k: &str, v: &str| Tags::try_from(BTreeMap::from([(k.to_owned(), v.to_owned())]));
        assert!(one("k", "v\0").is_err());
        assert!(one("k\n", "v").is_err());
        assert!(one("", "v").is_err());
        assert!(one("a:b", "v").is_err());
        assert!(one("k", &"v".repeat(257)).is_err());
        assert!(one("k", &"v".repeat(256)).is_ok());
    }
}
