;; A table larger than the pool's.
;; expect: 422 module-over-limit
;; body: {"retry": {"max_attempts": 1}}
(module (table 65537 funcref) (func (export "_start")))
