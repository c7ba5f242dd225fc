//! Sandbar: a fair, metered, multi-tenant, durable host for WebAssembly background tasks.
//!
//! The house (imports run downward only; `tests/it/house.rs` keeps it so):
//!
//! ```text
//! cli, server            commands; roles put together
//! api, worker, scheduler HTTP; attempts; background duties
//! app                    rules that decide and write
//! store   domain   wire  SQL; pure decisions; shapes of requests and answers
//! sandbar-host           the sandbox (a crate of its own; knows none of the above)
//! ```

pub mod api;
pub mod app;
pub mod cli;
pub mod config;
pub mod dev;
pub mod domain;
pub mod scheduler;
pub mod server;
pub mod store;
pub mod telemetry;
pub mod wire;
pub mod worker;
