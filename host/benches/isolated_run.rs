//! One isolated run of a trivial component (fresh store, fresh instance, WASI linked, fuel and epochs on): bare, tuned
//! Wasmtime; this crate in one process; this crate in a cell. The ratios are what counts; see docs/performance.md.
//!
//! Needs the guest `echo`: `cargo build --release --target wasm32-wasip2 -p guest-echo` in tests/guests, with
//! CARGO_TARGET_DIR=target/guests of the repository. `make bench` does it.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sandbar_host::artifact::{Artifact, ArtifactCache, ArtifactKey};
use sandbar_host::cell::{Cell, CellConfig, CellEvent, CellEvents};
use sandbar_host::compile::CompileLimits;
use sandbar_host::limits::Limits;
use sandbar_host::outcome::Termination;
use sandbar_host::run::{Attempt, Context, Control, Input, Options, Runtime};
use sandbar_host::{Compiler, ModuleHash};
use wasmtime::component::{Component, HasSelf, Linker, ResourceTable};
use wasmtime::{Config, Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig, Store};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

const INPUT: &[u8] = b"{\"n\":1}";
/// Attempts in flight while a cell is measured.
const IN_FLIGHT: u64 = 256;

mod bindings {
    wasmtime::component::bindgen!({ path: "../guest-sdk/wit", world: "task", exports: { default: async } });
}

/// What bare Wasmtime keeps per store; the imports of the task world do nothing.
struct Bare {
    wasi: WasiCtx,
    table: ResourceTable,
}

impl WasiView for Bare {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl bindings::sandbar::task::context::Host for Bare {
    fn get(&mut self) -> bindings::sandbar::task::context::Info {
        bindings::sandbar::task::context::Info {
            invocation_id: String::new(),
            task: String::new(),
            attempt: 1,
            max_attempts: 1,
            timeout_ms: 60_000,
            tags: Vec::new(),
        }
    }
    fn remaining_ms(&mut self) -> u64 {
        60_000
    }
    fn cancelled(&mut self) -> bool {
        false
    }
    fn progress(&mut self, _: u64, _: u64, _: String) {}
}

impl bindings::sandbar::task::log::Host for Bare {
    fn emit(
        &mut self,
        _: bindings::sandbar::task::log::Level,
        _: String,
        _: String,
        _: Vec<(String, String)>,
    ) {
    }
}

impl bindings::sandbar::task::types::Host for Bare {}

fn guest() -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guests/wasm32-wasip2/release/echo.wasm");
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error} (run `make bench`)", path.display()))
}

/// Wasmtime as MEASURED.md calls best: pooling, keep-resident with page scan, fuel and epochs on.
fn bare_engine() -> Engine {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_stacks(64)
        .total_component_instances(64)
        .total_core_instances(512)
        .total_memories(64)
        .total_tables(128)
        .linear_memory_keep_resident(10 << 20)
        .table_keep_resident(64 << 10)
        .pagemap_scan(Enabled::Auto);
    let mut config = Config::new();
    config
        .consume_fuel(true)
        .epoch_interruption(true)
        .concurrency_support(false)
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    Engine::new(&config).unwrap()
}

/// One millisecond epochs until dropped.
struct Ticks(Arc<AtomicBool>);

impl Ticks {
    fn of(engine: &Engine) -> Self {
        let (stop, engine) = (Arc::new(AtomicBool::new(false)), engine.clone());
        let stopped = stop.clone();
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
                engine.increment_epoch();
            }
        });
        Self(stop)
    }
}

