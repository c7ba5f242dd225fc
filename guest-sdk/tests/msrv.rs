//! The stated minimum of Rust is possible: no dependency of the SDK asks for a newer one. (That our own code compiles
//! with it, only a toolchain of that version can say; clippy's `incompatible_msrv` checks the standard library's part.)
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{HashMap, HashSet};
use std::process::Command;

use serde_json::Value;

#[test]
fn no_dependency_needs_a_newer_rust_than_the_sdk_states() {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let about = Command::new("rustc").arg("-vV").output().unwrap();
    let about = String::from_utf8(about.stdout).unwrap();
    let host = about.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
    let output = Command::new(cargo)
        .args(["metadata", "--locked", "--offline", "--format-version=1", "--all-features"])
        // What only other systems need has never been fetched here.
        .args(["--filter-platform", host])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages: HashMap<&str, &Value> =
        list(&metadata["packages"]).map(|package| (package["id"].as_str().unwrap(), package)).collect();
    let nodes: HashMap<&str, &Value> =
        list(&metadata["resolve"]["nodes"]).map(|node| (node["id"].as_str().unwrap(), node)).collect();

    let stated = version(env!("CARGO_PKG_RUST_VERSION"));
    let own = packages.values().find(|package| package["name"] == env!("CARGO_PKG_NAME")).unwrap();
    let mut left = vec![own["id"].as_str().unwrap()];
    let mut seen = HashSet::new();
    let mut newer = Vec::new();
    while let Some(id) = left.pop() {
        if !seen.insert(id) {
            continue;
        }
        let package = packages[id];
        if package["rust_version"].as_str().is_some_and(|needed| version(needed) > stated) {
            newer.push(format!(
                "{} {} needs {}",
                package["name"], package["version"], package["rust_version"]
            ));
        }
        let deps = list(&nodes[id]["deps"]);
        // What only tests need is no concern of those who depend on the SDK.
        let needed = deps.filter(|dep| list(&dep["dep_kinds"]).any(|kind| kind["kind"] != "dev"));
        left.extend(needed.map(|dep| dep["pkg"].as_str().unwrap()));
    }
    assert!(seen.len() > 10, "the dependencies were not found: {seen:?}");
    assert!(newer.is_empty(), "{newer:#?}");
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// `1.87` and `1.87.0` are the same.
fn version(text: &str) -> Vec<u32> {
    let mut parts: Vec<u32> = text.split('.').map(|part| part.parse().unwrap()).collect();
    parts.resize(3, 0);
    parts
}
