//! Which tenants a worker asks for next, and how many of each. Owns virtual time per tenant; never talks to the
//! queue: whether a tenant really has work only the claim can tell.
//!
//! Algorithm: start-time fair queueing (Goyal, Vin, Cheng 1996) over tenants. A tenant's virtual time grows by
//! cost / weight; the tenant with the least goes first; one that comes back from idleness starts at the current
//! minimum, so sleeping saves nothing up.

use std::collections::HashMap;

use crate::domain::ids::TenantId;

/// A tenant that may have ready work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Who.
    pub tenant: TenantId,
    /// Share relative to others, 1 to 10,000.
    pub weight: u32,
}

/// How many invocations to ask for on behalf of one tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Who.
    pub tenant: TenantId,
    /// How many, at least 1.
    pub count: u32,
}

/// Virtual time per tenant. One per worker; forgets tenants that are not candidates and owe nothing.
#[derive(Debug, Default)]
pub struct FairShare {
    virtual_time: HashMap<TenantId, f64>,
    floor: f64,
}

impl FairShare {
    /// Divide `slots` among the candidates in order of virtual time, charging each an expected cost of 1 per slot.
    #[must_use]
    pub fn choose(&mut self, candidates: &[Candidate], slots: u32) -> Vec<Ask> {
        if candidates.is_empty() || slots == 0 {
            return Vec::new();
        }
        // Forget whoever is not asking any more: on return it starts at the floor like anybody new.
        self.virtual_time.retain(|tenant, _| candidates.iter().any(|c| c.tenant == *tenant));
        let floor = candidates
            .iter()
            .filter_map(|c| self.virtual_time.get(&c.tenant).copied())
            .fold(f64::INFINITY, f64::min);
        if floor.is_finite() {
            self.floor = self.floor.max(floor);
        }
        let mut heap: std::collections::BinaryHeap<Turn> = candidates
            .iter()
            .enumerate()
            .map(|(index, c)| Turn { at: *self.virtual_time.entry(c.tenant).or_insert(self.floor), index })
            .collect();
        let mut counts = vec![0u32; candidates.len()];
        for _ in 0..slots {
            let Some(Turn { at, index }) = heap.pop() else {
                break;
            };
            counts[index] += 1;
            let next = at + 1.0 / f64::from(candidates[index].weight.max(1));
            self.virtual_time.insert(candidates[index].tenant, next);
            heap.push(Turn { at: next, index });
        }
        candidates
            .iter()
            .zip(counts)
            .filter(|(_, count)| *count > 0)
            .map(|(c, count)| Ask { tenant: c.tenant, count })
            .collect()
    }

    /// Give back what was charged for slots that the claim could not fill.
    pub fn refund(&mut self, candidate: Candidate, unused: u32) {
        if let Some(at) = self.virtual_time.get_mut(&candidate.tenant) {
            *at = (*at - f64::from(unused) / f64::from(candidate.weight.max(1))).max(self.floor);
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
        weights
            .iter()
            .enumerate()
            .map(|(i, w)| Candidate { tenant: TenantId(uuid::Uuid::from_u128(i as u128 + 1)), weight: *w })
            .collect()
    }

    proptest! {
        #[test]
        fn every_slot_is_given_and_nobody_starves(weights in prop::collection::vec(1u32..10, 1..20), slots in 1u32..64) {
            let who = tenants(&weights);
            let mut share = FairShare::default();
            let mut served: HashMap<TenantId, u64> = HashMap::new();
            for _ in 0..400 {
                let asks = share.choose(&who, slots);
                prop_assert_eq!(asks.iter().map(|a| a.count).sum::<u32>(), slots);
                for a in asks { *served.entry(a.tenant).or_default() += u64::from(a.count); }
            }
            let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
            for c in &who {
                let expected = 400.0 * f64::from(slots) * f64::from(c.weight) / total;
                let got = served.get(&c.tenant).copied().unwrap_or(0) as f64;
                prop_assert!((got - expected).abs() <= expected * 0.05 + 2.0, "{got} of {expected}");
            }
        }
    }

    #[test]
    fn a_tenant_that_slept_does_not_catch_up() {
        let who = tenants(&[1, 1]);
        let mut share = FairShare::default();
        for _ in 0..100 {
            let _ = share.choose(&who[..1], 10);
        }
        let asks = share.choose(&who, 10);
        assert_eq!(asks.iter().map(|a| a.count).collect::<Vec<_>>(), [5, 5]);
    }

    #[test]
    fn a_refund_restores_the_turn() {
        let who = tenants(&[1, 1]);
        let mut share = FairShare::default();
        let _ = share.choose(&who, 2);
        let _ = share.choose(&who[..], 4);
        share.refund(who[0], 2);
        let asks = share.choose(&who, 2);
        assert_eq!(asks, [Ask { tenant: who[0].tenant, count: 2 }]);
    }
}
