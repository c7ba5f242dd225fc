;; A call into the host: poll outside.
;; expect: trap,exit-code,quota-exceeded
;; body: {"retry": {"max_attempts": 1}}
(module
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll_oneoff (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (call $proc_exit (call $poll_oneoff (i32.const -1) (i32.const -1) (i32.const -1) (i32.const -1)))))
