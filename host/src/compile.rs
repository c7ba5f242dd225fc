//! Compiling: the parent's side. A one-shot child per module, under address-space, CPU and wall
//! limits; whatever happens to the child becomes a [`Rejection`] of the module, never a crash here.

mod child;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use crate::inspect::{Rejection, RejectionCode};
use crate::walls::{Wall, Walls};

pub use child::compile_child_main;

/// The hidden subcommand of the program that compiles.
pub const SUBCOMMAND: &str = "__compile";
/// Bytes of the child's stderr that are kept, for the allocator's last words.
const MAX_STDERR: u64 = 8 << 10;
/// Bytes of a rejection.
const MAX_REJECTION: u64 = 64 << 10;
/// CPU seconds that each whole MiB of a module adds to the limit: half as much again as the interpreters
/// of scripting languages take, whose files are large because there is much code in them. What is small and
/// expensive is an attack, and has the base alone.
pub const CPU_SECONDS_PER_MIB: u64 = 4;
/// Wall time that each whole MiB of a module adds: the CPU, on a machine that does other work as well.
pub const WALL_PER_MIB: Duration = Duration::from_secs(8);
/// Of the time that a compilation may take, the part in which it must have used the CPU before its length is the module's
/// fault: with less the machine had no time for it.
const OWN_PART: u32 = 4;
/// Bytes that address space needs beyond the module: the program itself, its stacks.
const MIN_ADDRESS_SPACE: u64 = 256 << 20;

/// How the child ends when it cannot have the walls it must have.
pub(crate) const EXIT_NO_WALLS: u8 = 3;
/// First byte of the child's answer.
pub(crate) const VERDICT_COMPILED: u8 = 1;
/// See [`VERDICT_COMPILED`].
pub(crate) const VERDICT_REJECTED: u8 = 2;

/// What one compilation may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompileLimits {
    /// Address space of the child in bytes, at least 256 MiB.
    pub address_space_bytes: u64,
    /// CPU seconds of the child, at least 1; [`CPU_SECONDS_PER_MIB`] comes on top.
    pub cpu_seconds: u64,
    /// From start to verdict; [`WALL_PER_MIB`] comes on top.
    pub wall: Duration,
    /// Compiled code in bytes.
    pub max_artifact_bytes: u64,
    /// Walls without which nothing is compiled; a compilation has no use for [`Walls::pagemap_scan`].
    pub require_walls: Walls,
}

impl Default for CompileLimits {
    /// 2 GiB, 20 s CPU and 30 s wall for small modules, 256 MiB of code.
    fn default() -> Self {
        Self {
            address_space_bytes: 2 << 30,
            cpu_seconds: 20,
            wall: Duration::from_secs(30),
            max_artifact_bytes: 256 << 20,
            require_walls: Walls::default(),
        }
    }
}

impl CompileLimits {
    /// What a module of `len` bytes may use.
    fn of_module(&self, len: usize) -> Self {
        let mib = u64::try_from(len >> 20).unwrap_or(u64::MAX);
        Self {
            cpu_seconds: self.cpu_seconds.max(1).saturating_add(mib.saturating_mul(CPU_SECONDS_PER_MIB)),
            wall: self
                .wall
                .saturating_add(WALL_PER_MIB.saturating_mul(u32::try_from(mib).unwrap_or(u32::MAX))),
            ..*self
        }
    }
}

/// A module was not compiled.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// Because of the module.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// Because of this machine.
    #[error("the compiler cannot be run: {0}")]
    Host(#[from] std::io::Error),
}

