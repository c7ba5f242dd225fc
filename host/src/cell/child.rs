//! The process that is a cell: reads what the parent says and hands it to the executor.
//! Has no files, no credentials and no network; two sockets are its only doors. When the parent closes
//! one or breaks the protocol, the process ends at once.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;

use bytes::Bytes;
use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, Rlimit, setrlimit};
use wasmtime::Engine;

use super::executor::Executor;
use super::large::NICE;
use super::outbox::Outbox;
use super::protocol::{Configure, FromCell, MAX_CODE_BYTES, ToCell, VERSION, read_frame, unpack};
use super::{MAX_FRAME_BYTES, MAX_SLOTS, MIN_FRAME_BYTES};
use crate::artifact::Artifact;
use crate::engine;
use crate::module::ModuleHash;
use crate::run::{Loaded, Runtime, host_fault};
use crate::walls;

/// Descriptors of a cell: socket, stderr, the timer runtime, and one memory image per loaded memory.
const MAX_FILES: u64 = 16_384;
/// Bytes that are read at once; larger frames are read into their own place.
const READ_BYTES: usize = 64 << 10;
/// Descriptors below this number stay the standard ones.
const FIRST_FREE_FD: i32 = 3;

/// Body of the hidden subcommand `__cell`: speaks the protocol on descriptor 0 until it is closed, and writes large outcomes
/// to descriptor 1.
#[must_use]
pub fn child_main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            // The process has no subscriber of its own; its stderr is the worker's.
            let _ = writeln!(std::io::stderr(), "a cell ends: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> anyhow::Result<()> {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none)?;
    let hard = rustix::process::getrlimit(Resource::Nofile).maximum;
    let files = hard.map_or(MAX_FILES, |hard| hard.min(MAX_FILES));
    setrlimit(Resource::Nofile, Rlimit { current: Some(files), maximum: Some(files) })?;
    let socket = fcntl_dupfd_cloexec(rustix::stdio::stdin(), FIRST_FREE_FD)?;
    let input = UnixStream::from(socket);
    let mut output = input.try_clone()?;
    let mut large = File::from(fcntl_dupfd_cloexec(rustix::stdio::stdout(), FIRST_FREE_FD)?);
    // A frame and its length in one read.
    let mut input = BufReader::with_capacity(READ_BYTES, input);

    let mut frame = Vec::new();
    let mut first = None;
    if !read_frame(&mut input, MIN_FRAME_BYTES, &mut frame)? {
        return Ok(());
    }
    let mut extra = false;
    unpack::<ToCell>(&frame, |message| {
        extra |= first.is_some();
        first = Some(message);
    })?;
    let Some(ToCell::Configure(config)) = first else {
        anyhow::bail!("the first message is not the configuration");
    };
    anyhow::ensure!(!extra, "the configuration is not alone in its frame");
    anyhow::ensure!(config.version == VERSION, "another version of the protocol");
    anyhow::ensure!(config.slots <= MAX_SLOTS, "too many slots");
    let max = usize::try_from(config.max_frame_bytes)?;
    anyhow::ensure!((MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&max), "a frame size out of range");

    let outbox = Arc::new(Outbox::new(max, config.report_use));
    // In this order: the engine asks the kernel about itself by a file, threads inherit what their parent has given
    // up, and the last wall allows no further threads.
    let (engine, pagemap_scan) =
        engine::running(config.slots, config.warm_slots).map_err(|err| anyhow::anyhow!("{err:#}"))?;
    let mut walls = walls::before_threads();
    walls.pagemap_scan = pagemap_scan;
    let mut cell = CellState::new(engine, &config, outbox.clone())?;
    let told = outbox.clone();
    let bulky = outbox.clone();
    std::thread::Builder::new().name("sandbar-large".to_owned()).spawn(move || {
        // On Linux this is the niceness of the thread alone.
        let _ = rustix::process::nice(NICE);
        bulky.run_large(&mut large);
        std::process::exit(0);
    })?;
    std::thread::Builder::new().name("sandbar-outbox".to_owned()).spawn(move || {
        outbox.run(&mut output);
        // The parent does not listen any more: nothing here is worth finishing.
        std::process::exit(0);
    })?;
    walls.seccomp = walls::behind_threads();
    told.send(&FromCell::Ready(walls));
    while read_frame(&mut input, max, &mut frame)? {
        let mut result = Ok(());
        unpack::<ToCell>(&frame, |message| {
            if result.is_ok() {
                result = cell.handle(message);
            }
        })?;
        result?;
        cell.executor.flush();
        // A buffer that once was huge is not kept.
        if frame.capacity() > 4 << 20 {
            frame = Vec::new();
        }
    }
    // Threads may be deep in guest code: leave without waiting for them.
    std::process::exit(0)
}

