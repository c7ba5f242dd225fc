//! Which tenants a worker asks for next, and how many of each. Owns virtual time per tenant and what an attempt is
//! expected to cost; never talks to the queue: whether a tenant really has work only the claim can tell.
//!
//! Algorithm: start-time fair queueing (Goyal, Vin, Cheng 1996) over tenants. A tenant's virtual time grows by
//! cost / weight; the tenant with the least goes first. Cost is CPU time: expected when an attempt is claimed (a moving
//! average per task), settled when its receipt comes. Whoever comes back from idleness, or was held back by a cap,
//! starts at the current virtual time, so waiting saves nothing up; what somebody owes beyond it is not forgotten
//! while they are away.

use std::collections::HashMap;
use std::time::Duration;

use crate::domain::ids::{TaskId, TenantId};

/// What an attempt costs at least: claiming, instantiating and acknowledging take that much, whatever the guest does.
const LEAST_COST_US: f64 = 50.0;
/// Expected of a task that nobody has seen.
const FIRST_COST_US: f64 = 1_000.0;
/// Share of a new receipt in the moving averages.
const GAIN: f64 = 0.125;
/// Tasks whose average is remembered; beyond that all are learned anew.
const MAX_TASKS: usize = 50_000;

/// A tenant that may have ready work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Who.
    pub tenant: TenantId,
    /// Share relative to others, 1 to 10,000.
    pub weight: u32,
    /// How many more of it may run anywhere; `None`: any number.
    pub free: Option<u32>,
}

/// How many invocations to ask for on behalf of one tenant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ask {
    /// Who.
    pub tenant: TenantId,
    /// Its share.
    weight: u32,
    /// How many, at least 1.
    pub count: u32,
    /// What was charged for each.
    each: f64,
}

/// What one claimed attempt was charged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Charge {
    tenant: TenantId,
    task: TaskId,
    weight: u32,
    cost: f64,
}

#[derive(Debug, Clone, Copy)]
struct Account {
    /// Virtual time, in microseconds of CPU per unit of weight.
    at: f64,
    /// What an attempt of this tenant costs, on the average.
    expected: f64,
    /// Claimed and not settled.
    open: u32,
    /// It had more work than it was given at the last choice: it keeps its virtual time, ahead or behind.
    backlogged: bool,
}

/// Virtual time per tenant. One per worker.
#[derive(Debug, Default)]
pub struct FairShare {
    accounts: HashMap<TenantId, Account>,
    tasks: HashMap<TaskId, f64>,
    /// Virtual time of the last slot given away.
    now: f64,
}

impl FairShare {
    /// Divide `slots` among the candidates in order of virtual time, charging each what it is expected to cost.
    #[must_use]
    pub fn choose(&mut self, candidates: &[Candidate], slots: u32) -> Vec<Ask> {
        if candidates.is_empty() || slots == 0 {
            return Vec::new();
        }
        let known: std::collections::HashSet<TenantId> = candidates.iter().map(|c| c.tenant).collect();
        let now = self.now;
        // Who is away and owes nothing starts like anybody new.
        self.accounts.retain(|tenant, a| {
            a.backlogged &= known.contains(tenant);
            known.contains(tenant) || a.open > 0 || a.at > now
        });
        let mut asks: Vec<Ask> = Vec::with_capacity(candidates.len());
        let mut heap = std::collections::BinaryHeap::with_capacity(candidates.len());
        for (index, candidate) in candidates.iter().enumerate() {
            let account = self.accounts.entry(candidate.tenant).or_insert(Account {
                at: now,
                expected: FIRST_COST_US,
                open: 0,
                backlogged: false,
            });
            if !account.backlogged {
                account.at = account.at.max(now);
            }
            account.backlogged = true;
            let each = account.expected.max(LEAST_COST_US);
            asks.push(Ask { tenant: candidate.tenant, weight: candidate.weight.max(1), count: 0, each });
            heap.push(Turn { at: account.at, index });
        }
        let mut left = slots;
        while left > 0 {
            let Some(Turn { at, index }) = heap.pop() else { break };
            // A tenant that has all it may have leaves the heap: what it cannot use saves nothing up.
            if candidates[index].free.is_some_and(|free| asks[index].count >= free) {
                if let Some(account) = self.accounts.get_mut(&candidates[index].tenant) {
                    account.backlogged = false;
                }
                continue;
            }
            left -= 1;
            self.now = self.now.max(at);
            let ask = &mut asks[index];
            ask.count += 1;
            let next = at + ask.each / f64::from(ask.weight);
            if let Some(account) = self.accounts.get_mut(&ask.tenant) {
                account.at = next;
            }
            heap.push(Turn { at: next, index });
        }
        asks.retain(|ask| ask.count > 0);
        asks
    }

