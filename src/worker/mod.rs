//! A worker host: claims attempts, runs them in cells, acknowledges their ends, and stops by itself before anybody
//! else may take its work over. Owns no rule about retries or fairness (`domain`) and no SQL (`store`).
//!
//! `egress` carries out HTTP requests of guests, `capability` what they ask of the database.
//!
//! `http` makes the requests of versions that have no module.
//!
//! Parts: `lease` (are we still who the database thinks we are), `cells` (the processes guests run in), `dispatch`
//! (what runs where), `attempt` (what goes to a cell, and what an end means), `admission` (what may start), `claim` (whose work it takes), `pace` (when), `unanswered` (claims of which nobody
//! knows whether they took any), `memory` (what a look at the queue found), `load` (what heartbeats say), `ack` (ends on
//! their way to the database), `live` (logs and progress on theirs), `modules` (compiled code), `journal` (a witness in a
//! file).

mod ack;
mod admission;
mod attempt;
pub mod capability;
mod cells;
mod claim;
mod dispatch;
pub mod egress;
mod http;
mod journal;
mod lease;
mod live;
mod load;
mod memory;
mod modules;
mod pace;
mod unanswered;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use sandbar_host::Compiler;
use sandbar_host::cell::{CellConfig, MAX_SLOTS};
use sandbar_host::walls::Walls;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::app::sealed::keys::Keys;
use crate::app::signals::Signals;
use crate::app::vault::Vault;
use crate::domain::announced::Announced;
use crate::domain::isolation::Rules;
use crate::domain::quota::Defaults;
use crate::domain::worker::Wanted;
use crate::store::WorkerStore;
use crate::store::queue::{CANCEL_CHANNEL, READY_CHANNEL};
use crate::worker::egress::Allowance;
pub use attempt::ending;
use journal::Journal;

/// What a worker needs to know, checked by `config`.
#[derive(Debug, Clone)]
pub struct Settings {
    /// This program: cells are children of it.
    pub program: PathBuf,
    /// Attempts at once, over all cells.
    pub slots: u32,
    /// Cell processes that everybody shares, if tenants share cells at all.
    pub cells: u32,
    /// Who shares a cell with whom.
    pub isolation: Arc<Rules>,
    /// Most cells of single tenants and groups at once.
    pub max_cells: u32,
    /// How long such a cell stays without work.
    pub cell_idle: Duration,
    /// Threads of each cell that run guests.
    pub threads_per_cell: usize,
    /// Time between heartbeats.
    pub heartbeat: Duration,
    /// Silence after which others declare us dead.
    pub dead_after: Duration,
    /// How long a drain waits for running attempts.
    pub drain_grace: Duration,
    /// How often to look for work when nothing was heard.
    pub poll: Duration,
    /// How long workers that have run a task before may go first with its work.
    pub head_start: Duration,
    /// Walls without which no cell is started.
    pub require_walls: Walls,
    /// Bytes for cells and everything guests may make them hold.
    pub memory_bytes: u64,
    /// Of these, bytes for the attempts of one tenant.
    pub tenant_memory_bytes: u64,
    /// Admit attempts by what their module has used, not by what they declare.
    pub memory_overcommit: bool,
    /// Handovers after which an invocation is given up.
    pub max_handovers: i32,
    /// What tenants may use of whom nothing is said. Follows the configuration.
    pub defaults: Arc<Defaults>,
    /// What guests may do by HTTP.
    pub egress: egress::Settings,
    /// Opens secrets that attempts were granted.
    pub vault: Arc<Vault>,
    /// What guests may ask of the database.
    pub capabilities: capability::Settings,
    /// Drained by an operator, leave; or else stay, idle, until uncordoned.
    pub leave_when_drained: bool,
    /// File that gets a line per start, end and accepted end.
    pub journal: Option<PathBuf>,
}

/// Slots that stay warm in the cell of one tenant or group. Such cells are many and mostly idle: what each of them keeps
/// resident is memory that no attempt can have.
const OWN_WARM_SLOTS: u32 = 8;
/// Bytes of compiled code kept loaded in such a cell: of few tasks.
const OWN_CODE_BYTES: u64 = 64 << 20;

impl Settings {
    /// A cell that everybody shares.
    fn cell(&self) -> CellConfig {
        CellConfig {
            threads: self.threads_per_cell,
            slots: self.slots.div_ceil(self.cells.max(1)),
            // One cell alone shares its threads by itself.
            report_use: self.shared_cells() > 1 || self.isolation.has_own(),
            require_walls: self.require_walls,
            ..CellConfig::new(self.program.clone())
        }
    }

