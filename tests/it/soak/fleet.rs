//! Servers and workers as processes over one Postgres, and how each of them is broken.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use sandbar::dev::EmbeddedPostgres;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection as _, PgConnection};
use tempfile::TempDir;

use super::plan::Fault;
use crate::support::{self, Client, Database, Process};

/// When a worker was suspended, and which processes with it.
type Suspended = Option<(Instant, Vec<u32>)>;

/// Silence after which a worker is dead, in milliseconds.
pub const DEAD_AFTER_MS: u64 = 1_500;
/// How long somebody holds locks, or all connections.
const HOLD: Duration = Duration::from_millis(600);
/// Connections that somebody tries to take.
const GREEDY: usize = 250;
/// Longest single look at a Postgres that may be away.
const LOOK: Duration = Duration::from_secs(3);

/// All processes.
pub struct Fleet {
    pub postgres: EmbeddedPostgres,
    pub database: Database,
    servers: Vec<(Process, String)>,
    /// With the time until which it stands still, and the processes to wake then.
    workers: Vec<(Process, Suspended)>,
    variables: Vec<(&'static str, String)>,
    dir: TempDir,
}

impl Fleet {
    /// Starts them all; returns when the servers are ready.
    pub async fn start(servers: usize, workers: usize) -> Self {
        let (postgres, database, dir) = support::own_postgres().await;
        let variables = vec![
            ("SANDBAR_DATABASE__URL", database.admin_url()),
            ("SANDBAR_DATABASE__API_URL", database.api_url()),
            ("SANDBAR_DATABASE__WORKER_URL", database.worker_url()),
            ("SANDBAR_DATABASE__MAX_CONNECTIONS", "8".to_owned()),
            ("SANDBAR_DATABASE__ACQUIRE_TIMEOUT_MS", "2000".to_owned()),
            ("SANDBAR_SERVER__ADMIN_KEY", support::ADMIN_KEY.to_owned()),
            ("SANDBAR_WORKER__HEARTBEAT_MS", "250".to_owned()),
            ("SANDBAR_WORKER__DEAD_AFTER_MS", DEAD_AFTER_MS.to_string()),
            ("SANDBAR_WORKER__POLL_MS", "100".to_owned()),
            ("SANDBAR_WORKER__SLOTS", "128".to_owned()),
            ("SANDBAR_WORKER__THREADS_PER_CELL", "1".to_owned()),
            ("SANDBAR_WORKER__JOURNAL", dir.path().join("journal").display().to_string()),
            ("SANDBAR_SCHEDULER__TICK_MS", "100".to_owned()),
            ("SANDBAR_SCHEDULER__MAX_HANDOVERS", "1000".to_owned()),
            ("SANDBAR_LOG__FILTER", "warn,sandbar::server=info".to_owned()),
        ];
        let mut fleet = Self { postgres, database, servers: Vec::new(), workers: Vec::new(), variables, dir };
        for index in 0..servers {
            let address = support::lasting_address();
            let mut server = fleet.spawn_server(index, &address);
            server.ready(&Client::new(format!("http://{address}"))).await;
            fleet.servers.push((server, address));
        }
        fleet.workers = (0..workers).map(|index| (fleet.spawn_worker(index), None)).collect();
        fleet
    }

    /// Callers, one per server.
    pub fn clients(&self) -> Vec<Client> {
        self.servers.iter().map(|(_, address)| Client::new(format!("http://{address}"))).collect()
    }

    /// The file that all workers append to.
    pub fn journal(&self) -> PathBuf {
        self.dir.path().join("journal")
    }

    fn spawn_server(&self, index: usize, listen: &str) -> Process {
        let mut variables = self.variables.clone();
        variables.push(("SANDBAR_SERVER__LISTEN", listen.to_owned()));
        variables.push((
            "SANDBAR_DATA_DIR",
            self.dir.path().join(format!("server-{index}")).display().to_string(),
        ));
        Process::spawn("server", self.dir.path(), &["server"], &variables)
    }

    /// A worker in the place, and with the compiled code, of another.
    fn spawn_worker(&self, index: usize) -> Process {
        let mut variables = self.variables.clone();
        variables.push((
            "SANDBAR_DATA_DIR",
            self.dir.path().join(format!("worker-{index}")).display().to_string(),
        ));
        Process::spawn("worker", self.dir.path(), &["worker"], &variables)
    }

