;; Exceptions.
;; expect: 422 module-invalid
;; body: {"retry": {"max_attempts": 1}}
(module (tag $t) (func (export "_start") (throw $t)))
