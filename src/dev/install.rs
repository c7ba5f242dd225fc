//! Finding a Postgres to run.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::DevError;

/// Oldest major version that the schema works on.
const MIN_VERSION: u32 = 14;

/// Names the directory with `postgres` and `initdb`; nothing else is searched then.
const ENV_BIN: &str = "SANDBAR_PG_BIN";

/// Directories with one subdirectory per version, and what leads from there to the binaries: Debian's layout and
/// that of the PostgreSQL project's RPMs.
const VERSIONED: [(&str, &str); 2] = [("/usr/lib/postgresql", "bin"), ("/usr", "bin")];

/// Server binaries of one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Installation {
    /// The directory with `postgres` and `initdb`, absolute.
    pub(super) bin: PathBuf,
    /// Major version.
    pub(super) version: u32,
}

impl Installation {
    /// The binaries that fit an existing cluster, or else the newest.
    pub(super) fn find(cluster_version: Option<u32>) -> Result<Self, DevError> {
        let wanted = std::env::var_os(ENV_BIN).filter(|path| !path.is_empty());
        let candidates = match &wanted {
            Some(path) => vec![std::path::absolute(path).map_err(DevError::io("resolve", path))?],
            None => candidates(std::env::var_os("PATH").as_deref()),
        };
        let mut found: Vec<_> = candidates.into_iter().filter_map(|bin| Self::probe(&bin)).collect();
        found.retain(|installation| installation.version >= MIN_VERSION);
        // Stable: among equals the first place searched wins.
        found.sort_by_key(|installation| std::cmp::Reverse(installation.version));
        let fitting =
            found.iter().find(|found| cluster_version.is_none_or(|version| version == found.version));
        match (fitting, found.first(), cluster_version) {
            (Some(fitting), _, _) => Ok(fitting.clone()),
            (None, Some(other), Some(version)) => Err(DevError::Unusable(format!(
                "the cluster was made by PostgreSQL {version}, but the binaries found are of version {} ({}); \
                 install PostgreSQL {version}, upgrade the cluster with pg_upgrade, or choose another directory \
                 with --data-dir",
                other.version,
                other.bin.display()
            ))),
            _ => Err(DevError::NoBinaries {
                looked: wanted.map_or_else(
                    || "/usr/lib/postgresql/*/bin, /usr/pgsql-*/bin, PATH".to_owned(),
                    |path| format!("{ENV_BIN}={}", path.display()),
                ),
                wanted: cluster_version
                    .map_or_else(|| format!("{MIN_VERSION} or newer"), |version| version.to_string()),
            }),
        }
    }

    /// Asks a directory's `postgres` for its version; `None` when there is none that answers.
    fn probe(bin: &Path) -> Option<Self> {
        let postgres = bin.join("postgres");
        if !postgres.is_file() || !bin.join("initdb").is_file() {
            return None;
        }
        let output = Command::new(&postgres).arg("--version").env_clear().env("LC_ALL", "C").output().ok()?;
        let version = parse_version(std::str::from_utf8(&output.stdout).ok()?)?;
        Some(Self { bin: bin.to_owned(), version })
    }

    pub(super) fn binary(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }
}

/// Major version out of `postgres (PostgreSQL) 15.18 (Debian 15.18-1)`, also of a beta (`18beta1`).
fn parse_version(text: &str) -> Option<u32> {
    let version = text.split("(PostgreSQL)").nth(1)?.trim_start();
    let digits = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
    version[..digits].parse().ok()
}

fn candidates(path: Option<&std::ffi::OsStr>) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for (root, bin) in VERSIONED {
        let Ok(entries) = std::fs::read_dir(root) else { continue };
        for entry in entries.flatten() {
            let named = entry.file_name();
            let named = named.to_string_lossy();
            if root != "/usr" || named.starts_with("pgsql-") {
                all.push(entry.path().join(bin));
            }
        }
    }
    all.extend(path.map(std::env::split_paths).into_iter().flatten().filter(|dir| dir.is_absolute()));
    all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn the_version_is_read_from_what_servers_say() {
        assert_eq!(parse_version("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"), Some(15));
        assert_eq!(parse_version("postgres (PostgreSQL) 18beta1\n"), Some(18));
        assert_eq!(parse_version("postgres (PostgreSQL) 9.6.24\n"), Some(9));
        assert_eq!(parse_version("something else 15.1"), None);
        assert_eq!(parse_version(""), None);
    }

    #[test]
    fn a_directory_without_binaries_is_no_installation() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Installation::probe(dir.path()), None);
    }

    #[test]
    fn relative_entries_of_path_are_not_searched() {
        let all = candidates(Some(std::ffi::OsStr::new("relative:/absolute/bin")));
        assert!(all.contains(&PathBuf::from("/absolute/bin")));
        assert!(!all.contains(&PathBuf::from("relative")));
    }
}
