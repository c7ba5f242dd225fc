//! Who may do what: one table of roles and actions. Owns nothing about keys or tenants; a role always acts within its
//! own tenant, and the platform's actions are those that belong to no tenant.

use std::str::FromStr;

/// What a key was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Operates the installation, and is admin of its own tenant.
    Platform,
    /// May everything in its own tenant.
    Admin,
}

/// What somebody wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Anything with the tenant's own tasks, invocations, dead letters, pauses and bulk operations.
    UseTenant,
    /// See and steer workers and background duties.
    OperatePlatform,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 2] = [Self::Platform, Self::Admin];

    /// The name in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Platform => "platform",
            Self::Admin => "admin",
        }
    }

    /// The table.
    #[must_use]
    pub fn may(self, action: Action) -> bool {
        match (self, action) {
            (Self::Platform, Action::UseTenant | Action::OperatePlatform) => true,
            (Self::Admin, Action::UseTenant) => true,
            (Self::Admin, Action::OperatePlatform) => false,
        }
    }
}

/// A word that is not a role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a role")]
pub struct UnknownRole(pub String);

impl FromStr for Role {
    type Err = UnknownRole;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| UnknownRole(text.chars().take(32).collect()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_tenants_admin_is_no_operator_of_the_platform() {
        assert!(Role::Admin.may(Action::UseTenant) && !Role::Admin.may(Action::OperatePlatform));
        assert!(Role::Platform.may(Action::UseTenant) && Role::Platform.may(Action::OperatePlatform));
        for role in Role::ALL {
            assert_eq!(role.as_str().parse(), Ok(role));
        }
        assert!("root".parse::<Role>().is_err());
    }
}
