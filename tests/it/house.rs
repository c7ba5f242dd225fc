//! The house as a test: imports run downward only, and each library stays behind its own door.

use std::path::{Path, PathBuf};

/// Which modules of the library a module may import, itself included. A module without a row fails the test.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("domain", &["domain"]),
    ("wire", &["wire", "domain"]),
    ("store", &["store", "domain"]),
    ("app", &["app", "store", "domain", "wire"]),
    ("api", &["api", "app", "store", "domain", "wire"]),
    ("worker", &["worker", "app", "store", "domain"]),
    ("scheduler", &["scheduler", "app", "store", "domain"]),
    ("config", &["config", "domain"]),
    ("telemetry", &["telemetry", "config"]),
    ("dev", &["dev", "config"]),
    ("server", &["server", "api", "worker", "scheduler", "app", "store", "config", "domain", "telemetry"]),
    ("cli", &["cli", "server", "dev", "telemetry", "store", "config", "wire", "domain"]),
];

/// Which modules may name a library.
const DOORS: &[(&str, &[&str])] = &[
    // `domain` derives `sqlx::Type` on ids and nothing else; `dev` makes its database and role passwords.
    ("sqlx", &["store", "domain", "dev"]),
    ("axum", &["api", "server"]),
    // What dials for guests is in the host crate, behind the rules.
    ("hyper", &[]),
    ("utoipa", &["api", "wire"]),
    ("clap", &["cli"]),
    ("figment", &["config"]),
    ("wasmtime", &[]),
    ("wasmparser", &[]),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found
}

/// The first module below `src` that a file belongs to.
fn module_of(file: &Path) -> String {
    let inside = file.strip_prefix(root().join("src")).unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

/// Code without comments, so that prose may name what code may not.
fn code(file: &Path) -> String {
    let text = std::fs::read_to_string(file).unwrap();
    text.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

/// Names that follow `before` in `text`, in groups too: `crate::{a, b::c}` gives a and b.
fn named_after(text: &str, before: &str) -> Vec<String> {
    let ident =
        |s: &str| s.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut names = Vec::new();
    for (at, _) in text.match_indices(before) {
        let preceded =
            text[..at].chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':');
        if preceded {
            continue;
        }
        let rest = &text[at + before.len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut part = String::new();
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        names.push(ident(&part));
                        part.clear();
                        continue;
                    }
                    _ => {}
                }
                part.push(c);
            }
            names.push(ident(&part));
        } else {
            names.push(ident(rest));
        }
    }
    names.retain(|n| !n.is_empty());
    names
}

#[test]
fn imports_run_downward_only() {
    let mut wrong = Vec::new();
    for file in sources(&root().join("src")) {
        let module = module_of(&file);
        if module == "lib" || module == "main" {
            continue;
        }
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(m, _)| *m == module) else {
            wrong.push(format!("{module} has no row in MAY_IMPORT"));
            continue;
        };
        for used in named_after(&code(&file), "crate::") {
            let is_module = MAY_IMPORT.iter().any(|(m, _)| *m == used);
            if is_module && !allowed.contains(&used.as_str()) {
                wrong.push(format!("{} imports {used}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn each_library_stays_behind_its_door() {
    let mut wrong = Vec::new();
    for file in sources(&root().join("src")) {
        let module = module_of(&file);
        let text = code(&file);
        for (library, doors) in DOORS {
            let used = !named_after(&text, &format!("{library}::")).is_empty();
            if used && !doors.contains(&module.as_str()) {
                wrong.push(format!("{} uses {library}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_host_knows_no_database_and_no_http_server_and_the_guest_sdk_nothing_of_either() {
    let forbidden = [
        ("host/Cargo.toml", &["sqlx", "axum", "sandbar =", "sandbar-guest"][..]),
        ("guest-sdk/Cargo.toml", &["sqlx", "axum", "tokio", "wasmtime", "sandbar =", "sandbar-host"][..]),
    ];
    for (manifest, names) in forbidden {
        let text = std::fs::read_to_string(root().join(manifest)).unwrap();
        let dependencies =
            text.split("[dependencies]").nth(1).unwrap().split("[dev-dependencies]").next().unwrap();
        for name in names {
            let found = dependencies.lines().any(|l| l.starts_with(name));
            assert!(!found, "{manifest} depends on {name}");
        }
    }
}

#[test]
fn unsafe_code_lives_in_one_module_of_the_host() {
    let mut allowed = Vec::new();
    for dir in ["src", "host/src", "guest-sdk/src", "guest-sdk/macros/src"] {
        for file in sources(&root().join(dir)) {
            if code(&file).contains("allow(unsafe_code)") {
                allowed.push(file.strip_prefix(root()).unwrap().display().to_string());
            }
        }
    }
    assert!(allowed.iter().all(|f| f.starts_with("host/src/") || f.starts_with("guest-sdk/")), "{allowed:?}");
    assert!(allowed.iter().filter(|f| f.starts_with("host/src/")).count() <= 1, "{allowed:?}");
}

#[test]
fn the_tests_of_this_file_see_violations() {
    assert_eq!(named_after("use crate::{store::x, domain};", "crate::"), ["store", "domain"]);
    assert_eq!(named_after("let a = crate::store::f(); mycrate::no", "crate::"), ["store"]);
    assert_eq!(named_after("sqlx::query", "sqlx::"), ["query"]);
}
