//! `sandbar new`: a task project that builds and passes its own tests. Owns the template and the copy of the SDK that
//! goes with it (docs/decisions/0010-sdk-in-the-binary.md); builds nothing.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::failure::{Exit, Failure, Outcome};
use super::output::{BOLD, Output};
use super::value;

/// The sources of the SDK, by their path below it.
const SDK: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/sdk_files.rs"));
/// Where the SDK's manifests inherit from.
const WORKSPACE: &str = include_str!("../../Cargo.toml");
/// Versions of dependencies that this SDK is known to build with.
const LOCK: &str = include_str!("../../examples/Cargo.lock");
/// Where the SDK lies in a project.
const VENDOR: &str = "vendor/sandbar-guest";

/// Words that cannot be the name of a Rust function or of a package.
const RESERVED: &[&str] = &[
    "abstract",
    "as",
    "async",
    "await",
    "become",
    "box",
    "break",
    "const",
    "continue",
    "crate",
    "do",
    "dyn",
    "else",
    "enum",
    "extern",
    "false",
    "final",
    "fn",
    "for",
    "gen",
    "if",
    "impl",
    "in",
    "let",
    "loop",
    "macro",
    "match",
    "mod",
    "move",
    "mut",
    "override",
    "priv",
    "pub",
    "ref",
    "return",
    "self",
    "static",
    "struct",
    "super",
    "test",
    "trait",
    "true",
    "try",
    "type",
    "typeof",
    "unsafe",
    "unsized",
    "use",
    "virtual",
    "where",
    "while",
    "yield",
    // Crates that the project uses.
    "core",
    "std",
    "serde",
    "sandbar-guest",
    "sandbar_guest",
    "log",
    "tests",
    "greet",
];

/// Start a task project: sources, tests, README and the SDK
#[derive(Debug, clap::Args)]
pub struct New {
    /// Directory to make; its last part is the name of the task
    #[arg(value_name = "NAME")]
    path: PathBuf,
    /// Name of the task, when the directory shall be called otherwise
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Use the SDK in this directory instead of a copy of the one in this program
    #[arg(long, value_name = "DIR")]
    sdk: Option<PathBuf>,
    /// Print one JSON document: name, directory and files
    #[arg(long)]
    json: bool,
}

impl New {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.json
    }

    /// Does it.
    pub fn run(self) -> Outcome {
        let output = Output::new(self.json);
        let name = match &self.name {
            Some(name) => name.clone(),
            None => self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned(),
        };
        check(&name)?;
        let sdk = self.sdk.as_deref().map(own_sdk).transpose()?;
        let files = project(&name, sdk.as_deref())?;
        if self.path.exists() && !is_empty_dir(&self.path) {
            return Err(Failure::new(Exit::Refused, format!("{} exists already", self.path.display()))
                .hint("choose another name, or remove it"));
        }
        for (file, text) in &files {
            write(&self.path.join(file), text)?;
        }
        if self.json {
            let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
            output.document(&serde_json::json!({ "name": name, "directory": self.path, "files": names }))?;
            return Ok(Exit::Done);
        }
        output.line(self.path.display().to_string())?;
        output.note(format!("a task project: {}", output.paint_err(BOLD, &name)));
        output.note(format!("next: cd {} && cargo test && sandbar push", self.path.display()));
        Ok(Exit::Done)
    }
}

/// A name that is good for a task, a package and a function.
fn check(name: &str) -> Result<(), Failure> {
    let hint = "for example: sandbar new word-count";
    value::task_name(name).map_err(|why| Failure::usage(why).hint(hint))?;
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) {
        return Err(Failure::usage("the name of a project begins with a letter").hint(hint));
    }
    if RESERVED.contains(&name) || RESERVED.contains(&name.replace('-', "_").as_str()) {
        return Err(
            Failure::usage(format!("`{name}` means something else in Rust or in the project")).hint(hint)
        );
    }
    Ok(())
}

/// The absolute path of an SDK that is there.
fn own_sdk(dir: &Path) -> Result<String, Failure> {
    let manifest = dir.join("Cargo.toml");
    let text = std::fs::read_to_string(&manifest).map_err(|error| {
        Failure::new(Exit::NotFound, format!("cannot read {}: {error}", manifest.display()))
            .hint("--sdk takes the directory of the crate sandbar-guest")
    })?;
    if !text.contains("name = \"sandbar-guest\"") {
        return Err(Failure::usage(format!("{} is not the crate sandbar-guest", dir.display())));
    }
    let path = dir.canonicalize()?;
    path.to_str().map(str::to_owned).ok_or_else(|| Failure::usage("the path of the SDK is not UTF-8"))
}

