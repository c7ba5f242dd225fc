;; Grows until it is refused and writes to where the growth would have been.
;; expect: out-of-memory
;; body: {"limits": {"memory_bytes": 655360}, "retry": {"max_attempts": 1}}
(module
  (memory (export "memory") 1)
  (func (export "_start") (local $at i32)
    (loop $l
      (local.set $at (i32.mul (memory.size) (i32.const 65536)))
      (br_if $l (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
    (i32.store (local.get $at) (i32.const 1))))
