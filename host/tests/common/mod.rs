//! What the tests of compile children and cells share.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sandbar_host::artifact::{Artifact, ArtifactCache, ArtifactKey};
use sandbar_host::cell::{Cell, CellConfig, CellEvent, CellEvents};
use sandbar_host::compile::CompileLimits;
use sandbar_host::limits::Limits;
use sandbar_host::outcome::Outcome;
use sandbar_host::run::{Attempt, Context, Input, Options};
use sandbar_host::{Compiler, ModuleHash};

/// Longest any single wait in these tests takes before it counts as failed.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Spins for ever.
pub const SPIN: &str = r#"(module (func (export "_start") (loop $l (br $l))))"#;
/// Ends at once.
pub const QUICK: &str = r#"(module (func (export "_start")))"#;

pub fn program() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_sandbar-cell"))
}

/// A shell script that can be run. A child writes it: were it open for writing here, a child that
/// another test forks at that moment would hold it open too, and running it would be refused as
/// "text file busy".
pub fn script(path: &Path, body: &str) -> PathBuf {
    let written = std::process::Command::new("/bin/sh")
        .args(["-c", r##"printf '#!/bin/sh\n%s\n' "$2" >"$1" && chmod 700 "$1""##, "sh"])
        .args([path.as_os_str(), body.as_ref()])
        .status()
        .unwrap();
    assert!(written.success(), "{}: {written}", path.display());
    path.to_owned()
}

pub fn compiler(dir: &tempfile::TempDir, limits: CompileLimits) -> Compiler {
    let key = ArtifactKey::load_or_create(&dir.path().join("key")).unwrap();
    let cache = ArtifactCache::open(dir.path().join("code"), key, 1 << 30).unwrap();
    Compiler::new(program(), limits, Arc::new(cache), 1)
}

pub async fn artifact(wat: &str) -> Artifact {
    let dir = tempfile::tempdir().unwrap();
    let wasm = Bytes::from(wat::parse_str(wat).unwrap());
    compiler(&dir, CompileLimits::default())
        .artifact(1, &ModuleHash::of(&wasm), || async { Ok::<_, ()>(wasm.clone()) })
        .await
        .unwrap()
}

pub async fn cell(threads: usize, slots: u32) -> (Cell, CellEvents) {
    let config = CellConfig { threads, slots, ..CellConfig::new(program()) };
    Cell::spawn(&config).await.unwrap()
}

pub fn attempt(artifact: &Artifact, tenant: u64, limits: Limits) -> Attempt {
    Attempt {
        module: artifact.hash,
        tenant,
        weight: 100,
        input: Input::Command { args: vec![], env: vec![], stdin: b"stdin".to_vec() },
        limits,
        context: Context {
            invocation_id: "i".into(),
            task: "t".into(),
            attempt: 1,
            max_attempts: 1,
            tags: vec![],
        },
        options: Options::default(),
    }
}

pub async fn next(events: &mut CellEvents) -> CellEvent {
    tokio::time::timeout(PATIENCE, events.recv()).await.expect("no event in time").expect("the events ended")
}

/// The next outcome, with its token.
pub async fn finished(events: &mut CellEvents) -> (u64, Outcome) {
    loop {
        match next(events).await {
            CellEvent::Finished { token, outcome } => return (token, *outcome),
            CellEvent::Progress { .. }
            | CellEvent::Log { .. }
            | CellEvent::Http { .. }
            | CellEvent::Ask { .. }
            | CellEvent::Used(_) => {}
            CellEvent::Gone { reason } => panic!("the cell is gone: {reason}"),
        }
    }
}

/// The reason of the end; other events before it are skipped.
pub async fn gone(events: &mut CellEvents) -> String {
    loop {
        if let CellEvent::Gone { reason } = next(events).await {
            assert!(events.recv().await.is_none(), "an event after the end");
            return reason;
        }
    }
}
