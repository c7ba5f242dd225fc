//! `sandbar profile`: which servers this user knows, and which one is meant when nothing is said.

use std::io::{IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};

use super::failure::{Exit, Failure, Outcome};
use super::output::{self, BOLD, Cell, Output};
use super::profiles::{self, Profiles};
use super::target::{DEV, KEY_VARIABLE, check_server, is_local};
use super::value;

/// Largest key with the white space around it, in bytes.
const MAX_KEY: u64 = 4_096;

/// Keep servers and keys, and choose among them
#[derive(Debug, clap::Args)]
pub struct Profile {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List the profiles; the keys are not shown
    List {
        /// Print JSON, one document per line
        #[arg(long)]
        json: bool,
    },
    /// Choose the profile that is used when nothing else is said
    Use {
        /// Its name; `dev` is the `sandbar dev` of the current directory
        #[arg(value_name = "NAME", value_parser = profiles::check_name)]
        name: String,
    },
    /// Keep a profile, new or changed; the key comes from --key-file, from standard input or from the keyboard
    Set {
        /// Its name
        #[arg(value_name = "NAME", value_parser = profiles::check_name)]
        name: String,
        /// Address of the server
        #[arg(long, value_name = "URL")]
        server: Option<String>,
        /// File with the API key
        #[arg(long, value_name = "FILE")]
        key_file: Option<PathBuf>,
        /// Leave the key as it is, or away
        #[arg(long, conflicts_with = "key_file")]
        no_key: bool,
    },
    /// Forget a profile and its key
    Remove {
        /// Its name
        #[arg(value_name = "NAME", value_parser = profiles::check_name)]
        name: String,
    },
}

impl Profile {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        matches!(self.what, What::List { json: true })
    }

    /// Does it.
    pub fn run(self) -> Outcome {
        let output = Output::new(self.json());
        let path = profiles::path()?;
        let mut known = Profiles::load(&path)?;
        match self.what {
            What::List { .. } => list(output, &known)?,
            What::Use { name } => {
                if name != DEV {
                    known.find(&name)?;
                }
                known.current = Some(name.clone());
                known.save(&path)?;
                output.note(format!("{name} is used from now on"));
            }
            What::Set { name, server, key_file, no_key } => {
                let old = known.profiles.get(&name);
                let server = match (server, old) {
                    (Some(server), _) => check_server(&server)?,
                    (None, Some(old)) => old.server.clone(),
                    (None, None) => {
                        return Err(Failure::usage(format!("the new profile {name} needs a server"))
                            .hint(format!("sandbar profile set {name} --server URL")));
                    }
                };
                let key = if no_key {
                    // A key stays only with the server that it is for.
                    old.filter(|old| old.server == server).and_then(|old| old.key.clone())
                } else {
                    Some(key(key_file.as_deref())?)
                };
                if !server.starts_with("https://") && !is_local(&server) {
                    output.note(format!(
                        "warning: {server} is not encrypted; whoever listens on the way gets the key"
                    ));
                }
                let first = known.profiles.is_empty() && known.current.is_none();
                known.profiles.insert(name.clone(), profiles::Profile { server, key });
                if first {
                    known.current = Some(name.clone());
                }
                known.save(&path)?;
                output.note(format!("kept in {}", path.display()));
                if first {
                    output.note(format!("{name} is used from now on"));
                } else if known.current.as_deref() != Some(&name) {
                    output.note(format!(
                        "next: sandbar profile use {name}, or --profile {name} with a command"
                    ));
                }
            }
            What::Remove { name } => {
                known.find(&name)?;
                known.profiles.remove(&name);
                if known.current.as_deref() == Some(&name) {
                    known.current = None;
                }
                known.save(&path)?;
                output.note(format!("{name} is forgotten"));
            }
        }
        Ok(Exit::Done)
    }
}

fn list(output: Output, known: &Profiles) -> Result<(), Failure> {
    let current = |name: &str| known.current.as_deref() == Some(name);
    if output.json {
        for (name, profile) in &known.profiles {
            output.document(&serde_json::json!({
                "name": name, "server": profile.server, "has_key": profile.key.is_some(), "current": current(name),
            }))?;
        }
        return Ok(());
    }
    if known.profiles.is_empty() {
        output.note("no profiles; make one: sandbar profile set NAME --server URL");
        return Ok(());
    }
    let mut rows = vec![output::head(&["", "NAME", "SERVER", "KEY"])];
    for (name, profile) in &known.profiles {
        rows.push(vec![
            if current(name) { "*" } else { "" }.into(),
            Cell::styled(name, BOLD),
            output::printable(&profile.server).into(),
            if profile.key.is_some() { "kept" } else { "none" }.into(),
        ]);
    }
    for line in output::table(output, &rows) {
        output.line(line)?;
    }
    Ok(())
}

/// Never from the command line itself: process lists and histories show that.
fn key(file: Option<&Path>) -> Result<String, Failure> {
    let text = match file {
        Some(path) => String::from_utf8_lossy(&value::file(path, MAX_KEY)?).into_owned(),
        None if std::io::stdin().is_terminal() => {
            let terminal = console::Term::stderr();
            terminal.write_str("API key (not shown): ")?;
            terminal.read_secure_line()?
        }
        None => {
            let mut text = String::new();
            std::io::stdin().lock().take(MAX_KEY).read_to_string(&mut text)?;
            text
        }
    };
    let key = text.trim();
    if key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Failure::usage("that is no API key").hint(format!(
            "give it by --key-file FILE or on standard input; --no-key keeps none ({KEY_VARIABLE} is used then)"
        )));
    }
    Ok(key.to_owned())
}