    /// A cell of one tenant or group. It may have the whole worker for itself, so it has as many slots.
    fn own_cell(&self) -> CellConfig {
        CellConfig {
            slots: self.slots.min(MAX_SLOTS),
            warm_slots: OWN_WARM_SLOTS,
            code_cache_bytes: OWN_CODE_BYTES,
            ..self.cell()
        }
    }

    /// Cells that everybody shares.
    fn shared_cells(&self) -> u32 {
        if self.isolation.has_shared() { self.cells.max(1) } else { 0 }
    }

    /// The memory that cells take by themselves when there are as many as there may be: code they keep loaded, slots they
    /// keep warm, the processes.
    fn cells_bytes(&self) -> u64 {
        let own = if self.isolation.has_own() { self.max_cells } else { 0 };
        let all = |cells: u32, cell: &CellConfig| u64::from(cells).saturating_mul(cell.own_bytes());
        all(self.shared_cells(), &self.cell()).saturating_add(all(own, &self.own_cell()))
    }
}

/// How a worker is told to stop.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Claim nothing more, finish what runs within the grace time, give the rest back.
    pub drain: CancellationToken,
    /// At once: running attempts are handed on.
    pub now: CancellationToken,
}

/// Run until told to stop. A lost lease is no end: the worker kills its guests and comes back under a new identity.
///
/// # Errors
/// Cells cannot be started, or the journal cannot be opened.
pub async fn run(
    settings: Settings,
    store: WorkerStore,
    signals: Arc<Signals>,
    compiler: Arc<Compiler>,
    keys: Arc<Keys>,
    stop: Stop,
) -> anyhow::Result<()> {
    let journal = Journal::open(settings.journal.as_deref()).context("cannot open worker.journal")?;
    let listening = tokio::spawn(listen(store.clone(), signals.clone(), stop.now.clone()));
    let modules = Arc::new(modules::Modules::new(compiler, store.clone()));
    let allowance = Arc::new(Allowance::new(store.clone(), Arc::clone(&settings.defaults)));
    let mut wanted = Wanted::Active;
    let result = loop {
        let Some(lease) = lease::register(&settings, &store, &stop, wanted).await else {
            break Ok(()); // told to stop before the database answered
        };
        info!(worker = %lease.worker(), slots = settings.slots, "worker registered");
        let ended = dispatch::run(
            &settings,
            (&store, &keys, &allowance),
            &signals,
            &modules,
            &lease,
            &journal,
            &stop,
        )
        .await;
        lease.stop();
        wanted = *lease.wanted.borrow();
        match ended {
            Ok(dispatch::Ended::Stopped) => {
                leave(&settings, &store, &lease).await;
                break Ok(());
            }
            Ok(dispatch::Ended::LeaseLost) => {
                warn!(worker = %lease.worker(), "lease lost: guests stopped, registering anew");
                leave(&settings, &store, &lease).await;
            }
            Err(error) => {
                leave(&settings, &store, &lease).await;
                break Err(error);
            }
        }
    };
    allowance.give_back().await;
    listening.abort();
    result
}

/// Hand on whatever is still open under this identity and remove it. If the database is away the reaper does it.
async fn leave(settings: &Settings, store: &WorkerStore, lease: &lease::Lease) {
    let reap = store.reap(settings.dead_after, settings.max_handovers, Some(lease.worker()));
    match tokio::time::timeout(Duration::from_secs(5), reap).await {
        Ok(Ok(reaped)) if reaped.handed_on > 0 => {
            info!(handed_on = reaped.handed_on, "open attempts handed on");
        }
        Ok(Ok(_)) => {}
        Ok(Err(error)) => warn!(%error, "could not leave in order; the reaper will hand the work on"),
        Err(_) => warn!("could not leave in time; the reaper will hand the work on"),
    }
}

/// Turn notifications of other processes into signals of this one. Loses some when the connection breaks; polling and
/// heartbeats make up for that.
async fn listen(store: WorkerStore, signals: Arc<Signals>, stop: CancellationToken) {
    while !stop.is_cancelled() {
        let work = async {
            let mut listener = store.listener().await?;
            listener.listen_all([READY_CHANNEL, CANCEL_CHANNEL]).await?;
            loop {
                match listener.try_recv().await? {
                    Some(heard) if heard.channel() == CANCEL_CHANNEL => {
                        if let Ok(id) = heard.payload().parse() {
                            signals.cancelled(id);
                        }
                    }
                    Some(heard) => {
                        if let Some(announced) = signals.incoming(heard.payload()) {
                            signals.ready.announce(&announced);
                        }
                    }
                    // Reconnected, so something may have been missed.
                    None => signals.ready.announce(&Announced::Any),
                }
            }
        };
        let ended: Result<std::convert::Infallible, crate::store::Error> = work.await;
        let Err(error) = ended;
        warn!(%error, "not hearing notifications; polling meanwhile");
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
            () = stop.cancelled() => {}
        }
    }
}