struct CellState {
    runtime: Runtime,
    executor: Executor,
    outbox: Arc<Outbox>,
    modules: HashMap<ModuleHash, Arc<Loaded>>,
    loading: Option<Loading>,
}

/// Compiled code that has not arrived completely.
struct Loading {
    hash: ModuleHash,
    bytes: Vec<u8>,
    expected: usize,
}

impl CellState {
    fn new(engine: Engine, config: &Configure, outbox: Arc<Outbox>) -> anyhow::Result<Self> {
        let runtime = Runtime::with(engine)?;
        let executor =
            Executor::start(runtime.clone(), usize::try_from(config.threads)?, config.slots, outbox.clone())?;
        Ok(Self { runtime, executor, outbox, modules: HashMap::new(), loading: None })
    }

    fn handle(&mut self, message: ToCell) -> anyhow::Result<()> {
        match message {
            ToCell::Configure(_) => anyhow::bail!("a second configuration"),
            ToCell::Load { hash, bytes } => {
                anyhow::ensure!(bytes <= MAX_CODE_BYTES, "code of {bytes} bytes");
                anyhow::ensure!(self.loading.is_none(), "code within code");
                self.loading = Some(Loading { hash, bytes: Vec::new(), expected: usize::try_from(bytes)? });
                if bytes == 0 {
                    self.arrived(b"")?;
                }
            }
            ToCell::Code(piece) => self.arrived(&piece)?,
            ToCell::Unload(hash) => {
                self.modules.remove(&hash);
            }
            ToCell::Submit { token, attempt } => match self.modules.get(&attempt.module) {
                Some(module) => self.executor.submit(token, module.clone(), attempt),
                None => self.outbox.refused(token, host_fault("the module is not loaded in this cell")),
            },
            ToCell::Cancel { token, why } => self.executor.cancel(token, why),
            ToCell::Http { call, message } => self.outbox.calls.deliver(call, message),
            ToCell::Answer { call, answer } => self.outbox.asks.deliver(call, answer),
            ToCell::Limits(limits) => self.executor.limit(&limits),
        }
        Ok(())
    }

    fn arrived(&mut self, piece: &[u8]) -> anyhow::Result<()> {
        let Some(loading) = &mut self.loading else {
            anyhow::bail!("code of no module");
        };
        anyhow::ensure!(loading.bytes.len() + piece.len() <= loading.expected, "more code than announced");
        loading.bytes.extend_from_slice(piece);
        if loading.bytes.len() < loading.expected {
            return Ok(());
        }
        if let Some(Loading { hash, bytes, .. }) = self.loading.take() {
            match self.runtime.load(&Artifact::trusted(hash, Bytes::from(bytes))) {
                Ok(module) => {
                    self.modules.insert(hash, module);
                    self.outbox.send(&FromCell::Loaded(hash));
                }
                Err(err) => self.outbox.send(&FromCell::NotLoaded { hash, message: err.to_string() }),
            }
        }
        Ok(())
    }
}
