//! Limits of one attempt: defaults, maxima and the one place where a requested limit is checked.
//! Owns numbers only; enforcement is in `limiter`, `run` and `output`.

use serde::{Deserialize, Serialize};

use crate::capability::call::{MAX_BATCH, MAX_BATCH_BYTES, MAX_KEY};
use crate::egress::call::MAX_CALLS;
use crate::egress::guest::CALL_BYTES;

/// What one attempt may use. Every field is enforced by the host, none by the guest's good will.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Fuel: roughly one unit per WebAssembly instruction, plus the host's prices. 1 to 10¹³.
    pub fuel: u64,
    /// Bytes of all linear memories and tables of the attempt together. 64 KiB to 4 GiB.
    pub memory_bytes: u64,
    /// Wall-clock milliseconds from instantiation to return, host calls included. 1 to 3,600,000.
    pub timeout_ms: u64,
    /// Bytes of result (component: returned bytes; command: stdout). 0 to 16 MiB.
    pub output_bytes: u64,
    /// Bytes of log (structured records and stderr). 0 to 4 MiB; what exceeds it is dropped and counted.
    pub log_bytes: u64,
}

impl Limits {
    /// The largest value of every limit.
    pub const MAX: Self = Self {
        fuel: 10_000_000_000_000,
        memory_bytes: 4 << 30,
        timeout_ms: 3_600_000,
        output_bytes: 16 << 20,
        log_bytes: 4 << 20,
    };

    /// The smallest value of every limit.
    pub const MIN: Self =
        Self { fuel: 1, memory_bytes: 64 << 10, timeout_ms: 1, output_bytes: 0, log_bytes: 0 };

    /// Refuses a limit outside `MIN..=MAX`, naming it.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn check(&self) -> Result<(), LimitOutOfRange> {
        let rows = [
            ("fuel", self.fuel, Self::MIN.fuel, Self::MAX.fuel),
            ("memory_bytes", self.memory_bytes, Self::MIN.memory_bytes, Self::MAX.memory_bytes),
            ("timeout_ms", self.timeout_ms, Self::MIN.timeout_ms, Self::MAX.timeout_ms),
            ("output_bytes", self.output_bytes, Self::MIN.output_bytes, Self::MAX.output_bytes),
            ("log_bytes", self.log_bytes, Self::MIN.log_bytes, Self::MAX.log_bytes),
        ];
        for (name, value, min, max) in rows {
            if value < min || value > max {
                return Err(LimitOutOfRange { name, value, min, max });
            }
        }
        Ok(())
    }

    /// These limits with every field that `wanted` names put in its place. Not yet checked.
    #[must_use]
    pub fn with(self, wanted: &PartialLimits) -> Self {
        Self {
            fuel: wanted.fuel.unwrap_or(self.fuel),
            memory_bytes: wanted.memory_bytes.unwrap_or(self.memory_bytes),
            timeout_ms: wanted.timeout_ms.unwrap_or(self.timeout_ms),
            output_bytes: wanted.output_bytes.unwrap_or(self.output_bytes),
            log_bytes: wanted.log_bytes.unwrap_or(self.log_bytes),
        }
    }
}

/// Bytes that a cell keeps for an attempt besides what it declares: stack, store, instances, handles.
const FIXED_BYTES: u64 = 1 << 20;
/// What a byte of log costs in the host at the most: three for the lines, and as many when they are packed to be sent.
const LOG_FACTOR: u64 = 6;
/// What a byte of input costs: in the frame it came in, and as the guest reads it.
const INPUT_FACTOR: u64 = 2;

/// Bytes that an attempt under these limits, with an input of so many bytes, may make its cell hold at the most besides
/// its memory.
#[must_use]
pub fn fixed_bytes(limits: &Limits, input: u64) -> u64 {
    FIXED_BYTES
        .saturating_add(input.saturating_mul(INPUT_FACTOR))
        .saturating_add(limits.output_bytes)
        .saturating_add(limits.log_bytes.saturating_mul(LOG_FACTOR))
        .saturating_add(hostcall_bytes(limits))
}

/// Bytes that an attempt may hold in buffers of its calls at the most: they count against its memory limit, and are taken
/// without asking where memory is lent.
pub const HELD_BYTES: u64 = MAX_CALLS as u64 * CALL_BYTES + (MAX_BATCH_BYTES + MAX_BATCH * MAX_KEY) as u64;

/// Bytes that one call into the host may carry.
pub(crate) fn hostcall_bytes(limits: &Limits) -> u64 {
    limits.output_bytes.max(MIN_HOSTCALL_BYTES).saturating_add(HOSTCALL_SLACK)
}

/// Bytes a guest may hand over in one call into the host, when its output limit is smaller.
const MIN_HOSTCALL_BYTES: u64 = 1 << 20;
/// Room for the strings around a result.
const HOSTCALL_SLACK: u64 = 64 << 10;

impl Default for Limits {
    /// 100 billion fuel (some 10 s of ordinary code), 64 MiB, 60 s, 1 MiB of output, 256 KiB of log.
    fn default() -> Self {
        Self {
            fuel: 100_000_000_000,
            memory_bytes: 64 << 20,
            timeout_ms: 60_000,
            output_bytes: 1 << 20,
            log_bytes: 256 << 10,
        }
    }
}

/// Limits as a task or an invocation asks for them: what is absent comes from the level above.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PartialLimits {
    /// See [`Limits::fuel`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fuel: Option<u64>,
    /// See [`Limits::memory_bytes`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// See [`Limits::timeout_ms`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// See [`Limits::output_bytes`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_bytes: Option<u64>,
    /// See [`Limits::log_bytes`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_bytes: Option<u64>,
}

/// A limit that is smaller or larger than the host allows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("limit {name} is {value}; it must be from {min} to {max}")]
pub struct LimitOutOfRange {
    /// The field of [`Limits`].
    pub name: &'static str,
    /// What was asked for.
    pub value: u64,
    /// The smallest allowed value.
    pub min: u64,
    /// The largest allowed value.
    pub max: u64,
}
