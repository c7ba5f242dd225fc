;; A call into the host: write vector outside.
;; expect: trap,exit-code
;; body: {"retry": {"max_attempts": 1}}
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (call $proc_exit (call $fd_write (i32.const 1) (i32.const -8) (i32.const 1) (i32.const 0)))))