/// Compiles `bytes` in a child of `program`. Inspects first, in the child.
///
/// # Errors
/// [`CompileError::Rejected`] if the module is not acceptable, too expensive or kills the compiler;
/// [`CompileError::Host`] if the child cannot be started or spoken to.
pub async fn compile(program: &Path, bytes: Bytes, limits: &CompileLimits) -> Result<Vec<u8>, CompileError> {
    let limits = &limits.of_module(bytes.len());
    let mut child = Command::new(program)
        .arg(SUBCOMMAND)
        .arg(limits.address_space_bytes.max(MIN_ADDRESS_SPACE).to_string())
        .arg(limits.cpu_seconds.to_string())
        .args(Wall::ALL.iter().filter(|wall| limits.require_walls.has(**wall)).map(|wall| wall.as_str()))
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Ctrl-C in a terminal is for the parent, which ends its children in order.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    let pid = child.id();
    let missing = || std::io::Error::other("the child has no pipe");
    let mut stdin = child.stdin.take().ok_or_else(missing)?;
    let mut stdout = child.stdout.take().ok_or_else(missing)?;
    let mut stderr = child.stderr.take().ok_or_else(missing)?;

    let talk = async {
        let write = async {
            // A child that was killed while reading breaks the pipe; its status says why.
            let len = (bytes.len() as u64).to_le_bytes();
            if stdin.write_all(&len).await.is_ok() {
                let _ = stdin.write_all(&bytes).await;
            }
            drop(stdin);
        };
        let max = limits.max_artifact_bytes;
        let read = read_verdict(&mut stdout, max);
        let mut words = Vec::new();
        let listen = async {
            let _ = (&mut stderr).take(MAX_STDERR).read_to_end(&mut words).await;
            // More than that is thrown away so that the child cannot block on it.
            let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
        };
        let ((), verdict, ()) = tokio::join!(write, read, listen);
        let status = child.wait().await?;
        Ok::<_, std::io::Error>((verdict?, status, words))
    };
    let Ok(talked) = tokio::time::timeout(limits.wall, talk).await else {
        let used = pid.and_then(cpu_time).unwrap_or_default();
        let _ = child.start_kill();
        let _ = child.wait().await;
        if used < limits.wall.min(Duration::from_secs(limits.cpu_seconds)) / OWN_PART {
            return Err(CompileError::Host(std::io::Error::new(
                std::io::ErrorKind::TimedOut,
                format!(
                    "this machine was too busy to compile: {:.1} s of CPU in {:.1} s; it is worth another try",
                    used.as_secs_f64(),
                    limits.wall.as_secs_f64()
                ),
            )));
        }
        return Err(rejected(
            RejectionCode::CompileTimeout,
            format!("compiling took longer than {:.1} s", limits.wall.as_secs_f64()),
        ));
    };
    let (verdict, status, words) = talked?;
    match verdict {
        Verdict::Compiled(artifact) if status.success() => Ok(artifact),
        Verdict::Rejected(rejection) => Err(rejection.into()),
        Verdict::TooLarge(size) => Err(rejected(
            RejectionCode::OverLimit,
            format!("the compiled code has {size} bytes; at most {} are allowed", limits.max_artifact_bytes),
        )),
        Verdict::None if status.code() == Some(i32::from(EXIT_NO_WALLS)) => {
            Err(CompileError::Host(std::io::Error::new(
                std::io::ErrorKind::Unsupported,
                "this kernel does not grant compilations the required walls",
            )))
        }
        Verdict::Compiled(_) | Verdict::None => Err(died(status, &words, limits)),
    }
}

/// CPU time of a process and its threads so far.
fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the name, which may hold anything: state, …, user time and system time as the 12th and 13th.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks: u64 =
        fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Some(Duration::from_millis(ticks.saturating_mul(1_000) / rustix::param::clock_ticks_per_second().max(1)))
}

enum Verdict {
    Compiled(Vec<u8>),
    Rejected(Rejection),
    TooLarge(u64),
    None,
}

async fn read_verdict(stdout: &mut tokio::process::ChildStdout, max: u64) -> std::io::Result<Verdict> {
    let mut head = [0u8; 9];
    if stdout.read_exact(&mut head).await.is_err() {
        return Ok(Verdict::None);
    }
    let [tag, len @ ..] = head;
    let len = u64::from_le_bytes(len);
    let bound = if tag == VERDICT_COMPILED { max } else { MAX_REJECTION };
    if len > bound {
        tokio::io::copy(stdout, &mut tokio::io::sink()).await?;
        return Ok(Verdict::TooLarge(len));
    }
    let mut body = Vec::new();
    stdout.take(len).read_to_end(&mut body).await?;
    if body.len() as u64 != len {
        return Ok(Verdict::None);
    }
    Ok(match tag {
        VERDICT_COMPILED => Verdict::Compiled(body),
        _ => serde_json::from_slice(&body).map_or(Verdict::None, Verdict::Rejected),
    })
}

/// Reads the signs a dead child left.
fn died(status: std::process::ExitStatus, words: &[u8], limits: &CompileLimits) -> CompileError {
    /// The CPU limit.
    const SIGXCPU: i32 = 24;
    /// Nobody here sends it before the verdict: the kernel was out of memory.
    const SIGKILL: i32 = 9;
    let words = String::from_utf8_lossy(words);
    if words.contains("memory allocation of")
        || words.contains("Cannot allocate memory")
        || status.signal() == Some(SIGKILL)
    {
        return rejected(
            RejectionCode::CompileMemory,
            format!("compiling needs more than {} bytes of memory", limits.address_space_bytes),
        );
    }
    match status.signal() {
        Some(SIGXCPU) => rejected(
            RejectionCode::CompileTimeout,
            format!("compiling needs more than {} s of CPU", limits.cpu_seconds),
        ),
        Some(signal) => rejected(
            RejectionCode::DoesNotCompile,
            format!("the compiler died of signal {signal} on this module"),
        ),
        None => rejected(RejectionCode::DoesNotCompile, "the compiler failed on this module"),
    }
}

fn rejected(code: RejectionCode, detail: impl Into<String>) -> CompileError {
    CompileError::Rejected(Rejection::new(code, detail))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_grows_with_the_module_and_small_ones_get_no_more_than_the_base() {
        let base = CompileLimits::default();
        assert_eq!(base.of_module((1 << 20) - 1), base);
        let python = base.of_module(18 << 20);
        assert_eq!((python.cpu_seconds, python.wall), (20 + 18 * 4, Duration::from_secs(30 + 18 * 8)));
        assert_eq!(python.address_space_bytes, base.address_space_bytes);
    }
}
