;; More memories than an attempt may have.
;; expect: 422 module-over-limit
;; body: {"retry": {"max_attempts": 1}}
(module (memory 1) (memory 1) (memory 1) (memory 1) (memory 1) (memory 1) (memory 1) (memory 1) (memory 1) (func (export "_start")))
