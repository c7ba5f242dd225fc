//! What the talk between a worker and its cell costs: CPU per attempt of this side (encoding, decoding, sockets, events) and
//! of the cell's threads that read and write, while attempts that do nothing go through in batches. One line with its goal;
//! asserts nothing about time. See docs/performance.md.
//!
//! `cargo bench -p sandbar-host --bench talk`; some seconds.

#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr)]

mod support;

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::time::{ClockId, clock_gettime};
use sandbar_host::cell::{Cell, CellConfig, CellEvent, CellEvents};
use sandbar_host::outcome::Termination;
use sandbar_host::run::Attempt;

use support::guests::command;
use support::{Bench, attempt, program, quantile, verdict};

/// Attempts of one round.
const ROUND: u64 = 50_000;
/// Rounds; the first is not counted.
const ROUNDS: usize = 8;
/// Attempts in flight.
const IN_FLIGHT: u64 = 256;
/// Slots of the cell.
const SLOTS: u32 = 64;
/// What an attempt's talk should not pass, in microseconds of CPU.
const GOAL_US: f64 = 5.0;

#[tokio::main(worker_threads = 2)]
async fn main() -> ExitCode {
    // `cargo test --benches` runs this without `--bench`: nothing to measure then.
    if !std::env::args().any(|arg| arg == "--bench") {
        return ExitCode::SUCCESS;
    }
    match measure().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("not measured: {err:#}");
            ExitCode::FAILURE
        }
    }
}

async fn measure() -> Result<()> {
    let bench = Bench::new().await?;
    let code = bench.compile(&command("", 1, "")).await?;
    let one = attempt(&code, 1);
    for threads in [1usize, 2] {
        let config = CellConfig { threads, slots: SLOTS, ..CellConfig::new(program()) };
        let (cell, mut events) = Cell::spawn(&config).await.context("a cell")?;
        cell.load(&code).await?;
        let (mut here, mut there, mut sums) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let (own, cells) = (own_us(), talking_us(cell.pid())?);
            through(&cell, &mut events, &one).await?;
            let each = |used: f64| used / ROUND as f64;
            let (own, cells) = (each(own_us() - own), each(talking_us(cell.pid())? - cells));
            if round > 0 {
                here.push(own);
                there.push(cells);
                sums.push(own + cells);
            }
        }
        let sum = quantile(&sums, 0.5);
        println!(
            "talk       {threads} guest thread(s): {:.2} us of CPU per attempt on this side, {:.2} us of the cell's reader and \
             writer; {sum:.2} us in all ({:.2} to {:.2}, {} rounds), goal <= {GOAL_US} us: {}",
            quantile(&here, 0.5),
            quantile(&there, 0.5),
            quantile(&sums, 0.0),
            quantile(&sums, 1.0),
            sums.len(),
            verdict(sum <= GOAL_US),
        );
        cell.kill();
    }
    Ok(())
}

/// Pushes a round of attempts through a cell.
async fn through(cell: &Cell, events: &mut CellEvents, one: &Attempt) -> Result<()> {
    let (mut sent, mut done) = (0, 0);
    while done < ROUND {
        while sent < ROUND && sent - done < IN_FLIGHT {
            cell.submit(sent, one)?;
            sent += 1;
        }
        for event in events.recv_all().await.context("the cell is gone")? {
            match event {
                CellEvent::Finished { outcome, .. } => {
                    ensure!(outcome.termination == Termination::Succeeded, "{:?}", outcome.termination);
                    done += 1;
                }
                other => bail!("{other:?}"),
            }
        }
    }
    Ok(())
}

/// CPU of this process so far.
fn own_us() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 * 1e6 + now.tv_nsec as f64 / 1e3
}

/// Threads of a cell that have no part in the talk: guests, clocks.
const OTHERS: [&str; 3] = ["sandbar-guest", "sandbar-ticker", "sandbar-timer"];

/// CPU so far of the threads of a cell that talk, by the scheduler's own count in nanoseconds.
fn talking_us(pid: u32) -> Result<f64> {
    let mut sum = 0.0;
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path();
        let name = std::fs::read_to_string(thread.join("comm"))?;
        if OTHERS.iter().any(|other| name.starts_with(other)) {
            continue;
        }
        let counted = std::fs::read_to_string(thread.join("schedstat"))
            .context("this kernel counts no CPU of threads")?;
        let ns: f64 = counted.split_ascii_whitespace().next().context("schedstat is empty")?.parse()?;
        sum += ns / 1e3;
    }
    Ok(sum)
}
