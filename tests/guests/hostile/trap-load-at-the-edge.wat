;; Traps: load at the edge.
;; expect: trap
;; body: {"retry": {"max_attempts": 1}}
(module
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (drop (i64.load offset=0xfffffff8 (i32.const -1)))))
