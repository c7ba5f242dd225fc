//! The processes guests run in: started, watched, started again when they die, and ended when nobody needs them. Owns the
//! processes; which attempt goes to which, and when one is begun or ended, is decided in [`rooms`](crate::domain::rooms),
//! and who may run on how many threads while they compete for the cores in [`grants`](crate::domain::grants). Never
//! decides what an attempt's end means.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use sandbar_host::cell::{Cell, CellConfig, CellEvent, CellEvents, Limit, Use};
use sandbar_host::walls::{Wall, Walls};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::domain::grants::{self, Grants};
use crate::domain::ids::TenantId;
use crate::domain::isolation::{Owner, Rules};
use crate::domain::rooms::{Reach, Room, Rooms, Step};
use crate::worker::Settings;

/// Events waiting for the dispatcher, over all cells. A full queue makes cells wait, not lose.
const EVENT_QUEUE: usize = 64;
/// Waits between starts of a cell that dies young.
const RESTART_MIN: Duration = Duration::from_millis(50);
const RESTART_MAX: Duration = Duration::from_secs(5);
/// A cell that lived this long has not died young.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
/// Shortest time between two decisions about the cores, however often cells report.
const DECIDE_EVERY: Duration = Duration::from_millis(5);

/// A place for a cell; the cell in it may change.
pub type Place = Room;

/// What happened in a place.
pub enum Event {
    /// A cell is ready there.
    Up(Place, Arc<Cell>),
    /// The cell there said something.
    Cell(Place, Vec<CellEvent>),
    /// The cell there was ended, and is gone.
    Left(Place),
}

/// All cells of the worker.
pub struct Cells {
    rules: Arc<Rules>,
    slots: u32,
    /// How cells of single owners are started.
    own: CellConfig,
    rooms: Rooms,
    up: HashMap<Place, Arc<Cell>>,
    keepers: HashMap<Place, Keeper>,
    events: mpsc::Sender<Event>,
    grants: Grants,
    /// Guest threads of each cell.
    threads: u32,
    /// Cells that some limit holds in, since the last decision.
    limited: BTreeSet<Place>,
    decided: Option<Instant>,
}

