//! What neighbours do to each other in a cell, and what keeping them apart costs: a tenant with little to do
//! beside hogs and floods, the throughput given up for fairness, a second guest thread, the longest slice of
//! a guest that resists preemption, and the memory of attempts that sleep. A real child process, the crate's
//! own client, guests in WebAssembly text; no Postgres. One line per figure with its goal; asserts nothing
//! about time. See docs/performance.md.
//!
//! `cargo bench -p sandbar-host --bench neighbours -- [victim] [given-up] [scaling] [slices] [suspended]`;
//! without a name all of them (`SANDBAR_BENCH_BESIDE="log flood"`: of `victim` only that), in less than fifteen minutes.

#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr)]

mod support;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use sandbar_host::cell::MAX_SLOTS;
use sandbar_host::files::{DEFAULT_SCRATCH_BYTES, Scratch};
use sandbar_host::run::Attempt;
use tokio::time::{Instant, timeout_at};

use support::compilations::CompileFlood;
use support::guests::{
    adversaries, command, descriptor_flood, file_flood, log_flood, memory_flood, sleep_for,
};
use support::{Bench, Crowd, Host, Sample, attempt, cpu_s, crowd, latencies, quantile, verdict};

/// Whatever is not measured by then is not measured.
const LONGEST: Duration = Duration::from_secs(895);
/// Guest threads: one for each core of the machine that the goals are meant for.
const CORES: usize = 2;
/// Slots of a cell in which many run.
const SLOTS: u32 = 256;
/// Pairs of a measurement without and one with whatever is measured: the machine drifts slower than a pair
/// lasts.
const PAIRS: usize = 7;
/// Length of one half of a pair: 100 submissions of the victim. Of 40 the 99th percentile would be the maximum.
const HALF: Duration = Duration::from_secs(5);
/// From the start of a crowd until it is measured, so that all of it has begun.
const SETTLE: Duration = Duration::from_millis(300);

/// The tenant whose latency is measured. Tenants of crowds have smaller numbers.
const VICTIM: u64 = 1_000;
/// CPU of the victim's task.
const VICTIM_CPU: Duration = Duration::from_millis(2);
/// Time between two of its submissions.
const VICTIM_EVERY: Duration = Duration::from_millis(50);
/// Endless loops at once.
const HOGS: u64 = 200;
/// Attempts of a flood at once. They end and begin anew, so that what they leave behind is cleared away all
/// the time.
const FLOOD: u64 = 16;

/// Attempts of `given-up`, and the CPU of each.
const SHARED: (u64, Duration) = (32, Duration::from_millis(60));
/// Attempts in flight of `scaling`, and the CPU of each.
const SCALED: (u64, Duration) = (64, Duration::from_millis(1));
/// How long one of its rates is taken.
const SCALED_HALF: Duration = Duration::from_millis(1_500);
/// CPU of the attempt that waits for the slice of another to end.
const LATE_CPU: Duration = Duration::from_micros(100);
/// How long it is measured beside one adversary.
const LATE_LASTING: Duration = Duration::from_millis(2_500);
/// Cells full of sleepers.
const SLEEPING_CELLS: u64 = 5;
/// Sleepers when the first resident size is taken: what only the first attempts cost is not counted.
const FEW: u64 = 10;

#[tokio::main(worker_threads = 2)]
async fn main() -> ExitCode {
    // `cargo test --benches` runs this without `--bench`: nothing to measure then.
    let args: Vec<String> = std::env::args().skip(1).collect();
    if !args.iter().any(|arg| arg == "--bench") {
        return ExitCode::SUCCESS;
    }
    let all = ["victim", "given-up", "scaling", "slices", "suspended"];
    let named: Vec<&str> = args.iter().map(String::as_str).filter(|arg| !arg.starts_with('-')).collect();
    if let Some(unknown) = named.iter().find(|name| !all.contains(name)) {
        eprintln!("no section {unknown}; there are {}", all.join(", "));
        return ExitCode::FAILURE;
    }
    let until = Instant::now() + LONGEST;
    let bench = match timeout_at(until, Bench::new()).await {
        Ok(Ok(bench)) => bench,
        Ok(Err(err)) => {
            eprintln!("nothing was measured: {err:#}");
            return ExitCode::FAILURE;
        }
        Err(_) => return ExitCode::SUCCESS,
    };
    let mut code = ExitCode::SUCCESS;
    for name in all.into_iter().filter(|name| named.is_empty() || named.contains(name)) {
        // Boxed: one of them at a time, and none small.
        let section = async {
            match name {
                "victim" => Box::pin(victim(&bench)).await,
                "given-up" => Box::pin(given_up(&bench)).await,
                "scaling" => Box::pin(scaling(&bench)).await,
                "slices" => Box::pin(slices(&bench)).await,
                _ => Box::pin(suspended(&bench)).await,
            }
        };
        // A section that is dropped takes its cells with it: they end with their sockets.
        match timeout_at(until, section).await {
            Ok(Ok(())) => {}
            Ok(Err(err)) => {
                eprintln!("{name}: not measured: {err:#}");
                code = ExitCode::FAILURE;
            }
            Err(_) => println!("{name:<10} not finished: {} s are over", LONGEST.as_secs()),
        }
    }
    code
}

