//! `sandbar completions`: what a shell needs to complete our commands.

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::args::Args;
use super::failure::{Exit, Outcome};
use super::output::Output;

/// Print the completions of a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "\
bash:  sandbar completions bash > ~/.local/share/bash-completion/completions/sandbar
zsh:   sandbar completions zsh > ~/.zfunc/_sandbar     (a directory of fpath)
fish:  sandbar completions fish > ~/.config/fish/completions/sandbar.fish")]
pub struct Completions {
    /// Which shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

impl Completions {
    /// Does it.
    pub fn run(&self) -> Outcome {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut Args::command(), "sandbar", &mut text);
        Output::new(false).bytes(&text)?;
        Ok(Exit::Done)
    }
}
