//! The same work on Sandbar and on job queues for Postgres, over one Postgres: every figure of the queue that the
//! project promises. Prints one line per figure, `name<TAB>value<TAB>unit`; `scripts/bench-peers.sh` installs the peers
//! and makes a table of the lines. Arguments select sections. Asserts nothing about time.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr
)]

#[path = "../../tests/it/support/mod.rs"]
mod support;

mod deep;
mod drain;
mod enqueue;
mod fair;
mod peer;
mod stage;
mod start;

use std::time::{Duration, Instant};

use stage::Stage;

/// Sections in the order of the table.
const SECTIONS: [&str; 7] = ["drain", "single", "start", "fair", "weights", "deep", "snapshot"];

#[tokio::main]
async fn main() {
    // `cargo test --benches` runs this without `--bench`: nothing to measure then.
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    let asked: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    if let Some(unknown) = asked.iter().find(|a| !SECTIONS.contains(&a.as_str())) {
        eprintln!("no section {unknown}; there are {SECTIONS:?}");
        std::process::exit(2);
    }
    let stage = Stage::build().await;
    for section in SECTIONS {
        if !asked.is_empty() && !asked.iter().any(|a| a == section) {
            continue;
        }
        let began = Instant::now();
        match section {
            "drain" => drain::run(&stage).await,
            "single" => enqueue::run(&stage).await,
            "start" => start::run(&stage).await,
            "fair" => fair::tenants(&stage).await,
            "weights" => fair::weights(&stage).await,
            "deep" => deep::claims(&stage).await,
            _ => deep::snapshot(&stage).await,
        }
        eprintln!("-- {section}: {:.0} s", began.elapsed().as_secs_f64());
    }
    stage.close().await;
}

/// One figure.
fn figure(name: &str, value: f64, unit: &str) {
    println!("{name}\t{value}\t{unit}");
}

/// The value below which a share of the times lies, in milliseconds.
fn quantile(times: &mut [Duration], share: f64) -> f64 {
    times.sort();
    times.get(((times.len().max(1) - 1) as f64 * share) as usize).map_or(f64::NAN, |t| t.as_secs_f64() * 1e3)
}
