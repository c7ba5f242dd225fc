//! `sandbar retry`: an ended invocation once more, as a new one.

use uuid::Uuid;

use super::client::{Client, Request};
use super::failure::Outcome;
use super::output::Output;
use super::target::Remote;
use super::wait::WaitArgs;

/// Run a dead, cancelled or expired invocation again, as a new one with the same input
#[derive(Debug, clap::Args)]
pub struct Retry {
    /// Id of the invocation
    #[arg(value_name = "ID")]
    id: Uuid,
    /// Version to run [default: the task's current one]
    #[arg(long, value_name = "N")]
    version: Option<i32>,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    remote: Remote,
}

impl Retry {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote.json
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.remote.json);
        let client = Client::new(&self.remote.connection)?;
        let mut request = Request::post(format!("/v1/invocations/{}/retry", self.id));
        if let Some(version) = self.version {
            request = request.json(&serde_json::json!({ "version": version }))?;
        }
        let answer = client.send(request).await?;
        self.wait.conclude(&client, output, answer).await
    }
}
