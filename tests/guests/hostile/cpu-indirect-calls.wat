;; Runs for ever: indirect calls.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (memory (export "memory") 1)
  (type $t (func)) (table 1 funcref) (elem (i32.const 0) $f) (func $f)
  (func (export "_start") 
    (loop $l (call_indirect (type $t) (i32.const 0)) (br $l))))
