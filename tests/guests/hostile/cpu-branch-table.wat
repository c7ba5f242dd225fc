;; Runs for ever: branch table.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (loop $l (block $a (block $b (br_table $a $b (i32.const 1)))) (br $l))))
