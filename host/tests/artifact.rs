//! Cached code that must not be loaded: of another Wasmtime, of another configuration, damaged, or under another key. A worker
//! that finds it drops it and compiles anew.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
/// What decides about the code: compiled into this test as well, since it is nobody's business outside the crate.
#[path = "../src/engine.rs"]
#[allow(dead_code, unreachable_pub)]
mod engine;

use std::hash::{Hash as _, Hasher};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use common::{QUICK, program};
use hmac::{Hmac, Mac as _};
use sandbar_host::artifact::{Artifact, ArtifactCache, ArtifactKey};
use sandbar_host::compile::CompileLimits;
use sandbar_host::{Compiler, ModuleHash, WASMTIME_VERSION};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use wasmtime::Engine;

/// What a file begins with, and how long the authentication code behind it is.
const MAGIC: &[u8] = b"sbxcode\x01";
const MAC_BYTES: usize = 32;
/// The key of the machine, and another.
const KEY: [u8; 32] = [7; 32];
const OTHER_KEY: [u8; 32] = [8; 32];

/// The data directory of a machine whose worker starts again and again, and the one module that it runs.
struct Machine {
    dir: TempDir,
    wasm: Bytes,
    hash: ModuleHash,
    compiled: AtomicU32,
}

impl Machine {
    fn new() -> Self {
        let wasm = Bytes::from(wat::parse_str(QUICK).unwrap());
        let hash = ModuleHash::of(&wasm);
        Self { dir: tempfile::tempdir().unwrap(), wasm, hash, compiled: AtomicU32::new(0) }
    }

    /// The code, as a worker that has just started under this key gets it.
    async fn code(&self, key: [u8; 32]) -> Artifact {
        let path = self.dir.path().join("key");
        std::fs::write(&path, key).unwrap();
        let key = ArtifactKey::load_or_create(&path).unwrap();
        let cache = ArtifactCache::open(self.dir.path().join("code"), key, 1 << 30).unwrap();
        let compiler = Compiler::new(program(), CompileLimits::default(), Arc::new(cache), 1);
        // The bytes of the module are asked for by a compilation and by nothing else.
        let fetch = || async {
            self.compiled.fetch_add(1, Ordering::SeqCst);
            Ok::<_, ()>(self.wasm.clone())
        };
        compiler.artifact(1, &self.hash, fetch).await.unwrap()
    }

    /// Compilations so far.
    fn compiled(&self) -> u32 {
        self.compiled.load(Ordering::SeqCst)
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("code").join(format!("{}.code", self.hash))
    }

    /// What a worker of this fingerprint with this key would have left in the cache.
    fn stamped(&self, fingerprint: &[u8; 32], code: &[u8]) -> Vec<u8> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&KEY).unwrap();
        for part in [MAGIC, self.hash.as_bytes(), fingerprint, &(code.len() as u64).to_le_bytes(), code] {
            mac.update(part);
        }
        [MAGIC, &mac.finalize().into_bytes(), code].concat()
    }
}

/// The fingerprint of an engine of a Wasmtime of this version.
fn fingerprint(version: &str, engine: &Engine) -> [u8; 32] {
    struct Sha(Sha256);
    impl Hasher for Sha {
        fn write(&mut self, bytes: &[u8]) {
            self.0.update(bytes);
        }

        fn finish(&self) -> u64 {
            0
        }
    }
    let mut sha = Sha(Sha256::new());
    sha.write(version.as_bytes());
    engine.precompile_compatibility_hash().hash(&mut sha);
    sha.0.finalize().into()
}

#[tokio::test]
async fn code_of_another_version_or_configuration_is_dropped_and_built_anew() {
    let machine = Machine::new();
    let made = machine.code(KEY).await;
    let file = std::fs::read(machine.file()).unwrap();
    let ours = engine::compiling().unwrap();

    // The control: what differs below is nothing but version and configuration.
    let stamp = fingerprint(WASMTIME_VERSION, &ours);
    assert_eq!(stamp, engine::fingerprint().unwrap(), "this test takes fingerprints as the cache does");
    assert!(machine.stamped(&stamp, &made.bytes) == file, "this test stamps as the cache does");
    std::fs::write(machine.file(), machine.stamped(&stamp, &made.bytes)).unwrap();
    machine.code(KEY).await;
    assert_eq!(machine.compiled(), 1, "compiled again, though the code is good");

    let mut config = engine::config();
    config.cranelift_nan_canonicalization(false);
    let other = Engine::new(&config).unwrap();
    let others_code = other.precompile_module(&machine.wasm).unwrap();
    let left_behind = [
        ("of an older version", fingerprint("47.0.0", &ours), made.bytes.to_vec()),
        ("of another configuration", fingerprint(WASMTIME_VERSION, &other), others_code),
    ];
    for (name, stamp, code) in left_behind {
        std::fs::write(machine.file(), machine.stamped(&stamp, &code)).unwrap();
        let before = machine.compiled();
        let again = machine.code(KEY).await;
        assert_eq!(machine.compiled(), before + 1, "{name}: not compiled anew");
        assert!(again.bytes == made.bytes, "{name}: other code than at first");
        assert!(std::fs::read(machine.file()).unwrap() == file, "{name}: still there");
        machine.code(KEY).await;
        assert_eq!(machine.compiled(), before + 1, "{name}: what was compiled anew is not kept");
    }
}

#[tokio::test]
async fn damaged_code_and_code_under_another_key_is_dropped_and_built_anew() {
    let machine = Machine::new();
    let made = machine.code(KEY).await;
    let file = std::fs::read(machine.file()).unwrap();
    machine.code(KEY).await;
    assert_eq!(machine.compiled(), 1);

    let flip = |at: usize| {
        let mut bytes = file.clone();
        bytes[at] ^= 1;
        bytes
    };
    let head = MAGIC.len() + MAC_BYTES;
    let damaged = [
        ("another format", flip(MAGIC.len() - 1)),
        ("the first bit of the authentication code", flip(MAGIC.len())),
        ("its last bit", flip(head - 1)),
        ("the first byte of the code", flip(head)),
        ("the last byte of the code", flip(file.len() - 1)),
        ("cut short", file[..file.len() - 1].to_vec()),
        ("one byte more", [&file[..], &[0]].concat()),
        ("nothing but a head", file[..head].to_vec()),
        ("less than a head", file[..head - 1].to_vec()),
        ("nothing", Vec::new()),
        ("code without any head", made.bytes.to_vec()),
    ];
    for (name, bytes) in damaged {
        std::fs::write(machine.file(), bytes).unwrap();
        let before = machine.compiled();
        let again = machine.code(KEY).await;
        assert_eq!(machine.compiled(), before + 1, "{name}: not compiled anew");
        assert!(again.bytes == made.bytes, "{name}: other code than at first");
        assert!(std::fs::read(machine.file()).unwrap() == file, "{name}: still there");
    }

    // Each key knows its own code only.
    for key in [OTHER_KEY, KEY] {
        let before = machine.compiled();
        for _ in 0..2 {
            assert!(machine.code(key).await.bytes == made.bytes);
        }
        assert_eq!(machine.compiled(), before + 1, "once under each key");
    }
}