// The sections.

/// What the victim is measured beside.
struct Beside {
    name: &'static str,
    /// What the median of p99 with / alone should not pass.
    goal: f64,
    crowd: Crowd,
    /// Besides the crowd, which is empty then.
    compilations: Option<CompileFlood>,
}

/// From the submission of a small task to its end event, alone and beside a crowd.
async fn victim(bench: &Bench) -> Result<()> {
    let small = bench.burn(VICTIM_CPU).await?;
    let spin = bench.compile(&command("", 1, "(loop $l (br $l))")).await?;
    let log = bench.compile(&log_flood()).await?;
    let memory = bench.compile(&memory_flood()).await?;
    let files = bench.compile(&file_flood()).await?;
    let descriptors = bench.compile(&descriptor_flood()).await?;
    let mut host = Host::start(CORES, SLOTS).await?;
    for code in [&small, &spin, &log, &memory, &files, &descriptors] {
        host.cell.load(code).await?;
    }
    let scratch = |mut one: Attempt| {
        one.options.scratch = Some(Scratch { bytes: DEFAULT_SCRATCH_BYTES, ..Scratch::default() });
        one
    };
    let beside = |name, goal, crowd| Beside { name, goal, crowd, compilations: None };
    let all = [
        beside("200 hogs of 1 tenant", 1.2, crowd(HOGS, |_| attempt(&spin, 1))),
        beside("200 hogs of 10 tenants", 1.3, crowd(HOGS, |n| attempt(&spin, n % 10))),
        beside("log flood", 1.5, crowd(FLOOD, |_| attempt(&log, 1))),
        beside("memory flood", 1.5, crowd(FLOOD, |_| attempt(&memory, 1))),
        beside("file flood", 1.5, crowd(FLOOD, |_| scratch(attempt(&files, 1)))),
        beside("descriptor flood", 1.5, crowd(FLOOD, |_| scratch(attempt(&descriptors, 1)))),
        Beside { compilations: Some(CompileFlood::new()?), ..beside("compile flood", 1.5, Crowd::default()) },
    ];
    let one = attempt(&small, VICTIM);
    host.watch(&one, &mut Crowd::default(), SETTLE, || VICTIM_EVERY).await?;
    // One of them alone, by a part of its name: to try something out.
    let only = std::env::var("SANDBAR_BENCH_BESIDE").unwrap_or_default();
    for beside in all.into_iter().filter(|beside| beside.name.contains(&only)) {
        measure_beside(&mut host, &one, beside).await?;
    }
    host.stop().await;
    Ok(())
}

