;; A call into the host: read outside.
;; expect: trap,exit-code,succeeded
;; body: {"retry": {"max_attempts": 1}}
(module
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (call $proc_exit (block (result i32) (i32.store (i32.const 0) (i32.const -100)) (i32.store (i32.const 4) (i32.const 1000)) (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 64))))))
