//! `sandbar run`: one module in the same sandbox as on a worker (a cell, compiled by the same child, under the same
//! limits), without a server. Result to stdout, logs and receipt to stderr.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use sandbar_host::ModuleKind;
use sandbar_host::artifact::{ArtifactCache, ArtifactKey};
use sandbar_host::capability::call::{Answer, Ask, Refusal as Denial};
use sandbar_host::cell::{CancelReason, Cell, CellConfig, CellEvent, Progress};
use sandbar_host::compile::CompileLimits;
use sandbar_host::egress::call::{Code, FromGuest, Refusal, ToGuest};
use sandbar_host::limits::{Limits, PartialLimits};
use sandbar_host::outcome::{LogLevel, Outcome, Termination};
use sandbar_host::run::{Attempt, Context as GuestContext, Input, Options};
use sandbar_host::{ArtifactError, Compiler};

use super::failure::{Exit, Failure};
use super::invoke::{LimitArgs, millis};
use super::output::{DIM, Output, printable};
use super::show::{self, Record};
use super::value;
use crate::wire::invocation as wire;

/// Run a .wasm file once in the sandbox, without a server: same limits, same receipt
#[derive(Debug, clap::Args)]
pub struct Run {
    /// The module: a task made with the SDK, or any WASI command
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Input of a task, or standard input of a command; standard input if absent and no terminal
    #[arg(long, short, value_name = "JSON|@FILE|-")]
    pub input: Option<String>,
    /// Variable of a command's environment; may be repeated
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = value::pair)]
    pub env: Vec<(String, String)>,
    /// Limits of the attempt.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Print outcome, receipt, logs and output as one JSON document
    #[arg(long)]
    pub json: bool,
    /// Arguments of a command
    #[arg(last = true, value_name = "ARGS")]
    pub args: Vec<String>,
}

/// Why a task that is run here reaches nobody.
const NO_GRANTS: &str = "here a task is given nothing; on a server an admin of the tenant gives it";
/// Disk that compiled modules of `sandbar run` may take, in bytes.
const CACHE_BYTES: u64 = 1 << 30;

