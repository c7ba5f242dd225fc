;; A call into the host: renumber.
;; expect: exit-code,trap
;; body: {"retry": {"max_attempts": 1}}
(module
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (import "wasi_snapshot_preview1" "fd_renumber" (func $fd_renumber (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (call $proc_exit (call $fd_renumber (i32.const 1) (i32.const 1000000)))))