    /// What was claimed for an ask, by task: each claimed attempt is charged what its task costs, and what the ask was
    /// charged for slots that it could not fill is given back.
    pub fn claimed(&mut self, ask: &Ask, tasks: &[TaskId]) -> Vec<Charge> {
        let charges: Vec<Charge> = tasks
            .iter()
            .map(|task| Charge {
                tenant: ask.tenant,
                task: *task,
                weight: ask.weight,
                cost: self.tasks.get(task).copied().unwrap_or(ask.each).max(LEAST_COST_US),
            })
            .collect();
        if let Some(account) = self.accounts.get_mut(&ask.tenant) {
            let charged = f64::from(ask.count) * ask.each;
            let due: f64 = charges.iter().map(|c| c.cost).sum();
            account.at += (due - charged) / f64::from(ask.weight);
            account.open = account.open.saturating_add(u32::try_from(tasks.len()).unwrap_or(u32::MAX));
            if tasks.len() < ask.count as usize {
                account.backlogged = false;
            }
        }
        charges
    }

    /// An attempt has ended and cost this much CPU time: the charge becomes the cost.
    pub fn settle(&mut self, charge: Charge, cpu: Duration) {
        let cost = (cpu.as_secs_f64() * 1e6).max(LEAST_COST_US);
        if self.tasks.len() >= MAX_TASKS && !self.tasks.contains_key(&charge.task) {
            self.tasks.clear();
        }
        let task = self.tasks.entry(charge.task).or_insert(cost);
        *task += (cost - *task) * GAIN;
        if let Some(account) = self.accounts.get_mut(&charge.tenant) {
            account.open = account.open.saturating_sub(1);
            account.expected += (cost - account.expected) * GAIN;
            account.at += (cost - charge.cost) / f64::from(charge.weight);
        }
    }
}

/// A place in the order: least virtual time first, then first come.
struct Turn {
    at: f64,
    index: usize,
}

impl PartialEq for Turn {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Turn {}
impl PartialOrd for Turn {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Turn {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        // Reversed: BinaryHeap gives the greatest first.
        other.at.total_cmp(&self.at).then(other.index.cmp(&self.index))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn tenants(weights: &[u32]) -> Vec<Candidate> {
        let of = |(i, weight): (usize, &u32)| Candidate {
            tenant: TenantId(uuid::Uuid::from_u128(i as u128 + 1)),
            weight: *weight,
            free: None,
        };
        weights.iter().enumerate().map(of).collect()
    }

    fn task(tenant: TenantId) -> TaskId {
        TaskId(tenant.0)
    }

    /// One turn in which every ask is filled and every attempt costs its tenant's `cost_us`. Returns the CPU time used.
    fn turn(share: &mut FairShare, who: &[Candidate], slots: u32, cost_us: &[u64]) -> Vec<f64> {
        let asks = share.choose(who, slots);
        let mut used = vec![0.0; who.len()];
        for ask in &asks {
            let index = who.iter().position(|c| c.tenant == ask.tenant).unwrap();
            let tasks = vec![task(ask.tenant); ask.count as usize];
            for charge in share.claimed(ask, &tasks) {
                share.settle(charge, Duration::from_micros(cost_us[index]));
                used[index] += cost_us[index] as f64;
            }
        }
        used
    }

