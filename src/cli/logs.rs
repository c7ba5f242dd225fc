//! `sandbar logs`: what an invocation logged, or logs.

use chrono::{DateTime, Utc};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::client::Client;
use super::events::{self, Filter};
use super::failure::{Exit, Failure, Outcome};
use super::list;
use super::output::{self, Output};
use super::poll::LogReader;
use super::show::{self, Record};
use super::target::Remote;
use super::value;
use crate::wire::invocation::{Progress, StateEvent};

/// Print the log of an invocation
#[derive(Debug, clap::Args)]
pub struct Logs {
    /// Id of the invocation
    #[arg(value_name = "ID")]
    id: Uuid,
    /// Go on until it ends
    #[arg(long, short)]
    follow: bool,
    /// At least this level: trace, debug, info, warn or error
    #[arg(long, short, value_name = "LEVEL", value_parser = ["trace", "debug", "info", "warn", "error"])]
    level: Option<String>,
    /// Only what was logged after this time, or in so long until now
    #[arg(long, value_name = "TIME|DURATION", value_parser = value::past)]
    since: Option<DateTime<Utc>>,
    /// Only this attempt
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(i16).range(1..))]
    attempt: Option<i16>,
    #[command(flatten)]
    remote: Remote,
}

impl Logs {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote.json
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.remote.json);
        let client = Client::new(&self.remote.connection)?;
        if self.follow {
            return tokio::select! {
                // Looked at first, so that the signal is caught before anything has been said.
                biased;
                result = tokio::signal::ctrl_c() => {
                    result?;
                    output.note(format!("\nThe invocation goes on. To come back: sandbar logs -f {}", self.id));
                    Ok(Exit::Interrupted)
                }
                outcome = self.stream(&client, output) => outcome,
            };
        }
        let mut empty = true;
        let mut log = LogReader::new(self.id, self.filter());
        while let Some(items) = log.next(&client).await? {
            empty &= items.is_empty();
            if output.json {
                for item in &items {
                    output.line(item.get())?;
                }
            } else {
                for record in &list::parse::<Record>(&items)? {
                    output.line(show::log(record, |style, text| output.paint(style, text)))?;
                }
            }
        }
        if empty && !output.json {
            output.note("nothing was logged");
        }
        Ok(Exit::Done)
    }

    fn filter(&self) -> Filter {
        let mut pairs = Vec::new();
        if let Some(attempt) = self.attempt {
            pairs.push(("attempt", attempt.to_string()));
        }
        if let Some(level) = &self.level {
            pairs.push(("level", level.clone()));
        }
        if let Some(since) = self.since {
            pairs.push(("since", since.to_rfc3339_opts(chrono::SecondsFormat::Micros, true)));
        }
        Filter { pairs }
    }

    async fn stream(&self, client: &Client, output: Output) -> Outcome {
        events::follow(client, self.id, &self.filter(), |event| show_event(output, event)).await?;
        Ok(Exit::Done)
    }
}

/// Records go to stdout; what else happens, to stderr.
fn show_event(output: Output, event: &events::Raw) -> Result<(), Failure> {
    if event.event == "log" {
        if output.json {
            if let Some(record) = event.data::<&RawValue>() {
                output.line(record.get())?;
            }
        } else if let Some(record) = event.data::<Record>() {
            output.line(show::log(&record, |style, text| output.paint(style, text)))?;
        }
        return Ok(());
    }
    if output.json {
        return Ok(());
    }
    if event.event == "progress"
        && let Some(progress) = event.data::<Progress>()
    {
        let line = show::progress_line(progress.done, progress.total, &progress.message);
        output.note(output.paint_err(output::DIM, format!("progress {line}")));
    }
    if event.event == "state"
        && let Some(change) = event.data::<StateEvent>()
    {
        let attempt = change.attempt.map_or_else(String::new, |n| format!(", attempt {n}"));
        let word = output.paint_err(output::state_style(change.state), output::state_word(change.state));
        output.note(format!("{word}{attempt}"));
    }
    Ok(())
}
