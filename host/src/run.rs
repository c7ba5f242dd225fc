//! Running attempts in this process: engine, linkers, and one future per attempt.
//! Owns how an attempt is set up, limited, ended and accounted for. Knows nothing of processes,
//! frames or fairness; the cell's executor polls what is made here.

pub(crate) mod link;
mod load;

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use wasmtime::component::InstancePre as ComponentPre;
use wasmtime::{Engine, InstancePre, Store, Trap, UpdateDeadline};
use wasmtime_wasi::p2::bindings::CommandPre;

use crate::artifact::Artifact;
use crate::blob;
use crate::classify::{self, Ended, Facts};
use crate::engine;
use crate::files::{self, Collected, Scratch, p1::Files};
use crate::limiter::Limiter;
use crate::limits::{Limits, hostcall_bytes};
use crate::log::Log;
use crate::module::{ModuleHash, ModuleKind};
use crate::outcome::{Outcome, Receipt, Termination};
use crate::output::{Capture, Captured, Reader, SharedCapture, Stream, Writer, clean, media_type, text_type};
use crate::state::{Accounted, Common, Host, HostP1, Start};
use crate::task_world::{Failure, FailureKind, TaskPre};
use crate::ticker::Ticker;

pub use crate::fixed::Determinism;

pub use crate::control::{CANCEL_GRACE, CancelReason, Control, Progress};
pub use crate::state::LiveSink;

/// Fuel after which the engine settles its counter and yields: 0.03 to 0.1 ms of ordinary code.
pub const FUEL_YIELD_INTERVAL: u64 = 500_000;
/// Memory in bytes that takes as long to clear as a slice, and more.
const LONG_TO_CLEAR: u64 = 16 << 20;
/// Component handles of one attempt.
const MAX_HANDLES: usize = 4_096;
/// Bytes of a guest's error message, as the WIT says.
const MAX_FAILURE_MESSAGE: usize = 4_096;
/// What guests are told instead of a hint of more than a year.
pub(crate) const MAX_RETRY_AFTER_MS: u64 = 365 * 24 * 3_600 * 1_000;

/// One attempt to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// Which module.
    pub module: ModuleHash,
    /// Opaque share key: CPU is shared fairly between different numbers.
    pub tenant: u64,
    /// Share of the tenant relative to others, 1 to 10,000; 100 is ordinary.
    pub weight: u32,
    /// What the guest gets.
    pub input: Input,
    /// What it may use.
    pub limits: Limits,
    /// What it may know.
    pub context: Context,
    /// What few attempts ask for.
    pub options: Options,
}

/// What few attempts ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// A scratch directory. Only for [`ModuleKind::CommandP1`]; with another it is a host fault.
    pub scratch: Option<Scratch>,
    /// Fixed clocks and random values.
    pub determinism: Option<Determinism>,
    /// Bytes of memory that are lent from the start; for more it asks its parent and waits. None: all of its limit.
    pub memory_lent: Option<u64>,
}

/// Input by door. Handing the wrong kind to a module is a host fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// For [`ModuleKind::Task`].
    Task {
        /// The argument of `run`.
        #[serde(with = "blob")]
        bytes: Vec<u8>,
    },
    /// For the commands.
    Command {
        /// `argv[1..]`; `argv[0]` is the task's name.
        args: Vec<String>,
        /// The whole environment.
        env: Vec<(String, String)>,
        /// All of stdin.
        #[serde(with = "blob")]
        stdin: Vec<u8>,
    },
}

impl Input {
    /// Bytes handed to the guest.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Task { bytes } => bytes.len() as u64,
            Self::Command { args, env, stdin } => {
                let args: usize = args.iter().map(String::len).sum();
                let env: usize = env.iter().map(|(k, v)| k.len() + v.len()).sum();
                (args + env + stdin.len()) as u64
            }
        }
    }

    /// Whether nothing is handed over.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What the task may know about its invocation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    /// The same for every attempt.
    pub invocation_id: String,
    /// Name of the task.
    pub task: String,
    /// From 1.
    pub attempt: u32,
    /// Attempts allowed in all.
    pub max_attempts: u32,
    /// In the order of their keys.
    pub tags: Vec<(String, String)>,
}

