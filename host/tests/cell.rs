//! Cells as processes: outcomes, fairness, death.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use common::{PATIENCE, QUICK, SPIN, artifact, attempt, cell, finished, gone, next, program, script};
use sandbar_host::cell::{CancelReason, Cell, CellConfig, CellEvent, LoadError, SubmitError, protocol};
use sandbar_host::limits::Limits;
use sandbar_host::outcome::{Termination, TrapKind};
use sandbar_host::run::Input;

#[tokio::test]
async fn attempts_come_back_with_their_tokens_and_receipts() {
    let code = artifact(QUICK).await;
    let (cell, mut events) = cell(1, 16).await;
    cell.load(&code).await.unwrap();
    for token in 0..50 {
        cell.submit(token, &attempt(&code, token % 3, Limits::default())).unwrap();
    }
    let mut tokens = HashSet::new();
    for _ in 0..50 {
        let (token, outcome) = finished(&mut events).await;
        assert_eq!(outcome.termination, Termination::Succeeded);
        assert!(outcome.receipt.cpu_ns > 0 && outcome.receipt.wall_ns > 0);
        assert!(tokens.insert(token));
    }
    assert_eq!(cell.in_flight(), 0);
}

#[tokio::test]
async fn a_trap_comes_back_with_its_backtrace() {
    let code = artifact(r#"(module (func $boom unreachable) (func (export "_start") (call $boom)))"#).await;
    let (cell, mut events) = cell(1, 2).await;
    cell.load(&code).await.unwrap();
    cell.submit(7, &attempt(&code, 1, Limits::default())).unwrap();
    let (_, outcome) = finished(&mut events).await;
    assert!(matches!(outcome.termination, Termination::Trap { kind: TrapKind::Unreachable, .. }));
    assert_eq!(outcome.backtrace[0].function, "boom");
}

#[tokio::test]
async fn fuel_deadline_and_cancellation_end_a_loop_with_fuel_on_the_receipt() {
    let code = artifact(SPIN).await;
    let (cell, mut events) = cell(1, 4).await;
    cell.load(&code).await.unwrap();
    let fuel = Limits { fuel: 5_000_000, ..Limits::default() };
    let deadline = Limits { timeout_ms: 50, ..Limits::default() };
    cell.submit(1, &attempt(&code, 1, fuel)).unwrap();
    cell.submit(2, &attempt(&code, 1, deadline)).unwrap();
    cell.submit(3, &attempt(&code, 1, Limits::default())).unwrap();
    cell.submit(4, &attempt(&code, 1, Limits::default())).unwrap();
    for _ in 0..2 {
        let (token, outcome) = finished(&mut events).await;
        let wanted = [Termination::OutOfFuel, Termination::Deadline];
        assert_eq!(outcome.termination, wanted[token as usize - 1]);
        assert!(outcome.receipt.fuel > 0);
    }
    for (token, why, wanted) in [
        (3, CancelReason::Cancelled, Termination::Cancelled),
        (4, CancelReason::LeaseLost, Termination::LeaseLost),
    ] {
        let asked = Instant::now();
        cell.cancel(token, why);
        let (ended, outcome) = finished(&mut events).await;
        assert!(asked.elapsed() < Duration::from_secs(2));
        assert_eq!((ended, &outcome.termination), (token, &wanted));
        assert!(outcome.receipt.fuel > 1, "{:?}", outcome.receipt);
        assert!(outcome.receipt.cpu_ns > 1_000_000, "{:?}", outcome.receipt);
    }
}

#[tokio::test]
async fn a_short_task_is_served_among_fifty_spinning_attempts_of_another_tenant() {
    let hog = artifact(SPIN).await;
    let quick = artifact(QUICK).await;
    let (cell, mut events) = cell(1, 64).await;
    cell.load(&hog).await.unwrap();
    cell.load(&quick).await.unwrap();
    for token in 0..50 {
        cell.submit(token, &attempt(&hog, 1, Limits::default())).unwrap();
    }
    let mut slowest = Duration::ZERO;
    for token in 100..120 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let asked = Instant::now();
        cell.submit(token, &attempt(&quick, 2, Limits::default())).unwrap();
        let (ended, outcome) = finished(&mut events).await;
        assert_eq!(ended, token);
        assert_eq!(outcome.termination, Termination::Succeeded);
        slowest = slowest.max(asked.elapsed());
    }
    // A queue in order of arrival would make it wait 50 slices, and for ever behind a semaphore.
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
    assert_eq!(cell.in_flight(), 50);
}

