//! `sandbar get`: one invocation, or its result.

use std::io::Write as _;
use std::path::PathBuf;

use uuid::Uuid;

use super::client::{Client, Request};
use super::failure::{Exit, Failure, Outcome};
use super::output::Output;
use super::show;
use super::target::Remote;
use super::wait::{self, WaitArgs};
use crate::wire::invocation::Invocation;

/// Show an invocation: state, attempts with receipts, where it trapped
#[derive(Debug, clap::Args)]
pub struct Get {
    /// Id of the invocation
    #[arg(value_name = "ID")]
    id: Uuid,
    /// Print the result as it is, and nothing else
    #[arg(long, short, conflicts_with = "json")]
    result: bool,
    /// Write the result to a file
    #[arg(long, short, value_name = "FILE", requires = "result")]
    output: Option<PathBuf>,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    remote: Remote,
}

impl Get {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote.json
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.remote.json);
        let client = Client::new(&self.remote.connection)?;
        let answer = client.send(Request::get(format!("/v1/invocations/{}", self.id))).await?;
        if self.wait.follows() || self.wait.wait().is_some() {
            if self.result {
                return Err(Failure::usage(
                    "--wait and --follow print the result by themselves; leave --result away",
                ));
            }
            return self.wait.conclude(&client, output, answer).await;
        }
        if output.json {
            output.line(answer.text())?;
            return Ok(Exit::Done);
        }
        let invocation: Invocation = answer.json()?;
        if self.result {
            let Some(result) = wait::fetch_result(&client, &invocation).await? else {
                return Err(Failure::new(Exit::NotFound, "the invocation left no result")
                    .hint(format!("see how it ended: sandbar get {}", self.id)));
            };
            match &self.output {
                Some(path) => write(path, &result.body)?,
                None => output.bytes(&result.body)?,
            }
        } else {
            for line in show::invocation(output, &invocation) {
                output.line(line)?;
            }
        }
        Ok(Exit::Done)
    }
}

/// A file with these bytes, whole or not at all.
///
/// # Errors
/// It cannot be written.
pub fn write(path: &std::path::Path, bytes: &[u8]) -> Result<(), Failure> {
    let fail = |error: std::io::Error| {
        Failure::new(Exit::Failed, format!("cannot write {}: {error}", path.display()))
    };
    let mut part = path.as_os_str().to_owned();
    part.push(format!(".part{}", std::process::id()));
    let part = PathBuf::from(part);
    let mut file = std::fs::File::create(&part).map_err(fail)?;
    file.write_all(bytes).and_then(|()| std::fs::rename(&part, path)).map_err(|error| {
        let _ = std::fs::remove_file(&part);
        fail(error)
    })
}
