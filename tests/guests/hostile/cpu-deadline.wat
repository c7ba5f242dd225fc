;; Has fuel for longer than it has time.
;; expect: deadline
;; body: {"limits": {"timeout_ms": 200}, "retry": {"max_attempts": 1}}
(module
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (loop $l  (br $l))))
