//! What may stand on the command line. Owns names and help texts only.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::config::{LogFormat, Overrides, Secret};

/// A fair, metered, durable host for WebAssembly background tasks.
#[derive(Debug, Parser)]
#[command(name = "sandbar", version, about, max_term_width = 100)]
pub struct Args {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, clap::Args)]
pub struct Global {
    /// Configuration file [default: sandbar.toml, if there is one]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory for everything kept on this machine [default: .sandbar]
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Log lines for people (text) or machines (json)
    #[arg(long, global = true, value_name = "FORMAT", value_parser = log_format)]
    log_format: Option<LogFormat>,
    /// What to log: a level, or a list such as `warn,sandbar::worker=debug`
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("use text or json".to_owned()),
    }
}

impl Global {
    /// These options and those of the command, as the configuration takes them.
    pub fn overrides(&self, command: &Command) -> Overrides {
        let mut overrides = Overrides {
            config_file: self.config.clone(),
            data_dir: self.data_dir.clone(),
            log_format: self.log_format,
            log_filter: self.log.clone(),
            ..Overrides::default()
        };
        let role = match command {
            Command::Dev(role) | Command::Server(role) | Command::Worker(role) => role,
            Command::Migrate => return overrides,
            // A tool that prints a result is quiet unless asked.
            Command::Run(_) => {
                overrides.log_filter.get_or_insert_with(|| "warn".to_owned());
                return overrides;
            }
        };
        overrides.database_url = role.database_url.clone().map(Secret::new);
        overrides.listen = role.listen;
        overrides.slots = role.slots;
        overrides.cells = role.cells;
        overrides
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start everything on this machine: an embedded Postgres, the API, the scheduler and a worker
    Dev(Role),
    /// Start the API and the scheduler
    Server(Role),
    /// Start a worker
    Worker(Role),
    /// Bring the database schema up to date
    Migrate,
    /// Run a .wasm file once in the sandbox, without a server
    Run(Run),
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
}

/// `sandbar run`: one module, one input, the same sandbox and the same receipt as on a worker.
#[derive(Debug, clap::Args)]
pub struct Run {
    /// The module: a task made with the SDK, or any WASI command
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Input of a task: JSON, or @FILE; stdin if neither is given and stdin is not a terminal
    #[arg(long, short, value_name = "JSON|@FILE")]
    pub input: Option<String>,
    /// Variable of a command's environment, NAME=VALUE; may be repeated
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Fuel at most
    #[arg(long, value_name = "N")]
    pub fuel: Option<u64>,
    /// Bytes of memory at most
    #[arg(long, value_name = "BYTES")]
    pub memory_bytes: Option<u64>,
    /// Milliseconds at most
    #[arg(long, value_name = "MS")]
    pub timeout_ms: Option<u64>,
    /// Print outcome, receipt, logs and output as one JSON object
    #[arg(long)]
    pub json: bool,
    /// Arguments of a command
    #[arg(last = true, value_name = "ARGS")]
    pub args: Vec<String>,
}
