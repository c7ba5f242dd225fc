;; A file of four exabytes.
;; expect: exit-code
;; body: {"scratch_bytes": 1048576, "retry": {"max_attempts": 1}, "limits": {"fuel": 100000000}}
(module
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (import "wasi_snapshot_preview1" "path_open" (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_filestat_set_size" (func $fd_filestat_set_size (param i32 i64) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 1024) "f") (data (i32.const 1032) "../../etc/passwd") (data (i32.const 1056) "/etc/passwd") (data (i32.const 1072) "d") (func $must (param i32) (if (local.get 0) (then (call $proc_exit (local.get 0))))) (func $open (param $p i32) (param $n i32) (param $o i32) (result i32) (call $must (call $path_open (i32.const 3) (i32.const 1) (local.get $p) (local.get $n) (local.get $o) (i64.const 66) (i64.const 0) (i32.const 0) (i32.const 512))) (i32.load (i32.const 512)))
  (func (export "_start") (local $fd i32) (local $i i32)
    (local.set $fd (call $open (i32.const 1024) (i32.const 1) (i32.const 1))) (call $must (call $fd_filestat_set_size (local.get $fd) (i64.const 0x4000000000000000)))))
