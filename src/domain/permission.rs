//! Who may do what: the one table of roles and actions, and scopes, which narrow a key further. Owns nothing about keys,
//! users or HTTP: a role always acts within one tenant, and the platform's actions are those that belong to none.
//! `api::access` says which action an operation is; `docs/permissions.md` is written from both.

use std::fmt;
use std::str::FromStr;

use crate::domain::names::TaskName;

/// What somebody is in a tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Operates the installation, and is owner of the tenant it belongs to.
    Platform,
    /// Everything in its tenant, owners included.
    Owner,
    /// Everything in its tenant but what concerns owners.
    Admin,
    /// Uploads and changes tasks, and runs them.
    Developer,
    /// Runs tasks, and steers what waits and runs.
    Operator,
    /// Looks.
    Viewer,
}

macro_rules! actions {
    ($($(#[doc = $doc:literal])+ $variant:ident $word:literal $roles:literal;)+) => {
        /// What somebody wants to do.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Action { $($(#[doc = $doc])+ $variant),+ }

        impl Action {
            /// Every action.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word used in scopes, answers and the audit log.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            /// What it covers, for the documentation.
            #[must_use]
            pub fn describe(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+).trim_ascii()),+ }
            }

            /// The roles that may do it, by their letters ([`Role::letter`]).
            fn roles(self) -> &'static str {
                match self { $(Self::$variant => $roles),+ }
            }
        }
    };
}

// The table. Letters: P platform, O owner, A admin, D developer, R operator (runs), V viewer.
actions! {
    /// See tasks and versions.
    ReadTasks "read-tasks" "POADRV";
    /// Upload modules: new versions, and new tasks with them.
    Upload "upload" "POAD";
    /// Fetch uploaded modules.
    Download "download" "POAD";
    /// Change tasks: description, defaults, active, pinned version.
    ChangeTasks "change-tasks" "POAD";
    /// Delete tasks.
    DeleteTasks "delete-tasks" "POA";
    /// Submit invocations, and retry ended ones.
    Submit "submit" "POADR";
    /// See invocations, and why they wait.
    ReadInvocations "read-invocations" "POADRV";
    /// Fetch results.
    ReadResults "read-results" "POADRV";
    /// Read logs.
    ReadLogs "read-logs" "POADRV";
    /// Cancel invocations.
    Cancel "cancel" "POADR";
    /// Erase payloads of ended invocations: inputs, results, logs.
    ErasePayloads "erase-payloads" "POA";
    /// Change waiting invocations: priority, time, tags.
    ChangeInvocations "change-invocations" "POADR";
    /// See queues, dead letters, pauses and bulk operations.
    ReadQueue "read-queue" "POADRV";
    /// Steer queues: pause, resume, redrive, purge, in bulk.
    ControlQueue "control-queue" "POAR";
    /// See schedules, calendars and workflows.
    ReadSchedules "read-schedules" "POADRV";
    /// Make, change and delete schedules, calendars and workflows.
    ChangeSchedules "change-schedules" "POAD";
    /// See usage, quotas, rates, budgets and events.
    ReadUsage "read-usage" "POADRV";
    /// Divide the tenant's quotas among tasks and keys, and set budgets.
    ChangeQuotas "change-quotas" "POA";
    /// See which secrets there are (never their values), and what is encrypted.
    ReadSecrets "read-secrets" "POAD";
    /// Set and delete secrets, grant capabilities, and turn encryption at rest on and off.
    ChangeSecrets "change-secrets" "POA";
    /// See alerts and channels.
    ReadAlerts "read-alerts" "POADRV";
    /// Make, change and delete alerts and channels.
    ChangeAlerts "change-alerts" "POAR";
    /// See API keys (never the keys themselves).
    ReadKeys "read-keys" "POA";
    /// Make, change, rotate and revoke API keys.
    ManageKeys "manage-keys" "POA";
    /// See members and invitations.
    ReadPeople "read-people" "POADRV";
    /// Invite, change and remove members, and let those who are in no other tenant set a lost password anew.
    ManagePeople "manage-people" "POA";
    /// Make others owners, and owners something else.
    ManageOwners "manage-owners" "PO";
    /// Read the audit log.
    ReadAudit "read-audit" "POA";
    /// See workers and background duties of the installation.
    ReadPlatform "read-platform" "P";
    /// Steer workers and background duties of the installation.
    OperatePlatform "operate-platform" "P";
    /// See, make, suspend and delete tenants, and what they may use.
    ManageTenants "manage-tenants" "P";
}

