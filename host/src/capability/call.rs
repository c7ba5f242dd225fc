//! What a cell and its parent say to each other about one call of a capability: one question, one answer. Owns the
//! messages and their bounds; both sides hold each other to them.

use serde::{Deserialize, Serialize};

use crate::blob;

/// Questions of one attempt that may be under way at once. A guest waits for each answer; more than one is under way
/// only while an answer crosses the next question.
pub const MAX_AT_ONCE: usize = 4;
/// Bytes of a key.
pub const MAX_KEY: usize = 256;
/// Bytes of a value.
pub const MAX_VALUE: usize = 256 << 10;
/// Keys of one call for several.
pub const MAX_BATCH: usize = 100;
/// Bytes of the values of one call for several, in or out. Half of what any call may carry, so that what is a little too
/// large is refused in words.
pub const MAX_BATCH_BYTES: usize = 512 << 10;
/// Keys on one page of a list.
pub const MAX_LISTED: usize = 1_000;

/// Texts that people can set on a task.
pub const MAX_CONFIG: usize = 100;
/// Bytes of their keys and values together.
pub const MAX_CONFIG_BYTES: usize = 64 << 10;
/// Bytes of a secret's name.
pub const MAX_SECRET_NAME: usize = 64;
/// Bytes of a secret.
pub const MAX_SECRET_BYTES: usize = 64 << 10;

/// Bytes of the input of what is started.
pub const MAX_START_INPUT: usize = 256 << 10;
/// Bytes of the key under which something is started.
pub const MAX_START_KEY: usize = 128;
/// Bytes of a task's name.
const MAX_TASK_NAME: usize = 63;

/// What a guest asks for, or its memory for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// About the store of its task.
    Kv(KvAsk),
    /// What people have set on its task.
    Config,
    /// The value of a secret.
    Secret {
        /// Which one.
        name: String,
    },
    /// Start another task.
    Start {
        /// Its name.
        task: String,
        /// Its input.
        #[serde(with = "blob")]
        input: Vec<u8>,
        /// Under this key once.
        key: Option<String>,
    },
    /// That it may hold so much memory in all, within its limit.
    Memory {
        /// Bytes.
        bytes: u64,
    },
}

/// About the store of a task. Versions are the store's; 0 stands for a key that is not there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // what keys and values are need not be said each time
pub enum KvAsk {
    /// Whether it may be used.
    Open,
    /// One value with its version.
    Get { key: String },
    /// The version of a value.
    Version { key: String },
    /// Values, in the order of the keys.
    GetMany { keys: Vec<String> },
    /// Keys behind this one.
    List { after: Option<String> },
    /// Write, all or nothing; no value: take away.
    Put { pairs: Vec<Pair> },
    /// Add to a number.
    Increment { key: String, delta: i64 },
    /// Write, if the version is still this one.
    Swap {
        key: String,
        version: i64,
        #[serde(with = "blob")]
        value: Vec<u8>,
    },
}

/// One key and what is to be there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// The key.
    pub key: String,
    /// The value; none: nothing.
    pub value: Option<Value>,
}

/// Bytes of a value.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Value(#[serde(with = "blob")] pub Vec<u8>);

/// It may be a secret.
impl std::fmt::Debug for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Value({} bytes)", self.0.len())
    }
}

/// What comes back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// From the store of the task.
    Kv(KvAnswer),
    /// What people have set, by key.
    Config(Vec<(String, String)>),
    /// A secret, if there is one of this name.
    Secret(Option<Value>),
    /// The id of what was started.
    Started(String),
    /// It may hold so many bytes of memory, no fewer than it asked for.
    Memory(u64),
    /// It was not done.
    Refused(Refusal),
}

