//! What may stand on the command line: the list of commands and the options of the roles. Each other command has its
//! options in its own file. Owns names and help texts only.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

use super::audit::Audit;
use super::budget::{Budget, Events};
use super::build::Build;
use super::bulk::{Bulk, Pauses};
use super::cancel::Cancel;
use super::completions::Completions;
use super::config::Config;
use super::dead_letters::DeadLetters;
use super::encryption::{Encryption, Erase, Unseal};
use super::get::Get;
use super::invoke::Invoke;
use super::key::Key;
use super::list::List;
use super::login::{Login, Logout};
use super::logs::Logs;
use super::new::New;
use super::profile::Profile;
use super::push::Push;
use super::quota::Quota;
use super::reference::Reference;
use super::retry::Retry;
use super::run::Run;
use super::secret::Secret as SecretCommand;
use super::tasks::Tasks;
use super::tenant::Tenant;
use super::usage::Usage;
use super::user::User;
use super::versions::Versions;
use super::why::Why;
use super::workers::{Duties, Workers};
use crate::config::{LogFormat, Overrides, Secret};

/// What stands below the commands in `sandbar --help`.
const AFTER: &str = "\
Start here:  sandbar dev                     everything on this machine, in the background of a terminal
             sandbar new hello && cd hello   a task project
             sandbar push                    build and upload it
             sandbar invoke hello --input '{\"name\": \"Ada\"}' --follow

Exit codes:  0 done · 1 failed · 2 usage · 3 not found · 4 denied · 5 server unreachable · 6 refused
             7 time of --wait over · 130 Ctrl-C. Details: docs/cli.md";

/// A fair, metered, durable host for WebAssembly background tasks
#[derive(Debug, Parser)]
#[command(name = "sandbar", version, about, max_term_width = 100, after_help = AFTER)]
#[command(disable_help_subcommand = true, subcommand_value_name = "COMMAND")]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of everything that has a configuration.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Configuration")]
pub struct Settings {
    /// Configuration file [default: sandbar.toml, if there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory for everything kept on this machine [default: .sandbar]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Log lines for people (text) or machines (json)
    #[arg(long, value_name = "FORMAT", value_parser = log_format)]
    log_format: Option<LogFormat>,
    /// What to log: a level, or a list such as `warn,sandbar::worker=debug`
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("use text or json".to_owned()),
    }
}

impl Settings {
    /// As the configuration takes them.
    pub fn overrides(&self) -> Overrides {
        Overrides {
            config_file: self.config.clone(),
            data_dir: self.data_dir.clone(),
            log_format: self.log_format,
            log_filter: self.log.clone(),
            ..Overrides::default()
        }
    }
}

impl Role {
    /// As the configuration takes them.
    pub fn overrides(&self) -> Overrides {
        Overrides {
            database_url: self.database_url.clone().map(Secret::new),
            listen: self.listen,
            slots: self.slots,
            cells: self.cells,
            ..self.settings.overrides()
        }
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)] // one value per process
pub enum Command {
    New(New),
    Build(Build),
    Run(Run),
    Push(Push),
    Invoke(Invoke),
    Get(Get),
    List(List),
    Logs(Logs),
    Cancel(Cancel),
    Retry(Retry),
    Erase(Erase),
    Why(Why),
    Bulk(Bulk),
    Pauses(Pauses),
    DeadLetters(DeadLetters),
    Tasks(Tasks),
    Versions(Versions),
    Quota(Quota),
    Usage(Usage),
    Budget(Budget),
    Events(Events),
    Secret(SecretCommand),
    Encryption(Encryption),
    Profile(Profile),
    Login(Login),
    Logout(Logout),
    Key(Key),
    User(User),
    Tenant(Tenant),
    Audit(Audit),
    Workers(Workers),
    Duties(Duties),
    /// Start everything on this machine: an embedded Postgres, the API, the scheduler and a worker
    Dev(Dev),
    /// Start the API and the scheduler
    Server(Role),
    /// Start a worker
    Worker(Role),
    /// Bring the database schema up to date
    Migrate(Settings),
    /// Wrap the keys of all tenants by the configured master key, after it was replaced
    Rewrap(Settings),
    Unseal(Unseal),
    Config(Config),
    Completions(Completions),
    #[command(hide = true)]
    Reference(Reference),
}

impl Command {
    /// Whether its failures are told in JSON.
    pub fn json(&self) -> bool {
        match self {
            Self::New(c) => c.json(),
            Self::Build(c) => c.json(),
            Self::Run(c) => c.json,
            Self::Push(c) => c.json(),
            Self::Invoke(c) => c.json(),
            Self::Get(c) => c.json(),
            Self::List(c) => c.json(),
            Self::Logs(c) => c.json(),
            Self::Cancel(c) => c.json(),
            Self::Retry(c) => c.json(),
            Self::Erase(c) => c.json(),
            Self::Why(c) => c.json(),
            Self::Bulk(c) => c.json(),
            Self::Pauses(c) => c.json(),
            Self::DeadLetters(c) => c.json(),
            Self::Workers(c) => c.json(),
            Self::Duties(c) => c.json(),
            Self::Tasks(c) => c.json(),
            Self::Versions(c) => c.json(),
            Self::Quota(c) => c.json(),
            Self::Usage(c) => c.json(),
            Self::Budget(c) => c.json(),
            Self::Events(c) => c.json(),
            Self::Secret(c) => c.json(),
            Self::Encryption(c) => c.json(),
            Self::Profile(c) => c.json(),
            Self::Config(c) => c.json(),
            Self::Login(c) => c.json(),
            Self::Logout(c) => c.json(),
            Self::Key(c) => c.json(),
            Self::User(c) => c.json(),
            Self::Tenant(c) => c.json(),
            Self::Audit(c) => c.json(),
            Self::Dev(_)
            | Self::Server(_)
            | Self::Worker(_)
            | Self::Migrate(_)
            | Self::Rewrap(_)
            | Self::Unseal(_)
            | Self::Completions(_)
            | Self::Reference(_) => false,
        }
    }
}

/// Options of `sandbar dev`.
#[derive(Debug, clap::Args)]
pub struct Dev {
    /// Serve HTTPS, with a certificate for this machine made in the data directory
    #[arg(long)]
    pub tls: bool,
    /// Options of both roles.
    #[command(flatten)]
    role: Role,
}

impl Dev {
    /// As the configuration takes them.
    pub fn overrides(&self) -> Overrides {
        self.role.overrides()
    }
}

/// Options of a role.
#[derive(Debug, clap::Args)]
pub struct Role {
    /// Postgres to use, as the owner of the schema (dev: instead of the embedded one)
    #[arg(long, value_name = "URL", env = "SANDBAR_DATABASE__URL", hide_env_values = true)]
    database_url: Option<String>,
    /// Address of the API [default: 127.0.0.1:7260]
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Attempts that run at once in the worker
    #[arg(long, value_name = "N")]
    slots: Option<u32>,
    /// Sandbox processes of the worker
    #[arg(long, value_name = "N")]
    cells: Option<u32>,
    #[command(flatten)]
    settings: Settings,
}
