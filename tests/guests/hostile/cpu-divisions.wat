;; Runs for ever: divisions.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (loop $l (drop (i64.rem_u (i64.const -1) (i64.const 7))) (br $l))))
