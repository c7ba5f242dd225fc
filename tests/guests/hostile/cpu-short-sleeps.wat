;; Sleeps for a microsecond at a time, for ever.
;; expect: deadline,out-of-fuel
;; body: {"limits": {"timeout_ms": 300}, "retry": {"max_attempts": 1}}
(module
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (i64.store (i32.const 24) (i64.const 1000)) (i32.store (i32.const 16) (i32.const 1))
    (loop $l (drop (call $poll (i32.const 0) (i32.const 128) (i32.const 1) (i32.const 512))) (br $l))))
