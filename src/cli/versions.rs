//! `sandbar versions`: list, show, download.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use chrono::Utc;
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use super::client::{Client, Request, TRANSFER};
use super::failure::{Exit, Failure, Outcome};
use super::list::{Pages, parse};
use super::output::{self, BOLD, Cell, DIM, Output, printable};
use super::target::Remote;
use super::value::{self, MAX_MODULE};
use crate::domain::names::TaskName;
use crate::wire::task::{Version, VersionState};

/// List, show and download the versions of a task
#[derive(Debug, clap::Args)]
pub struct Versions {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List the versions of a task, newest first
    List {
        /// Name of the task
        #[arg(value_name = "TASK", value_parser = value::task_name)]
        task: TaskName,
        #[command(flatten)]
        pages: Pages,
        #[command(flatten)]
        remote: Remote,
    },
    /// Show a version: what it is and what it says about itself
    Show {
        /// Name of the task
        #[arg(value_name = "TASK", value_parser = value::task_name)]
        task: TaskName,
        /// Number of the version
        #[arg(value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
        version: i32,
        #[command(flatten)]
        remote: Remote,
    },
    /// Download the module of a version, byte for byte as it was uploaded
    Download {
        /// Name of the task
        #[arg(value_name = "TASK", value_parser = value::task_name)]
        task: TaskName,
        /// Number of the version
        #[arg(value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
        version: i32,
        /// File to write [default: TASK-N.wasm]
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
        #[command(flatten)]
        remote: Remote,
    },
}

impl Versions {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        match &self.what {
            What::List { remote, .. } | What::Show { remote, .. } | What::Download { remote, .. } => {
                remote.json
            }
        }
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        match self.what {
            What::List { task, pages, remote } => list(&task, &pages, &remote).await,
            What::Show { task, version, remote } => show(&task, version, &remote).await,
            What::Download { task, version, output, remote } => {
                let path = output.unwrap_or_else(|| PathBuf::from(format!("{task}-{version}.wasm")));
                download(&task, version, &path, &remote).await
            }
        }
    }
}

fn state(state: VersionState) -> &'static str {
    match state {
        VersionState::Compiling => "compiling",
        VersionState::Ready => "ready",
        VersionState::Rejected => "rejected",
    }
}

fn size(version: &Version) -> String {
    output::bytes(u64::try_from(version.size_bytes).unwrap_or(0))
}

async fn list(task: &TaskName, pages: &Pages, remote: &Remote) -> Outcome {
    let output = Output::new(remote.json);
    let client = Client::new(&remote.connection)?;
    let mut first = true;
    let show = |items: Vec<Box<RawValue>>| {
        if output.json {
            for item in &items {
                output.line(item.get())?;
            }
            return Ok(());
        }
        let versions: Vec<Version> = parse(&items)?;
        let mut rows = vec![output::head(&["VERSION", "STATE", "KIND", "SIZE", "UPLOADED", "SHA256"])];
        rows.extend(versions.iter().map(|version| {
            vec![
                Cell::styled(version.version.to_string(), BOLD),
                state(version.state).into(),
                printable(&version.kind).into(),
                size(version).into(),
                output::age(version.created_at, Utc::now()).into(),
                version.sha256.get(..16).unwrap_or_default().into(),
            ]
        }));
        for line in output::table(output, &rows).into_iter().skip(usize::from(!first)) {
            output.line(line)?;
        }
        first = false;
        Ok(())
    };
    pages.walk(&client, output, &format!("/v1/tasks/{task}/versions"), &[], show).await?;
    Ok(Exit::Done)
}

async fn show(task: &TaskName, number: i32, remote: &Remote) -> Outcome {
    let output = Output::new(remote.json);
    let client = Client::new(&remote.connection)?;
    let answer = client.send(Request::get(format!("/v1/tasks/{task}/versions/{number}"))).await?;
    if output.json {
        output.line(answer.text())?;
        return Ok(Exit::Done);
    }
    let version: Version = answer.json()?;
    let row = |name: &str, value: String| {
        output.line(format!("{} {value}", output.paint(DIM, format!("{name:<11}"))))
    };
    row("version", format!("{} version {}", output.paint(BOLD, &version.task), version.version))?;
    row("state", state(version.state).to_owned())?;
    if let Some(why) = &version.rejection {
        row("because", format!("{}: {}", printable(&why.code), printable(&why.detail)))?;
    }
    row("kind", printable(&version.kind))?;
    row("size", size(&version))?;
    row("sha256", version.sha256.clone())?;
    row("uploaded", output::moment(version.created_at))?;
    if let Some(manifest) = &version.manifest {
        let text = serde_json::to_string_pretty(manifest).unwrap_or_default();
        row("says", printable(&text).replace('\n', "\n            "))?;
    }
    Ok(Exit::Done)
}

/// The bytes go to the file as they come; it gets its name when they are whole and their hash is the version's.
async fn download(task: &TaskName, number: i32, path: &Path, remote: &Remote) -> Outcome {
    let output = Output::new(remote.json);
    let client = Client::new(&remote.connection)?;
    let version: Version = client.fetch(Request::get(format!("/v1/tasks/{task}/versions/{number}"))).await?;
    let request = Request::get(format!("/v1/tasks/{task}/versions/{number}/module")).within(TRANSFER);
    let mut response = client.open(&request).await?;
    let fail = |error: &dyn std::fmt::Display| {
        Failure::new(Exit::Failed, format!("cannot write {}: {error}", path.display()))
    };
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let mut file = std::fs::File::create(&part).map_err(|e| fail(&e))?;
    let total = u64::try_from(version.size_bytes).unwrap_or(0);
    let bar = output.byte_bar(total, &format!("downloading {task} version {number}"));
    let mut hash = Sha256::new();
    let mut count = 0_u64;
    let copied: Result<(), Failure> = async {
        while let Some(piece) = client.piece(&mut response).await? {
            count += piece.len() as u64;
            if count > MAX_MODULE {
                return Err(Failure::new(
                    Exit::Failed,
                    format!("the module is larger than {MAX_MODULE} bytes"),
                ));
            }
            hash.update(&piece);
            file.write_all(&piece).map_err(|e| fail(&e))?;
            bar.inc(piece.len() as u64);
        }
        let found = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        if found != version.sha256 {
            return Err(Failure::new(
                Exit::Failed,
                "what came is not what was uploaded: its SHA-256 is another",
            )
            .detail(format!("expected {}", version.sha256))
            .detail(format!("found    {found}")));
        }
        std::fs::rename(&part, path).map_err(|e| fail(&e))
    }
    .await;
    bar.finish_and_clear();
    if let Err(failure) = copied {
        let _ = std::fs::remove_file(&part);
        return Err(failure);
    }
    if output.json {
        output
            .document(&serde_json::json!({ "file": path, "size_bytes": count, "sha256": version.sha256 }))?;
    } else {
        output.line(path.display().to_string())?;
        output.note(format!("{}, sha256 {}", output::bytes(count), version.sha256));
    }
    Ok(Exit::Done)
}
