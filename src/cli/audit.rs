//! `sandbar audit`: who changed what, and what was denied.

use std::io::Write as _;
use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::client::{Client, Request, TRANSFER, with_query};
use super::failure::{Exit, Failure, Outcome};
use super::list::{Pages, parse};
use super::output::{self, Cell, Output, printable};
use super::target::Remote;
use super::value;
use crate::wire::audit::{AuditEntry, Outcome as Became};

/// Show the audit log: every change and every denied attempt, newest first
#[derive(Debug, clap::Args)]
pub struct Audit {
    /// Not before: a time, or a duration ago
    #[arg(long, value_name = "TIME", value_parser = value::past)]
    since: Option<DateTime<Utc>>,
    /// Before: a time, or a duration ago
    #[arg(long, value_name = "TIME", value_parser = value::past)]
    until: Option<DateTime<Utc>>,
    /// Only by this key or user
    #[arg(long, value_name = "ID")]
    actor: Option<Uuid>,
    /// Only what needed this action (docs/permissions.md)
    #[arg(long, value_name = "ACTION")]
    action: Option<String>,
    /// Only what was denied
    #[arg(long)]
    denied: bool,
    /// Only what concerns paths that begin with this
    #[arg(long, value_name = "PATH")]
    target: Option<String>,
    /// The installation's own log, for the platform
    #[arg(long)]
    installation: bool,
    /// All entries as JSON lines, in one stream
    #[arg(long, conflicts_with_all = ["limit", "all"])]
    export: bool,
    #[command(flatten)]
    pages: Pages,
    #[command(flatten)]
    remote: Remote,
}

impl Audit {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote.json || self.export
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.json());
        let client = Client::new(&self.remote.connection)?;
        let mut pairs = Vec::new();
        let mut add = |name: &'static str, value: Option<String>| pairs.extend(value.map(|v| (name, v)));
        add("since", self.since.map(|at| at.to_rfc3339()));
        add("until", self.until.map(|at| at.to_rfc3339()));
        add("actor", self.actor.map(|id| id.to_string()));
        add("action", self.action.clone());
        add("outcome", self.denied.then(|| "denied".to_owned()));
        add("target", self.target.clone());
        add("of", self.installation.then(|| "installation".to_owned()));
        if self.export {
            let request = Request::get(with_query("/v1/audit", &pairs))
                .header("accept", "application/x-ndjson")?
                .within(TRANSFER);
            return export(&client, &request).await;
        }
        let mut first = true;
        let show = |items: Vec<Box<serde_json::value::RawValue>>| {
            if output.json {
                for item in &items {
                    output.line(item.get())?;
                }
                return Ok(());
            }
            let entries: Vec<AuditEntry> = parse(&items)?;
            let mut rows = vec![output::head(&["WHEN", "WHO", "FROM", "WHAT", "OUTCOME"])];
            rows.extend(entries.iter().map(|e| {
                let method = e.operation.split(' ').next().unwrap_or_default();
                let who = if e.actor.is_empty() { e.actor_kind.as_str() } else { e.actor.as_str() };
                let times = if e.times > 1 { format!(" × {}", e.times) } else { String::new() };
                vec![
                    Cell::from(output::moment(e.at)),
                    printable(who).into(),
                    e.address.as_deref().map_or_else(|| "-".to_owned(), printable).into(),
                    format!("{method} {}", printable(&e.target)).into(),
                    match e.outcome {
                        Became::Done => "done".to_owned(),
                        Became::Denied => format!("denied: {}{times}", e.code.as_deref().unwrap_or("-")),
                    }
                    .into(),
                ]
            }));
            for line in output::table(output, &rows).into_iter().skip(usize::from(!first)) {
                output.line(line)?;
            }
            first = false;
            Ok(())
        };
        self.pages.walk(&client, output, "/v1/audit", &pairs, show).await?;
        Ok(Exit::Done)
    }
}

/// As it comes: a log may be larger than the memory.
async fn export(client: &Client, request: &Request) -> Outcome {
    let mut response = client.open(request).await?;
    let mut out = std::io::stdout().lock();
    loop {
        let piece = tokio::time::timeout(Duration::from_secs(60), client.piece(&mut response)).await;
        let piece = piece.map_err(|_| Failure::new(Exit::Unreachable, "the export stands still"))??;
        let Some(piece) = piece else { break };
        out.write_all(&piece)?;
    }
    out.flush()?;
    Ok(Exit::Done)
}
