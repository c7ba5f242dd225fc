;; Imports a call that WASI has not.
;; expect: 422 module-unknown-import
;; body: {"retry": {"max_attempts": 1}}
(module (import "wasi_snapshot_preview1" "fork" (func (result i32))) (func (export "_start")))
