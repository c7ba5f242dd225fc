//! The processes guests run in: started, watched, and started again when they die. Owns which cell gets an attempt;
//! never what an attempt's end means.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use sandbar_host::cell::{Cell, CellConfig, CellEvent};
use sandbar_host::walls::{Wall, Walls};
use tokio::sync::mpsc;
use tracing::{info, warn};

/// Events waiting for the dispatcher, over all cells. A full queue makes cells wait, not lose.
const EVENT_QUEUE: usize = 1024;
/// Waits between starts of a cell that dies young.
const RESTART_MIN: Duration = Duration::from_millis(50);
const RESTART_MAX: Duration = Duration::from_secs(5);
/// A cell that lived this long has not died young.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);

/// A place for a cell; the cell in it may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place(usize);

/// What happened in a place.
pub enum Event {
    /// A cell is ready there.
    Up(Place, Arc<Cell>),
    /// The cell there said something.
    Cell(Place, CellEvent),
}

/// All cells of the worker.
pub struct Cells {
    places: Vec<Option<Arc<Cell>>>,
    busy: Vec<u32>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Cells {
    /// Start `count` cells and wait for the first of them.
    ///
    /// # Errors
    /// Not one could be started.
    pub async fn start(config: &CellConfig, count: u32) -> anyhow::Result<(Self, mpsc::Receiver<Event>)> {
        let (events, receiver) = mpsc::channel(EVENT_QUEUE);
        let mut cells = Self { places: Vec::new(), busy: Vec::new(), tasks: Vec::new() };
        for index in 0..count.max(1) {
            // The first start of each is awaited, so that a program that cannot start cells says so.
            let first = Cell::spawn(config).await.context("cannot start a cell")?;
            let first = (Arc::new(first.0), first.1);
            started(&first.0);
            cells.places.push(Some(first.0.clone()));
            cells.busy.push(0);
            cells.tasks.push(tokio::spawn(keep(
                Place(index as usize),
                config.clone(),
                first,
                events.clone(),
            )));
        }
        Ok((cells, receiver))
    }

    /// A cell has come up in this place.
    pub fn up(&mut self, place: Place, cell: Arc<Cell>) {
        self.places[place.0] = Some(cell);
        self.busy[place.0] = 0;
    }

    /// The cell in this place is gone.
    pub fn down(&mut self, place: Place) {
        self.places[place.0] = None;
        self.busy[place.0] = 0;
    }

    /// This cell is known to be dead, whatever its events have not told yet.
    pub fn gone(&mut self, place: Place, cell: &Arc<Cell>) {
        if self.get(place).is_some_and(|there| Arc::ptr_eq(there, cell)) {
            self.down(place);
        }
    }

    /// Whether attempts can be placed.
    pub fn any_up(&self) -> bool {
        self.places.iter().any(Option::is_some)
    }

    /// The least busy cell, counted as busier by one from now on.
    pub fn take(&mut self) -> Option<(Place, Arc<Cell>)> {
        let index =
            (0..self.places.len()).filter(|i| self.places[*i].is_some()).min_by_key(|i| self.busy[*i])?;
        self.busy[index] += 1;
        self.places[index].clone().map(|cell| (Place(index), cell))
    }

    /// An attempt has left this place.
    pub fn give_back(&mut self, place: Place) {
        self.busy[place.0] = self.busy[place.0].saturating_sub(1);
    }

    /// The walls that stand around every cell that is up.
    pub fn walls(&self) -> Walls {
        let up: Vec<Walls> = self.places.iter().flatten().map(|cell| cell.walls()).collect();
        Wall::ALL
            .into_iter()
            .filter(|wall| !up.is_empty() && up.iter().all(|walls| walls.has(*wall)))
            .collect()
    }

    /// The cell in a place, if one is up.
    pub fn get(&self, place: Place) -> Option<&Arc<Cell>> {
        self.places[place.0].as_ref()
    }

    /// The processes that are up.
    pub fn pids(&self) -> Vec<u32> {
        self.places.iter().flatten().map(|cell| cell.pid()).collect()
    }

    /// End every cell at once, and start none again.
    pub fn kill(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        for cell in self.places.iter_mut().filter_map(Option::take) {
            cell.kill();
        }
    }
}

impl Drop for Cells {
    fn drop(&mut self) {
        self.kill();
    }
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

/// Forward what the cell in a place says; when it is gone, put another there.
async fn keep(
    place: Place,
    config: CellConfig,
    first: (Arc<Cell>, sandbar_host::cell::CellEvents),
    events: mpsc::Sender<Event>,
) {
    let (mut cell, mut said) = first;
    let mut wait = RESTART_MIN;
    loop {
        let born = Instant::now();
        while let Some(event) = said.recv().await {
            if events.send(Event::Cell(place, event)).await.is_err() {
                cell.kill();
                return;
            }
        }
        warn!(pid = cell.pid(), "cell gone; starting another");
        wait = if born.elapsed() > HEALTHY_AFTER { RESTART_MIN } else { (wait * 2).min(RESTART_MAX) };
        loop {
            tokio::time::sleep(wait).await;
            match Cell::spawn(&config).await {
                Ok((new, new_said)) => {
                    cell = Arc::new(new);
                    said = new_said;
                    started(&cell);
                    break;
                }
                Err(error) => {
                    warn!(%error, "a cell cannot be started; trying again");
                    wait = (wait * 2).min(RESTART_MAX);
                }
            }
        }
        if events.send(Event::Up(place, cell.clone())).await.is_err() {
            cell.kill();
            return;
        }
    }
}
