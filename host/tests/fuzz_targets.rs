//! The targets of `fuzz/` build, and take a few inputs, without libFuzzer and nightly Rust: what they reach changes with
//! this crate, and nobody builds them every day. Here the macro that makes a target makes a function.
#![allow(missing_docs, unused_attributes, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

// The name that targets know it by.
extern crate self as libfuzzer_sys;

use std::collections::BTreeSet;
use std::path::Path;

/// In place of the one of `libfuzzer-sys`.
macro_rules! fuzz_target {
    (|$input:ident: $kind:ty| $body:block) => {
        pub fn target($input: $kind) $body
    };
}
pub(crate) use fuzz_target;

#[path = "../../fuzz/targets/description.rs"]
mod description;
#[path = "../../fuzz/targets/log.rs"]
mod log;
#[path = "../../fuzz/targets/protocol.rs"]
mod protocol;
#[path = "../../fuzz/targets/upload.rs"]
mod upload;

/// As many bytes as `len`, which follow from a seed: xorshift.
fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn every_target_takes_bytes_of_any_kind() {
    for seed in 0..500u64 {
        let len = usize::try_from(seed % 97).unwrap();
        let some = bytes(seed, len);
        upload::target(&some);
        upload::target(&[b"\0asm\x01\0\0\0", some.as_slice()].concat());
        description::target(&some);
        description::target(&[b"{\"name\":\"", some.as_slice(), b"\"}"].concat());
        protocol::target(&some);
        log::target((u16::try_from(seed * 3).unwrap(), some.chunks(7).map(<[u8]>::to_vec).collect()));
    }
}

#[test]
fn no_target_is_missing_here_or_in_the_manifest() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("fuzz");
    let files: BTreeSet<String> = std::fs::read_dir(fuzz.join("targets"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let built: BTreeSet<String> = include_str!("fuzz_targets.rs")
        .lines()
        .filter_map(|line| line.split("fuzz/targets/").nth(1))
        .filter_map(|rest| rest.strip_suffix("\"]"))
        .map(str::to_owned)
        .collect();
    assert_eq!(files, built);
    let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    for file in files {
        assert!(manifest.contains(&format!("path = \"targets/{file}\"")), "{file}");
    }
}
