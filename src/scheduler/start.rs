//! What running attempts asked to start is seen to by every server, as soon as it hears of it. Each start is taken by one;
//! who dies over it leaves it to be taken again.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::app::App;
use crate::app::signals::Signals;
use crate::store::WorkerStore;

/// How often to look when nothing was heard.
const POLL: Duration = Duration::from_secs(1);

/// See to starts until told to stop.
pub async fn run(store: WorkerStore, app: App, signals: Arc<Signals>, stop: CancellationToken) {
    while !stop.is_cancelled() {
        match app.starts_turn(&store).await {
            Ok(true) => continue,
            Ok(false) => {}
            Err(error) => warn!(%error, "cannot look for starts"),
        }
        tokio::select! {
            () = signals.starts.notified() => {}
            () = tokio::time::sleep(POLL) => {}
            () = stop.cancelled() => {}
        }
    }
}
