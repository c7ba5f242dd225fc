;; A call into the host: environment outside.
;; expect: trap,exit-code,succeeded
;; body: {"retry": {"max_attempts": 1}}
(module
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $environ_get (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (call $proc_exit (call $environ_get (i32.const -4) (i32.const -4)))))
