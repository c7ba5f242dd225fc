;; Vectors whose results differ from machine to machine.
;; expect: 422 module-invalid
;; body: {"retry": {"max_attempts": 1}}
(module (func (export "_start") (drop (i32x4.relaxed_trunc_f32x4_s (v128.const i64x2 0 0)))))
