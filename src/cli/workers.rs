//! `sandbar workers` and `sandbar duties`: for operators of the installation.

use chrono::Utc;
use uuid::Uuid;

use super::client::{Client, Request};
use super::failure::{Exit, Outcome};
use super::output::{self, BOLD, Cell, Output, printable};
use super::rows;
use super::target::Remote;
use crate::wire::operate::{Duty, DutyState, Worker, WorkerState};

/// See and steer the workers of the installation
#[derive(Debug, clap::Args)]
pub struct Workers {
    #[command(subcommand)]
    what: WorkersWhat,
}

#[derive(Debug, clap::Subcommand)]
enum WorkersWhat {
    /// List workers: those that run, and for a day those that are gone
    List {
        #[command(flatten)]
        remote: Remote,
    },
    /// Let a worker claim nothing more; what runs goes on
    Cordon {
        #[command(flatten)]
        one: OneWorker,
    },
    /// Let a worker claim again
    Uncordon {
        #[command(flatten)]
        one: OneWorker,
    },
    /// Let a worker finish what runs and leave
    Drain {
        #[command(flatten)]
        one: OneWorker,
    },
}

#[derive(Debug, clap::Args)]
struct OneWorker {
    /// Id of the worker
    #[arg(value_name = "ID")]
    id: Uuid,
    #[command(flatten)]
    remote: Remote,
}

impl Workers {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        match &self.what {
            WorkersWhat::List { remote } => remote.json,
            WorkersWhat::Cordon { one } | WorkersWhat::Uncordon { one } | WorkersWhat::Drain { one } => {
                one.remote.json
            }
        }
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        match self.what {
            WorkersWhat::List { remote } => list(&remote).await,
            WorkersWhat::Cordon { one } => steer(&one, "cordon").await,
            WorkersWhat::Uncordon { one } => steer(&one, "uncordon").await,
            WorkersWhat::Drain { one } => steer(&one, "drain").await,
        }
    }
}

fn worker_state(state: WorkerState) -> &'static str {
    match state {
        WorkerState::Active => "active",
        WorkerState::Cordoned => "cordoned",
        WorkerState::Draining => "draining",
        WorkerState::Gone => "gone",
    }
}

async fn list(remote: &Remote) -> Outcome {
    let output = Output::new(remote.json);
    let client = Client::new(&remote.connection)?;
    let head = ["ID", "STATE", "HOST", "LOAD", "MEMORY", "VERSION", "STARTED", "SEEN"];
    let now = Utc::now();
    rows::show(&client, output, "/v1/workers", &head, "no worker has run within a day", |worker: &Worker| {
        let memory = worker.memory.and_then(|memory| u64::try_from(memory.total_bytes).ok());
        vec![
            Cell::styled(worker.id.to_string(), BOLD),
            worker_state(worker.state).into(),
            printable(&worker.host).into(),
            format!("{}/{}", worker.running.unwrap_or(0), worker.slots).into(),
            memory.map_or_else(|| "-".to_owned(), output::bytes).into(),
            printable(&worker.version).into(),
            output::age(worker.started_at, now).into(),
            output::age(worker.last_seen_at, now).into(),
        ]
    })
    .await?;
    Ok(Exit::Done)
}

async fn steer(one: &OneWorker, word: &str) -> Outcome {
    let output = Output::new(one.remote.json);
    let client = Client::new(&one.remote.connection)?;
    // Wanting the same twice is wanting it once.
    let answer = client.send(Request::post(format!("/v1/workers/{}/{word}", one.id)).repeatable()).await?;
    if output.json {
        output.line(answer.text())?;
    } else {
        let worker: Worker = answer.json()?;
        output.line(format!("{}  {}", worker.id, worker_state(worker.state)))?;
        output.note("the worker hears it with its next heartbeat");
    }
    Ok(Exit::Done)
}

/// See and steer the background duties of the servers
#[derive(Debug, clap::Args)]
pub struct Duties {
    #[command(subcommand)]
    what: DutiesWhat,
}

