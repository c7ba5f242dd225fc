//! `sandbar dead-letters`: what ended badly for good.

use chrono::Utc;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::client::{Client, Request, with_query};
use super::failure::{Exit, Outcome};
use super::list::{Pages, parse};
use super::output::{self, BOLD, Cell, Output, printable};
use super::target::Remote;
use super::{rows, value};
use crate::domain::names::TaskName;
use crate::wire::dead_letter::{DeadLetter, DeadLetterGroup};

/// List, group and purge what ended badly for good; to run it again: retry, and bulk retry
#[derive(Debug, clap::Args)]
pub struct DeadLetters {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List dead letters, newest first
    List {
        #[command(flatten)]
        filter: Filter,
        #[command(flatten)]
        pages: Pages,
        #[command(flatten)]
        remote: Remote,
    },
    /// Group dead letters by task and kind of failure, the largest group first
    Groups {
        #[command(flatten)]
        filter: Filter,
        #[command(flatten)]
        remote: Remote,
    },
    /// Delete dead letters for good: payloads, attempts, logs and all
    Purge {
        /// Ids of the invocations
        #[arg(value_name = "ID", required = true)]
        ids: Vec<Uuid>,
        #[command(flatten)]
        remote: Remote,
    },
}

#[derive(Debug, clap::Args)]
struct Filter {
    /// Only of this task
    #[arg(long, short, value_name = "NAME", value_parser = value::task_name)]
    task: Option<TaskName>,
    /// Only of this kind of failure, as groups show it
    #[arg(long, value_name = "HEX")]
    fingerprint: Option<String>,
    /// Only with this reason, such as trap
    #[arg(long, value_name = "WORD")]
    reason: Option<String>,
    /// Only those that were not run again yet
    #[arg(long)]
    open: bool,
}

impl Filter {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut pairs = Vec::new();
        if let Some(task) = &self.task {
            pairs.push(("task", task.to_string()));
        }
        if let Some(fingerprint) = &self.fingerprint {
            pairs.push(("fingerprint", fingerprint.clone()));
        }
        if let Some(reason) = &self.reason {
            pairs.push(("reason", reason.clone()));
        }
        if self.open {
            pairs.push(("redriven", "false".to_owned()));
        }
        pairs
    }
}

impl DeadLetters {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        match &self.what {
            What::List { remote, .. } | What::Groups { remote, .. } | What::Purge { remote, .. } => {
                remote.json
            }
        }
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        match self.what {
            What::List { filter, pages, remote } => list(&filter, &pages, &remote).await,
            What::Groups { filter, remote } => groups(&filter, &remote).await,
            What::Purge { ids, remote } => purge(&ids, &remote).await,
        }
    }
}

fn summary(text: Option<&String>) -> String {
    text.map_or_else(String::new, |text| output::headline(&printable(text), 70))
}

async fn list(filter: &Filter, pages: &Pages, remote: &Remote) -> Outcome {
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
        let letters: Vec<DeadLetter> = parse(&items)?;
        let mut rows =
            vec![output::head(&["ID", "TASK", "VERSION", "DIED", "ATTEMPTS", "KIND", "FAILURE", "AGAIN AS"])];
        rows.extend(letters.iter().map(|letter| {
            vec![
                Cell::styled(letter.id.to_string(), BOLD),
                printable(&letter.task).into(),
                letter.version.to_string().into(),
                output::age(letter.died_at, now).into(),
                letter.attempts.to_string().into(),
                printable(letter.fingerprint.as_deref().unwrap_or("-")).into(),
                summary(letter.summary.as_ref().or(Some(&letter.reason))).into(),
                letter.redriven_as.map_or_else(|| "-".to_owned(), |id| id.to_string()).into(),
            ]
        }));
        for line in output::table(output, &rows).into_iter().skip(usize::from(!first)) {
            output.line(line)?;
        }
        first = false;
        Ok(())
    };
    pages.walk(&client, output, "/v1/dead-letters", &filter.pairs(), show).await?;
    Ok(Exit::Done)
}

async fn groups(filter: &Filter, remote: &Remote) -> Outcome {
    let output = Output::new(remote.json);
    let client = Client::new(&remote.connection)?;
    let head = ["COUNT", "TASK", "KIND", "FAILURE", "FIRST", "LAST", "NEWEST"];
    let path = with_query("/v1/dead-letters/groups", &filter.pairs());
    let now = Utc::now();
    rows::show(&client, output, &path, &head, "no dead letters", |group: &DeadLetterGroup| {
        vec![
            Cell::styled(group.count.to_string(), BOLD),
            printable(&group.task).into(),
            printable(group.fingerprint.as_deref().unwrap_or("-")).into(),
            summary(group.summary.as_ref().or(Some(&group.reason))).into(),
            output::age(group.first_at, now).into(),
            output::age(group.last_at, now).into(),
            group.newest.to_string().into(),
        ]
    })
    .await?;
    Ok(Exit::Done)
}

async fn purge(ids: &[Uuid], remote: &Remote) -> Outcome {
    let output = Output::new(remote.json);
    let client = Client::new(&remote.connection)?;
    for id in ids {
        client.send(Request::delete(format!("/v1/dead-letters/{id}"))).await?;
        if output.json {
            output.document(&serde_json::json!({ "purged": id }))?;
        } else {
            output.line(format!("{id}  purged"))?;
        }
    }
    Ok(Exit::Done)
}
