//! Compiling: the child's side. Limits itself before it reads a byte of the module, compiles on one
//! thread, writes one verdict and ends. Panics of the compiler become verdicts.

use std::io::{self, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use rustix::process::{Resource, Rlimit, setrlimit};
use wasmtime::component::Component;
use wasmtime::{Engine, Module};
use wasmtime_wasi::p2::bindings::CommandPre;

use super::{CompileLimits, EXIT_NO_WALLS, VERDICT_COMPILED, VERDICT_REJECTED};
use crate::engine;
use crate::inspect::{self, MAX_MODULE_BYTES, Rejection, RejectionCode};
use crate::module::ModuleKind;
use crate::output::clean;
use crate::run::link;
use crate::task_world::TaskPre;
use crate::walls::{self, Wall, Walls};

/// Descriptors the child may hold: its three pipes and what the runtime opens in passing.
const MAX_FILES: u64 = 32;
/// Niceness, that of the threads that run guests: who uploads takes no more from running attempts than one more of them.
const NICE: i32 = 10;
/// Stack of the compiling thread; deep expressions recurse.
const STACK_BYTES: usize = 64 << 20;
/// Bytes of the compiler's words in a rejection.
const MAX_WORDS: usize = 1_024;

/// Body of the hidden subcommand `__compile <address space bytes> <CPU seconds> <required wall>…`: a framed
/// module on stdin, a framed verdict on stdout.
#[must_use]
pub fn compile_child_main() -> ExitCode {
    let mut numbers = std::env::args().skip(2).map(|arg| arg.parse::<u64>().ok());
    let defaults = CompileLimits::default();
    let space = numbers.next().flatten().unwrap_or(defaults.address_space_bytes);
    let cpu = numbers.next().flatten().unwrap_or(defaults.cpu_seconds);
    if restrict(space, cpu).is_err() {
        return ExitCode::FAILURE;
    }
    let required: Walls = std::env::args()
        .skip(4)
        .filter_map(|word| Wall::ALL.into_iter().find(|wall| wall.as_str() == word))
        // Its memory lives as long as it does: there is nothing to scan.
        .filter(|wall| *wall != Wall::PagemapScan)
        .collect();
    let mut walls = walls::before_threads();
    // The parent classifies a panic by the verdict; its text would only repeat it.
    std::panic::set_hook(Box::new(|_| {}));
    let worker = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
        walls.seccomp = walls::behind_threads();
        if !walls.missing(required).is_empty() {
            return Ok(ExitCode::from(EXIT_NO_WALLS));
        }
        serve().map(|()| ExitCode::SUCCESS)
    });
    match worker.map(std::thread::JoinHandle::join) {
        Ok(Ok(Ok(code))) => code,
        _ => ExitCode::FAILURE,
    }
}

fn restrict(space: u64, cpu: u64) -> io::Result<()> {
    let fixed = |limit: u64| Rlimit { current: Some(limit), maximum: Some(limit) };
    // Some sandboxes forbid it; then it runs like the rest.
    let _ = rustix::process::nice(NICE);
    setrlimit(Resource::Core, fixed(0))?;
    setrlimit(Resource::Fsize, fixed(0))?;
    setrlimit(Resource::Nofile, fixed(MAX_FILES))?;
    setrlimit(Resource::As, fixed(space))?;
    setrlimit(Resource::Cpu, Rlimit { current: Some(cpu), maximum: Some(cpu.saturating_add(1)) })?;
    Ok(())
}

fn serve() -> io::Result<()> {
    let bytes = read_module(&mut io::stdin().lock())?;
    let verdict = catch_unwind(AssertUnwindSafe(|| build(&bytes))).unwrap_or_else(|_| {
        Err(Rejection::new(RejectionCode::DoesNotCompile, "the compiler panicked on this module"))
    });
    let mut stdout = io::stdout().lock();
    match verdict {
        Ok(artifact) => write_verdict(&mut stdout, VERDICT_COMPILED, &artifact),
        Err(rejection) => {
            let body = serde_json::to_vec(&rejection)?;
            write_verdict(&mut stdout, VERDICT_REJECTED, &body)
        }
    }
}

fn read_module(input: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut len = [0u8; 8];
    input.read_exact(&mut len)?;
    // One more than allowed reaches `inspect`, which refuses it in words.
    let len = u64::from_le_bytes(len).min(MAX_MODULE_BYTES as u64 + 1);
    let mut bytes = Vec::new();
    input.take(len).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn write_verdict(output: &mut impl Write, tag: u8, body: &[u8]) -> io::Result<()> {
    output.write_all(&[tag])?;
    output.write_all(&(body.len() as u64).to_le_bytes())?;
    output.write_all(body)?;
    output.flush()
}

/// Inspects, compiles, and links once, so that no cell ever meets an import that does not fit.
fn build(bytes: &[u8]) -> Result<Vec<u8>, Rejection> {
    let inspection = inspect::inspect(bytes)?;
    let engine = engine::compiling().map_err(|err| broken(&err))?;
    match inspection.kind {
        ModuleKind::CommandP1 => {
            let module = Module::from_binary(&engine, bytes).map_err(|err| broken(&err))?;
            link::modules(&engine)
                .map_err(|err| broken(&err))?
                .instantiate_pre(&module)
                .map_err(|err| unlinkable(&err))?;
            module.serialize().map_err(|err| broken(&err))
        }
        kind @ (ModuleKind::Task | ModuleKind::CommandP2) => {
            let component = Component::from_binary(&engine, bytes).map_err(|err| broken(&err))?;
            check_component(&engine, &component, kind).map_err(|err| unlinkable(&err))?;
            component.serialize().map_err(|err| broken(&err))
        }
    }
}

fn check_component(engine: &Engine, component: &Component, kind: ModuleKind) -> wasmtime::Result<()> {
    let pre = link::components(engine)?.instantiate_pre(component)?;
    match kind {
        ModuleKind::Task => TaskPre::new(pre).map(drop),
        ModuleKind::CommandP1 | ModuleKind::CommandP2 => CommandPre::new(pre).map(drop),
    }
}

fn broken(err: &wasmtime::Error) -> Rejection {
    let words = words(err);
    let memory = words.contains("Cannot allocate memory") || words.contains("out of memory");
    let code = if memory { RejectionCode::CompileMemory } else { RejectionCode::DoesNotCompile };
    Rejection::new(code, words)
}

fn unlinkable(err: &wasmtime::Error) -> Rejection {
    let words = words(err);
    // The interface is offered, the function in it is not: newer than this host.
    let missing = words.contains("was not found") || words.contains("is missing");
    let code = if missing { RejectionCode::UnknownImport } else { RejectionCode::WrongSignature };
    Rejection::new(code, words)
}

fn words(err: &wasmtime::Error) -> String {
    clean(format!("{err:#}").as_bytes(), MAX_WORDS).0.into_owned()
}
