//! What the macros' own complaints look like to a person: the whole message, as rustc prints it. That
//! every one stands at the right token, also those that rustc words, is in
//! `../tests/ui.rs`.
#![allow(missing_docs)]

#[test]
fn complaints_read_well() {
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}
