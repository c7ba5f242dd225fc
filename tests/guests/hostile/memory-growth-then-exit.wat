;; Grows until it is refused and leaves by a code of its own: its own word stands.
;; expect: exit-code
;; body: {"limits": {"memory_bytes": 655360}, "retry": {"max_attempts": 1}}
(module
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (loop $l (br_if $l (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
    (call $exit (i32.const 12))))
