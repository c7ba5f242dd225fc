;; Runs for ever: conversions.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (loop $l (drop (i32.trunc_sat_f64_s (f64.const 1e300))) (br $l))))
