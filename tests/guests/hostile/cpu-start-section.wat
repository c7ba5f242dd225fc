;; Runs for ever before its entry point is called.
;; expect: out-of-fuel
;; body: {"limits": {"fuel": 20000000}}
(module (func $s (loop $l (br $l))) (start $s) (func (export "_start")))
