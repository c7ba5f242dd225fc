;; A call into the host: sockets.
;; expect: exit-code,trap
;; body: {"retry": {"max_attempts": 1}}
(module
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (import "wasi_snapshot_preview1" "sock_recv" (func $sock_recv (param i32 i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (call $proc_exit (call $sock_recv (i32.const 3) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 64) (i32.const 64)))))
