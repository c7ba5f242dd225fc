//! `sandbar build`: a project becomes a module. Runs cargo, finds what it made, and looks at it as the server will.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sandbar_host::inspect::{Inspection, inspect};
use serde::Deserialize;

use super::failure::{Exit, Failure, Outcome};
use super::output::{self, Output};
use super::value;

/// What tasks are compiled to.
const TARGET: &str = "wasm32-wasip2";

/// Build the project in this directory into a module
#[derive(Debug, clap::Args)]
pub struct Build {
    /// Directory of the project
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Which package, when the directory has several
    #[arg(long, short, value_name = "NAME")]
    package: Option<String>,
    /// Print one JSON document: path, size, hash, kind and what the module says about itself
    #[arg(long)]
    json: bool,
}

/// A built module.
pub struct Built {
    /// Where it is.
    pub path: PathBuf,
    /// Its size in bytes.
    size: u64,
    /// What the server will see.
    inspection: Inspection,
}

/// A line of cargo's messages: only what is needed of it.
#[derive(Deserialize)]
struct Message {
    reason: String,
    #[serde(default)]
    filenames: Vec<PathBuf>,
}

impl Build {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.json
    }

    /// Does it.
    pub fn run(&self) -> Outcome {
        let output = Output::new(self.json);
        let built = build(&self.dir, self.package.as_deref())?;
        let Inspection { hash, kind, manifest, .. } = &built.inspection;
        if self.json {
            output.document(&serde_json::json!({
                "path": std::path::absolute(&built.path)?,
                "size_bytes": built.size,
                "sha256": hash.to_string(),
                "kind": kind.as_str(),
                "manifest": manifest,
            }))?;
            return Ok(Exit::Done);
        }
        output.line(built.path.display().to_string())?;
        let name = manifest.as_ref().and_then(|m| m.name.as_deref());
        output.note(format!(
            "{}{}, {}, sha256 {}",
            name.map_or_else(String::new, |name| format!("{name}: ")),
            kind.as_str(),
            output::bytes(built.size),
            &hash.to_string()[..16],
        ));
        let description = manifest.as_ref().and_then(|m| m.description.as_deref()).unwrap_or_default();
        if !description.is_empty() {
            output.note(output::headline(description, 100));
        }
        output.note(match name {
            Some(_) => {
                format!("next: sandbar push, or without a server: sandbar run {}", built.path.display())
            }
            None => format!("next: sandbar push {} --task NAME", built.path.display()),
        });
        Ok(Exit::Done)
    }
}

/// Builds the project of a directory.
///
/// # Errors
/// Rust or its target is missing, the build fails, or it gives no module or several.
pub fn project(dir: &Path, output: Output) -> Result<Built, Failure> {
    let built = build(dir, None)?;
    output.note(format!("built {}", built.path.display()));
    Ok(built)
}

fn build(dir: &Path, package: Option<&str>) -> Result<Built, Failure> {
    let here = dir
        .canonicalize()
        .map_err(|error| Failure::new(Exit::NotFound, format!("cannot open {}: {error}", dir.display())))?;
    if !here.ancestors().any(|dir| dir.join("Cargo.toml").is_file()) {
        return Err(Failure::new(Exit::NotFound, format!("there is no Cargo.toml in {}", here.display()))
            .hint("make a project: sandbar new NAME; a module of another language is pushed by its path"));
    }
    check_target(&here)?;
    let mut command = Command::new(cargo());
    command
        .current_dir(&here)
        .args(["build", "--release", "--target", TARGET, "--message-format", "json-render-diagnostics"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    if let Some(package) = package {
        command.args(["--package", package]);
    }
    let mut child = command.spawn().map_err(|error| no_rust(&error))?;
    let mut modules = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            // Cargo's own lines only; what a build script prints is none of them.
            let line = line.unwrap_or_default();
            let Ok(message) = serde_json::from_str::<Message>(&line) else { continue };
            if message.reason == "compiler-artifact" {
                modules.extend(
                    message.filenames.into_iter().filter(|f| f.extension().is_some_and(|e| e == "wasm")),
                );
            }
        }
    }
    let status = child.wait()?;
    if !status.success() {
        return Err(Failure::new(Exit::Failed, "the project does not build").hint("cargo said why, above"));
    }
    let path = match modules.as_slice() {
        [one] => one.clone(),
        [] => {
            return Err(Failure::new(Exit::Failed, "the project has built, and made no .wasm file").hint(
                "a task needs `crate-type = [\"cdylib\"]` under [lib] in Cargo.toml; a command needs a src/main.rs",
            ));
        }
        several => {
            let mut failure =
                Failure::usage("the project makes several modules").hint("choose one: --package NAME");
            for path in several {
                failure = failure.detail(path.display());
            }
            return Err(failure);
        }
    };
    let module = value::file(&path, value::MAX_MODULE)?;
    let inspection = inspect(&module).map_err(|rejection| {
        Failure::new(Exit::Refused, format!("{} was built, and cannot run in Sandbar", path.display()))
            .detail(rejection)
    })?;
    // Short where it can be: people type it.
    let short = std::env::current_dir().ok().and_then(|dir| Some(path.strip_prefix(dir).ok()?.to_owned()));
    Ok(Built { path: short.unwrap_or(path), size: module.len() as u64, inspection })
}

/// The cargo that runs us, or the one on the path.
fn cargo() -> std::ffi::OsString {
    std::env::var_os("CARGO").filter(|path| !path.is_empty()).unwrap_or_else(|| "cargo".into())
}

fn no_rust(error: &std::io::Error) -> Failure {
    if error.kind() == std::io::ErrorKind::NotFound {
        Failure::new(Exit::Failed, "Rust is not installed, or not on the PATH")
            .hint("install it from https://rustup.rs, then: rustup target add wasm32-wasip2")
    } else {
        Failure::new(Exit::Failed, format!("cannot start cargo: {error}"))
    }
}

/// Says what is missing before cargo fails in its own words.
fn check_target(dir: &Path) -> Result<(), Failure> {
    let asked = Command::new("rustc")
        .current_dir(dir)
        .args(["--print", "target-libdir", "--target", TARGET])
        .stderr(Stdio::null())
        .output()
        .map_err(|error| no_rust(&error))?;
    let libdir = String::from_utf8_lossy(&asked.stdout).trim().to_owned();
    if asked.status.success() && !libdir.is_empty() && !Path::new(&libdir).is_dir() {
        return Err(Failure::new(Exit::Failed, format!("this Rust cannot compile to {TARGET} yet"))
            .hint(format!("rustup target add {TARGET}")));
    }
    Ok(())
}
