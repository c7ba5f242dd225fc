//! What changes without a restart: on SIGHUP the configuration is read again, and what can follow it does. What cannot
//! is named in the log. Owns no setting.

use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::app::App;
use crate::config::Config;
use crate::domain::quota::Defaults;

/// Follow the configuration until `stop`. A configuration that cannot be used changes nothing.
///
/// # Errors
/// The handler cannot be installed.
pub(super) fn on_hangup(
    config: &Config,
    app: Option<App>,
    defaults: Arc<Defaults>,
    stop: CancellationToken,
) -> std::io::Result<tokio::task::JoinHandle<()>> {
    let mut hangup = signal(SignalKind::hangup())?;
    let mut config = config.clone();
    Ok(tokio::spawn(async move {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                received = hangup.recv() => if received.is_none() { return },
            }
            match config.reload() {
                Ok(read) => {
                    apply(&config, &read, app.as_ref());
                    defaults.set(super::http::quotas(&read.quotas));
                    config = read;
                }
                Err(error) => warn!(%error, "the configuration cannot be used; nothing has changed"),
            }
        }
    }))
}

fn apply(old: &Config, new: &Config, app: Option<&App>) {
    if let Err(error) = crate::telemetry::set_filter(&new.log) {
        warn!(%error, "log.filter stays as it is");
    }
    if let Some(app) = app {
        app.set_rates(super::http::rates(&new.rate_limits));
        app.set_default_quotas(super::http::quotas(&new.quotas));
    }
    let mut rest = new.clone();
    // What follows at once, and what says nothing by itself.
    rest.log.filter.clone_from(&old.log.filter);
    rest.rate_limits = old.rate_limits.clone();
    rest.quotas = old.quotas.clone();
    let changed: Vec<&str> = [
        ("data_dir", rest.data_dir != old.data_dir),
        ("database", rest.database != old.database),
        ("server", rest.server != old.server),
        ("secrets", rest.secrets != old.secrets),
        ("worker", rest.worker != old.worker),
        ("egress", rest.egress != old.egress),
        ("capabilities", rest.capabilities != old.capabilities),
        ("scheduler", rest.scheduler != old.scheduler),
        ("compile", rest.compile != old.compile),
        ("log", rest.log != old.log),
    ]
    .into_iter()
    .filter_map(|(name, changed)| changed.then_some(name))
    .collect();
    if changed.is_empty() {
        info!("configuration read again");
    } else {
        warn!("configuration read again; a restart is needed for what changed in: {}", changed.join(", "));
    }
}
