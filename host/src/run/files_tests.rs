//! Files and fixed clocks of attempts, with guests in WebAssembly text.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::tests::{attempt, command, load};
use super::*;
use crate::files::File;

fn file(path: &str, bytes: &[u8]) -> File {
    File { path: path.to_owned(), bytes: bytes.to_vec() }
}

/// A command with the functions of preview 1 that these tests call, one page of memory with some names, and helpers.
fn program(body: &str) -> String {
    format!(
        r#"(module
  (import "wasi_snapshot_preview1" "path_open" (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_close" (func $fd_close (param i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_seek" (func $fd_seek (param i32 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_prestat_get" (func $prestat (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_readdir" (func $readdir (param i32 i32 i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_create_directory" (func $mkdir (param i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_symlink" (func $symlink (param i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 4)
  (data (i32.const 1024) "in/a.txt")
  (data (i32.const 1040) "out")
  (data (i32.const 1048) "out/b.txt")
  (data (i32.const 1064) "../x")
  (data (i32.const 1072) "/etc/passwd")
  (data (i32.const 1088) "link")
  ;; Opens for reading and writing; ends with the error number as exit code.
  (func $open (param $path i32) (param $len i32) (param $flags i32) (result i32)
    (call $must (call $path_open (i32.const 3) (i32.const 1) (local.get $path) (local.get $len)
      (local.get $flags) (i64.const 66) (i64.const 0) (i32.const 0) (i32.const 512)))
    (i32.load (i32.const 512)))
  (func $must (param $errno i32) (if (local.get $errno) (then (call $exit (local.get $errno)))))
  (func $vector (param $at i32) (param $len i32)
    (i32.store (i32.const 0) (local.get $at)) (i32.store (i32.const 4) (local.get $len)))
  (func $write (param $fd i32) (param $at i32) (param $len i32)
    (call $vector (local.get $at) (local.get $len))
    (call $must (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 16))))
  (func $read (param $fd i32) (param $at i32) (param $len i32) (result i32)
    (call $vector (local.get $at) (local.get $len))
    (call $must (call $fd_read (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 16)))
    (i32.load (i32.const 16)))
  (func (export "_start") (local $n i32) (local $fd i32) {body}))"#
    )
}

async fn run_in(body: &str, scratch: Scratch) -> Outcome {
    let runtime = Runtime::new(1).unwrap();
    let module = load(&runtime, &program(body));
    let mut one = attempt(&module, command(b"stdin"), Limits::default());
    one.options.scratch = Some(scratch);
    runtime.attempt(module, one, Arc::new(Control::new(0, 0))).await
}

fn scratch(bytes: u64) -> Scratch {
    Scratch { bytes, ..Scratch::default() }
}

const COPY: &str = "
    (call $must (call $mkdir (i32.const 3) (i32.const 1040) (i32.const 3)))
    (local.set $fd (call $open (i32.const 1024) (i32.const 8) (i32.const 0)))
    (local.set $n (call $read (local.get $fd) (i32.const 2048) (i32.const 100)))
    (call $write (i32.const 1) (i32.const 2048) (local.get $n))
    (local.set $fd (call $open (i32.const 1048) (i32.const 9) (i32.const 1)))
    (call $write (local.get $fd) (i32.const 2048) (local.get $n))
    (call $write (local.get $fd) (i32.const 2048) (local.get $n))
    (local.set $n (call $read (i32.const 0) (i32.const 2048) (i32.const 100)))
    (call $write (i32.const 1) (i32.const 2048) (local.get $n))";

#[tokio::test]
async fn files_are_there_at_the_start_and_come_back_at_the_end() {
    let scratch = Scratch {
        bytes: 1 << 20,
        files: vec![file("in/a.txt", b"hello "), file("in/deep/b", b"\xff")],
        collect: vec!["out/*".to_owned(), "in/deep/**".to_owned()],
    };
    let outcome = run_in(COPY, scratch).await;
    assert_eq!(outcome.termination, Termination::Succeeded);
    assert_eq!(outcome.output, b"hello stdin");
    assert_eq!(outcome.artifacts, [file("in/deep/b", b"\xff"), file("out/b.txt", b"hello hello ")]);
    assert_eq!(outcome.receipt.input_bytes, 5 + 5 + (8 + 6) + (9 + 1));
    assert_eq!(outcome.receipt.output_bytes, 11 + 1 + 12);
}

#[tokio::test]
async fn nothing_of_one_attempt_is_there_in_the_next_and_without_a_scratch_directory_there_is_none() {
    for _ in 0..2 {
        let outcome = run_in(
            "(call $must (call $mkdir (i32.const 3) (i32.const 1040) (i32.const 3)))",
            scratch(1 << 20),
        )
        .await;
        assert_eq!(outcome.termination, Termination::Succeeded);
    }
    let runtime = Runtime::new(1).unwrap();
    let module = load(&runtime, &program("(call $must (call $prestat (i32.const 3) (i32.const 64)))"));
    let one = attempt(&module, command(b""), Limits::default());
    let outcome = runtime.attempt(module, one, Arc::new(Control::new(0, 0))).await;
    assert_eq!(outcome.termination, Termination::ExitCode { code: 8 }, "EBADF");
}

#[tokio::test]
async fn a_guest_that_fills_its_scratch_directory_hears_that_there_is_no_space() {
    let fill = "(local.set $fd (call $open (i32.const 1040) (i32.const 3) (i32.const 1)))
        (loop $more (call $write (local.get $fd) (i32.const 4096) (i32.const 60000)) (br $more))";
    let outcome = run_in(fill, scratch(1 << 20)).await;
    assert_eq!(outcome.termination, Termination::ExitCode { code: 51 }, "ENOSPC");
    let descriptors =
        "(loop $more (drop (call $open (i32.const 1040) (i32.const 3) (i32.const 1))) (br $more))";
    let outcome = run_in(descriptors, scratch(1 << 20)).await;
    assert_eq!(outcome.termination, Termination::ExitCode { code: 33 }, "EMFILE");
    assert!(outcome.receipt.host_calls < 300);
    let outcome = run_in("", Scratch { files: vec![file("a", &[0; 5_000])], ..scratch(1_000) }).await;
    assert!(matches!(outcome.termination, Termination::QuotaExceeded { .. }), "{:?}", outcome.termination);
}

#[tokio::test]
async fn no_path_of_a_guest_leads_out() {
    for (at, len) in [(1064, 4), (1072, 11)] {
        let outcome = run_in(
            &format!("(drop (call $open (i32.const {at}) (i32.const {len}) (i32.const 0)))"),
            scratch(1 << 20),
        )
        .await;
        assert_eq!(outcome.termination, Termination::ExitCode { code: 63 }, "EPERM");
    }
    let link = "(call $must (call $symlink (i32.const 1064) (i32.const 4) (i32.const 3) (i32.const 1088) (i32.const 4)))
        (drop (call $open (i32.const 1088) (i32.const 4) (i32.const 0)))";
    let outcome = run_in(link, scratch(1 << 20)).await;
    assert_eq!(outcome.termination, Termination::ExitCode { code: 63 }, "EPERM");
}

#[tokio::test]
async fn pointers_outside_of_memory_are_errors_of_the_call() {
    for body in [
        "(call $must (call $fd_write (i32.const 1) (i32.const -8) (i32.const 1) (i32.const 16)))",
        "(call $must (call $readdir (i32.const 3) (i32.const -1) (i32.const 100) (i64.const 0) (i32.const 16)))",
        "(call $must (call $fd_seek (i32.const 3) (i64.const 0) (i32.const 0) (i32.const -1)))",
        "(call $must (call $mkdir (i32.const 3) (i32.const -1) (i32.const -1)))",
        "(call $vector (i32.const 0) (i32.const -1)) (call $must (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))",
    ] {
        let outcome = run_in(body, scratch(1 << 20)).await;
        assert!(
            matches!(outcome.termination, Termination::ExitCode { .. }),
            "{body}: {:?}",
            outcome.termination
        );
    }
}

#[tokio::test]
async fn a_directory_lists_itself_and_its_entries() {
    let body = "(call $must (call $readdir (i32.const 3) (i32.const 4096) (i32.const 1000) (i64.const 0) (i32.const 16)))
        (call $write (i32.const 1) (i32.const 4096) (i32.load (i32.const 16)))";
    let outcome =
        run_in(body, Scratch { files: vec![file("in/a.txt", b"x"), file("z", b"")], ..scratch(1 << 20) })
            .await;
    let mut rest = outcome.output.as_slice();
    let mut found = Vec::new();
    while let Some((entry, behind)) = rest.split_at_checked(24) {
        let len = entry[16] as usize;
        found.push((String::from_utf8(behind[..len].to_vec()).unwrap(), entry[20]));
        rest = &behind[len..];
    }
    let wanted = [(".", 3), ("..", 3), ("in", 3), ("z", 4)].map(|(name, kind)| (name.to_owned(), kind));
    assert_eq!(found, wanted);
}

#[tokio::test]
async fn artifacts_share_the_output_limit_and_what_does_not_fit_is_counted() {
    let runtime = Runtime::new(1).unwrap();
    let module = load(&runtime, &program(""));
    let limits = Limits { output_bytes: 100, ..Limits::default() };
    let mut one = attempt(&module, command(b""), limits);
    let files = vec![file("a", &[1; 60]), file("b", &[1; 60]), file("c", &[1; 10])];
    one.options.scratch = Some(Scratch { files, collect: vec!["*".to_owned()], ..scratch(1 << 20) });
    let outcome = runtime.attempt(module, one, Arc::new(Control::new(0, 0))).await;
    let paths: Vec<_> = outcome.artifacts.iter().map(|file| file.path.as_str()).collect();
    assert_eq!((paths, outcome.receipt.output_dropped_bytes), (vec!["a", "c"], 60));
}

#[tokio::test]
async fn a_fixed_clock_and_seed_give_the_same_course_and_another_seed_another() {
    let body = "(call $must (call $clock (i32.const 0) (i64.const 0) (i32.const 4096)))
        (call $must (call $clock (i32.const 1) (i64.const 0) (i32.const 4104)))
        (call $must (call $random (i32.const 4112) (i32.const 16)))
        (call $write (i32.const 1) (i32.const 4096) (i32.const 32))
        ;; As long as the random value says.
        (local.set $n (i32.load8_u (i32.const 4112)))
        (loop $l (if (local.get $n) (then (local.set $n (i32.sub (local.get $n) (i32.const 1))) (br $l))))";
    let runtime = Runtime::new(1).unwrap();
    let module = load(&runtime, &program(body));
    let mut outcomes = Vec::new();
    for seed in [1, 1, 3] {
        let mut one = attempt(&module, command(b""), Limits::default());
        one.options.determinism = Some(Determinism { clock_ns: 1_700_000_000_000_000_000, seed });
        outcomes.push(runtime.attempt(module.clone(), one, Arc::new(Control::new(0, 0))).await);
    }
    assert_eq!(outcomes[0].output[..8], 1_700_000_000_000_000_000_u64.to_le_bytes());
    assert_eq!(outcomes[0].output, outcomes[1].output);
    assert_eq!(outcomes[0].receipt.fuel, outcomes[1].receipt.fuel);
    assert_ne!(outcomes[0].output, outcomes[2].output);
    assert_ne!(outcomes[0].receipt.fuel, outcomes[2].receipt.fuel);
}
