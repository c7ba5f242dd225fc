//! Write background tasks for Sandbar. A task is a function:
//!
//! ```
//! use sandbar_guest::{TaskError, task};
//!
//! /// Counts the words of a text.
//! #[task]
//! fn count_words(text: String) -> Result<usize, TaskError> {
//!     Ok(text.split_whitespace().count())
//! }
//! # assert_eq!(count_words("a b".to_owned()), Ok(2));
//! ```
//!
//! In a crate with `crate-type = ["cdylib"]`, `cargo build --release --target wasm32-wasip2` makes of
//! it one `.wasm` file that is all there is to upload: it carries its name (`count-words`), its
//! description, the JSON Schema of input and output, and whatever defaults the attribute names.
//!
//! It stays an ordinary function. `cargo test` calls it natively, without a host and without building
//! anything for WebAssembly.
//!
//! # The function
//!
//! * `fn f(input: T)`, `fn f(ctx: &Context, input: T)`, `fn f(ctx: &Context)` or `fn f()`; without an
//!   input, any input is accepted and ignored.
//! * `T` is read from JSON: it needs [`serde::Deserialize`] and [`Schema`]. Empty input reads as
//!   `null`. For input that is not JSON, take [`Bytes`].
//! * It returns `U`, or a `Result<U, E>` whose error is a [`TaskError`] or becomes one. `U` is written
//!   as JSON: it needs [`serde::Serialize`] and [`Schema`]. For anything else return [`Output`].
//! * An input that serde refuses is a fatal error with serde's message. A panic is logged as an error
//!   and ends the attempt with a trap.
//!
//! # The attribute
//!
//! Everything is optional, and only a default: whoever uploads or invokes the task may choose
//! otherwise within the limits of the tenant.
//!
//! ```
//! use sandbar_guest::{Context, TaskError, task};
//!
//! /// Fetches a page.
//! #[task(
//!     name = "fetch-page",
//!     limits(memory = "128MiB", timeout = "30s", fuel = "20G", output = "4MiB", log = "64KiB"),
//!     retry(max_attempts = 5, backoff = "exponential", initial = "1s", factor = 2, max = "5m", jitter = 0.2),
//!     grants("http:example.com"),
//!     log = "debug"
//! )]
//! fn fetch(ctx: &Context, url: String) -> Result<String, TaskError> {
//!     if ctx.cancelled() {
//!         return Err(TaskError::fatal("cancelled"));
//!     }
//!     sandbar_guest::log::debug!(url = url.as_str(), attempt = ctx.attempt(); "fetching");
//!     ctx.progress(0, 1, &url);
//!     Ok(url)
//! }
//! # let manifest: serde_json::Value = serde_json::from_str(sandbar_guest::manifest!(fetch)).unwrap();
//! # assert_eq!(manifest["limits"]["timeout_ms"], 30_000);
//! # fetch(&Context::test().build(), String::new()).unwrap();
//! ```
//!
//! * `name`: the default is the name of the function with `-` for `_`.
//! * `limits`: `fuel` (a count, or with K, M, G, T), `memory`, `output`, `log` (bytes, or with KiB,
//!   MiB, GiB, KB, MB, GB), `timeout` (with ms, s, m, h). The long names `memory_bytes`,
//!   `output_bytes`, `log_bytes` and `timeout_ms` take numbers.
//! * `retry`: `max_attempts`, `backoff` (`"fixed"` or `"exponential"`), `initial` or `initial_ms`,
//!   `factor`, `max` or `max_ms`, `jitter` (0 to 1: the share of the delay that is random).
//! * `grants`: capabilities that the task asks for. They take effect only when an admin of the tenant
//!   grants them.
//! * `log`: the least severe level that is sent to the host; the default is `"info"`.
//!
//! # Logging
//!
//! The macros of the [`log`](mod@log) crate reach the host with their key-values; nothing needs to be
//! set up. In native tests no logger is installed, unless the test asks for one with
//! [`TestContext::capture_logs`](testing::TestContext::capture_logs).
//!
//! # Requirements
//!
//! Rust 1.87 or newer with the target `wasm32-wasip2`. The crate must not `forbid(unsafe_code)`, since
//! exporting a function to WebAssembly counts as unsafe; `deny` is fine.

mod context;
mod error;
mod fields;
mod manifest;
mod payload;
mod schema;
#[cfg(not(target_family = "wasm"))]
pub mod testing;
#[cfg(target_family = "wasm")]
mod wasm;

pub use context::Context;
pub use error::TaskError;
/// The logging facade whose records reach the host.
pub use log;
pub use payload::{Bytes, Output, TaskInput, TaskOutput, TaskReturn};
pub use sandbar_guest_macros::{Schema, manifest, task};
pub use schema::{Field, Node, Schema, schema_of};

/// What the macros need; no part of the API.
#[doc(hidden)]
pub mod __private {
    pub use crate::manifest::Manifest;
    #[cfg(target_family = "wasm")]
    pub use crate::wasm::{bindings, run};
}
