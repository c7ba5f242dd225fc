;; Traps: copy outside.
;; expect: trap
;; body: {"retry": {"max_attempts": 1}}
(module
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (memory.copy (i32.const 0) (i32.const 1) (i32.const -1))))
