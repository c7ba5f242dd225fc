;; Grows a table until it is refused and calls what is not in it.
;; expect: out-of-memory
;; body: {"limits": {"memory_bytes": 262144}, "retry": {"max_attempts": 1}}
(module
  (table $t 1 funcref)
  (type $f (func))
  (func (export "_start")
    (loop $l (br_if $l (i32.ne (table.grow $t (ref.null func) (i32.const 100)) (i32.const -1))))
    (call_indirect $t (type $f) (i32.const 5))))
