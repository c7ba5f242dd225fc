//! A claimed attempt on its way to whoever runs it, and what its end means for its invocation. Pure: holds nothing.

use sandbar_host::ModuleHash;
use sandbar_host::log::Log;
use sandbar_host::outcome::{Outcome, Receipt, Termination};
use sandbar_host::run::{Attempt, Context, Input, Options};
use tracing::warn;

use crate::domain::retry::Ending;
use crate::store::invocation::InputKind;
use crate::store::kv::AttemptName;
use crate::store::queue::{Claimed, Withheld};
use crate::worker::lease::Lease;

/// What an attempt is denied whose tenant's key was erased.
const ERASED: &str = "run: the key that sealed the input was erased";

/// The attempt as the database knows it.
pub fn attempt_name(lease: &Lease, claimed: &Claimed) -> AttemptName {
    AttemptName { worker: lease.worker(), epoch: lease.epoch(), claim: claimed.claim() }
}

/// The message to the cell.
pub fn attempt(claimed: &Claimed) -> Attempt {
    let mut bytes = claimed.input.as_slice();
    let mut scratch = None;
    if let Some(spec) = &claimed.spec.scratch {
        // A row that is too short was not written by this code; it runs without its files, and will miss them.
        let (input, laid) = spec.unstow(bytes).unwrap_or_default();
        bytes = input;
        scratch = Some(laid);
    }
    let input = match &claimed.spec.input {
        // One without a guest goes to no cell.
        InputKind::Task | InputKind::Http => Input::Task { bytes: bytes.to_vec() },
        InputKind::Command { args, env } => Input::Command {
            args: args.clone(),
            env: env.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
            stdin: bytes.to_vec(),
        },
    };
    let (high, low) = claimed.tenant.0.as_u64_pair();
    Attempt {
        module: ModuleHash::from_bytes(claimed.sha256),
        tenant: high ^ low,
        weight: claimed.weight.unsigned_abs(),
        input,
        limits: claimed.spec.limits,
        context: Context {
            invocation_id: claimed.invocation.to_string(),
            task: claimed.task.clone(),
            attempt: u32::from(claimed.attempt.unsigned_abs()),
            max_attempts: u32::from(claimed.spec.retry.max_attempts),
            tags: claimed.tags.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
        },
        options: Options { scratch, determinism: claimed.spec.determinism, memory_lent: None },
    }
}

/// How an attempt ends whose input cannot be had.
pub fn unreadable(why: Withheld) -> Termination {
    let fault = |message: &str| Termination::HostFault { message: message.to_owned() };
    match why {
        Withheld::NoKey => {
            warn!("a claimed input is sealed, and this worker has no master key that opens it: handed back");
            fault("this worker has no master key that opens the input")
        }
        Withheld::Broken => {
            warn!("a claimed input does not open: its row was changed or moved");
            fault("the input does not open: it was changed or moved")
        }
        Withheld::Erased => Termination::Denied { capability: ERASED.to_owned() },
    }
}

/// What retrying makes of each reason. What the same bytes on the same input under the same limits will do again is
/// fatal; what time, the outside or chance had a part in is worth another attempt.
#[must_use]
pub fn ending(termination: &Termination) -> Ending {
    match termination {
        Termination::Succeeded => Ending::Success,
        Termination::GuestError { retryable: true, retry_after_ms, .. } => {
            Ending::Retryable { after_ms: *retry_after_ms }
        }
        Termination::GuestError { retryable: false, .. }
        | Termination::OutOfFuel
        | Termination::OutOfMemory
        | Termination::StackOverflow
        | Termination::OutputTooLarge
        | Termination::QuotaExceeded { .. }
        | Termination::Denied { .. } => Ending::Fatal,
        Termination::ExitCode { .. } | Termination::Trap { .. } | Termination::Deadline => {
            Ending::Retryable { after_ms: None }
        }
        Termination::Cancelled => Ending::Cancelled,
        Termination::LeaseLost | Termination::HostFault { .. } => Ending::HostFault,
    }
}

/// An outcome of an attempt that no guest took part in.
pub fn without_run(termination: Termination) -> Outcome {
    Outcome {
        termination,
        receipt: Receipt { fuel_exact: true, ..Receipt::default() },
        output: Vec::new(),
        content_type: String::new(),
        logs: Log::default(),
        backtrace: Vec::new(),
        artifacts: Vec::new(),
    }
}

/// What the guest used before its cell died nobody can say: zero, and marked as inexact.
pub fn host_fault(message: &str) -> Outcome {
    Outcome {
        receipt: Receipt::default(),
        ..without_run(Termination::HostFault { message: message.chars().take(1024).collect() })
    }
}
