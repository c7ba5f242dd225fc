;; More tables than an attempt may have.
;; expect: 422 module-over-limit
;; body: {"retry": {"max_attempts": 1}}
(module (table 1 funcref) (table 1 funcref) (table 1 funcref) (table 1 funcref) (table 1 funcref) (table 1 funcref) (table 1 funcref) (table 1 funcref) (table 1 funcref) (func (export "_start")))
