;; Runs for ever: denied table growth.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (memory (export "memory") 1)
  (table 1 funcref)
  (func (export "_start") 
    (loop $l (drop (table.grow (ref.null func) (i32.const -1))) (br $l))))
