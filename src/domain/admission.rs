//! What a request may say about its place among others: one at a time under a key, so many at once under a key, only
//! after others. Owns the words and their bounds; the queue protocol holds to them.

use serde::{Deserialize, Serialize};

use crate::domain::ids::InvocationId;
use crate::domain::names::InvalidName;

/// Invocations that one may depend on.
pub const MAX_DEPENDENCIES: usize = 32;
/// The largest `concurrency_limit`.
pub const MAX_CONCURRENCY: u32 = 10_000;

/// A key chosen by a client, unique or for concurrency: 1 to 255 bytes of text without control characters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Key(String);

impl Key {
    /// The key as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Key {
    type Error = InvalidName;
    fn try_from(text: String) -> Result<Self, InvalidName> {
        // NUL cannot be stored as text; the others are never meant.
        if (1..=255).contains(&text.len()) && !text.chars().any(char::is_control) {
            Ok(Self(text))
        } else {
            Err(InvalidName {
                what: "a key",
                problem: "must be 1 to 255 bytes without control characters".to_owned(),
            })
        }
    }
}

/// What happens to a request whose unique key an unfinished invocation of the same task holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UniquePolicy {
    /// It is refused.
    Reject,
    /// It is answered with the holder.
    Return,
    /// It takes the place of a holder that has not started; while that runs, it is refused.
    Replace,
    /// It puts a holder that has not started off until its own time; while that runs, it waits in its stead.
    Debounce,
}

/// At most one unfinished invocation of a task under this key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unique {
    /// The key, within the task.
    pub key: Key,
    /// What happens to another.
    pub policy: UniquePolicy,
}

/// At most `limit` running invocations of a task under this key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Concurrency {
    /// The key, within the task.
    pub key: Key,
    /// It starts only while fewer than this run. 1 to [`MAX_CONCURRENCY`].
    pub limit: u32,
}

/// How another invocation must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    /// Well.
    Succeeded,
    /// Somehow.
    Finished,
    /// Not well: dead, cancelled or expired.
    Failed,
}

/// An invocation that must end first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dependency {
    /// Which.
    pub id: InvocationId,
    /// How.
    pub condition: Condition,
}

/// All of it. The default asks for nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Admission {
    /// One at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unique: Option<Unique>,
    /// So many at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<Concurrency>,
    /// Only after these; at most [`MAX_DEPENDENCIES`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub depends_on: Vec<Dependency>,
    /// A condition that was not met lets it run all the same; otherwise it is cancelled.
    #[serde(rename = "cancels", serialize_with = "negated")]
    pub run_unmet: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn negated<S: serde::Serializer>(run: &bool, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bool(!run)
}

impl Admission {
    /// Whether it asks for nothing.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.unique.is_none() && self.concurrency.is_none() && self.depends_on.is_empty()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn keys_that_cannot_be_stored_or_are_never_meant_are_refused() {
        for bad in ["", "a\0", "a\n", &"ä".repeat(128)] {
            assert!(Key::try_from(bad.to_owned()).is_err(), "{bad:?}");
        }
        for good in ["a", "order 17 / ä", &"a".repeat(255)] {
            assert!(Key::try_from(good.to_owned()).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn the_queue_reads_what_is_written_here() {
        let all = Admission {
            unique: Some(Unique {
                key: Key::try_from("u".to_owned()).unwrap(),
                policy: UniquePolicy::Debounce,
            }),
            concurrency: Some(Concurrency { key: Key::try_from("c".to_owned()).unwrap(), limit: 2 }),
            depends_on: vec![Dependency {
                id: InvocationId(uuid::Uuid::nil()),
                condition: Condition::Finished,
            }],
            run_unmet: true,
        };
        assert_eq!(
            serde_json::to_value(all).unwrap(),
            serde_json::json!({
                "unique": {"key": "u", "policy": "debounce"}, "concurrency": {"key": "c", "limit": 2},
                "depends_on": [{"id": "00000000-0000-0000-0000-000000000000", "condition": "finished"}], "cancels": false,
            })
        );
        assert!(Admission::default().is_plain());
    }
}
