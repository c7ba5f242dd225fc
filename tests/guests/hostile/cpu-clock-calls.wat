;; Runs for ever: clock calls.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (import "wasi_snapshot_preview1" "clock_time_get" (func $clock_time_get (param i32 i64 i32) (result i32)))
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (loop $l (drop (call $clock_time_get (i32.const 0) (i64.const 0) (i32.const 64))) (br $l))))