/// Runs it. The exit code of a command is passed on: that is what a script around it wants to see.
pub async fn run(command: &Run) -> Result<ExitCode, Failure> {
    let module = value::file(&command.file, value::MAX_MODULE)?;
    let refused = |rejection: &dyn std::fmt::Display| {
        Failure::new(Exit::Refused, format!("{} cannot run in Sandbar", command.file.display()))
            .detail(rejection)
    };
    let inspection = sandbar_host::inspect::inspect(&module).map_err(|rejection| refused(&rejection))?;
    let manifest = inspection.manifest.unwrap_or_default();
    let limits = Limits::default().with(&manifest.limits).with(&PartialLimits {
        fuel: command.limits.fuel,
        memory_bytes: command.limits.memory,
        timeout_ms: command.limits.timeout.map(millis),
        output_bytes: command.limits.output,
        log_bytes: command.limits.log,
    });
    limits.check().map_err(|error| Failure::usage(error.to_string()))?;
    let input = input(command, inspection.kind)?;

    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let dir = cache_dir();
    let artifacts = dir.join("artifacts");
    std::fs::create_dir_all(&artifacts).with_context(|| format!("cannot create {}", artifacts.display()))?;
    let key = ArtifactKey::load_or_create(&dir.join("artifact.key"))?;
    let cache = Arc::new(ArtifactCache::open(&artifacts, key, CACHE_BYTES)?);
    let compiler = Compiler::new(program.clone(), CompileLimits::default(), cache, 1);
    let bytes = Bytes::from(module);
    let artifact = match compiler.artifact(0, &inspection.hash, || async { anyhow::Ok(bytes) }).await {
        Ok(artifact) => artifact,
        Err(ArtifactError::Rejected(rejection)) => return Err(refused(&rejection)),
        Err(error) => return Err(Failure::new(Exit::Failed, error.to_string())),
    };

    let config = CellConfig { slots: 1, ..CellConfig::new(program) };
    let (cell, mut events) = Cell::spawn(&config).await.context("cannot start the sandbox process")?;
    cell.load(&artifact).await.context("cannot load the module")?;
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
        options: Options::default(),
    };
    cell.submit(0, &attempt).context("cannot start the attempt")?;
    let mut cancelled = false;
    let outcome = loop {
        tokio::select! {
            event = events.recv() => match event {
                Some(CellEvent::Finished { outcome, .. }) => break *outcome,
                Some(CellEvent::Progress { progress, .. }) => report(&progress),
                // The outcome has all of it, and there is no other cell.
                Some(CellEvent::Log { .. } | CellEvent::Used(_)) => {}
                Some(CellEvent::Http { call, message: FromGuest::Request(_), .. }) => {
                    cell.http(call, ToGuest::Refused(Refusal::new(Code::HttpRequestDenied, NO_GRANTS)));
                }
                Some(CellEvent::Http { .. }) => {}
                Some(CellEvent::Ask { call, ask: Ask::Config, .. }) => {
                    cell.answer(call, Answer::Config(Vec::new()));
                }
                Some(CellEvent::Ask { call, .. }) => {
                    cell.answer(call, Answer::Refused(Denial::denied(NO_GRANTS)));
                }
                Some(CellEvent::Gone { reason }) => {
                    return Err(Failure::new(Exit::Failed, format!("the sandbox process died: {reason}")));
                }
                None => return Err(Failure::new(Exit::Failed, "the sandbox process died")),
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

fn input(command: &Run, kind: ModuleKind) -> Result<Input, Failure> {
    let given = match &command.input {
        Some(text) => Some(value::text_or_file(text, value::MAX_INPUT)?),
        None if std::io::stdin().is_terminal() => None,
        None => Some(value::text_or_file("-", value::MAX_INPUT)?),
    };
    match kind {
        ModuleKind::Task => {
            if !command.args.is_empty() || !command.env.is_empty() {
                return Err(Failure::usage(
                    "this module is a task: it takes --input, not arguments or environment",
                ));
            }
            let bytes = match given {
                Some(bytes) if !bytes.is_empty() => bytes,
                _ => b"null".to_vec(),
            };
            Ok(Input::Task { bytes })
        }
        ModuleKind::CommandP1 | ModuleKind::CommandP2 => {
            let env: BTreeMap<String, String> = command.env.iter().cloned().collect();
            Ok(Input::Command {
                args: command.args.clone(),
                env: env.into_iter().collect(),
                stdin: given.unwrap_or_default(),
            })
        }
    }
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

/// A report of progress, in the words of `invoke --follow`.
fn report(progress: &Progress) {
    let Progress { done, total, message } = progress;
    Output::new(false).note(format!("progress {}", show::progress_line(*done, *total, message)));
}

fn print_json(outcome: &Outcome) -> anyhow::Result<()> {
    use base64::Engine as _;
    let mut value = serde_json::json!({
        "termination": outcome.termination,
        "receipt": outcome.receipt,
        "logs": outcome.logs.records().collect::<Vec<_>>(),
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
    serde_json::to_writer(&mut out, &value)?;
    writeln!(out)?;
    Ok(())
}

fn print_text(outcome: &Outcome) -> anyhow::Result<()> {
    let output = Output::new(false);
    for record in outcome.logs.records() {
        let record = Record {
            attempt: 1,
            at_us: record.at_us,
            level: level(record.level).to_owned(),
            message: record.message,
            fields: record.fields.into_iter().collect(),
        };
        output.note(show::log(&record, |style, text| output.paint_err(style, text)));
    }
    // The same words as for an attempt on a server: both shapes are one on the wire.
    let end: wire::Termination = serde_json::from_value(serde_json::to_value(&outcome.termination)?)?;
    let cost: wire::Receipt = serde_json::from_value(serde_json::to_value(outcome.receipt)?)?;
    output.note(show::termination(&end));
    for frame in &outcome.backtrace {
        let mut line = format!("    at {}", printable(&frame.function));
        if let (Some(file), Some(number)) = (&frame.file, frame.line) {
            line.push_str(&format!(" ({}:{number})", printable(file)));
        }
        output.note(output.paint_err(DIM, line));
    }
    output.note(output.paint_err(DIM, format!("  {}", show::receipt(&cost))));
    if let Some(text) = show::remedy(&end) {
        output.note(output.paint_err(DIM, format!("  {text}")));
    }
    output.bytes(&outcome.output)?;
    Ok(())
}

fn level(level: LogLevel) -> &'static str {
    match level {
        LogLevel::Trace => "trace",
        LogLevel::Debug => "debug",
        LogLevel::Info => "info",
        LogLevel::Warn => "warn",
        LogLevel::Error => "error",
    }
}
