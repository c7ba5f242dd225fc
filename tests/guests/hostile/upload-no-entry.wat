;; Has no entry point.
;; expect: 422 module-no-usable-export
;; body: {"retry": {"max_attempts": 1}}
(module (func (export "main")))