impl Role {
    /// Every role, the most powerful first.
    pub const ALL: [Self; 6] =
        [Self::Platform, Self::Owner, Self::Admin, Self::Developer, Self::Operator, Self::Viewer];

    /// The name in the database and in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Platform => "platform",
            Self::Owner => "owner",
            Self::Admin => "admin",
            Self::Developer => "developer",
            Self::Operator => "operator",
            Self::Viewer => "viewer",
        }
    }

    fn letter(self) -> char {
        match self {
            Self::Platform => 'P',
            Self::Owner => 'O',
            Self::Admin => 'A',
            Self::Developer => 'D',
            Self::Operator => 'R',
            Self::Viewer => 'V',
        }
    }

    /// Whether it may do this, as far as the role goes.
    #[must_use]
    pub fn may(self, action: Action) -> bool {
        action.roles().contains(self.letter())
    }

    /// Whether it may do all that `other` may: whoever gives a role away must have it.
    #[must_use]
    pub fn includes(self, other: Self) -> bool {
        Action::ALL.iter().all(|action| self.may(*action) || !other.may(*action))
    }
}

/// A word that is not a role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a role; roles are owner, admin, developer, operator and viewer")]
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

/// One thing a key may be used for: an action or any, on one task or any. Written `submit`, `submit:word-count`,
/// `*:word-count`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Scope {
    /// Only this; `None`: whatever the role may.
    pub action: Option<Action>,
    /// Only this task; `None`: all.
    pub task: Option<TaskName>,
}

/// A text that is not a scope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a scope: write an action (docs/permissions.md), action:task, or *:task")]
pub struct UnknownScope(pub String);

impl FromStr for Scope {
    type Err = UnknownScope;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || UnknownScope(text.chars().take(100).collect());
        let (action, task) = match text.split_once(':') {
            Some((action, task)) => (action, Some(task)),
            None => (text, None),
        };
        let action = match action {
            // Everything on everything is what a key without scopes has: say it that way.
            "*" if task.is_some() => None,
            word => Some(*Action::ALL.iter().find(|a| a.as_str() == word).ok_or_else(unknown)?),
        };
        let task = task.map(|name| TaskName::try_from(name.to_owned()).map_err(|_| unknown())).transpose()?;
        Ok(Self { action, task })
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.action.map_or("*", Action::as_str))?;
        if let Some(task) = &self.task {
            write!(f, ":{task}")?;
        }
        Ok(())
    }
}

impl Scope {
    /// Whether everything under `other` is under this one.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        (self.action.is_none() || self.action == other.action)
            && (self.task.is_none() || self.task == other.task)
    }
}

/// On which tasks an action is permitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach<'a> {
    /// On none.
    Nothing,
    /// Only on tasks for which [`Permits::on`] says so.
    Some(Permits<'a>),
    /// On all, and on what belongs to no task.
    All,
}

/// A role and the scopes that narrow it; no scopes: whatever the role may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permits<'a> {
    /// The role.
    pub role: Role,
    /// What it is narrowed to.
    pub scopes: &'a [Scope],
}

