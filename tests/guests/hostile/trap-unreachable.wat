;; Traps: unreachable.
;; expect: trap
;; body: {"retry": {"max_attempts": 1}}
(module
  (memory (export "memory") 1)
  
  (func (export "_start") 
    unreachable))
