//! `sandbar rewrap`: after the master key was replaced.

use super::output::Output;
use crate::config::Config;

/// Wrap all data keys by the configured master key.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let done = crate::server::rewrap(&config).await?;
    let note = if done == 1 { "1 data key is".to_owned() } else { format!("{done} data keys are") };
    Output::new(false).line(format!("{note} wrapped by the current master key now; none needs another"))?;
    Ok(())
}
