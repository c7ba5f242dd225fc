//! What neighbours do to each other in a cell, and what keeping them apart costs: a tenant with little to do
//! beside hogs and floods, the throughput given up for fairness, a second guest thread, the longest slice of
//! a guest that resists preemption, and the memory of attempts that sleep. A real child process, the crate's
//! own client, guests in WebAssembly text; no Postgres. One line per figure with its goal; asserts nothing
//! about time. See docs/performance.md.
//!
//! `cargo bench -p sandbar-host --bench neighbours -- [victim] [given-up] [scaling] [slices] [suspended]`;
//! without a name all of them, in less than four minutes.

#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr)]

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use sandbar_host::artifact::{Artifact, ArtifactCache, ArtifactKey};
use sandbar_host::cell::{CancelReason, Cell, CellConfig, CellEvent, CellEvents, MAX_SLOTS};
use sandbar_host::compile::CompileLimits;
use sandbar_host::files::{DEFAULT_SCRATCH_BYTES, Scratch};
use sandbar_host::limits::Limits;
use sandbar_host::outcome::{Outcome, Termination};
use sandbar_host::run::{Attempt, Context, Input, Options};
use sandbar_host::{Compiler, ModuleHash};
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// Whatever is not measured by then is not measured.
const LONGEST: Duration = Duration::from_secs(238);
/// Longest wait for one event that must come.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest compilation of one guest; the largest takes a third of it on a quiet machine.
const COMPILE_WALL: Duration = Duration::from_secs(15);
/// Guest threads: one for each core of the machine that the goals are meant for.
const CORES: usize = 2;
/// Slots of a cell in which many run.
const SLOTS: u32 = 256;
/// Pairs of a measurement without and one with whatever is measured: the machine drifts slower than a pair
/// lasts.
const PAIRS: usize = 5;
/// Length of one half of a pair.
const HALF: Duration = Duration::from_secs(2);
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

