;; Overflows its stack before its entry point is called.
;; expect: stack-overflow
;; body: {"retry": {"max_attempts": 1}}
(module (func $f (call $f) (call $f)) (start $f) (func (export "_start")))
