;; Imports what is not there.
;; expect: 422 module-unknown-import
;; body: {"retry": {"max_attempts": 1}}
(module (import "env" "system" (func (param i32))) (func (export "_start")))
