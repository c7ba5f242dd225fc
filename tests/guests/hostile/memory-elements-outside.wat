;; An element segment outside of its table.
;; expect: trap
(module
  (memory (export "memory") 1)
  (table 1 funcref) (elem (i32.const 5) $f) (func $f)
  (func (export "_start") 
    ))
