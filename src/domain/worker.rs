//! What is wanted of a worker, and where it stands. Owns the words; how a worker obeys is in `worker`.

use std::fmt;
use std::str::FromStr;

/// What an operator wants of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Wanted {
    /// To claim and run.
    Active,
    /// To claim nothing; what runs goes on.
    Cordoned,
    /// To claim nothing, finish what runs, and leave (in `sandbar dev`: to stay, idle, until uncordoned).
    Draining,
}

impl Wanted {
    /// Every wish.
    pub const ALL: [Self; 3] = [Self::Active, Self::Cordoned, Self::Draining];

    /// The name in the API and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Cordoned => "cordoned",
            Self::Draining => "draining",
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is none of these.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a wish; use active, cordoned or draining")]
pub struct UnknownWanted(pub String);

impl FromStr for Wanted {
    type Err = UnknownWanted;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|wanted| wanted.as_str() == text)
            .ok_or_else(|| UnknownWanted(text.chars().take(32).collect()))
    }
}
