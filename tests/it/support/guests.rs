//! Guests, compiled once per run from `tests/guests` and `examples`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The guests that are also built as preview 1 core modules, by package name.
const ALSO_P1: [&str; 1] = ["guest-command"];

/// The component of a guest: a folder name in `tests/guests` or `examples`.
pub fn guest(name: &str) -> PathBuf {
    find("wasm32-wasip2", name)
}

/// The preview 1 core module of a guest; only for those in [`ALSO_P1`].
pub fn guest_p1(name: &str) -> PathBuf {
    find("wasm32-wasip1", name)
}

/// jaq as it is on crates.io, a preview 1 core module, built by the script of the example.
pub fn jaq() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT
        .get_or_init(|| {
            let root = Path::new(env!("CARGO_MANIFEST_DIR"));
            let output = Command::new(root.join("examples/jaq/build.sh")).output().unwrap();
            assert!(
                output.status.success(),
                "jaq does not build:\n{}",
                String::from_utf8_lossy(&output.stderr)
            );
            PathBuf::from(String::from_utf8(output.stdout).unwrap().trim_end())
        })
        .clone()
}

fn find(target: &str, name: &str) -> PathBuf {
    let built = build_all().join(target).join("release");
    // Library crates have underscores in their file names, programs keep their hyphens.
    let candidates = [name.replace('-', "_"), name.to_owned()].map(|name| built.join(format!("{name}.wasm")));
    let found = candidates.iter().find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("no guest {name}: none of {candidates:?} exists")).clone()
}

/// Builds all guests once, and says where they are.
fn build_all() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let target_dir = root.join("target/guests");
        for workspace in ["tests/guests", "examples"] {
            build(&root.join(workspace), &target_dir, "wasm32-wasip2", &["--workspace"]);
        }
        for package in ALSO_P1 {
            build(&root.join("tests/guests"), &target_dir, "wasm32-wasip1", &["--package", package]);
        }
        target_dir
    })
}

fn build(workspace: &Path, target_dir: &Path, target: &str, what: &[&str]) {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(workspace)
        .args(["build", "--release", "--locked", "--target", target])
        .args(what)
        // What holds for the host's build does not for guests.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET")
        .env("CARGO_TARGET_DIR", target_dir)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "guests of {} do not build for {target}:\n{}",
        workspace.display(),
        String::from_utf8_lossy(&output.stderr)
    );
}
