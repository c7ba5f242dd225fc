;; Grows until it is refused and gives up.
;; expect: out-of-memory
;; body: {"limits": {"memory_bytes": 655360}, "retry": {"max_attempts": 1}}
(module
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (loop $l (if (i32.eq (memory.grow (i32.const 1)) (i32.const -1)) (then unreachable)) (br $l))))
