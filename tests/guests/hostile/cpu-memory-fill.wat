;; Runs for ever: memory fill.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (loop $l (memory.fill (i32.const 0) (i32.const 1) (i32.const 65536)) (br $l))))