/// One line of `victim`.
async fn measure_beside(host: &mut Host, one: &Attempt, beside: Beside) -> Result<()> {
    let Beside { name, goal, mut crowd, compilations } = beside;
    let (mut alone, mut with, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let (mut wall_s, mut cell_s, mut own_s, mut victim_ms) = (0.0, 0.0, 0.0, 0.0);
    let mut inside = Vec::new();
    for _ in 0..PAIRS {
        let before = host.watch(one, &mut Crowd::default(), HALF, || VICTIM_EVERY).await?;
        host.gather(&mut crowd)?;
        let flooding = compilations.as_ref().map(CompileFlood::begin).transpose()?;
        host.watch(one, &mut crowd, SETTLE, || VICTIM_EVERY).await?;
        let (began, cell, own) = (Instant::now(), host.cpu_s()?, cpu_s(std::process::id())?);
        let during = host.watch(one, &mut crowd, HALF, || VICTIM_EVERY).await?;
        wall_s += began.elapsed().as_secs_f64();
        cell_s += host.cpu_s()? - cell;
        own_s += cpu_s(std::process::id())? - own;
        victim_ms += during.iter().map(|sample| sample.cpu_ms).sum::<f64>();
        inside.extend(during.iter().map(|sample| sample.wall_ms));
        if let Some(flooding) = flooding {
            flooding.end().await?;
        }
        host.disperse(&mut crowd).await?;
        let (before, during) = (latencies(&before), latencies(&during));
        ratios.push(quantile(&during, 0.99) / quantile(&before, 0.99));
        alone.extend(before);
        with.extend(during);
    }
    let ratio = quantile(&ratios, 0.5);
    let [alone_p99, with_p99] = [&alone, &with].map(|all| quantile(all, 0.99));
    println!(
        "victim     {name:<23} alone p50 {:>6.2} p99 {alone_p99:>6.2} ms, with p50 {:>6.2} p99 {with_p99:>6.2} ms \
         (p99 {:.2} from its first poll to its end); p99 with / alone {ratio:.2} ({:.2} to {:.2}, \
         {PAIRS} pairs; {:.2} of all samples together), goal <= {goal}: {}; \
         CPUs: cell {:.2}, of it the victim {:.3}, this side {:.2}{}{}",
        quantile(&alone, 0.5),
        quantile(&with, 0.5),
        quantile(&inside, 0.99),
        quantile(&ratios, 0.0),
        quantile(&ratios, 1.0),
        with_p99 / alone_p99,
        verdict(ratio <= goal),
        // Less than all cores: the machine was not quiet. A victim that wants more than its share of what
        // is left waits by right.
        cell_s / wall_s,
        victim_ms / 1e3 / wall_s,
        own_s / wall_s,
        compilations.map_or_else(String::new, |flood| flood.report()),
        crowd.complaint(),
    );
    Ok(())
}

/// The same work of many tenants and of one: every attempt has a fixed number of iterations, so the times
/// compare.
async fn given_up(bench: &Bench) -> Result<()> {
    let (count, cpu) = SHARED;
    let code = bench.burn(cpu).await?;
    let mut host = Host::start(CORES, SLOTS).await?;
    host.cell.load(&code).await?;
    let of = |tenants: u64| -> Vec<Attempt> { (0..count).map(|n| attempt(&code, n % tenants)).collect() };
    let (one, many) = (of(1), of(count / 2));
    let (mut wall, mut charged) = (Vec::new(), Vec::new());
    for pair in 0..PAIRS {
        // Whoever is first in one pair is second in the next.
        let (one, many) = if pair % 2 == 0 {
            let one = host.batch(&one).await?;
            (one, host.batch(&many).await?)
        } else {
            let many = host.batch(&many).await?;
            (host.batch(&one).await?, many)
        };
        wall.push(100.0 * (1.0 - one.wall_s / many.wall_s));
        charged.push(100.0 * (1.0 - one.cpu_s / many.cpu_s));
    }
    host.stop().await;
    let given = quantile(&wall, 0.5);
    println!(
        "given-up   {count} attempts of {} tenants against 1 tenant: {given:.1} % of iterations per second \
         ({:.1} to {:.1}, {PAIRS} pairs), {:.1} % of iterations per CPU second of the receipts; \
         goal <= 2 %: {}",
        count / 2,
        quantile(&wall, 0.0),
        quantile(&wall, 1.0),
        quantile(&charged, 0.5),
        verdict(given <= 2.0),
    );
    Ok(())
}

/// Short attempts with one guest thread and with two, each in a cell of its own; the other cell is idle
/// meanwhile.
async fn scaling(bench: &Bench) -> Result<()> {
    let (in_flight, cpu) = SCALED;
    let code = bench.burn(cpu).await?;
    let one = attempt(&code, 1);
    let mut single = Host::start(1, SLOTS).await?;
    let mut double = Host::start(CORES, SLOTS).await?;
    for host in [&mut single, &mut double] {
        host.cell.load(&code).await?;
        host.rate(&one, in_flight, SETTLE).await?;
    }
    let (mut with_one, mut with_two, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let slow = single.rate(&one, in_flight, SCALED_HALF).await?;
        let fast = double.rate(&one, in_flight, SCALED_HALF).await?;
        ratios.push(fast / slow);
        with_one.push(slow);
        with_two.push(fast);
    }
    single.stop().await;
    double.stop().await;
    let ratio = quantile(&ratios, 0.5);
    println!(
        "scaling    attempts of 1 ms of CPU: 1 thread {:.0} /s, 2 threads {:.0} /s; {ratio:.2} times \
         ({:.2} to {:.2}, {PAIRS} pairs), goal >= 1.8: {}",
        quantile(&with_one, 0.5),
        quantile(&with_two, 0.5),
        quantile(&ratios, 0.0),
        quantile(&ratios, 1.0),
        verdict(ratio >= 1.8),
    );
    Ok(())
}

/// How late an attempt is first polled while the only guest thread runs an adversary of another tenant.
/// Nothing in a receipt tells the length of a slice, so this stands for it: the time from submission to end
/// event less the wall time of the receipt, which begins with the first poll. What is left without an
/// adversary is the way there and back.
async fn slices(bench: &Bench) -> Result<()> {
    println!(
        "slices     no receipt tells a slice: instead, on 1 thread, the lateness of a second \
         tenant's attempt of 100 us"
    );
    let quick = bench.burn(LATE_CPU).await?;
    let one = attempt(&quick, VICTIM);
    let mut host = Host::start(1, SLOTS).await?;
    host.cell.load(&quick).await?;
    // Apart by no multiple of an epoch, so that submissions fall on all parts of a slice.
    let mut state = 1u64;
    let mut every = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Duration::from_micros(3_000 + (state >> 33) % 5_000)
    };
    let alone = host.watch(&one, &mut Crowd::default(), LATE_LASTING, &mut every).await?;
    report_lateness("nothing else", &alone, None, "");
    for adversary in adversaries() {
        let code = match bench.compile(&adversary.wat).await {
            Ok(code) => code,
            Err(err) => {
                println!("slices     {:<37} is not compiled: {err:#}", adversary.name);
                continue;
            }
        };
        host.cell.load(&code).await?;
        let mut crowd = crowd(1, |_| {
            let mut one = attempt(&code, 1);
            one.limits.memory_bytes = adversary.memory_bytes;
            one
        });
        host.gather(&mut crowd)?;
        host.watch(&one, &mut crowd, SETTLE, &mut every).await?;
        let (began, cpu_s) = (Instant::now(), host.cpu_s()?);
        let late = host.watch(&one, &mut crowd, LATE_LASTING, &mut every).await?;
        let cpus = (host.cpu_s()? - cpu_s) / began.elapsed().as_secs_f64();
        host.disperse(&mut crowd).await?;
        report_lateness(adversary.name, &late, Some(cpus), &crowd.complaint());
    }
    host.stop().await;
    Ok(())
}

