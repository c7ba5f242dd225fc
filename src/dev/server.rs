//! The server process: launching it, knowing when it is ready, stopping it, and clearing away what an earlier
//! owner left running.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::str::FromStr as _;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection as _, PgConnection};
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, ChildStdin};

use super::home::{self, Home, PORT};
use super::{DevError, Installation, Secret};

/// Longest start. A clean one takes a fraction of a second; replaying the log after a crash takes longer.
const START_DEADLINE: Duration = Duration::from_secs(120);

/// Longest single attempt to connect while the server starts.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Time between looks at a server that starts or a process that ends.
const POLL: Duration = Duration::from_millis(15);

/// How long a fast shutdown may take (clients are disconnected, a checkpoint is written).
const FAST_SHUTDOWN: Duration = Duration::from_secs(10);

/// How long an immediate shutdown may take, and after SIGKILL the kernel.
const IMMEDIATE_SHUTDOWN: Duration = Duration::from_secs(5);

/// How long the processes of a postmaster that died get to notice; they do so within milliseconds.
const ORPHANS_NOTICE: Duration = Duration::from_secs(5);

/// Log size at which a start begins a new file, in bytes; one old file is kept.
const MAX_LOG: u64 = 10 * 1024 * 1024;

/// How much of the log goes into an error, in bytes.
const MAX_TAIL: u64 = 4096;

/// Server settings beyond those of `initdb`. Given on the command line, so that a new version of this list takes
/// effect on old clusters. Durability is never traded: `fsync` and `synchronous_commit` stay on.
const SETTINGS: &[&str] = &[
    "listen_addresses=",
    "fsync=on",
    "synchronous_commit=on",
    "full_page_writes=on",
    "max_connections=200",
    "shared_buffers=128MB",
    "max_wal_size=2GB",
    "wal_compression=on",
    "random_page_cost=1.1",
    // Statements are short; compiling one costs more than running it.
    "jit=off",
    "idle_in_transaction_session_timeout=60s",
    "tcp_keepalives_idle=30",
    "timezone=UTC",
    "log_timezone=UTC",
    "log_destination=stderr",
    "logging_collector=off",
    "log_line_prefix=%m [%p] %q%u@%d ",
    "log_min_messages=warning",
    "log_checkpoints=off",
    // Statements may hold passwords, and what guests wrote.
    "log_statement=none",
    "log_min_error_statement=panic",
    "log_parameter_max_length_on_error=0",
];

/// Becomes the server, after leaving a watcher behind that stops the server when our end of its standard input
/// closes without a word: when we were killed, however. `exec` keeps the process id, so that our child is the
/// postmaster. The watcher is a grandchild, because a postmaster takes an unknown child that is killed for a
/// crashed backend. It looks at postmaster.pid so as never to signal a process id that was given away, and more than
/// once, because a server that has only begun to start has not written that file.
const LAUNCH: &str = r#"
cluster=$1
shift
server=$$
exec 3<&0 </dev/null
(
    (
        trap '' INT TERM HUP QUIT
        read -r word <&3 && exit 0
        ours() { read -r pid 2>/dev/null <"$cluster/postmaster.pid" && [ "$pid" = "$server" ]; }
        n=0
        while [ "$n" -lt 20 ]; do
            if ours; then kill -INT "$server"; else kill -0 "$server" 2>/dev/null || exit 0; fi
            sleep 0.5
            n=$((n + 1))
        done
        ours && kill -QUIT "$server"
    ) &
)
exec 3<&-
exec "$@"
"#;

/// How to run the server of one cluster.
pub(super) struct Server {
    pub(super) home: Home,
    installation: Installation,
    log: PathBuf,
    admin: Secret,
}

impl Server {
    /// `admin` is the URL that tells whether the server is ready.
    pub(super) fn new(home: Home, installation: Installation, log: PathBuf, admin: Secret) -> Self {
        Self { home, installation, log, admin }
    }

