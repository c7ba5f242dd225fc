//! Waiting for an invocation to end, with a spinner or with its log, and saying how it ended. Shared by `invoke`, `get`
//! and `retry`. Ctrl-C ends the wait, never the invocation.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use base64::Engine as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::client::{Answer, Client, Request};
use super::events::{self, Filter};
use super::failure::{Exit, Failure, Outcome};
use super::output::{self, Output};
use super::show::{self, Record};
use crate::wire::invocation::{InlineResult, Invocation, Progress, State, StateEvent};

/// First pause between two looks; grows by half each time.
const LOOK: Duration = Duration::from_millis(100);
/// Longest pause between two looks.
const MAX_LOOK: Duration = Duration::from_secs(2);

/// Options of waiting.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct WaitArgs {
    /// Wait for the end, at most this long if a duration is given; print the result
    #[arg(long, short, value_name = "DURATION", value_parser = super::value::duration,
          num_args = 0..=1, require_equals = true)]
    wait: Option<Option<Duration>>,
    /// Show log and progress while it runs; then print the result
    #[arg(long, short, conflicts_with = "wait")]
    follow: bool,
}

impl WaitArgs {
    /// How long to wait; `Some(None)` without a limit.
    pub fn wait(&self) -> Option<Option<Duration>> {
        self.wait
    }

    /// Whether to show the log.
    pub fn follows(&self) -> bool {
        self.follow
    }

    /// Goes on with an invocation that `answer` shows: waits as asked, and prints what came out. Without a wish to wait,
    /// the answer is all.
    ///
    /// # Errors
    /// The server fails, or the time is over.
    pub async fn conclude(&self, client: &Client, output: Output, answer: Answer) -> Outcome {
        let invocation: Invocation = answer.json()?;
        let id = invocation.summary.id;
        if self.follow {
            return until_interrupted(output, id, follow(client, output, answer, id)).await;
        }
        match self.wait {
            Some(limit) => {
                let waiting = async {
                    let answer = until_end(client, output, answer, limit).await?;
                    ended(client, output, answer, false).await
                };
                until_interrupted(output, id, waiting).await
            }
            None => {
                if output.json {
                    output.line(answer.text())?;
                } else {
                    output.line(id.to_string())?;
                    let s = &invocation.summary;
                    output.note(format!(
                        "{} version {} is {}",
                        s.task,
                        s.version,
                        output::state_word(s.state)
                    ));
                    output.note(format!("next: sandbar logs -f {id}"));
                }
                Ok(Exit::Done)
            }
        }
    }
}

/// Ctrl-C ends the wait and says how to come back.
async fn until_interrupted(output: Output, id: Uuid, work: impl Future<Output = Outcome>) -> Outcome {
    tokio::select! {
        // Looked at first, so that the signal is caught before anything has been said.
        biased;
        result = tokio::signal::ctrl_c() => {
            result?;
            output.note(format!(
                "\nThe invocation goes on. To come back: sandbar logs -f {id}\n\
                 To see its result: sandbar get {id} --result. To stop it: sandbar cancel {id}"
            ));
            Ok(Exit::Interrupted)
        }
        outcome = work => outcome,
    }
}

/// Looks until it has ended.
async fn until_end(
    client: &Client,
    output: Output,
    mut answer: Answer,
    limit: Option<Duration>,
) -> Result<Answer, Failure> {
    let began = Instant::now();
    let bar = output.spinner("");
    let mut pause = LOOK;
    loop {
        let invocation: Invocation = answer.json()?;
        let summary = &invocation.summary;
        if output::is_final(summary.state) {
            bar.finish_and_clear();
            return Ok(answer);
        }
        move_bar(
            &bar,
            &format!("{} {}", summary.task, output::state_word(summary.state)),
            invocation.progress.as_ref(),
        );
        let left = limit.map(|limit| limit.saturating_sub(began.elapsed()));
        if left.is_some_and(|left| left.is_zero()) {
            bar.finish_and_clear();
            let id = summary.id;
            if output.json {
                output.line(answer.text())?;
            }
            return Err(Failure::new(
                Exit::TimeUp,
                format!("the time is over, and {id} is {}", output::state_word(summary.state)),
            )
            .hint(format!("it goes on; wait again: sandbar get {id} --wait")));
        }
        tokio::time::sleep(left.map_or(pause, |left| pause.min(left))).await;
        pause = (pause * 3 / 2).min(MAX_LOOK);
        answer = client.send(Request::get(summary.links.this.clone())).await?;
    }
}

