;; Traps: vector load outside.
;; expect: trap
;; body: {"retry": {"max_attempts": 1}}
(module
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (drop (v128.load (i32.const 65521)))))