/// The task that looks after one place.
struct Keeper {
    end: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Cells {
    /// Start the cells that everybody shares; where there are none, one for the first tenant that has something to run.
    ///
    /// # Errors
    /// One could not be started.
    pub async fn start(settings: &Settings) -> anyhow::Result<(Self, mpsc::Receiver<Event>)> {
        let (events, receiver) = mpsc::channel(EVENT_QUEUE);
        let mut cells = Self {
            rules: Arc::clone(&settings.isolation),
            slots: settings.slots,
            own: settings.own_cell(),
            rooms: Rooms::new(settings.max_cells, settings.cell_idle),
            up: HashMap::new(),
            keepers: HashMap::new(),
            events,
            grants: Grants::new(cores()),
            threads: u32::try_from(settings.threads_per_cell).unwrap_or(u32::MAX),
            limited: BTreeSet::new(),
            decided: None,
        };
        let first = match settings.shared_cells() {
            // It shows that cells can be started, and which walls stand.
            0 => vec![(settings.own_cell(), None)],
            count => vec![(settings.cell(), Some(Owner::Everybody)); count as usize],
        };
        for (config, owner) in first {
            // The first start of each is awaited, so that a program that cannot start cells says so.
            let (cell, said) = Cell::spawn(&config).await.context("cannot start a cell")?;
            let cell = Arc::new(cell);
            started(&cell);
            let place = cells.rooms.open(owner, Instant::now());
            cells.up(place, cell.clone());
            cells.keep(place, config, Some((cell, said)));
        }
        Ok((cells, receiver))
    }

    fn keep(&mut self, place: Place, config: CellConfig, first: Option<(Arc<Cell>, CellEvents)>) {
        let end = CancellationToken::new();
        let task = tokio::spawn(keep(place, config, first, self.events.clone(), end.clone()));
        self.keepers.insert(place, Keeper { end, task });
    }

    /// A cell has come up in this place.
    pub fn up(&mut self, place: Place, cell: Arc<Cell>) {
        self.rooms.up(place, Instant::now());
        self.up.insert(place, cell);
    }

    /// The cell in this place is gone; another will come.
    pub fn down(&mut self, place: Place) {
        self.rooms.down(place);
        self.up.remove(&place);
        self.grants.gone(place);
    }

    /// The cell in this place was ended and is gone.
    pub fn left(&mut self, place: Place) {
        self.rooms.left(place);
        self.grants.gone(place);
        self.up.remove(&place);
        self.keepers.remove(&place);
    }

    /// This cell is known to be dead, whatever its events have not told yet.
    pub fn gone(&mut self, place: Place, cell: &Arc<Cell>) {
        if self.get(place).is_some_and(|there| Arc::ptr_eq(there, cell)) {
            self.down(place);
        }
    }

    /// Whether it makes sense to claim: cells of single owners are started when there is something to run.
    pub fn can_place(&self) -> bool {
        !self.rules.has_shared() || self.rooms.any_shared()
    }

    /// Whom to claim for; `None`: everybody.
    pub fn reach(&self) -> Option<Reach> {
        self.rules.has_own().then(|| self.rooms.reach(&self.rules, self.slots))
    }

    /// The least busy cell for this tenant, counted as busier by one until [`Cells::give_back`].
    pub fn take(&mut self, tenant: TenantId) -> Option<(Place, Arc<Cell>)> {
        let now = Instant::now();
        let place = self.rooms.take(self.rules.owner(tenant), now)?;
        match self.up.get(&place) {
            Some(cell) => Some((place, cell.clone())),
            None => {
                self.rooms.give_back(place, now);
                self.rooms.down(place);
                None
            }
        }
    }

    /// An attempt has left this place.
    pub fn give_back(&mut self, place: Place) {
        self.rooms.give_back(place, Instant::now());
    }

    /// An attempt waits until a cell is there for its tenant.
    pub fn wait(&mut self, tenant: TenantId, token: u64) {
        self.rooms.wait(self.rules.owner(tenant), token, Instant::now());
    }

    /// It waits no longer.
    pub fn forget(&mut self, tenant: TenantId, token: u64) {
        self.rooms.forget(self.rules.owner(tenant), token);
    }

    /// Start the cells that are waited for and end those that nobody needs.
    pub fn tend(&mut self) {
        for step in self.rooms.tend(Instant::now()) {
            match step {
                Step::Start(place) => self.keep(place, self.own.clone(), None),
                Step::End(place) => {
                    self.up.remove(&place);
                    if let Some(keeper) = self.keepers.get(&place) {
                        keeper.end.cancel();
                    }
                }
            }
        }
    }

    /// A cell says what tenants used in it: decide anew who may go on where.
    pub fn used(&mut self, place: Place, uses: &[Use]) {
        if !self.up.contains_key(&place) {
            return;
        }
        let uses: Vec<grants::Use> = uses
            .iter()
            .map(|one| grants::Use {
                tenant: one.tenant,
                weight: one.weight,
                cpu_ns: one.cpu_ns,
                runnable: one.runnable,
            })
            .collect();
        self.grants.used(place, self.threads, &uses);
        let now = Instant::now();
        if self.decided.is_some_and(|at| now.saturating_duration_since(at) < DECIDE_EVERY) {
            return;
        }
        self.decided = Some(now);
        let mut limits: BTreeMap<Place, Vec<Limit>> = BTreeMap::new();
        for limit in self.grants.limits(now) {
            let one = Limit { tenant: limit.tenant, threads: limit.threads };
            limits.entry(limit.room).or_default().push(one);
        }
        let before = std::mem::replace(&mut self.limited, limits.keys().copied().collect());
        for place in before.union(&self.limited) {
            if let Some(cell) = self.up.get(place) {
                cell.limit(limits.remove(place).unwrap_or_default());
            }
        }
    }

    /// The next attempt that waited for a cell and has one.
    pub fn next_placed(&mut self) -> Option<u64> {
        self.rooms.next_placed()
    }

    /// The next attempt that has waited for a cell for too long.
    pub fn next_overdue(&mut self) -> Option<u64> {
        self.rooms.next_overdue(Instant::now())
    }

    /// When to [`Cells::tend`] again, if nothing happens before.
    pub fn wake_at(&self) -> Option<tokio::time::Instant> {
        self.rooms.wake_at(Instant::now()).map(tokio::time::Instant::from_std)
    }

    /// The walls that stand around every cell that is up.
    pub fn walls(&self) -> Walls {
        let up: Vec<Walls> = self.up.values().map(|cell| cell.walls()).collect();
        Wall::ALL
            .into_iter()
            .filter(|wall| !up.is_empty() && up.iter().all(|walls| walls.has(*wall)))
            .collect()
    }

    /// The cell in a place, if one is up.
    pub fn get(&self, place: Place) -> Option<&Arc<Cell>> {
        self.up.get(&place)
    }

    /// The processes that are up.
    pub fn pids(&self) -> Vec<u32> {
        self.up.values().map(|cell| cell.pid()).collect()
    }

    /// End every cell at once, and start none again.
    pub fn kill(&mut self) {
        self.rooms.forget_all();
        for (_, keeper) in self.keepers.drain() {
            keeper.task.abort();
        }
        for (_, cell) in self.up.drain() {
            cell.kill();
        }
    }
}

impl Drop for Cells {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Cores this process may use; 1 when the system does not say.
fn cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX))
}

