//! Bounded fuzzing of what nobody vouches for: uploaded modules and what runs of them, self-descriptions, and what a
//! cell says. Fixed seeds, so that a failure comes again; `SANDBAR_FUZZ_COUNT` and `SANDBAR_FUZZ_SEED` make longer
//! runs of it. `fuzz/` has the same entries for `cargo fuzz`.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use common::{attempt, cell, finished, next, program, script};
use sandbar_host::ModuleKind;
use sandbar_host::cell::protocol::{FromCell, Packer};
use sandbar_host::cell::{Cell, CellConfig, CellEvent};
use sandbar_host::compile::{CompileError, CompileLimits, compile};
use sandbar_host::inspect::{RejectionCode, inspect};
use sandbar_host::limits::Limits;
use sandbar_host::log::Log;
use sandbar_host::outcome::{Outcome, Receipt, Termination};
use sandbar_host::walls::Walls;

/// Modules that are made, half of them to be run.
const COUNT: u64 = 160;
const SEED: u64 = 20_260_701;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Random modules, by name: `fuzz/smith` makes them.
fn modules() -> Vec<(String, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let made = Command::new(cargo)
        .args(["run", "--quiet", "--locked", "--manifest-path"])
        .arg(root.join("fuzz/smith/Cargo.toml"))
        .arg("--")
        .arg(dir.path())
        .args([number("SANDBAR_FUZZ_COUNT", COUNT), number("SANDBAR_FUZZ_SEED", SEED)].map(|n| n.to_string()))
        .env("CARGO_TARGET_DIR", root.join("target/smith"))
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort_unstable();
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    paths.iter().map(|path| (name(path), std::fs::read(path).unwrap())).collect()
}

/// Small numbers that follow from a seed: xorshift.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % sides.max(1) as u64).unwrap()
    }

    /// The same bytes with some of them changed, doubled, cut or moved.
    fn mutate(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        for _ in 0..=self.roll(4) {
            let at = self.roll(bytes.len());
            match self.roll(5) {
                0 => bytes.truncate(at),
                1 if !bytes.is_empty() => bytes[at] = u8::try_from(self.roll(256)).unwrap(),
                2 if !bytes.is_empty() => bytes[at] ^= 1 << self.roll(8),
                3 => {
                    let to = at + self.roll(bytes.len() - at);
                    let piece = bytes[at..to].to_vec();
                    bytes.splice(at..at, piece);
                }
                _ => bytes.insert(at, 0xff),
            }
        }
        bytes
    }
}

#[tokio::test]
async fn random_modules_are_judged_compiled_and_run_within_their_limits_and_the_cell_lives() {
    let limits = Limits {
        fuel: 3_000_000,
        memory_bytes: 4 << 20,
        timeout_ms: 20_000,
        output_bytes: 10_000,
        log_bytes: 10_000,
    };
    let (cell, mut events) = cell(1, 4).await;
    let (mut ran, mut refused) = (0u64, 0);
    let dir = tempfile::tempdir().unwrap();
    for (token, (name, wasm)) in (0u64..).zip(modules()) {
        let verdict = inspect(&wasm);
        let runs = name.starts_with("runs");
        match &verdict {
            Ok(found) => assert!(!runs || found.kind == ModuleKind::CommandP1, "{name}: {found:?}"),
            // Made to be taken: only sizes may be too much.
            Err(refusal) => assert!(!runs || refusal.code == RejectionCode::OverLimit, "{name}: {refusal}"),
        }
        if verdict.is_err() {
            refused += 1;
            continue;
        }
        let module = Bytes::from(wasm);
        let hash = sandbar_host::ModuleHash::of(&module);
        let made = common::compiler(&dir, CompileLimits::default())
            .artifact(1, &hash, || async { Ok::<_, ()>(module.clone()) })
            .await;
        let artifact = made.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        cell.load(&artifact).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        cell.submit(token, &attempt(&artifact, 1, limits)).unwrap();
        let (ended, outcome) = finished(&mut events).await;
        assert_eq!(ended, token);
        let receipt = outcome.receipt;
        assert!(
            !matches!(outcome.termination, Termination::HostFault { .. }),
            "{name}: {:?}",
            outcome.termination
        );
        assert!(receipt.fuel > 0 && receipt.fuel <= limits.fuel, "{name}: {receipt:?}");
        assert!(receipt.peak_memory_bytes <= limits.memory_bytes, "{name}: {receipt:?}");
        assert!(outcome.output.len() <= 10_000 && receipt.log_bytes <= 10_000, "{name}: {receipt:?}");
        ran += 1;
    }
    assert_eq!(cell.in_flight(), 0);
    assert!(ran >= number("SANDBAR_FUZZ_COUNT", COUNT) / 4, "only {ran} ran, {refused} were refused");
}

#[tokio::test]
async fn spoilt_modules_are_refused_or_compiled_and_never_end_the_one_who_looks() {
    let mut dice = Dice(number("SANDBAR_FUZZ_SEED", SEED));
    let mut accepted = Vec::new();
    let mut looked = 0;
    for (name, wasm) in modules() {
        for _ in 0..40 {
            let spoilt = dice.mutate(&wasm);
            looked += 1;
            match inspect(&spoilt) {
                Ok(_) if spoilt != wasm => accepted.push((name.clone(), spoilt)),
                Ok(_) => {}
                Err(refusal) => {
                    assert!(!refusal.detail.is_empty() && refusal.detail.len() < 4_096, "{name}: {refusal}");
                    assert!(!refusal.detail.contains(|c: char| c.is_control()), "{name}: {refusal}");
                }
            }
        }
    }
    assert!(looked >= 40 && !accepted.is_empty());
    // What passes the look meets the compiler, in its own process.
    for (name, wasm) in accepted.into_iter().take(40) {
        match compile(&program(), Bytes::from(wasm), &CompileLimits::default()).await {
            Ok(_) | Err(CompileError::Rejected(_)) => {}
            Err(CompileError::Host(error)) => panic!("{name}: {error}"),
        }
    }
}

