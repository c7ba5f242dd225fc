//! `#[task]` natively: what the function may look like, what the manifest says, and the way from
//! bytes to bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::BTreeMap;
use std::time::Duration;

use sandbar_guest::{Bytes, Context, Output, Schema, TaskError, call, manifest, task};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[derive(Deserialize, Schema)]
struct Input {
    n: u32,
}

#[derive(Debug, PartialEq, Serialize, Schema)]
struct Twice {
    n: u32,
}

/// Doubles a number.
///
///   Indented "line".
#[task]
fn double_it(Input { n }: Input) -> Result<Twice, TaskError> {
    let n = n.checked_mul(2).ok_or_else(|| TaskError::fatal("too large"))?;
    Ok(Twice { n })
}

mod elsewhere {
    use super::*;

    #[task(
        name = "everything-2",
        limits(fuel = "20G", memory = "128MiB", timeout = "1m", output_bytes = 4_096, log = "64KB"),
        retry(
            max_attempts = 5,
            backoff = "exponential",
            initial = "500ms",
            factor = 1.5,
            max_ms = 9000,
            jitter = 0.25
        ),
        grants(http = ["api.example.com", "http://*.example.org:8080"], kv, secrets = ["API_TOKEN"], scratch = "16MiB"),
        log = "trace"
    )]
    pub fn everything(ctx: &sandbar_guest::Context, input: Bytes) -> Output {
        Output::new(ctx.task(), input.0)
    }
}

#[task(retry(max_attempts = 1, factor = 2, jitter = 0))]
fn r#match() {}

#[task]
fn only_context(ctx: &Context) -> u32 {
    ctx.attempt()
}

#[task]
fn foreign_error(text: String) -> Result<u32, std::num::ParseIntError> {
    text.parse()
}

#[task]
fn bytes_out(input: Option<u8>) -> Result<Bytes, TaskError> {
    Ok(Bytes(vec![input.unwrap_or_default()]))
}

#[task]
fn not_json() -> BTreeMapOfPairs {
    BTreeMapOfPairs(BTreeMap::from([((1, 2), 3)]))
}

