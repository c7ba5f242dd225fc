//! Every refusal has its own code and names what it found.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;

use super::*;

const START: &str = r#"(module (func (export "_start")))"#;
const RUN: &str = r#"
  (core module $m (func (export "run") (result i32) i32.const 0))
  (core instance $i (instantiate $m))
  (func $run (result (result)) (canon lift (core func $i "run")))"#;

fn wasm(wat: &str) -> Vec<u8> {
    wat::parse_str(wat).unwrap()
}

fn refused(bytes: &[u8]) -> (RejectionCode, String) {
    let rejection = inspect(bytes).unwrap_err();
    (rejection.code, rejection.detail)
}

fn with_section(mut bytes: Vec<u8>, content: &[u8]) -> Vec<u8> {
    let name = manifest::SECTION.as_bytes();
    bytes.push(0);
    leb(&mut bytes, 1 + name.len() + content.len());
    bytes.push(name.len() as u8);
    bytes.extend_from_slice(name);
    bytes.extend_from_slice(content);
    bytes
}

fn leb(bytes: &mut Vec<u8>, mut value: usize) {
    loop {
        let byte = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            bytes.push(byte);
            return;
        }
        bytes.push(byte | 0x80);
    }
}

#[test]
fn each_door_is_recognised() {
    assert_eq!(inspect(&wasm(START)).unwrap().kind, ModuleKind::CommandP1);
    let command = format!(
        r#"(component {RUN} (instance $e (export "run" (func $run))) (export "wasi:cli/run@0.2.3" (instance $e)))"#
    );
    assert_eq!(inspect(&wasm(&command)).unwrap().kind, ModuleKind::CommandP2);
    let task = crate::run::tests::task_component("(call $err (i32.const 0))");
    assert_eq!(inspect(&wasm(&task)).unwrap().kind, ModuleKind::Task);
}

#[test]
fn what_is_not_webassembly_is_told_apart() {
    assert_eq!(refused(b"").0, RejectionCode::NotWasm);
    assert_eq!(refused(b"\x7fELF....").0, RejectionCode::NotWasm);
    assert_eq!(refused(b"#!/bin/sh").0, RejectionCode::NotWasm);
    assert_eq!(refused(b"  (module)").0, RejectionCode::TextFormat);
    assert_eq!(refused(b";; hi\n(module)").0, RejectionCode::TextFormat);
    assert_eq!(refused(b"\0asm").0, RejectionCode::Truncated);
    assert_eq!(refused(b"\0asm\x63\0\0\0").0, RejectionCode::Invalid);
}

#[test]
fn a_file_cut_anywhere_is_refused_and_mostly_as_truncated() {
    let whole = wasm(
        r#"(module (memory 1) (func (export "_start") (drop (i32.const 1)))
            (data (i32.const 0) "hello world"))"#,
    );
    let truncated = (8..whole.len())
        .filter(|len| inspect(&whole[..*len]).is_err_and(|err| err.code == RejectionCode::Truncated))
        .count();
    // All but the ends of its sections.
    assert!(truncated + 8 >= whole.len() - 8, "{truncated}");
    assert_eq!(refused(&whole[..whole.len() - 3]).0, RejectionCode::Truncated);
}