    /// Starts the server and waits until it takes connections. Dropped half-way, it leaves no server behind.
    pub(super) async fn launch(&self) -> Result<Running, DevError> {
        let (log, start_of_log) = self.open_log()?;
        let stdout = log.try_clone().map_err(DevError::io("open", &self.log))?;
        let mut command = tokio::process::Command::new("/bin/sh");
        command
            .args(["-c", LAUNCH, "sandbar-postgres"])
            .arg(&self.home.cluster)
            .arg(self.installation.binary("postgres"))
            .arg("-D")
            .arg(&self.home.cluster)
            .arg("-c")
            .arg(format!("port={PORT}"))
            .arg("-c")
            .arg(format!("cluster_name={}", self.home.mark()))
            .arg("-c")
            .arg(format!("unix_socket_directories={}", self.home.sockets.display()));
        for setting in SETTINGS {
            command.args(["-c", setting]);
        }
        command.stdin(Stdio::piped()).stdout(stdout).stderr(log);
        self.home.as_server(&mut command);
        let fail = |why: String| DevError::Start {
            why,
            log: self.log.clone(),
            tail: read_tail(&self.log, start_of_log).unwrap_or_default(),
        };
        let mut child = command.spawn().map_err(|error| fail(format!("cannot run it: {error}")))?;
        let Some(pid) = child.id() else { return Err(fail("it ended at once".to_owned())) };
        let lifeline = child.stdin.take();
        let mut running = Running { child, pid, lifeline };

        let options = connect_options(&self.admin)?;
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            if let Some(status) = running.child.try_wait().map_err(DevError::io("wait for", &self.log))? {
                running.release().await;
                return Err(fail(format!("it ended with {status}")));
            }
            let connecting = tokio::time::timeout(CONNECT_TIMEOUT, PgConnection::connect_with(&options));
            match connecting.await {
                Ok(Ok(connection)) => {
                    // It answered; how the goodbye goes does not matter.
                    let _ = connection.close().await;
                    return Ok(running);
                }
                Ok(Err(error)) if !is_starting(&error) => {
                    // The first error is the one to report, here and below.
                    let _ = running.stop().await;
                    return Err(DevError::Database(error));
                }
                Ok(Err(_)) | Err(_) => {}
            }
            if Instant::now() > deadline {
                let _ = running.stop().await;
                return Err(fail(format!("it was not ready after {} s", START_DEADLINE.as_secs())));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Stops what runs of this cluster without us: the server of an owner that was killed, or the orphans of a
    /// server that was. We hold the directory's lock, so nobody else is responsible for them.
    pub(super) async fn clear_leftovers(&self) -> Result<(), DevError> {
        let postmaster = self.recorded_postmaster();
        let alive = self.processes();
        if alive.is_empty() {
            return self.remove_stale_pid_file(postmaster);
        }
        tracing::warn!(processes = ?alive, "found processes of an earlier Postgres, stopping them");
        match postmaster.filter(|pid| alive.contains(pid)) {
            Some(postmaster) => {
                signal(postmaster, Signal::INT);
                if self.all_gone_within(FAST_SHUTDOWN).await {
                    return Ok(());
                }
                signal(postmaster, Signal::QUIT);
                if self.all_gone_within(IMMEDIATE_SHUTDOWN).await {
                    return Ok(());
                }
            }
            None => {
                if self.all_gone_within(ORPHANS_NOTICE).await {
                    return Ok(());
                }
            }
        }
        for pid in self.processes() {
            signal(pid, Signal::KILL);
        }
        if self.all_gone_within(IMMEDIATE_SHUTDOWN).await {
            return Ok(());
        }
        Err(DevError::Unusable(format!(
            "an earlier Postgres of {} is still running and cannot be stopped (processes {:?})",
            self.home.cluster.display(),
            self.processes()
        )))
    }

    /// Process id in postmaster.pid.
    fn recorded_postmaster(&self) -> Option<u32> {
        let text = std::fs::read_to_string(self.home.cluster.join("postmaster.pid")).ok()?;
        text.lines().next()?.trim().parse().ok()
    }

    /// A process id may have been given to an innocent process since, or be that of a dead server that its
    /// parent never collected (process 1 of many containers does not); Postgres takes either for a running server
    /// and would never start again. Of a process that is simply gone Postgres itself knows best what to do, and a
    /// live Postgres that is not ours is not ours to judge.
    fn remove_stale_pid_file(&self, postmaster: Option<u32>) -> Result<(), DevError> {
        let Some(pid) = postmaster else { return Ok(()) };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return Ok(()) };
        // pid (name) state …
        let live_postgres = stat.contains("(postgres) ") && !stat.contains("(postgres) Z ");
        if live_postgres {
            return Ok(());
        }
        let path = self.home.cluster.join("postmaster.pid");
        std::fs::remove_file(&path).map_err(DevError::io("remove the stale", &path))
    }

    /// All processes of this cluster. Known by their title, which everybody may read: looking at the working
    /// directory of another user's process takes a capability that root in a container lacks.
    fn processes(&self) -> Vec<u32> {
        let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
        let mark = self.home.mark();
        let uid = self.home.uid();
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
            .filter(|pid| is_server_process(*pid, uid, &mark))
            .collect()
    }

    async fn all_gone_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while !self.processes().is_empty() {
            if Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(POLL).await;
        }
        true
    }

