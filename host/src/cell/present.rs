//! Which tenants have attempts in a cell, and what is believed of what it says they used. Owns that judgement; a cell that
//! was taken over must not be able to slow down tenants that are not in it, nor to claim more time than has passed.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::protocol::{MAX_TENANTS, Used};

/// How long after its last attempt a tenant's use is still believed: reports come a little later than ends.
const GRACE: Duration = Duration::from_secs(1);
/// What a report may exceed the time since the last one by: it is counted at the end of slices.
const SLACK: Duration = Duration::from_millis(20);

/// What a tenant used in a cell, as far as it is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Use {
    /// Who, as in [`Attempt::tenant`](crate::run::Attempt).
    pub tenant: u64,
    /// Its weight, as in the last of its attempts.
    pub weight: u32,
    /// CPU time in nanoseconds since the last report.
    pub cpu_ns: u64,
    /// Attempts that could go on at once.
    pub runnable: u32,
}

#[derive(Debug)]
struct Tenant {
    attempts: u32,
    weight: u32,
    /// When the last of them came or ended.
    seen: Instant,
}

/// The tenants of one cell.
#[derive(Debug)]
pub(super) struct Present {
    tenants: HashMap<u64, Tenant>,
    threads: u64,
    /// When the last report was counted.
    reported: Instant,
}

impl Present {
    /// In a cell with so many threads.
    pub(super) fn new(threads: u32, now: Instant) -> Self {
        Self { tenants: HashMap::new(), threads: threads.into(), reported: now }
    }

    /// One of its attempts was sent.
    pub(super) fn came(&mut self, tenant: u64, weight: u32, now: Instant) {
        if self.tenants.len() > MAX_TENANTS {
            self.tenants.retain(|_, one| one.attempts > 0 || now.saturating_duration_since(one.seen) < GRACE);
        }
        let one = self.tenants.entry(tenant).or_insert(Tenant { attempts: 0, weight, seen: now });
        one.attempts += 1;
        one.weight = weight;
        one.seen = now;
    }

    /// One of its attempts has ended.
    pub(super) fn ended(&mut self, tenant: u64, now: Instant) {
        if let Some(one) = self.tenants.get_mut(&tenant) {
            one.attempts = one.attempts.saturating_sub(1);
            one.seen = now;
        }
    }

    /// What is believed of a report.
    pub(super) fn believe(&mut self, report: &[Used], now: Instant) -> Vec<Use> {
        let passed = now.saturating_duration_since(self.reported) + SLACK;
        self.reported = now;
        let mut left = u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX).saturating_mul(self.threads);
        let believed = report.iter().filter_map(|used| {
            let one = self.tenants.get(&used.tenant)?;
            if one.attempts == 0 && now.saturating_duration_since(one.seen) >= GRACE {
                return None;
            }
            let cpu_ns = used.cpu_ns.min(left);
            left -= cpu_ns;
            Some(Use {
                tenant: used.tenant,
                weight: one.weight,
                cpu_ns,
                runnable: used.runnable.min(one.attempts),
            })
        });
        believed.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_is_believed_about_its_own_tenants_and_about_time_that_has_passed() {
        let now = Instant::now();
        let mut present = Present::new(2, now);
        present.came(1, 300, now);
        present.came(2, 100, now);
        present.ended(2, now);
        let later = now + Duration::from_millis(80);
        let used = |tenant, cpu_ns| Used { tenant, cpu_ns, runnable: 9 };
        let got = present
            .believe(&[used(1, 50_000_000), used(2, 60_000_000), used(3, 1), used(1, u64::MAX)], later);
        let all = |tenant, weight, cpu_ns, runnable| Use { tenant, weight, cpu_ns, runnable };
        // Two threads, 80 ms and the slack: 200 ms in all.
        assert_eq!(got, [all(1, 300, 50_000_000, 1), all(2, 100, 60_000_000, 0), all(1, 300, 90_000_000, 1)]);
        assert_eq!(present.believe(&[used(2, 1)], now + GRACE), [], "it has been gone for too long");
    }
}
