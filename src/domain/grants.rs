//! On how many threads each tenant may run in each cell, when cells compete for the cores of a worker. Owns the rule and
//! the sums behind it; never measures and never talks to a cell.
//!
//! A cell shares its threads between its tenants by itself, and the kernel shares the cores between cells, knowing nothing
//! of tenants and weights. So the worker adds up what each tenant used in all cells, divided by its weight, and whoever
//! is ahead of the least by more than a bound gets only the cores that those behind leave over. A core is never taken
//! from somebody for whom nobody else has work: the rule decides who runs, never whether.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use crate::domain::rooms::Room;

/// Virtual time that a tenant may be ahead, in nanoseconds: some slices more than a report covers.
const BOUND_NS: u64 = 10_000_000;
/// Virtual time that a tenant may begin behind the others when it wakes up, as in a cell.
const CREDIT_NS: u64 = 5_000_000;
/// What is held against a tenant at the most: it was ahead because nobody else needed the cores.
const AHEAD_NS: u64 = 1_000_000_000;
/// The weight at which virtual time passes like CPU time.
const ORDINARY_WEIGHT: u64 = 100;
/// How long a tenant with work may stand still in a cell; then it runs for one report, whatever it used, so that ends and
/// deadlines come in time.
const STANDSTILL: Duration = Duration::from_millis(200);
/// Tenants without work that are remembered.
const MAX_IDLE: usize = 4_096;

/// What a tenant used in a cell since the last report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Use {
    /// Who, as cells know it.
    pub tenant: u64,
    /// Its share relative to others, at least 1.
    pub weight: u32,
    /// CPU time in nanoseconds.
    pub cpu_ns: u64,
    /// Attempts that can go on at once.
    pub runnable: u32,
}

/// On how many threads a tenant may run in a cell. Who has none may run on all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// In which cell.
    pub room: Room,
    /// Who.
    pub tenant: u64,
    /// On how many.
    pub threads: u32,
}

#[derive(Debug, Default)]
struct Cell {
    threads: u32,
    /// Attempts that can go on, of tenants that have some.
    runnable: BTreeMap<u64, u32>,
}

/// The sums of one worker.
#[derive(Debug)]
pub struct Grants {
    cores: u32,
    /// Virtual time of each tenant.
    tenants: HashMap<u64, u64>,
    cells: BTreeMap<Room, Cell>,
    /// The least virtual time of those that have work; never goes back.
    now: u64,
    /// Who stands still, and since when.
    still: HashMap<(Room, u64), Instant>,
}

impl Grants {
    /// For a machine with so many cores.
    #[must_use]
    pub fn new(cores: u32) -> Self {
        Self {
            cores: cores.max(1),
            tenants: HashMap::new(),
            cells: BTreeMap::new(),
            now: 0,
            still: HashMap::new(),
        }
    }

    /// A cell with so many threads reports.
    pub fn used(&mut self, room: Room, threads: u32, uses: &[Use]) {
        for one in uses {
            let weight = u64::from(one.weight.max(1));
            let awake = self.cells.values().any(|cell| cell.runnable.contains_key(&one.tenant));
            let behind = self.now.saturating_sub(CREDIT_NS * ORDINARY_WEIGHT / weight);
            let virtual_ns = self.tenants.entry(one.tenant).or_insert(self.now);
            if !awake {
                *virtual_ns = (*virtual_ns).max(behind);
            }
            let cost = one.cpu_ns.saturating_mul(ORDINARY_WEIGHT) / weight;
            *virtual_ns = virtual_ns.saturating_add(cost).min(self.now.saturating_add(AHEAD_NS));
            let cell = self.cells.entry(room).or_default();
            cell.threads = threads;
            match one.runnable {
                0 => drop(cell.runnable.remove(&one.tenant)),
                more => drop(cell.runnable.insert(one.tenant, more)),
            }
        }
        let awake = self.cells.values().flat_map(|cell| cell.runnable.keys());
        if let Some(least) = awake.filter_map(|tenant| self.tenants.get(tenant)).min() {
            self.now = self.now.max(*least);
        }
        if self.tenants.len() > MAX_IDLE {
            let (cells, now) = (&self.cells, self.now);
            self.tenants.retain(|tenant, virtual_ns| {
                *virtual_ns > now || cells.values().any(|cell| cell.runnable.contains_key(tenant))
            });
        }
    }

