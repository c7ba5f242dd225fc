//! What this worker started, what ended, and what the database accepted of it, in a file outside the database: the
//! witness of the fault tests and of an operator who doubts. Off unless configured. Never read by anybody of us, and
//! never decides anything; a line that cannot be written is dropped with one warning.
//!
//! One line per event, each written at once and by one call, so that several workers may append to one file and a
//! killed worker leaves whole lines. Every line begins with the process id:
//!
//! - `S <invocation> <attempt> <task>`: about to be handed to a cell; written before the guest can have begun;
//! - `E <invocation> <attempt> <reason> <output>`: its end has arrived, with the guest's own output if it is short;
//!   written before the database is told;
//! - `A <invocation> <attempt> <state>`: the database has accepted the end;
//! - `L`: the lease is lost or given up, and every guest of this process has been stopped.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use sandbar_host::outcome::Outcome;
use tracing::warn;

use crate::domain::ids::InvocationId;
use crate::domain::invocation::State;
use crate::store::queue::Claimed;

/// Bytes of output in a line; a longer one is left out.
const MAX_OUTPUT: usize = 256;

/// The file, if there is one.
#[derive(Debug)]
pub struct Journal {
    file: Option<File>,
    failed: AtomicBool,
}

impl Journal {
    /// Opens the file for appending.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(path: Option<&Path>) -> std::io::Result<Self> {
        let open = |path| OpenOptions::new().append(true).create(true).mode(0o600).open(path);
        Ok(Self { file: path.map(open).transpose()?, failed: AtomicBool::new(false) })
    }

    /// Whether anybody writes.
    pub fn is_on(&self) -> bool {
        self.file.is_some()
    }

    /// An attempt is about to start.
    pub fn started(&self, claimed: &Claimed) {
        self.line(|| format!("S {} {} {}", claimed.invocation.0.simple(), claimed.attempt, claimed.task));
    }

    /// An attempt's end has arrived.
    pub fn ended(&self, claimed: &Claimed, outcome: &Outcome) {
        self.line(|| {
            let termination = serde_json::to_value(&outcome.termination).unwrap_or_default();
            let reason = termination["reason"].as_str().unwrap_or("unknown");
            let output = std::str::from_utf8(&outcome.output)
                .ok()
                // What is sealed in the database does not lie open beside it.
                .filter(|_| claimed.spec.sealed.is_none())
                .filter(|text| text.len() <= MAX_OUTPUT && !text.contains('\n'))
                .unwrap_or("-");
            format!("E {} {} {reason} {output}", claimed.invocation.0.simple(), claimed.attempt)
        });
    }

    /// The database has accepted an end.
    pub fn accepted(&self, invocation: InvocationId, attempt: i16, state: State) {
        self.line(|| format!("A {} {attempt} {state}", invocation.0.simple()));
    }

    /// Nothing of ours runs any more.
    pub fn abandoned(&self) {
        self.line(|| "L".to_owned());
    }

    fn line(&self, text: impl FnOnce() -> String) {
        let Some(mut file) = self.file.as_ref() else { return };
        let line = format!("{} {}\n", std::process::id(), text());
        // One call, one line: O_APPEND keeps those of several processes apart.
        if file.write(line.as_bytes()).ok() != Some(line.len()) && !self.failed.swap(true, Ordering::Relaxed)
        {
            warn!("the journal cannot be written; lines are missing from here on");
        }
    }
}
