//! The command line: arguments (`args`), then one file per command. Data goes to stdout, everything else to stderr.
//! Owns exit codes; decides nothing about invocations. Commands that talk to a server share `client` (HTTP), `target`
//! (which server, which key), `wait` and `events` (until an invocation ends), `output` and `show` (how things look).

mod args;
mod audit;
mod budget;
mod build;
mod bulk;
mod cancel;
mod client;
mod completions;
mod config;
mod dead_letters;
mod dev;
mod encryption;
mod events;
mod failure;
mod get;
mod invoke;
mod key;
mod list;
mod login;
mod logs;
mod migrate;
mod new;
mod output;
mod poll;
mod profile;
mod profiles;
mod push;
mod quota;
mod reference;
mod retry;
mod rewrap;
mod role;
mod rows;
mod run;
mod secret;
mod show;
mod target;
mod tasks;
mod tenant;
mod usage;
mod user;
mod value;
mod versions;
mod wait;
mod why;
mod workers;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use crate::config::{Config, Log, Overrides};
use args::Command;
use failure::{Exit, Failure, Outcome};
use output::Output;

/// How long a blocking task that hangs may keep a process that has said goodbye.
const SHUTDOWN: Duration = Duration::from_secs(2);

/// Parse the command line and do what it says.
#[must_use]
pub fn main() -> ExitCode {
    let args = args::Args::parse();
    let json = args.command.json();
    match dispatch(args.command) {
        Ok(code) => code,
        Err(failure) => failure.report(json, Output::new(json).colour_err()).into(),
    }
}

fn dispatch(command: Command) -> Result<ExitCode, Failure> {
    let outcome = match command {
        Command::Dev(dev) => serve(&dev.overrides(), async |config| dev::run(config, dev.tls).await),
        Command::Server(role) => serve(&role.overrides(), async |config| role::server(config).await),
        Command::Worker(role) => serve(&role.overrides(), async |config| role::worker(config).await),
        Command::Migrate(settings) => {
            serve(&settings.overrides(), async |config| migrate::run(&config).await)
        }
        Command::Rewrap(settings) => serve(&settings.overrides(), async |config| rewrap::run(config).await),
        Command::Unseal(command) => serve(&command.overrides(), async |config| command.run(config).await),
        Command::Config(command) => command.run(),
        Command::Run(command) => {
            // A tool that prints a result is quiet unless something is wrong.
            let log = Log { filter: "warn".to_owned(), ..Log::default() };
            crate::telemetry::init(&log).map_err(|error| Failure::usage(error.to_string()))?;
            return on_runtime(run::run(&command));
        }
        Command::New(command) => command.run(),
        Command::Build(command) => command.run(),
        Command::Quota(command) => on_runtime(command.run()),
        Command::Usage(command) => on_runtime(command.run()),
        Command::Budget(command) => on_runtime(command.run()),
        Command::Events(command) => on_runtime(command.run()),
        Command::Secret(command) => on_runtime(command.run()),
        Command::Profile(command) => command.run(),
        Command::Completions(command) => command.run(),
        Command::Reference(command) => command.run(),
        Command::Push(command) => on_runtime(command.run()),
        Command::Invoke(command) => on_runtime(command.run()),
        Command::Get(command) => on_runtime(command.run()),
        Command::List(command) => on_runtime(command.run()),
        Command::Logs(command) => on_runtime(command.run()),
        Command::Cancel(command) => on_runtime(command.run()),
        Command::Retry(command) => on_runtime(command.run()),
        Command::Erase(command) => on_runtime(command.run()),
        Command::Encryption(command) => on_runtime(command.run()),
        Command::Why(command) => on_runtime(command.run()),
        Command::Bulk(command) => on_runtime(command.run()),
        Command::Pauses(command) => on_runtime(command.run()),
        Command::DeadLetters(command) => on_runtime(command.run()),
        Command::Workers(command) => on_runtime(command.run()),
        Command::Duties(command) => on_runtime(command.run()),
        Command::Tasks(command) => on_runtime(command.run()),
        Command::Versions(command) => on_runtime(command.run()),
        Command::Login(command) => on_runtime(command.run()),
        Command::Logout(command) => on_runtime(command.run()),
        Command::Key(command) => on_runtime(command.run()),
        Command::Tenant(command) => on_runtime(command.run()),
        Command::User(command) => on_runtime(command.run()),
        Command::Audit(command) => on_runtime(command.run()),
    };
    outcome.map(ExitCode::from)
}

/// A role: with a configuration, with log lines, until it is told to stop.
fn serve(overrides: &Overrides, role: impl AsyncFnOnce(Config) -> anyhow::Result<()>) -> Outcome {
    let config = Config::load(overrides).map_err(|error| Failure::usage(error.to_string()))?;
    crate::telemetry::init(&config.log).map_err(|error| Failure::usage(error.to_string()))?;
    on_runtime(async { Ok(role(config).await.map(|()| Exit::Done)?) })
}

fn on_runtime<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot start the runtime: {error}")))?;
    let result = runtime.block_on(work);
    runtime.shutdown_timeout(SHUTDOWN);
    result
}