fn is_empty_dir(path: &Path) -> bool {
    std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let fail = |error: std::io::Error| {
        Failure::new(Exit::Failed, format!("cannot write {}: {error}", path.display()))
    };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(fail)?;
    }
    std::fs::write(path, text).map_err(fail)
}

/// Every file of a project with its text. `sdk`: the path of an SDK elsewhere; else a copy comes along.
fn project(name: &str, sdk: Option<&str>) -> Result<Vec<(String, String)>, Failure> {
    let function = name.replace('-', "_");
    let vendored = if sdk.is_none() {
        format!(
            "\n`{VENDOR}` is a copy of the SDK of the `sandbar` that made this project (version {}). It belongs to the \
             project\nand is committed with it.",
            env!("CARGO_PKG_VERSION")
        )
    } else {
        String::new()
    };
    let exclude = if sdk.is_none() { "exclude = [\"vendor\"]" } else { "" };
    let fill = |text: &str| {
        text.replace("{{name}}", name)
            .replace("{{function}}", &function)
            .replace("{{module}}", &function)
            .replace("{{sdk}}", sdk.unwrap_or(VENDOR))
            .replace("{{exclude}}", exclude)
            .replace("{{vendored}}", &vendored)
            .trim_end()
            .to_owned()
            + "\n"
    };
    let mut files = vec![
        ("Cargo.toml".to_owned(), fill(include_str!("template/Cargo.toml.txt"))),
        ("src/lib.rs".to_owned(), fill(include_str!("template/lib.rs.txt"))),
        ("README.md".to_owned(), fill(include_str!("template/README.md.txt"))),
        (".gitignore".to_owned(), "/target\n/.sandbar\n".to_owned()),
    ];
    if sdk.is_none() {
        let broken = |error: &dyn std::fmt::Display| {
            Failure::new(Exit::Failed, format!("the SDK in this program: {error}"))
        };
        let workspace: Table = WORKSPACE.parse().map_err(|e: toml::de::Error| broken(&e))?;
        for (path, text) in SDK {
            let text = if path.ends_with("Cargo.toml") {
                standalone(text, &workspace).map_err(|e| broken(&e))?
            } else {
                (*text).to_owned()
            };
            files.push((format!("{VENDOR}/{path}"), text));
        }
        files.push(("Cargo.lock".to_owned(), lock(&files).map_err(|e| broken(&e))?));
    }
    Ok(files)
}

/// A manifest that stands on its own: what it inherits is written out, what only the SDK's own tests need is left away.
fn standalone(manifest: &str, workspace: &Table) -> Result<String, toml::de::Error> {
    let mut manifest: Table = manifest.parse()?;
    let inherited = workspace.get("workspace").and_then(Value::as_table).cloned().unwrap_or_default();
    let of = |section: &str, key: &str| inherited.get(section).and_then(|s| s.get(key)).cloned();
    for section in ["dev-dependencies", "lints", "test", "bench", "example"] {
        manifest.remove(section);
    }
    if let Some(Value::Table(package)) = manifest.get_mut("package") {
        for (key, value) in package.iter_mut() {
            if value.get("workspace").is_some() {
                *value = of("package", key).unwrap_or_else(|| Value::String(String::new()));
            }
        }
    }
    let resolve = |dependencies: &mut Value| {
        let Value::Table(dependencies) = dependencies else { return };
        for (name, wanted) in dependencies.iter_mut() {
            if wanted.get("workspace").is_none() {
                continue;
            }
            let mut full = match of("dependencies", name) {
                Some(Value::Table(table)) => table,
                Some(version) => Table::from_iter([("version".to_owned(), version)]),
                None => Table::new(),
            };
            if let Value::Table(own) = wanted {
                for (key, value) in own.iter().filter(|(key, _)| *key != "workspace") {
                    match (full.get_mut(key), value) {
                        (Some(Value::Array(features)), Value::Array(more)) => {
                            features.extend(more.iter().cloned());
                        }
                        _ => _ = full.insert(key.clone(), value.clone()),
                    }
                }
            }
            *wanted = Value::Table(full);
        }
    };
    if let Some(dependencies) = manifest.get_mut("dependencies") {
        resolve(dependencies);
    }
    if let Some(Value::Table(targets)) = manifest.get_mut("target") {
        for target in targets.iter_mut().filter_map(|(_, target)| target.as_table_mut()) {
            target.remove("dev-dependencies");
            if let Some(dependencies) = target.get_mut("dependencies") {
                resolve(dependencies);
            }
        }
    }
    // A newer compiler may warn of something here, and the project's author cannot help it.
    let quiet = Table::from_iter([("warnings".to_owned(), Value::String("allow".to_owned()))]);
    manifest.insert(
        "lints".to_owned(),
        Value::Table(Table::from_iter([("rust".to_owned(), Value::Table(quiet))])),
    );
    Ok(manifest.to_string())
}

