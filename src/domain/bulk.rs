//! Bulk operations: what they do, where they look for what they do it to, and in which order. Owns the words and the
//! stages; never a row.

use std::str::FromStr;

use crate::domain::invocation::State;

/// What is done to each invocation that passes the filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Cancel it, waiting or running.
    Cancel,
    /// Give it another priority while it waits.
    Reprioritise,
    /// Run it again, as a new one.
    Retry,
    /// Delete it for good.
    Purge,
}

impl Action {
    /// Every action.
    pub const ALL: [Self; 4] = [Self::Cancel, Self::Reprioritise, Self::Retry, Self::Purge];

    /// The name in the API and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Reprioritise => "reprioritise",
            Self::Retry => "retry",
            Self::Purge => "purge",
        }
    }

    /// States in which an invocation can have this done to it.
    #[must_use]
    pub fn states(self) -> &'static [State] {
        match self {
            Self::Cancel => &[State::Scheduled, State::Queued, State::Running],
            Self::Reprioritise => &[State::Scheduled, State::Queued],
            Self::Retry => &[State::Dead, State::Cancelled, State::Expired],
            Self::Purge => &[State::Dead],
        }
    }

    /// Those that are meant when a filter names none.
    #[must_use]
    pub fn default_states(self) -> &'static [State] {
        match self {
            // Somebody wanted the cancelled ones gone, and the expired ones not too late.
            Self::Retry => &[State::Dead],
            _ => self.states(),
        }
    }
}

/// A word that is not an action.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an action; use cancel, reprioritise, retry or purge")]
pub struct UnknownAction(pub String);

impl FromStr for Action {
    type Err = UnknownAction;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|action| action.as_str() == text)
            .ok_or_else(|| UnknownAction(text.chars().take(32).collect()))
    }
}

/// Where an operation looks: one place after the other, in the order in which invocations move through them, so that one
/// that moves on meanwhile is met again and not missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// `scheduled`.
    Scheduled,
    /// `ready`.
    Ready,
    /// `parked`: kept back by a cap or a pause.
    Parked,
    /// Items of leases.
    Running,
    /// Results that say dead.
    Dead,
    /// Results that say cancelled.
    Cancelled,
    /// Results that say expired.
    Expired,
}

impl Stage {
    /// Every stage, in order.
    pub const ALL: [Self; 7] = [
        Self::Scheduled,
        Self::Ready,
        Self::Parked,
        Self::Running,
        Self::Dead,
        Self::Cancelled,
        Self::Expired,
    ];

    /// The name in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Scheduled => "scheduled",
            Self::Ready => "ready",
            Self::Parked => "parked",
            Self::Running => "running",
            Self::Dead => "dead",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        }
    }

    /// The state of an invocation that is there.
    #[must_use]
    pub fn state(self) -> State {
        match self {
            Self::Scheduled => State::Scheduled,
            Self::Ready | Self::Parked => State::Queued,
            Self::Running => State::Running,
            Self::Dead => State::Dead,
            Self::Cancelled => State::Cancelled,
            Self::Expired => State::Expired,
        }
    }

    /// The stage of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|stage| stage.as_str() == name)
    }

    /// The first stage for these states, or the first after `self`.
    #[must_use]
    pub fn next(after: Option<Self>, states: &[State]) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|stage| after.is_none_or(|after| *stage > after) && states.contains(&stage.state()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn stages_follow_the_way_of_an_invocation_and_cover_every_state_that_an_action_can_meet() {
        for action in Action::ALL {
            assert_eq!(action.as_str().parse(), Ok(action));
            assert!(action.default_states().iter().all(|s| action.states().contains(s)));
            for state in action.states() {
                assert!(Stage::next(None, &[*state]).is_some(), "{action:?} {state}");
            }
        }
        let cancel = Action::Cancel.states();
        let mut stage = None;
        let mut walk = Vec::new();
        while let Some(next) = Stage::next(stage, cancel) {
            walk.push(next);
            stage = Some(next);
        }
        assert_eq!(walk, [Stage::Scheduled, Stage::Ready, Stage::Parked, Stage::Running]);
        for stage in Stage::ALL {
            assert_eq!(Stage::named(stage.as_str()), Some(stage));
        }
    }
}