    proptest! {
        #[test]
        fn cpu_time_is_shared_by_weight_whatever_an_attempt_costs_and_nobody_starves(
            tenants_of in prop::collection::vec((1u32..10, 100u64..20_000), 1..12), slots in 1u32..64,
        ) {
            let (weights, costs): (Vec<u32>, Vec<u64>) = tenants_of.into_iter().unzip();
            let who = tenants(&weights);
            let mut share = FairShare::default();
            // Until the averages are learned the shares are off by what was not known.
            for _ in 0..100 { turn(&mut share, &who, slots, &costs); }
            let mut used = vec![0.0; who.len()];
            let mut waited = vec![0u32; who.len()];
            for _ in 0..2_000 {
                for (index, cpu) in turn(&mut share, &who, slots, &costs).iter().enumerate() {
                    used[index] += cpu;
                    waited[index] = if *cpu > 0.0 { 0 } else { waited[index] + 1 };
                    // Others use their shares of the same virtual time first; that is bounded by weights and costs.
                    prop_assert!(waited[index] < 2_000, "{index} starves");
                }
            }
            let total: f64 = used.iter().sum();
            let weight: f64 = weights.iter().map(|w| f64::from(*w)).sum();
            // A share is exact but for the last attempt and one batch of the coarsest tenant.
            let grain = *costs.iter().max().unwrap() as f64 * f64::from(slots + 1);
            for (index, w) in weights.iter().enumerate() {
                let due = total * f64::from(*w) / weight;
                prop_assert!((used[index] - due).abs() <= due * 0.05 + grain, "{index}: {} of {due}", used[index]);
            }
        }

        #[test]
        fn every_slot_is_given_while_somebody_may_take_it(
            frees in prop::collection::vec(prop::option::of(0u32..20), 1..20), slots in 0u32..100,
        ) {
            let mut who = tenants(&vec![1; frees.len()]);
            for (c, free) in who.iter_mut().zip(&frees) { c.free = *free; }
            let room: u32 = frees.iter().map(|f| f.unwrap_or(1_000)).sum();
            let asks = FairShare::default().choose(&who, slots);
            prop_assert!(asks.iter().all(|a| who.iter().find(|c| c.tenant == a.tenant).unwrap().free.is_none_or(|f| a.count <= f)));
            prop_assert_eq!(asks.iter().map(|a| a.count).sum::<u32>(), slots.min(room));
        }
    }

    #[test]
    fn a_tenant_that_slept_does_not_catch_up() {
        let who = tenants(&[1, 1]);
        let mut share = FairShare::default();
        for _ in 0..100 {
            turn(&mut share, &who[..1], 10, &[1_000]);
        }
        let asks = share.choose(&who, 10);
        assert_eq!(asks.iter().map(|a| a.count).collect::<Vec<_>>(), [5, 5]);
    }

    #[test]
    fn a_tenant_held_back_by_its_cap_saves_nothing_up() {
        let mut who = tenants(&[1, 1]);
        who[0].free = Some(1);
        let mut share = FairShare::default();
        for _ in 0..100 {
            turn(&mut share, &who, 10, &[1_000, 1_000]);
        }
        who[0].free = None;
        let asks = share.choose(&who, 10);
        let counts: Vec<u32> = asks.iter().map(|a| a.count).collect();
        assert!(counts.len() == 2 && counts.iter().all(|c| (4..=6).contains(c)), "{counts:?}");
    }

    #[test]
    fn a_debt_is_not_forgotten_by_leaving() {
        let who = tenants(&[1, 1]);
        let mut share = FairShare::default();
        turn(&mut share, &who, 2, &[1_000, 1_000]);
        // One attempt that was expected to be short takes a second; its tenant has no other work meanwhile.
        let asks = share.choose(&who[..1], 1);
        let charge = share.claimed(&asks[0], &[task(who[0].tenant)]).remove(0);
        turn(&mut share, &who[1..], 1, &[1_000]);
        share.settle(charge, Duration::from_secs(1));
        turn(&mut share, &who[1..], 1, &[1_000]);
        let mut used = [0.0; 2];
        for _ in 0..50 {
            let now = turn(&mut share, &who, 10, &[1_000, 1_000]);
            used = [used[0] + now[0], used[1] + now[1]];
        }
        assert_eq!(used[0], 0.0, "it had its half second of this in advance");
    }

    #[test]
    fn slots_that_could_not_be_filled_are_given_back() {
        let who = tenants(&[1, 1]);
        let mut share = FairShare::default();
        let asks = share.choose(&who, 10);
        share.claimed(&asks[0], &[]);
        let _ = share.claimed(&asks[1], &[task(who[1].tenant); 5]);
        let asks = share.choose(&who, 2);
        assert_eq!((asks.len(), asks[0].tenant, asks[0].count), (1, who[0].tenant, 2));
    }
}
