;; Logs what is no text.
;; expect: trap
;; body: {"input": null, "retry": {"max_attempts": 1}}
(component
  (import "sandbar:task/types@0.1.0" (instance $types
    (type $kind' (enum "retryable" "fatal"))
    (export "failure-kind" (type $kind (eq $kind')))
    (type $failure' (record (field "kind" $kind) (field "message" string) (field "retry-after-ms" (option u64))))
    (export "failure" (type (eq $failure')))
    (type $output' (record (field "content-type" string) (field "bytes" (list u8))))
    (export "output" (type (eq $output')))))
  (alias export $types "failure" (type $failure))
  (alias export $types "output" (type $output))
  (import "sandbar:task/context@0.1.0" (instance $context
    (export "cancelled" (func (result bool)))
    (export "progress" (func (param "done" u64) (param "total" u64) (param "message" string)))))
  (import "sandbar:task/log@0.1.0" (instance $log
    (type $level' (enum "trace" "debug" "info" "warn" "error"))
    (export "level" (type $level (eq $level')))
    (export "emit" (func (param "level" $level) (param "target" string) (param "message" string)
      (param "fields" (list (tuple string string)))))))
  (core module $libc
    (memory (export "memory") 2)
    (global $next (mut i32) (i32.const 4096))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $next) (i32.const 15)) (i32.const -16)))
      (global.set $next (i32.add (local.get $at) (local.get 3)))
      (if (i32.gt_u (global.get $next) (i32.mul (memory.size) (i32.const 65536)))
        (then (drop (memory.grow (i32.const 64)))))
      (local.get $at)))
  (core instance $libc (instantiate $libc))
  (core func $cancelled (canon lower (func $context "cancelled")))
  (core func $progress (canon lower (func $context "progress") (memory $libc "memory")))
  (core func $emit (canon lower (func $log "emit") (memory $libc "memory")))
  (core module $main
    (import "libc" "memory" (memory 2))
    (import "host" "cancelled" (func $cancelled (result i32)))
    (import "host" "progress" (func $progress (param i64 i64 i32 i32)))
    (import "host" "emit" (func $emit (param i32 i32 i32 i32 i32 i32 i32)))
    (data (i32.const 64) "text/plain") (data (i32.const 112) "\ff\fe\c3\28")
    (data (i32.const 96) "no luck")
    ;; result: ok = 0, content-type, bytes
    (func $ok (param $ptr i32) (param $len i32) (result i32)
      (i32.store8 (i32.const 256) (i32.const 0))
      (i32.store (i32.const 264) (i32.const 64))
      (i32.store (i32.const 268) (i32.const 10))
      (i32.store (i32.const 272) (local.get $ptr))
      (i32.store (i32.const 276) (local.get $len))
      (i32.const 256))
    ;; result: err = 1, kind, message, retry-after none
    (func $err (param $kind i32) (result i32)
      (i32.store8 (i32.const 256) (i32.const 1))
      (i32.store8 (i32.const 264) (local.get $kind))
      (i32.store (i32.const 268) (i32.const 96))
      (i32.store (i32.const 272) (i32.const 7))
      (i32.store8 (i32.const 280) (i32.const 0))
      (i32.const 256))
    (func (export "run") (param $ptr i32) (param $len i32) (result i32)
      (call $emit (i32.const 2) (i32.const 64) (i32.const 4) (i32.const 112) (i32.const 4) (i32.const 0) (i32.const 0))(call $ok (i32.const 0) (i32.const 4))))
  (core instance $main (instantiate $main
    (with "libc" (instance $libc))
    (with "host" (instance
      (export "cancelled" (func $cancelled))
      (export "progress" (func $progress))
      (export "emit" (func $emit))))))
  (func (export "run") (param "input" (list u8)) (result (result $output (error $failure)))
    (canon lift (core func $main "run") (memory $libc "memory") (realloc (func $libc "realloc")))))