fn move_bar(bar: &ProgressBar, head: &str, progress: Option<&Progress>) {
    let Some(progress) = progress else {
        bar.set_message(head.to_owned());
        return;
    };
    if progress.total > 0 && bar.length() != Some(progress.total) {
        if let Ok(style) = ProgressStyle::with_template("{spinner} {bar:30} {pos}/{len} {msg}") {
            bar.set_style(style);
        }
        bar.set_length(progress.total);
    }
    bar.set_position(progress.done);
    bar.set_message(format!("{head} {}", output::headline(&progress.message, 60)));
}

/// Shows log and progress as they come, then the end.
async fn follow(client: &Client, output: Output, answer: Answer, id: Uuid) -> Outcome {
    let this = format!("/v1/invocations/{id}");
    let invocation: Invocation = answer.json()?;
    if output.json {
        output.line(events::json_line("accepted", &answer.text()))?;
    } else {
        output.note(format!("{} version {}  {id}", invocation.summary.task, invocation.summary.version));
    }
    let bar = output.spinner(output::state_word(invocation.summary.state));
    let mut live = Live { output, bar: bar.clone(), head: String::new(), progress: None };
    let followed = events::follow(client, id, &Filter::default(), |event| live.show(event)).await;
    if followed.is_err() {
        bar.finish_and_clear();
    }
    followed?;
    let answer = client.send(Request::get(this)).await?;
    // What came last may have come too late for the stream.
    let last = answer.json::<Invocation>()?.progress.filter(|last| live.progress.as_ref() != Some(last));
    if let Some(last) = last {
        live.show(&events::Raw::new("progress", serde_json::json!(last).to_string()))?;
    }
    bar.finish_and_clear();
    ended(client, output, answer, true).await
}

/// What a person or a program sees of a running invocation.
struct Live {
    output: Output,
    bar: ProgressBar,
    head: String,
    /// The report that was shown last.
    progress: Option<Progress>,
}

