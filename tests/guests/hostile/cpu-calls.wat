;; Runs for ever: calls.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (memory (export "memory") 1)
  (func $f)
  (func (export "_start") 
    (loop $l (call $f) (br $l))))