#[derive(Debug, clap::Subcommand)]
enum DutiesWhat {
    /// List duties: who holds each, when it ran, what it did
    List {
        #[command(flatten)]
        remote: Remote,
    },
    /// Let a duty run only when asked to
    Pause {
        #[command(flatten)]
        one: OneDuty,
    },
    /// Let a paused duty run again
    Resume {
        #[command(flatten)]
        one: OneDuty,
    },
    /// Ask for one run now
    Run {
        #[command(flatten)]
        one: OneDuty,
    },
    /// Set the time between runs
    Set {
        #[command(flatten)]
        one: OneDuty,
        /// Milliseconds between runs, 10 to 86,400,000 [default: what the servers' configuration says]
        #[arg(long, value_name = "MS")]
        interval_ms: Option<i64>,
    },
}

#[derive(Debug, clap::Args)]
struct OneDuty {
    /// Name of the duty
    #[arg(value_name = "NAME", value_parser = duty_name)]
    name: String,
    #[command(flatten)]
    remote: Remote,
}

/// Letters only: it goes into a path.
fn duty_name(text: &str) -> Result<String, String> {
    if text.len() <= 64 && !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'-') {
        return Ok(text.to_owned());
    }
    Err("the name of a duty has small letters only; see sandbar duties list".to_owned())
}

impl Duties {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        match &self.what {
            DutiesWhat::List { remote } => remote.json,
            DutiesWhat::Pause { one }
            | DutiesWhat::Resume { one }
            | DutiesWhat::Run { one }
            | DutiesWhat::Set { one, .. } => one.remote.json,
        }
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let path = |one: &OneDuty, word: &str| format!("/v1/duties/{}{word}", one.name);
        let (one, request) = match self.what {
            DutiesWhat::List { remote } => return duties(&remote).await,
            DutiesWhat::Pause { one } => {
                let request = Request::post(path(&one, "/pause"));
                (one, request)
            }
            DutiesWhat::Resume { one } => {
                let request = Request::post(path(&one, "/resume"));
                (one, request)
            }
            DutiesWhat::Run { one } => {
                let request = Request::post(path(&one, "/run"));
                (one, request)
            }
            DutiesWhat::Set { one, interval_ms } => {
                let body = serde_json::json!({ "interval_ms": interval_ms });
                let request = Request::patch(path(&one, "")).json(&body)?;
                (one, request)
            }
        };
        let output = Output::new(one.remote.json);
        let client = Client::new(&one.remote.connection)?;
        let answer = client.send(request.repeatable()).await?;
        if output.json {
            output.line(answer.text())?;
        } else {
            let duty: Duty = answer.json()?;
            output.line(format!(
                "{}  {}  every {} ms",
                duty.name,
                duty_state(duty.state),
                duty.interval_ms
            ))?;
        }
        Ok(Exit::Done)
    }
}

fn duty_state(state: DutyState) -> &'static str {
    match state {
        DutyState::Running => "running",
        DutyState::Idle => "idle",
        DutyState::Paused => "paused",
        DutyState::Vacant => "vacant",
    }
}

async fn duties(remote: &Remote) -> Outcome {
    let output = Output::new(remote.json);
    let client = Client::new(&remote.connection)?;
    let head = ["NAME", "STATE", "EVERY", "RUNS", "FAILED", "ROWS", "LAST RUN", "ERROR"];
    let now = Utc::now();
    rows::show(&client, output, "/v1/duties", &head, "no server has run yet", |duty: &Duty| {
        let last = duty.last_run.as_ref();
        let error = last.and_then(|run| run.error.as_deref()).unwrap_or_default();
        vec![
            Cell::styled(printable(&duty.name), BOLD),
            duty_state(duty.state).into(),
            format!("{} ms", duty.interval_ms).into(),
            duty.runs.to_string().into(),
            duty.failures.to_string().into(),
            duty.rows_handled.to_string().into(),
            last.map_or_else(|| "-".to_owned(), |run| output::age(run.started_at, now)).into(),
            output::headline(&printable(error), 60).into(),
        ]
    })
    .await?;
    Ok(Exit::Done)
}