/// The lock file that our own examples are tested with, cut down to what the project reaches. Cargo adds the rest.
fn lock(files: &[(String, String)]) -> Result<String, toml::de::Error> {
    let lock: Table = LOCK.parse()?;
    let packages: Vec<&Table> = lock
        .get("package")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_table)
        .collect();
    let name = |package: &Table| package.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
    let version =
        |package: &Table| package.get("version").and_then(Value::as_str).unwrap_or_default().to_owned();
    let mut reached = vec![false; packages.len()];
    let mut open: Vec<String> = Vec::new();
    for (_, text) in files.iter().filter(|(path, _)| path.ends_with("Cargo.toml")) {
        let manifest: Table = text.parse()?;
        let targets = manifest.get("target").and_then(Value::as_table).into_iter().flatten().map(|(_, t)| t);
        for table in targets.chain([&Value::Table(manifest.clone())]) {
            for section in ["dependencies", "build-dependencies"] {
                let keys = table.get(section).and_then(Value::as_table).into_iter().flatten();
                open.extend(keys.map(|(key, _)| key.clone()));
            }
        }
    }
    while let Some(wanted) = open.pop() {
        // "name", or "name version" where there are several.
        let mut words = wanted.split(' ');
        let (wanted, number) = (words.next().unwrap_or_default(), words.next());
        for (at, package) in packages.iter().enumerate() {
            let fits = name(package) == wanted && number.is_none_or(|number| version(package) == number);
            if fits && !reached[at] {
                reached[at] = true;
                let inner = package.get("dependencies").and_then(Value::as_array).into_iter().flatten();
                open.extend(inner.filter_map(Value::as_str).map(str::to_owned));
            }
        }
    }
    let kept = packages
        .iter()
        .zip(reached)
        // Packages without a source are ours: cargo finds them in the project.
        .filter(|(package, reached)| *reached && package.contains_key("source"))
        .map(|(package, _)| Value::Table((*package).clone()))
        .collect();
    let mut cut = Table::new();
    if let Some(format) = lock.get("version") {
        cut.insert("version".to_owned(), format.clone());
    }
    cut.insert("package".to_owned(), Value::Array(kept));
    Ok(cut.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn text<'a>(files: &'a [(String, String)], path: &str) -> &'a str {
        &files.iter().find(|(name, _)| name == path).unwrap_or_else(|| panic!("no {path}")).1
    }

    #[test]
    fn names_that_give_no_project_are_refused() {
        for bad in ["", "A", "-a", "1a", "match", "self", "test", "a b", "a/b", "serde", "tests"] {
            assert_eq!(check(bad).unwrap_err().exit, Exit::Usage, "{bad}");
        }
        for good in ["hello", "word-count", "a1_b"] {
            assert!(check(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn a_project_has_no_placeholder_left_and_inherits_nothing() {
        let files = project("word-count", None).unwrap();
        for (path, text) in files.iter().filter(|(path, _)| !path.starts_with(VENDOR)) {
            assert!(!text.contains("{{"), "{path}");
        }
        assert!(text(&files, "src/lib.rs").contains("fn word_count("));
        for manifest in ["vendor/sandbar-guest/Cargo.toml", "vendor/sandbar-guest/macros/Cargo.toml"] {
            let table: Table = text(&files, manifest).parse().unwrap();
            assert!(!text(&files, manifest).contains("workspace = true"), "{manifest}");
            assert!(table["package"]["version"].is_str() && table["package"]["edition"].is_str());
            assert!(table["dependencies"].as_table().unwrap().values().all(|d| d.is_str() || d.is_table()));
        }
        let lock: Table = text(&files, "Cargo.lock").parse().unwrap();
        let names: Vec<&str> =
            lock["package"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
        for needed in ["serde", "serde_json", "syn", "wit-bindgen", "log"] {
            assert!(names.contains(&needed), "{names:?}");
        }
        assert!(!names.contains(&"word-count") && !names.contains(&"sandbar-guest"), "{names:?}");
    }

    #[test]
    fn with_an_sdk_elsewhere_none_is_copied() {
        let files = project("a", Some("/sdk")).unwrap();
        assert!(files.iter().all(|(path, _)| !path.starts_with("vendor") && path != "Cargo.lock"));
        assert!(text(&files, "Cargo.toml").contains("path = \"/sdk\""));
    }
}
