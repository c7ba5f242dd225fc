//! What is broken and in which order: all of it follows from a seed.

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// One thing that goes wrong. Numbers choose the victim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL to a worker; another takes its place.
    Worker(usize),
    /// SIGKILL to a cell of a worker.
    Cell(usize),
    /// SIGKILL to a server; it comes back at its address.
    Server(usize),
    /// A worker and its cells stand still until long after the lease, then go on.
    Suspend(usize),
    /// Postgres stops at once, as `pg_ctl stop -m immediate` does, and comes back.
    Postgres,
    /// Every connection of ours is terminated by the server.
    Backends,
    /// Somebody holds an old snapshot and the locks of all leases for a while.
    Held,
    /// Somebody takes every connection that Postgres has left.
    Exhausted,
}

impl Fault {
    /// Whether processes die of it.
    pub fn is_kill(self) -> bool {
        matches!(self, Self::Worker(_) | Self::Cell(_) | Self::Server(_) | Self::Postgres)
    }
}

/// Faults in an order that the seed decides, until there are so many kills. Each kind comes at least once.
pub fn plan(seed: u64, kills: usize, workers: usize, servers: usize) -> Vec<Fault> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut faults = Vec::new();
    let mut killed = 0;
    let mut cell = 0;
    let mut first: Vec<u32> = vec![0, 4, 7, 9, 11, 12, 13, 14];
    while killed < kills || !first.is_empty() {
        let die = if first.is_empty() {
            random.random_range(0..15)
        } else {
            first.swap_remove(random.random_range(0..first.len()))
        };
        let (worker, server) = (random.random_range(0..workers), random.random_range(0..servers));
        let fault = match die {
            0..=3 => Fault::Worker(worker),
            4..=6 => {
                // Never the same worker's twice in a row: a module that is there at both deaths, with hardly an end in
                // between, is rightly put in quarantine.
                cell = (cell + 1 + worker % (workers - 1)) % workers;
                Fault::Cell(cell)
            }
            7..=8 => Fault::Server(server),
            9..=10 => Fault::Suspend(worker),
            11 => Fault::Postgres,
            12 => Fault::Backends,
            13 => Fault::Held,
            _ => Fault::Exhausted,
        };
        killed += usize::from(fault.is_kill());
        faults.push(fault);
    }
    faults
}
