//! `sandbar cancel`: the end of invocations, waiting or running.

use uuid::Uuid;

use super::client::{Client, Request};
use super::failure::{Exit, Outcome};
use super::output::{self, Output};
use super::target::Remote;
use crate::wire::invocation::Invocation;

/// Ask for the end of invocations, waiting or running
#[derive(Debug, clap::Args)]
pub struct Cancel {
    /// Ids of the invocations
    #[arg(value_name = "ID", required = true)]
    ids: Vec<Uuid>,
    #[command(flatten)]
    remote: Remote,
}

impl Cancel {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote.json
    }

    /// Does it: all that can be cancelled, and the first failure at the end.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.remote.json);
        let client = Client::new(&self.remote.connection)?;
        let mut first = None;
        for id in self.ids {
            // Asking twice does the same as asking once.
            let request = Request::post(format!("/v1/invocations/{id}/cancel")).repeatable();
            match client.send(request).await {
                Ok(answer) if output.json => output.line(answer.text())?,
                Ok(answer) => {
                    let invocation: Invocation = answer.json()?;
                    let state = invocation.summary.state;
                    let word = output.paint(output::state_style(state), output::state_word(state));
                    let asked = if output::is_final(state) { "" } else { ", its worker has been told" };
                    output.line(format!("{id}  {word}{asked}"))?;
                }
                Err(failure) => match first {
                    None => first = Some(failure),
                    Some(_) => output.note(failure.text(output.colour_err()).trim_end()),
                },
            }
        }
        first.map_or(Ok(Exit::Done), Err)
    }
}