/// From the submission of a small task to its end event, alone and beside a crowd.
async fn victim(bench: &Bench) -> Result<()> {
    let small = bench.burn(VICTIM_CPU).await?;
    let spin = bench.compile(&command("", 1, "(loop $l (br $l))")).await?;
    let log = bench.compile(&log_flood()).await?;
    let memory = bench.compile(&memory_flood()).await?;
    let files = bench.compile(&file_flood()).await?;
    let mut host = Host::start(CORES, SLOTS).await?;
    for code in [&small, &spin, &log, &memory, &files] {
        host.cell.load(code).await?;
    }
    let scratch = |mut one: Attempt| {
        one.options.scratch = Some(Scratch { bytes: DEFAULT_SCRATCH_BYTES, ..Scratch::default() });
        one
    };
    let crowds = [
        ("200 hogs of 1 tenant", 1.2, crowd(HOGS, |_| attempt(&spin, 1))),
        ("200 hogs of 10 tenants", 1.3, crowd(HOGS, |n| attempt(&spin, n % 10))),
        ("log flood", 1.5, crowd(FLOOD, |_| attempt(&log, 1))),
        ("memory flood", 1.5, crowd(FLOOD, |_| attempt(&memory, 1))),
        ("file flood", 1.5, crowd(FLOOD, |_| scratch(attempt(&files, 1)))),
    ];
    let one = attempt(&small, VICTIM);
    host.watch(&one, &mut Crowd::default(), SETTLE, || VICTIM_EVERY).await?;
    for (name, goal, mut crowd) in crowds {
        let (mut alone, mut with, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        let (mut wall_s, mut cell_s, mut own_s, mut victim_ms) = (0.0, 0.0, 0.0, 0.0);
        let mut inside = Vec::new();
        for _ in 0..PAIRS {
            let before = host.watch(&one, &mut Crowd::default(), HALF, || VICTIM_EVERY).await?;
            host.gather(&mut crowd)?;
            host.watch(&one, &mut crowd, SETTLE, || VICTIM_EVERY).await?;
            let (began, cell, own) = (Instant::now(), host.cpu_s()?, cpu_s(std::process::id())?);
            let beside = host.watch(&one, &mut crowd, HALF, || VICTIM_EVERY).await?;
            wall_s += began.elapsed().as_secs_f64();
            cell_s += host.cpu_s()? - cell;
            own_s += cpu_s(std::process::id())? - own;
            victim_ms += beside.iter().map(|sample| sample.cpu_ms).sum::<f64>();
            inside.extend(beside.iter().map(|sample| sample.wall_ms));
            host.disperse(&mut crowd).await?;
            let (before, beside) = (latencies(&before), latencies(&beside));
            ratios.push(quantile(&beside, 0.99) / quantile(&before, 0.99));
            alone.extend(before);
            with.extend(beside);
        }
        let ratio = quantile(&ratios, 0.5);
        println!(
            "victim     {name:<23} alone p50 {:>6.2} p99 {:>6.2} ms, with p50 {:>6.2} p99 {:>6.2} ms \
             (p99 {:.2} from its first poll to its end); p99 with / alone {ratio:.2} ({:.2} to {:.2}, \
             {PAIRS} pairs), goal <= {goal}: {}; \
             CPUs: cell {:.2}, of it the victim {:.3}, this side {:.2}{}",
            quantile(&alone, 0.5),
            quantile(&alone, 0.99),
            quantile(&with, 0.5),
            quantile(&with, 0.99),
            quantile(&inside, 0.99),
            quantile(&ratios, 0.0),
            quantile(&ratios, 1.0),
            verdict(ratio <= goal),
            // Less than all cores: the machine was not quiet. A victim that wants more than its share of what
            // is left waits by right.
            cell_s / wall_s,
            victim_ms / 1e3 / wall_s,
            own_s / wall_s,
            crowd.complaint(),
        );
    }
    host.stop().await;
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

// The cell and what is in it.

/// A cell, and what this side knows of it.
struct Host {
    cell: Cell,
    events: CellEvents,
    /// The next token.
    next: u64,
    /// In the cell.
    live: HashMap<u64, Instant>,
}

/// One attempt of the victim that succeeded.
struct Sample {
    /// From its submission to its end event.
    latency_ms: f64,
    /// From its first poll to its end, by its receipt.
    wall_ms: f64,
    /// By its receipt.
    cpu_ms: f64,
}

/// What a batch took.
struct Batch {
    wall_s: f64,
    cpu_s: f64,
}

/// Attempts beside the one that is measured. Whichever ends is submitted again.
#[derive(Default)]
struct Crowd {
    attempts: Vec<Attempt>,
    live: HashMap<u64, usize>,
    /// Those that ended in another way than by success, and the first such way.
    failed: Option<(u64, String)>,
}

impl Crowd {
    /// Something to add to a line whose crowd was not what it should be.
    fn complaint(&self) -> String {
        self.failed.as_ref().map_or_else(String::new, |(n, how)| format!(" ({n} of the crowd ended: {how})"))
    }
}

fn crowd(count: u64, one: impl Fn(u64) -> Attempt) -> Crowd {
    Crowd { attempts: (0..count).map(one).collect(), ..Crowd::default() }
}

impl Host {
    async fn start(threads: usize, slots: u32) -> Result<Self> {
        let config = CellConfig { threads, slots, ..CellConfig::new(program()) };
        let (cell, events) = Cell::spawn(&config).await.context("a cell")?;
        Ok(Self { cell, events, next: 0, live: HashMap::new() })
    }

    /// Kills the cell and waits until it is collected.
    async fn stop(mut self) {
        self.cell.kill();
        let gone = async { while self.events.recv().await.is_some() {} };
        let _ = timeout(PATIENCE, gone).await;
    }

    fn submit(&mut self, attempt: &Attempt) -> Result<u64> {
        let token = self.next;
        self.next += 1;
        // Before the submission, which encodes the attempt.
        let at = Instant::now();
        self.cell.submit(token, attempt)?;
        self.live.insert(token, at);
        Ok(token)
    }

    /// The next end, or none when it has not come until then.
    async fn end_until(&mut self, until: Instant) -> Result<Option<(u64, Duration, Outcome)>> {
        loop {
            match timeout_at(until, self.events.recv()).await {
                Err(_) => return Ok(None),
                Ok(Some(CellEvent::Finished { token, outcome })) => {
                    let sent = self.live.remove(&token).context("an end that nobody waits for")?;
                    return Ok(Some((token, sent.elapsed(), *outcome)));
                }
                Ok(Some(CellEvent::Gone { reason })) => bail!("the cell is gone: {reason}"),
                Ok(None) => bail!("the cell is gone"),
                Ok(Some(_)) => {}
            }
        }
    }

    /// The next end, and how it was.
    async fn ended(&mut self) -> Result<(Outcome, String)> {
        let end = self.end_until(Instant::now() + PATIENCE).await?;
        let (_, _, outcome) = end.context("no attempt ended in time")?;
        let how = format!("{:?}", outcome.termination);
        Ok((outcome, how))
    }

    fn gather(&mut self, crowd: &mut Crowd) -> Result<()> {
        for (which, attempt) in crowd.attempts.iter().enumerate() {
            crowd.live.insert(self.submit(attempt)?, which);
        }
        Ok(())
    }

    async fn disperse(&mut self, crowd: &mut Crowd) -> Result<()> {
        crowd.live.clear();
        self.end_all().await
    }

    /// Cancels everything and waits for it.
    async fn end_all(&mut self) -> Result<()> {
        for token in self.live.keys() {
            self.cell.cancel(*token, CancelReason::Cancelled);
        }
        while !self.live.is_empty() {
            self.ended().await?;
        }
        Ok(())
    }

    /// Submits `one` again and again, whether the one before has ended or not, and waits for all of them at
    /// the end.
    async fn watch(
        &mut self,
        one: &Attempt,
        crowd: &mut Crowd,
        lasting: Duration,
        mut every: impl FnMut() -> Duration,
    ) -> Result<Vec<Sample>> {
        let mut samples = Vec::new();
        let mut due = Instant::now();
        let end = due + lasting;
        let mut sent = 0;
        loop {
            let open = due < end;
            if open && Instant::now() >= due {
                self.submit(one)?;
                sent += 1;
                due += every();
                continue;
            }
            if !open && samples.len() == sent {
                return Ok(samples);
            }
            let until = if open { due } else { end + PATIENCE };
            match self.end_until(until).await? {
                Some((token, latency, outcome)) => match crowd.live.remove(&token) {
                    Some(which) => {
                        if outcome.termination != Termination::Succeeded {
                            let first = || (0, format!("{:?}", outcome.termination));
                            crowd.failed.get_or_insert_with(first).0 += 1;
                        }
                        crowd.live.insert(self.submit(&crowd.attempts[which])?, which);
                    }
                    None => {
                        ensure!(outcome.termination == Termination::Succeeded, "{:?}", outcome.termination);
                        samples.push(Sample {
                            latency_ms: millis(latency),
                            wall_ms: millis(Duration::from_nanos(outcome.receipt.wall_ns)),
                            cpu_ms: millis(Duration::from_nanos(outcome.receipt.cpu_ns)),
                        });
                    }
                },
                None if open => {}
                None => bail!("{} attempts of the victim did not end in {PATIENCE:?}", sent - samples.len()),
            }
        }
    }

    /// Runs these at once, all of them to their ends.
    async fn batch(&mut self, attempts: &[Attempt]) -> Result<Batch> {
        let began = Instant::now();
        for attempt in attempts {
            self.submit(attempt)?;
        }
        let mut cpu_ns = 0;
        for _ in attempts {
            let (outcome, how) = self.ended().await?;
            ensure!(outcome.termination == Termination::Succeeded, "{how}");
            cpu_ns += outcome.receipt.cpu_ns;
        }
        let cpu_s = Duration::from_nanos(cpu_ns).as_secs_f64();
        Ok(Batch { wall_s: began.elapsed().as_secs_f64(), cpu_s })
    }

    /// Ends per second, `in_flight` of them at once.
    async fn rate(&mut self, one: &Attempt, in_flight: u64, lasting: Duration) -> Result<f64> {
        for _ in 0..in_flight {
            self.submit(one)?;
        }
        let began = Instant::now();
        let mut count = 0u32;
        while began.elapsed() < lasting {
            let (outcome, how) = self.ended().await?;
            ensure!(outcome.termination == Termination::Succeeded, "{how}");
            self.submit(one)?;
            count += 1;
        }
        let rate = f64::from(count) / began.elapsed().as_secs_f64();
        while !self.live.is_empty() {
            self.ended().await?;
        }
        Ok(rate)
    }

    /// Resident KiB of the process once they no longer change: nothing tells when a guest has begun to sleep.
    async fn settled_kib(&self) -> Result<f64> {
        const STEP: Duration = Duration::from_millis(100);
        const STEADY: u32 = 5;
        const SLACK_KIB: f64 = 64.0;
        const MOST_STEPS: u32 = 100;
        let (mut last, mut steady) = (self.resident_kib()?, 0);
        for _ in 0..MOST_STEPS {
            sleep(STEP).await;
            let now = self.resident_kib()?;
            steady = if (now - last).abs() <= SLACK_KIB { steady + 1 } else { 0 };
            last = now;
            if steady == STEADY {
                return Ok(now);
            }
        }
        bail!("the resident size of the cell does not settle")
    }

    /// CPU of the process so far.
    fn cpu_s(&self) -> Result<f64> {
        cpu_s(self.cell.pid())
    }

    /// The second field of `statm`, but in KiB instead of pages of whatever size.
    fn resident_kib(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.cell.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches("kB").trim_end().parse()?)
    }
}

/// CPU of a process so far: the 14th and 15th field of `stat`, which Linux counts in hundredths for
/// everybody.
fn cpu_s(process: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let of = |n: usize| fields.get(n).context("stat is short")?.parse::<f64>().context("stat");
    Ok((of(11)? + of(12)?) / 100.0)
}

/// What all sections need.
struct Bench {
    compiler: Compiler,
    /// Iterations of [`burn`] per nanosecond of CPU.
    speed: f64,
    _dir: tempfile::TempDir,
}

impl Bench {
    async fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let cache = ArtifactCache::open(dir.path(), ArtifactKey::random()?, 1 << 30)?;
        let limits = CompileLimits { wall: COMPILE_WALL, ..CompileLimits::default() };
        let compiler = Compiler::new(program(), limits, Arc::new(cache), 1);
        let mut bench = Self { compiler, speed: 1.0, _dir: dir };
        bench.speed = bench.measure_speed().await?;
        Ok(bench)
    }

    async fn compile(&self, wat: &str) -> Result<Artifact> {
        let wasm = Bytes::from(wat::parse_str(wat)?);
        let hash = ModuleHash::of(&wasm);
        let fetch = || async { Ok::<_, std::convert::Infallible>(wasm.clone()) };
        self.compiler.artifact(1, &hash, fetch).await.map_err(|err| anyhow::anyhow!("{err}"))
    }

    /// A guest that takes about so much CPU on this machine, when it is quiet.
    async fn burn(&self, cpu: Duration) -> Result<Artifact> {
        self.compile(&burn((cpu.as_nanos() as f64 * self.speed) as u32)).await
    }

    async fn measure_speed(&self) -> Result<f64> {
        const ITERATIONS: u32 = 10_000_000;
        let code = self.compile(&burn(ITERATIONS)).await?;
        let mut host = Host::start(1, 1).await?;
        host.cell.load(&code).await?;
        let mut took = Vec::new();
        for _ in 0..9 {
            took.push(host.batch(&[attempt(&code, 1)]).await?.cpu_s * 1e9);
        }
        host.stop().await;
        // The quickest: others on the machine only ever add.
        Ok(f64::from(ITERATIONS) / quantile(&took, 0.0))
    }
}

