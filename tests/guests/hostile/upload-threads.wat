;; Shared memory.
;; expect: 422 module-invalid
;; body: {"retry": {"max_attempts": 1}}
(module (memory 1 1 shared) (func (export "_start")))