impl Drop for Ticks {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

async fn bare_run(engine: &Engine, pre: &bindings::TaskPre<Bare>) {
    let state = Bare { wasi: WasiCtx::builder().build(), table: ResourceTable::new() };
    let mut store = Store::new(engine, state);
    store.set_fuel(100_000_000_000).unwrap();
    store.fuel_async_yield_interval(Some(500_000)).unwrap();
    store.epoch_deadline_async_yield_and_update(1);
    let task = pre.instantiate_async(&mut store).await.unwrap();
    let output = task.call_run(&mut store, INPUT).await.unwrap().unwrap();
    assert_eq!(output.bytes, INPUT);
}

fn bare_pre(engine: &Engine, bytes: &[u8]) -> bindings::TaskPre<Bare> {
    let mut linker = Linker::<Bare>::new(engine);
    wasmtime_wasi::p2::add_to_linker_async(&mut linker).unwrap();
    bindings::Task::add_to_linker::<_, HasSelf<_>>(&mut linker, |s| s).unwrap();
    let component = Component::new(engine, bytes).unwrap();
    bindings::TaskPre::new(linker.instantiate_pre(&component).unwrap()).unwrap()
}

fn artifact(runtime: &tokio::runtime::Runtime, bytes: Vec<u8>) -> Artifact {
    let dir = tempfile::tempdir().unwrap();
    let cache = ArtifactCache::open(dir.path(), ArtifactKey::random().unwrap(), 1 << 30).unwrap();
    let compiler = Compiler::new(program(), CompileLimits::default(), Arc::new(cache), 1);
    let hash = ModuleHash::of(&bytes);
    let fetch = || async { Ok::<_, std::convert::Infallible>(Bytes::from(bytes)) };
    runtime.block_on(compiler.artifact(1, &hash, fetch)).unwrap()
}

fn program() -> PathBuf {
    env!("CARGO_BIN_EXE_sandbar-cell").into()
}

fn attempt(hash: ModuleHash) -> Attempt {
    Attempt {
        module: hash,
        tenant: 1,
        weight: 100,
        input: Input::Task { bytes: INPUT.to_vec() },
        limits: Limits::default(),
        context: Context {
            invocation_id: "019a0000-0000-7000-8000-000000000000".to_owned(),
            task: "echo".to_owned(),
            attempt: 1,
            max_attempts: 3,
            tags: Vec::new(),
        },
        options: Options::default(),
    }
}

/// Push `total` attempts through a cell, `IN_FLIGHT` at a time.
async fn through_cell(cell: &Cell, events: &mut CellEvents, hash: ModuleHash, total: u64) {
    let one = attempt(hash);
    let (mut sent, mut done) = (0, 0);
    while done < total {
        while sent < total && sent - done < IN_FLIGHT {
            cell.submit(sent, &one).unwrap();
            sent += 1;
        }
        for event in events.recv_all().await.unwrap() {
            match event {
                CellEvent::Finished { outcome, .. } => {
                    assert_eq!(outcome.termination, Termination::Succeeded);
                    done += 1;
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

fn benches(c: &mut Criterion) {
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let bytes = guest();
    let code = artifact(&tokio, bytes.clone());

    let mut group = c.benchmark_group("isolated-run");
    group.throughput(Throughput::Elements(1)).measurement_time(Duration::from_secs(8));

    let engine = bare_engine();
    let pre = bare_pre(&engine, &bytes);
    let ticks = Ticks::of(&engine);
    group.bench_function("bare/1-thread", |b| {
        b.to_async(&tokio).iter(|| bare_run(&engine, &pre));
    });
    group.bench_function("bare/2-threads", |b| {
        b.iter_custom(|n| {
            on_two_threads(n, |share| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    for _ in 0..share {
                        bare_run(&engine, &pre).await;
                    }
                });
            })
        });
    });
    drop(ticks);

    let runtime = Runtime::new(64).unwrap();
    let loaded = runtime.load(&code).unwrap();
    let run = || runtime.attempt(loaded.clone(), attempt(code.hash), Arc::new(Control::new(0, 0)));
    group.bench_function("host/1-thread", |b| {
        b.to_async(&tokio).iter(|| async {
            assert_eq!(run().await.termination, Termination::Succeeded);
        });
    });
    group.bench_function("host/2-threads", |b| {
        b.iter_custom(|n| {
            on_two_threads(n, |share| {
                let inner = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                inner.block_on(async {
                    for _ in 0..share {
                        assert_eq!(run().await.termination, Termination::Succeeded);
                    }
                });
            })
        });
    });

    for threads in [1usize, 2] {
        let config = CellConfig { threads, slots: 64, ..CellConfig::new(program()) };
        let (cell, mut events) = tokio
            .block_on(async {
                let (cell, events) = Cell::spawn(&config).await?;
                cell.load(&code).await.map_err(std::io::Error::other)?;
                std::io::Result::Ok((cell, events))
            })
            .unwrap();
        group.bench_function(format!("cell/{threads}-thread{}", if threads == 1 { "" } else { "s" }), |b| {
            b.iter_custom(|n| {
                let began = Instant::now();
                tokio.block_on(through_cell(&cell, &mut events, code.hash, n));
                began.elapsed()
            });
        });
    }
    group.finish();
}

/// Time for `n` runs in all, half on each of two threads.
fn on_two_threads(n: u64, work: impl Fn(u64) + Sync) -> Duration {
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| work(n / 2));
        scope.spawn(|| work(n - n / 2));
    });
    began.elapsed()
}

criterion_group!(all, benches);
criterion_main!(all);
