//! `sandbar bulk`: one action for many invocations. And `sandbar pauses`.

use chrono::{DateTime, Utc};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::client::{Client, Request};
use super::failure::{Exit, Outcome};
use super::list::{Pages, parse};
use super::output::{self, BOLD, Cell, Output, printable};
use super::target::Remote;
use super::{rows, value};
use crate::domain::names::TaskName;
use crate::wire::bulk::{
    BulkAction, BulkCount, BulkFilter, BulkOperation, BulkRequest, BulkState, Pause, PauseTarget,
};
use crate::wire::invocation::State;

/// Do something to every invocation that passes a filter
#[derive(Debug, clap::Args)]
pub struct Bulk {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Cancel what waits and what runs
    Cancel {
        #[command(flatten)]
        ask: Ask,
    },
    /// Give what waits another priority
    Reprioritise {
        #[command(flatten)]
        ask: Ask,
        /// The new priority, -100 to 100
        #[arg(long, value_name = "N", allow_negative_numbers = true)]
        priority: i16,
    },
    /// Run dead ones again (or cancelled and expired ones, with --state)
    Retry {
        #[command(flatten)]
        ask: Ask,
        /// Version to run instead of the one that failed; needs --task
        #[arg(long, value_name = "N")]
        version: Option<i32>,
    },
    /// Delete dead ones for good
    Purge {
        #[command(flatten)]
        ask: Ask,
    },
    /// List operations, newest first
    List {
        #[command(flatten)]
        pages: Pages,
        #[command(flatten)]
        remote: Remote,
    },
    /// Show an operation with its progress
    Show {
        /// Id of the operation
        #[arg(value_name = "ID")]
        id: Uuid,
        #[command(flatten)]
        remote: Remote,
    },
    /// Stop an operation where it is
    Stop {
        /// Id of the operation
        #[arg(value_name = "ID")]
        id: Uuid,
        #[command(flatten)]
        remote: Remote,
    },
}

#[derive(Debug, clap::Args)]
struct Ask {
    /// Only of this task
    #[arg(long, short, value_name = "NAME", value_parser = value::task_name)]
    task: Option<TaskName>,
    /// Only in this state; may be repeated
    #[arg(long, short, value_name = "STATE", value_parser = state)]
    state: Vec<State>,
    /// Only with this tag; may be repeated, then all must be there
    #[arg(long, value_name = "KEY=VALUE", value_parser = value::tag)]
    tag: Vec<(String, String)>,
    /// Only those accepted after this time (RFC 3339)
    #[arg(long, value_name = "TIME")]
    created_after: Option<DateTime<Utc>>,
    /// Only those accepted before this time (RFC 3339)
    #[arg(long, value_name = "TIME")]
    created_before: Option<DateTime<Utc>>,
    /// Only dead letters of this kind of failure
    #[arg(long, value_name = "HEX")]
    fingerprint: Option<String>,
    /// Only dead letters with this reason
    #[arg(long, value_name = "WORD")]
    reason: Option<String>,
    /// All of the tenant, without any of the above
    #[arg(long)]
    all: bool,
    /// Only count them
    #[arg(long)]
    dry_run: bool,
    /// So many a second at most, 1 to 10,000
    #[arg(long, value_name = "N")]
    rate: Option<i32>,
    #[command(flatten)]
    remote: Remote,
}

fn state(text: &str) -> Result<State, String> {
    serde_json::from_value(serde_json::Value::String(text.to_owned()))
        .map_err(|_| "use scheduled, queued, running, dead, cancelled or expired".to_owned())
}

impl Bulk {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        match &self.what {
            What::Cancel { ask }
            | What::Reprioritise { ask, .. }
            | What::Retry { ask, .. }
            | What::Purge { ask } => ask.remote.json,
            What::List { remote, .. } | What::Show { remote, .. } | What::Stop { remote, .. } => remote.json,
        }
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        match self.what {
            What::Cancel { ask } => submit(ask, BulkAction::Cancel, None, None).await,
            What::Reprioritise { ask, priority } => {
                submit(ask, BulkAction::Reprioritise, Some(priority), None).await
            }
            What::Retry { ask, version } => submit(ask, BulkAction::Retry, None, version).await,
            What::Purge { ask } => submit(ask, BulkAction::Purge, None, None).await,
            What::List { pages, remote } => list(&pages, &remote).await,
            What::Show { id, remote } => one(Request::get(format!("/v1/bulk/{id}")), &remote).await,
            What::Stop { id, remote } => {
                one(Request::post(format!("/v1/bulk/{id}/cancel")).repeatable(), &remote).await
            }
        }
    }
}

