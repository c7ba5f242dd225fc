//! `sandbar run`: one module in the same sandbox as on a worker (a cell, compiled by the same child, under the same
//! limits), without a server. Result to stdout, logs and receipt to stderr.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Read as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::Bytes;
use sandbar_host::ModuleKind;
use sandbar_host::artifact::{ArtifactCache, ArtifactKey};
use sandbar_host::cell::{CancelReason, Cell, CellConfig, CellEvent, Progress};
use sandbar_host::compile::CompileLimits;
use sandbar_host::limits::{Limits, PartialLimits};
use sandbar_host::outcome::{LogLevel, Outcome, Termination};
use sandbar_host::run::{Attempt, Context as GuestContext, Input};
use sandbar_host::{ArtifactError, Compiler};

use super::args::Run;

/// Disk that compiled modules of `sandbar run` may take.
const CACHE_BYTES: u64 = 1 << 30;
/// Input read from stdin or a file.
const MAX_INPUT: u64 = 32 << 20;
/// Module file.
const MAX_MODULE: u64 = 256 << 20;

pub async fn run(command: &Run) -> anyhow::Result<ExitCode> {
    let module = read_file(&command.file, MAX_MODULE)?;
    let inspection = match sandbar_host::inspect::inspect(&module) {
        Ok(inspection) => inspection,
        Err(rejection) => bail!("{} is refused: {rejection}", command.file.display()),
    };
    let manifest = inspection.manifest.unwrap_or_default();
    let limits = Limits::default().with(&manifest.limits).with(&PartialLimits {
        fuel: command.fuel,
        memory_bytes: command.memory_bytes,
        timeout_ms: command.timeout_ms,
        output_bytes: None,
        log_bytes: None,
    });
    limits.check()?;
    let input = input(command, inspection.kind)?;

    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let dir = cache_dir();
    let artifacts = dir.join("artifacts");
    std::fs::create_dir_all(&artifacts).with_context(|| format!("cannot create {}", artifacts.display()))?;
    let key = ArtifactKey::load_or_create(&dir.join("artifact.key"))?;
    let cache = Arc::new(ArtifactCache::open(&artifacts, key, CACHE_BYTES)?);
    let compiler = Compiler::new(program.clone(), CompileLimits::default(), cache, 1);
    let bytes = Bytes::from(module);
    let artifact = match compiler.artifact(&inspection.hash, || async { anyhow::Ok(bytes) }).await {
        Ok(artifact) => artifact,
        Err(ArtifactError::Rejected(rejection)) => {
            bail!("{} is refused: {rejection}", command.file.display())
        }
        Err(error) => bail!("{error}"),
    };

    let config = CellConfig { slots: 1, ..CellConfig::new(program) };
    let (cell, mut events) = Cell::spawn(&config).await.context("cannot start the sandbox process")?;
    cell.load(&artifact).await?;
    let name = manifest.name.unwrap_or_else(|| {
        command.file.file_stem().map_or_else(|| "task".to_owned(), |s| s.to_string_lossy().into_owned())
    });
    let attempt = Attempt {
        module: inspection.hash,
        tenant: 0,
        weight: 1,
        input,
        limits,
        context: GuestContext {
            invocation_id: uuid::Uuid::now_v7().to_string(),
            task: name,
            attempt: 1,
            max_attempts: 1,
            tags: Vec::new(),
        },
    };
    cell.submit(0, &attempt)?;
    let mut cancelled = false;
    let outcome = loop {
        tokio::select! {
            event = events.recv() => match event {
                Some(CellEvent::Finished { outcome, .. }) => break *outcome,
                Some(CellEvent::Progress { progress, .. }) => show(&progress),
                // The outcome has all of it.
                Some(CellEvent::Log { .. }) => {}
                Some(CellEvent::Gone { reason }) => bail!("the sandbox process died: {reason}"),
                None => bail!("the sandbox process died"),
            },
            _ = tokio::signal::ctrl_c(), if !cancelled => {
                cancelled = true;
                cell.cancel(0, CancelReason::Cancelled);
            }
        }
    };
    cell.kill();
    if command.json {
        print_json(&outcome)?;
    } else {
        print_text(&outcome)?;
    }
    Ok(match &outcome.termination {
        Termination::Succeeded => ExitCode::SUCCESS,
        // A command's own code is what a script around it wants to see.
        Termination::ExitCode { code } => ExitCode::from(u8::try_from(*code).unwrap_or(1).max(1)),
        _ => ExitCode::FAILURE,
    })
}