/// An engine could not be made or code not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The engine or its pool.
    #[error("the engine cannot start: {0}")]
    Engine(String),
    /// Compiled code that this engine does not take.
    #[error("compiled code of {hash} cannot be loaded: {message}")]
    Load {
        /// Of which module.
        hash: ModuleHash,
        /// The engine's words.
        message: String,
    },
}

/// A module whose imports are resolved; instances are made from it.
pub struct Loaded {
    hash: ModuleHash,
    bytes: u64,
    door: Door,
}

enum Door {
    Task(TaskPre<Host>),
    /// Without and with a scratch directory.
    CommandP1(InstancePre<HostP1>, InstancePre<HostP1>),
    CommandP2(CommandPre<Host>),
}

impl Loaded {
    /// Of which module.
    #[must_use]
    pub const fn hash(&self) -> &ModuleHash {
        &self.hash
    }

    /// Bytes of compiled code.
    #[must_use]
    pub const fn code_bytes(&self) -> u64 {
        self.bytes
    }

    /// Through which door it is started.
    #[must_use]
    pub const fn kind(&self) -> ModuleKind {
        match self.door {
            Door::Task(_) => ModuleKind::Task,
            Door::CommandP1(..) => ModuleKind::CommandP1,
            Door::CommandP2(_) => ModuleKind::CommandP2,
        }
    }
}

/// Everything attempts share in one process.
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Engine,
    components: wasmtime::component::Linker<Host>,
    modules: wasmtime::Linker<HostP1>,
    modules_with_files: wasmtime::Linker<HostP1>,
    ticker: Arc<Ticker>,
}

impl Runtime {
    /// An engine with room for `slots` attempts at the same time (at least 1). Reserves
    /// `slots` × 32 GiB of address space, no memory.
    ///
    /// # Errors
    /// The pool cannot be reserved or the ticker thread not be started.
    pub fn new(slots: u32) -> Result<Self, RunError> {
        let (engine, _) =
            engine::running(slots, slots).map_err(|err| RunError::Engine(format!("{err:#}")))?;
        Self::with(engine)
    }

    /// The same with an engine made before. Starts the only thread of a runtime; opens nothing.
    pub(crate) fn with(engine: Engine) -> Result<Self, RunError> {
        let fail = |err: wasmtime::Error| RunError::Engine(format!("{err:#}"));
        let components = link::components(&engine).map_err(fail)?;
        let modules = link::modules(&engine).map_err(fail)?;
        let modules_with_files = link::modules_with_files(&engine).map_err(fail)?;
        let ticker =
            Arc::new(Ticker::start(engine.clone()).map_err(|err| RunError::Engine(err.to_string()))?);
        Ok(Self { inner: Arc::new(Inner { engine, components, modules, modules_with_files, ticker }) })
    }

    /// Loads and links compiled code. Takes 0.1 to 2 ms.
    ///
    /// # Errors
    /// The code is of another engine or does not fit the pool.
    pub fn load(&self, artifact: &Artifact) -> Result<Arc<Loaded>, RunError> {
        let door = self
            .door(artifact)
            .map_err(|err| RunError::Load { hash: artifact.hash, message: format!("{err:#}") })?;
        Ok(Arc::new(Loaded { hash: artifact.hash, bytes: artifact.bytes.len() as u64, door }))
    }

    fn door(&self, artifact: &Artifact) -> wasmtime::Result<Door> {
        match load::load(&self.inner.engine, artifact)? {
            load::Code::Module(module) => Ok(Door::CommandP1(
                self.inner.modules.instantiate_pre(&module)?,
                self.inner.modules_with_files.instantiate_pre(&module)?,
            )),
            load::Code::Component(component) => {
                component_door(self.inner.components.instantiate_pre(&component)?)
            }
        }
    }

