//! `sandbar dev`: everything on this machine, with an embedded Postgres unless another is named.

use anyhow::Context;

use crate::config::Config;
use crate::dev::EmbeddedPostgres;
use crate::server::{self, Roles, Urls};

pub async fn run(mut config: Config, tls: bool) -> anyhow::Result<()> {
    if tls && config.server.tls_cert.is_none() {
        let (cert, key) = server::local_certificate(&config.data_dir)?;
        config.server.tls_cert = Some(cert);
        config.server.tls_key = Some(key);
    }
    server::make_master_key(&config)?;
    let stop = server::stop_on_signals()?;
    let roles = Roles { server: true, worker: true };
    if let Some(url) = config.database.url.clone() {
        super::role::prepare(&config, url.expose()).await?;
        let urls = Urls {
            api: config.database.api_url.clone().unwrap_or_else(|| url.clone()),
            worker: config.database.worker_url.clone().unwrap_or(url),
        };
        return server::run(&config, &urls, roles, stop).await;
    }

    let postgres = EmbeddedPostgres::start(&config.data_dir).await.context("cannot start Postgres")?;
    let result = async {
        let admin = postgres.admin_url();
        crate::store::migrate(admin.expose(), super::migrate::TIMEOUT).await?;
        postgres.set_role_passwords().await?;
        server::admin_key(&config, admin.expose()).await?;
        let urls = Urls { api: postgres.api_url(), worker: postgres.worker_url() };
        server::run(&config, &urls, roles, stop).await
    }
    .await;
    // Postgres goes last: whatever the roles still had to write has been written.
    let stopped = postgres.stop().await;
    result?;
    stopped.context("Postgres did not stop in order; the next start recovers it")
}