fn input(command: &Run, kind: ModuleKind) -> anyhow::Result<Input> {
    let given = match &command.input {
        Some(text) => match text.strip_prefix('@') {
            Some(path) => Some(read_file(&PathBuf::from(path), MAX_INPUT)?),
            None => Some(text.clone().into_bytes()),
        },
        None if std::io::stdin().is_terminal() => None,
        None => {
            let mut bytes = Vec::new();
            std::io::stdin().lock().take(MAX_INPUT + 1).read_to_end(&mut bytes)?;
            if bytes.len() as u64 > MAX_INPUT {
                bail!("the input is larger than {MAX_INPUT} bytes");
            }
            Some(bytes)
        }
    };
    match kind {
        ModuleKind::Task => {
            if !command.args.is_empty() || !command.env.is_empty() {
                bail!("this module is a task: it takes --input, not arguments or environment");
            }
            let bytes = match given {
                Some(bytes) if !bytes.is_empty() => bytes,
                _ => b"null".to_vec(),
            };
            Ok(Input::Task { bytes })
        }
        ModuleKind::CommandP1 | ModuleKind::CommandP2 => {
            let mut env = BTreeMap::new();
            for pair in &command.env {
                let (name, value) =
                    pair.split_once('=').with_context(|| format!("`{pair}` is not NAME=VALUE"))?;
                env.insert(name.to_owned(), value.to_owned());
            }
            Ok(Input::Command {
                args: command.args.clone(),
                env: env.into_iter().collect(),
                stdin: given.unwrap_or_default(),
            })
        }
    }
}

fn read_file(path: &PathBuf, max: u64) -> anyhow::Result<Vec<u8>> {
    let file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut bytes = Vec::new();
    file.take(max + 1).read_to_end(&mut bytes).with_context(|| format!("cannot read {}", path.display()))?;
    if bytes.len() as u64 > max {
        bail!("{} is larger than {max} bytes", path.display());
    }
    Ok(bytes)
}

/// `$XDG_CACHE_HOME/sandbar`, `~/.cache/sandbar`, or a directory of this user under the temporary one.
fn cache_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("XDG_CACHE_HOME").filter(|d| !d.is_empty()) {
        return PathBuf::from(dir).join("sandbar");
    }
    if let Some(home) = std::env::var_os("HOME").filter(|d| !d.is_empty()) {
        return PathBuf::from(home).join(".cache/sandbar");
    }
    std::env::temp_dir().join(format!("sandbar-{}", rustix::process::getuid().as_raw()))
}

#[allow(clippy::print_stderr)] // for the person at the terminal
fn show(Progress { done, total, message }: &Progress) {
    if *total > 0 {
        eprintln!("progress {done}/{total} {message}");
    } else {
        eprintln!("progress {done} {message}");
    }
}

fn print_json(outcome: &Outcome) -> anyhow::Result<()> {
    use base64::Engine as _;
    let mut value = serde_json::json!({
        "termination": outcome.termination,
        "receipt": outcome.receipt,
        "logs": outcome.logs,
        "backtrace": outcome.backtrace,
        "content_type": outcome.content_type,
    });
    match std::str::from_utf8(&outcome.output) {
        Ok(text) => match serde_json::from_str::<serde_json::Value>(text) {
            Ok(json) if outcome.content_type.starts_with("application/json") => value["output"] = json,
            _ => value["output_text"] = text.into(),
        },
        Err(_) => {
            value["output_base64"] = base64::engine::general_purpose::STANDARD.encode(&outcome.output).into();
        }
    }
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &value)?;
    writeln!(out)?;
    Ok(())
}

#[allow(clippy::cast_precision_loss)] // for people
fn print_text(outcome: &Outcome) -> anyhow::Result<()> {
    let mut err = std::io::stderr().lock();
    for record in &outcome.logs {
        let level = match record.level {
            LogLevel::Trace => "trace",
            LogLevel::Debug => "debug",
            LogLevel::Info => "info",
            LogLevel::Warn => "warn",
            LogLevel::Error => "error",
        };
        write!(err, "{:>9.3} ms  {level:<5} {}", record.at_us as f64 / 1e3, record.message)?;
        for (key, value) in &record.fields {
            write!(err, " {key}={value}")?;
        }
        writeln!(err)?;
    }
    let mut out = std::io::stdout().lock();
    out.write_all(&outcome.output)?;
    if !outcome.output.is_empty() && !outcome.output.ends_with(b"\n") && out.is_terminal() {
        writeln!(out)?;
    }
    out.flush()?;
    let r = &outcome.receipt;
    writeln!(err, "{}", serde_json::to_string(&outcome.termination)?)?;
    for frame in &outcome.backtrace {
        write!(err, "    at {}", frame.function)?;
        if let (Some(file), Some(line)) = (&frame.file, frame.line) {
            write!(err, " ({file}:{line})")?;
        }
        writeln!(err)?;
    }
    writeln!(
        err,
        "fuel {}{}  cpu {:.3} ms  wall {:.3} ms  memory {:.1} MiB  in {} B  out {} B (dropped {})  log {} B (dropped {})  host calls {}",
        r.fuel,
        if r.fuel_exact { "" } else { " (at least)" },
        r.cpu_ns as f64 / 1e6,
        r.wall_ns as f64 / 1e6,
        r.peak_memory_bytes as f64 / f64::from(1 << 20),
        r.input_bytes,
        r.output_bytes,
        r.output_dropped_bytes,
        r.log_bytes,
        r.log_dropped_bytes,
        r.host_calls,
    )?;
    Ok(())
}
