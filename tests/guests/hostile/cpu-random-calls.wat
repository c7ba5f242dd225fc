;; Runs for ever: random calls.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (import "wasi_snapshot_preview1" "random_get" (func $random_get (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (loop $l (drop (call $random_get (i32.const 64) (i32.const 8))) (br $l))))