/// From the store of a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum KvAnswer {
    /// Done, or: it may be used.
    Done,
    /// The value and its version.
    Value(Option<Value>, i64),
    /// The version alone.
    Version(i64),
    /// Values, in the order of the keys.
    Values(Vec<Option<Value>>),
    /// Keys in the order of their bytes, and whether there are more.
    Keys(Vec<String>, bool),
    /// The sum.
    Number(i64),
    /// Not written: the version is another, this one.
    Changed(i64),
}

/// Why something was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// For programs.
    pub kind: RefusalKind,
    /// For people.
    pub message: String,
}

/// Kinds of refusals, as far as interfaces tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalKind {
    /// The task has no grant for it.
    Denied,
    /// It cannot be, now or ever, for a reason of the one who asks.
    Refused,
    /// Something else; another call may do better.
    Failed,
}

impl Refusal {
    /// There is no grant.
    pub fn denied(message: impl Into<String>) -> Self {
        Self { kind: RefusalKind::Denied, message: message.into() }
    }

    /// It cannot be.
    pub fn refused(message: impl Into<String>) -> Self {
        Self { kind: RefusalKind::Refused, message: message.into() }
    }

    /// Something else.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { kind: RefusalKind::Failed, message: message.into() }
    }
}

impl Ask {
    /// Which capability, for logs.
    #[must_use]
    pub const fn capability(&self) -> &'static str {
        match self {
            Self::Kv(_) => "kv",
            Self::Config => "config",
            Self::Secret { .. } => "secrets",
            Self::Start { .. } => "invoke",
            Self::Memory { .. } => "memory",
        }
    }

    /// Whether it keeps to the bounds.
    ///
    /// # Errors
    /// Which one it does not.
    pub fn check(&self) -> Result<(), Refusal> {
        match self {
            Self::Kv(ask) => ask.check(),
            Self::Config | Self::Memory { .. } => Ok(()),
            Self::Secret { name } => check_secret(name),
            Self::Start { task, input, key } => check_start(task, input, key.as_deref()),
        }
    }

    /// Bytes that the question, and an answer to it, hold at the most.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        let bytes = match self {
            Self::Kv(ask) => ask.held_bytes(),
            Self::Config => 2 * MAX_CONFIG_BYTES,
            Self::Secret { .. } => MAX_SECRET_BYTES,
            Self::Start { input, .. } => input.len(),
            Self::Memory { .. } => 0,
        };
        bytes as u64
    }
}

impl KvAsk {
    fn check(&self) -> Result<(), Refusal> {
        match self {
            Self::Open | Self::List { after: None } => Ok(()),
            // No longer than a key, and not said to be one.
            Self::List { after: Some(key) } => check_key(key),
            Self::Get { key } | Self::Version { key } | Self::Increment { key, .. } => check_key(key),
            Self::Swap { key, value, .. } => check_key(key).and_then(|()| check_value(value)),
            Self::GetMany { keys } => {
                check_count(keys.len())?;
                keys.iter().try_for_each(|key| check_key(key))
            }
            Self::Put { pairs } => {
                check_count(pairs.len())?;
                let mut bytes = 0usize;
                for Pair { key, value } in pairs {
                    check_key(key)?;
                    if let Some(Value(value)) = value {
                        check_value(value)?;
                        bytes = bytes.saturating_add(value.len());
                    }
                }
                check_batch_bytes(bytes)
            }
        }
    }

    fn held_bytes(&self) -> usize {
        match self {
            Self::Open | Self::Version { .. } | Self::Increment { .. } => MAX_KEY,
            Self::Get { .. } => MAX_VALUE,
            Self::GetMany { .. } => MAX_BATCH_BYTES,
            Self::List { .. } => MAX_LISTED * MAX_KEY,
            Self::Swap { value, .. } => value.len(),
            Self::Put { pairs } => pairs
                .iter()
                .map(|pair| pair.key.len() + pair.value.as_ref().map_or(0, |value| value.0.len()))
                .sum(),
        }
    }
}

