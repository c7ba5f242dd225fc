//! How much a worker has to do and how much memory it takes: what heartbeats carry. Reads `/proc`; where there is none
//! it says nothing about memory. Decides nothing.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::store::worker::Load;

/// The dispatcher writes it, the heartbeat reads it.
#[derive(Debug, Default)]
pub struct Gauge {
    running: AtomicI32,
    room: AtomicI32,
    cells: Mutex<Vec<u32>>,
}

impl Gauge {
    /// So many attempts are here.
    pub fn running(&self, attempts: usize) {
        self.running.store(i32::try_from(attempts).unwrap_or(i32::MAX), Ordering::Relaxed);
    }

    /// The memory has room for about so many more.
    pub fn room(&self, attempts: u32) {
        self.room.store(i32::try_from(attempts).unwrap_or(i32::MAX), Ordering::Relaxed);
    }

    /// These processes are the cells.
    pub fn cells(&self, pids: Vec<u32>) {
        *self.cells.lock().unwrap_or_else(PoisonError::into_inner) = pids;
    }

    /// What to say now. Reads a few small files of `/proc`, which never wait for a disk.
    pub fn read(&self) -> Load {
        let cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let worker_bytes = resident("self");
        Load {
            running: self.running.load(Ordering::Relaxed),
            room: Some(self.room.load(Ordering::Relaxed)),
            worker_bytes,
            // A cell that has just died has no memory; without `/proc` nobody knows.
            cells_bytes: worker_bytes.is_some().then(|| {
                cells.iter().filter_map(|pid| resident(&pid.to_string())).fold(0, i64::saturating_add)
            }),
            host_bytes: host(),
        }
    }
}

/// Resident bytes of a process.
fn resident(process: &str) -> Option<i64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/statm")).ok()?;
    let pages: i64 = text.split_whitespace().nth(1)?.parse().ok()?;
    let page = i64::try_from(rustix::param::page_size()).ok()?;
    pages.checked_mul(page)
}

/// Bytes of the machine, or of our control group if that has less.
fn host() -> Option<i64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib: i64 = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse().ok())?;
    let machine = kib.checked_mul(1024)?;
    // Version 2, as seen from inside; `max`, or no such file, means no limit of its own.
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let group: Option<i64> = group.and_then(|text| text.trim().parse().ok());
    Some(group.map_or(machine, |group| machine.min(group)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_process_has_memory_within_that_of_its_machine_and_its_cells_are_counted_apart() {
        let gauge = Gauge::default();
        gauge.running(3);
        let alone = gauge.read();
        assert_eq!((alone.running, alone.cells_bytes), (3, Some(0)));
        let (own, host) = (alone.worker_bytes.unwrap(), alone.host_bytes.unwrap());
        assert!(own > 1 << 20 && own < host, "{own} of {host}");
        gauge.cells(vec![std::process::id(), u32::MAX]);
        assert!(gauge.read().cells_bytes.unwrap() > 1 << 20, "a dead one counts nothing");
    }
}