    /// Ends an attempt that runs with `control`.
    pub fn cancel(&self, control: &Control, why: CancelReason) {
        control.cancel(why);
        self.inner.ticker.hurry();
    }

    /// The number of the current epoch; changes every millisecond while something runs.
    pub(crate) fn epoch(&self) -> u64 {
        self.inner.ticker.now()
    }

    /// Runs one attempt in a fresh store, with the caller's thread as its CPU. The future needs a
    /// Tokio context for guests that sleep. `receipt.cpu_ns` counts the polls of this future.
    pub fn attempt(
        &self,
        module: Arc<Loaded>,
        attempt: Attempt,
        control: Arc<Control>,
    ) -> impl Future<Output = Outcome> + Send + 'static {
        let attempt = self.bare_attempt(module, attempt, control, None);
        async move {
            let mut attempt = pin!(attempt);
            let mut cpu = 0;
            std::future::poll_fn(move |cx| {
                let before = thread_cpu_ns();
                let polled = attempt.as_mut().poll(cx);
                cpu += thread_cpu_ns().saturating_sub(before);
                match polled {
                    Poll::Ready(mut outcome) => {
                        outcome.receipt.cpu_ns = cpu;
                        Poll::Ready(outcome)
                    }
                    Poll::Pending => Poll::Pending,
                }
            })
            .await
        }
    }

    /// The same without CPU accounting, for an executor that does it itself.
    pub(crate) fn bare_attempt(
        &self,
        module: Arc<Loaded>,
        attempt: Attempt,
        control: Arc<Control>,
        progress: Option<Arc<dyn LiveSink>>,
    ) -> impl Future<Output = Outcome> + Send + 'static {
        let runtime = self.inner.clone();
        async move {
            if let Err(err) = attempt.limits.check() {
                return host_fault(&err.to_string());
            }
            let started = Instant::now();
            let timeout = Duration::from_millis(attempt.limits.timeout_ms);
            control.arm(timeout);
            let _watch = runtime.ticker.watch(&control);
            let run = Run {
                engine: &runtime.engine,
                limits: attempt.limits,
                context: attempt.context,
                control,
                progress,
                started,
                deadline: started + timeout,
                determinism: attempt.options.determinism,
                memory_lent: attempt.options.memory_lent,
            };
            let scratch = attempt.options.scratch;
            let input_bytes = attempt.input.len() + scratch.as_ref().map_or(0, Scratch::len);
            let mut outcome = match (&module.door, attempt.input) {
                (Door::CommandP1(plain, with_files), Input::Command { args, env, stdin }) => {
                    let start = run.start(args, env, stdin);
                    let pre = if scratch.is_some() { with_files } else { plain };
                    run.command_p1(pre, start, scratch).await
                }
                _ if scratch.is_some() => host_fault("this kind of module has no scratch directory"),
                (Door::Task(pre), Input::Task { bytes }) => run.task(pre, &bytes).await,
                (Door::CommandP2(pre), Input::Command { args, env, stdin }) => {
                    let start = run.start(args, env, stdin);
                    run.command_p2(pre, start).await
                }
                _ => host_fault("the input is of another kind than the module"),
            };
            outcome.receipt.input_bytes = input_bytes;
            outcome.receipt.wall_ns = nanos(started.elapsed());
            outcome
        }
    }
}

/// A component is a task if it exports `run`, otherwise a command.
pub(crate) fn component_pre_kind(pre: &ComponentPre<Host>) -> ModuleKind {
    if pre.component().get_export_index(None, "run").is_some() {
        ModuleKind::Task
    } else {
        ModuleKind::CommandP2
    }
}