impl Live {
    fn show(&mut self, event: &events::Raw) -> Result<(), Failure> {
        if event.event == "progress" {
            self.progress = event.data::<Progress>();
        }
        if self.output.json {
            // The end comes later, with the result.
            if event.event != "end"
                && let Some(line) = event.line()
            {
                self.output.line(line)?;
            }
            return Ok(());
        }
        match event.event.as_str() {
            "log" => {
                if let Some(record) = event.data::<Record>() {
                    self.note(&show::log(&record, |style, text| self.output.paint_err(style, text)));
                }
            }
            "progress" => {
                if let Some(progress) = &self.progress {
                    if self.bar.is_hidden() {
                        self.note(&format!(
                            "progress {}",
                            show::progress_line(progress.done, progress.total, &progress.message)
                        ));
                    }
                    move_bar(&self.bar, &self.head, Some(progress));
                }
            }
            "state" => {
                if let Some(change) = event.data::<StateEvent>() {
                    let attempt = change.attempt.filter(|n| *n > 1);
                    let attempt = attempt.map_or_else(String::new, |n| format!(", attempt {n}"));
                    self.head = format!("{}{attempt}", output::state_word(change.state));
                    self.bar.set_message(self.head.clone());
                    if self.bar.is_hidden() && !output::is_final(change.state) {
                        self.note(&self.head);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A line above the bar, or just a line.
    fn note(&self, line: &str) {
        if self.bar.is_hidden() {
            self.output.note(line);
        } else {
            self.bar.suspend(|| self.output.note(line));
        }
    }
}

/// Prints how an ended invocation ended: result to stdout, the rest to stderr.
///
/// # Errors
/// The result cannot be fetched or written.
pub async fn ended(client: &Client, output: Output, answer: Answer, as_event: bool) -> Outcome {
    let invocation: Invocation = answer.json()?;
    let state = invocation.summary.state;
    let exit = if state == State::Succeeded { Exit::Done } else { Exit::Failed };
    if output.json {
        let document = with_result(client, &invocation, &answer).await?;
        output.line(if as_event { events::json_line("end", &document) } else { document })?;
        return Ok(exit);
    }
    let result = match state {
        State::Succeeded => fetch_result(client, &invocation).await?,
        _ => None,
    };
    for line in show::end(output, &invocation) {
        output.note(line);
    }
    // Last, so that it stands alone also where both streams go to one place.
    if let Some(result) = result {
        print_result(output, &invocation, &result.body)?;
    }
    if exit == Exit::Failed {
        let id = invocation.summary.id;
        output.note(format!("  next: sandbar logs {id}   or: sandbar retry {id}"));
    }
    Ok(exit)
}

/// The bytes as they are; on a terminal only what a terminal can show.
fn print_result(output: Output, invocation: &Invocation, bytes: &[u8]) -> Result<(), Failure> {
    use std::io::IsTerminal as _;
    if !std::io::stdout().is_terminal() {
        return Ok(output.bytes(bytes)?);
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => output.bytes(output::printable(text).as_bytes())?,
        Err(_) => output.note(format!(
            "the result is {} of binary data; to a file: sandbar get {} --result -o FILE",
            output::bytes(bytes.len() as u64),
            invocation.summary.id
        )),
    }
    Ok(())
}

/// The result of an invocation; `None` when it left none.
///
/// # Errors
/// The server fails, or it has not ended.
pub async fn fetch_result(client: &Client, invocation: &Invocation) -> Result<Option<Answer>, Failure> {
    match client.send(Request::get(invocation.summary.links.result.clone())).await {
        Ok(answer) => Ok(Some(answer)),
        Err(failure) if failure.code() == Some("no-output") => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// The server's document with `result` in it, in the shape that the server uses when it is asked to wait.
async fn with_result(client: &Client, invocation: &Invocation, answer: &Answer) -> Result<String, Failure> {
    let whole = |r: &InlineResult| r.json.is_some() || r.text.is_some() || r.base64.is_some();
    if invocation.result.as_ref().is_some_and(whole) || invocation.summary.state != State::Succeeded {
        return Ok(answer.text());
    }
    let Some(result) = fetch_result(client, invocation).await? else { return Ok(answer.text()) };
    let content_type = result.header("content-type").unwrap_or("application/octet-stream").to_owned();
    let kind = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let text = std::str::from_utf8(&result.body).ok();
    let json = text
        .filter(|_| kind == "application/json")
        .and_then(|text| RawValue::from_string(text.to_owned()).ok());
    let text = text.filter(|_| json.is_none() && kind.starts_with("text/")).map(str::to_owned);
    let base64 =
        (json.is_none() && text.is_none()).then(|| base64::prelude::BASE64_STANDARD.encode(&result.body));
    let size_bytes = i64::try_from(result.body.len()).unwrap_or(i64::MAX);
    let inline = InlineResult { content_type, size_bytes, json, text, base64 };
    let raw = |value: &InlineResult| serde_json::value::to_raw_value(value);
    // What the server says stays as it stands, also what this program does not know.
    let mut document: BTreeMap<String, Box<RawValue>> = answer.json()?;
    document.insert("result".to_owned(), raw(&inline).map_err(|e| Failure::new(Exit::Failed, e))?);
    serde_json::to_string(&document).map_err(|e| Failure::new(Exit::Failed, e))
}
