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
//! * It is not `async`: each attempt has an instance of its own, so a call that blocks holds up nobody.
//! * A component has one task: built for WebAssembly, a second one in a crate is an error at its
//!   `#[task]` (`symbol … is already defined`). Natively there may be many, for tests.
//!
//! Pictures and other bytes are as easy as JSON:
//!
//! ```
//! use sandbar_guest::{Bytes, Output, TaskError, task};
//!
//! /// Turns a black and white picture (PBM) into its negative.
//! #[task]
//! fn negative(picture: Bytes) -> Result<Output, TaskError> {
//!     let header = picture.strip_prefix(b"P4\n8 1\n").ok_or_else(|| TaskError::fatal("not a PBM of 8 × 1"))?;
//!     let pixels = header.iter().map(|byte| !byte);
//!     Ok(Output::new("image/x-portable-bitmap", b"P4\n8 1\n".iter().copied().chain(pixels).collect::<Vec<_>>()))
//! }
//! # assert_eq!(negative(Bytes(b"P4\n8 1\n\x0f".to_vec())).unwrap().bytes, b"P4\n8 1\n\xf0");
//! ```
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
//!     grants(http = ["example.com", "*.example.org"], kv, invoke = ["index-page"], secrets = ["API_TOKEN"], scratch = "16MiB"),
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
//! # assert_eq!(manifest["grants"]["scratch_bytes"], 16 << 20);
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
//!   grants them. `http` lists the hosts it wants to reach: an exact name or `*.` for one label, with a
//!   port if it is not the scheme's own, and with `http://` if it is not to be encrypted. `kv` is the
//!   task's key-value store, `invoke` names the tasks to start, `secrets` the secrets, `scratch` the size of a scratch directory.
//! * `log`: the least severe level that is sent to the host; the default is `"info"`.
//!
//! # Logging
//!
//! The macros of the [`log`](mod@log) crate reach the host with their key-values; nothing needs to be
//! set up. With the feature `tracing` those of the `tracing` crate do too: the fields of an event, and
//! those of the spans around it, whose names are in the field `span` (`outer:inner`).
//!
//! ```
//! # #[cfg(feature = "tracing")] {
//! use sandbar_guest::{Context, task, tracing};
//!
//! #[task]
//! fn import(rows: Vec<u32>) -> u32 {
//!     let _span = tracing::info_span!("import", rows = rows.len()).entered();
//!     let sum = rows.iter().sum();
//!     tracing::info!(sum, "added up");
//!     sum
//! }
//!
//! let ctx = Context::test().capture_logs().build();
//! import(vec![1, 2]);
//! let fields = [("span", "import"), ("rows", "2"), ("sum", "3")];
//! assert_eq!(ctx.captured_logs()[0].fields, fields.map(|(k, v)| (k.to_owned(), v.to_owned())));
//! # }
//! ```
//!
//! In native tests no logger is installed, unless the test asks for one with
//! [`TestContext::capture_logs`](testing::TestContext::capture_logs).
//!
//! # HTTP
//!
//! With the feature `http` a task can make requests, by [`http`](mod@http), to hosts that an admin of the tenant has granted it. What
//! it asks for in `grants` tells the admin what it needs; without the grant every request fails with
//! `HTTP-request-denied`. Any other library over `wasi:http` works as well.
//!
//! # Tests
//!
//! The function is called as it stands, with a [`Context::test`] that says what the test wants: which
//! attempt it is, how much time is left, that a cancellation came. It keeps what the task logged and
//! reported. [`call!`] goes the whole way from bytes to bytes, and [`manifest!`] is what the component
//! will say about itself.
//!
//! ```
//! use std::time::Duration;
//! use sandbar_guest::{Context, TaskError, call, task};
//!
//! #[task]
//! fn patient(ctx: &Context, name: String) -> Result<String, TaskError> {
//!     if ctx.attempt() < 3 {
//!         return Err(TaskError::retryable("not yet").retry_after(Duration::from_secs(5)));
//!     }
//!     Ok(format!("{name} at last"))
//! }
//!
//! let error = patient(&Context::test().build(), "Ada".to_owned()).unwrap_err();
//! assert_eq!(error.delay(), Some(Duration::from_secs(5)));
//!
//! let third = Context::test().attempt(3).build();
//! assert_eq!(call!(patient, &third, r#""Ada""#).unwrap().bytes, br#""Ada at last""#);
//! ```
//!
//! # Requirements
//!
//! Rust 1.87 or newer (the `rust-version` of this crate) with the target `wasm32-wasip2`. The crate must not `forbid(unsafe_code)`, since
//! exporting a function to WebAssembly counts as unsafe; `deny` is fine.

