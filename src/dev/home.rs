//! Where the cluster lives and who it belongs to: the lock, the passwords, the directories, the user.
//!
//! Postgres refuses to run as root. Started by root, it runs as the owner of the cluster if there is one, else
//! as `postgres` if that user exists, else as `nobody`; started by anybody else, as that user.
//!
//! One rule for directories that this user cannot reach (a checkout under a home directory of mode 0700, say):
//! the cluster is then made in `/var/lib/sandbar/<random>`, and `<dir>/pg` is a link to it. From then on the link
//! decides, whatever permissions become.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rand::RngCore as _;
use sha2::{Digest as _, Sha256};

use super::{DevError, Installation, Secret};

/// The port that names the socket file; nothing listens on it.
pub(super) const PORT: u16 = 5432;

/// Longest path of a Unix socket on Linux, in bytes, without the final zero.
const MAX_SOCKET_PATH: usize = 107;

/// Where clusters go that cannot stay in their data directory.
const FALLBACK_ROOT: &str = "/var/lib/sandbar";

/// Longest `initdb`; it takes about a second, more on slow disks.
const INITDB_DEADLINE: Duration = Duration::from_secs(120);

/// How much of what `initdb` said goes into an error, in bytes.
const MAX_OUTPUT: usize = 4096;

/// Largest secrets file that is read, in bytes.
const MAX_SECRETS: u64 = 4096;

/// The right to use a directory: an exclusive lock on its file `lock`, released when the process ends, however
/// it ends.
#[derive(Debug)]
pub(super) struct Lock {
    dir: PathBuf,
    _file: File,
}

impl Lock {
    /// Makes the directory if needed, and takes the lock without waiting.
    pub(super) fn take(dir: &Path) -> Result<Self, DevError> {
        if !dir.exists() {
            // Others may pass through (the server's user must), but not look around. Set apart from making it,
            // because the umask has a say in that.
            std::fs::create_dir_all(dir).map_err(DevError::io("create", dir))?;
            std::fs::set_permissions(dir, Permissions::from_mode(0o711))
                .map_err(DevError::io("set the mode of", dir))?;
        }
        let dir = dir.canonicalize().map_err(DevError::io("resolve", dir))?;
        let path = dir.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(DevError::io("open", &path))?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                // Only for the message; the owner may be about to write it.
                let _ = (&mut file).take(32).read_to_string(&mut text);
                return Err(DevError::Locked { dir, pid: text.trim().parse().ok() });
            }
            Err(error) => return Err(DevError::io("lock", &path)(error.into())),
        }
        let note = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        note.map_err(DevError::io("write", &path))?;
        Ok(Self { dir, _file: file })
    }

    /// The directory, absolute and without links.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }
}

/// The passwords of the cluster's logins: 256 random bits each, as hexadecimal digits.
#[derive(Debug)]
pub(super) struct Secrets {
    pub(super) admin: Secret,
    pub(super) api: Secret,
    pub(super) worker: Secret,
}

impl Secrets {
    /// Reads `<dir>/secrets`, or makes it for a new cluster.
    pub(super) fn load_or_create(dir: &Path, cluster_exists: bool) -> Result<Self, DevError> {
        let path = dir.join("secrets");
        let mut text = String::new();
        match File::open(&path) {
            Ok(file) => {
                file.take(MAX_SECRETS).read_to_string(&mut text).map_err(DevError::io("read", &path))?;
                Self::parse(&text).ok_or_else(|| {
                    DevError::Unusable(format!(
                        "{} is damaged: it must have the lines admin=…, api=… and worker=… with hexadecimal digits",
                        path.display()
                    ))
                })
            }
            Err(error) if error.kind() == ErrorKind::NotFound && cluster_exists => {
                Err(DevError::Unusable(format!(
                    "{} is missing, and with it the passwords of the cluster beside it; restore the file, or choose \
                 another directory with --data-dir",
                    path.display()
                )))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let [admin, api, worker] = std::array::from_fn(|_| random_hex::<32>());
                let text = format!("admin={admin}\napi={api}\nworker={worker}\n");
                write_private(dir, &path, &text)?;
                Ok(Self { admin: admin.into(), api: api.into(), worker: worker.into() })
            }
            Err(error) => Err(DevError::io("open", &path)(error)),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let get = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
            // Passwords are put into statements as they are.
            (value.len() >= 32 && value.bytes().all(|byte| byte.is_ascii_hexdigit()))
                .then(|| Secret::new(value))
        };
        Some(Self { admin: get("admin")?, api: get("api")?, worker: get("worker")? })
    }
}