fn component_door(pre: ComponentPre<Host>) -> wasmtime::Result<Door> {
    Ok(match component_pre_kind(&pre) {
        ModuleKind::Task => Door::Task(TaskPre::new(pre)?),
        _ => Door::CommandP2(CommandPre::new(pre)?),
    })
}

/// An outcome of an attempt that never reached a guest.
pub(crate) fn host_fault(message: &str) -> Outcome {
    bare_outcome(Termination::HostFault {
        message: clean(message.as_bytes(), MAX_FAILURE_MESSAGE).0.into_owned(),
    })
}

/// An outcome without any cost.
pub(crate) fn bare_outcome(termination: Termination) -> Outcome {
    Outcome {
        termination,
        receipt: Receipt { fuel_exact: true, ..Receipt::default() },
        output: Vec::new(),
        content_type: crate::output::OCTET_STREAM.to_owned(),
        logs: Log::default(),
        backtrace: Vec::new(),
        artifacts: Vec::new(),
    }
}

/// CPU time of the calling thread in nanoseconds.
pub(crate) fn thread_cpu_ns() -> u64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    u64::try_from(now.tv_sec)
        .unwrap_or(0)
        .saturating_mul(1_000_000_000)
        .saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// One attempt on its way.
struct Run<'a> {
    engine: &'a Engine,
    limits: Limits,
    context: Context,
    control: Arc<Control>,
    progress: Option<Arc<dyn LiveSink>>,
    started: Instant,
    deadline: Instant,
    determinism: Option<Determinism>,
    memory_lent: Option<u64>,
}

/// What a guest gave back, before accounting.
struct Given {
    ended: Ended,
    result: Option<(String, Vec<u8>)>,
    /// Patterns of the files to collect.
    collect: Vec<String>,
}

impl Given {
    fn end(ended: Ended) -> Self {
        Self { ended, result: None, collect: Vec::new() }
    }

    fn settled(termination: Termination) -> Self {
        Self::end(Ended { termination, fuel_exact: true, backtrace: Vec::new() })
    }
}

