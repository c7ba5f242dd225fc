//! Which server a command talks to, and with which key. Owns the order of the sources and their precedence; never sends
//! a key to another server than the one it belongs to.

use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::failure::{Exit, Failure};
use super::profiles::{self, Profiles};
use crate::server::{ADDRESS_FILE, LOCAL_CERTIFICATE};

/// Address of the server.
pub const URL_VARIABLE: &str = "SANDBAR_URL";
/// The API key.
pub const KEY_VARIABLE: &str = "SANDBAR_API_KEY";
/// Name of a profile.
pub const PROFILE_VARIABLE: &str = "SANDBAR_PROFILE";
/// The profile that always exists: the `sandbar dev` of this directory.
pub const DEV: &str = "dev";
/// Directory of `sandbar dev` when neither flag nor variable names one.
const DEV_DIR: &str = ".sandbar";
/// Directories above the current one in which a `sandbar dev` is looked for.
const MAX_PARENTS: usize = 32;
/// Largest file with a key or an address, in bytes.
const MAX_SMALL_FILE: u64 = 4_096;

/// Options of every command that talks to a server.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Server")]
pub struct Connection {
    /// Address of the server [default: SANDBAR_URL, else the profile, else the `sandbar dev` of this directory]
    #[arg(long, value_name = "URL")]
    pub server: Option<String>,
    /// Profile with server and key [default: SANDBAR_PROFILE, else the one chosen by `sandbar profile use`]
    #[arg(long, value_name = "NAME")]
    pub profile: Option<String>,
    /// File with the API key [default: SANDBAR_API_KEY, else the key of the profile]
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

/// Options of every command that talks to a server, and how it answers.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Remote {
    /// Where to.
    #[command(flatten)]
    pub connection: Connection,
    /// Print JSON: one document, or one per line for lists and streams
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

/// A server and the key to it.
#[derive(Clone)]
pub struct Target {
    /// `http://…` or `https://…`, without a slash at the end.
    pub server: String,
    /// The API key.
    pub key: String,
    /// Where the address came from, for messages.
    pub from: String,
    /// Where the key came from.
    pub key_from: String,
    /// A certificate to trust besides the system's: the one that `sandbar dev --tls` made for this machine.
    pub certificate: Option<PathBuf>,
}

/// What the surroundings say: variables, files, directory. Apart from [`resolve`] so that tests can say it too.
#[derive(Debug, Default)]
struct Surroundings {
    url: Option<String>,
    key: Option<String>,
    profile: Option<String>,
    /// The `sandbar dev` of this directory: its address and key.
    dev: Option<(String, Option<String>)>,
    /// A key from `--key-file`.
    key_of_file: Option<String>,
}

impl Connection {
    /// Finds server and key.
    ///
    /// # Errors
    /// Nothing names a server or a key, or what names them cannot be used.
    pub fn target(&self) -> Result<Target, Failure> {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let key_of_file = self.key_file.as_deref().map(key_file).transpose()?;
        let surroundings = Surroundings {
            url: variable(URL_VARIABLE),
            key: variable(KEY_VARIABLE),
            profile: variable(PROFILE_VARIABLE),
            dev: find_dev(),
            key_of_file,
        };
        let profiles = match profiles::path() {
            Ok(path) => Profiles::load(&path)?,
            // Without a home there are no profiles.
            Err(_) => Profiles::default(),
        };
        let mut target = resolve(self, &surroundings, &profiles)?;
        target.certificate = local_certificate(&target.server);
        Ok(target)
    }
}

fn resolve(flags: &Connection, around: &Surroundings, profiles: &Profiles) -> Result<Target, Failure> {
    // A flag wins over a variable of any kind, and that over what was chosen once and kept.
    let named = |name: &str| -> Result<(String, Option<String>, String), Failure> {
        if name == DEV && !profiles.profiles.contains_key(DEV) {
            let (server, key) = around.dev.clone().ok_or_else(no_dev)?;
            return Ok((server, key, "sandbar dev".to_owned()));
        }
        let profile = profiles.find(name)?;
        Ok((profile.server.clone(), profile.key.clone(), format!("profile {name}")))
    };
    let (server, key, from) = if let Some(server) = &flags.server {
        (server.clone(), None, "--server".to_owned())
    } else if let Some(name) = &flags.profile {
        named(name)?
    } else if let Some(server) = &around.url {
        (server.clone(), None, URL_VARIABLE.to_owned())
    } else if let Some(name) = around.profile.as_ref().or(profiles.current.as_ref()) {
        named(name)?
    } else if let Some((server, key)) = around.dev.clone() {
        (server, key, "sandbar dev".to_owned())
    } else {
        return Err(Failure::new(Exit::Unreachable, "no server is named, and no `sandbar dev` runs here")
            .hint(format!(
                "start `sandbar dev` in this directory or above it, or set {URL_VARIABLE} and {KEY_VARIABLE}, or \
                 `sandbar profile set NAME --server URL`"
            )));
    };
    let server = check_server(&server)?;
    // A key goes only where it belongs: it was given for this call, or it is kept together with this very address.
    let kept = || {
        let of_profile = profiles.profiles.values().find(|p| same_server(&p.server, &server));
        let of_dev = around.dev.as_ref().filter(|(address, _)| same_server(address, &server));
        of_profile.and_then(|p| p.key.clone()).or_else(|| of_dev.and_then(|(_, key)| key.clone()))
    };
    let said = |key: Option<String>, from: &str| key.map(|key| (key, from.to_owned()));
    let own = said(key, &from);
    let key = match (&around.key_of_file, &flags.profile) {
        (Some(key), _) => said(Some(key.clone()), "--key-file"),
        // A profile named by a flag means its own key.
        (None, Some(_)) => own.or_else(|| said(around.key.clone(), KEY_VARIABLE)),
        (None, None) => said(around.key.clone(), KEY_VARIABLE)
            .or(own)
            .or_else(|| said(kept(), "what is kept for this server")),
    };
    let key = key.map(|(key, from)| (key.trim().to_owned(), from)).filter(|(key, _)| !key.is_empty());
    let (key, key_from) = key.ok_or_else(|| {
        Failure::new(Exit::Denied, format!("no API key for {server}")).hint(format!(
            "set {KEY_VARIABLE}, or use --key-file FILE, or `sandbar profile set NAME --server {server}`"
        ))
    })?;
    Ok(Target { server, key, from, key_from, certificate: None })
}

fn no_dev() -> Failure {
    Failure::new(Exit::Unreachable, "no `sandbar dev` runs in this directory or above it")
        .hint("start it: sandbar dev")
}

/// An address as requests need it.
///
/// # Errors
/// It is no http or https address, or has more than scheme, host, port and path.
pub fn check_server(text: &str) -> Result<String, Failure> {
    let refuse = |why: &str| {
        Failure::usage(format!("`{}` is no address of a server: {why}", super::output::printable(text)))
            .hint("write it like http://127.0.0.1:7260 or https://sandbar.example.com")
    };
    let url = reqwest::Url::parse(text.trim()).map_err(|error| refuse(&error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(refuse("it must begin with http:// or https://"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(refuse("a password does not belong there; the key is given apart"));
    }
    if url.query().is_some() || url.fragment().is_some() || url.host().is_none() {
        return Err(refuse("it ends with the host, the port or a path"));
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

/// True when requests to it never leave this machine.
pub fn is_local(server: &str) -> bool {
    let Ok(url) = reqwest::Url::parse(server) else { return false };
    let host = url.host_str().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn same_server(a: &str, b: &str) -> bool {
    matches!((check_server(a), check_server(b)), (Ok(a), Ok(b)) if a == b)
}

fn key_file(path: &Path) -> Result<String, Failure> {
    small_file(path).map_err(|error| {
        let exit = if error.kind() == std::io::ErrorKind::NotFound { Exit::NotFound } else { Exit::Failed };
        Failure::new(exit, format!("cannot read the key in {}: {error}", path.display()))
    })
}

/// A `sandbar dev` that was started here or in a directory above: its address, and its key when it keeps one.
fn find_dev() -> Option<(String, Option<String>)> {
    read_dev(&dev_dir()?)
}

/// Its directory.
fn dev_dir() -> Option<PathBuf> {
    if let Some(dir) = std::env::var_os("SANDBAR_DATA_DIR").filter(|dir| !dir.is_empty()) {
        return Some(dir.into());
    }
    let here = std::env::current_dir().ok()?;
    here.ancestors().take(MAX_PARENTS).map(|dir| dir.join(DEV_DIR)).find(|dir| read_dev(dir).is_some())
}

/// The certificate that the `sandbar dev` of this directory made for itself, when this is its address.
pub fn local_certificate(server: &str) -> Option<PathBuf> {
    let dir = dev_dir()?;
    let (address, _) = read_dev(&dir)?;
    let own = server.starts_with("https://") && same_server(&address, server);
    own.then(|| dir.join(LOCAL_CERTIFICATE)).filter(|path| path.exists())
}

/// Only a directory of this user counts: in a shared place anybody could lay one out.
fn read_dev(dir: &Path) -> Option<(String, Option<String>)> {
    let owner = std::fs::metadata(dir).ok()?.uid();
    if owner != rustix::process::geteuid().as_raw() {
        return None;
    }
    let address = small_file(&dir.join(ADDRESS_FILE)).ok()?;
    Some((address.trim().to_owned(), small_file(&dir.join("admin.key")).ok()))
}

fn small_file(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_SMALL_FILE).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::profiles::Profile;
    use super::*;

    fn profiles() -> Profiles {
        let profile =
            |server: &str, key: &str| Profile { server: server.to_owned(), key: Some(key.to_owned()) };
        Profiles {
            current: None,
            profiles: [
                ("prod".to_owned(), profile("https://prod.example.com", "key-prod")),
                ("test".to_owned(), profile("https://test.example.com/", "key-test")),
            ]
            .into(),
        }
    }

    fn with_dev() -> Surroundings {
        Surroundings {
            dev: Some(("http://127.0.0.1:7260".to_owned(), Some("key-dev\n".to_owned()))),
            ..Surroundings::default()
        }
    }

    fn found(flags: &Connection, around: &Surroundings, profiles: &Profiles) -> (String, String) {
        let target = resolve(flags, around, profiles).map_err(|f| f.text(false)).unwrap();
        (target.server, target.key)
    }

    fn pair(server: &str, key: &str) -> (String, String) {
        (server.to_owned(), key.to_owned())
    }

    #[test]
    fn with_nothing_set_the_dev_server_of_the_directory_is_used() {
        let flags = Connection::default();
        assert_eq!(
            found(&flags, &with_dev(), &Profiles::default()),
            pair("http://127.0.0.1:7260", "key-dev")
        );
        let failure = resolve(&flags, &Surroundings::default(), &Profiles::default()).err().unwrap();
        assert_eq!(failure.exit, Exit::Unreachable);
        insta::assert_snapshot!(failure.text(false));
    }

    #[test]
    fn a_flag_wins_over_a_variable_and_that_over_the_chosen_profile_and_that_over_dev() {
        let mut chosen = profiles();
        chosen.current = Some("test".to_owned());
        let flags = Connection::default();
        assert_eq!(found(&flags, &with_dev(), &chosen), pair("https://test.example.com", "key-test"));
        let around = Surroundings { profile: Some("prod".to_owned()), ..with_dev() };
        assert_eq!(found(&flags, &around, &chosen), pair("https://prod.example.com", "key-prod"));
        let around = Surroundings {
            url: Some("http://other:1".to_owned()),
            key: Some("key-other".to_owned()),
            ..around
        };
        assert_eq!(found(&flags, &around, &chosen), pair("http://other:1", "key-other"));
        let flags = Connection { profile: Some("test".to_owned()), ..Connection::default() };
        assert_eq!(found(&flags, &around, &chosen), pair("https://test.example.com", "key-test"));
        let flags = Connection { profile: Some(DEV.to_owned()), ..Connection::default() };
        assert_eq!(found(&flags, &around, &chosen), pair("http://127.0.0.1:7260", "key-dev"));
    }

    #[test]
    fn a_kept_key_goes_only_to_its_own_server() {
        let server = |url: &str| Connection { server: Some(url.to_owned()), ..Connection::default() };
        let mut chosen = profiles();
        chosen.current = Some("prod".to_owned());
        let failure = resolve(&server("https://evil.example.com"), &with_dev(), &chosen).err().unwrap();
        assert_eq!(failure.exit, Exit::Denied);
        let flags = server("https://test.example.com");
        assert_eq!(found(&flags, &with_dev(), &chosen), pair("https://test.example.com", "key-test"));
        let flags = server("http://127.0.0.1:7260/");
        assert_eq!(found(&flags, &with_dev(), &chosen), pair("http://127.0.0.1:7260", "key-dev"));
    }

    #[test]
    fn addresses_that_would_surprise_are_refused() {
        for bad in ["", "example.com", "ftp://a", "http://a:b@c", "http://a/?q", "http://a/#f", "unix:/x"] {
            assert_eq!(check_server(bad).unwrap_err().exit, Exit::Usage, "{bad}");
        }
        assert_eq!(check_server(" http://a:1/base/ ").unwrap(), "http://a:1/base");
        assert!(
            is_local("http://127.0.0.1:7260") && is_local("http://[::1]:1") && is_local("http://localhost")
        );
        assert!(!is_local("http://127.0.0.1.example.com") && !is_local("https://example.com"));
    }
}
