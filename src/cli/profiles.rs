//! The file of profiles: which servers this user knows, and their keys. Owns the file, its mode and its format; a
//! profile becomes a target in `target`.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::failure::{Exit, Failure};

/// Largest file that is read, in bytes: some thousand profiles.
const MAX_FILE: u64 = 1 << 20;
/// Longest name of a profile.
const MAX_NAME: usize = 64;
/// Bits of a mode that let others in.
const OTHERS: u32 = 0o077;

/// What the file holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Profiles {
    /// The profile that is used when nothing else is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current: Option<String>,
    /// By name.
    pub profiles: BTreeMap<String, Profile>,
}

/// A server and how to get in.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Address of the server.
    pub server: String,
    /// The API key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

impl std::fmt::Debug for Profile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A key never gets into a message by accident.
        f.debug_struct("Profile").field("server", &self.server).finish_non_exhaustive()
    }
}

/// `$XDG_CONFIG_HOME/sandbar/profiles.toml`, or below `~/.config`.
///
/// # Errors
/// Neither variable is set.
pub fn path() -> Result<PathBuf, Failure> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")));
    let base = base.ok_or_else(|| {
        Failure::usage("there is no place for profiles: neither XDG_CONFIG_HOME nor HOME is set")
            .hint("set HOME, or name server and key by SANDBAR_URL and SANDBAR_API_KEY")
    })?;
    Ok(base.join("sandbar/profiles.toml"))
}

/// A name that can be typed and shown: 1 to 64 of letters, digits, `-`, `_` and `.`.
///
/// # Errors
/// Says what is allowed.
pub fn check_name(name: &str) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(plain) {
        Ok(name.to_owned())
    } else {
        Err(format!("a profile's name is 1 to {MAX_NAME} letters, digits, '-', '_' or '.'"))
    }
}

impl Profiles {
    /// Reads the file; empty when there is none.
    ///
    /// # Errors
    /// Others may read or change the file, or it is not what this program writes.
    pub fn load(path: &Path) -> Result<Self, Failure> {
        let shown = path.display();
        let file = match std::fs::File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(Failure::new(Exit::Failed, format!("cannot open {shown}: {error}"))),
        };
        let mode = file.metadata()?.mode();
        if mode & OTHERS != 0 {
            let mode = mode & 0o7777;
            return Err(Failure::usage(format!(
                "{shown} holds keys, and its mode {mode:04o} lets others read or change it"
            ))
            .hint(format!("chmod 600 {shown}")));
        }
        let mut text = String::new();
        file.take(MAX_FILE)
            .read_to_string(&mut text)
            .map_err(|error| Failure::new(Exit::Failed, format!("cannot read {shown}: {error}")))?;
        // The parser's message would repeat the line, and with it perhaps a key.
        toml::from_str(&text).map_err(|error| {
            let line = error.span().map_or(1, |span| {
                text.get(..span.start).unwrap_or_default().bytes().filter(|b| *b == b'\n').count() + 1
            });
            Failure::usage(format!("{shown}, line {line}: {}", error.message()))
                .hint("correct or remove the file; `sandbar profile set` writes it anew")
        })
    }

    /// Writes the file, mode 0600, whole or not at all.
    ///
    /// # Errors
    /// The directory cannot be made or the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), Failure> {
        let fail = |error: &dyn std::fmt::Display| {
            Failure::new(Exit::Failed, format!("cannot write {}: {error}", path.display()))
        };
        let dir = path.parent().ok_or_else(|| fail(&"it has no directory"))?;
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| fail(&e))?;
        let text = toml::to_string_pretty(self).map_err(|e| fail(&e))?;
        let part = path.with_extension(format!("toml.{}", std::process::id()));
        let write = || -> std::io::Result<()> {
            let mut file =
                std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&part, path)
        };
        write().map_err(|error| {
            let _ = std::fs::remove_file(&part);
            fail(&error)
        })
    }

    /// The profile of this name.
    ///
    /// # Errors
    /// There is none; names those there are.
    pub fn find(&self, name: &str) -> Result<&Profile, Failure> {
        self.profiles.get(name).ok_or_else(|| {
            let names: Vec<&str> = self.profiles.keys().map(String::as_str).collect();
            let known = if names.is_empty() {
                "there are none".to_owned()
            } else {
                format!("known: {}", names.join(", "))
            };
            Failure::new(Exit::NotFound, format!("no profile `{name}`; {known}"))
                .hint(format!("sandbar profile set {name} --server URL"))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn example() -> Profiles {
        let profile =
            Profile { server: "https://sandbar.example.com".to_owned(), key: Some("sbk_secret".to_owned()) };
        Profiles { current: Some("prod".to_owned()), profiles: [("prod".to_owned(), profile)].into() }
    }

    #[test]
    fn what_is_saved_is_loaded_and_only_the_owner_may_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sandbar/profiles.toml");
        assert_eq!(Profiles::load(&path).unwrap(), Profiles::default());
        example().save(&path).unwrap();
        assert_eq!(Profiles::load(&path).unwrap(), example());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        example().save(&path).unwrap(); // again, over the first
    }

    #[test]
    fn a_file_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("profiles.toml");
        example().save(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let failure = Profiles::load(&path).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.text(false).contains("chmod 600"), "{failure}");
    }

    #[test]
    fn a_broken_file_is_named_with_its_line_and_no_key_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("profiles.toml");
        std::fs::write(&path, "[profiles.a]\nserver = 'x'\nkey = 'sbk_secret' oops\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let text = Profiles::load(&path).unwrap_err().text(false);
        assert!(text.contains("line 3") && !text.contains("sbk_secret"), "{text}");
        assert!(!format!("{:?}", example()).contains("sbk_secret"));
    }
}
