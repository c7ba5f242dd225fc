;; Runs for ever: float square roots.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (loop $l (drop (f64.sqrt (f64.const 2))) (br $l))))
