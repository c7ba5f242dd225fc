;; Begins with more than it may have.
;; expect: out-of-memory
;; body: {"limits": {"memory_bytes": 655360}, "retry": {"max_attempts": 1}}
(module
  (memory (export "memory") 20)
  
  (func (export "_start") 
    ))