/// `cpus` should be 1: with less, the machine was not quiet.
fn report_lateness(beside: &str, samples: &[Sample], cpus: Option<f64>, complaint: &str) {
    let late: Vec<f64> = samples.iter().map(|sample| sample.latency_ms - sample.wall_ms).collect();
    let p99 = quantile(&late, 0.99);
    let cpus = cpus.map_or_else(String::new, |cpus| format!("; CPUs meanwhile {cpus:.2}"));
    println!(
        "slices     {beside:<37} late p50 {:>6.2} p99 {p99:>6.2} most {:>6.2} ms ({} submissions), \
         goal <= 3 ms: {}{cpus}{complaint}",
        quantile(&late, 0.5),
        quantile(&late, 1.0),
        late.len(),
        verdict(p99 <= 3.0),
    );
}

/// Resident memory of a cell per attempt that sleeps.
async fn suspended(bench: &Bench) -> Result<()> {
    let code = bench.compile(&command("", 1, &sleep_for(600))).await?;
    let mut one = attempt(&code, 1);
    one.limits.memory_bytes = 2 << 20;
    let all = u64::from(MAX_SLOTS);
    let mut hosts = Vec::new();
    let mut each = Vec::new();
    for _ in 0..SLEEPING_CELLS {
        let mut host = Host::start(1, MAX_SLOTS).await?;
        host.cell.load(&code).await?;
        for _ in 0..FEW {
            host.submit(&one)?;
        }
        let few = host.settled_kib().await?;
        for _ in FEW..all {
            host.submit(&one)?;
        }
        let many = host.settled_kib().await?;
        ensure!(host.cell.in_flight() as u64 == all, "sleepers ended: {}", host.ended().await?.1);
        each.push((many - few) / (all - FEW) as f64);
        hosts.push(host);
    }
    let live: usize = hosts.iter().map(|host| host.cell.in_flight()).sum();
    // Cancelled rather than killed with their cell, so that a cell that cannot end them is noticed.
    for mut host in hosts {
        host.end_all().await?;
        host.stop().await;
    }
    let worst = quantile(&each, 1.0);
    println!(
        "suspended  {live} at once in {SLEEPING_CELLS} cells of {all} slots, the most of a cell: {:.1} KiB \
         resident each ({:.1} to {worst:.1} by cell), goal <= 64 KiB: {}",
        quantile(&each, 0.5),
        quantile(&each, 0.0),
        verdict(worst <= 64.0),
    );
    Ok(())
}
