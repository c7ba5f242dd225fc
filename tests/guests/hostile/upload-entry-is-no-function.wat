;; An entry point that is a memory.
;; expect: 422 module-wrong-signature,422 module-no-usable-export
;; body: {"retry": {"max_attempts": 1}}
(module (memory (export "_start") 1))
