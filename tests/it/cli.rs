//! The command line as people and scripts use it: the real binary against a real deployment.

mod follow;
mod operate;
mod people;
mod project;
mod remote;
mod settings;
mod streams;
mod tenancy;
mod terminal;

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{ADMIN_KEY, Deployment};

/// A person with a home, a current directory, and perhaps a server in the environment.
pub struct Person {
    home: TempDir,
    variables: Vec<(&'static str, String)>,
}

/// What a command said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Person {
    /// Who knows no server.
    pub fn new() -> Self {
        Self { home: tempfile::tempdir().unwrap(), variables: Vec::new() }
    }

    /// Who has the address and the admin key of a deployment in the environment.
    pub fn of(deployment: &Deployment) -> Self {
        let mut person = Self::new();
        person.set("SANDBAR_URL", deployment.url());
        person.set("SANDBAR_API_KEY", ADMIN_KEY);
        person
    }

    /// Sets a variable.
    pub fn set(&mut self, name: &'static str, value: impl Into<String>) {
        self.variables.retain(|(known, _)| *known != name);
        self.variables.push((name, value.into()));
    }

    /// The current directory.
    pub fn dir(&self) -> &Path {
        self.home.path()
    }

    /// A command of this person, in a directory.
    pub fn command(&self, dir: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sandbar"));
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("SANDBAR_") || name.starts_with("CLICOLOR"))
            {
                command.env_remove(&name);
            }
        }
        command
            .args(args)
            .current_dir(dir)
            .env("XDG_CONFIG_HOME", self.dir().join("config"))
            .env("XDG_CACHE_HOME", self.dir().join("cache"))
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        command
    }

    /// Runs it.
    pub fn run(&self, args: &[&str]) -> Said {
        self.run_in(self.dir(), args)
    }

    /// Runs it in a directory.
    pub fn run_in(&self, dir: &Path, args: &[&str]) -> Said {
        Said::of(self.command(dir, args).output().unwrap())
    }

    /// Runs it with something on standard input.
    pub fn run_with(&self, args: &[&str], stdin: &str) -> Said {
        use std::io::Write as _;
        let mut command = self.command(self.dir(), args);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // One that does not read it has its reasons.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        Said::of(child.wait_with_output().unwrap())
    }
}

impl Said {
    pub fn of(output: std::process::Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }

    /// This, if it ended with the code.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout:\n{}\nstderr:\n{}", self.out, self.err);
        self
    }

    /// Standard output as one JSON document in one line.
    #[track_caller]
    pub fn document(&self) -> Value {
        assert_eq!(self.out.lines().count(), 1, "{self:?}");
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Standard output as one JSON document per line.
    #[track_caller]
    pub fn documents(&self) -> Vec<Value> {
        let parse = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        self.out.lines().map(parse).collect()
    }

    /// Standard error as the one line that `--json` promises for failures.
    #[track_caller]
    pub fn error(&self) -> Value {
        assert!(self.out.is_empty(), "{self:?}");
        serde_json::from_str::<Value>(&self.err).unwrap_or_else(|error| panic!("{error}: {self:?}"))["error"]
            .clone()
    }
}
