//! The second wall: what the kernel holds back from the processes that touch untrusted modules, should a module
//! ever break out of the first one (Wasmtime). No new privileges, Landlock without a single rule (no files, no TCP,
//! no signals and abstract sockets to the outside) and a seccomp allow list ([`calls`]).
//!
//! Each wall goes up where the kernel grants it; what stands is told to the parent ([`Walls`]), which may insist
//! ([`Wall`]). Nothing here ever takes a wall down again. Owns no rlimits: those are next to what they bound.

mod calls;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use serde::{Deserialize, Serialize};

/// The newest Landlock whose rights are all held back; on older kernels those that exist there.
const LANDLOCK: ABI = ABI::V6;
/// The first Landlock: without its filesystem rights there is no such wall.
const LANDLOCK_LEAST: ABI = ABI::V1;

/// One of the walls, as the configuration names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wall {
    /// `PR_SET_NO_NEW_PRIVS`: no program started from here could gain privileges.
    NoNewPrivileges,
    /// A system call outside the allow list answers EPERM.
    Seccomp,
    /// No file can be opened, and no TCP connection made.
    Landlock,
    /// The kernel tells which pages a guest touched, so that memory can be kept resident and still be cleared.
    PagemapScan,
}

impl Wall {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::NoNewPrivileges, Self::Seccomp, Self::Landlock, Self::PagemapScan];

    /// The word of the configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoNewPrivileges => "no_new_privileges",
            Self::Seccomp => "seccomp",
            Self::Landlock => "landlock",
            Self::PagemapScan => "pagemap_scan",
        }
    }
}

/// Which walls stand around a process, or have to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Walls {
    /// See [`Wall::NoNewPrivileges`].
    pub no_new_privileges: bool,
    /// See [`Wall::Seccomp`].
    pub seccomp: bool,
    /// See [`Wall::Landlock`].
    pub landlock: bool,
    /// See [`Wall::PagemapScan`].
    pub pagemap_scan: bool,
}

impl Walls {
    /// Whether this one stands.
    #[must_use]
    pub const fn has(&self, wall: Wall) -> bool {
        match wall {
            Wall::NoNewPrivileges => self.no_new_privileges,
            Wall::Seccomp => self.seccomp,
            Wall::Landlock => self.landlock,
            Wall::PagemapScan => self.pagemap_scan,
        }
    }

    /// Those of `required` that do not stand, by name; empty if all do.
    #[must_use]
    pub fn missing(&self, required: Self) -> Vec<&'static str> {
        Wall::ALL
            .iter()
            .filter(|wall| required.has(**wall) && !self.has(**wall))
            .map(|w| w.as_str())
            .collect()
    }
}

impl FromIterator<Wall> for Walls {
    fn from_iter<I: IntoIterator<Item = Wall>>(walls: I) -> Self {
        let mut all = Self::default();
        for wall in walls {
            match wall {
                Wall::NoNewPrivileges => all.no_new_privileges = true,
                Wall::Seccomp => all.seccomp = true,
                Wall::Landlock => all.landlock = true,
                Wall::PagemapScan => all.pagemap_scan = true,
            }
        }
        all
    }
}

/// The walls that a thread hands on to those it starts. Call it before there are others: they would stay outside.
/// From here on nothing can be opened.
#[must_use]
pub fn before_threads() -> Walls {
    let no_new_privileges = rustix::thread::set_no_new_privs(true).is_ok();
    // Other processes of the same user may neither look into this one nor attach to it.
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    Walls {
        no_new_privileges,
        landlock: no_new_privileges && landlock().unwrap_or(false),
        ..Walls::default()
    }
}

/// The wall around all threads at once. Call it when those that the process needs have started: it lets no other
/// begin. True if it stands.
#[must_use]
pub fn behind_threads() -> bool {
    filter().is_some_and(|filter| seccompiler::apply_filter_all_threads(&filter).is_ok())
}

fn landlock() -> Result<bool, landlock::RulesetError> {
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK_LEAST))?
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?
        .restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// EPERM and not death for what is not on the list: a C library that tries a newer call first must be able to fall
/// back, and one guest must not be able to end its neighbours. A call of another architecture ends the process.
fn filter() -> Option<BpfProgram> {
    let denied = SeccompAction::Errno(u32::try_from(libc::EPERM).ok()?);
    let arch = std::env::consts::ARCH.try_into().ok()?;
    SeccompFilter::new(calls::allowed()?, denied, SeccompAction::Allow, arch).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_filter_compiles_for_this_machine() {
        assert!(filter().is_some_and(|program| !program.is_empty()));
    }

    #[test]
    fn a_missing_wall_is_named() {
        let walls = Walls { seccomp: true, ..Walls::default() };
        let required: Walls = [Wall::Seccomp, Wall::Landlock].into_iter().collect();
        assert_eq!(walls.missing(required), ["landlock"]);
        assert!(walls.missing(Walls::default()).is_empty());
    }

    #[test]
    fn walls_have_the_same_names_in_the_configuration_and_in_reports() {
        for wall in Wall::ALL {
            assert_eq!(serde_json::to_value(wall).unwrap(), wall.as_str());
            assert!(serde_json::to_value(Walls::default()).unwrap().get(wall.as_str()).is_some());
        }
    }
}
