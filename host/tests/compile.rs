//! The compile child and the cache in front of it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::{QUICK, compiler, program, script};
use sandbar_host::artifact::{ArtifactCache, ArtifactKey};
use sandbar_host::compile::{CompileError, CompileLimits, compile};
use sandbar_host::inspect::{Rejection, RejectionCode};
use sandbar_host::{ArtifactError, Compiler, ModuleHash};

/// A valid module that keeps the compiler busy for many seconds: large functions of nested loops
/// over many locals.
fn expensive() -> Bytes {
    let mut wat = String::from("(module (memory 1) (func (export \"_start\"))");
    for f in 0..60 {
        write!(wat, "(func (param i32) (result i64)").unwrap();
        for _ in 0..200 {
            wat.push_str("(local i64)");
        }
        for i in 0..3_000 {
            let (a, b, c) = (1 + i % 200, 1 + (i * 7 + f) % 200, 1 + (i * 13) % 200);
            write!(
                wat,
                "(if (local.get 0) (then (local.set {a} (i64.add (local.get {b}) (i64.load (i32.wrap_i64 (local.get {c}))))))
                  (else (local.set {b} (i64.mul (local.get {a}) (local.get {c})))))"
            )
            .unwrap();
        }
        wat.push_str("(local.get 1))");
    }
    wat.push(')');
    Bytes::from(wat::parse_str(&wat).unwrap())
}

async fn rejection(bytes: Bytes, limits: CompileLimits) -> Rejection {
    match compile(&program(), bytes, &limits).await {
        Err(CompileError::Rejected(rejection)) => rejection,
        Err(CompileError::Host(err)) => panic!("host error: {err}"),
        Ok(code) => panic!("{} bytes of code", code.len()),
    }
}

#[tokio::test]
async fn a_valid_module_becomes_code() {
    let wasm = Bytes::from(wat::parse_str(QUICK).unwrap());
    let code = compile(&program(), wasm, &CompileLimits::default()).await.unwrap();
    assert!(!code.is_empty());
}

#[tokio::test]
async fn the_child_rejects_what_inspect_rejects() {
    let rejection = rejection(Bytes::from_static(b"(module)"), CompileLimits::default()).await;
    assert_eq!(rejection.code, RejectionCode::TextFormat);
}

#[tokio::test]
async fn an_import_of_the_wrong_type_is_rejected_at_upload() {
    let wasm = wat::parse_str(
        r#"(module (import "wasi_snapshot_preview1" "fd_write" (func (param i64))) (func (export "_start")))"#,
    )
    .unwrap();
    let rejection = rejection(Bytes::from(wasm), CompileLimits::default()).await;
    assert_eq!(rejection.code, RejectionCode::WrongSignature, "{rejection}");
}

#[tokio::test]
async fn a_function_newer_than_this_host_is_an_unknown_import() {
    let wasm = wat::parse_str(
        r#"(component
            (import "wasi:cli/exit@0.2.0" (instance (export "levitate" (func))))
            (core module $m (func (export "run") (result i32) i32.const 0))
            (core instance $i (instantiate $m))
            (func $run (result (result)) (canon lift (core func $i "run")))
            (instance $e (export "run" (func $run)))
            (export "wasi:cli/run@0.2.3" (instance $e)))"#,
    )
    .unwrap();
    let rejection = rejection(Bytes::from(wasm), CompileLimits::default()).await;
    assert_eq!(rejection.code, RejectionCode::UnknownImport, "{rejection}");
    assert!(rejection.detail.contains("wasi:cli/exit"), "{rejection}");
}

