//! `sandbar server` and `sandbar worker`: one role against an existing Postgres.

use anyhow::Context;

use crate::config::Config;
use crate::server::{self, Roles, Urls};

/// The API and the scheduler. Brings the schema up to date when it may.
pub async fn server(config: Config) -> anyhow::Result<()> {
    let urls = urls(&config)?;
    if let Some(url) = &config.database.url {
        prepare(&config, url.expose()).await?;
    }
    let stop = server::stop_on_signals()?;
    server::run(&config, &urls, Roles { server: true, worker: false }, stop).await
}

/// The schema as this version wants it, and a key to get in with.
pub async fn prepare(config: &Config, admin_url: &str) -> anyhow::Result<()> {
    crate::store::patiently(config.database.start_timeout(), async || {
        crate::store::migrate(admin_url, super::migrate::TIMEOUT).await?;
        server::admin_key(config, admin_url).await
    })
    .await
}

/// A worker.
pub async fn worker(config: Config) -> anyhow::Result<()> {
    let urls = urls(&config)?;
    let stop = server::stop_on_signals()?;
    server::run(&config, &urls, Roles { server: false, worker: true }, stop).await
}

/// The URL of each role; the owner's serves for both, with the role set at connection, if no other is given.
fn urls(config: &Config) -> anyhow::Result<Urls> {
    let database = &config.database;
    let pick = |own: &Option<crate::config::Secret>, name: &str| {
        own.clone().or_else(|| database.url.clone()).with_context(|| {
            format!(
                "no database: set database.url or database.{name} in sandbar.toml, or SANDBAR_DATABASE__URL"
            )
        })
    };
    Ok(Urls { api: pick(&database.api_url, "api_url")?, worker: pick(&database.worker_url, "worker_url")? })
}
