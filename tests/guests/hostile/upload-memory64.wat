;; 64-bit memory.
;; expect: 422 module-invalid
;; body: {"retry": {"max_attempts": 1}}
(module (memory i64 1) (func (export "_start")))