fn check_secret(name: &str) -> Result<(), Refusal> {
    let fits = (1..=MAX_SECRET_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !name.starts_with(|c: char| c.is_ascii_digit());
    if fits {
        return Ok(());
    }
    let words =
        format!("the name of a secret has 1 to {MAX_SECRET_NAME} letters, digits and _, and no digit first");
    Err(Refusal::failed(words))
}

fn check_start(task: &str, input: &[u8], key: Option<&str>) -> Result<(), Refusal> {
    if task.is_empty() || task.len() > MAX_TASK_NAME || task.contains('\0') {
        return Err(Refusal::refused(format!("the name of a task has 1 to {MAX_TASK_NAME} bytes")));
    }
    if key.is_some_and(|key| key.is_empty() || key.len() > MAX_START_KEY || key.contains('\0')) {
        return Err(Refusal::refused(format!("a key has 1 to {MAX_START_KEY} bytes and no NUL")));
    }
    if input.len() > MAX_START_INPUT {
        let found = input.len();
        return Err(Refusal::refused(format!(
            "the input of what is started has at most {MAX_START_INPUT} bytes; this one has {found}"
        )));
    }
    Ok(())
}

fn check_key(key: &str) -> Result<(), Refusal> {
    if key.is_empty() || key.len() > MAX_KEY || key.contains('\0') {
        return Err(Refusal::failed(format!(
            "a key has 1 to {MAX_KEY} bytes and no NUL; this one has {} bytes",
            key.len()
        )));
    }
    Ok(())
}

fn check_value(value: &[u8]) -> Result<(), Refusal> {
    if value.len() > MAX_VALUE {
        return Err(Refusal::failed(format!(
            "a value has at most {MAX_VALUE} bytes; this one has {}",
            value.len()
        )));
    }
    Ok(())
}

fn check_count(keys: usize) -> Result<(), Refusal> {
    if keys > MAX_BATCH {
        return Err(Refusal::failed(format!(
            "one call is for at most {MAX_BATCH} keys; this one has {keys}"
        )));
    }
    Ok(())
}

/// Whether values that belong to one call may be together in it.
///
/// # Errors
/// They are too large.
pub fn check_batch_bytes(bytes: usize) -> Result<(), Refusal> {
    if bytes > MAX_BATCH_BYTES {
        return Err(Refusal::failed(format!(
            "the values of one call have at most {MAX_BATCH_BYTES} bytes together; these have {bytes}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn put(keys: usize, key: &str, bytes: usize) -> Ask {
        let pair = Pair { key: key.to_owned(), value: Some(Value(vec![0; bytes])) };
        Ask::Kv(KvAsk::Put { pairs: vec![pair; keys] })
    }

    #[test]
    fn what_is_over_a_bound_is_refused_and_what_is_at_it_is_not() {
        let longest = "k".repeat(MAX_KEY);
        for good in [
            put(1, &longest, MAX_VALUE),
            put(MAX_BATCH, "k", MAX_BATCH_BYTES / MAX_BATCH),
            put(0, "k", 0),
            Ask::Kv(KvAsk::List { after: Some(longest.clone()) }),
            Ask::Kv(KvAsk::GetMany { keys: vec![longest.clone(); MAX_BATCH] }),
        ] {
            good.check().unwrap();
        }
        for bad in [
            put(1, &format!("{longest}k"), 0),
            put(1, "", 0),
            put(1, "a\0b", 0),
            put(1, "k", MAX_VALUE + 1),
            put(MAX_BATCH + 1, "k", 0),
            put(5, "k", MAX_BATCH_BYTES / 5 + 1),
            Ask::Kv(KvAsk::Get { key: String::new() }),
            Ask::Kv(KvAsk::GetMany { keys: vec![longest; MAX_BATCH + 1] }),
            Ask::Kv(KvAsk::Swap { key: "k".to_owned(), version: 0, value: vec![0; MAX_VALUE + 1] }),
        ] {
            assert_eq!(bad.check().unwrap_err().kind, RefusalKind::Failed);
        }
    }
}
