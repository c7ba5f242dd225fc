//! Puts the sources of the guest SDK into the binary, so that `sandbar new` works for somebody who has nothing else.
//! Makes a list of names and texts in OUT_DIR; `src/cli/new.rs` includes it.

// A build script may stop the build, and speaks to cargo on standard output.
#![allow(clippy::expect_used, clippy::print_stdout)]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Directories that only the SDK's own tests need.
const LEFT_OUT: [&str; 4] = ["tests", "target", "benches", "examples"];
/// What a crate is made of.
const KINDS: [&str; 4] = ["rs", "toml", "wit", "md"];

fn main() {
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let sdk = root.join("guest-sdk");
    let mut files = Vec::new();
    collect(&sdk, &mut files);
    files.sort();
    let mut list = String::from("&[\n");
    for file in &files {
        let name = file.strip_prefix(&sdk).expect("it was found there").to_str().expect("names are plain");
        let path = file.to_str().expect("names are plain");
        writeln!(list, "    ({name:?}, include_str!({path:?})),").expect("a string takes all");
    }
    list.push_str("]\n");
    std::fs::write(out.join("sdk_files.rs"), list).expect("OUT_DIR can be written");
    println!("cargo::rerun-if-changed=guest-sdk");
    println!("cargo::rerun-if-changed=build.rs");
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("the SDK is there") {
        let path = entry.expect("it can be listed").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() {
            if !LEFT_OUT.contains(&name) {
                collect(&path, files);
            }
        } else if path.extension().and_then(|e| e.to_str()).is_some_and(|e| KINDS.contains(&e)) {
            files.push(path);
        }
    }
}
