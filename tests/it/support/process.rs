//! The real binary as processes: started, killed, waited for, and cleaned up whatever happens.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::{ADMIN_KEY, Client, Database, data_dir, database, eventually};

/// Longest start of a process on a busy machine.
const START: Duration = Duration::from_secs(60);

/// Longest orderly end of a process.
const STOP: Duration = Duration::from_secs(60);

/// How much of a log is shown when a test fails, in bytes.
const SHOWN: usize = 8 * 1024;

/// A running `sandbar`. Dropped, it is killed; when a test fails, the end of its log is shown.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts the binary with arguments and variables, and none of our own variables that could change it.
    pub fn spawn(name: &str, dir: &Path, args: &[&str], variables: &[(&str, String)]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let log = dir.join(format!("{number:03}-{name}.log"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_sandbar"));
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("SANDBAR_") && name != "SANDBAR_PG_BIN") {
                command.env_remove(&name);
            }
        }
        let child = command
            .args(args)
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Self { name: name.to_owned(), child, log }
    }

    /// `sandbar dev` on a data directory, ready, with a caller of its API.
    pub async fn dev(data_dir: &Path) -> (Self, Client) {
        let variables = [
            ("SANDBAR_SERVER__ADMIN_KEY", ADMIN_KEY.to_owned()),
            ("SANDBAR_SERVER__LISTEN", "127.0.0.1:0".to_owned()),
            ("SANDBAR_DATA_DIR", data_dir.display().to_string()),
        ];
        std::fs::create_dir_all(data_dir).unwrap();
        let mut process = Self::spawn("dev", data_dir, &["dev"], &variables);
        let client = Client::new(format!("http://{}", process.address().await));
        process.ready(&client).await;
        (process, client)
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All that it logged so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Direct children: cells, compilers, a postmaster.
    pub fn children(&self) -> Vec<u32> {
        let mut children = Vec::new();
        let tasks = format!("/proc/{}/task", self.pid());
        for thread in std::fs::read_dir(tasks).into_iter().flatten().flatten() {
            let text = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            children.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        children
    }

    /// Sends a signal to it.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal);
    }

    /// SIGKILL, and wait.
    pub fn kill_9(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, and wait for an orderly end.
    pub async fn terminate(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended(STOP).await
    }

    /// Waits until it ends by itself.
    pub async fn ended(&mut self, limit: Duration) -> ExitStatus {
        let what = format!("{} to end", self.name);
        eventually(limit, &what, async || self.child.try_wait().unwrap()).await
    }

    /// The address that it listens on, from its log.
    pub async fn address(&mut self) -> String {
        let what = format!("{} to listen", self.name);
        eventually(START, &what, async || {
            self.must_live();
            let log = self.log();
            let (_, rest) = log.split_once("listening on ")?;
            // A whole line, or the address may be cut short.
            let url = rest.split_once('\n')?.0.split_whitespace().next()?;
            Some(url.split_once("://")?.1.to_owned())
        })
        .await
    }

    /// Waits until `/readyz` says so.
    pub async fn ready(&mut self, client: &Client) {
        let what = format!("{} to be ready", self.name);
        eventually(START, &what, async || {
            self.must_live();
            client.is_ready().await.then_some(())
        })
        .await;
    }

    /// Panics, with its log, if it has ended by itself.
    pub fn must_live(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("{} ended with {status}:\n{}", self.name, self.log());
        }
    }
}

/// Sends a signal to a process that may be gone.
pub fn kill(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let from = log.len().saturating_sub(SHOWN);
            let from = (from..=log.len()).find(|at| log.is_char_boundary(*at)).unwrap_or(0);
            eprintln!("---- the end of the log of {} ----\n{}", self.name, &log[from..]);
        }
    }
}

/// An address to come back at after a kill: outside the range from which the system takes ports for connections, or one
/// of those might have it by then.
pub fn lasting_address() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 20_000 + (std::process::id() % 1_000) as u16 * 10;
    (0..500)
        .map(|_| format!("127.0.0.1:{}", first + NEXT.fetch_add(1, Ordering::Relaxed)))
        .find(|address| std::net::TcpListener::bind(address).is_ok())
        .expect("a free port below those for connections")
}

