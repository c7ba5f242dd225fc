;; Calls itself for ever.
;; expect: stack-overflow
;; body: {"retry": {"max_attempts": 1}}
(module
  (memory (export "memory") 1)
  (func $f (call $f) (call $f))
  (func (export "_start") 
    (call $f)))
