//! Cells: child processes that run attempts, without credentials, files or network.
//! [`client`] is the parent's side, [`child_main`] the process, [`protocol`] what they say.

mod child;
mod client;
mod executor;
mod large;
mod outbox;
mod present;
pub mod protocol;

use std::path::PathBuf;

use crate::walls::Walls;

pub use crate::control::{CancelReason, Progress};
pub use child::child_main;
pub use client::{Cell, CellEvent, CellEvents, CellGone, LoadError, SubmitError};
pub use present::Use;
pub use protocol::Limit;

/// The hidden subcommand of the program that is a cell.
pub const SUBCOMMAND: &str = "__cell";
/// Largest frame a cell or its parent can be told to accept.
pub const MAX_FRAME_BYTES: usize = 1 << 30;
/// Smallest: the largest result and log of one attempt must fit.
pub const MIN_FRAME_BYTES: usize = 32 << 20;

/// Most slots of one cell: what one process can reserve and map if every attempt uses all the
/// memories it may.
pub const MAX_SLOTS: u32 = 1_000;

/// Most slots that stay warm while unused.
pub const MAX_WARM_SLOTS: u32 = crate::engine::WARM_SLOTS;

/// How a cell is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CellConfig {
    /// The program with the hidden subcommand; usually this one.
    pub program: PathBuf,
    /// Threads that run guests, 1 to 256.
    pub threads: usize,
    /// Attempts at the same time, 1 to [`MAX_SLOTS`]; sizes the pool.
    pub slots: u32,
    /// Slots that keep memory resident while nothing runs in them, at most [`MAX_WARM_SLOTS`].
    pub warm_slots: u32,
    /// Report what tenants use, so that somebody who knows of other cells can say who may go on.
    pub report_use: bool,
    /// Bytes of one frame, [`MIN_FRAME_BYTES`] to [`MAX_FRAME_BYTES`].
    pub max_frame_bytes: usize,
    /// Bytes of compiled code a cell keeps loaded while it does not run.
    pub code_cache_bytes: u64,
    /// Walls without which no cell is started.
    pub require_walls: Walls,
}

/// What a cell process takes by itself.
const PROCESS_BYTES: u64 = 64 << 20;

impl CellConfig {
    /// Bytes that a cell may hold beyond what its attempts declare: the process, loaded code, and the memory that
    /// its slots keep resident between attempts.
    #[must_use]
    pub fn own_bytes(&self) -> u64 {
        PROCESS_BYTES
            .saturating_add(self.code_cache_bytes)
            .saturating_add(crate::engine::warm_bytes(self.slots.min(self.warm_slots)))
    }

    /// One thread, 256 slots, 64 MiB frames, 256 MiB of code, no walls insisted on, no reports of use.
    #[must_use]
    pub fn new(program: PathBuf) -> Self {
        Self {
            program,
            threads: 1,
            slots: 256,
            warm_slots: MAX_WARM_SLOTS,
            report_use: false,
            max_frame_bytes: 64 << 20,
            code_cache_bytes: 256 << 20,
            require_walls: Walls::default(),
        }
    }
}
