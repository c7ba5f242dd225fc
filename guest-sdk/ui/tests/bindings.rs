//! The bindings in the SDK are what the generator makes of the contract, `wit/`. To make them anew after a
//! change of it: `SANDBAR_BLESS=1 cargo test --manifest-path guest-sdk/ui/Cargo.toml --test bindings`.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use wit_bindgen_core::{Files, WorldGenerator};
use wit_bindgen_core::wit_parser::Resolve;
use wit_bindgen_rust::Opts;

/// Holds `src/FILE` to what the generator makes of a world.
fn compare(world: &str, file: &str, options: Opts) {
    let sdk = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut resolve = Resolve::default();
    let (package, _) = resolve.push_path(sdk.join("wit")).unwrap();
    let world = resolve.select_world(&[package], Some(world)).unwrap();
    let mut files = Files::default();
    options.build().generate(&mut resolve, world, &mut files).unwrap();
    let (_, made) = files.iter().next().unwrap();
    let made = std::str::from_utf8(made).unwrap();

    let kept = sdk.join("src").join(file);
    if std::env::var_os("SANDBAR_BLESS").is_some() {
        std::fs::write(&kept, made).unwrap();
    }
    assert!(std::fs::read_to_string(&kept).unwrap_or_default() == made, "wit/ changed: see this file's head");
}

#[test]
fn the_bindings_are_what_the_contract_says() {
    let mut options = Opts::default();
    options.pub_export_macro = true;
    options.default_bindings_module = Some("::sandbar_guest::__private::bindings".to_owned());
    compare("task", "bindings.rs", options);
}

#[test]
fn the_bindings_of_capabilities_are_what_the_contract_says() {
    let mut options = Opts::default();
    options.generate_all = true;
    compare("capabilities", "capabilities.rs", options);
}
