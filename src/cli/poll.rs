//! The log of an invocation in pages, and following it by asking again and again: for servers and proxies that do not
//! stream, and for when all streams of a server are taken. Gives the same events as `events`.

use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::client::{Client, Request, with_query};
use super::events::{Filter, Raw};
use super::failure::Failure;
use super::output;
use crate::wire::invocation::{Invocation, Progress};

/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(500);

/// Reads the log of an invocation, page after page, and later what has been added since.
#[derive(Debug)]
pub struct LogReader {
    id: Uuid,
    filter: Filter,
    /// The place of the last record that was read.
    cursor: Option<String>,
    /// Whether the page before was the last.
    done: bool,
}

/// One page of a log.
#[derive(Debug, Deserialize)]
struct Page {
    items: Vec<Box<RawValue>>,
    #[serde(default)]
    next: Option<String>,
}

/// Where a record is.
#[derive(Debug, Deserialize)]
struct Place {
    cursor: String,
}

impl LogReader {
    /// From the beginning.
    pub fn new(id: Uuid, filter: Filter) -> Self {
        Self { id, filter, cursor: None, done: false }
    }

    /// The next page; `None` when all that there is has been read. Asked again after that, it looks for more.
    ///
    /// # Errors
    /// The server fails.
    pub async fn next(&mut self, client: &Client) -> Result<Option<Vec<Box<RawValue>>>, Failure> {
        if std::mem::take(&mut self.done) {
            return Ok(None);
        }
        let mut pairs = self.filter.pairs.clone();
        if let Some(cursor) = &self.cursor {
            pairs.push(("after", cursor.clone()));
        }
        let path = with_query(&format!("/v1/invocations/{}/logs", self.id), &pairs);
        let page: Page = client.fetch(Request::get(path)).await?;
        let last = page.items.last().and_then(|item| serde_json::from_str::<Place>(item.get()).ok());
        let more = page.next.is_some() && !page.items.is_empty();
        if let Some(place) = last {
            self.cursor = Some(place.cursor);
        }
        self.done = !more;
        Ok(Some(page.items))
    }
}

/// Follows an invocation until it ends, and hands every event to `show`.
///
/// # Errors
/// The server fails, or `show` does.
pub async fn follow(
    client: &Client,
    id: Uuid,
    filter: &Filter,
    show: &mut impl FnMut(&Raw) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut log = LogReader::new(id, filter.clone());
    let mut state = None;
    let mut progress: Option<Progress> = None;
    loop {
        // First the state, then the log: what was logged before the end is then seen before it.
        let invocation: Invocation = client.fetch(Request::get(format!("/v1/invocations/{id}"))).await?;
        let attempt = invocation.attempts.last().map(|attempt| attempt.attempt);
        let now = invocation.summary.state;
        if state != Some((now, attempt)) {
            state = Some((now, attempt));
            show(&Raw::new("state", serde_json::json!({ "state": now, "attempt": attempt }).to_string()))?;
        }
        while let Some(items) = log.next(client).await? {
            for item in items {
                show(&Raw::new("log", item.get()))?;
            }
        }
        let latest = invocation.progress;
        if latest.is_some() && latest != progress {
            show(&Raw::new("progress", serde_json::json!(latest).to_string()))?;
            progress = latest;
        }
        if output::is_final(now) {
            show(&Raw::new("end", serde_json::json!(invocation.summary).to_string()))?;
            return Ok(());
        }
        tokio::time::sleep(LOOK).await;
    }
}