fn started(cell: &Cell) {
    let walls = cell.walls();
    info!(
        pid = cell.pid(),
        no_new_privileges = walls.no_new_privileges,
        seccomp = walls.seccomp,
        landlock = walls.landlock,
        pagemap_scan = walls.pagemap_scan,
        "cell started"
    );
}

/// Forward what the cell in a place says; when it is gone, put another there, until told to end.
async fn keep(
    place: Place,
    config: CellConfig,
    first: Option<(Arc<Cell>, CellEvents)>,
    events: mpsc::Sender<Event>,
    end: CancellationToken,
) {
    let mut wait = RESTART_MIN;
    let mut next = first;
    loop {
        let (cell, said) = match next.take() {
            Some(first) => first,
            None => {
                let spawned = tokio::select! {
                    spawned = spawn(&config, &mut wait) => spawned,
                    () = end.cancelled() => break,
                };
                if events.send(Event::Up(place, spawned.0.clone())).await.is_err() {
                    return; // dropping the last of it kills it
                }
                spawned
            }
        };
        let born = Instant::now();
        if !forward(place, &cell, said, &events, &end).await {
            return;
        }
        if end.is_cancelled() {
            info!(pid = cell.pid(), "cell ended: nobody needs it");
            break;
        }
        warn!(pid = cell.pid(), "cell gone; starting another");
        wait = if born.elapsed() > HEALTHY_AFTER { RESTART_MIN } else { (wait * 2).min(RESTART_MAX) };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = end.cancelled() => break,
        }
    }
    // Refused only when the loop has ended.
    let _ = events.send(Event::Left(place)).await;
}

/// Everything that one cell says, until it is gone; told to end, it is killed and its death kept quiet. False when nobody
/// listens any more.
async fn forward(
    place: Place,
    cell: &Cell,
    mut said: CellEvents,
    events: &mpsc::Sender<Event>,
    end: &CancellationToken,
) -> bool {
    let mut ending = false;
    loop {
        let frame = tokio::select! {
            biased;
            () = end.cancelled(), if !ending => {
                ending = true;
                cell.kill();
                continue;
            }
            frame = said.recv_all() => frame,
        };
        let Some(mut frame) = frame else { return true };
        if ending {
            frame.retain(|event| !matches!(event, CellEvent::Gone { .. }));
        }
        if !frame.is_empty() && events.send(Event::Cell(place, frame)).await.is_err() {
            cell.kill();
            return false;
        }
    }
}

/// Start a cell, however often that takes.
async fn spawn(config: &CellConfig, wait: &mut Duration) -> (Arc<Cell>, CellEvents) {
    loop {
        match Cell::spawn(config).await {
            Ok((cell, said)) => {
                started(&cell);
                return (Arc::new(cell), said);
            }
            Err(error) => {
                warn!(%error, "a cell cannot be started; trying again");
                tokio::time::sleep(*wait).await;
                *wait = (*wait * 2).min(RESTART_MAX);
            }
        }
    }
}
