//! `sandbar list`: invocations, newest first; and how all lists walk through their pages.

use chrono::Utc;
use serde_json::value::RawValue;

use super::client::{Client, Request, with_query};
use super::failure::{Exit, Failure, Outcome};
use super::output::Output;
use super::show;
use super::target::Remote;
use super::value;
use crate::domain::invocation::State;
use crate::domain::names::TaskName;
use crate::wire::Page;

/// Items of one page, as the server allows.
const PAGE: usize = 200;

/// List invocations, newest first
#[derive(Debug, clap::Args)]
pub struct List {
    /// Only of this task
    #[arg(long, short, value_name = "NAME", value_parser = value::task_name)]
    task: Option<TaskName>,
    /// Only in this state: scheduled, queued, running, succeeded, dead, cancelled or expired
    #[arg(long, short, value_name = "STATE", value_parser = state)]
    state: Option<State>,
    /// Only with this tag; may be repeated, then all must be there
    #[arg(long, value_name = "KEY=VALUE", value_parser = value::tag)]
    tag: Vec<(String, String)>,
    #[command(flatten)]
    pages: Pages,
    #[command(flatten)]
    remote: Remote,
}

/// How much of a list.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Pages {
    /// Items at most
    #[arg(long, short = 'n', value_name = "N", default_value_t = 50, conflicts_with = "all")]
    limit: usize,
    /// All of them
    #[arg(long)]
    all: bool,
}

fn state(text: &str) -> Result<State, String> {
    text.parse().map_err(|error: crate::domain::invocation::UnknownState| error.to_string())
}

impl Pages {
    /// Fetches pages and hands each to `show`, with what is left of it after the limit. Says on standard error when
    /// there is more.
    ///
    /// # Errors
    /// The server fails, or `show` does.
    pub async fn walk(
        &self,
        client: &Client,
        output: Output,
        path: &str,
        pairs: &[(&str, String)],
        mut show: impl FnMut(Vec<Box<RawValue>>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut left = if self.all { usize::MAX } else { self.limit };
        let mut pairs = pairs.to_vec();
        pairs.push(("limit", left.clamp(1, PAGE).to_string()));
        let mut next = Some(with_query(path, &pairs));
        while let Some(path) = next.take() {
            let mut page: Page<Box<RawValue>> = client.fetch(Request::get(path)).await?;
            let cut = page.items.len() > left;
            page.items.truncate(left);
            left -= page.items.len();
            let more = cut || page.next.is_some();
            show(page.items)?;
            if left > 0 {
                // Only paths of this server: the key goes nowhere else.
                next = page.next.filter(|next| next.starts_with("/v1/"));
            } else if more && !output.json {
                output.note("there are more: --all shows them, --limit N as many as you like");
            }
        }
        Ok(())
    }
}

/// Items as one of our shapes.
///
/// # Errors
/// They are others.
pub fn parse<T: serde::de::DeserializeOwned>(items: &[Box<RawValue>]) -> Result<Vec<T>, Failure> {
    items.iter().map(|item| serde_json::from_str(item.get())).collect::<Result<_, _>>().map_err(|error| {
        Failure::new(Exit::Failed, format!("the answer is not understood: {error}"))
            .hint("the server may be newer than this program; --json prints what it says as it is")
    })
}

impl List {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote.json
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.remote.json);
        let client = Client::new(&self.remote.connection)?;
        let mut pairs = Vec::new();
        if let Some(task) = &self.task {
            pairs.push(("task", task.to_string()));
        }
        if let Some(state) = self.state {
            pairs.push(("state", state.to_string()));
        }
        pairs.extend(self.tag.iter().map(|(key, value)| ("tag", format!("{key}:{value}"))));
        let mut empty = true;
        let show = |items: Vec<Box<RawValue>>| {
            if output.json {
                for item in &items {
                    output.line(item.get())?;
                }
                return Ok(());
            }
            let lines = show::table(output, &parse(&items)?, Utc::now());
            // One head over all pages.
            let head = usize::from(!empty || items.is_empty());
            empty &= items.is_empty();
            for line in lines.into_iter().skip(head) {
                output.line(line)?;
            }
            Ok(())
        };
        self.pages.walk(&client, output, "/v1/invocations", &pairs, show).await?;
        if empty && !output.json {
            output.note(if pairs.is_empty() {
                "no invocations yet; start one: sandbar invoke TASK"
            } else {
                "no such invocations"
            });
        }
        Ok(Exit::Done)
    }
}
