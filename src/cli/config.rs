//! `sandbar config`: check and show the configuration, without starting anything.

use super::args::Settings;
use super::failure::{Exit, Failure, Outcome};
use super::output::Output;
use crate::config::Config as Configuration;

/// Check and show the configuration
#[derive(Debug, clap::Args)]
pub struct Config {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Read every source and say whether a server or worker could start with it
    Check {
        #[command(flatten)]
        settings: Settings,
        /// Print JSON
        #[arg(long, help_heading = "Output")]
        json: bool,
    },
    /// Print what holds, defaults included; secrets are masked
    Show {
        #[command(flatten)]
        settings: Settings,
        /// Print JSON
        #[arg(long, help_heading = "Output")]
        json: bool,
    },
}

impl Config {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        let (What::Check { json, .. } | What::Show { json, .. }) = &self.what;
        *json
    }

    /// Does it.
    pub fn run(&self) -> Outcome {
        let output = Output::new(self.json());
        let (What::Check { settings, .. } | What::Show { settings, .. }) = &self.what;
        let config =
            Configuration::load(&settings.overrides()).map_err(|error| Failure::usage(error.to_string()))?;
        match &self.what {
            What::Check { .. } => {
                crate::server::check(&config).map_err(|error| Failure::usage(format!("{error:#}")))?;
                if output.json {
                    output.document(&serde_json::json!({ "valid": true }))?;
                } else {
                    output.line("the configuration can be used")?;
                }
            }
            What::Show { .. } if output.json => output.document(&config)?,
            What::Show { .. } => {
                let text = toml::to_string(&config).map_err(|error| Failure::new(Exit::Failed, error))?;
                output.bytes(text.as_bytes())?;
            }
        }
        Ok(Exit::Done)
    }
}
