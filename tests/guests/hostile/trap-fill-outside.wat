;; Traps: fill outside.
;; expect: trap
;; body: {"retry": {"max_attempts": 1}}
(module
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (memory.fill (i32.const 65535) (i32.const 0) (i32.const 2))))
