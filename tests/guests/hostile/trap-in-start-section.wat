;; Traps before its entry point is called.
;; expect: trap
;; body: {"retry": {"max_attempts": 1}}
(module (func $s unreachable) (start $s) (func (export "_start")))
