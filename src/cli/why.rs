//! `sandbar why`: what an invocation waits for.

use uuid::Uuid;

use super::client::{Client, Request};
use super::failure::{Exit, Outcome};
use super::output::{self, BOLD, Output, printable};
use super::target::Remote;
use crate::wire::why::Why as Answer;

/// Say what an invocation waits for, and when it may start
#[derive(Debug, clap::Args)]
pub struct Why {
    /// Id of the invocation
    #[arg(value_name = "ID")]
    id: Uuid,
    #[command(flatten)]
    remote: Remote,
}

impl Why {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote.json
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.remote.json);
        let client = Client::new(&self.remote.connection)?;
        let answer = client.send(Request::get(format!("/v1/invocations/{}/why", self.id))).await?;
        if output.json {
            output.line(answer.text())?;
            return Ok(Exit::Done);
        }
        let why: Answer = answer.json()?;
        output.line(output.paint(output::state_style(why.state), output::state_word(why.state)))?;
        for reason in &why.reasons {
            output.line(format!(
                "{}  {}",
                output.paint(BOLD, printable(&reason.kind)),
                printable(&reason.detail)
            ))?;
        }
        if let Some(estimate) = &why.estimate {
            let seconds = estimate.starts_in_ms.div_ceil(1_000);
            output.line(format!("starts in about {seconds} s: {}", printable(&estimate.basis)))?;
        }
        Ok(Exit::Done)
    }
}
