;; Imports a call with another type.
;; expect: 422 module-wrong-signature
;; body: {"retry": {"max_attempts": 1}}
(module (import "wasi_snapshot_preview1" "proc_exit" (func (param i64))) (func (export "_start")))