fn random_hex<const N: usize>() -> String {
    let mut bytes = [0; N];
    rand::rng().fill_bytes(&mut bytes);
    hex(&bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes a file of mode 0600 so that it is there entirely or not at all, also after a crash.
fn write_private(dir: &Path, path: &Path, text: &str) -> Result<(), DevError> {
    let staged = path.with_extension("new");
    let write = || {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&staged)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&staged, path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(DevError::io("write", path))
}

/// An unprivileged user, as root sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// The place of one cluster.
#[derive(Debug, Clone)]
pub(super) struct Home {
    /// The cluster itself, absolute and without links.
    pub(super) cluster: PathBuf,
    /// The directory of the socket.
    pub(super) sockets: PathBuf,
    /// Whom to become; `None`: stay who we are.
    pub(super) user: Option<User>,
    /// `<dir>/pg`, when it is to become a link to `cluster`.
    link: Option<PathBuf>,
}

impl Home {
    /// Decides where the cluster of a directory is or will be, and makes the directories around it.
    pub(super) fn locate(dir: &Path) -> Result<Self, DevError> {
        let at = dir.join("pg");
        let root = rustix::process::geteuid().is_root();
        let (cluster, user, link) = match std::fs::symlink_metadata(&at) {
            Ok(_) => {
                let cluster = at.canonicalize().map_err(DevError::io("find the cluster behind", &at))?;
                let meta = std::fs::metadata(&cluster).map_err(DevError::io("look at", &cluster))?;
                let user = owner(&cluster, &meta, root)?;
                if let Some(user) = user
                    && !can_enter(user, &cluster)?
                {
                    return Err(DevError::Unusable(format!(
                        "Postgres runs as user id {} and cannot reach its cluster {}; make the directories above it \
                         passable (chmod a+x), or choose another directory with --data-dir",
                        user.uid,
                        cluster.display()
                    )));
                }
                (cluster, user, None)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let user = if root { Some(unprivileged_user()?) } else { None };
                match user {
                    Some(user) if !can_enter(user, dir)? => {
                        let base = fallback_base(dir, user)?;
                        tracing::warn!(
                            dir = %dir.display(), cluster = %base.display(),
                            "the user that Postgres runs as cannot reach the data directory: the cluster is made elsewhere"
                        );
                        (base.join("pg"), Some(user), Some(at))
                    }
                    user => (at, user, None),
                }
            }
            Err(error) => return Err(DevError::io("look at", &at)(error)),
        };
        let base = cluster.parent().unwrap_or(dir);
        let sockets = socket_dir(base, &cluster);
        private_dir(&sockets, user)?;
        Ok(Self { cluster, sockets, user, link })
    }

    /// Whether there is a complete cluster: it is moved to its place only when it is.
    pub(super) fn is_initialized(&self) -> bool {
        self.cluster.join("PG_VERSION").is_file()
    }

    /// Major version of the cluster, if there is one.
    pub(super) fn cluster_version(&self) -> Result<Option<u32>, DevError> {
        let path = self.cluster.join("PG_VERSION");
        match std::fs::read_to_string(&path) {
            Ok(text) => match text.trim().parse() {
                Ok(version) => Ok(Some(version)),
                Err(_) => Err(DevError::Unusable(format!("{} has no version number", path.display()))),
            },
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(DevError::io("read", &path)(error)),
        }
    }

    /// A name that the processes of this cluster carry and no others.
    pub(super) fn mark(&self) -> String {
        mark(&self.cluster)
    }

    /// User id that the server's processes have.
    pub(super) fn uid(&self) -> u32 {
        self.user.map_or_else(|| rustix::process::geteuid().as_raw(), |user| user.uid)
    }

    /// Makes the cluster. It is built beside its place and moved there at the end, so a killed run leaves
    /// nothing half-made behind that could be taken for a cluster.
    pub(super) async fn initialize(
        &self,
        installation: &Installation,
        admin: &str,
        password: &Secret,
    ) -> Result<(), DevError> {
        let staged = self.cluster.with_extension("new");
        if staged.exists() {
            std::fs::remove_dir_all(&staged)
                .map_err(DevError::io("remove the unfinished cluster", &staged))?;
        }
        if self.cluster.exists() {
            return Err(DevError::Unusable(format!(
                "{} exists but is no Postgres cluster; move it away, or choose another directory with --data-dir",
                self.cluster.display()
            )));
        }
        private_dir(&staged, self.user)?;
        // In the one directory that both we and the server's user can reach, and nobody else.
        let password_file = self.sockets.join("password");
        write_private(&self.sockets, &password_file, password.expose())?;
        give(&password_file, self.user)?;

        let mut command = tokio::process::Command::new(installation.binary("initdb"));
        command
            .arg("-D")
            .arg(&staged)
            .args(["-U", admin, "-A", "scram-sha-256", "-E", "UTF8", "--locale=C", "--no-instructions"])
            .arg("--pwfile")
            .arg(&password_file)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        self.as_server(&mut command);
        let result = tokio::time::timeout(INITDB_DEADLINE, command.output()).await;
        std::fs::remove_file(&password_file).map_err(DevError::io("remove", &password_file))?;
        let fail = |output: String| DevError::Initdb { cluster: self.cluster.clone(), output };
        let output = result
            .map_err(|_| fail(format!("initdb took longer than {} s", INITDB_DEADLINE.as_secs())))?
            .map_err(|error| fail(format!("cannot run initdb: {error}")))?;
        if !output.status.success() {
            let said = [output.stdout, output.stderr].concat();
            return Err(fail(tail(&said, MAX_OUTPUT)));
        }

        std::fs::rename(&staged, &self.cluster)
            .map_err(DevError::io("move the new cluster to", &self.cluster))?;
        if let Some(link) = &self.link {
            std::os::unix::fs::symlink(&self.cluster, link).map_err(DevError::io("link", link))?;
        }
        for entry in [Some(&self.cluster), self.link.as_ref()].into_iter().flatten() {
            if let Some(parent) = entry.parent() {
                File::open(parent).and_then(|dir| dir.sync_all()).map_err(DevError::io("sync", parent))?;
            }
        }
        Ok(())
    }

    /// Makes a command run as the server's user, in a process group of its own, with none of our environment:
    /// it holds secrets, and variables such as PGPORT would change what the server does.
    pub(super) fn as_server(&self, command: &mut tokio::process::Command) {
        command
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .current_dir("/")
            .process_group(0);
        if let Some(user) = self.user {
            // Also gives up root's supplementary groups.
            command.uid(user.uid).gid(user.gid);
        }
    }
}

/// The last bytes of an output, as text.
pub(super) fn tail(bytes: &[u8], max: usize) -> String {
    let start = bytes.len().saturating_sub(max);
    String::from_utf8_lossy(&bytes[start..]).trim().to_owned()
}

/// A name derived from the path of a cluster: part of the title of its processes, and of its socket directory
/// under `/tmp`.
fn mark(cluster: &Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    let hash = Sha256::digest(cluster.as_os_str().as_bytes());
    format!("sandbar-{}", hex(&hash[..8]))
}

/// Beside the cluster if the socket's path is short enough and plain; else a directory under `/tmp`.
fn socket_dir(base: &Path, cluster: &Path) -> PathBuf {
    let run = base.join("run");
    let longest = run.as_os_str().len() + format!("/.s.PGSQL.{PORT}").len();
    // The setting is a list with quotes and commas of its own, so only plain names go there.
    let plain = run.to_str().is_some_and(|path| {
        path.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'_' | b'-' | b'+'))
    });
    if plain && longest <= MAX_SOCKET_PATH { run } else { Path::new("/tmp").join(mark(cluster)) }
}

