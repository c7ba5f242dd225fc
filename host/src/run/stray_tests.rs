//! Nothing of one attempt is visible to the next, with what slots keep resident and with both ways of clearing it. A
//! guest leaves something everywhere; what looks for it afterwards is first shown to find it within the same attempt.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

use super::tests::{attempt, load};
use super::*;
use crate::engine;

/// What is looked for, in the order in which the guest counts it. The last is what has to be there: a word of the module's
/// own data that an attempt before overwrote.
const PLACES: [&str; 11] = [
    "memory within what is kept resident without a scan",
    "memory within what is kept resident",
    "memory beyond that",
    "memory it grew by",
    "the second memory",
    "tables",
    "globals",
    "locals after deep calls",
    "descriptors and files",
    "arguments and environment",
    "data of the module that is not what it was",
];

/// A command that soils everything when its input begins with `d`, and counts what is soiled when it ends with `l`.
/// `tag` makes another module of it.
fn program(tag: u32) -> String {
    let count = |memory: &str, from: &str, to: &str| {
        format!(
            "(local.set $n (i32.const 0)) (local.set $at {from}) (local.set $end {to})
             (block $done (loop $l (br_if $done (i32.ge_u (local.get $at) (local.get $end)))
               (if (i64.ne (i64.load {memory} (local.get $at)) (i64.const 0))
                 (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
               (local.set $at (i32.add (local.get $at) (i32.const 8))) (br $l)))
             (call $say (local.get $n))"
        )
    };
    let fixed = |n: u32| format!("(i32.const {n})");
    let counts = [
        count("$m", &fixed(8_192), &fixed(64 << 10)),
        count("$m", &fixed(64 << 10), &fixed(10 << 20)),
        count("$m", &fixed(10 << 20), &fixed(12 << 20)),
        // Grown memory is there before it is counted.
        format!(
            "(if (i32.eq (memory.size $m) (i32.const 192)) (then (drop (memory.grow $m (i32.const 16)))))
             {}",
            count("$m", &fixed(12 << 20), "(i32.shl (memory.size $m) (i32.const 16))")
        ),
        count("$second", &fixed(0), &fixed(2 << 16)),
    ]
    .join("\n");
    // Locals that nobody has set, after calls that filled the stack.
    let locals: String = (0..64).map(|n| format!("(local $l{n} i64)")).collect();
    let set: String = (0..64).map(|n| format!("(local.set $l{n} (i64.const -1))")).collect();
    let sum: String =
        (0..64).fold("(i64.const 0)".to_owned(), |sum, n| format!("(i64.or {sum} (local.get $l{n}))"));
    format!(
        r#"(module
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_fdstat_get" (func $fdstat (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open" (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ (param i32 i32) (result i32)))
  (memory $m (export "memory") 192)
  (memory $second 2)
  (table $t 20000 funcref)
  (table $u 10 funcref)
  (global $g (mut i64) (i64.const 0))
  (global $h (mut v128) (v128.const i64x2 0 0))
  (global $tag i32 (i32.const {tag}))
  (elem declare func $nothing)
  (func $nothing)
  (data (memory $m) (i32.const 4096) "pristine")
  (data (memory $m) (i32.const 5000) "dirt")
  (func $say (param $n i32)
    (i32.store $m (i32.const 16) (local.get $n))
    (i32.store $m (i32.const 0) (i32.const 16)) (i32.store $m (i32.const 4) (i32.const 4))
    (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))
  (func $open (param $create i32) (result i32)
    (call $path_open (i32.const 3) (i32.const 1) (i32.const 5000) (i32.const 4) (local.get $create)
      (i64.const 66) (i64.const 0) (i32.const 0) (i32.const 512)))
  (func $deep (param $n i32) (result i64) {locals} {set}
    (if (local.get $n) (then (local.set $l0 (call $deep (i32.sub (local.get $n) (i32.const 1))))))
    {sum})
  (func $unset (result i64) {locals} {sum})
  (func $soil
    (memory.fill $m (i32.const 8192) (i32.const 0xa5) (i32.const 12574720))
    (drop (memory.grow $m (i32.const 16)))
    (memory.fill $m (i32.const 12582912) (i32.const 0xa5) (i32.const 1048576))
    (memory.fill $second (i32.const 0) (i32.const 0xa5) (i32.const 131072))
    (i64.store $m (i32.const 4096) (i64.const 0))
    (table.fill $t (i32.const 1) (ref.func $nothing) (i32.const 19999))
    (drop (table.grow $t (ref.func $nothing) (i32.const 1000)))
    (table.fill $u (i32.const 0) (ref.func $nothing) (i32.const 10))
    (global.set $g (i64.const -1)) (global.set $h (v128.const i64x2 -1 -1))
    (drop (call $deep (i32.const 200)))
    (drop (call $open (i32.const 1))))
  (func $look (local $n i32) (local $at i32) (local $end i32)
    {counts}
    (if (i32.eq (table.size $t) (i32.const 20000)) (then (drop (table.grow $t (ref.null func) (i32.const 1000)))))
    (local.set $n (i32.const 0)) (local.set $at (i32.const 0))
    (loop $l
      (if (i32.eqz (ref.is_null (table.get $t (local.get $at)))) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
      (br_if $l (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 1))) (table.size $t))))
    (if (i32.eqz (ref.is_null (table.get $u (i32.const 5)))) (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
    (call $say (local.get $n))
    (call $say (i32.add (i64.ne (global.get $g) (i64.const 0)) (v128.any_true (global.get $h))))
    (call $say (i64.ne (call $unset) (i64.const 0)))
    ;; Descriptor 4 is the first that a guest opens.
    (local.set $n (i32.eqz (call $fdstat (i32.const 4) (i32.const 520))))
    (call $say (i32.add (local.get $n) (i32.eqz (call $open (i32.const 0)))))
    (drop (call $args (i32.const 560) (i32.const 568))) (drop (call $environ (i32.const 564) (i32.const 568)))
    ;; Its own name is always there.
    (call $say (i32.add (i32.sub (i32.load $m (i32.const 560)) (i32.const 1)) (i32.load $m (i32.const 564))))
    (call $say (i64.ne (i64.load $m (i32.const 4096)) (i64.const 0x656e697473697270))))
  (func (export "_start")
    (i32.store $m (i32.const 0) (i32.const 600)) (i32.store $m (i32.const 4) (i32.const 2))
    (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
    (if (i32.eq (i32.load8_u $m (i32.const 600)) (i32.const 100)) (then (call $soil)))
    (if (i32.eq (i32.load8_u $m (i32.const 601)) (i32.const 108)) (then (call $look)))))"#
    )
}

/// Runs it; with arguments and environment when it is to soil.
async fn run(runtime: &Runtime, module: &Arc<Loaded>, what: &[u8; 2]) -> Vec<u32> {
    let soils = what[0] == b'd';
    let own = |text: &str| if soils { vec![(text.to_owned(), text.to_owned())] } else { Vec::new() };
    let input = Input::Command {
        args: own("secret").into_iter().map(|(arg, _)| arg).collect(),
        env: own("SECRET"),
        stdin: what.to_vec(),
    };
    let mut one = attempt(module, input, Limits::default());
    one.options.scratch = Some(Scratch { bytes: 1 << 20, ..Scratch::default() });
    let outcome = runtime.attempt(module.clone(), one, Arc::new(Control::new(0, 0))).await;
    assert_eq!(outcome.termination, Termination::Succeeded);
    outcome.output.chunks_exact(4).map(|n| u32::from_le_bytes(n.try_into().unwrap())).collect()
}

/// One attempt after the other in the same few slots.
async fn nothing_is_left(engine: wasmtime::Engine) {
    let runtime = Runtime::with(engine).unwrap();
    let modules: Vec<_> = (0..3).map(|tag| load(&runtime, &program(tag))).collect();
    // The eye: what an attempt did itself it sees, wherever it did it. Locals are its own in each call, always.
    let seen = run(&runtime, &modules[0], b"dl").await;
    for (place, count) in PLACES.iter().zip(&seen).filter(|(place, _)| !place.starts_with("locals")) {
        assert!(*count > 0, "nobody would see {place}: {seen:?}");
    }
    assert_eq!(seen.len(), PLACES.len());
    for round in 0..4 {
        for soiling in &modules {
            assert!(run(&runtime, soiling, b"d-").await.is_empty());
            // The same module, which finds its own slot again, and others that get one that is not theirs.
            for looking in &modules {
                let found = run(&runtime, looking, b"-l").await;
                let found: Vec<_> = PLACES.iter().zip(found).filter(|(_, count)| *count > 0).collect();
                assert!(found.is_empty(), "round {round}: {found:?}");
            }
        }
    }
}

#[tokio::test]
async fn nothing_of_an_attempt_is_left_where_the_kernel_tells_which_pages_it_touched() {
    let (engine, scans) = engine::running(1, 1).unwrap();
    if !scans {
        eprintln!(
            "SKIPPED: this kernel has no PAGEMAP_SCAN (Linux 6.7), so only the other way is tested here"
        );
        return;
    }
    nothing_is_left(engine).await;
}

#[tokio::test]
async fn nothing_of_an_attempt_is_left_where_the_kernel_does_not_tell() {
    nothing_is_left(engine::without_scan(1, 1).unwrap()).await;
}
