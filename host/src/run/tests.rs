//! Attempts in this process: limits, ends and accounting, with guests in WebAssembly text.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use bytes::Bytes;

use super::*;
use crate::outcome::TrapKind;

/// Compiles as the compile child does, without the child.
pub(super) fn load(runtime: &Runtime, wat: &str) -> Arc<Loaded> {
    let wasm = wat::parse_str(wat).unwrap();
    crate::inspect::inspect(&wasm).unwrap();
    let engine = engine::compiling().unwrap();
    let code = if wasmparser::Parser::is_component(&wasm) {
        engine.precompile_component(&wasm).unwrap()
    } else {
        engine.precompile_module(&wasm).unwrap()
    };
    let artifact = Artifact::trusted(ModuleHash::of(&wasm), Bytes::from(code));
    runtime.load(&artifact).unwrap()
}

pub(super) fn command(stdin: &[u8]) -> Input {
    Input::Command { args: vec!["one".into()], env: vec![("K".into(), "V".into())], stdin: stdin.to_vec() }
}

pub(super) fn attempt(module: &Loaded, input: Input, limits: Limits) -> Attempt {
    Attempt {
        module: *module.hash(),
        tenant: 1,
        weight: 100,
        input,
        limits,
        context: Context {
            invocation_id: "inv".into(),
            task: "task".into(),
            attempt: 1,
            max_attempts: 3,
            tags: vec![("tag".into(), "value".into())],
        },
        options: Options::default(),
    }
}

async fn run_with(wat: &str, input: Input, limits: Limits) -> Outcome {
    let runtime = Runtime::new(4).unwrap();
    let module = load(&runtime, wat);
    let attempt = attempt(&module, input, limits);
    runtime.attempt(module, attempt, Arc::new(Control::new(0, 0))).await
}

async fn run(wat: &str) -> Outcome {
    run_with(wat, command(b""), Limits::default()).await
}

/// `_start` with this body, in a module with WASI's usual imports and one page of memory.
fn p1(body: &str) -> String {
    p1_with("(memory (export \"memory\") 1)", body)
}

fn p1_with(items: &str, body: &str) -> String {
    format!(
        r#"(module
            (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
            (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
            (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
            (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll_oneoff (param i32 i32 i32 i32) (result i32)))
            {items}
            (func (export "_start") {body}))"#
    )
}

const SPIN: &str = "(loop $l (br $l))";

const ECHO: &str = r"
    (local $n i32)
    (block $done (loop $again
        (i32.store (i32.const 0) (i32.const 64))
        (i32.store (i32.const 4) (i32.const 1024))
        (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 16)))
        (local.set $n (i32.load (i32.const 16)))
        (br_if $done (i32.eqz (local.get $n)))
        (i32.store (i32.const 4) (local.get $n))
        (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))
        (br $again)))";

/// Writes `count` times the 1,000 bytes at 64 to descriptor `fd`.
fn write_loop(fd: u32, count: u32) -> String {
    format!(
        "(local $i i32)
        (i32.store (i32.const 0) (i32.const 64))
        (i32.store (i32.const 4) (i32.const 1000))
        (loop $l
            (drop (call $fd_write (i32.const {fd}) (i32.const 0) (i32.const 1) (i32.const 16)))
            (local.set $i (i32.add (local.get $i) (i32.const 1)))
            (br_if $l (i32.lt_u (local.get $i) (i32.const {count}))))"
    )
}

#[tokio::test]
async fn a_command_echoes_stdin_and_succeeds() {
    let input: Vec<u8> = (0..5_000u32).map(|i| b'a' + (i % 26) as u8).collect();
    let outcome = run_with(&p1(ECHO), command(&input), Limits::default()).await;
    assert_eq!(outcome.termination, Termination::Succeeded);
    assert_eq!(outcome.output, input);
    assert_eq!(outcome.content_type, "text/plain; charset=utf-8");
    let receipt = outcome.receipt;
    assert!(receipt.fuel > 0 && receipt.fuel_exact);
    assert!(receipt.cpu_ns > 0 && receipt.wall_ns > 0 && receipt.host_calls > 0);
    assert_eq!(receipt.peak_memory_bytes, 65_536);
    assert_eq!(receipt.input_bytes, 5_000 + 5);
    assert_eq!(receipt.output_bytes, 5_000);
}