#[tokio::test]
async fn cpu_is_shared_by_weight_between_busy_tenants() {
    let code = artifact(SPIN).await;
    let (cell, mut events) = cell(1, 64).await;
    cell.load(&code).await.unwrap();
    let limits = Limits { timeout_ms: 4_000, ..Limits::default() };
    // One attempt of weight 300 against ten of weight 100: three parts to one.
    let heavy = sandbar_host::run::Attempt { weight: 300, ..attempt(&code, 1, limits) };
    cell.submit(0, &heavy).unwrap();
    for token in 1..=10 {
        cell.submit(token, &attempt(&code, 2, limits)).unwrap();
    }
    let (mut first, mut second) = (0, 0);
    for _ in 0..11 {
        let (token, outcome) = finished(&mut events).await;
        if token == 0 {
            first += outcome.receipt.cpu_ns;
        } else {
            second += outcome.receipt.cpu_ns;
        }
    }
    let ratio = first as f64 / second as f64;
    assert!((2.0..4.5).contains(&ratio), "{ratio}");
}

#[tokio::test]
async fn more_attempts_than_slots_wait_their_turn_and_beyond_that_are_refused() {
    let code = artifact(SPIN).await;
    let (cell, mut events) = cell(1, 2).await;
    cell.load(&code).await.unwrap();
    let limits = Limits { timeout_ms: 30, ..Limits::default() };
    for token in 0..8 {
        cell.submit(token, &attempt(&code, token % 2, limits)).unwrap();
    }
    assert_eq!(cell.submit(8, &attempt(&code, 0, limits)), Err(SubmitError::Full));
    for _ in 0..8 {
        let (_, outcome) = finished(&mut events).await;
        assert_eq!(outcome.termination, Termination::Deadline);
    }
}

#[tokio::test]
async fn an_attempt_that_waits_for_a_slot_can_be_cancelled() {
    let code = artifact(SPIN).await;
    let (cell, mut events) = cell(1, 1).await;
    cell.load(&code).await.unwrap();
    cell.submit(1, &attempt(&code, 1, Limits::default())).unwrap();
    cell.submit(2, &attempt(&code, 1, Limits::default())).unwrap();
    cell.cancel(2, CancelReason::Cancelled);
    let (token, outcome) = finished(&mut events).await;
    assert_eq!((token, outcome.termination), (2, Termination::Cancelled));
}

#[tokio::test]
async fn the_caller_is_told_what_was_not_sent() {
    let code = artifact(QUICK).await;
    let spin = artifact(SPIN).await;
    let (cell, mut events) = cell(1, 2).await;
    let one = attempt(&code, 1, Limits::default());
    assert_eq!(cell.submit(1, &one), Err(SubmitError::NotLoaded));
    cell.load(&spin).await.unwrap();
    cell.load(&code).await.unwrap();
    let long = attempt(&spin, 1, Limits::default());
    cell.submit(1, &long).unwrap();
    assert_eq!(cell.submit(1, &long), Err(SubmitError::TokenInUse));
    let mut huge = attempt(&code, 1, Limits::default());
    huge.input = Input::Command { args: vec![], env: vec![], stdin: vec![0; 65 << 20] };
    assert_eq!(cell.submit(2, &huge), Err(SubmitError::TooLarge));
    cell.submit(3, &one).unwrap();
    assert_eq!(finished(&mut events).await.0, 3);
}

#[tokio::test]
async fn code_is_evicted_when_the_cell_is_full_of_it_and_can_come_back() {
    let one = artifact(QUICK).await;
    let two = artifact(SPIN).await;
    let config = CellConfig { code_cache_bytes: one.bytes.len() as u64 + 1, ..CellConfig::new(program()) };
    let (cell, mut events) = Cell::spawn(&config).await.unwrap();
    cell.load(&one).await.unwrap();
    cell.load(&two).await.unwrap();
    let again = attempt(&one, 1, Limits::default());
    assert_eq!(cell.submit(1, &again), Err(SubmitError::NotLoaded));
    cell.load(&one).await.unwrap();
    cell.submit(1, &again).unwrap();
    assert_eq!(finished(&mut events).await.1.termination, Termination::Succeeded);
}