#[test]
fn unknown_imports_are_refused_by_name() {
    let (code, detail) = refused(&wasm(r#"(module (import "env" "magic" (func)) (func (export "_start")))"#));
    assert_eq!(code, RejectionCode::UnknownImport);
    assert!(detail.contains("`magic`") && detail.contains("`env`"), "{detail}");
    let (code, detail) = refused(&wasm(r#"(component (import "wasi:nn/graph@0.2.0" (instance)))"#));
    assert_eq!(code, RejectionCode::UnknownImport);
    assert!(detail.contains("wasi:nn/graph@0.2.0"), "{detail}");
    let (code, _) = refused(&wasm(
        r#"(module (import "wasi_snapshot_preview1" "fd_write" (memory 1)) (func (export "_start")))"#,
    ));
    assert_eq!(code, RejectionCode::UnknownImport);
}

#[test]
fn a_module_without_a_door_is_told_what_it_exports() {
    let (code, detail) = refused(&wasm("(component)"));
    assert_eq!(code, RejectionCode::NoUsableExport);
    assert!(detail.contains("exports nothing"), "{detail}");
    let (code, detail) = refused(&wasm(r#"(module (func (export "main")))"#));
    assert_eq!(code, RejectionCode::NoUsableExport);
    assert!(detail.contains("`main`"), "{detail}");
}

#[test]
fn wrong_signatures_are_told_what_was_expected() {
    let (code, _) = refused(&wasm(r#"(module (func (export "_start") (param i32)))"#));
    assert_eq!(code, RejectionCode::WrongSignature);
    let (code, detail) = refused(&wasm(&format!(r#"(component {RUN} (export "run" (func $run)))"#)));
    assert_eq!(code, RejectionCode::WrongSignature);
    assert!(detail.contains("list<u8>"), "{detail}");
    let (code, _) =
        refused(&wasm(r#"(component (instance $e) (export "wasi:cli/run@0.2.0" (instance $e)))"#));
    assert_eq!(code, RejectionCode::WrongSignature);
}

#[test]
fn disabled_proposals_are_invalid() {
    for wat in [
        r#"(module (memory i64 1) (func (export "_start")))"#,
        r#"(module (memory 1 1 shared) (func (export "_start")))"#,
        r#"(module (tag) (func (export "_start")))"#,
        r#"(module (type (struct)) (func (export "_start")))"#,
    ] {
        assert_eq!(refused(&wasm(wat)).0, RejectionCode::Invalid, "{wat}");
    }
}

#[test]
fn too_many_memories_or_table_elements_are_over_limit() {
    let memories = "(memory 1)".repeat(9);
    let (code, detail) = refused(&wasm(&format!(r#"(module {memories} (func (export "_start")))"#)));
    assert_eq!(code, RejectionCode::OverLimit);
    assert!(detail.contains("memories"), "{detail}");
    let (code, _) = refused(&wasm(r#"(module (table 70000 funcref) (func (export "_start")))"#));
    assert_eq!(code, RejectionCode::OverLimit);
}

#[test]
fn the_manifest_is_read_at_the_top_or_from_the_one_inner_module() {
    let top = with_section(wasm(START), br#"{"name":"outer"}"#);
    let manifest = inspect(&top).unwrap().manifest.unwrap();
    assert_eq!(manifest.name.as_deref(), Some("outer"));
    let twice = with_section(top, br#"{"name":"again"}"#);
    assert_eq!(refused(&twice).0, RejectionCode::BadManifest);
    let broken = with_section(wasm(START), b"{");
    assert_eq!(refused(&broken).0, RejectionCode::BadManifest);
    let inner = format!(
        r#"(component
            (core module (@custom "sandbar:task" "{{\22name\22:\22inner\22}}"))
            {RUN} (instance $e (export "run" (func $run))) (export "wasi:cli/run@0.2.3" (instance $e)))"#
    );
    let manifest = inspect(&wasm(&inner)).unwrap().manifest.unwrap();
    assert_eq!(manifest.name.as_deref(), Some("inner"));
}

#[test]
fn hostile_names_are_cut_and_cleaned_in_messages() {
    let name = "x".repeat(5_000);
    let (_, detail) = refused(&wasm(&format!("(module (import \"a\\1b[31m\" \"{name}\" (func)))")));
    assert!(detail.len() < 1_000, "{}", detail.len());
    assert!(!detail.contains('\u{1b}'));
}

proptest! {
    #[test]
    fn no_bytes_make_inspect_panic(
        tail in proptest::collection::vec(any::<u8>(), 0..400),
        component in any::<bool>(),
    ) {
        let mut bytes = if component { b"\0asm\x0d\0\x01\0".to_vec() } else { b"\0asm\x01\0\0\0".to_vec() };
        bytes.extend(tail);
        let _ = inspect(&bytes);
    }

    #[test]
    fn no_change_of_a_byte_makes_inspect_panic(at in 8usize..200, value in any::<u8>()) {
        let mut bytes = wasm(&crate::run::tests::task_component("(call $err (i32.const 0))"));
        let at = at % bytes.len();
        bytes[at] = value;
        let _ = inspect(&bytes);
    }
}
