//! The queue protocol under a virtual clock, thousands of seeds in seconds; the same protocol on a real Postgres, step
//! by step beside the model that the simulation runs on; and the proof that both notice when a safeguard is missing.
//!
//! A failing seed is printed; `SANDBAR_SIM_SEED=<seed>` runs that one alone, `SANDBAR_SIM_SEEDS=<n>` so many.

mod differential;
mod model;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use model::Sabotage;

/// Seeds of a test run.
const SEEDS: u64 = 2_000;
/// Seeds after which a missing safeguard must have been noticed.
const SABOTAGED: u64 = 400;
/// The longest a simulation may go on, however slow the machine: what it covered until then counts.
const TIME: Duration = Duration::from_secs(20);
/// Below this the run proves too little to pass, even on a machine that does ten other things.
const LEAST: u64 = 100;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

#[test]
fn the_protocol_holds_for_thousands_of_seeds() {
    if let Some(seed) = number("SANDBAR_SIM_SEED") {
        if let Err(violation) = world::run(seed, Sabotage::None) {
            panic!("{violation}");
        }
        return;
    }
    let seeds = number("SANDBAR_SIM_SEEDS").unwrap_or(SEEDS);
    let first = u64::from(rand::random::<u32>());
    let (began, next) = (Instant::now(), AtomicU64::new(0));
    let lane = || {
        let (mut run, mut starts, mut handed_on) = (0, 0, 0);
        while began.elapsed() < TIME {
            let n = next.fetch_add(1, Ordering::Relaxed);
            if n >= seeds {
                break;
            }
            let seed = first + n;
            match world::run(seed, Sabotage::None) {
                Ok(world) => {
                    starts += world.starts;
                    handed_on += world.handed_on;
                }
                Err(violation) => return Err(format!("SANDBAR_SIM_SEED={seed}: {violation}")),
            }
            run += 1;
        }
        Ok((run, starts, handed_on))
    };
    let lanes: Vec<Result<(u64, usize, i64), String>> = std::thread::scope(|scope| {
        let other = scope.spawn(lane);
        vec![lane(), other.join().unwrap()]
    });
    let (mut run, mut starts, mut handed_on) = (0, 0, 0);
    for lane in lanes {
        let of = lane.unwrap_or_else(|violation| panic!("{violation}"));
        (run, starts, handed_on) = (run + of.0, starts + of.1, handed_on + of.2);
    }
    eprintln!("simulation: {run} seeds from {first}, {starts} starts, {handed_on} attempts handed on");
    assert!(run >= LEAST.min(seeds), "only {run} seeds in {TIME:?}");
    assert!(starts > 0 && handed_on > 0, "nothing happened");
}

/// How many seeds it takes to notice, and what is noticed.
fn noticed(sabotage: Sabotage) -> Option<(u64, String)> {
    (0..SABOTAGED).find_map(|seed| world::run(seed, sabotage).err().map(|violation| (seed + 1, violation)))
}

#[test]
fn a_missing_fence_is_noticed() {
    let (seeds, violation) = noticed(Sabotage::Fence).expect("acks without the fence go unnoticed");
    eprintln!("no fence: noticed after {seeds} seeds: {violation}");
    assert!(violation.contains("accepted") || violation.contains("ended twice"), "{violation}");
}

#[test]
fn a_missing_epoch_check_is_noticed() {
    let (seeds, violation) = noticed(Sabotage::Epoch).expect("claims under an old epoch go unnoticed");
    eprintln!("no epoch: noticed after {seeds} seeds: {violation}");
}

#[test]
fn a_missing_cap_is_noticed() {
    let (seeds, violation) = noticed(Sabotage::Cap).expect("claims beyond the cap go unnoticed");
    eprintln!("no cap: noticed after {seeds} seeds: {violation}");
    assert!(violation.contains("cap"), "{violation}");
}

#[test]
fn a_worker_that_does_not_watch_its_own_clock_is_noticed() {
    let (seeds, violation) =
        noticed(Sabotage::Clock).expect("workers that trust their lease blindly go unnoticed");
    eprintln!("no clock: noticed after {seeds} seeds: {violation}");
    assert!(violation.contains("while attempt"), "{violation}");
}

#[test]
fn work_that_a_lost_answer_strands_is_noticed() {
    let (seeds, violation) = noticed(Sabotage::Stranded).expect("stranded work goes unnoticed");
    eprintln!("stranded: noticed after {seeds} seeds: {violation}");
    assert!(violation.contains("not ended"), "{violation}");
}