impl Run<'_> {
    fn start(&self, args: Vec<String>, env: Vec<(String, String)>, stdin: Vec<u8>) -> Start {
        let mut argv = Vec::with_capacity(args.len() + 1);
        argv.push(self.context.task.clone());
        argv.extend(args);
        Start { args: argv, env, stdin }
    }

    fn common(&self, stdout_bytes: u64) -> Common {
        let capture = Capture::new(self.started, self.limits.log_bytes, stdout_bytes);
        let capture = Arc::new(Mutex::new(capture));
        if let Some(sink) = &self.progress {
            self.control.listen(capture.clone(), sink.clone());
        }
        let limit = self.limits.memory_bytes;
        let limiter = match (self.memory_lent, &self.progress) {
            (Some(lent), Some(sink)) => Limiter::lent(limit, lent, self.control.token, sink.clone()),
            _ => Limiter::new(limit),
        };
        Common {
            limiter,
            capture,
            control: self.control.clone(),
            calls: 0,
            fuel_limit: self.limits.fuel,
            determinism: self.determinism,
        }
    }

    /// A store under all limits.
    fn store<T: Accounted>(&self, data: T) -> wasmtime::Result<Store<T>> {
        let mut store = Store::new(self.engine, data);
        if store.data().common().limiter.is_lent() {
            store.limiter_async(|data| &mut data.common_mut().limiter);
        } else {
            store.limiter(|data| &mut data.common_mut().limiter);
        }
        store.set_fuel(self.limits.fuel)?;
        store.fuel_async_yield_interval(Some(FUEL_YIELD_INTERVAL))?;
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(|cx| {
            let common = cx.data().common();
            let used = common.fuel_limit.saturating_sub(cx.get_fuel()?);
            if used.saturating_add(common.calls_fuel()) > common.fuel_limit {
                return Err(Trap::OutOfFuel.into());
            }
            Ok(UpdateDeadline::Yield(1))
        });
        store.set_hostcall_fuel(usize::try_from(hostcall_bytes(&self.limits)).unwrap_or(usize::MAX));
        store.set_max_component_handles(MAX_HANDLES);
        Ok(store)
    }

    async fn task(mut self, pre: &TaskPre<Host>, input: &[u8]) -> Outcome {
        let mut host = Host::new(
            self.common(0),
            std::mem::take(&mut self.context),
            self.limits.timeout_ms,
            self.deadline,
            Start::default(),
            Stream::StdoutLines,
        );
        host.hooks.carried_by(self.progress.clone());
        host.asker = self.progress.clone();
        host.progress = self.progress.take();
        let mut store = match self.store(host) {
            Ok(store) => store,
            Err(err) => return host_fault(&format!("{err:#}")),
        };
        let called = crate::control::guard(&self.control, async {
            let task = pre.instantiate_async(&mut store).await?;
            task.call_run(&mut store, input).await
        })
        .await;
        let given = match called {
            Err(stop) => Given::end(classify::stopped(stop)),
            Ok(Err(err)) => Given::end(classify::error(&err, facts(&store, true))),
            Ok(Ok(Ok(output))) if output.bytes.len() as u64 > self.limits.output_bytes => {
                Given::settled(Termination::OutputTooLarge)
            }
            Ok(Ok(Ok(output))) => Given {
                result: Some((media_type(output.content_type), output.bytes)),
                ..Given::settled(Termination::Succeeded)
            },
            // A task that gave up because it was cancelled has not failed.
            Ok(Ok(Err(_))) if self.control.cancel_asked() => Given::settled(Termination::Cancelled),
            Ok(Ok(Err(failure))) => Given::settled(failed(&failure)),
        };
        self.settle(store, given)
    }

    async fn command_p1(
        self,
        pre: &InstancePre<HostP1>,
        mut start: Start,
        scratch: Option<Scratch>,
    ) -> Outcome {
        let common = self.common(self.limits.output_bytes);
        let mut collect = Vec::new();
        let mut files = None;
        if let Some(scratch) = scratch {
            let tree = match files::lay(&scratch, self.determinism.map(|fixed| fixed.clock_ns)) {
                Ok(tree) => tree,
                Err(why) => return bare_outcome(Termination::QuotaExceeded { quota: why }),
            };
            let stdin = Reader::new(std::mem::take(&mut start.stdin));
            let stdout = Writer { capture: common.capture.clone(), stream: Stream::Result };
            files = Some(Files::new(tree, stdin, stdout));
            collect = scratch.collect;
        }
        let host = HostP1::new(common, start, files);
        let mut store = match self.store(host) {
            Ok(store) => store,
            Err(err) => return host_fault(&format!("{err:#}")),
        };
        let called = crate::control::guard(&self.control, async {
            let instance = pre.instantiate_async(&mut store).await?;
            let start = instance.get_typed_func::<(), ()>(&mut store, "_start")?;
            start.call_async(&mut store, ()).await
        })
        .await;
        let given = match called {
            Err(stop) => Given::end(classify::stopped(stop)),
            Ok(Err(err)) => Given::end(classify::error(&err, facts(&store, false))),
            Ok(Ok(())) => Given::settled(Termination::Succeeded),
        };
        self.settle(store, Given { collect, ..given })
    }

    async fn command_p2(mut self, pre: &CommandPre<Host>, start: Start) -> Outcome {
        let mut host = Host::new(
            self.common(self.limits.output_bytes),
            std::mem::take(&mut self.context),
            self.limits.timeout_ms,
            self.deadline,
            start,
            Stream::Result,
        );
        host.hooks.carried_by(self.progress.clone());
        host.asker = self.progress.take();
        let mut store = match self.store(host) {
            Ok(store) => store,
            Err(err) => return host_fault(&format!("{err:#}")),
        };
        let called = crate::control::guard(&self.control, async {
            let command = pre.instantiate_async(&mut store).await?;
            command.wasi_cli_run().call_run(&mut store).await
        })
        .await;
        let given = match called {
            Err(stop) => Given::end(classify::stopped(stop)),
            Ok(Err(err)) => Given::end(classify::error(&err, facts(&store, false))),
            Ok(Ok(result)) => Given::settled(classify::exited(i32::from(result.is_err()))),
        };
        self.settle(store, given)
    }

    /// Reads the meters, discards the store, and puts the outcome together.
    fn settle<T: Accounted>(&self, store: Store<T>, given: Given) -> Outcome {
        let left = store.get_fuel().unwrap_or(0);
        let common = store.data().common();
        let calls_fuel = common.calls_fuel();
        let calls = common.calls;
        let peak = common.limiter.peak();
        let capture: SharedCapture = common.capture.clone();
        let Captured { out, out_dropped, log, log_kept, log_dropped } =
            crate::output::lock(&capture).finish();
        let Given { ended, result, collect } = given;
        let room = self.limits.output_bytes.saturating_sub(out.len() as u64);
        let Collected { files: artifacts, dropped: files_dropped } =
            store.data().tree().map(|tree| files::collect(tree, &collect, room)).unwrap_or_default();
        if peak >= LONG_TO_CLEAR {
            // Whoever waits for this core has already waited for the last slice.
            std::thread::yield_now();
        }
        drop(store);
        let Ended { mut termination, fuel_exact, backtrace } = ended;
        // An abort before the first settlement would read as nothing although code has run.
        let mut fuel = self.limits.fuel.saturating_sub(left).saturating_add(calls_fuel).max(1);
        if fuel > self.limits.fuel {
            fuel = self.limits.fuel;
            // Whatever the guest did afterwards, it did beyond its limit: the same on every host.
            let from_outside = matches!(
                termination,
                Termination::Cancelled
                    | Termination::LeaseLost
                    | Termination::Deadline
                    | Termination::HostFault { .. }
            );
            if !from_outside {
                termination = Termination::OutOfFuel;
            }
        }
        if termination == Termination::OutOfFuel {
            fuel = self.limits.fuel;
        }
        let kept_result = termination == Termination::Succeeded;
        let (content_type, output) = match result {
            Some(result) if kept_result => result,
            Some(_) => (crate::output::OCTET_STREAM.to_owned(), Vec::new()),
            None => (text_type(&out).to_owned(), out),
        };
        Outcome {
            termination,
            receipt: Receipt {
                fuel,
                fuel_exact,
                cpu_ns: 0,
                wall_ns: 0,
                peak_memory_bytes: peak,
                input_bytes: 0,
                output_bytes: output.len() as u64
                    + artifacts.iter().map(|file| file.bytes.len() as u64).sum::<u64>(),
                output_dropped_bytes: out_dropped.saturating_add(files_dropped),
                log_bytes: log_kept,
                log_dropped_bytes: log_dropped,
                egress_bytes: 0,
                host_calls: calls,
            },
            output,
            content_type,
            logs: log,
            backtrace,
            artifacts,
        }
    }
}

fn facts<T: Accounted>(store: &Store<T>, task: bool) -> Facts {
    Facts { refused: store.data().common().limiter.refused(), task }
}

fn failed(failure: &Failure) -> Termination {
    Termination::GuestError {
        retryable: matches!(failure.kind, FailureKind::Retryable),
        message: clean(failure.message.as_bytes(), MAX_FAILURE_MESSAGE).0.into_owned(),
        retry_after_ms: failure.retry_after_ms.map(|wait| wait.min(MAX_RETRY_AFTER_MS)),
    }
}

#[cfg(test)]
mod budget_tests;
#[cfg(test)]
mod files_tests;
#[cfg(test)]
mod nan_tests;
#[cfg(test)]
mod stray_tests;
#[cfg(test)]
pub(crate) mod tests;
