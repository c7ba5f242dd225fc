//! The guests of benches, in WebAssembly text.

/// A WASI preview 1 command with so many pages of memory.
pub fn command(items: &str, pages: u32, body: &str) -> String {
    format!(
        r#"(module
  (import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_close" (func $close (param i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") {pages})
  (func $must (param $errno i32) (if (local.get $errno) (then unreachable)))
  {items}
  (func (export "_start") (local $i i32) (local $n i32) (local $x i64) (local $f f64) {body}))"#
    )
}

/// Multiplications that depend on each other; their result is stored, so that no compiler leaves them out.
pub fn burn(iterations: u32) -> String {
    command(
        "",
        1,
        &format!(
            "(local.set $i (i32.const {}))
             (loop $l
               (local.set $x (i64.add (i64.const 1442695040888963407)
                 (i64.mul (local.get $x) (i64.const 6364136223846793005))))
               (br_if $l (local.tee $i (i32.sub (local.get $i) (i32.const 1)))))
             (i64.store (i32.const 0) (local.get $x))",
            iterations.max(1)
        ),
    )
}

/// Ten lines of 100 bytes at a time, more than the limit of the log in all.
pub fn log_flood() -> String {
    let lines = format!("{}\\n", "x".repeat(99)).repeat(10);
    command(
        &format!(r#"(data (i32.const 64) "{lines}")"#),
        1,
        "(i32.store (i32.const 0) (i32.const 64))
         (i32.store (i32.const 4) (i32.const 1000))
         (local.set $i (i32.const 400))
         (loop $l
           (call $must (call $write (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 16)))
           (br_if $l (local.tee $i (i32.sub (local.get $i) (i32.const 1)))))",
    )
}

/// Grows by a MiB and fills it, until the limit.
pub fn memory_flood() -> String {
    command(
        "",
        1,
        "(block $full (loop $l
           (local.set $n (memory.grow (i32.const 16)))
           (br_if $full (i32.eq (local.get $n) (i32.const -1)))
           (memory.fill (i32.shl (local.get $n) (i32.const 16)) (i32.const 165) (i32.const 1048576))
           (br $l)))",
    )
}

/// 2,000 files of 8 KiB; the three letters of a name are the number.
pub fn file_flood() -> String {
    command(
        r#"(data (i32.const 1024) "fxxx")
           (func $letter (param $at i32) (param $n i32)
             (i32.store8 (local.get $at) (i32.add (i32.const 97) (i32.and (local.get $n) (i32.const 15)))))"#,
        1,
        "(i32.store (i32.const 0) (i32.const 4096))
         (i32.store (i32.const 4) (i32.const 8192))
         (local.set $i (i32.const 2000))
         (loop $l
           (call $letter (i32.const 1025) (local.get $i))
           (call $letter (i32.const 1026) (i32.shr_u (local.get $i) (i32.const 4)))
           (call $letter (i32.const 1027) (i32.shr_u (local.get $i) (i32.const 8)))
           (call $must (call $open (i32.const 3) (i32.const 1) (i32.const 1024) (i32.const 4)
             (i32.const 1) (i64.const 66) (i64.const 0) (i32.const 0) (i32.const 512)))
           (call $must (call $write (i32.load (i32.const 512)) (i32.const 0) (i32.const 1) (i32.const 16)))
           (call $must (call $close (i32.load (i32.const 512))))
           (br_if $l (local.tee $i (i32.sub (local.get $i) (i32.const 1)))))",
    )
}

/// Opens a file again and again and closes nothing, until the host refuses with "too many open files"; any other answer is
/// a trap.
pub fn descriptor_flood() -> String {
    command(
        r#"(data (i32.const 1024) "f")"#,
        1,
        "(loop $l
           (local.set $n (call $open (i32.const 3) (i32.const 1) (i32.const 1024) (i32.const 1)
             (i32.const 1) (i64.const 66) (i64.const 0) (i32.const 0) (i32.const 512)))
           (br_if $l (i32.eqz (local.get $n))))
         (if (i32.ne (local.get $n) (i32.const 33)) (then unreachable))",
    )
}

