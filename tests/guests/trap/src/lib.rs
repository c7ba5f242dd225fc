//! Every way for a task to end badly, one mode each. The functions carry names that the tests look
//! for in the frames of a trap.

use std::hint::black_box;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use sandbar_guest::{Context, Output, Schema, TaskError, log, task};
use serde::Deserialize;

/// What to do.
#[derive(Deserialize, Schema)]
#[serde(tag = "mode", rename_all = "kebab-case")]
enum Mode {
    /// Panics with a message.
    Panic {
        /// What the panic says.
        message: Option<String>,
    },
    /// Executes the `unreachable` instruction.
    Unreachable,
    /// Reads far beyond the end of its memory.
    OutOfBounds,
    /// Divides by zero.
    DivideByZero,
    /// Recurses without end.
    StackOverflow,
    /// Counts without end.
    Spin,
    /// Allocates without end and writes to every page.
    Allocate {
        /// Bytes per allocation.
        #[serde(default = "megabyte")]
        step: usize,
    },
    /// Sleeps, then succeeds.
    Sleep {
        /// How long, in milliseconds.
        ms: u64,
    },
    /// Waits until it is cancelled, sleeping a millisecond at a time, then fails fatally.
    AwaitCancel,
    /// Returns this many bytes.
    Output {
        /// How many.
        bytes: usize,
    },
    /// Logs this many records, and as many lines on stderr, then succeeds.
    LogFlood {
        /// How many.
        records: u32,
        /// Bytes per record.
        bytes: usize,
    },
    /// Logs a record and reports progress again and again, then succeeds.
    Talk {
        /// How often.
        records: u32,
        /// Pause after each, in milliseconds.
        every_ms: u64,
    },
    /// Fails fatally.
    Fatal {
        /// What the error says.
        message: String,
    },
    /// Fails retryably.
    Retryable {
        /// What the error says.
        message: String,
    },
    /// Ends through `exit`, as a task should not.
    Exit {
        /// The code.
        code: i32,
    },
}

fn megabyte() -> usize {
    1 << 20
}

/// Ends in the way that the input names.
#[task]
fn trap(ctx: &Context, mode: Mode) -> Result<Output, TaskError> {
    match mode {
        Mode::Panic { message } => panic!("{}", message.as_deref().unwrap_or("asked to panic")),
        Mode::Unreachable => reach_the_unreachable(),
        Mode::OutOfBounds => read_out_of_bounds(),
        Mode::DivideByZero => divide_by_zero(black_box(0)),
        Mode::StackOverflow => return Ok(done(recurse(black_box(1)))),
        Mode::Spin => spin(),
        Mode::Allocate { step } => allocate(step),
        Mode::Sleep { ms } => {
            let start = Instant::now();
            std::thread::sleep(Duration::from_millis(ms));
            return Ok(done(start.elapsed().as_millis()));
        }
        Mode::AwaitCancel => {
            while !ctx.cancelled() {
                std::thread::sleep(Duration::from_millis(1));
            }
            return Err(TaskError::fatal("saw the cancellation"));
        }
        Mode::Output { bytes } => return Ok(Output::new("text/plain", vec![b'x'; bytes])),
        Mode::LogFlood { records, bytes } => {
            let text = "x".repeat(bytes);
            for record in 0..records {
                log::info!(record; "{text}");
                eprintln!("{text}");
            }
        }
        Mode::Talk { records, every_ms } => {
            for n in 0..records {
                let level = if n % 2 == 0 { log::Level::Info } else { log::Level::Warn };
                log::log!(level, n; "word {n}");
                ctx.progress(u64::from(n + 1), u64::from(records), format!("said {}", n + 1));
                std::thread::sleep(Duration::from_millis(every_ms));
            }
        }
        Mode::Fatal { message } => return Err(TaskError::fatal(message)),
        Mode::Retryable { message } => return Err(TaskError::retryable(message)),
        Mode::Exit { code } => std::process::exit(code),
    }
    Ok(done("survived"))
}

fn done(what: impl std::fmt::Display) -> Output {
    Output::new("text/plain", what.to_string())
}

#[inline(never)]
fn reach_the_unreachable() {
    #[cfg(target_arch = "wasm32")]
    core::arch::wasm32::unreachable()
}

#[inline(never)]
fn read_out_of_bounds() {
    // SAFETY: none. The address is outside every memory this guest can have, and the sandbox must trap.
    let byte = unsafe { std::ptr::read_volatile(black_box(0xffff_fff0_usize) as *const u8) };
    black_box(byte);
}

#[inline(never)]
fn divide_by_zero(zero: u32) {
    // Past Rust's own check, so that the instruction traps and not a panic.
    // SAFETY: none. Same as above.
    let divisor = unsafe { NonZeroU32::new_unchecked(zero) };
    black_box(black_box(1) / divisor);
}

#[inline(never)]
#[allow(unconditional_recursion)] // That is the point.
fn recurse(depth: u64) -> u64 {
    let frame = black_box([depth; 16]);
    recurse(depth + 1) + frame[(depth % 16) as usize]
}

#[inline(never)]
fn spin() {
    let mut n = 0u64;
    loop {
        n = black_box(n.wrapping_add(1));
    }
}

#[inline(never)]
fn allocate(step: usize) {
    let mut kept: Vec<Vec<u8>> = Vec::new();
    loop {
        kept.push(vec![1; step]);
        black_box(&kept);
    }
}
