;; Runs for ever: vectors.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (loop $l (drop (i8x16.add (v128.const i64x2 1 2) (v128.const i64x2 3 4))) (br $l))))
