;; Runs for ever: argument calls.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes_get (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (loop $l (drop (call $args_sizes_get (i32.const 0) (i32.const 4))) (br $l))))
