//! The command line: arguments (`args`), then one file per command. Data goes to stdout, everything else to stderr.
//! Owns exit codes; decides nothing about invocations.

mod args;
mod dev;
mod migrate;
mod role;
mod run;

use std::process::ExitCode;

use clap::Parser;

use crate::config::{Config, Overrides};

/// Exit code when the command line or the configuration is wrong.
const USAGE: u8 = 2;

/// Parse the command line and do what it says.
#[must_use]
pub fn main() -> ExitCode {
    let args = args::Args::parse();
    let overrides: Overrides = args.global.overrides(&args.command);
    let config = match Config::load(&overrides) {
        Ok(config) => config,
        Err(error) => return report(&anyhow::Error::new(error), USAGE),
    };
    if let Err(error) = crate::telemetry::init(&config.log) {
        return report(&anyhow::Error::new(error), USAGE);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&anyhow::Error::new(error).context("cannot start the runtime"), 1),
    };
    let result = runtime.block_on(async {
        match args.command {
            args::Command::Dev(_) => dev::run(config).await.map(|()| ExitCode::SUCCESS),
            args::Command::Server(_) => role::server(config).await.map(|()| ExitCode::SUCCESS),
            args::Command::Worker(_) => role::worker(config).await.map(|()| ExitCode::SUCCESS),
            args::Command::Migrate => migrate::run(&config).await.map(|()| ExitCode::SUCCESS),
            args::Command::Run(command) => run::run(&command).await,
        }
    });
    // A blocking task that hangs must not keep a process that has said goodbye.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    result.unwrap_or_else(|error| report(&error, 1))
}

#[allow(clippy::print_stderr)] // the command line's voice
fn report(error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("sandbar: {error:#}");
    ExitCode::from(code)
}
