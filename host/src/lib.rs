//! The sandbox of Sandbar. Owns everything that touches WebAssembly: looking at uploads, compiling
//! them in a one-shot child, keeping compiled code, and running attempts in cells under hard limits.
//! Knows no SQL, no HTTP server and no tenant names; a tenant is an opaque share key here.

pub mod artifact;
mod blob;
pub mod capability;
pub mod cell;
mod classify;
pub mod compile;
mod compiler;
mod control;
pub mod egress;
mod engine;
pub mod files;
mod fixed;
#[doc(hidden)]
pub mod fuzzing;
pub mod inspect;
pub mod limiter;
pub mod limits;
pub mod log;
pub mod manifest;
mod module;
pub mod outcome;
mod output;
pub mod recheck;
pub mod run;
mod state;
mod task_world;
mod ticker;
pub mod turns;
pub mod walls;

pub use compiler::{ArtifactError, Compiler};
pub use engine::WASMTIME_VERSION;
pub use module::{ModuleHash, ModuleKind, ParseHashError};
