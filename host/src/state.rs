//! What lives in a guest's store: accounting, streams, WASI and the task's context.
//! Nothing ambient: no inherited environment, no preopened directory, no network but `egress`.

use std::sync::Arc;
use std::time::Instant;

use wasmtime::component::ResourceTable;
use wasmtime_wasi::p1::WasiP1Ctx;
use wasmtime_wasi::random::Deterministic;
use wasmtime_wasi::{WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};
use wasmtime_wasi_http::{WasiHttpCtx, WasiHttpCtxView, WasiHttpView};

use crate::capability::call::Ask;
use crate::capability::guest::Asks;
use crate::control::Control;
use crate::egress::call::FromGuest;
use crate::egress::guest::{Calls, Hooks};
use crate::files::p1::Files;
use crate::files::tree::Tree;
use crate::fixed::Determinism;
use crate::limiter::Limiter;
use crate::output::{Reader, SharedCapture, Stream, Writer};
use crate::run::Context;

/// Fuel of one call into the host: calls cost 0.1 to 0.5 µs, ordinary code burns 5 to 19 per ns.
pub(crate) const HOST_CALL_FUEL: u64 = 1_000;
/// Live entries of a guest's resource table (streams, pollables, requests).
const MAX_RESOURCES: usize = 4_096;
/// Bytes of one answer of the random interfaces.
const MAX_RANDOM: u64 = 1 << 20;
/// In-memory bytes of one set of HTTP header fields.
const MAX_HTTP_FIELDS: usize = 64 << 10;

/// Hears of what a running attempt says. Called from the guest's thread and the ticker's: must be quick.
pub trait LiveSink: Send + Sync {
    /// `control` holds a report that [`Control`] had not before.
    fn progress(&self, control: &Arc<Control>);

    /// `control` has log records that nobody has taken.
    fn log(&self, control: &Arc<Control>);

    /// The calls of guests by HTTP, where somebody carries them.
    fn calls(&self) -> Option<&Calls> {
        None
    }

    /// A guest says something about a call that [`Self::calls`] has begun.
    fn http(&self, _token: u64, _call: u64, _message: FromGuest) {}

    /// The questions of guests, where somebody answers them.
    fn asks(&self) -> Option<&Asks> {
        None
    }

    /// A guest asks, and waits at [`Self::asks`].
    fn ask(&self, _token: u64, _call: u64, _ask: Ask) {}
}

/// The part of the state that every kind of guest has.
pub(crate) struct Common {
    pub(crate) limiter: Limiter,
    pub(crate) capture: SharedCapture,
    pub(crate) control: Arc<Control>,
    /// Calls into the host so far.
    pub(crate) calls: u64,
    pub(crate) fuel_limit: u64,
    /// Fixed clocks and random values.
    pub(crate) determinism: Option<Determinism>,
}

impl Common {
    /// What the calls into the host cost in fuel. Kept apart from the engine's counter, which
    /// cannot be changed while guest code holds it in a register.
    pub(crate) const fn calls_fuel(&self) -> u64 {
        self.calls.saturating_mul(HOST_CALL_FUEL)
    }
}

/// State that the runner can account for.
pub(crate) trait Accounted: Send + 'static {
    fn common(&self) -> &Common;
    fn common_mut(&mut self) -> &mut Common;
    /// Files of the guest, if it has a scratch directory.
    fn tree(&self) -> Option<&Tree> {
        None
    }
}

/// What a command is started with.
#[derive(Default)]
pub(crate) struct Start {
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) stdin: Vec<u8>,
}

