//! The peers as processes, each with its own client library and runtime.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

use crate::stage::Stage;

/// Longest measurement of a peer.
const LIMIT: Duration = Duration::from_secs(180);

/// Who is measured beside us, and how they are started.
pub const PEERS: [&str; 2] = ["graphile", "pgqueuer"];

/// Runs one measurement of a peer on a database of its own. `None`, with the reason on standard error, when it fails.
pub async fn measure(stage: &Stage, peer: &str, arguments: &[&str]) -> Option<Value> {
    let Some(home) = std::env::var_os("SANDBAR_PEERS").map(PathBuf::from) else {
        eprintln!("{peer} is not installed: start this by scripts/bench-peers.sh");
        return None;
    };
    let mut command = match peer {
        "graphile" => {
            let mut command = Command::new("node");
            command.arg(home.join("node/graphile.mjs"));
            command
        }
        _ => {
            let mut command = Command::new(home.join("python/bin/python"));
            command.arg(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/peers/pgqueuer_peer.py"));
            command
        }
    };
    command.args(arguments).envs(stage.peer(peer).await).kill_on_drop(true);
    let output = match tokio::time::timeout(LIMIT, command.output()).await {
        Ok(output) => output.unwrap(),
        Err(_) => {
            eprintln!("{peer} {arguments:?}: not done in {LIMIT:?}");
            return None;
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let answer = text.lines().rev().find_map(|line| serde_json::from_str::<Value>(line).ok());
    if answer.is_none() {
        let log = String::from_utf8_lossy(&output.stderr);
        eprintln!("{peer} {arguments:?}: {}\n{text}\n{log}", output.status);
    }
    answer
}