#[tokio::test]
async fn a_killed_cell_is_gone_and_takes_nothing_any_more() {
    let code = artifact(SPIN).await;
    let (cell, mut events) = cell(1, 4).await;
    cell.load(&code).await.unwrap();
    cell.submit(1, &attempt(&code, 1, Limits::default())).unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(cell.pid()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let reason = gone(&mut events).await;
    assert!(reason.contains("signal: 9"), "{reason}");
    assert_eq!(cell.submit(2, &attempt(&code, 1, Limits::default())), Err(SubmitError::Gone));
    assert_eq!(cell.load(&code).await, Err(LoadError::Gone));
}

#[tokio::test]
async fn kill_ends_the_process() {
    let (cell, mut events) = cell(1, 1).await;
    let pid = cell.pid();
    cell.kill();
    gone(&mut events).await;
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}

#[tokio::test]
async fn a_cell_whose_parent_forgets_it_ends() {
    let (cell, events) = cell(1, 1).await;
    let proc = format!("/proc/{}/stat", cell.pid());
    drop(cell);
    drop(events);
    let began = Instant::now();
    while std::fs::read_to_string(&proc).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(began.elapsed() < PATIENCE, "the cell still runs");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_program_that_speaks_nonsense_is_no_cell() {
    let config = CellConfig::new("/bin/true".into());
    assert!(Cell::spawn(&config).await.is_err());
}

/// A program that says it is ready and then sends `frame`.
fn impostor(dir: &tempfile::TempDir, frame: &[u8]) -> std::path::PathBuf {
    let mut ready = protocol::Packer::new(1 << 20);
    ready.push(&protocol::FromCell::Ready(sandbar_host::walls::Walls::default())).unwrap();
    let mut bytes = ready.take(Vec::new());
    bytes.extend_from_slice(frame);
    let octal: String = bytes.iter().map(|b| format!("\\{b:03o}")).collect();
    // The answer goes out on the socket, which is its standard input; then it waits to be killed.
    let body = format!("printf '{octal}' >&0\nread never\nread never\nsleep 100");
    script(&dir.path().join("impostor"), &body)
}

#[tokio::test]
async fn a_cell_that_breaks_the_protocol_is_gone() {
    let mut liar = protocol::Packer::new(1 << 20);
    liar.push(&protocol::FromCell::Loaded(sandbar_host::ModuleHash::of(b"x"))).unwrap();
    let unasked = liar.take(Vec::new());
    for frame in [
        &[8, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff][..],
        &[0xff, 0xff, 0xff, 0xff][..],
        &unasked[..],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let config = CellConfig::new(impostor(&dir, frame));
        match Cell::spawn(&config).await {
            Ok((_cell, mut events)) => {
                let event = next(&mut events).await;
                assert!(matches!(event, CellEvent::Gone { .. }), "{event:?}");
            }
            // The nonsense came in one read with the greeting.
            Err(err) => assert!(!err.to_string().is_empty()),
        }
    }
}

#[tokio::test]
async fn a_cell_ends_on_a_malformed_frame_from_its_parent() {
    use std::io::{Read, Write};
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut child = std::process::Command::new(program())
        .arg(sandbar_host::cell::SUBCOMMAND)
        .env_clear()
        .stdin(std::process::Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    ours.write_all(&[4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]).unwrap();
    let mut rest = Vec::new();
    let _ = ours.read_to_end(&mut rest);
    assert!(rest.is_empty());
    assert!(!child.wait().unwrap().success());
}

#[tokio::test]
async fn progress_arrives_and_its_latest_report_comes_before_the_end() {
    let code = artifact(
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
    (export "progress" (func (param "done" u64) (param "total" u64) (param "message" string)))))
  (core module $libc (memory (export "memory") 1)
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 1024)))
  (core instance $libc (instantiate $libc))
  (core func $progress (canon lower (func $context "progress") (memory $libc "memory")))
  (core module $main
    (import "libc" "memory" (memory 1))
    (import "host" "progress" (func $progress (param i64 i64 i32 i32)))
    (func (export "run") (param i32 i32) (result i32)
      (local $i i64)
      (loop $l
        (local.set $i (i64.add (local.get $i) (i64.const 1)))
        (call $progress (local.get $i) (i64.const 5000) (i32.const 0) (i32.const 0))
        (br_if $l (i64.lt_u (local.get $i) (i64.const 5000))))
      (i32.const 256)))
  (core instance $main (instantiate $main
    (with "libc" (instance $libc))
    (with "host" (instance (export "progress" (func $progress))))))
  (func (export "run") (param "input" (list u8)) (result (result $output (error $failure)))
    (canon lift (core func $main "run") (memory $libc "memory") (realloc (func $libc "realloc")))))"#,
    )
    .await;
    let (cell, mut events) = cell(1, 1).await;
    cell.load(&code).await.unwrap();
    let mut one = attempt(&code, 1, Limits::default());
    one.input = Input::Task { bytes: vec![] };
    cell.submit(1, &one).unwrap();
    let mut reports = Vec::new();
    loop {
        match next(&mut events).await {
            CellEvent::Progress { token, progress } => {
                assert_eq!(token, 1);
                reports.push(progress.done);
            }
            CellEvent::Finished { outcome, .. } => {
                assert_eq!(outcome.termination, Termination::Succeeded);
                break;
            }
            CellEvent::Log { .. } | CellEvent::Http { .. } | CellEvent::Ask { .. } | CellEvent::Used(_) => {}
            CellEvent::Gone { reason } => panic!("{reason}"),
        }
    }
    assert_eq!(reports.last(), Some(&5_000));
    assert!(reports.len() < 1_000, "{}", reports.len());
}