#[tokio::test]
async fn a_compilation_that_got_no_time_says_nothing_about_the_module() {
    let dir = tempfile::tempdir().unwrap();
    let limits = CompileLimits { wall: Duration::from_secs(1), ..CompileLimits::default() };
    let bytes = Bytes::from_static(b"\0asm\x01\0\0\0");
    // Programs that take the module and never answer.
    let waits = script(&dir.path().join("waits"), "exec sleep 30");
    match compile(&waits, bytes.clone(), &limits).await {
        Err(CompileError::Host(error)) => assert!(error.to_string().contains("too busy"), "{error}"),
        other => panic!("{other:?}"),
    }
    // One that did get it. On a busy machine it may take several tries until it has.
    let spins = script(&dir.path().join("spins"), "while :; do :; done");
    for _ in 0..20 {
        match compile(&spins, bytes.clone(), &limits).await {
            Err(CompileError::Rejected(rejection)) => {
                assert_eq!(rejection.code, RejectionCode::CompileTimeout);
                return;
            }
            Err(CompileError::Host(error)) => assert!(error.to_string().contains("too busy"), "{error}"),
            Ok(_) => panic!("a shell compiles nothing"),
        }
    }
    panic!("it never got a quarter of a second of CPU in a second");
}

#[tokio::test]
async fn too_long_too_much_cpu_and_too_much_memory_are_rejections() {
    let bytes = expensive();
    let wall =
        rejection(bytes.clone(), CompileLimits { wall: Duration::from_secs(1), ..CompileLimits::default() })
            .await;
    assert_eq!(wall.code, RejectionCode::CompileTimeout, "{wall}");
    let cpu = rejection(bytes.clone(), CompileLimits { cpu_seconds: 1, ..CompileLimits::default() }).await;
    assert_eq!(cpu.code, RejectionCode::CompileTimeout, "{cpu}");
    assert!(cpu.detail.contains("CPU"), "{cpu}");
}

#[tokio::test]
async fn a_module_that_needs_more_memory_than_allowed_is_rejected() {
    // 40 MB of data segment: copied several times on the way.
    let mut wat = String::from("(module (memory 1000) (func (export \"_start\")) (data (i32.const 0) \"");
    wat.push_str(&"x".repeat(40 << 20));
    wat.push_str("\"))");
    let wasm = Bytes::from(wat::parse_str(&wat).unwrap());
    let rejection =
        rejection(wasm, CompileLimits { address_space_bytes: 256 << 20, ..CompileLimits::default() }).await;
    assert_eq!(rejection.code, RejectionCode::CompileMemory, "{rejection}");
}

#[tokio::test]
async fn code_beyond_its_limit_is_rejected() {
    let wasm = Bytes::from(wat::parse_str(QUICK).unwrap());
    let rejection =
        rejection(wasm, CompileLimits { max_artifact_bytes: 100, ..CompileLimits::default() }).await;
    assert_eq!(rejection.code, RejectionCode::OverLimit);
}

#[tokio::test]
async fn a_program_that_is_no_compiler_is_a_host_error_or_a_rejection_but_never_code() {
    let wasm = Bytes::from(wat::parse_str(QUICK).unwrap());
    let missing =
        compile(std::path::Path::new("/nonexistent/program"), wasm, &CompileLimits::default()).await;
    assert!(matches!(missing, Err(CompileError::Host(_))));
}

