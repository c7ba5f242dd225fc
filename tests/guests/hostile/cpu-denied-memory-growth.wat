;; Runs for ever: denied memory growth.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (memory (export "memory") 1)
  
  (func (export "_start") 
    (loop $l (drop (memory.grow (i32.const 60000))) (br $l))))