    /// A cell is gone.
    pub fn gone(&mut self, room: Room) {
        self.cells.remove(&room);
    }

    /// Who may run on how many threads now. Empty while at most one cell has work.
    pub fn limits(&mut self, at: Instant) -> Vec<Limit> {
        let mut limits = if self.cells.values().filter(|cell| !cell.runnable.is_empty()).count() > 1 {
            self.share()
        } else {
            Vec::new()
        };
        let still: HashMap<(Room, u64), Instant> = limits
            .iter()
            .filter(|limit| limit.threads == 0)
            .map(|limit| (limit.room, limit.tenant))
            .map(|who| (who, self.still.get(&who).copied().unwrap_or(at)))
            .collect();
        let stiff = |who: &(Room, u64)| {
            still.get(who).is_some_and(|since| at.saturating_duration_since(*since) >= STANDSTILL)
        };
        limits.retain(|limit| !stiff(&(limit.room, limit.tenant)));
        // Who is let go now begins to stand still anew.
        self.still = still.iter().filter(|(who, _)| !stiff(who)).map(|(who, since)| (*who, *since)).collect();
        limits
    }

    /// Hands out the cores, to those who used least first.
    fn share(&self) -> Vec<Limit> {
        let mut order: Vec<(u64, u64)> = self
            .tenants
            .iter()
            .filter(|(tenant, _)| self.cells.values().any(|cell| cell.runnable.contains_key(tenant)))
            .map(|(tenant, virtual_ns)| (*virtual_ns, *tenant))
            .collect();
        order.sort_unstable();
        let Some(least) = order.first().map(|(virtual_ns, _)| *virtual_ns) else { return Vec::new() };
        let mut left: BTreeMap<Room, u32> =
            self.cells.iter().map(|(room, cell)| (*room, cell.threads)).collect();
        let mut cores = self.cores;
        let mut limits = Vec::new();
        for (virtual_ns, tenant) in order {
            let ahead = virtual_ns - least > BOUND_NS;
            for (room, cell) in &self.cells {
                let (Some(runnable), Some(threads)) = (cell.runnable.get(&tenant), left.get_mut(room)) else {
                    continue;
                };
                let could = (*runnable).min(*threads);
                let granted = could.min(cores);
                *threads -= granted;
                cores -= granted;
                // Those who are not ahead share what there is as it comes.
                if ahead && granted < (*runnable).min(cell.threads) {
                    limits.push(Limit { room: *room, tenant, threads: granted });
                }
            }
        }
        limits
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::domain::isolation::Owner;
    use crate::domain::rooms::Rooms;
    use proptest::prelude::*;

    fn rooms(count: usize) -> Vec<Room> {
        let mut rooms = Rooms::new(0, Duration::ZERO);
        (0..count).map(|_| rooms.open(Some(Owner::Everybody), Instant::now())).collect()
    }

    fn used(tenant: u64, weight: u32, cpu_ms: u64, runnable: u32) -> Use {
        Use { tenant, weight, cpu_ns: cpu_ms * 1_000_000, runnable }
    }

    #[test]
    fn who_is_ahead_gets_what_those_behind_leave_over() {
        let rooms = rooms(2);
        let mut grants = Grants::new(2);
        let now = Instant::now();
        grants.used(rooms[0], 2, &[used(1, 100, 20, 4)]);
        assert_eq!(grants.limits(now), [], "one cell has work");
        grants.used(rooms[1], 2, &[used(2, 100, 5, 4)]);
        assert_eq!(grants.limits(now), [], "within the bound");
        grants.used(rooms[0], 2, &[used(1, 100, 20, 4)]);
        assert_eq!(grants.limits(now), [Limit { room: rooms[0], tenant: 1, threads: 0 }]);
        grants.used(rooms[1], 2, &[used(2, 100, 0, 1)]);
        assert_eq!(
            grants.limits(now),
            [Limit { room: rooms[0], tenant: 1, threads: 1 }],
            "one core is left over"
        );
        grants.used(rooms[1], 2, &[used(2, 100, 0, 0)]);
        assert_eq!(grants.limits(now), [], "nobody else has work");
        grants.used(rooms[1], 2, &[used(2, 100, 0, 4)]);
        grants.gone(rooms[1]);
        assert_eq!(grants.limits(now), [], "its cell is gone");
    }

    #[test]
    fn a_tenant_in_two_cells_leaves_the_one_that_it_shares() {
        let rooms = rooms(2);
        let mut grants = Grants::new(2);
        grants.used(rooms[0], 1, &[used(1, 100, 10, 2), used(2, 100, 10, 2)]);
        grants.used(rooms[1], 1, &[used(1, 100, 20, 2)]);
        let limits = grants.limits(Instant::now());
        assert_eq!(
            limits,
            [Limit { room: rooms[0], tenant: 1, threads: 0 }],
            "the other cell is all its own"
        );
    }

    #[test]
    fn nobody_stands_still_for_long() {
        let rooms = rooms(2);
        let mut grants = Grants::new(1);
        grants.used(rooms[0], 1, &[used(1, 1, 1_000, 1)]);
        grants.used(rooms[1], 1, &[used(2, 10_000, 1, 1)]);
        grants.used(rooms[0], 1, &[used(1, 1, 1_000, 1)]);
        let now = Instant::now();
        assert_eq!(grants.limits(now).len(), 1);
        assert_eq!(grants.limits(now + STANDSTILL / 2).len(), 1);
        assert_eq!(grants.limits(now + STANDSTILL), []);
        assert_eq!(grants.limits(now + STANDSTILL).len(), 1, "for one report only");
    }

    proptest! {
        #[test]
        fn no_core_idles_while_somebody_has_work_and_the_least_are_never_limited(
            cores in 1u32..9,
            cells in prop::collection::vec((1u32..5, prop::collection::btree_map(0u64..6, (0u64..100, 1u32..5), 0..4)), 1..5),
        ) {
            let rooms = rooms(cells.len());
            let mut grants = Grants::new(cores);
            for (room, (threads, tenants)) in rooms.iter().zip(&cells) {
                let uses: Vec<Use> =
                    tenants.iter().map(|(tenant, (ms, runnable))| used(*tenant, 100, *ms, *runnable)).collect();
                grants.used(*room, *threads, &uses);
            }
            let limits = grants.limits(Instant::now());
            let least = grants.tenants.values().min().copied().unwrap_or(0);
            let mut could = 0;
            let mut may = 0;
            for (room, (threads, tenants)) in rooms.iter().zip(&cells) {
                let of = |tenant: &u64| limits.iter().find(|l| l.room == *room && l.tenant == *tenant);
                let all: u32 = tenants.values().map(|(_, runnable)| *runnable).sum();
                let limited: u32 = tenants
                    .iter()
                    .map(|(tenant, (_, runnable))| of(tenant).map_or(*runnable, |l| l.threads.min(*runnable)))
                    .sum();
                could += all.min(*threads);
                may += limited.min(*threads);
            }
            prop_assert!(may.min(cores) == could.min(cores), "{} of {} with {} cores", may, could, cores);
            for limit in &limits {
                prop_assert!(grants.tenants[&limit.tenant] > least + BOUND_NS);
            }
        }

        #[test]
        fn in_the_long_run_everybody_gets_what_the_weights_say(weights in prop::collection::vec(1u32..8, 2..4)) {
            let rooms = rooms(weights.len());
            let mut grants = Grants::new(2);
            let mut at = Instant::now();
            let mut got = vec![0u64; weights.len()];
            let mut limits: Vec<Limit> = Vec::new();
            for _ in 0..3_000 {
                // The kernel shares two cores of 10 ms equally between all threads that may run.
                let threads: Vec<u64> = rooms
                    .iter()
                    .map(|room| limits.iter().find(|l| l.room == *room).map_or(2, |l| l.threads.into()))
                    .collect();
                let all: u64 = threads.iter().sum();
                for (index, (weight, threads)) in weights.iter().zip(threads).enumerate() {
                    let cpu_ns = 20_000_000 * threads / all.max(1);
                    got[index] += cpu_ns;
                    let one = Use { tenant: index as u64, weight: weight * 100, cpu_ns, runnable: 2 };
                    grants.used(rooms[index], 2, &[one]);
                }
                at += Duration::from_millis(10);
                limits = grants.limits(at);
            }
            let share = |index: usize| got[index] as f64 / f64::from(weights[index]);
            for index in 1..weights.len() {
                let ratio = share(index) / share(0);
                prop_assert!((0.9..1.1).contains(&ratio), "{:?} for {:?}", got, weights);
            }
        }
    }
}
