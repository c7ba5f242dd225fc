//! What benches of cells share: a cell with its events, crowds, compiled guests, figures. A real child process and the
//! crate's own client; asserts nothing about time.
#![allow(dead_code)]

pub mod compilations;
pub mod guests;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use sandbar_host::artifact::{Artifact, ArtifactCache, ArtifactKey};
use sandbar_host::cell::{CancelReason, Cell, CellConfig, CellEvent, CellEvents};
use sandbar_host::compile::CompileLimits;
use sandbar_host::limits::Limits;
use sandbar_host::outcome::{Outcome, Termination};
use sandbar_host::run::{Attempt, Context, Input, Options};
use sandbar_host::{Compiler, ModuleHash};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use guests::burn;

/// Longest wait for one event that must come.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Longest compilation of one guest; the largest takes a third of it on a quiet machine.
const COMPILE_WALL: Duration = Duration::from_secs(15);

/// A cell, and what this side knows of it.
pub struct Host {
    /// The cell.
    pub cell: Cell,
    events: CellEvents,
    /// The next token.
    next: u64,
    /// In the cell.
    live: HashMap<u64, Instant>,
}

/// One attempt of the victim that succeeded.
pub struct Sample {
    /// From its submission to its end event.
    pub latency_ms: f64,
    /// From its first poll to its end, by its receipt.
    pub wall_ms: f64,
    /// By its receipt.
    pub cpu_ms: f64,
}

/// What a batch took.
pub struct Batch {
    pub wall_s: f64,
    pub cpu_s: f64,
}

/// Attempts beside the one that is measured. Whichever ends is submitted again.
#[derive(Default)]
pub struct Crowd {
    attempts: Vec<Attempt>,
    live: HashMap<u64, usize>,
    /// Those that ended in another way than by success, and the first such way.
    failed: Option<(u64, String)>,
}

impl Crowd {
    /// Something to add to a line whose crowd was not what it should be.
    pub fn complaint(&self) -> String {
        self.failed.as_ref().map_or_else(String::new, |(n, how)| format!(" ({n} of the crowd ended: {how})"))
    }
}

pub fn crowd(count: u64, one: impl Fn(u64) -> Attempt) -> Crowd {
    Crowd { attempts: (0..count).map(one).collect(), ..Crowd::default() }
}

impl Host {
    pub async fn start(threads: usize, slots: u32) -> Result<Self> {
        let config = CellConfig { threads, slots, ..CellConfig::new(program()) };
        let (cell, events) = Cell::spawn(&config).await.context("a cell")?;
        Ok(Self { cell, events, next: 0, live: HashMap::new() })
    }

    /// Kills the cell and waits until it is collected.
    pub async fn stop(mut self) {
        self.cell.kill();
        let gone = async { while self.events.recv().await.is_some() {} };
        let _ = timeout(PATIENCE, gone).await;
    }

    pub fn submit(&mut self, attempt: &Attempt) -> Result<u64> {
        let token = self.next;
        self.next += 1;
        // Before the submission, which encodes the attempt.
        let at = Instant::now();
        self.cell.submit(token, attempt)?;
        self.live.insert(token, at);
        Ok(token)
    }