fn program() -> PathBuf {
    env!("CARGO_BIN_EXE_sandbar-cell").into()
}

/// An attempt that nothing ends before the bench does.
fn attempt(code: &Artifact, tenant: u64) -> Attempt {
    Attempt {
        module: code.hash,
        tenant,
        weight: 100,
        input: Input::Command { args: Vec::new(), env: Vec::new(), stdin: Vec::new() },
        limits: Limits { fuel: Limits::MAX.fuel, timeout_ms: Limits::MAX.timeout_ms, ..Limits::default() },
        context: Context {
            invocation_id: "019a0000-0000-7000-8000-000000000000".to_owned(),
            task: "neighbour".to_owned(),
            attempt: 1,
            max_attempts: 1,
            tags: Vec::new(),
        },
        options: Options::default(),
    }
}

// The guests.

/// A WASI preview 1 command with so many pages of memory.
fn command(items: &str, pages: u32, body: &str) -> String {
    format!(
        r#"(module
  (import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_close" (func $close (param i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") {pages})
  (func $must (param $errno i32) (if (local.get $errno) (then unreachable)))
  {items}
  (func (export "_start") (local $i i32) (local $n i32) (local $x i64) (local $f f64) {body}))"#
    )
}

/// Multiplications that depend on each other; their result is stored, so that no compiler leaves them out.
fn burn(iterations: u32) -> String {
    command(
        "",
        1,
        &format!(
            "(local.set $i (i32.const {}))
             (loop $l
               (local.set $x (i64.add (i64.const 1442695040888963407)
                 (i64.mul (local.get $x) (i64.const 6364136223846793005))))
               (br_if $l (local.tee $i (i32.sub (local.get $i) (i32.const 1)))))
             (i64.store (i32.const 0) (local.get $x))",
            iterations.max(1)
        ),
    )
}

