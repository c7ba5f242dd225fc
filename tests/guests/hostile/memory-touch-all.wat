;; Touches every page that it may have.
;; expect: succeeded
;; body: {"limits": {"memory_bytes": 655360}, "retry": {"max_attempts": 1}}
(module
  (memory (export "memory") 10)
  
  (func (export "_start") (local $at i32)
    (local.set $at (i32.const 0)) (loop $l (i32.store (local.get $at) (i32.const 1)) (local.set $at (i32.add (local.get $at) (i32.const 4096))) (br_if $l (i32.lt_u (local.get $at) (i32.const 655360))))))