    /// Break something. Returns the worker process of which nothing runs any more.
    pub async fn inflict(&mut self, fault: Fault) -> Option<u32> {
        match fault {
            Fault::Worker(index) => {
                let next = self.spawn_worker(index);
                let (worker, stopped) = std::mem::replace(&mut self.workers[index], (next, None));
                let pid = worker.pid();
                let cells = cells(&worker);
                worker.kill_9();
                for cell in cells.into_iter().chain(stopped.map(|(_, pids)| pids).unwrap_or_default()) {
                    // They end with their worker; one that stands still cannot notice.
                    support::kill(cell, Signal::KILL);
                }
                return Some(pid);
            }
            Fault::Cell(index) => {
                if self.workers[index].1.is_none()
                    && let Some(cell) = cells(&self.workers[index].0).pop()
                {
                    support::kill(cell, Signal::KILL);
                }
            }
            Fault::Server(index) => {
                let address = self.servers[index].1.clone();
                self.servers[index].0.signal(Signal::KILL);
                self.servers[index].0.ended(Duration::from_secs(20)).await;
                // Not waited for: callers find out when it is back.
                self.servers[index].0 = self.spawn_server(index, &address);
            }
            Fault::Suspend(index) => {
                let (worker, stopped) = &mut self.workers[index];
                if stopped.is_none() {
                    let mut pids = cells(worker);
                    pids.push(worker.pid());
                    for pid in &pids {
                        support::kill(*pid, Signal::STOP);
                    }
                    let pid = worker.pid();
                    *stopped = Some((Instant::now() + Duration::from_millis(DEAD_AFTER_MS * 5 / 2), pids));
                    support::eventually(Duration::from_secs(5), "a worker to stand still", async || {
                        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
                        stat.contains(") T ").then_some(())
                    })
                    .await;
                    return Some(pid);
                }
            }
            Fault::Postgres => {
                let pid =
                    support::eventually(Duration::from_secs(30), "Postgres", async || self.postgres.pid())
                        .await;
                support::kill(pid, Signal::QUIT);
            }
            Fault::Backends => {
                let options = self.admin();
                let _ = tokio::time::timeout(LOOK, async move {
                    let mut admin = PgConnection::connect_with(&options).await?;
                    sqlx::query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'sandbar'")
                        .execute(&mut admin)
                        .await
                })
                .await;
            }
            Fault::Held => {
                let options = self.admin();
                tokio::spawn(tokio::time::timeout(LOOK, async move {
                    let mut admin = PgConnection::connect_with(&options).await?;
                    sqlx::query("BEGIN ISOLATION LEVEL REPEATABLE READ").execute(&mut admin).await?;
                    sqlx::query("SELECT count(*) FROM sandbar.tenants").execute(&mut admin).await?;
                    // As superuser; fails where rows changed since the snapshot, and then only the snapshot is held.
                    let _ = sqlx::query("SELECT 1 FROM sandbar.leases FOR UPDATE SKIP LOCKED")
                        .execute(&mut admin)
                        .await;
                    tokio::time::sleep(HOLD).await; // the fault itself
                    admin.close().await
                }));
            }
            Fault::Exhausted => {
                let options: PgConnectOptions = self.database.api_url().parse().unwrap();
                tokio::spawn(tokio::time::timeout(LOOK, async move {
                    let mut taken = Vec::new();
                    while taken.len() < GREEDY {
                        match PgConnection::connect_with(&options).await {
                            Ok(connection) => taken.push(connection),
                            Err(_) => break,
                        }
                    }
                    tokio::time::sleep(HOLD).await; // the fault itself
                }));
            }
        }
        None
    }

    /// Whatever breaks around it, a server ends only when it is killed. Panics, with its log, if one did.
    pub fn must_live(&mut self) {
        for (server, _) in &mut self.servers {
            server.must_live();
        }
    }

    /// Wake whoever stood still long enough.
    pub fn wake(&mut self, all: bool) {
        for (_, stopped) in &mut self.workers {
            if let Some((until, pids)) = stopped
                && (all || Instant::now() >= *until)
            {
                for pid in pids.iter() {
                    support::kill(*pid, Signal::CONT);
                }
                *stopped = None;
            }
        }
    }

    fn admin(&self) -> PgConnectOptions {
        self.database.admin_url().parse().unwrap()
    }

    /// End everything.
    pub async fn stop(self) {
        drop((self.servers, self.workers));
        self.postgres.stop().await.unwrap();
    }
}

/// The cells of a worker.
fn cells(worker: &Process) -> Vec<u32> {
    let mut children = worker.children();
    children.retain(|pid| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.windows(6).any(|w| w == b"__cell"))
    });
    children
}