async fn submit(ask: Ask, action: BulkAction, priority: Option<i16>, version: Option<i32>) -> Outcome {
    let filter = BulkFilter {
        state: ask.state,
        task: ask.task.map(|task| task.to_string()),
        tags: ask.tag.into_iter().collect(),
        created_after: ask.created_after,
        created_before: ask.created_before,
        fingerprint: ask.fingerprint,
        reason: ask.reason,
    };
    let named = filter.task.is_some()
        || !filter.tags.is_empty()
        || filter.created_after.is_some()
        || filter.created_before.is_some()
        || filter.fingerprint.is_some()
        || filter.reason.is_some();
    if !named && !ask.all && !ask.dry_run {
        // Forgetting the filter would be a costly slip.
        return Err(super::failure::Failure::usage(
            "say which: --task, --tag, --created-before and the like, or --all for every one of the tenant",
        ));
    }
    let body =
        BulkRequest { action, filter, dry_run: ask.dry_run, priority, version, rate_per_second: ask.rate };
    let output = Output::new(ask.remote.json);
    let client = Client::new(&ask.remote.connection)?;
    let answer = client.send(Request::post("/v1/bulk").json(&body)?).await?;
    if output.json {
        output.line(answer.text())?;
    } else if ask.dry_run {
        let count: BulkCount = answer.json()?;
        output.line(format!("{}{}", if count.exact { "" } else { "about " }, count.matched))?;
    } else {
        let operation: BulkOperation = answer.json()?;
        output.line(line(&operation))?;
        output.note(format!("see how it goes: sandbar bulk show {}", operation.id));
    }
    Ok(Exit::Done)
}

fn word(action: BulkAction) -> &'static str {
    match action {
        BulkAction::Cancel => "cancel",
        BulkAction::Reprioritise => "reprioritise",
        BulkAction::Retry => "retry",
        BulkAction::Purge => "purge",
    }
}

fn stand(state: BulkState) -> &'static str {
    match state {
        BulkState::Waiting => "waiting",
        BulkState::Running => "running",
        BulkState::Done => "done",
        BulkState::Cancelled => "cancelled",
        BulkState::Failed => "failed",
    }
}

fn line(operation: &BulkOperation) -> String {
    format!(
        "{}  {}  {}  {} of {}{} done, {} skipped, {} failed",
        operation.id,
        word(operation.action),
        stand(operation.state),
        operation.done,
        if operation.expected.exact { "" } else { "about " },
        operation.expected.matched,
        operation.skipped,
        operation.failed
    )
}

async fn one(request: Request, remote: &Remote) -> Outcome {
    let output = Output::new(remote.json);
    let client = Client::new(&remote.connection)?;
    let answer = client.send(request).await?;
    if output.json {
        output.line(answer.text())?;
        return Ok(Exit::Done);
    }
    let operation: BulkOperation = answer.json()?;
    output.line(line(&operation))?;
    if let Some(error) = &operation.error {
        output.line(format!("the last that failed: {}", printable(error)))?;
    }
    Ok(Exit::Done)
}

async fn list(pages: &Pages, remote: &Remote) -> Outcome {
    let output = Output::new(remote.json);
    let client = Client::new(&remote.connection)?;
    let mut first = true;
    let now = Utc::now();
    let show = |items: Vec<Box<RawValue>>| {
        if output.json {
            for item in &items {
                output.line(item.get())?;
            }
            return Ok(());
        }
        let operations: Vec<BulkOperation> = parse(&items)?;
        let mut rows = vec![output::head(&[
            "ID", "ACTION", "STATE", "MATCHED", "DONE", "SKIPPED", "FAILED", "ACCEPTED",
        ])];
        rows.extend(operations.iter().map(|operation| {
            vec![
                Cell::styled(operation.id.to_string(), BOLD),
                word(operation.action).into(),
                stand(operation.state).into(),
                operation.matched.to_string().into(),
                operation.done.to_string().into(),
                operation.skipped.to_string().into(),
                operation.failed.to_string().into(),
                output::age(operation.created_at, now).into(),
            ]
        }));
        for line in output::table(output, &rows).into_iter().skip(usize::from(!first)) {
            output.line(line)?;
        }
        first = false;
        Ok(())
    };
    pages.walk(&client, output, "/v1/bulk", &[], show).await?;
    Ok(Exit::Done)
}

