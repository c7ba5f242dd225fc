;; Runs for ever: table copy.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (memory (export "memory") 1)
  (table 1000 funcref)
  (func (export "_start") 
    (loop $l (table.copy (i32.const 0) (i32.const 1) (i32.const 900)) (br $l))))