#[tokio::test]
async fn the_same_input_costs_the_same_fuel() {
    let one = run_with(&p1(ECHO), command(b"abc"), Limits::default()).await;
    let two = run_with(&p1(ECHO), command(b"abc"), Limits::default()).await;
    assert_eq!(one.receipt.fuel, two.receipt.fuel);
}

#[tokio::test]
async fn exit_codes_arrive_whole() {
    for code in [1, 7, 125, 126, 255] {
        let outcome = run(&p1(&format!("(call $proc_exit (i32.const {code}))"))).await;
        assert_eq!(outcome.termination, Termination::ExitCode { code });
    }
    let outcome = run(&p1("(call $proc_exit (i32.const 0))")).await;
    assert_eq!(outcome.termination, Termination::Succeeded);
}

#[tokio::test]
async fn a_loop_ends_when_its_fuel_is_used_up() {
    let limits = Limits { fuel: 20_000_000, ..Limits::default() };
    let outcome = run_with(&p1(SPIN), command(b""), limits).await;
    assert_eq!(outcome.termination, Termination::OutOfFuel);
    assert_eq!(outcome.receipt.fuel, 20_000_000);
}

#[tokio::test]
async fn a_loop_ends_at_its_deadline_with_an_honest_receipt() {
    let limits = Limits { timeout_ms: 60, ..Limits::default() };
    let outcome = run_with(&p1(SPIN), command(b""), limits).await;
    assert_eq!(outcome.termination, Termination::Deadline);
    assert!(outcome.receipt.fuel > 1_000_000, "{:?}", outcome.receipt);
    assert!(!outcome.receipt.fuel_exact);
    let wall = Duration::from_nanos(outcome.receipt.wall_ns);
    assert!(wall >= Duration::from_millis(60), "{wall:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loop_ends_when_it_is_cancelled() {
    let runtime = Runtime::new(2).unwrap();
    let module = load(&runtime, &p1(SPIN));
    for (why, end) in
        [(CancelReason::Cancelled, Termination::Cancelled), (CancelReason::LeaseLost, Termination::LeaseLost)]
    {
        let control = Arc::new(Control::new(0, 0));
        let attempt = attempt(&module, command(b""), Limits::default());
        let running = tokio::spawn(runtime.attempt(module.clone(), attempt, control.clone()));
        let began = Instant::now();
        while runtime.epoch() == 0 || began.elapsed() < Duration::from_millis(20) {
            tokio::task::yield_now().await;
        }
        let asked = Instant::now();
        runtime.cancel(&control, why);
        let outcome = running.await.unwrap();
        assert!(asked.elapsed() < Duration::from_secs(1));
        assert_eq!(outcome.termination, end);
        assert!(outcome.receipt.fuel > 1, "{:?}", outcome.receipt);
    }
}

/// Sleeps 1,000 s by poll_oneoff on the monotonic clock.
const SLEEP: &str = "
    (i32.store8 (i32.const 64) (i32.const 0))
    (i32.store8 (i32.const 72) (i32.const 0))
    (i32.store (i32.const 80) (i32.const 1))
    (i64.store (i32.const 88) (i64.const 1000000000000))
    (drop (call $poll_oneoff (i32.const 64) (i32.const 128) (i32.const 1) (i32.const 192)))";

#[tokio::test]
async fn a_sleeping_guest_ends_at_its_deadline() {
    let limits = Limits { timeout_ms: 50, ..Limits::default() };
    let outcome = run_with(&p1(SLEEP), command(b""), limits).await;
    assert_eq!(outcome.termination, Termination::Deadline);
    assert!(outcome.receipt.wall_ns < 5_000_000_000);
}

#[tokio::test]
async fn a_sleeping_guest_ends_at_once_when_cancelled() {
    let runtime = Runtime::new(1).unwrap();
    let module = load(&runtime, &p1(SLEEP));
    let control = Arc::new(Control::new(0, 0));
    let attempt = attempt(&module, command(b""), Limits::default());
    let running = tokio::spawn(runtime.attempt(module, attempt, control.clone()));
    tokio::task::yield_now().await;
    runtime.cancel(&control, CancelReason::Cancelled);
    let outcome = tokio::time::timeout(Duration::from_secs(5), running).await.unwrap().unwrap();
    assert_eq!(outcome.termination, Termination::Cancelled);
}

#[tokio::test]
async fn a_trap_names_its_kind_and_its_functions() {
    let outcome = run(&p1_with(
        "(memory (export \"memory\") 1)
         (func $deep_inside unreachable)
         (func $outer (call $deep_inside))",
        "(call $outer)",
    ))
    .await;
    let Termination::Trap { kind, message } = &outcome.termination else {
        panic!("{:?}", outcome.termination);
    };
    assert_eq!(*kind, TrapKind::Unreachable);
    assert!(message.contains("unreachable"), "{message}");
    let names: Vec<_> = outcome.backtrace.iter().map(|frame| frame.function.as_str()).collect();
    assert_eq!(names[..2], ["deep_inside", "outer"], "{names:?}");
    assert!(outcome.backtrace[0].module_offset.is_some());
    assert!(outcome.receipt.fuel > 0 && !outcome.receipt.fuel_exact);
}

#[tokio::test]
async fn other_traps_have_their_own_kinds() {
    let table = "(memory (export \"memory\") 1) (table 1 funcref) (type $t (func))";
    for (items, body, wanted) in [
        (
            "(memory (export \"memory\") 1)",
            "(drop (i32.load (i32.const 0x7fffffff)))",
            TrapKind::MemoryOutOfBounds,
        ),
        (
            "(memory (export \"memory\") 1)",
            "(drop (i32.div_u (i32.const 1) (i32.const 0)))",
            TrapKind::Arithmetic,
        ),
        (table, "(call_indirect (type $t) (i32.const 0))", TrapKind::BadIndirectCall),
        (table, "(call_indirect (type $t) (i32.const 5))", TrapKind::TableOutOfBounds),
    ] {
        let outcome = run(&p1_with(items, body)).await;
        assert!(
            matches!(outcome.termination, Termination::Trap { kind, .. } if kind == wanted),
            "{body}: {:?}",
            outcome.termination
        );
    }
}

#[tokio::test]
async fn growth_beyond_the_limit_and_giving_up_is_out_of_memory() {
    let limits = Limits { memory_bytes: 10 << 16, ..Limits::default() };
    let body = "(if (i32.eq (memory.grow (i32.const 20)) (i32.const -1)) (then unreachable))";
    let outcome = run_with(&p1(body), command(b""), limits).await;
    assert_eq!(outcome.termination, Termination::OutOfMemory);
    assert_eq!(outcome.receipt.peak_memory_bytes, 1 << 16);
    let survives = "(drop (memory.grow (i32.const 20)))";
    let outcome = run_with(&p1(survives), command(b""), limits).await;
    assert_eq!(outcome.termination, Termination::Succeeded);
}

#[tokio::test]
async fn all_memories_count_together() {
    let items = "(memory (export \"memory\") 1) (memory $b 1) (memory $c 1)";
    let body = "(if (i32.eq (memory.grow $b (i32.const 4)) (i32.const -1)) (then unreachable))
                (if (i32.eq (memory.grow $c (i32.const 4)) (i32.const -1)) (then unreachable))";
    let limits = |pages: u64| Limits { memory_bytes: pages << 16, ..Limits::default() };
    let fits = run_with(&p1_with(items, body), command(b""), limits(11)).await;
    assert_eq!(fits.termination, Termination::Succeeded);
    assert_eq!(fits.receipt.peak_memory_bytes, 11 << 16);
    let exceeds = run_with(&p1_with(items, body), command(b""), limits(10)).await;
    assert_eq!(exceeds.termination, Termination::OutOfMemory);
}

#[tokio::test]
async fn an_initial_memory_beyond_the_limit_is_out_of_memory() {
    let limits = Limits { memory_bytes: 10 << 16, ..Limits::default() };
    let wat = p1_with("(memory (export \"memory\") 11)", "");
    let outcome = run_with(&wat, command(b""), limits).await;
    assert_eq!(outcome.termination, Termination::OutOfMemory);
}

#[tokio::test]
async fn endless_recursion_is_a_stack_overflow() {
    let wat =
        p1_with("(memory (export \"memory\") 1) (func $again (call $again) (call $again))", "(call $again)");
    let outcome = run(&wat).await;
    assert_eq!(outcome.termination, Termination::StackOverflow);
    assert!(outcome.backtrace.len() <= 64);
}

#[tokio::test]
async fn stdout_beyond_the_limit_is_cut_and_counted() {
    let limits = Limits { output_bytes: 2_500, ..Limits::default() };
    let outcome = run_with(&p1(&write_loop(1, 10)), command(b""), limits).await;
    assert_eq!(outcome.termination, Termination::Succeeded);
    assert_eq!(outcome.output.len(), 2_500);
    assert_eq!(outcome.receipt.output_bytes, 2_500);
    assert_eq!(outcome.receipt.output_dropped_bytes, 7_500);
}

#[tokio::test]
async fn stderr_garbage_becomes_clean_lines_and_counted_drops() {
    let items = r#"(memory (export "memory") 1)
        (data (i32.const 64) "\ff\00\1b[31mred\nnext\t\c3\a4\n")"#;
    let limits = Limits { log_bytes: 1_200, ..Limits::default() };
    let outcome = run_with(&p1_with(items, &write_loop(2, 100)), command(b""), limits).await;
    assert_eq!(outcome.termination, Termination::Succeeded);
    let logs: Vec<_> = outcome.logs.records().collect();
    assert!(logs.len() >= 2);
    assert_eq!(logs[1].message, "next\tä");
    for log in &logs {
        assert_eq!(log.target, "stderr");
        assert!(!log.message.contains(|c: char| c.is_control() && c != '\t'));
    }
    assert!(outcome.receipt.log_bytes <= 1_200);
    assert!(outcome.receipt.log_dropped_bytes > 90_000);
}

#[tokio::test]
async fn a_bad_pointer_in_a_host_call_is_not_a_host_fault() {
    let body = "(drop (call $fd_write (i32.const 1) (i32.const -8) (i32.const 1) (i32.const -4)))
                (call $proc_exit (i32.const 3))";
    let outcome = run(&p1(body)).await;
    assert!(
        matches!(outcome.termination, Termination::Trap { .. } | Termination::ExitCode { code: 3 }),
        "{:?}",
        outcome.termination
    );
}

#[tokio::test]
async fn attempts_of_one_module_share_no_state() {
    let runtime = Runtime::new(1).unwrap();
    let body = "(if (i32.load (i32.const 512)) (then (call $proc_exit (i32.const 9))))
                (if (global.get $g) (then (call $proc_exit (i32.const 8))))
                (i32.store (i32.const 512) (i32.const 1))
                (i32.store (i32.const 60000) (i32.const 1))
                (global.set $g (i32.const 1))";
    let items = "(memory (export \"memory\") 1) (global $g (mut i32) (i32.const 0))";
    let module = load(&runtime, &p1_with(items, body));
    for _ in 0..3 {
        let attempt = attempt(&module, command(b""), Limits::default());
        let outcome = runtime.attempt(module.clone(), attempt, Arc::new(Control::new(0, 0))).await;
        assert_eq!(outcome.termination, Termination::Succeeded);
    }
}

#[tokio::test]
async fn host_calls_cost_fuel() {
    let limits = Limits { fuel: 500_000, ..Limits::default() };
    let outcome = run_with(&p1(&write_loop(1, 1_000)), command(b""), limits).await;
    assert_eq!(outcome.termination, Termination::OutOfFuel);
    // 1,000 each; the instructions between them are the rest.
    assert!(outcome.receipt.host_calls >= 480, "{}", outcome.receipt.host_calls);
}

#[tokio::test]
async fn an_input_of_the_wrong_kind_is_a_host_fault() {
    let outcome = run_with(&p1(""), Input::Task { bytes: vec![] }, Limits::default()).await;
    assert!(matches!(outcome.termination, Termination::HostFault { .. }));
}

/// A component of the task world around a core module that exports `run` with the canonical
/// signature `(ptr, len) -> ptr to the result`, `memory` and `realloc`.
pub(crate) fn task_component(body: &str) -> String {
    format!(
        r#"(component
  (import "sandbar:task/types@0.1.0" (instance $types
    (type $kind' (enum "retryable" "fatal"))
    (export "failure-kind" (type $kind (eq $kind')))
    (type $failure' (record (field "kind" $kind) (field "message" string) (field "retry-after-ms" (option u64))))
    (export "failure" (type (eq $failure')))
    (type $output' (record (field "content-type" string) (field "bytes" (list u8))))
    (export "output" (type (eq $output')))))
  (alias export $types "failure" (type $failure))
  (alias export $types "output" (type $output))
  (import "sandbar:task/context@0.1.0" (instance $context
    (export "cancelled" (func (result bool)))
    (export "progress" (func (param "done" u64) (param "total" u64) (param "message" string)))))
  (import "sandbar:task/log@0.1.0" (instance $log
    (type $level' (enum "trace" "debug" "info" "warn" "error"))
    (export "level" (type $level (eq $level')))
    (export "emit" (func (param "level" $level) (param "target" string) (param "message" string)
      (param "fields" (list (tuple string string)))))))
  (core module $libc
    (memory (export "memory") 2)
    (global $next (mut i32) (i32.const 4096))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $next) (i32.const 15)) (i32.const -16)))
      (global.set $next (i32.add (local.get $at) (local.get 3)))
      (if (i32.gt_u (global.get $next) (i32.mul (memory.size) (i32.const 65536)))
        (then (drop (memory.grow (i32.const 64)))))
      (local.get $at)))
  (core instance $libc (instantiate $libc))
  (core func $cancelled (canon lower (func $context "cancelled")))
  (core func $progress (canon lower (func $context "progress") (memory $libc "memory")))
  (core func $emit (canon lower (func $log "emit") (memory $libc "memory")))
  (core module $main
    (import "libc" "memory" (memory 2))
    (import "host" "cancelled" (func $cancelled (result i32)))
    (import "host" "progress" (func $progress (param i64 i64 i32 i32)))
    (import "host" "emit" (func $emit (param i32 i32 i32 i32 i32 i32 i32)))
    (data (i32.const 64) "text/plain")
    (data (i32.const 96) "no luck")
    ;; result: ok = 0, content-type, bytes
    (func $ok (param $ptr i32) (param $len i32) (result i32)
      (i32.store8 (i32.const 256) (i32.const 0))
      (i32.store (i32.const 264) (i32.const 64))
      (i32.store (i32.const 268) (i32.const 10))
      (i32.store (i32.const 272) (local.get $ptr))
      (i32.store (i32.const 276) (local.get $len))
      (i32.const 256))
    ;; result: err = 1, kind, message, retry-after none
    (func $err (param $kind i32) (result i32)
      (i32.store8 (i32.const 256) (i32.const 1))
      (i32.store8 (i32.const 264) (local.get $kind))
      (i32.store (i32.const 268) (i32.const 96))
      (i32.store (i32.const 272) (i32.const 7))
      (i32.store8 (i32.const 280) (i32.const 0))
      (i32.const 256))
    (func (export "run") (param $ptr i32) (param $len i32) (result i32)
      {body}))
  (core instance $main (instantiate $main
    (with "libc" (instance $libc))
    (with "host" (instance
      (export "cancelled" (func $cancelled))
      (export "progress" (func $progress))
      (export "emit" (func $emit))))))
  (func (export "run") (param "input" (list u8)) (result (result $output (error $failure)))
    (canon lift (core func $main "run") (memory $libc "memory") (realloc (func $libc "realloc")))))"#
    )
}

async fn run_task(body: &str, input: &[u8], limits: Limits) -> Outcome {
    let input = Input::Task { bytes: input.to_vec() };
    run_with(&task_component(body), input, limits).await
}

#[tokio::test]
async fn a_task_returns_its_input() {
    let body = "(call $ok (local.get $ptr) (local.get $len))";
    let outcome = run_task(body, b"hello", Limits::default()).await;
    assert_eq!(outcome.termination, Termination::Succeeded);
    assert_eq!(outcome.output, b"hello");
    assert_eq!(outcome.content_type, "text/plain");
    assert_eq!(outcome.receipt.input_bytes, 5);
    assert_eq!(outcome.receipt.host_calls, 0);
}

#[tokio::test]
async fn a_task_can_fail_for_good_or_for_now() {
    for (kind, wanted) in [(0, true), (1, false)] {
        let outcome = run_task(&format!("(call $err (i32.const {kind}))"), b"", Limits::default()).await;
        assert_eq!(
            outcome.termination,
            Termination::GuestError { retryable: wanted, message: "no luck".into(), retry_after_ms: None }
        );
        assert!(outcome.output.is_empty());
    }
}

#[tokio::test]
async fn a_result_beyond_the_limit_is_output_too_large() {
    let limits = Limits { output_bytes: 4, ..Limits::default() };
    let body = "(call $ok (local.get $ptr) (local.get $len))";
    let outcome = run_task(body, b"hello", limits).await;
    assert_eq!(outcome.termination, Termination::OutputTooLarge);
    assert!(outcome.output.is_empty());
    let huge = "(drop (memory.grow (i32.const 64))) (call $ok (i32.const 0) (i32.const 4000000))";
    let outcome = run_task(huge, b"", limits).await;
    assert_eq!(outcome.termination, Termination::OutputTooLarge);
}

#[tokio::test]
async fn log_records_arrive_with_their_level() {
    let body = "(call $emit (i32.const 3) (i32.const 64) (i32.const 4) (i32.const 96) (i32.const 7)
                  (i32.const 0) (i32.const 0))
                (call $ok (i32.const 0) (i32.const 0))";
    let outcome = run_task(body, b"", Limits::default()).await;
    assert_eq!(outcome.termination, Termination::Succeeded);
    let log = &outcome.logs.records().next().unwrap();
    assert_eq!(log.level, crate::outcome::LogLevel::Warn);
    assert_eq!((log.target.as_str(), log.message.as_str()), ("text", "no luck"));
    assert_eq!(outcome.receipt.log_bytes, 11);
    assert_eq!(outcome.receipt.host_calls, 1);
}

#[tokio::test]
async fn a_result_with_an_invalid_pointer_is_the_guests_fault() {
    let body = "(call $ok (i32.const -16) (i32.const 1000))";
    let outcome = run_task(body, b"", Limits::default()).await;
    assert!(matches!(outcome.termination, Termination::Trap { .. }), "{:?}", outcome.termination);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_watches_for_cancellation_may_clean_up() {
    let runtime = Runtime::new(1).unwrap();
    let body = "(block $out (loop $l (br_if $out (call $cancelled)) (br $l)))
                (call $ok (i32.const 64) (i32.const 4))";
    let module = load(&runtime, &task_component(body));
    let control = Arc::new(Control::new(0, 0));
    let attempt = attempt(&module, Input::Task { bytes: vec![] }, Limits::default());
    let running = tokio::spawn(runtime.attempt(module, attempt, control.clone()));
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(30) {
        tokio::task::yield_now().await;
    }
    runtime.cancel(&control, CancelReason::Cancelled);
    let outcome = running.await.unwrap();
    assert_eq!(outcome.termination, Termination::Succeeded);
    assert_eq!(outcome.output, b"text");
}
