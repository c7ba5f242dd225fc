;; Runs for ever: cache misses.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module
  (memory (export "memory") 1)
  (global $at (mut i32) (i32.const 0))
  (func (export "_start") 
    (loop $l (global.set $at (i32.and (i32.add (global.get $at) (i32.const 4099)) (i32.const 65532))) (drop (i32.load (global.get $at))) (br $l))))
