//! Small guests in WebAssembly text: preview 1 commands.

/// Spins for ever.
pub const SPIN: &str = r#"(module (func (export "_start") (loop $l (br $l))))"#;
/// Ends at once.
pub const QUICK: &str = r#"(module (func (export "_start")))"#;

/// Sleeps so many milliseconds.
pub fn nap(ms: u64) -> String {
    format!(
        r#"(module
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (i32.store (i32.const 16) (i32.const 1))
    (i64.store (i32.const 24) (i64.const {}))
    (drop (call $poll (i32.const 0) (i32.const 128) (i32.const 1) (i32.const 512)))))"#,
        ms * 1_000_000
    )
}
