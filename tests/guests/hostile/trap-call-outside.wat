;; Traps: call outside.
;; expect: trap
;; body: {"retry": {"max_attempts": 1}}
(module
  (memory (export "memory") 1)
  (type $t (func)) (type $u (func (param i64))) (table 4 funcref) (elem (i32.const 1) $f) (func $f (param i64))
  (func (export "_start") 
    (call_indirect (type $t) (i32.const -1))))
