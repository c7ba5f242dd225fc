//! Complaints of the macros stand at the author's own tokens; what they look like to a person is in
//! `guest-sdk/ui`. Each case is compiled by `rustc` against the build of this crate that the test
//! itself is linked with.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use serde_json::Value;

/// Source, the token that must be underlined, and a part of the message.
const CASES: &[(&str, &str, &str)] = &[
    // The function.
    ("#[task] async fn f(x: String) {}", "async", "an ordinary function, not `async`"),
    ("#[task] unsafe fn f(x: String) {}", "unsafe", "safe to call"),
    ("#[task] extern \"C\" fn f(x: u8) {}", "extern \"C\"", "the macro makes the export"),
    ("#[task] fn f<T>(x: T) {}", "<T>", "cannot be generic"),
    ("#[task] fn f(x: &str) {}", "&str", "by value"),
    ("#[task] fn f(x: impl Sized) {}", "impl Sized", "name the type"),
    ("#[task] fn f(x: u8) -> impl Sized {}", "impl Sized", "name the type"),
    ("#[task] fn f(x: u8, y: u8) {}", "u8", "`&Context`"),
    ("#[task] fn f(c: &Context, x: u8, y: u16) {}", "u16", "at most"),
    ("#[task] fn f(c: &mut Context, x: u8) {}", "&mut Context", "`&Context`"),
    ("#[task] fn Shouting(x: u8) {}", "Shouting", "no name for a task"),
    ("#[task] struct S;", "struct", "expected"),
    ("struct S; impl S { #[task] fn f(&self, x: u8) {} }", "&self", "without `self`"),
    ("#[task] fn f(self, x: u8) {}", "self", "without `self`"),
    ("#[task] fn f(x: u8) where u8: Copy {}", "where u8: Copy", "cannot be generic"),
    ("#[task] fn f(x: Vec<u8>) {}", "Vec<u8>", "`Bytes`"),
    ("#[task] fn f() -> std::vec::Vec<u8> { vec![] }", "std::vec::Vec<u8>", "`Bytes`"),
    ("#[task] fn f() -> Result<Vec<u8>, TaskError> { Ok(vec![]) }", "Vec<u8>", "Output::new"),
    ("struct In; #[task] fn f(x: In) {}", "In", "`In` cannot be the input of a task"),
    (
        "#[derive(Schema)] struct In { a: u8 } #[task] fn f(x: In) {}",
        "In",
        "`In` cannot be the input of a task",
    ),
    ("struct Out; #[task] fn f() -> Out { Out }", "Out", "a task cannot return `Out`"),
    ("#[derive(Schema)] struct Out { a: u8 } #[task] fn f() -> Out { todo!() }", "Out", "Out"),
    ("#[task] fn f() -> Result<u8, String> { Ok(1) }", "Result<u8, String>", "a task cannot return"),
    ("#[task] fn f() -> Option<fn()> { None }", "Option<fn()>", "fn()"),
    // The attribute.
    ("#[task(nme = \"a\")] fn f() {}", "nme", "unknown argument"),
    ("#[task(name = \"A b\")] fn f() {}", "\"A b\"", "no name for a task"),
    ("#[task(name = 3)] fn f() {}", "3", "expected a string"),
    ("#[task(name = \"a\", name = \"b\")] fn f() {}", "name", "given twice"),
    ("#[task(limits(ram = 3))] fn f() {}", "ram", "unknown limit"),
    ("#[task(limits(memory = \"1 potato\"))] fn f() {}", "\"1 potato\"", "MiB"),
    ("#[task(limits(memory = 1, memory_bytes = 1))] fn f() {}", "memory_bytes", "given twice"),
    ("#[task(limits(timeout = 30))] fn f() {}", "30", "\"30s\""),
    ("#[task(limits(fuel = 0))] fn f() {}", "0", "limit of 0"),
    ("#[task(limits(fuel = \"99999999T\"))] fn f() {}", "\"99999999T\"", "expected"),
    ("#[task(limits(fuel = -1))] fn f() {}", "-", "expected a number"),
    ("#[task(retry(backoff = \"linear\"))] fn f() {}", "\"linear\"", "fixed"),
    ("#[task(retry(max_attempts = 0))] fn f() {}", "0", "at least 1"),
    ("#[task(retry(jitter = 1.5))] fn f() {}", "1.5", "from 0 to 1"),
    ("#[task(retry(factor = 0.5))] fn f() {}", "0.5", "from 1 up"),
    ("#[task(retry(pause = 1))] fn f() {}", "pause", "max_attempts"),
    ("#[task(limits(memory = \"64MiB\"), limits(fuel = 1))] fn f() {}", "limits", "given twice"),
    ("#[task(limits = \"64MiB\")] fn f() {}", "=", "expected `(`"),
    ("#[task(limits(memory))] fn f() {}", "memory", "expected"),
    ("#[task(name)] fn f() {}", "name", "expected"),
    ("#[task(grants(disk))] fn f() {}", "disk", "unknown grant"),
    ("#[task(grants(\"http:a\"))] fn f() {}", "\"http:a\"", "expected"),
    ("#[task(grants(http = \"a\"))] fn f() {}", "\"a\"", "in brackets"),
    ("#[task(grants(http = []))] fn f() {}", "[]", "asks for nothing"),
    ("#[task(grants(http = [\"a\", 3]))] fn f() {}", "3", "expected a string"),
    ("#[task(grants(http = [\"a\", \"a\"]))] fn f() {}", "\"a\"", "named twice"),
    ("#[task(grants(http = [\"https://a/b\"]))] fn f() {}", "\"https://a/b\"", "without a path"),
    ("#[task(grants(http = [\"*\"]))] fn f() {}", "\"*\"", "expected a host"),
    ("#[task(grants(http = [\"a.*.b\"]))] fn f() {}", "\"a.*.b\"", "expected a host"),
    ("#[task(grants(http = [\"a:0\"]))] fn f() {}", "\"a:0\"", "expected a host"),
    ("#[task(grants(kv = true))] fn f() {}", "=", "unexpected"),
    ("#[task(grants(kv, kv))] fn f() {}", "kv", "given twice"),
    ("#[task(grants(secrets = [\"A-B\"]))] fn f() {}", "\"A-B\"", "letters, digits"),
    ("#[task(grants(scratch = \"lots\"))] fn f() {}", "\"lots\"", "MiB"),
    ("#[task(grants(scratch = 0))] fn f() {}", "0", "holds nothing"),
    ("#[task(log = \"loud\")] fn f() {}", "\"loud\"", "one of off"),
    // The derive.
    ("#[derive(Schema)] struct S { #[serde(flatten)] a: u8 }", "flatten", "cannot express"),
    ("#[derive(Schema)] struct S { #[serde(with = \"m\")] a: u8 }", "with", "#[schema(as = Type)]"),
    ("#[derive(Schema)] struct S { #[serde(getter = \"m\")] a: u8 }", "getter", "cannot express"),
    ("#[derive(Schema)] #[serde(from = \"u8\")] struct S(u16);", "from", "#[schema(as = Type)]"),
    ("#[derive(Schema)] #[serde(remote = \"X\")] struct S(u16);", "remote", "cannot express"),
    ("#[derive(Schema)] struct S { #[serde(rename(serialize = \"b\"))] a: u8 }", "rename", "both directions"),
    (
        "#[derive(Schema)] struct S { #[serde(rename(serialize = \"b\", deserialize = \"c\"))] a: u8 }",
        "rename",
        "both directions",
    ),
    ("#[derive(Schema)] #[serde(rename_all = \"Camel\")] struct S { a: u8 }", "\"Camel\"", "not a rule"),
    ("#[derive(Schema)] struct S { #[schema(like = u8)] a: u8 }", "like", "#[schema(as = Type)]"),
    ("#[derive(Schema)] struct S(u8, #[serde(skip_serializing)] u8);", "skip_serializing", "without a name"),
    ("#[derive(Schema)] enum E {}", "E", "no values"),
    ("#[derive(Schema)] enum E { #[serde(with = \"m\")] A(u8) }", "with", "cannot express"),
    ("#[derive(Schema)] union U { a: u8 }", "union", "no unions"),
    ("#[derive(Schema)] #[serde(tag = \"t\")] enum E { A(u8, u8) }", "(u8, u8)", "internally tagged"),
    ("#[derive(Schema)] struct Tree { a: u8, b: Vec<Tree> }", "Tree", "contains itself"),
    ("#[derive(Schema)] enum List { End, Next(Box<Self>) }", "Self", "contains itself"),
    (
        "struct NoSchema; #[derive(Schema)] struct S { a: Vec<NoSchema> }",
        "Vec<NoSchema>",
        "has no JSON Schema",
    ),
];

