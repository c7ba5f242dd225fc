//! How an attempt ended and what it cost. The one closed list of termination reasons.
//! Owns the words; decides nothing about retries (that is `domain::retry` of the control plane).

use serde::{Deserialize, Serialize};

use crate::files::File;
use crate::log::Log;

/// Why an attempt ended. Closed: a new reason must be classified wherever this is matched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum Termination {
    /// The guest returned a result (component) or exit code 0 (command).
    Succeeded,
    /// The guest returned an error of its own.
    GuestError {
        /// False: the guest said that no attempt will succeed.
        retryable: bool,
        /// The guest's message, valid UTF-8, at most 4,096 bytes.
        message: String,
        /// The guest's wish for the next attempt, in milliseconds from the end of this one.
        #[serde(skip_serializing_if = "Option::is_none")]
        retry_after_ms: Option<u64>,
    },
    /// A command ended with a code other than 0.
    ExitCode {
        /// 1 to 255; 0.2 components report every failure as 1.
        code: i32,
    },
    /// The guest trapped.
    Trap {
        /// Stable name of the trap, for example `unreachable` or `memory-out-of-bounds`.
        kind: TrapKind,
        /// The engine's own words.
        message: String,
    },
    /// The fuel limit was reached.
    OutOfFuel,
    /// The memory limit refused growth (or the initial size) and the guest could not go on.
    OutOfMemory,
    /// The guest's stack is exhausted.
    StackOverflow,
    /// The attempt's wall-clock limit was reached.
    Deadline,
    /// The returned output was larger than `output_bytes` (component results; stdout truncates instead).
    OutputTooLarge,
    /// A quota of the attempt ended it.
    QuotaExceeded {
        /// Which one.
        quota: String,
    },
    /// The guest could not go on without a capability that it was not granted.
    Denied {
        /// Which one.
        capability: String,
    },
    /// Somebody asked for the end of the invocation.
    Cancelled,
    /// The worker lost its lease; another attempt takes over.
    LeaseLost,
    /// The host's fault, not the guest's: a cell died, code could not be loaded. Runs again.
    HostFault {
        /// For operators.
        message: String,
    },
}

/// The kinds of trap that users can tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrapKind {
    /// `unreachable` was executed: panics and aborts end here.
    Unreachable,
    /// A load, store or bulk operation outside linear memory.
    MemoryOutOfBounds,
    /// A table access out of bounds.
    TableOutOfBounds,
    /// An indirect call to a null element or of another type.
    BadIndirectCall,
    /// Division by zero, overflow, or a conversion to an integer that does not fit.
    Arithmetic,
    /// A misaligned or invalid pointer handed to a host call, or a broken canonical ABI.
    BadHostCall,
    /// Any other trap.
    Other,
}

/// What an attempt cost. Counted by the host; never by the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Fuel used. See `fuel_exact`.
    pub fuel: u64,
    /// True when the count is exact; false after an abort, when it may be short by one yield interval.
    pub fuel_exact: bool,
    /// CPU nanoseconds of the thread while it served this attempt: instantiation, polls and drop.
    pub cpu_ns: u64,
    /// Wall-clock nanoseconds from the start of instantiation to the end.
    pub wall_ns: u64,
    /// Highest sum of linear memories and tables in bytes.
    pub peak_memory_bytes: u64,
    /// Bytes of input handed to the guest (input, stdin, args and env).
    pub input_bytes: u64,
    /// Bytes of result kept.
    pub output_bytes: u64,
    /// Bytes of result that were dropped because of the limit (stdout of commands).
    pub output_dropped_bytes: u64,
    /// Bytes of log kept.
    pub log_bytes: u64,
    /// Bytes of log dropped because of the limit.
    pub log_dropped_bytes: u64,
    /// Bytes sent to and received from other hosts.
    pub egress_bytes: u64,
    /// Calls of the guest into the host's capabilities (context, log, http).
    pub host_calls: u64,
}

/// Severity of a log record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Finest.
    Trace,
    /// For the author.
    Debug,
    /// Ordinary; stdout and stderr lines of commands are `Info`.
    Info,
    /// Something to look at.
    Warn,
    /// Something failed.
    Error,
}

/// One record of an attempt's log. All strings are valid UTF-8 without control characters except tab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRecord {
    /// Microseconds since the attempt began.
    pub at_us: u64,
    /// Severity.
    pub level: LogLevel,
    /// `stderr` for that stream, otherwise the guest's module path.
    pub target: String,
    /// The message, one line.
    pub message: String,
    /// Structured fields.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<(String, String)>,
}

/// One frame of a guest backtrace, innermost first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// Demangled function name, or `<wasm function N>`.
    pub function: String,
    /// Source file as the debug information gives it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Line in `file`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
    /// Offset in the module, for tools.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module_offset: Option<u64>,
}

/// Everything that comes back from one attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Why it ended.
    pub termination: Termination,
    /// What it cost.
    pub receipt: Receipt,
    /// Result bytes: the component's output, or the command's stdout (kept also when it failed).
    pub output: Vec<u8>,
    /// Media type of `output`.
    pub content_type: String,
    /// The log, in order.
    pub logs: Log,
    /// Guest backtrace after a trap, innermost frame first, at most 64 frames.
    pub backtrace: Vec<Frame>,
    /// Files that were collected, in the order of their paths.
    pub artifacts: Vec<File>,
}