    /// The next end, or none when it has not come until then.
    pub async fn end_until(&mut self, until: Instant) -> Result<Option<(u64, Duration, Outcome)>> {
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

    /// Waits until the cell asks something on behalf of an attempt, which nobody answers.
    pub async fn asked(&mut self) -> Result<()> {
        loop {
            match timeout(PATIENCE, self.events.recv()).await.context("nothing was asked")? {
                Some(CellEvent::Ask { .. } | CellEvent::Http { .. }) => return Ok(()),
                Some(CellEvent::Finished { outcome, .. }) => bail!("it ended: {:?}", outcome.termination),
                Some(CellEvent::Gone { reason }) => bail!("the cell is gone: {reason}"),
                None => bail!("the cell is gone"),
                Some(_) => {}
            }
        }
    }

    /// Cancels one and waits for its end: how long that took, and how it ended.
    pub async fn cancel(&mut self, token: u64) -> Result<(Duration, Termination)> {
        let asked = Instant::now();
        self.cell.cancel(token, CancelReason::Cancelled);
        loop {
            let end = self.end_until(asked + PATIENCE).await?;
            let (ended, _, outcome) = end.context("a cancellation reached nobody")?;
            if ended == token {
                return Ok((asked.elapsed(), outcome.termination));
            }
        }
    }

    /// The next end, and how it was.
    pub async fn ended(&mut self) -> Result<(Outcome, String)> {
        let end = self.end_until(Instant::now() + PATIENCE).await?;
        let (_, _, outcome) = end.context("no attempt ended in time")?;
        let how = format!("{:?}", outcome.termination);
        Ok((outcome, how))
    }

    pub fn gather(&mut self, crowd: &mut Crowd) -> Result<()> {
        for (which, attempt) in crowd.attempts.iter().enumerate() {
            crowd.live.insert(self.submit(attempt)?, which);
        }
        Ok(())
    }

    pub async fn disperse(&mut self, crowd: &mut Crowd) -> Result<()> {
        crowd.live.clear();
        self.end_all().await
    }

    /// Cancels everything and waits for it.
    pub async fn end_all(&mut self) -> Result<()> {
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
    pub async fn watch(
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
    pub async fn batch(&mut self, attempts: &[Attempt]) -> Result<Batch> {
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
    pub async fn rate(&mut self, one: &Attempt, in_flight: u64, lasting: Duration) -> Result<f64> {
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
    pub async fn settled_kib(&self) -> Result<f64> {
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
    pub fn cpu_s(&self) -> Result<f64> {
        cpu_s(self.cell.pid())
    }

    /// The second field of `statm`, but in KiB instead of pages of whatever size.
    pub fn resident_kib(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.cell.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches("kB").trim_end().parse()?)
    }
}

/// CPU of a process so far: the 14th and 15th field of `stat`, which Linux counts in hundredths for
/// everybody.
pub fn cpu_s(process: u32) -> Result<f64> {
    stat_s(process, 11)
}

/// CPU of those children of this process that have ended and are collected: the 16th and 17th field.
pub fn children_cpu_s() -> Result<f64> {
    stat_s(std::process::id(), 13)
}

/// The sum of two fields of `stat`, the first of them so many fields behind the name.
fn stat_s(process: u32, first: usize) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let of = |n: usize| fields.get(n).context("stat is short")?.parse::<f64>().context("stat");
    Ok((of(first)? + of(first + 1)?) / 100.0)
}

/// What all sections need.
pub struct Bench {
    compiler: Compiler,
    /// Iterations of [`burn`] per nanosecond of CPU.
    speed: f64,
    _dir: tempfile::TempDir,
}

impl Bench {
    pub async fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let cache = ArtifactCache::open(dir.path(), ArtifactKey::random()?, 1 << 30)?;
        let limits = CompileLimits { wall: COMPILE_WALL, ..CompileLimits::default() };
        let compiler = Compiler::new(program(), limits, Arc::new(cache), 1);
        let mut bench = Self { compiler, speed: 1.0, _dir: dir };
        bench.speed = bench.measure_speed().await?;
        Ok(bench)
    }

    pub async fn compile(&self, wat: &str) -> Result<Artifact> {
        self.compile_bytes(wat::parse_str(wat)?).await
    }

    pub async fn compile_bytes(&self, wasm: Vec<u8>) -> Result<Artifact> {
        let wasm = Bytes::from(wasm);
        let hash = ModuleHash::of(&wasm);
        let fetch = || async { Ok::<_, std::convert::Infallible>(wasm.clone()) };
        self.compiler.artifact(1, &hash, fetch).await.map_err(|err| anyhow::anyhow!("{err}"))
    }

    /// A guest that takes about so much CPU on this machine, when it is quiet.
    pub async fn burn(&self, cpu: Duration) -> Result<Artifact> {
        self.compile(&burn((cpu.as_nanos() as f64 * self.speed) as u32)).await
    }

    pub async fn measure_speed(&self) -> Result<f64> {
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

/// The program of cells and compilations.
pub fn program() -> PathBuf {
    env!("CARGO_BIN_EXE_sandbar-cell").into()
}

/// An attempt that nothing ends before the bench does.
pub fn attempt(code: &Artifact, tenant: u64) -> Attempt {
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

pub fn latencies(samples: &[Sample]) -> Vec<f64> {
    samples.iter().map(|sample| sample.latency_ms).collect()
}

/// By nearest rank; of few samples the 99th percentile is the largest.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (q * sorted.len().saturating_sub(1) as f64).round() as usize;
    sorted.get(rank).copied().unwrap_or(f64::NAN)
}

pub fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

pub fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "missed" }
}