/// A server and workers on one database, as processes.
#[derive(Debug)]
pub struct Deployment {
    /// The database of all of them.
    pub database: Database,
    /// The server. Replace it with [`Deployment::restart_server`].
    pub server: Process,
    /// The workers that were started at first.
    pub workers: Vec<Process>,
    address: String,
    variables: Vec<(&'static str, String)>,
    dir: TempDir,
}

impl Deployment {
    /// Server and workers on a fresh database of the shared Postgres; returns when the server is ready.
    pub async fn start(workers: usize) -> Self {
        Self::on(database().await, workers, &[]).await
    }

    /// Server and workers on a given database, with further settings such as
    /// `("SANDBAR_WORKER__SLOTS", "4".into())`.
    pub async fn on(database: Database, workers: usize, settings: &[(&'static str, String)]) -> Self {
        let dir = data_dir();
        let mut variables = vec![
            ("SANDBAR_DATABASE__URL", database.admin_url()),
            ("SANDBAR_DATABASE__API_URL", database.api_url()),
            ("SANDBAR_DATABASE__WORKER_URL", database.worker_url()),
            ("SANDBAR_SERVER__ADMIN_KEY", ADMIN_KEY.to_owned()),
            ("SANDBAR_DATABASE__MAX_CONNECTIONS", "8".to_owned()),
        ];
        variables.extend_from_slice(settings);
        let mut server = spawn_server(dir.path(), &variables, &lasting_address());
        let address = server.address().await;
        let mut deployment = Self { database, server, workers: Vec::new(), address, variables, dir };
        if deployment.url().starts_with("http://") {
            let client = deployment.client();
            deployment.server.ready(&client).await;
        }
        deployment.workers = (0..workers).map(|_| deployment.spawn_worker()).collect();
        deployment
    }

    /// A caller of its API.
    pub fn client(&self) -> Client {
        Client::new(self.url())
    }

    /// Address of its API. One with a certificate is not waited for: only the test knows whom to trust.
    pub fn url(&self) -> String {
        let tls = self.variables.iter().any(|(name, _)| *name == "SANDBAR_SERVER__TLS_CERT");
        format!("http{}://{}", if tls { "s" } else { "" }, self.address)
    }

    /// One more worker, with a data directory of its own.
    pub fn spawn_worker(&self) -> Process {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let name = format!("worker-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let mut variables = self.variables.clone();
        variables.push(("SANDBAR_DATA_DIR", self.dir.path().join(&name).display().to_string()));
        Process::spawn(&name, self.dir.path(), &["worker"], &variables)
    }

    /// One more server on the same database, until the end of the deployment; a caller of it.
    pub async fn spawn_server_too(&mut self) -> Client {
        let mut variables = self.variables.clone();
        variables.push(("SANDBAR_SERVER__LISTEN", "127.0.0.1:0".to_owned()));
        variables.push(("SANDBAR_DATA_DIR", self.dir.path().join("server-too").display().to_string()));
        let mut server = Process::spawn("server-too", self.dir.path(), &["server"], &variables);
        let client = Client::new(format!("http://{}", server.address().await));
        server.ready(&client).await;
        self.workers.push(server);
        client
    }

    /// Kills the server with SIGKILL and starts another at the same address; returns when it is ready.
    pub async fn restart_server(&mut self) {
        let mut next = {
            self.server.signal(Signal::KILL);
            self.server.ended(STOP).await;
            spawn_server(self.dir.path(), &self.variables, &self.address)
        };
        next.ready(&self.client()).await;
        self.server = next;
    }
}

fn spawn_server(dir: &Path, variables: &[(&'static str, String)], listen: &str) -> Process {
    let mut variables = variables.to_vec();
    variables.push(("SANDBAR_SERVER__LISTEN", listen.to_owned()));
    variables.push(("SANDBAR_DATA_DIR", dir.join("server").display().to_string()));
    Process::spawn("server", dir, &["server"], &variables)
}