#[tokio::test]
async fn a_module_that_kills_the_compiler_is_rejected_and_is_no_fault_of_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let wasm = Bytes::from(wat::parse_str(QUICK).unwrap());
    let hash = ModuleHash::of(&wasm);
    // How a compiler may end that has read the module, and what is said of the module then. The verdicts that come
    // before are of one that compiled (1) so many bytes.
    let ends = [
        ("abort", "kill -ABRT $$", RejectionCode::DoesNotCompile, "died of signal 6"),
        ("overflow", "kill -SEGV $$", RejectionCode::DoesNotCompile, "died of signal 11"),
        ("panic", "exit 101", RejectionCode::DoesNotCompile, "the compiler failed"),
        ("silence", "exit 0", RejectionCode::DoesNotCompile, "the compiler failed"),
        ("oom-killer", "kill -KILL $$", RejectionCode::CompileMemory, "bytes of memory"),
        (
            "allocator",
            "echo memory allocation of 9 bytes failed >&2; kill -ABRT $$",
            RejectionCode::CompileMemory,
            "bytes of memory",
        ),
        ("cpu-limit", "kill -XCPU $$", RejectionCode::CompileTimeout, "s of CPU"),
        (
            "half-a-verdict",
            r"printf '\001\004\000\000\000\000\000\000\000co'; kill -ABRT $$",
            RejectionCode::DoesNotCompile,
            "died of signal 6",
        ),
        (
            "death-after-the-verdict",
            r"printf '\001\004\000\000\000\000\000\000\000code'; kill -SEGV $$",
            RejectionCode::DoesNotCompile,
            "died of signal 11",
        ),
        (
            "a-rejection-that-is-none",
            r"printf '\002\004\000\000\000\000\000\000\000code'; exit 1",
            RejectionCode::DoesNotCompile,
            "the compiler failed",
        ),
    ];
    for (name, end, code, words) in ends {
        let dies = script(&dir.path().join(name), &format!("ulimit -c 0; cat >/dev/null; {end}"));
        match compile(&dies, wasm.clone(), &CompileLimits::default()).await {
            Err(CompileError::Rejected(rejection)) => {
                assert_eq!(rejection.code, code, "{name}: {rejection}");
                assert!(rejection.detail.contains(words), "{name}: {rejection}");
            }
            other => panic!("{name}: {other:?}"),
        }
        // The same to whoever has an upload compiled; and no code is kept of it.
        let cache =
            ArtifactCache::open(dir.path().join("code"), ArtifactKey::random().unwrap(), 1 << 30).unwrap();
        let cache = Arc::new(cache);
        let compiler = Compiler::new(dies, CompileLimits::default(), cache.clone(), 1);
        match compiler.artifact(1, &hash, || async { Ok::<_, ()>(wasm.clone()) }).await {
            Err(ArtifactError::Rejected(rejection)) => assert_eq!(rejection.code, code, "{name}"),
            other => panic!("{name}: {other:?}"),
        }
        assert_eq!(cache.size().unwrap(), 0, "{name}");
    }
    // The control: a program that says it has compiled, and ends well, is believed.
    let lives = script(
        &dir.path().join("lives"),
        r"cat >/dev/null; printf '\001\004\000\000\000\000\000\000\000code'",
    );
    assert_eq!(compile(&lives, wasm, &CompileLimits::default()).await.unwrap(), b"code");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_at_the_same_time_share_one_compilation_and_later_ones_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let compiler = Arc::new(compiler(&dir, CompileLimits::default()));
    let wasm = Bytes::from(wat::parse_str(QUICK).unwrap());
    let hash = ModuleHash::of(&wasm);
    let fetched = Arc::new(AtomicU32::new(0));
    let callers: Vec<_> = (0..8)
        .map(|_| {
            let (compiler, wasm, fetched) = (compiler.clone(), wasm.clone(), fetched.clone());
            tokio::spawn(async move {
                compiler
                    .artifact(1, &hash, || async {
                        fetched.fetch_add(1, Ordering::SeqCst);
                        Ok::<_, ()>(wasm)
                    })
                    .await
                    .map(|artifact| artifact.bytes)
                    .unwrap()
            })
        })
        .collect();
    let mut codes = Vec::new();
    for caller in callers {
        codes.push(caller.await.unwrap());
    }
    assert!(codes.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(fetched.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn bytes_of_another_module_are_not_compiled() {
    let dir = tempfile::tempdir().unwrap();
    let wasm = Bytes::from(wat::parse_str(QUICK).unwrap());
    let result = compiler(&dir, CompileLimits::default())
        .artifact(1, &ModuleHash::of(b"other"), || async { Ok::<_, ()>(wasm) })
        .await;
    assert!(matches!(result, Err(ArtifactError::WrongBytes { .. })));
}