/// A WASI context with these streams and nothing else.
fn wasi(start: Start, common: &Common, stdout: Stream) -> WasiCtxBuilder {
    let capture = &common.capture;
    let mut builder = WasiCtxBuilder::new();
    builder
        .args(&start.args)
        .envs(&start.env)
        .stdout(Writer { capture: capture.clone(), stream: stdout })
        .stderr(Writer { capture: capture.clone(), stream: Stream::StderrLines })
        .max_random_size(MAX_RANDOM)
        .allow_tcp(false)
        .allow_udp(false)
        .allow_ip_name_lookup(false);
    if let Some(fixed) = &common.determinism {
        let clock = fixed.clock();
        builder
            .wall_clock(clock.clone())
            .monotonic_clock(clock)
            .secure_random(Deterministic::new(fixed.random(0)))
            .insecure_random(Deterministic::new(fixed.random(1)))
            .insecure_random_seed(u128::from(fixed.seed));
    }
    if !start.stdin.is_empty() {
        builder.stdin(Reader::new(start.stdin));
    }
    builder
}

/// State of a component.
pub(crate) struct Host {
    pub(crate) common: Common,
    pub(crate) context: Context,
    pub(crate) timeout_ms: u64,
    pub(crate) deadline: Instant,
    pub(crate) progress: Option<Arc<dyn LiveSink>>,
    pub(crate) table: ResourceTable,
    start: Start,
    stdout: Stream,
    /// Built at the first use: many tasks never call WASI.
    wasi: Option<Box<WasiCtx>>,
    http: WasiHttpCtx,
    pub(crate) hooks: Hooks,
    /// Who answers calls of capabilities; without it every one is denied.
    pub(crate) asker: Option<Arc<dyn LiveSink>>,
    /// What the largest call of a capability so far was counted with.
    pub(crate) asking_bytes: u64,
    /// Handles of its store.
    pub(crate) kv_handles: usize,
    /// What people have set on its task, once it was asked for.
    pub(crate) config: Option<Vec<(String, String)>>,
}

impl Host {
    pub(crate) fn new(
        common: Common,
        context: Context,
        timeout_ms: u64,
        deadline: Instant,
        start: Start,
        stdout: Stream,
    ) -> Self {
        let mut table = ResourceTable::new();
        table.set_max_capacity(MAX_RESOURCES);
        let mut http = WasiHttpCtx::new();
        http.set_field_size_limit(MAX_HTTP_FIELDS);
        let hooks = Hooks::new(common.control.token, common.capture.clone());
        Self {
            common,
            context,
            timeout_ms,
            deadline,
            progress: None,
            table,
            start,
            stdout,
            wasi: None,
            http,
            hooks,
            asker: None,
            asking_bytes: 0,
            kv_handles: 0,
            config: None,
        }
    }
}

impl Accounted for Host {
    fn common(&self) -> &Common {
        &self.common
    }

    fn common_mut(&mut self) -> &mut Common {
        &mut self.common
    }
}

impl WasiView for Host {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        self.common.calls += 1;
        let Self { wasi: slot, start, common, stdout, table, .. } = self;
        let ctx = slot.get_or_insert_with(|| Box::new(wasi(std::mem::take(start), common, *stdout).build()));
        WasiCtxView { ctx, table }
    }
}

impl WasiHttpView for Host {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        self.common.calls += 1;
        WasiHttpCtxView { hooks: &mut self.hooks, table: &mut self.table, ctx: &mut self.http }
    }
}

/// State of a preview 1 command.
pub(crate) struct HostP1 {
    pub(crate) common: Common,
    pub(crate) files: Option<Files>,
    wasi: WasiP1Ctx,
}

impl HostP1 {
    pub(crate) fn new(common: Common, start: Start, files: Option<Files>) -> Self {
        let mut wasi = wasi(start, &common, Stream::Result).build_p1();
        wasi.ctx().table.set_max_capacity(MAX_RESOURCES);
        Self { common, files, wasi }
    }

    /// Called once per host call by the linker.
    pub(crate) fn enter(&mut self) -> &mut WasiP1Ctx {
        self.common.calls += 1;
        &mut self.wasi
    }
}

impl Accounted for HostP1 {
    fn common(&self) -> &Common {
        &self.common
    }

    fn common_mut(&mut self) -> &mut Common {
        &mut self.common
    }

    fn tree(&self) -> Option<&Tree> {
        self.files.as_ref().map(Files::tree)
    }
}