impl<'a> Permits<'a> {
    /// On what this action is permitted.
    #[must_use]
    pub fn reach(self, action: Action) -> Reach<'a> {
        if !self.role.may(action) {
            return Reach::Nothing;
        }
        if self.scopes.is_empty() {
            return Reach::All;
        }
        let mut fitting = self.scopes.iter().filter(|s| s.action.is_none_or(|a| a == action)).peekable();
        if fitting.peek().is_none() {
            return Reach::Nothing;
        }
        if fitting.any(|scope| scope.task.is_none()) { Reach::All } else { Reach::Some(self) }
    }

    /// Whether this action is permitted on this task.
    #[must_use]
    pub fn on(self, action: Action, task: &str) -> bool {
        let fits = |s: &Scope| {
            s.action.is_none_or(|a| a == action) && s.task.as_ref().is_none_or(|t| t.as_str() == task)
        };
        self.role.may(action) && (self.scopes.is_empty() || self.scopes.iter().any(fits))
    }

    /// Whether a key with this role and these scopes may do nothing that this one may not.
    #[must_use]
    pub fn includes(self, role: Role, scopes: &[Scope]) -> bool {
        let covered = |wanted: &Scope| self.scopes.iter().any(|own| own.covers(wanted));
        self.role.includes(role)
            && (self.scopes.is_empty() || (!scopes.is_empty() && scopes.iter().all(covered)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    fn scopes(list: &[&str]) -> Vec<Scope> {
        list.iter().map(|s| s.parse().unwrap()).collect()
    }

    #[test]
    fn roles_nest_where_they_should_and_words_are_unique() {
        for role in Role::ALL {
            assert_eq!(role.as_str().parse(), Ok(role));
            assert!(Role::Platform.includes(role) && role.includes(role));
            assert!(role.includes(Role::Viewer), "{role:?}");
        }
        assert!(Role::Owner.includes(Role::Admin) && !Role::Admin.includes(Role::Owner));
        assert!(!Role::Developer.includes(Role::Operator) && !Role::Operator.includes(Role::Developer));
        assert!("root".parse::<Role>().is_err());
        let words: std::collections::BTreeSet<_> = Action::ALL.iter().map(|a| a.as_str()).collect();
        assert_eq!(words.len(), Action::ALL.len());
    }

    #[test]
    fn only_the_platform_acts_outside_tenants() {
        for action in [Action::ReadPlatform, Action::OperatePlatform, Action::ManageTenants] {
            assert!(Role::ALL.into_iter().filter(|r| r.may(action)).eq([Role::Platform]));
        }
        for action in Action::ALL {
            assert!(Role::Platform.may(*action), "{action:?}");
        }
    }

    #[test]
    fn a_scope_narrows_to_one_action_on_one_task() {
        let scopes = scopes(&["submit:echo", "read-logs", "*:other"]);
        let permits = Permits { role: Role::Operator, scopes: &scopes };
        assert_eq!(permits.reach(Action::ReadLogs), Reach::All);
        assert_eq!(permits.reach(Action::Submit), Reach::Some(permits));
        assert!(permits.on(Action::Submit, "echo") && permits.on(Action::Submit, "other"));
        assert!(!permits.on(Action::Submit, "third"));
        assert_eq!(permits.reach(Action::Upload), Reach::Nothing, "the role does not have it");
        assert!(!permits.on(Action::Upload, "other"));
        for bad in ["", "*", "submit:", ":echo", "submit:A B", "root", "submit:echo:x"] {
            assert!(bad.parse::<Scope>().is_err(), "{bad}");
        }
    }

    fn any_scope() -> impl Strategy<Value = Scope> {
        let action = proptest::option::of(proptest::sample::select(Action::ALL));
        let task = proptest::option::of(proptest::sample::select(vec!["a", "b"]));
        (action, task).prop_filter_map("everything is no scope", |(action, task)| {
            if action.is_none() && task.is_none() {
                return None;
            }
            Some(Scope { action, task: task.map(|t| TaskName::try_from(t.to_owned()).unwrap()) })
        })
    }

    proptest! {
        #[test]
        fn whoever_may_give_a_key_away_may_do_all_that_it_may(
            own_role in proptest::sample::select(Role::ALL.to_vec()),
            own in proptest::collection::vec(any_scope(), 0..3),
            role in proptest::sample::select(Role::ALL.to_vec()),
            given in proptest::collection::vec(any_scope(), 0..3),
        ) {
            let giver = Permits { role: own_role, scopes: &own };
            let key = Permits { role, scopes: &given };
            if giver.includes(role, &given) {
                for action in Action::ALL {
                    for task in ["a", "b", "c"] {
                        prop_assert!(!key.on(*action, task) || giver.on(*action, task), "{action:?} {task}");
                    }
                    prop_assert!(key.reach(*action) != Reach::All || giver.reach(*action) == Reach::All);
                }
            }
        }

        #[test]
        fn a_scope_is_read_as_it_is_written(scope in any_scope()) {
            prop_assert_eq!(scope.to_string().parse::<Scope>(), Ok(scope));
        }
    }
}
