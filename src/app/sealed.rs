//! Payloads of invocations, sealed at rest. Owns which place a ciphertext is bound to and what of an invocation is sealed;
//! `vault` has the cipher, and the invocation's row says once and for all whether its payloads are sealed and by which
//! data key ([`Spec::sealed`]). Servers seal inputs and open what is read; workers open inputs after the claim and seal
//! what comes out before it is written (`sealed::keys`). Cells never see a key.
//!
//! Nothing is sealed to nothing: an empty payload stays empty.

pub mod export;
pub mod keys;
pub mod task;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sandbar_host::outcome::{Frame, Termination};
use serde::{Deserialize, Serialize};

use crate::app::vault::{self, DataKey, VaultError};
use crate::domain::ids::{InvocationId, TenantId};
use crate::store::invocation::{InputKind, Invocation, Spec};
use crate::store::log::Piece;

type Result<T> = std::result::Result<T, VaultError>;

/// What of an invocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part<'a> {
    /// Its input, with arguments and variables.
    Input,
    /// What came out.
    Output,
    /// A file that an attempt left.
    Artifact(&'a str),
    /// The whole log of an attempt.
    Log,
    /// A piece of the log of an attempt, by the number of its first record.
    Piece(i32),
    /// What an attempt reported last.
    Progress,
    /// The words of a failure.
    Message,
    /// Where the guest was.
    Backtrace,
    /// A failure in one line, among the dead letters.
    Summary,
    /// The input of something that it starts, by the key it gave or the id of the start.
    Start(&'a str),
}

/// The key of one invocation's payloads.
#[derive(Debug)]
pub struct Sealer {
    key: DataKey,
    tenant: TenantId,
    invocation: InvocationId,
}

/// What stands before the bytes of an input: the words of a command are as secret as its stdin.
#[derive(Debug, Serialize, Deserialize)]
struct Words {
    args: Vec<String>,
    env: std::collections::BTreeMap<String, String>,
}

impl Sealer {
    /// For this invocation, by its tenant's data key.
    #[must_use]
    pub fn new(key: &DataKey, tenant: TenantId, invocation: InvocationId) -> Self {
        Self { key: key.of_invocation(tenant, invocation), tenant, invocation }
    }

    fn context<T>(&self, attempt: i16, part: Part<'_>, then: impl FnOnce(&[&[u8]]) -> T) -> T {
        let first;
        let (word, name): (&[u8], &[u8]) = match part {
            Part::Input => (b"input", b""),
            Part::Output => (b"output", b""),
            Part::Artifact(path) => (b"artifact", path.as_bytes()),
            Part::Log => (b"log", b""),
            Part::Piece(index) => {
                first = index.to_be_bytes();
                (b"piece", &first)
            }
            Part::Progress => (b"progress", b""),
            Part::Message => (b"message", b""),
            Part::Backtrace => (b"backtrace", b""),
            Part::Summary => (b"summary", b""),
            Part::Start(name) => (b"start", name.as_bytes()),
        };
        let (tenant, invocation) = (self.tenant.0.as_bytes(), self.invocation.0.as_bytes());
        then(&[b"payload", word, tenant, invocation, &attempt.to_be_bytes(), name])
    }

    /// Seal. `attempt` is 0 for what belongs to none.
    ///
    /// # Errors
    /// Never for what fits into memory.
    pub fn seal(&self, attempt: i16, part: Part<'_>, plain: &[u8]) -> Result<Vec<u8>> {
        if plain.is_empty() {
            return Ok(Vec::new());
        }
        self.context(attempt, part, |context| vault::seal(&self.key, context, plain))
    }

    /// Open.
    ///
    /// # Errors
    /// [`VaultError::Broken`].
    pub fn open(&self, attempt: i16, part: Part<'_>, sealed: &[u8]) -> Result<Vec<u8>> {
        if sealed.is_empty() {
            return Ok(Vec::new());
        }
        let mut plain = self.context(attempt, part, |context| vault::open(&self.key, context, sealed))?;
        Ok(std::mem::take(&mut *plain))
    }

    /// Seal a text, into one that can stand where it stood.
    ///
    /// # Errors
    /// As [`Sealer::seal`].
    pub fn seal_text(&self, attempt: i16, part: Part<'_>, plain: &str) -> Result<String> {
        Ok(BASE64_STANDARD.encode(self.seal(attempt, part, plain.as_bytes())?))
    }

    /// Open such a text.
    ///
    /// # Errors
    /// As [`Sealer::open`].
    pub fn open_text(&self, attempt: i16, part: Part<'_>, sealed: &str) -> Result<String> {
        let sealed = BASE64_STANDARD.decode(sealed).map_err(|_| VaultError::Broken)?;
        String::from_utf8(self.open(attempt, part, &sealed)?).map_err(|_| VaultError::Broken)
    }

    /// Seal an input and the words of its command, and say so in the spec.
    ///
    /// # Errors
    /// As [`Sealer::seal`].
    pub fn seal_input(&self, id: &str, spec: &mut Spec, input: &mut Vec<u8>) -> Result<()> {
        let words = match &mut spec.input {
            InputKind::Task | InputKind::Http => Vec::new(),
            InputKind::Command { args, env } => {
                let words = Words { args: std::mem::take(args), env: std::mem::take(env) };
                serde_json::to_vec(&words).map_err(|_| VaultError::Broken)?
            }
        };
        let length = u32::try_from(words.len()).map_err(|_| VaultError::Broken)?;
        let plain = zeroize::Zeroizing::new([&length.to_be_bytes(), words.as_slice(), input].concat());
        *input = self.seal(0, Part::Input, &plain)?;
        spec.sealed = Some(id.to_owned());
        Ok(())
    }

    /// Open an input and the words of its command. The spec goes on saying that it was sealed.
    ///
    /// # Errors
    /// As [`Sealer::open`].
    pub fn open_input(&self, spec: &mut Spec, input: &mut Vec<u8>) -> Result<()> {
        let mut plain = self.open(0, Part::Input, input)?;
        let length = plain.first_chunk::<4>().map(|length| u32::from_be_bytes(*length));
        let length = length.and_then(|length| usize::try_from(length).ok()).ok_or(VaultError::Broken)?;
        let end = length.checked_add(4).filter(|end| *end <= plain.len()).ok_or(VaultError::Broken)?;
        if let InputKind::Command { args, env } = &mut spec.input {
            let words = serde_json::from_slice(&plain[4..end]);
            Words { args: *args, env: *env } = words.map_err(|_| VaultError::Broken)?;
        }
        plain.drain(..end);
        *input = plain;
        Ok(())
    }

    /// Seal the words of how an attempt ended; its reason stays.
    ///
    /// # Errors
    /// As [`Sealer::seal`].
    pub fn seal_termination(&self, attempt: i16, termination: &mut Termination) -> Result<()> {
        if let Some(message) = message(termination) {
            *message = self.seal_text(attempt, Part::Message, message)?;
        }
        Ok(())
    }

    /// Open them.
    ///
    /// # Errors
    /// As [`Sealer::open`].
    pub fn open_termination(&self, attempt: i16, termination: &mut Termination) -> Result<()> {
        if let Some(message) = message(termination) {
            *message = self.open_text(attempt, Part::Message, message)?;
        }
        Ok(())
    }

    /// Seal a backtrace, into one of a single frame: a server that does not know of sealing reads it as what it is.
    ///
    /// # Errors
    /// As [`Sealer::seal`].
    pub fn seal_backtrace(&self, attempt: i16, frames: &mut Vec<Frame>) -> Result<()> {
        if !frames.is_empty() {
            let text = serde_json::to_string(frames).map_err(|_| VaultError::Broken)?;
            let function = self.seal_text(attempt, Part::Backtrace, &text)?;
            *frames = vec![Frame { function, file: None, line: None, module_offset: None }];
        }
        Ok(())
    }

    /// Open it.
    ///
    /// # Errors
    /// As [`Sealer::open`].
    pub fn open_backtrace(&self, attempt: i16, frames: &mut Vec<Frame>) -> Result<()> {
        if let [only] = frames.as_slice() {
            let text = self.open_text(attempt, Part::Backtrace, &only.function)?;
            *frames = serde_json::from_str(&text).map_err(|_| VaultError::Broken)?;
        }
        Ok(())
    }

    /// Open a piece of a log.
    ///
    /// # Errors
    /// As [`Sealer::open`].
    pub fn open_piece(&self, piece: &mut Piece) -> Result<()> {
        let part = if piece.whole { Part::Log } else { Part::Piece(piece.first) };
        piece.records = self.open(piece.attempt, part, &piece.records)?;
        Ok(())
    }

    /// Open all that is shown of an invocation.
    ///
    /// # Errors
    /// As [`Sealer::open`].
    pub fn open_invocation(&self, invocation: &mut Invocation) -> Result<()> {
        for attempt in &mut invocation.attempts {
            self.open_termination(attempt.attempt, &mut attempt.termination)?;
            if let Some(frames) = &mut attempt.backtrace {
                self.open_backtrace(attempt.attempt, frames)?;
            }
        }
        if let Some(bytes) = invocation.output.as_mut().and_then(|output| output.bytes.as_mut()) {
            *bytes = self.open(0, Part::Output, bytes)?;
        }
        if let Some(progress) = &mut invocation.progress {
            let message = &mut progress.report.message;
            *message = self.open_text(progress.attempt, Part::Progress, message)?;
        }
        Ok(())
    }
}

/// The words of a termination that may be a guest's.
pub(super) fn message(termination: &mut Termination) -> Option<&mut String> {
    match termination {
        Termination::GuestError { message, .. }
        | Termination::Trap { message, .. }
        | Termination::HostFault { message } => Some(message),
        Termination::Succeeded
        | Termination::ExitCode { .. }
        | Termination::OutOfFuel
        | Termination::OutOfMemory
        | Termination::StackOverflow
        | Termination::Deadline
        | Termination::OutputTooLarge
        // Names of quotas and capabilities, as they stand in the documentation.
        | Termination::QuotaExceeded { .. }
        | Termination::Denied { .. }
        | Termination::Cancelled
        | Termination::LeaseLost => None,
    }
}

/// Leave out what cannot be opened any more: its key is gone.
pub(super) fn blank(invocation: &mut Invocation) {
    for attempt in &mut invocation.attempts {
        if let Some(message) = message(&mut attempt.termination) {
            message.clear();
        }
        attempt.backtrace = None;
    }
    if let Some(output) = &mut invocation.output {
        output.bytes = None;
    }
    invocation.progress = None;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::app::vault::{KEY_BYTES, Vault};
    use proptest::prelude::*;

    fn key(tenant: TenantId) -> DataKey {
        Vault::new(Some([3; KEY_BYTES]), Vec::new()).make(tenant).unwrap().0
    }

    const PARTS: [Part<'static>; 13] = [
        Part::Input,
        Part::Output,
        Part::Artifact("a"),
        Part::Artifact("b"),
        Part::Log,
        Part::Piece(0),
        Part::Piece(1),
        Part::Progress,
        Part::Message,
        Part::Backtrace,
        Part::Summary,
        Part::Start("a"),
        Part::Start("b"),
    ];

    #[test]
    fn a_payload_opens_in_its_own_place_only() {
        let (tenant, other) = (TenantId::generate(), TenantId::generate());
        let (one, two) = (InvocationId::generate(), InvocationId::generate());
        let key = key(tenant);
        let sealer = Sealer::new(&key, tenant, one);
        for part in PARTS {
            let sealed = sealer.seal(1, part, b"hush").unwrap();
            assert_eq!(sealed.len(), 4 + vault::OVERHEAD);
            assert_eq!(sealer.open(1, part, &sealed).unwrap(), b"hush");
            assert!(sealer.open(2, part, &sealed).is_err());
            for elsewhere in PARTS.into_iter().filter(|elsewhere| *elsewhere != part) {
                assert!(sealer.open(1, elsewhere, &sealed).is_err(), "{part:?} {elsewhere:?}");
            }
            assert!(Sealer::new(&key, tenant, two).open(1, part, &sealed).is_err());
            assert!(Sealer::new(&key, other, one).open(1, part, &sealed).is_err());
        }
        assert_eq!(vault::OVERHEAD, usize::try_from(crate::store::invocation::SEALED_BYTES).unwrap());
    }

    proptest! {
        #[test]
        fn an_input_comes_back_with_its_words_and_neither_is_seen(
            args in prop::collection::vec("[a-z]{6,12}", 0..4),
            value in "[a-z]{6,12}",
            bytes in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let tenant = TenantId::generate();
            let sealer = Sealer::new(&key(tenant), tenant, InvocationId::generate());
            let env = [("K".to_owned(), value.clone())].into();
            let spec = Spec {
                input: InputKind::Command { args: args.clone(), env },
                limits: sandbar_host::limits::Limits::default(),
                retry: crate::domain::retry::RetryPolicy::default(),
                retry_of: None,
                scratch: None,
                determinism: None,
                family: None,
                sealed: None,
            };
            let (mut hidden, mut input) = (spec.clone(), bytes.clone());
            sealer.seal_input("id", &mut hidden, &mut input).unwrap();
            let shown = serde_json::to_string(&hidden).unwrap();
            prop_assert!(!shown.contains(&value) && args.iter().all(|arg| !shown.contains(arg)));
            prop_assert!(bytes.len() < 4 || !input.windows(bytes.len()).any(|part| part == bytes));
            sealer.open_input(&mut hidden, &mut input).unwrap();
            prop_assert_eq!(input, bytes);
            prop_assert_eq!(hidden, Spec { sealed: Some("id".to_owned()), ..spec });
        }

        #[test]
        fn any_bytes_in_the_place_of_a_payload_are_refused_and_nothing_panics(bytes in prop::collection::vec(any::<u8>(), 1..200), text in ".{1,40}") {
            let tenant = TenantId::generate();
            let sealer = Sealer::new(&key(tenant), tenant, InvocationId::generate());
            prop_assert!(sealer.open(0, Part::Input, &bytes).is_err());
            prop_assert!(sealer.open_text(0, Part::Message, &text).is_err());
        }
    }
}
