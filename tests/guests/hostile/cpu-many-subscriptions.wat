;; Waits for a thousand things at once.
;; expect: deadline,trap,succeeded,out-of-fuel,quota-exceeded
;; body: {"limits": {"timeout_ms": 500}, "retry": {"max_attempts": 1}}
(module
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll_oneoff (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (drop (call $poll_oneoff (i32.const 0) (i32.const 0) (i32.const 1000) (i32.const 60000)))))
