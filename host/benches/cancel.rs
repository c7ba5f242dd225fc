//! How long a cancellation takes to reach a guest, wherever it is: from `cancel` to the event of its end, over a real cell.
//! One line per place with its goal; asserts nothing about time. See docs/performance.md.
//!
//! `cargo bench -p sandbar-host --bench cancel`; half a minute. Two places need guests of tests/guests (`make bench` builds
//! them) and are left out, with a word, where these are not built.

#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr)]

mod support;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use sandbar_host::files::{DEFAULT_SCRATCH_BYTES, Scratch};
use sandbar_host::outcome::Termination;
use sandbar_host::run::{Attempt, Input};
use tokio::time::sleep;

use support::guests::{command, sleep_for};
use support::{Bench, Host, attempt, crowd, quantile, verdict};

/// Cancellations at each place.
const TIMES: usize = 200;
/// Guest threads.
const CORES: usize = 2;
/// Slots of the cell.
const SLOTS: u32 = 256;
/// Endless loops of another tenant, where it is measured beside a crowd.
const HOGS: u64 = 200;
/// What the 99th percentile should not pass, in milliseconds.
const GOAL_MS: f64 = 250.0;

/// Where a guest is when it is cancelled.
struct Place {
    name: &'static str,
    one: Attempt,
    /// It has arrived when the cell asks something on its behalf; otherwise after a few milliseconds.
    asks: bool,
}

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
    let mut host = Host::start(CORES, SLOTS).await?;
    let mut places = Vec::new();
    for (name, wat, memory_bytes) in guests() {
        let code = bench.compile(&wat).await?;
        host.cell.load(&code).await?;
        let mut one = attempt(&code, 1);
        one.limits.memory_bytes = memory_bytes;
        one.options.scratch = Some(Scratch { bytes: DEFAULT_SCRATCH_BYTES, ..Scratch::default() });
        places.push(Place { name, one, asks: false });
    }
    for (name, guest, input) in [
        ("in a host call that is not answered", "starter", r#"{"start": "echo", "times": 1, "with": 1}"#),
        ("in an HTTP request", "fetch", r#"{"url": "http://a.example/"}"#),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(format!("../target/guests/wasm32-wasip2/release/{guest}.wasm"));
        let Ok(wasm) = std::fs::read(&path) else {
            println!("cancel     {name:<37} left out: the guest {guest} is not built (run `make bench`)");
            continue;
        };
        let code = bench.compile_bytes(wasm).await?;
        host.cell.load(&code).await?;
        let mut one = attempt(&code, 1);
        one.input = Input::Task { bytes: input.as_bytes().to_vec() };
        places.push(Place { name, one, asks: true });
    }
    for place in &places {
        let took = cancel(&mut host, place).await?;
        report(place.name, &took);
    }
    if let Some(spinning) = places.first() {
        let mut hogs = crowd(HOGS, |_| Attempt { tenant: 2, ..spinning.one.clone() });
        host.gather(&mut hogs)?;
        let took = cancel(&mut host, spinning).await?;
        host.disperse(&mut hogs).await?;
        report("in an endless loop, beside 200 hogs", &took);
    }
    host.stop().await;
    Ok(())
}

fn guests() -> Vec<(&'static str, String, u64)> {
    const MIB: u64 = 1 << 20;
    let spin = "(loop $l (br $l))";
    vec![
        ("in an endless loop", command("", 1, spin), MIB),
        ("in a start section", command(&format!("(func $begin {spin}) (start $begin)"), 1, ""), MIB),
        ("asleep", command("", 1, &sleep_for(600)), MIB),
        (
            "in file work",
            command(
                r#"(data (i32.const 1024) "file")"#,
                32,
                "(i32.store (i32.const 0) (i32.const 65536))
                 (i32.store (i32.const 4) (i32.const 1048576))
                 (loop $l
                   (call $must (call $open (i32.const 3) (i32.const 1) (i32.const 1024) (i32.const 4)
                     (i32.const 1) (i64.const 66) (i64.const 0) (i32.const 0) (i32.const 512)))
                   (call $must (call $write (i32.load (i32.const 512)) (i32.const 0) (i32.const 1) (i32.const 16)))
                   (call $must (call $close (i32.load (i32.const 512))))
                   (br $l))",
            ),
            4 * MIB,
        ),
        (
            "in memory.fill of 256 MiB",
            command(
                "",
                4_096,
                "(loop $l (memory.fill (i32.const 0) (i32.const 165) (i32.const 268435456)) (br $l))",
            ),
            256 * MIB,
        ),
    ]
}

/// One after the other; how long each took, in milliseconds.
async fn cancel(host: &mut Host, place: &Place) -> Result<Vec<f64>> {
    let mut took = Vec::new();
    // Apart by no multiple of an epoch, so that cancellations fall on all parts of a slice.
    let mut state = 1u64;
    for _ in 0..TIMES {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let token = host.submit(&place.one)?;
        if place.asks {
            host.asked().await?;
        } else {
            sleep(Duration::from_micros(4_000 + (state >> 33) % 5_000)).await;
        }
        let (latency, termination) = host.cancel(token).await?;
        ensure!(termination == Termination::Cancelled, "{}: {termination:?}", place.name);
        took.push(latency.as_secs_f64() * 1e3);
    }
    Ok(took)
}

fn report(place: &str, took: &[f64]) {
    let p99 = quantile(took, 0.99);
    println!(
        "cancel     {place:<37} p50 {:>6.2} p99 {p99:>6.2} most {:>6.2} ms ({} cancellations), goal <= {GOAL_MS} ms: {}",
        quantile(took, 0.5),
        quantile(took, 1.0),
        took.len(),
        verdict(p99 <= GOAL_MS),
    );
}
