;; Uses a segment that it has dropped.
;; expect: trap
;; body: {"retry": {"max_attempts": 1}}
(module
  (memory (export "memory") 1)
  (data $d "abc")
  (func (export "_start") 
    (data.drop $d) (memory.init $d (i32.const 0) (i32.const 0) (i32.const 3))))
