//! Who may share a process with whom. Owns the rule; which process that is, is for `rooms` and the worker.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::domain::ids::TenantId;

/// Groups that one worker may know.
pub const MAX_GROUPS: usize = 256;
/// Tenants in all of them.
pub const MAX_GROUPED: usize = 10_000;
/// Characters of a group's name.
pub const MAX_NAME: usize = 64;

/// Where the attempts of tenants run that are in no group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// In cells that all of them share.
    #[default]
    Shared,
    /// Each tenant's in a cell of its own.
    Tenant,
}

/// Groups of tenants that share a cell, by name.
pub type Groups = BTreeMap<String, Vec<TenantId>>;

/// Whose attempts run together in one cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Owner {
    /// Of everybody who has no cell of their own.
    Everybody,
    /// Of one tenant.
    Tenant(TenantId),
    /// Of one group, by its place among them.
    Group(u16),
}

/// Why groups cannot be as they are written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GroupsProblem {
    /// Too many.
    #[error("more than {MAX_GROUPS} groups")]
    Groups,
    /// Too many tenants.
    #[error("more than {MAX_GROUPED} tenants in all groups")]
    Tenants,
    /// A name that is empty or too long.
    #[error("the name of a group has 1 to {MAX_NAME} characters")]
    Name,
    /// Whoever is in two groups would let both into one process.
    #[error("tenant {0} is in more than one place")]
    Twice(TenantId),
}

/// The rule of one worker.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    isolation: Isolation,
    groups: HashMap<TenantId, u16>,
}

impl Rules {
    /// Of this configuration.
    ///
    /// # Errors
    /// The first thing that is wrong with the groups.
    pub fn new(isolation: Isolation, groups: &Groups) -> Result<Self, GroupsProblem> {
        if groups.len() > MAX_GROUPS {
            return Err(GroupsProblem::Groups);
        }
        if groups.values().map(Vec::len).sum::<usize>() > MAX_GROUPED {
            return Err(GroupsProblem::Tenants);
        }
        let mut of = HashMap::new();
        for (group, (name, tenants)) in (0u16..).zip(groups) {
            if name.is_empty() || name.chars().count() > MAX_NAME {
                return Err(GroupsProblem::Name);
            }
            for tenant in tenants {
                if of.insert(*tenant, group).is_some() {
                    return Err(GroupsProblem::Twice(*tenant));
                }
            }
        }
        Ok(Self { isolation, groups: of })
    }

    /// Whose cell a tenant's attempts run in.
    #[must_use]
    pub fn owner(&self, tenant: TenantId) -> Owner {
        match (self.groups.get(&tenant), self.isolation) {
            (Some(group), _) => Owner::Group(*group),
            (None, Isolation::Shared) => Owner::Everybody,
            (None, Isolation::Tenant) => Owner::Tenant(tenant),
        }
    }

    /// Whether there are cells that everybody shares.
    #[must_use]
    pub fn has_shared(&self) -> bool {
        self.isolation == Isolation::Shared
    }

    /// Whether there may be cells of one tenant or one group.
    #[must_use]
    pub fn has_own(&self) -> bool {
        self.isolation == Isolation::Tenant || !self.groups.is_empty()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn tenant(n: u128) -> TenantId {
        TenantId(uuid::Uuid::from_u128(n))
    }

    #[test]
    fn a_group_goes_before_the_rule_for_the_others() {
        let groups = Groups::from([("a".to_owned(), vec![tenant(1), tenant(2)])]);
        for (isolation, other) in
            [(Isolation::Shared, Owner::Everybody), (Isolation::Tenant, Owner::Tenant(tenant(3)))]
        {
            let rules = Rules::new(isolation, &groups).unwrap();
            assert_eq!(rules.owner(tenant(1)), rules.owner(tenant(2)));
            assert_eq!(rules.owner(tenant(1)), Owner::Group(0));
            assert_eq!(rules.owner(tenant(3)), other);
            assert!(rules.has_own());
        }
        let plain = Rules::default();
        assert!(plain.has_shared() && !plain.has_own());
        assert_eq!(plain.owner(tenant(1)), Owner::Everybody);
    }

    #[test]
    fn groups_that_make_no_sense_are_refused() {
        let twice = Groups::from([("a".to_owned(), vec![tenant(1)]), ("b".to_owned(), vec![tenant(1)])]);
        assert_eq!(Rules::new(Isolation::Shared, &twice).unwrap_err(), GroupsProblem::Twice(tenant(1)));
        let unnamed = Groups::from([(String::new(), vec![tenant(1)])]);
        assert_eq!(Rules::new(Isolation::Shared, &unnamed).unwrap_err(), GroupsProblem::Name);
        let many = Groups::from([("a".to_owned(), (0..=MAX_GROUPED as u128).map(tenant).collect())]);
        assert_eq!(Rules::new(Isolation::Shared, &many).unwrap_err(), GroupsProblem::Tenants);
        let many = (0..=MAX_GROUPS).map(|n| (n.to_string(), Vec::new())).collect();
        assert_eq!(Rules::new(Isolation::Shared, &many).unwrap_err(), GroupsProblem::Groups);
    }
}
