//! The reference of all commands, `docs/cli.md`: made from the definitions of the arguments, so that it cannot say
//! anything else. A test fails when the file is stale.

use std::fmt::Write as _;

use clap::{Arg, Command, CommandFactory as _};

use super::args::Args;
use super::failure::{Exit, Outcome};
use super::output::Output;

/// What stands before the commands.
const HEAD: &str = include_str!("reference.md");

/// Print `docs/cli.md`
#[derive(Debug, clap::Args)]
pub struct Reference {}

impl Reference {
    /// Does it.
    pub fn run(&self) -> Outcome {
        Output::new(false).bytes(text().as_bytes())?;
        Ok(Exit::Done)
    }
}

/// The whole text.
fn text() -> String {
    let mut codes = String::from("| code | meaning |\n|---|---|\n");
    for (exit, meaning) in Exit::TABLE {
        let _ = writeln!(codes, "| {} | {meaning} |", *exit as u8);
    }
    let mut text = HEAD.replace("{exit-codes}\n", &codes);
    let mut root = Args::command().bin_name("sandbar");
    root.build();
    for command in root.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        section(&mut text, command, "sandbar", 2);
    }
    text
}

fn section(text: &mut String, command: &Command, parent: &str, level: usize) {
    let name = format!("{parent} {}", command.get_name());
    let _ = writeln!(text, "\n{} {name}\n", "#".repeat(level));
    if let Some(about) = command.get_long_about().or_else(|| command.get_about()) {
        let _ = writeln!(text, "{}\n", ended(&about.to_string()));
    }
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim().to_owned();
    let _ = writeln!(text, "```\n{usage}\n```");
    let shown = |arg: &&Arg| !arg.is_hide_set() && !matches!(arg.get_id().as_str(), "help" | "version_flag");
    let arguments: Vec<&Arg> = command.get_arguments().filter(shown).collect();
    if !arguments.is_empty() {
        text.push_str("\n| option | what it does |\n|---|---|\n");
    }
    for arg in arguments {
        let _ = writeln!(text, "| {} | {} |", code(&spelling(arg)), about(arg));
    }
    for inner in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        section(text, inner, &name, level + 1);
    }
}

/// `-t`, `--task <NAME>`, or `<FILE>`.
fn spelling(arg: &Arg) -> String {
    let names: Vec<String> =
        arg.get_value_names().unwrap_or_default().iter().map(|name| format!("<{name}>")).collect();
    let value = if arg.get_action().takes_values() { names.join(" ") } else { String::new() };
    let short = arg.get_short().map(|c| format!("-{c}"));
    let long = arg.get_long().map(|name| format!("--{name}"));
    let flags: Vec<String> = [short, long].into_iter().flatten().collect();
    let optional = arg.get_num_args().is_some_and(|range| range.min_values() == 0 && range.takes_values());
    match (flags.is_empty(), value.is_empty()) {
        (true, _) if arg.is_last_set() => format!("-- {value}"),
        (true, _) => value,
        (false, true) => flags.join(", "),
        (false, false) if optional => format!("{}[={value}]", flags.join(", ")),
        (false, false) => format!("{} {value}", flags.join(", ")),
    }
}

fn about(arg: &Arg) -> String {
    let mut text = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let defaults: Vec<String> =
        arg.get_default_values().iter().map(|value| value.to_string_lossy().into_owned()).collect();
    if !defaults.is_empty() && arg.get_action().takes_values() {
        let _ = write!(text, " [default: {}]", defaults.join(" "));
    }
    text.replace('|', "\\|")
}

/// In a table, a bar would end the cell.
fn code(text: &str) -> String {
    format!("`{}`", text.replace('|', "\\|"))
}

fn ended(text: &str) -> String {
    if text.ends_with(['.', ':']) { text.to_owned() } else { format!("{text}.") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn docs_cli_md_is_what_the_program_says() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md");
        let made = text();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, &made).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(kept == made, "docs/cli.md is stale; write it anew: sandbar reference > docs/cli.md");
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn every_command_and_every_option_is_explained() {
        fn walk(command: &Command, missing: &mut Vec<String>) {
            for inner in command.get_subcommands() {
                if inner.get_about().is_none() {
                    missing.push(inner.get_name().to_owned());
                }
                walk(inner, missing);
            }
            for arg in command.get_arguments().filter(|arg| arg.get_help().is_none()) {
                missing.push(format!("{} {}", command.get_name(), arg.get_id()));
            }
        }
        let mut missing = Vec::new();
        walk(&Args::command(), &mut missing);
        assert!(missing.is_empty(), "{missing:?}");
    }
}