#[test]
fn every_complaint_underlines_the_token_it_is_about() {
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let library = newest(&deps, "libsandbar_guest-", ".rlib");
    let scratch = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let mut wrong = Vec::new();
    for (number, (source, token, part)) in CASES.iter().enumerate() {
        let file = scratch.join(format!("ui-{number}.rs"));
        fs::write(&file, format!("use sandbar_guest::{{Context, Schema, TaskError, task}};\n{source}\n"))
            .unwrap();
        let output = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
            .args([
                "--edition=2024",
                "--crate-type=lib",
                "--emit=metadata",
                "--error-format=json",
                "--cap-lints=allow",
            ])
            .arg("--extern")
            .arg(format!("sandbar_guest={}", library.display()))
            .arg("-L")
            .arg(format!("dependency={}", deps.display()))
            .arg("--out-dir")
            .arg(&scratch)
            .arg(&file)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let found = errors(&output.stderr);
        if !found.iter().any(|(underlined, message)| underlined == token && message.contains(part)) {
            wrong.push(format!("{source}\n  expected {token:?}: {part}\n  found {found:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What each error underlines, and its message with all that belongs to it.
fn errors(stderr: &[u8]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for line in String::from_utf8_lossy(stderr).lines() {
        let Ok(diagnostic) = serde_json::from_str::<Value>(line) else { continue };
        if diagnostic["level"] != "error" {
            continue;
        }
        for span in diagnostic["spans"].as_array().unwrap() {
            if span["is_primary"] != true {
                continue;
            }
            let text = &span["text"][0];
            let bound = |key: &str| text[key].as_u64().unwrap_or(1) as usize - 1;
            let underlined: String = text["text"]
                .as_str()
                .unwrap_or_default()
                .chars()
                .take(bound("highlight_end"))
                .skip(bound("highlight_start"))
                .collect();
            found.push((underlined, diagnostic["message"].as_str().unwrap_or_default().to_owned()));
        }
    }
    found
}

/// The file that was built last: this test's own build, since that has just been made or is up to date.
fn newest(dir: &Path, prefix: &str, suffix: &str) -> PathBuf {
    let time =
        |path: &PathBuf| fs::metadata(path).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    fs::read_dir(dir)
        .unwrap()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(prefix) && name.ends_with(suffix)
        })
        .max_by_key(time)
        .expect("the library is built before its tests")
}