    /// Opens the log for appending; says where this start begins.
    fn open_log(&self) -> Result<(File, u64), DevError> {
        let path = &self.log;
        if std::fs::metadata(path).is_ok_and(|meta| meta.len() > MAX_LOG) {
            let old = path.with_extension("log.old");
            std::fs::rename(path, &old).map_err(DevError::io("rename to", &old))?;
        }
        let open = || {
            let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
            let length = file.metadata()?.len();
            Ok((file, length))
        };
        open().map_err(DevError::io("open", path))
    }
}

/// Whether a process is a live Postgres of the given user with the given mark in its title.
fn is_server_process(pid: u32, uid: u32, mark: &str) -> bool {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    std::fs::metadata(&proc).is_ok_and(|meta| meta.uid() == uid)
        && std::fs::read_to_string(proc.join("comm")).is_ok_and(|name| name.trim_end() == "postgres")
        // Empty for a zombie, which holds nothing any more.
        && std::fs::read(proc.join("cmdline"))
            .is_ok_and(|title| title.windows(mark.len()).any(|part| part == mark.as_bytes()))
}

/// Sends a signal to a process; one that is gone already is fine.
fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw)
        && let Err(error) = kill_process(pid, signal)
        && error != rustix::io::Errno::SRCH
    {
        tracing::warn!(pid = pid.as_raw_nonzero(), ?signal, %error, "cannot signal Postgres");
    }
}

/// A server process that is ready.
pub(super) struct Running {
    child: Child,
    pid: u32,
    /// Closing it without a word makes the watcher stop the server.
    lifeline: Option<ChildStdin>,
}

impl Running {
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until the server ends by itself.
    pub(super) async fn ended(&mut self) -> String {
        let status = self.child.wait().await;
        self.release().await;
        status.map_or_else(|error| error.to_string(), |status: ExitStatus| status.to_string())
    }

    /// Stops the server and returns when it is gone.
    ///
    /// # Errors
    /// When a fast shutdown did not do.
    pub(super) async fn stop(mut self) -> Result<(), DevError> {
        let steps = [
            (Signal::INT, FAST_SHUTDOWN),
            (Signal::QUIT, IMMEDIATE_SHUTDOWN),
            (Signal::KILL, IMMEDIATE_SHUTDOWN),
        ];
        for (how, limit) in steps {
            // Not yet waited for, so the process id is still its own.
            signal(self.pid, how);
            if tokio::time::timeout(limit, self.child.wait()).await.is_ok() {
                self.release().await;
                return if how == Signal::INT { Ok(()) } else { Err(DevError::Forced { pid: self.pid }) };
            }
            tracing::warn!(signal = ?how, "Postgres did not stop in {} s", limit.as_secs());
        }
        Err(DevError::Forced { pid: self.pid })
    }

    /// Tells the watcher that there is nothing left to do.
    async fn release(&mut self) {
        if let Some(mut lifeline) = self.lifeline.take() {
            // A watcher that was killed needs no telling.
            let _ = lifeline.write_all(b"done\n").await;
        }
    }
}

/// Options out of one of our URLs.
pub(super) fn connect_options(url: &Secret) -> Result<PgConnectOptions, DevError> {
    PgConnectOptions::from_str(url.expose()).map_err(DevError::Database)
}

/// Whether a failed connection only means "not yet".
fn is_starting(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) => true,
        // cannot_connect_now, too_many_connections
        sqlx::Error::Database(error) => matches!(error.code().as_deref(), Some("57P03" | "53300")),
        _ => false,
    }
}

/// The end of the log, but nothing from before `start`.
fn read_tail(path: &Path, start: u64) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(start.max(length.saturating_sub(MAX_TAIL))))?;
    let mut bytes = Vec::new();
    file.take(MAX_TAIL).read_to_end(&mut bytes)?;
    Ok(home::tail(&bytes, bytes.len()))
}
