;; Grows tables instead of memories.
;; expect: out-of-memory
;; body: {"limits": {"memory_bytes": 655360}, "retry": {"max_attempts": 1}}
(module
  (memory (export "memory") 1)
  (table $t 1 funcref) (table $u 1 funcref)
  (func (export "_start") 
    (loop $l (if (i32.eq (table.grow $t (ref.null func) (i32.const 5000)) (i32.const -1)) (then unreachable)) (if (i32.eq (table.grow $u (ref.null func) (i32.const 5000)) (i32.const -1)) (then unreachable)) (br $l))))
