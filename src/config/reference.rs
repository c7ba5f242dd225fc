//! Keeps `docs/configuration.md` what the code says: every key with its variable, default and range, out of the
//! doc comments of `config` and the table [`RANGES`]. Test code only; it writes the page when asked to by
//! `SANDBAR_BLESS=1`, and otherwise fails when the page is stale.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fmt::Write as _;
use std::path::Path;

use super::{Config, RANGES};

const HEAD: &str = "\
<!-- Written by a test from src/config: SANDBAR_BLESS=1 cargo test --workspace --lib config::reference -->
# Configuration

One set of keys for every role. Sources, the later winning: the defaults below; `sandbar.toml` in the working directory
(or the file that `--config` or `SANDBAR_CONFIG` names); environment variables (and `SANDBAR_DATA_DIR`); flags. An unknown key, a value of the
wrong type or out of its range ends the start with a message that names the key.

A key `section.key` stands in the file under `[section]`, and as a variable it is `SANDBAR_SECTION__KEY` (two
underscores between section and key). For example:

```toml
[worker]
slots = 256
cells = 2
```

is the same as `SANDBAR_WORKER__SLOTS=256 SANDBAR_WORKER__CELLS=2`.
";

/// One field as the source has it.
struct Key {
    name: String,
    doc: String,
}

/// The structs of the source in order: what their comment says, and their fields.
fn sections(source: &str) -> Vec<(String, Vec<Key>)> {
    let mut found: Vec<(String, Vec<Key>)> = Vec::new();
    let mut doc = String::new();
    let mut inside = false;
    for line in source.lines() {
        let line = line.trim();
        if let Some(text) = line.strip_prefix("///") {
            doc.push_str(text);
        } else if line.starts_with("pub struct ") {
            inside = true;
            found.push((std::mem::take(&mut doc).trim().to_owned(), Vec::new()));
        } else if inside && line == "}" {
            inside = false;
        } else if inside && let Some(field) = line.strip_prefix("pub ") {
            let name = field.split(':').next().unwrap().to_owned();
            let doc = std::mem::take(&mut doc).trim().to_owned();
            found.last_mut().unwrap().1.push(Key { name, doc });
        } else if !line.starts_with("#[") {
            doc.clear();
        }
    }
    found
}

fn page() -> String {
    let defaults = Config::default();
    let mut page = HEAD.to_owned();
    for (about, keys) in sections(include_str!("mod.rs")) {
        // "Section `worker`: what it is for." The sections themselves are the fields of the whole configuration.
        let section = about
            .strip_prefix("Section `")
            .map(|rest| rest.split_once("`: ").expect("a section says what it is for"));
        let prefix = section.map(|(name, _)| format!("{name}.")).unwrap_or_default();
        let keys: Vec<&Key> =
            keys.iter().filter(|key| section.is_some() || key.doc.contains("Default")).collect();
        if keys.is_empty() {
            continue;
        }
        match section {
            Some((name, text)) => write!(page, "\n## `{name}`\n\n{}\n", capitalised(text)).unwrap(),
            None => page.push_str("\n## Outside any section\n"),
        }
        page.push_str("\n| key | default | range | what it is |\n|---|---|---|---|\n");
        for key in keys {
            let name = format!("{prefix}{}", key.name);
            let (default, range) = match RANGES.iter().find(|range| range.key == name) {
                Some(range) => (
                    grouped((range.get)(&defaults)),
                    format!("{} to {}", grouped(range.min), grouped(range.max)),
                ),
                None => ("–".to_owned(), String::new()),
            };
            // The default of the number of threads is this machine's.
            let default = if key.doc.contains("Default: ") { "–".to_owned() } else { default };
            writeln!(page, "| `{name}` | {default} | {range} | {} |", key.doc.replace('|', "\\|")).unwrap();
        }
    }
    page
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[test]
fn the_reference_says_what_the_code_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let page = page();
    for range in RANGES {
        assert!(page.contains(&format!("| `{}` |", range.key)), "{} is in no section's comment", range.key);
    }
    if std::env::var_os("SANDBAR_BLESS").is_some() {
        std::fs::write(&path, page).unwrap();
    } else {
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(written == page, "docs/configuration.md is stale; its first line says how to write it anew");
    }
}
