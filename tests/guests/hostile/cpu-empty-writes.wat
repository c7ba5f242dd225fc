;; Runs for ever: empty writes.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (loop $l (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 64))) (br $l))))