/// Ten lines of 100 bytes at a time, more than the limit of the log in all.
fn log_flood() -> String {
    let lines = format!("{}\\n", "x".repeat(99)).repeat(10);
    command(
        &format!(r#"(data (i32.const 64) "{lines}")"#),
        1,
        "(i32.store (i32.const 0) (i32.const 64))
         (i32.store (i32.const 4) (i32.const 1000))
         (local.set $i (i32.const 400))
         (loop $l
           (call $must (call $write (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 16)))
           (br_if $l (local.tee $i (i32.sub (local.get $i) (i32.const 1)))))",
    )
}

/// Grows by a MiB and fills it, until the limit.
fn memory_flood() -> String {
    command(
        "",
        1,
        "(block $full (loop $l
           (local.set $n (memory.grow (i32.const 16)))
           (br_if $full (i32.eq (local.get $n) (i32.const -1)))
           (memory.fill (i32.shl (local.get $n) (i32.const 16)) (i32.const 165) (i32.const 1048576))
           (br $l)))",
    )
}

/// 2,000 files of 8 KiB; the three letters of a name are the number.
fn file_flood() -> String {
    command(
        r#"(data (i32.const 1024) "fxxx")
           (func $letter (param $at i32) (param $n i32)
             (i32.store8 (local.get $at) (i32.add (i32.const 97) (i32.and (local.get $n) (i32.const 15)))))"#,
        1,
        "(i32.store (i32.const 0) (i32.const 4096))
         (i32.store (i32.const 4) (i32.const 8192))
         (local.set $i (i32.const 2000))
         (loop $l
           (call $letter (i32.const 1025) (local.get $i))
           (call $letter (i32.const 1026) (i32.shr_u (local.get $i) (i32.const 4)))
           (call $letter (i32.const 1027) (i32.shr_u (local.get $i) (i32.const 8)))
           (call $must (call $open (i32.const 3) (i32.const 1) (i32.const 1024) (i32.const 4)
             (i32.const 1) (i64.const 66) (i64.const 0) (i32.const 0) (i32.const 512)))
           (call $must (call $write (i32.load (i32.const 512)) (i32.const 0) (i32.const 1) (i32.const 16)))
           (call $must (call $close (i32.load (i32.const 512))))
           (br_if $l (local.tee $i (i32.sub (local.get $i) (i32.const 1)))))",
    )
}

