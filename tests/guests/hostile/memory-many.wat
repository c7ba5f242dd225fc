;; Spreads its growth over several memories.
;; expect: out-of-memory
;; body: {"limits": {"memory_bytes": 655360}, "retry": {"max_attempts": 1}}
(module
  (memory (export "memory") 1)
  (memory $b 1) (memory $c 1) (memory $d 1)
  (func (export "_start") 
    (loop $l (if (i32.eq (memory.grow $b (i32.const 1)) (i32.const -1)) (then unreachable)) (if (i32.eq (memory.grow $c (i32.const 1)) (i32.const -1)) (then unreachable)) (br $l))))