/// Makes a directory of mode 0700 for the server's user. One that exists must already be that: under `/tmp`
/// anybody could have made it.
fn private_dir(path: &Path, user: Option<User>) -> Result<(), DevError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => return give(path, user),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(DevError::io("create", path)(error)),
    }
    let meta = std::fs::symlink_metadata(path).map_err(DevError::io("look at", path))?;
    let us = rustix::process::geteuid().as_raw();
    let owner = user.map_or(us, |user| user.uid);
    let ours = meta.uid() == owner || meta.uid() == us;
    if !meta.is_dir() || !ours || meta.mode() & 0o077 != 0 {
        return Err(DevError::Unusable(format!(
            "{} must be a directory of mode 0700 that belongs to user id {owner}; remove it if it is not needed",
            path.display()
        )));
    }
    // Made by us, but a killed run did not come to hand it over.
    if meta.uid() == owner { Ok(()) } else { give(path, user) }
}

fn give(path: &Path, user: Option<User>) -> Result<(), DevError> {
    let Some(user) = user else { return Ok(()) };
    std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid))
        .map_err(DevError::io("change the owner of", path))
}

/// Whom a server of an existing cluster must run as.
fn owner(cluster: &Path, meta: &std::fs::Metadata, root: bool) -> Result<Option<User>, DevError> {
    let owner = User { uid: meta.uid(), gid: meta.gid() };
    match (root, owner.uid) {
        (true, 0) => Err(DevError::Unusable(format!(
            "the cluster {} belongs to root, and Postgres never runs as root; give it to another user \
             (chown -R postgres), or choose another directory with --data-dir",
            cluster.display()
        ))),
        (true, _) => Ok(Some(owner)),
        (false, uid) if uid == rustix::process::geteuid().as_raw() => Ok(None),
        (false, uid) => Err(DevError::Unusable(format!(
            "the cluster {} belongs to user id {uid}; run as that user or as root, or choose another directory with \
             --data-dir",
            cluster.display()
        ))),
    }
}

