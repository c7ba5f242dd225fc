//! One tenant's uploads without pause: distinct modules that keep the compiler busy, compiled as a worker compiles them and
//! by its defaults. Asserts nothing about time.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context as _, Result, bail};
use bytes::{BufMut as _, Bytes, BytesMut};
use sandbar_host::artifact::{ArtifactCache, ArtifactKey};
use sandbar_host::compile::CompileLimits;
use sandbar_host::{ArtifactError, Compiler, ModuleHash};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::guests::slow_to_compile;
use super::{PATIENCE, children_cpu_s, program};

/// Defaults of `compile.parallel` and `compile.parallel_per_tenant`, and of `compile.cache_bytes`; those of the limits of one
/// compilation are [`CompileLimits::default`].
const AT_ONCE: usize = 1;
const CACHE_BYTES: u64 = 2 << 30;
/// Uploads that wait or are compiled at any moment: one more than may be compiled, so that there is no pause between two.
const WAITING: usize = AT_ONCE + 1;
/// Functions of a module: about a second of CPU, of the twenty that it may take.
const FUNCTIONS: u32 = 8;
/// The tenant, an opaque number here.
const TENANT: u128 = 1;

/// A flood that can begin and end again and again; no module of it comes twice.
pub struct CompileFlood {
    compiler: Arc<Compiler>,
    /// Without what makes it distinct.
    module: Bytes,
    next: Arc<AtomicU64>,
    /// Of what has ended: modules compiled, CPU of their children, and how long it lasted.
    modules: Cell<u64>,
    cpu_s: Cell<f64>,
    wall_s: Cell<f64>,
    _dir: tempfile::TempDir,
}

/// A flood that is under way. Dropped, its compilations end with it.
pub struct Flooding<'a> {
    flood: &'a CompileFlood,
    stop: Arc<AtomicBool>,
    uploads: JoinSet<Result<u64>>,
    began: Instant,
    cpu_s: f64,
}

/// Why an upload is not compiled.
#[derive(Debug)]
struct Stopped;

impl CompileFlood {
    pub fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let cache = ArtifactCache::open(dir.path(), ArtifactKey::random()?, CACHE_BYTES)?;
        let compiler = Compiler::new(program(), CompileLimits::default(), Arc::new(cache), AT_ONCE);
        Ok(Self {
            compiler: Arc::new(compiler.of_one_tenant(AT_ONCE)),
            module: wat::parse_str(slow_to_compile(FUNCTIONS))?.into(),
            next: Arc::default(),
            modules: Cell::default(),
            cpu_s: Cell::default(),
            wall_s: Cell::default(),
            _dir: dir,
        })
    }

    pub fn begin(&self) -> Result<Flooding<'_>> {
        let stop = Arc::new(AtomicBool::new(false));
        let (began, cpu_s) = (Instant::now(), children_cpu_s()?);
        let mut uploads = JoinSet::new();
        for _ in 0..WAITING {
            let (compiler, module) = (self.compiler.clone(), self.module.clone());
            uploads.spawn(upload(compiler, module, self.next.clone(), stop.clone()));
        }
        Ok(Flooding { flood: self, stop, uploads, began, cpu_s })
    }

    /// Something to add to a line: what the flood was, while it lasted.
    pub fn report(&self) -> String {
        format!(
            "; {} modules compiled, their children {:.2} CPUs",
            self.modules.get(),
            self.cpu_s.get() / self.wall_s.get()
        )
    }
}

impl Flooding<'_> {
    /// Begins no further compilation and waits for the one that is under way, so that nothing of it is left beside
    /// whatever is measured next.
    pub async fn end(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let mut modules = 0;
        while let Some(upload) =
            timeout(PATIENCE, self.uploads.join_next()).await.context("a compilation does not end")?
        {
            modules += upload??;
        }
        let flood = self.flood;
        flood.modules.set(flood.modules.get() + modules);
        // Of all children that ended meanwhile: there are no others.
        flood.cpu_s.set(flood.cpu_s.get() + children_cpu_s()? - self.cpu_s);
        flood.wall_s.set(flood.wall_s.get() + self.began.elapsed().as_secs_f64());
        Ok(())
    }
}

/// One module after the other, until told to stop: how many.
async fn upload(
    compiler: Arc<Compiler>,
    module: Bytes,
    next: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
) -> Result<u64> {
    let mut count = 0;
    loop {
        let wasm = distinct(&module, next.fetch_add(1, Ordering::Relaxed));
        let hash = ModuleHash::of(&wasm);
        // Asked for when it is this one's turn.
        let fetch = || async { if stop.load(Ordering::Relaxed) { Err(Stopped) } else { Ok(wasm) } };
        match compiler.artifact(TENANT, &hash, fetch).await {
            Ok(_) => count += 1,
            Err(ArtifactError::Fetch(Stopped)) => return Ok(count),
            Err(ArtifactError::Rejected(rejection)) => {
                bail!("a module of the flood is rejected: {rejection}")
            }
            Err(ArtifactError::Host(error)) => bail!("a module of the flood is not compiled: {error}"),
            Err(ArtifactError::WrongBytes { .. }) => bail!("a module of the flood is another"),
        }
    }
}

/// The module with a custom section that holds a number.
fn distinct(module: &Bytes, number: u64) -> Bytes {
    const NAME: &[u8] = b"number";
    let mut all = BytesMut::with_capacity(module.len() + 32);
    all.put_slice(module);
    // Section 0, its length, and the length of its name; all less than 128, so of one byte each.
    all.put_slice(&[0, (1 + NAME.len() + size_of::<u64>()) as u8, NAME.len() as u8]);
    all.put_slice(NAME);
    all.put_u64_le(number);
    all.freeze()
}