/// A valid command that keeps the compiler busy: so many large functions of branches over many locals.
pub fn slow_to_compile(functions: u32) -> String {
    const LOCALS: u32 = 200;
    const BRANCHES: u32 = 600;
    let function = |f: u32| {
        let branches = (0..BRANCHES).map(|i| {
            let (a, b, c) = (1 + i % LOCALS, 1 + (i * 7 + f) % LOCALS, 1 + (i * 13) % LOCALS);
            format!(
                "(if (local.get 0)
                   (then (local.set {a}
                     (i64.add (local.get {b}) (i64.load (i32.wrap_i64 (local.get {c}))))))
                   (else (local.set {b} (i64.mul (local.get {a}) (local.get {c})))))"
            )
        });
        let locals = "(local i64)".repeat(LOCALS as usize);
        format!("(func (param i32) (result i64) {locals} {} (local.get 1))", branches.collect::<String>())
    };
    command(&(0..functions).map(function).collect::<String>(), 1, "")
}

/// One subscription to the monotonic clock.
pub fn sleep_for(seconds: u64) -> String {
    format!(
        "(i32.store (i32.const 80) (i32.const 1))
         (i64.store (i32.const 88) (i64.const {}))
         (call $must (call $poll (i32.const 64) (i32.const 128) (i32.const 1) (i32.const 192)))",
        seconds * 1_000_000_000
    )
}

/// A guest that does much between two places where it can be preempted.
pub struct Adversary {
    pub name: &'static str,
    pub wat: String,
    pub memory_bytes: u64,
}

/// Guests can be preempted at the heads of loops and at calls of their own functions only. So each kind comes
/// as a plain loop, and as a loop with much in a row: as much as compiles within a few seconds.
pub fn adversaries() -> Vec<Adversary> {
    const MIB: u64 = 1 << 20;
    let row = |step: &str, count: usize| format!("(loop $l {} (br $l))", step.repeat(count));
    let guest = |name, pages, body: &str, memory_bytes| Adversary {
        name,
        wat: command("", pages, body),
        memory_bytes,
    };
    // 2^19 lines of 64 bytes in one cycle, in an order that no prefetcher follows.
    let cycle = "(loop $l
        (i32.store (i32.shl (local.get $i) (i32.const 6))
          (i32.shl (i32.and (i32.const 524287)
            (i32.add (i32.const 12345) (i32.mul (local.get $i) (i32.const 1103515245)))) (i32.const 6)))
        (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 524288))))";
    let chase = |count| {
        let steps = format!(
            "{} (i32.store (i32.const 33554432) (local.get $n))",
            "(local.set $n (i32.load (local.get $n)))".repeat(count)
        );
        format!("{cycle} {}", row(&steps, 1))
    };
    let sqrt = |count: usize| {
        let steps = format!(
            "local.get $f {} local.set $f (f64.store (i32.const 0) (local.get $f))",
            "f64.sqrt ".repeat(count)
        );
        format!("(local.set $f (f64.const 2)) {}", row(&steps, 1))
    };
    let grow = "(drop (memory.grow (i32.const 1)))";
    let clock = "(drop (call $clock (i32.const 1) (i64.const 1) (i32.const 16)))";
    let fill = |mib: u32| format!("(memory.fill (i32.const 0) (i32.const 165) (i32.const {}))", mib << 20);
    vec![
        guest("a plain loop", 1, &row("", 1), MIB),
        guest("cache misses over 32 MiB", 513, &chase(1), 64 * MIB),
        guest("cache misses, 20,000 in a row", 513, &chase(20_000), 64 * MIB),
        guest("denied memory.grow", 1, &row(grow, 1), 64 << 10),
        guest("denied memory.grow, 5,000 in a row", 1, &row(grow, 5_000), 64 << 10),
        guest("f64.sqrt", 1, &sqrt(1), MIB),
        guest("f64.sqrt, 100,000 in a row", 1, &sqrt(100_000), MIB),
        guest("clock calls", 1, &row(clock, 1), MIB),
        guest("clock calls, 20,000 in a row", 1, &row(clock, 20_000), MIB),
        guest("memory.fill of 256 MiB", 4_096, &row(&fill(256), 1), 256 * MIB),
        // Ends and begins anew: its memory is cleared away on the guest thread.
        guest("fill 64 MiB once and end", 1_024, &fill(64), 64 * MIB),
    ]
}