/// A module with this self-description.
fn described(section: &[u8]) -> Vec<u8> {
    let mut wasm = wat::parse_str(common::QUICK).unwrap();
    let mut content = vec![12];
    content.extend_from_slice(b"sandbar:task");
    content.extend_from_slice(section);
    wasm.push(0);
    let mut len = content.len();
    loop {
        let low = u8::try_from(len & 0x7f).unwrap();
        len >>= 7;
        wasm.push(if len == 0 { low } else { low | 0x80 });
        if len == 0 {
            break;
        }
    }
    wasm.extend(content);
    wasm
}

#[test]
fn a_spoilt_self_description_is_refused_by_name_or_within_bounds() {
    let good =
        br#"{"name":"n","description":"d","limits":{"fuel":5000,"timeout_ms":10},"retry":{"max_attempts":2},
        "grants":{"http":["a.example"],"kv":true,"secrets":["T"],"scratch_bytes":4096},
        "input_schema":{"type":"object","properties":{"a":{"type":"string"}}}}"#;
    assert!(inspect(&described(good)).unwrap().manifest.is_some());
    let mut dice = Dice(SEED);
    let mut taken = 0;
    for round in 0..4_000 {
        let section: Vec<u8> = if round % 4 == 0 {
            (0..dice.roll(200)).map(|_| u8::try_from(dice.roll(256)).unwrap()).collect()
        } else {
            dice.mutate(good)
        };
        match inspect(&described(&section)) {
            Ok(found) => {
                taken += 1;
                let manifest = found.manifest.unwrap();
                Limits::default().with(&manifest.limits).check().unwrap();
                assert!(manifest.grants.http.len() <= 32 && manifest.grants.secrets.len() <= 32);
            }
            Err(refusal) => assert_eq!(refusal.code, RejectionCode::BadManifest, "{refusal}"),
        }
    }
    assert!(taken > 0);
    // Deep nesting ends in words, not in a stack overflow.
    let deep = format!("{{\"input_schema\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(inspect(&described(deep.as_bytes())).unwrap_err().code, RejectionCode::BadManifest);
}

fn succeeded() -> Outcome {
    Outcome {
        termination: Termination::Succeeded,
        receipt: Receipt::default(),
        output: Vec::new(),
        content_type: String::new(),
        logs: Log::default(),
        backtrace: Vec::new(),
        artifacts: Vec::new(),
    }
}

/// A cell that says hello as it should and then these bytes.
async fn lying_cell(
    dir: &Path,
    words: &[u8],
    large: &[u8],
) -> std::io::Result<(Cell, sandbar_host::cell::CellEvents)> {
    let mut hello = Packer::new(1 << 20);
    hello.push(&FromCell::Ready(Walls::default())).unwrap();
    let mut bytes = hello.take(Vec::new());
    bytes.extend_from_slice(words);
    std::fs::write(dir.join("words"), bytes).unwrap();
    std::fs::write(dir.join("large"), large).unwrap();
    // It waits for the parent to close the socket, so that its end is not what ends it.
    let body = format!("/bin/cat '{0}/words' >&0\n/bin/cat '{0}/large'\n/bin/cat >/dev/null", dir.display());
    Cell::spawn(&CellConfig::new(script(&dir.join("cell"), &body))).await
}

#[tokio::test]
async fn a_cell_that_lies_is_killed_and_its_parent_goes_on() {
    let frame = |message: &FromCell| {
        let mut packer = Packer::new(1 << 20);
        packer.push(message).unwrap();
        packer.take(Vec::new())
    };
    let mut lies: Vec<Vec<u8>> = vec![
        frame(&FromCell::Ready(Walls::default())),
        frame(&FromCell::Loaded(sandbar_host::ModuleHash::of(b"never asked for"))),
        u32::MAX.to_le_bytes().to_vec(),
        // A frame of the largest size that says nothing of what it announces.
        vec![1, 0, 0, 0, 0xff],
    ];
    let large = frame(&FromCell::Finished { token: 7, outcome: Box::new(succeeded()) });
    lies.push(large.clone());
    // By the socket of large outcomes: of an attempt that is not there, cut short, too long, and something else.
    let large_lies =
        [large, vec![2, 0, 0, 0, 3, 7], u32::MAX.to_le_bytes().to_vec(), frame(&FromCell::Used(Vec::new()))];
    let mut dice = Dice(SEED);
    for _ in 0..12 {
        let len = dice.roll(300) + 1;
        let noise: Vec<u8> = (0..len).map(|_| u8::try_from(dice.roll(256)).unwrap()).collect();
        let mut lie = u32::try_from(len).unwrap().to_le_bytes().to_vec();
        lie.extend(noise);
        lies.push(lie);
    }
    let lies = lies.into_iter().map(|lie| (lie, Vec::new()));
    for (lie, large) in lies.chain(large_lies.map(|lie| (Vec::new(), lie))) {
        let dir = tempfile::tempdir().unwrap();
        let Ok((_cell, mut events)) = lying_cell(dir.path(), &lie, &large).await else {
            // The lie came in the same breath as the hello, and was heard.
            continue;
        };
        let CellEvent::Gone { reason } = next(&mut events).await else {
            panic!("{lie:?} {large:?} was believed")
        };
        assert!(reason.contains("protocol") || reason.contains("its socket"), "{lie:?} {large:?}: {reason}");
    }
}
