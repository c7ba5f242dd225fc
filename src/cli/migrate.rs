//! `sandbar migrate`: the schema, and nothing else.

use std::time::Duration;

use anyhow::Context;

use crate::config::Config;

/// How long the migrations may take in all.
pub const TIMEOUT: Duration = Duration::from_secs(300);

pub async fn run(config: &Config) -> anyhow::Result<()> {
    let url = config
        .database
        .url
        .as_ref()
        .context("no database: set database.url in sandbar.toml, or SANDBAR_DATABASE__URL")?;
    crate::store::migrate(url.expose(), TIMEOUT).await
}
