;; Runs for ever: globals.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (memory (export "memory") 1)
  (global $g (mut i64) (i64.const 3))
  (func (export "_start") 
    (loop $l (global.set $g (i64.mul (global.get $g) (i64.const 3))) (br $l))))