/// The user that root's server runs as: `postgres`, which its packages create, or else `nobody`.
fn unprivileged_user() -> Result<User, DevError> {
    let path = Path::new("/etc/passwd");
    let text = std::fs::read_to_string(path).map_err(DevError::io("read", path))?;
    ["postgres", "nobody"].iter().find_map(|name| find_user(&text, name)).ok_or_else(|| {
        DevError::Unusable(
            "Postgres never runs as root, and there is neither a user postgres nor nobody; run sandbar as an \
             ordinary user"
                .to_owned(),
        )
    })
}

fn find_user(passwd: &str, name: &str) -> Option<User> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next() != Some(name) {
            return None;
        }
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        (uid != 0).then_some(User { uid, gid })
    })
}

/// Whether a user can pass through to a directory. Asked of the system itself, by a shell of that user: mode
/// bits alone do not know about access lists.
fn can_enter(user: User, dir: &Path) -> Result<bool, DevError> {
    use std::os::unix::process::CommandExt as _;
    let status = Command::new("/bin/sh")
        .args(["-c", r#"cd -- "$1""#, "sh"])
        .arg(dir)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .uid(user.uid)
        .gid(user.gid)
        .status()
        .map_err(DevError::io("run /bin/sh to look at", dir))?;
    Ok(status.success())
}

/// A new directory under [`FALLBACK_ROOT`], with a note of whose it is.
fn fallback_base(dir: &Path, user: User) -> Result<PathBuf, DevError> {
    let root = Path::new(FALLBACK_ROOT);
    let base = root.join(random_hex::<8>());
    std::fs::create_dir_all(&base).map_err(DevError::io("create", &base))?;
    for path in [root, &base] {
        std::fs::set_permissions(path, Permissions::from_mode(0o711))
            .map_err(DevError::io("set the mode of", path))?;
    }
    let note = base.join("belongs-to");
    std::fs::write(&note, format!("{}\n", dir.display())).map_err(DevError::io("write", &note))?;
    if can_enter(user, &base)? {
        return Ok(base);
    }
    std::fs::remove_dir_all(&base).map_err(DevError::io("remove", &base))?;
    Err(DevError::Unusable(format!(
        "Postgres runs as user id {} and can reach neither {} nor {FALLBACK_ROOT}; make the directories above one of \
         them passable (chmod a+x), or choose another directory with --data-dir",
        user.uid,
        dir.display()
    )))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn a_second_owner_of_a_directory_is_refused_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::take(dir.path()).unwrap();
        let error = Lock::take(dir.path()).unwrap_err();
        assert!(
            matches!(&error, DevError::Locked { pid: Some(pid), .. } if *pid == std::process::id()),
            "{error:?}"
        );
        assert!(error.to_string().contains("--data-dir"), "{error}");
        drop(first);
        Lock::take(dir.path()).unwrap();
    }

    #[test]
    fn secrets_are_made_once_kept_private_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let made = Secrets::load_or_create(dir.path(), false).unwrap();
        let read = Secrets::load_or_create(dir.path(), true).unwrap();
        assert_eq!((&made.admin, &made.api, &made.worker), (&read.admin, &read.api, &read.worker));
        assert!(made.admin != made.api && made.api != made.worker);
        let mode = std::fs::metadata(dir.path().join("secrets")).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!format!("{made:?}").contains(made.admin.expose()));
    }

    #[test]
    fn lost_or_damaged_secrets_of_a_cluster_are_an_error_and_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Secrets::load_or_create(dir.path(), true).is_err());
        std::fs::write(dir.path().join("secrets"), "admin='; DROP\napi=1\nworker=2\n").unwrap();
        assert!(Secrets::load_or_create(dir.path(), true).is_err());
    }

    #[test]
    fn long_or_odd_paths_get_a_socket_under_tmp() {
        let short = Path::new("/srv/sandbar");
        assert_eq!(socket_dir(short, &short.join("pg")), short.join("run"));
        for odd in [format!("/srv/{}", "x".repeat(90)), "/srv/a, b".to_owned(), "/srv/\"x\"".to_owned()] {
            let base = Path::new(&odd);
            let sockets = socket_dir(base, &base.join("pg"));
            assert_eq!(sockets.parent(), Some(Path::new("/tmp")));
            assert!(sockets.as_os_str().len() < 60);
        }
    }

    #[test]
    fn an_open_socket_directory_is_not_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        private_dir(&path, None).unwrap();
        private_dir(&path, None).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(private_dir(&path, None), Err(DevError::Unusable(_))));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(matches!(private_dir(&link, None), Err(DevError::Unusable(_))));
    }

    #[test]
    fn users_are_found_by_whole_name_and_never_root() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\npostgres2:x:5:6::/:/bin/sh\npostgres:x:101:104:,,,:/x:/bin/sh\nbad:x\n";
        assert_eq!(find_user(passwd, "postgres"), Some(User { uid: 101, gid: 104 }));
        assert_eq!(find_user(passwd, "root"), None);
        assert_eq!(find_user(passwd, "nobody"), None);
        assert_eq!(find_user(passwd, "bad"), None);
    }
}