/// Pause and resume everything, a task or a tag
#[derive(Debug, clap::Args)]
pub struct Pauses {
    #[command(subcommand)]
    what: PausesWhat,
}

#[derive(Debug, clap::Subcommand)]
enum PausesWhat {
    /// List pauses
    List {
        #[command(flatten)]
        remote: Remote,
    },
    /// Pause everything of the tenant: what runs goes on, the rest waits
    Everything {
        #[command(flatten)]
        remote: Remote,
    },
    /// Pause a task
    Task {
        /// Name of the task
        #[arg(value_name = "NAME", value_parser = value::task_name)]
        task: TaskName,
        #[command(flatten)]
        remote: Remote,
    },
    /// Pause what has a tag
    Tag {
        /// The tag
        #[arg(value_name = "KEY=VALUE", value_parser = value::tag)]
        tag: (String, String),
        #[command(flatten)]
        remote: Remote,
    },
    /// End a pause
    End {
        /// Id of the pause
        #[arg(value_name = "ID")]
        id: Uuid,
        #[command(flatten)]
        remote: Remote,
    },
}

impl Pauses {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        match &self.what {
            PausesWhat::List { remote }
            | PausesWhat::Everything { remote }
            | PausesWhat::Task { remote, .. }
            | PausesWhat::Tag { remote, .. }
            | PausesWhat::End { remote, .. } => remote.json,
        }
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        match self.what {
            PausesWhat::List { remote } => {
                let output = Output::new(remote.json);
                let client = Client::new(&remote.connection)?;
                let now = Utc::now();
                let head = ["ID", "WHAT", "SINCE"];
                rows::show(&client, output, "/v1/pauses", &head, "nothing is paused", |pause: &Pause| {
                    vec![
                        Cell::styled(pause.id.to_string(), BOLD),
                        what(&pause.target).into(),
                        output::age(pause.created_at, now).into(),
                    ]
                })
                .await?;
                Ok(Exit::Done)
            }
            PausesWhat::Everything { remote } => pause(&PauseTarget::Tenant {}, &remote).await,
            PausesWhat::Task { task, remote } => {
                pause(&PauseTarget::Task { task: task.to_string() }, &remote).await
            }
            PausesWhat::Tag { tag: (key, value), remote } => {
                pause(&PauseTarget::Tag { key, value }, &remote).await
            }
            PausesWhat::End { id, remote } => {
                let output = Output::new(remote.json);
                let client = Client::new(&remote.connection)?;
                client.send(Request::delete(format!("/v1/pauses/{id}"))).await?;
                if output.json {
                    output.document(&serde_json::json!({ "ended": id }))?;
                } else {
                    output.line(format!("{id}  ended"))?;
                }
                Ok(Exit::Done)
            }
        }
    }
}

fn what(target: &PauseTarget) -> String {
    match target {
        PauseTarget::Tenant {} => "everything".to_owned(),
        PauseTarget::Task { task } => format!("task {}", printable(task)),
        PauseTarget::Tag { key, value } => format!("tag {}={}", printable(key), printable(value)),
    }
}

async fn pause(target: &PauseTarget, remote: &Remote) -> Outcome {
    let output = Output::new(remote.json);
    let client = Client::new(&remote.connection)?;
    // Pausing twice gives the one pause.
    let answer = client.send(Request::post("/v1/pauses").json(target)?.repeatable()).await?;
    if output.json {
        output.line(answer.text())?;
    } else {
        let pause: Pause = answer.json()?;
        output.line(format!("{}  {} is paused", pause.id, what(&pause.target)))?;
        output.note(format!("resume it: sandbar pauses end {}", pause.id));
    }
    Ok(Exit::Done)
}
