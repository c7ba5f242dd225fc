;; Waits for ever on its input and a clock that never comes.
;; expect: deadline,succeeded
;; body: {"limits": {"timeout_ms": 200}, "retry": {"max_attempts": 1}}
(module
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    ;; Two clocks, both a century ahead.
    (i64.store (i32.const 24) (i64.const 3000000000000000000)) (i32.store (i32.const 16) (i32.const 1))
    (i64.store (i32.const 72) (i64.const 3000000000000000000)) (i32.store (i32.const 64) (i32.const 1))
    (drop (call $poll (i32.const 0) (i32.const 128) (i32.const 2) (i32.const 512)))))