#[cfg(feature = "config")]
pub mod config;
mod context;
mod error;
mod fields;
#[cfg(feature = "http")]
pub mod http;
#[cfg(feature = "invoke")]
pub mod invoke;
#[cfg(feature = "kv")]
pub mod kv;
mod manifest;
mod payload;
mod schema;
#[cfg(feature = "secrets")]
pub mod secrets;
#[cfg(feature = "tracing")]
mod spans;
#[cfg(not(target_family = "wasm"))]
pub mod testing;
#[cfg(target_family = "wasm")]
mod wasm;

pub use context::Context;
pub use error::TaskError;
/// The logging facade whose records reach the host.
///
/// ```
/// use sandbar_guest::{Context, log};
///
/// let ctx = Context::test().capture_logs().build();
/// log::warn!(disk = "full", free = 0; "no room for {} rows", 7);
/// assert_eq!(ctx.captured_logs()[0].message, "no room for 7 rows");
/// ```
pub use log;
pub use payload::{Bytes, Output, TaskInput, TaskOutput, TaskReturn};
/// ```
/// /// A point of a drawing.
/// #[derive(serde::Serialize, sandbar_guest::Schema)]
/// struct Point {
///     /// From the left, in pixels.
///     x: u32,
/// }
///
/// let schema = sandbar_guest::schema_of::<Point>();
/// assert_eq!(schema["properties"]["x"]["description"], "From the left, in pixels.");
/// ```
pub use sandbar_guest_macros::Schema;
/// ```
/// use sandbar_guest::{Context, call, task};
///
/// #[task]
/// fn double(n: u32) -> u32 {
///     2 * n
/// }
///
/// let ctx = Context::test().build();
/// assert_eq!(call!(double, &ctx, "21").unwrap().bytes, b"42");
/// assert!(!call!(double, &ctx, "-1").unwrap_err().is_retryable());
/// ```
pub use sandbar_guest_macros::call;
/// ```
/// #[sandbar_guest::task(retry(max_attempts = 5))]
/// fn count_words(text: String) -> usize {
///     text.split_whitespace().count()
/// }
///
/// let manifest: serde_json::Value = serde_json::from_str(sandbar_guest::manifest!(count_words)).unwrap();
/// assert_eq!(manifest["retry"]["max_attempts"], 5);
/// # assert_eq!(count_words("a b".to_owned()), 2);
/// ```
pub use sandbar_guest_macros::manifest;
/// ```
/// use sandbar_guest::{TaskError, task};
///
/// /// Says hello.
/// #[task(limits(timeout = "5s"))]
/// fn hello(name: String) -> Result<String, TaskError> {
///     Ok(format!("Hello {name}"))
/// }
/// # assert_eq!(hello("Ada".to_owned()).unwrap(), "Hello Ada");
/// ```
pub use sandbar_guest_macros::task;
pub use schema::{Field, Node, Schema, schema_of};
/// The other logging facade whose events reach the host. For `#[tracing::instrument]` depend on the
/// crate itself.
#[cfg(feature = "tracing")]
pub use tracing;

/// What the macros need; no part of the API.
#[doc(hidden)]
pub mod __private {
    pub use crate::manifest::Manifest;
    #[cfg(all(
        target_family = "wasm",
        any(feature = "config", feature = "invoke", feature = "kv", feature = "secrets")
    ))]
    pub use crate::wasm::capabilities;
    #[cfg(target_family = "wasm")]
    pub use crate::wasm::{bindings, run};
}

/// Keeps the examples of the README compiling.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
