//! The live stream of one invocation: server-sent events, bounded, taken up again where it broke. Owns the parser and
//! the repetition; what is shown is up to the caller.

use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::client::{Client, Opened, Request, with_query};
use super::failure::{Exit, Failure};
use super::poll;

/// Largest event: a log record of the largest message, with room for escapes.
const MAX_EVENT: usize = 8 << 20;
/// How often the stream may break without an event in between.
const MAX_BREAKS: u32 = 8;
/// First pause before it is opened again; doubles.
const PAUSE: Duration = Duration::from_millis(250);
/// Longest pause before it is opened again.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// One event, as it came over the wire.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Raw {
    /// `log`, `progress`, `state` or `end`.
    pub event: String,
    /// JSON.
    pub data: String,
    id: Option<String>,
}

/// Which records a stream shows.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Of the query: `attempt`, `level`, `since`.
    pub pairs: Vec<(&'static str, String)>,
}

/// Follows an invocation until it ends, and hands every event to `show`.
///
/// # Errors
/// The server refuses, the stream breaks too often, or `show` fails.
pub async fn follow(
    client: &Client,
    id: Uuid,
    filter: &Filter,
    mut show: impl FnMut(&Raw) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let path = with_query(&format!("/v1/invocations/{id}/logs"), &filter.pairs);
    let mut last_id: Option<String> = None;
    let mut breaks = 0;
    let mut pause = PAUSE;
    loop {
        let mut request = Request::get(path.clone());
        if let Some(last) = &last_id {
            request = request.header("last-event-id", last)?;
        }
        let failure = match client.events(&request).await? {
            Opened::NoStream => return poll::follow(client, id, filter, &mut show).await,
            Opened::NotNow(failure) => failure,
            Opened::Stream(mut stream) => {
                let mut parser = Parser::default();
                loop {
                    match client.piece(&mut stream).await {
                        Ok(Some(piece)) => {
                            for event in parser.feed(&piece)? {
                                if event.id.is_some() {
                                    last_id.clone_from(&event.id);
                                }
                                breaks = 0;
                                pause = PAUSE;
                                show(&event)?;
                                if event.event == "end" {
                                    return Ok(());
                                }
                            }
                        }
                        Ok(None) => {
                            break Failure::new(Exit::Unreachable, "the server ended the stream too early");
                        }
                        Err(failure) => break failure,
                    }
                }
            }
        };
        breaks += 1;
        if breaks > MAX_BREAKS {
            return Err(failure);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// The parser of `text/event-stream`: fields `event`, `data` and `id`; comments and the rest are skipped.
#[derive(Debug, Default)]
struct Parser {
    /// The line that has begun.
    line: Vec<u8>,
    /// The event that has begun.
    event: Raw,
    has_data: bool,
}

impl Parser {
    /// Takes what came, gives what is complete.
    fn feed(&mut self, bytes: &[u8]) -> Result<Vec<Raw>, Failure> {
        let mut complete = Vec::new();
        for &byte in bytes {
            if byte != b'\n' {
                if self.line.len() + self.event.data.len() >= MAX_EVENT {
                    return Err(Failure::new(
                        Exit::Failed,
                        format!("the server sent an event of more than {MAX_EVENT} bytes"),
                    ));
                }
                self.line.push(byte);
                continue;
            }
            let line = std::mem::take(&mut self.line);
            let line = line.strip_suffix(b"\r").unwrap_or(&line);
            if line.is_empty() {
                let event = std::mem::take(&mut self.event);
                if std::mem::take(&mut self.has_data) {
                    complete.push(event);
                }
                continue;
            }
            self.field(&String::from_utf8_lossy(line));
        }
        Ok(complete)
    }

    fn field(&mut self, line: &str) {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match name {
            "event" => value.clone_into(&mut self.event.event),
            "id" => self.event.id = Some(value.to_owned()),
            "data" => {
                if self.has_data {
                    self.event.data.push('\n');
                }
                self.event.data.push_str(value);
                self.has_data = true;
            }
            _ => {}
        }
    }
}

impl Raw {
    /// An event of ours, without a place in a stream.
    pub fn new(event: &str, data: impl Into<String>) -> Self {
        Self { event: event.to_owned(), data: data.into(), id: None }
    }

    /// The data as one of our shapes; `None` when it is of a newer server and says nothing to us.
    pub fn data<'a, T: Deserialize<'a>>(&'a self) -> Option<T> {
        serde_json::from_str(&self.data).ok()
    }

    /// `{"event":…,"data":…}` in one line.
    pub fn line(&self) -> Option<String> {
        let data: &RawValue = serde_json::from_str(&self.data).ok()?;
        Some(json_line(&self.event, data.get()))
    }
}

/// `{"event":…,"data":…}` in one line. `data` must be JSON.
pub fn json_line(event: &str, data: &str) -> String {
    format!("{{\"event\":{},\"data\":{data}}}", serde_json::Value::from(event))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    const STREAM: &str = ": hello\n\nevent: log\nid: a.1\ndata: {\"message\":\"é\"}\n\nevent: state\r\ndata: {\r\n\
                          data: }\r\n\r\nretry: 5\n\nid: only\n\nevent: end\ndata:{}\n\n";

    #[test]
    fn events_come_out_whole_and_comments_do_not() {
        let events = Parser::default().feed(STREAM.as_bytes()).unwrap();
        let shown: Vec<_> =
            events.iter().map(|e| (e.event.as_str(), e.data.as_str(), e.id.as_deref())).collect();
        assert_eq!(
            shown,
            [("log", "{\"message\":\"é\"}", Some("a.1")), ("state", "{\n}", None), ("end", "{}", None)]
        );
        assert_eq!(events[0].line().unwrap(), "{\"event\":\"log\",\"data\":{\"message\":\"é\"}}");
    }

    proptest! {
        #[test]
        fn it_does_not_matter_where_the_pieces_end(cuts in proptest::collection::vec(0..STREAM.len(), 0..6)) {
            let mut cuts = cuts;
            cuts.extend([0, STREAM.len()]);
            cuts.sort_unstable();
            let mut parser = Parser::default();
            let mut events = Vec::new();
            for pair in cuts.windows(2) {
                events.extend(parser.feed(&STREAM.as_bytes()[pair[0]..pair[1]]).unwrap());
            }
            prop_assert_eq!(events, Parser::default().feed(STREAM.as_bytes()).unwrap());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = Parser::default().feed(&bytes);
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut parser = Parser::default();
        let piece = vec![b'x'; 1 << 20];
        assert!((0..9).any(|_| parser.feed(&piece).is_err()));
    }
}