/// One subscription to the monotonic clock.
fn sleep_for(seconds: u64) -> String {
    format!(
        "(i32.store (i32.const 80) (i32.const 1))
         (i64.store (i32.const 88) (i64.const {}))
         (call $must (call $poll (i32.const 64) (i32.const 128) (i32.const 1) (i32.const 192)))",
        seconds * 1_000_000_000
    )
}

/// A guest that does much between two places where it can be preempted.
struct Adversary {
    name: &'static str,
    wat: String,
    memory_bytes: u64,
}

/// Guests can be preempted at the heads of loops and at calls of their own functions only. So each kind comes
/// as a plain loop, and as a loop with much in a row: as much as compiles within a few seconds.
fn adversaries() -> Vec<Adversary> {
    const MIB: u64 = 1 << 20;
    let row = |step: &str, count: usize| format!("(loop $l {} (br $l))", step.repeat(count));
    let guest = |name, pages, body: &str, memory_bytes| Adversary {
        name,
        wat: command("", pages, body),
        memory_bytes,
    };
    // 2^19 lines of 64 bytes in one cycle, in an order that no prefetcher follows.
    let cycle = "(loop $l
        (i32.store (i32.shl (local.get $i) (i32.const 6))
          (i32.shl (i32.and (i32.const 524287)
            (i32.add (i32.const 12345) (i32.mul (local.get $i) (i32.const 1103515245)))) (i32.const 6)))
        (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 524288))))";
    let chase = |count| {
        let steps = format!(
            "{} (i32.store (i32.const 33554432) (local.get $n))",
            "(local.set $n (i32.load (local.get $n)))".repeat(count)
        );
        format!("{cycle} {}", row(&steps, 1))
    };
    let sqrt = |count: usize| {
        let steps = format!(
            "local.get $f {} local.set $f (f64.store (i32.const 0) (local.get $f))",
            "f64.sqrt ".repeat(count)
        );
        format!("(local.set $f (f64.const 2)) {}", row(&steps, 1))
    };
    let grow = "(drop (memory.grow (i32.const 1)))";
    let clock = "(drop (call $clock (i32.const 1) (i64.const 1) (i32.const 16)))";
    let fill = |mib: u32| format!("(memory.fill (i32.const 0) (i32.const 165) (i32.const {}))", mib << 20);
    vec![
        guest("a plain loop", 1, &row("", 1), MIB),
        guest("cache misses over 32 MiB", 513, &chase(1), 64 * MIB),
        guest("cache misses, 20,000 in a row", 513, &chase(20_000), 64 * MIB),
        guest("denied memory.grow", 1, &row(grow, 1), 64 << 10),
        guest("denied memory.grow, 5,000 in a row", 1, &row(grow, 5_000), 64 << 10),
        guest("f64.sqrt", 1, &sqrt(1), MIB),
        guest("f64.sqrt, 100,000 in a row", 1, &sqrt(100_000), MIB),
        guest("clock calls", 1, &row(clock, 1), MIB),
        guest("clock calls, 20,000 in a row", 1, &row(clock, 20_000), MIB),
        guest("memory.fill of 256 MiB", 4_096, &row(&fill(256), 1), 256 * MIB),
        // Ends and begins anew: its memory is cleared away on the guest thread.
        guest("fill 64 MiB once and end", 1_024, &fill(64), 64 * MIB),
    ]
}

// The figures.

fn latencies(samples: &[Sample]) -> Vec<f64> {
    samples.iter().map(|sample| sample.latency_ms).collect()
}

/// By nearest rank; of few samples the 99th percentile is the largest.
fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (q * sorted.len().saturating_sub(1) as f64).round() as usize;
    sorted.get(rank).copied().unwrap_or(f64::NAN)
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "missed" }
}
