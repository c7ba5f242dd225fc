;; An entry point that wants something.
;; expect: 422 module-wrong-signature,422 module-no-usable-export
;; body: {"retry": {"max_attempts": 1}}
(module (func (export "_start") (param i32)))