/// Writes "hello" to stderr, then spins.
const HELLO_AND_SPIN: &str = r#"(module
    (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
    (memory (export "memory") 1)
    (data (i32.const 0) "\10\00\00\00\06\00\00\00")
    (data (i32.const 16) "hello\n")
    (func (export "_start")
        (drop (call $write (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 8)))
        (loop $l (br $l))))"#;

#[tokio::test]
async fn what_a_running_attempt_logs_is_told_once_while_it_runs_and_again_with_its_outcome() {
    let code = artifact(HELLO_AND_SPIN).await;
    let (cell, mut events) = cell(1, 2).await;
    cell.load(&code).await.unwrap();
    let limits = Limits { timeout_ms: 2_500, ..Limits::default() };
    cell.submit(7, &attempt(&code, 1, limits)).unwrap();
    let mut told = Vec::new();
    let outcome = loop {
        match next(&mut events).await {
            CellEvent::Log { token, first, log } => {
                assert_eq!(token, 7);
                told.push((first, log));
            }
            CellEvent::Finished { outcome, .. } => break outcome,
            CellEvent::Progress { .. }
            | CellEvent::Http { .. }
            | CellEvent::Ask { .. }
            | CellEvent::Used(_) => {}
            CellEvent::Gone { reason } => panic!("{reason}"),
        }
    };
    assert_eq!(told, [(0, outcome.logs.clone())]);
    assert_eq!(outcome.logs.records().next().unwrap().message, "hello");
}

#[tokio::test]
async fn an_attempt_that_ends_young_is_told_of_only_by_its_outcome() {
    let code = artifact(HELLO_AND_SPIN).await;
    let (cell, mut events) = cell(1, 2).await;
    cell.load(&code).await.unwrap();
    let limits = Limits { timeout_ms: 40, ..Limits::default() };
    cell.submit(7, &attempt(&code, 1, limits)).unwrap();
    let event = next(&mut events).await;
    let CellEvent::Finished { outcome, .. } = event else { panic!("{event:?}") };
    assert_eq!(outcome.logs.count(), 1);
}

#[tokio::test]
async fn the_same_attempt_costs_the_same_fuel_in_two_processes() {
    // Floating point with NaNs, the clock and random values decide how long it takes.
    let code = artifact(
        r#"(module
  (import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start") (local $n i32)
    (drop (call $clock (i32.const 0) (i64.const 0) (i32.const 64)))
    (drop (call $random (i32.const 72) (i32.const 16)))
    (f64.store (i32.const 88) (f64.div (f64.const 0) (f64.const 0)))
    (f32.store (i32.const 96) (f32.sqrt (f32.const -1)))
    (local.set $n (i32.xor (i32.load16_u (i32.const 72)) (i32.load16_u (i32.const 64))))
    (loop $l (local.set $n (i32.sub (local.get $n) (i32.const 1))) (br_if $l (i32.gt_s (local.get $n) (i32.const 0))))
    (i32.store (i32.const 0) (i32.const 64))
    (i32.store (i32.const 4) (i32.const 40))
    (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"#,
    )
    .await;
    let mut one = attempt(&code, 1, Limits::default());
    one.options.determinism =
        Some(sandbar_host::run::Determinism { clock_ns: 1_760_000_000_000_000_000, seed: 42 });
    let mut runs = Vec::new();
    for _ in 0..2 {
        let (cell, mut events) = cell(1, 1).await;
        cell.load(&code).await.unwrap();
        cell.submit(1, &one).unwrap();
        let (_, outcome) = finished(&mut events).await;
        assert_eq!(outcome.termination, Termination::Succeeded);
        assert!(outcome.receipt.fuel_exact);
        runs.push((outcome.output, outcome.receipt.fuel));
    }
    assert_eq!(runs[0], runs[1]);
    assert_eq!(runs[0].0[24..32], f64::NAN.to_bits().to_le_bytes(), "the one NaN");
}
