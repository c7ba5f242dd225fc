//! Turns every way a guest can end into one [`Termination`], and Wasmtime's backtrace into ours.
//! Decides nothing about retries.

use wasmtime::component::ResourceTableError;
use wasmtime::{PoolConcurrencyLimitError, Trap, WasmBacktrace};
use wasmtime_wasi::I32Exit;

use crate::control::Stop;
use crate::engine::BACKTRACE_FRAMES;
use crate::outcome::{Frame, Termination, TrapKind};
use crate::output::clean;

/// Bytes of a message in a termination.
const MAX_MESSAGE: usize = 1_024;
/// Bytes of a function or file name in a backtrace.
const MAX_SYMBOL: usize = 512;

/// What the classifier must know beyond the error.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Facts {
    /// The memory limit refused a growth during the attempt.
    pub(crate) refused: bool,
    /// A typed task, which has no business calling `exit`.
    pub(crate) task: bool,
}

/// A classified end.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) termination: Termination,
    /// Whether the engine's fuel counter is settled.
    pub(crate) fuel_exact: bool,
    pub(crate) backtrace: Vec<Frame>,
}

impl Ended {
    fn plain(termination: Termination, fuel_exact: bool) -> Self {
        Self { termination, fuel_exact, backtrace: Vec::new() }
    }
}

/// The end that a stop from outside brings.
pub(crate) fn stopped(stop: Stop) -> Ended {
    let termination = match stop {
        Stop::Cancelled => Termination::Cancelled,
        Stop::LeaseLost => Termination::LeaseLost,
        Stop::Deadline => Termination::Deadline,
    };
    Ended::plain(termination, false)
}

/// The end of a command that called `exit` or returned a status.
pub(crate) fn exited(code: i32) -> Termination {
    match code {
        0 => Termination::Succeeded,
        code => Termination::ExitCode { code },
    }
}

/// The end that an error out of instantiation or a call means.
pub(crate) fn error(err: &wasmtime::Error, facts: Facts) -> Ended {
    if let Some(I32Exit(code)) = err.downcast_ref::<I32Exit>() {
        let termination = match *code {
            0 if facts.task => Termination::GuestError {
                retryable: true,
                message: "the task called exit(0) instead of returning a result".to_owned(),
                retry_after_ms: None,
            },
            code => exited(code),
        };
        return Ended::plain(termination, true);
    }
    let backtrace = frames(err);
    let termination = termination(err, facts, backtrace.is_empty());
    Ended { fuel_exact: termination == Termination::OutOfFuel, termination, backtrace }
}

fn termination(err: &wasmtime::Error, facts: Facts, outside: bool) -> Termination {
    let trap = err.downcast_ref::<Trap>().copied();
    match trap {
        Some(Trap::OutOfFuel) => return Termination::OutOfFuel,
        Some(Trap::StackOverflow) => return Termination::StackOverflow,
        _ if facts.refused => return Termination::OutOfMemory,
        Some(trap) => {
            return Termination::Trap { kind: kind(trap), message: trap.to_string() };
        }
        None => {}
    }
    let cause = err.root_cause();
    if err.is::<PoolConcurrencyLimitError>() || cause.is::<std::io::Error>() {
        return Termination::HostFault { message: message(&format!("{err:#}")) };
    }
    if matches!(err.downcast_ref::<ResourceTableError>(), Some(ResourceTableError::Full)) {
        return Termination::QuotaExceeded { quota: "handles".to_owned() };
    }
    let words = cause.to_string();
    if let Some(rest) = words.strip_prefix("resource limit exceeded: ") {
        let quota = rest.split(' ').next().unwrap_or_default();
        return Termination::QuotaExceeded {
            quota: match quota {
                "memory" => "memories",
                "table" => "tables",
                _ => "instances",
            }
            .to_owned(),
        };
    }
    if words.contains("fuel allocated for hostcalls has been exhausted") {
        // Outside of guest code only the result is copied.
        return if outside {
            Termination::OutputTooLarge
        } else {
            Termination::QuotaExceeded { quota: "host-call-bytes".to_owned() }
        };
    }
    Termination::Trap { kind: TrapKind::BadHostCall, message: message(&words) }
}

fn message(words: &str) -> String {
    clean(words.as_bytes(), MAX_MESSAGE).0.into_owned()
}

fn kind(trap: Trap) -> TrapKind {
    match trap {
        Trap::UnreachableCodeReached => TrapKind::Unreachable,
        Trap::MemoryOutOfBounds | Trap::HeapMisaligned => TrapKind::MemoryOutOfBounds,
        Trap::TableOutOfBounds => TrapKind::TableOutOfBounds,
        Trap::IndirectCallToNull | Trap::BadSignature | Trap::NullReference => TrapKind::BadIndirectCall,
        Trap::IntegerOverflow | Trap::IntegerDivisionByZero | Trap::BadConversionToInteger => {
            TrapKind::Arithmetic
        }
        Trap::CannotEnterComponent
        | Trap::CannotLeaveComponent
        | Trap::InvalidChar
        | Trap::StringOutOfBounds
        | Trap::ListOutOfBounds
        | Trap::InvalidDiscriminant
        | Trap::UnalignedPointer => TrapKind::BadHostCall,
        _ => TrapKind::Other,
    }
}

/// The guest's backtrace, innermost first; inlined functions are frames of their own.
fn frames(err: &wasmtime::Error) -> Vec<Frame> {
    let Some(trace) = err.downcast_ref::<WasmBacktrace>() else {
        return Vec::new();
    };
    let mut frames = Vec::new();
    for frame in trace.frames() {
        let offset = frame.module_offset().map(|offset| offset as u64);
        let own = frame.func_name();
        if frame.symbols().is_empty() {
            frames.push(Frame {
                function: function(own, frame.func_index()),
                file: None,
                line: None,
                module_offset: offset,
            });
        }
        for symbol in frame.symbols() {
            frames.push(Frame {
                function: function(symbol.name().or(own), frame.func_index()),
                file: symbol.file().map(symbol_text),
                line: symbol.line(),
                module_offset: offset,
            });
        }
        if frames.len() >= BACKTRACE_FRAMES {
            frames.truncate(BACKTRACE_FRAMES);
            break;
        }
    }
    frames
}

fn function(name: Option<&str>, index: u32) -> String {
    match name {
        // Names of a hostile module may be huge: cut before demangling.
        Some(name) if name.len() <= MAX_SYMBOL => {
            symbol_text(&format!("{:#}", rustc_demangle::demangle(name)))
        }
        Some(name) => symbol_text(name),
        None => format!("<wasm function {index}>"),
    }
}

fn symbol_text(text: &str) -> String {
    clean(text.as_bytes(), MAX_SYMBOL).0.into_owned()
}