#[derive(Serialize, Schema)]
struct BTreeMapOfPairs(#[schema(as = Value)] BTreeMap<(u8, u8), u8>);

fn parsed(manifest: &str) -> Value {
    serde_json::from_str(manifest).unwrap()
}

/// The way of the bytes, in a context that says nothing in particular.
macro_rules! through {
    ($task:path, $input:expr) => {
        call!($task, &Context::test().build(), *$input)
    };
}

#[test]
fn a_task_is_still_a_function() {
    assert_eq!(double_it(Input { n: 4 }), Ok(Twice { n: 8 }));
    assert_eq!(
        elsewhere::everything(&Context::test().task("t").build(), Bytes(vec![1])),
        Output::new("t", [1])
    );
}

#[test]
fn the_manifest_says_what_the_function_and_its_comment_say() {
    assert_eq!(
        parsed(manifest!(double_it)),
        json!({
            "name": "double-it",
            "description": "Doubles a number.\n\n  Indented \"line\".",
            "sdk": concat!("sandbar-guest ", env!("CARGO_PKG_VERSION")),
            "input_schema": {
                "type": "object",
                "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 4_294_967_295u32}},
                "required": ["n"],
            },
            "output_schema": {
                "type": "object",
                "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 4_294_967_295u32}},
                "required": ["n"],
            },
        })
    );
}

#[test]
fn the_manifest_carries_every_argument_in_base_units() {
    assert_eq!(
        parsed(manifest!(elsewhere::everything)),
        json!({
            "name": "everything-2",
            "sdk": concat!("sandbar-guest ", env!("CARGO_PKG_VERSION")),
            "limits": {
                "fuel": 20_000_000_000u64,
                "memory_bytes": 128 << 20,
                "timeout_ms": 60_000,
                "output_bytes": 4096,
                "log_bytes": 64_000,
            },
            "retry": {
                "max_attempts": 5,
                "backoff": "exponential",
                "initial_ms": 500,
                "factor": 1.5,
                "max_ms": 9000,
                "jitter": 0.25,
            },
            "grants": {
                "http": ["api.example.com", "http://*.example.org:8080"],
                "kv": true,
                "secrets": ["API_TOKEN"],
                "scratch_bytes": 16 << 20,
            },
        })
    );
}

#[test]
fn a_function_without_input_or_output_has_no_input_schema_and_returns_null() {
    let manifest = parsed(manifest!(r#match));
    assert_eq!(manifest["name"], "match");
    assert_eq!(manifest.get("input_schema"), None);
    assert_eq!(manifest["output_schema"], json!({"type": "null"}));
    assert_eq!(through!(r#match, b"{}"), Ok(Output::new("application/json", *b"null")));
    assert_eq!(through!(only_context, b"ignored").unwrap().bytes, b"1");
}

#[test]
fn json_goes_in_and_out() {
    assert_eq!(through!(double_it, br#"{"n": 21}"#), Ok(Output::new("application/json", *br#"{"n":42}"#)));
}

#[test]
fn an_input_that_serde_refuses_is_fatal_and_says_why() {
    let error = through!(double_it, br#"{"m": 21}"#).unwrap_err();
    assert!(!error.is_retryable());
    assert_eq!(error.message(), "input: missing field `n` at line 1 column 9");
    assert!(!through!(double_it, b"\xff").unwrap_err().is_retryable());
    assert!(!through!(double_it, br#"{"n": 1} x"#).unwrap_err().is_retryable());
}

#[test]
fn empty_input_reads_as_null() {
    assert_eq!(through!(bytes_out, b""), Ok(Output::new("application/octet-stream", [0])));
    assert_eq!(through!(bytes_out, b"7").unwrap().bytes, [7]);
}

#[test]
fn errors_keep_their_kind_and_foreign_ones_are_retryable() {
    let fatal = through!(double_it, br#"{"n": 4294967295}"#).unwrap_err();
    assert_eq!(fatal, TaskError::fatal("too large"));
    assert!(through!(foreign_error, br#""seven""#).unwrap_err().is_retryable());
}

#[test]
fn an_output_that_is_not_json_is_fatal() {
    let error = through!(not_json, b"").unwrap_err();
    assert_eq!(error, TaskError::fatal("output: key must be a string"));
}

#[test]
fn a_test_context_tells_what_it_was_told() {
    let ctx = Context::test()
        .invocation_id("i-1")
        .task("t")
        .attempt(3)
        .timeout(Duration::from_secs(9))
        .remaining(Duration::from_secs(2))
        .tag("b", "2")
        .tag("a", "1")
        .cancelled()
        .build();
    assert_eq!((ctx.invocation_id(), ctx.task()), ("i-1", "t"));
    assert_eq!((ctx.attempt(), ctx.max_attempts()), (3, 3));
    assert_eq!((ctx.timeout(), ctx.remaining()), (Duration::from_secs(9), Duration::from_secs(2)));
    assert_eq!(ctx.tags(), [("a".to_owned(), "1".to_owned()), ("b".to_owned(), "2".to_owned())]);
    assert_eq!((ctx.tag("b"), ctx.tag("c")), (Some("2"), None));
    assert!(ctx.cancelled());
}

#[test]
fn a_test_context_keeps_progress_and_the_logs_of_its_thread() {
    use sandbar_guest::log;

    let ctx = Context::test().capture_logs().build();
    ctx.progress(1, 2, "half");
    ctx.progress(2, 2, String::from("whole"));
    log::trace!(target: "t", n = 1, text = "a"; "said {}", "it");
    std::thread::spawn(|| log::error!("elsewhere")).join().unwrap();

    let progress = ctx.reported_progress();
    assert_eq!(
        progress.iter().map(|p| (p.done, p.total, p.message.as_str())).collect::<Vec<_>>(),
        [(1, 2, "half"), (2, 2, "whole")]
    );
    let logs = ctx.captured_logs();
    assert_eq!(logs.len(), 1);
    assert_eq!(
        (logs[0].level, logs[0].target.as_str(), logs[0].message.as_str()),
        (log::Level::Trace, "t", "said it")
    );
    assert_eq!(logs[0].fields, [("n".to_owned(), "1".to_owned()), ("text".to_owned(), "a".to_owned())]);
}

#[test]
fn a_cancellation_may_come_after_some_checks() {
    let ctx = Context::test().cancelled_after(2).build();
    assert_eq!(
        [ctx.cancelled(), ctx.cancelled(), ctx.cancelled(), ctx.cancelled()],
        [false, false, true, true]
    );
    assert!(!Context::test().build().cancelled());
}

#[test]
fn bytes_pass_untouched_and_keep_the_media_type_of_the_task() {
    let every_byte: Vec<u8> = (0..=255).collect();
    let ctx = Context::test().task("image/png").build();
    let output = call!(elsewhere::everything, &ctx, every_byte.clone()).unwrap();
    assert_eq!(output, Output::new("image/png", every_byte));
}
