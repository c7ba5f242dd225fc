;; Runs for ever: table fill.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (memory (export "memory") 1)
  (table 1000 funcref)
  (func (export "_start") 
    (loop $l (table.fill (i32.const 0) (ref.null func) (i32.const 1000)) (br $l))))
