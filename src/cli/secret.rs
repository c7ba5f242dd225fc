//! `sandbar secret`: set, list and delete secrets. A value comes from a file or from standard input, never from the
//! command line, where others could read it.

use std::io::Read as _;
use std::path::PathBuf;

use super::client::{Client, Request, escape};
use super::failure::{Exit, Failure, Outcome};
use super::output::{self, BOLD, Cell, Output};
use super::target::Remote;
use crate::wire::secret::{Secret as Row, Secrets};

/// Largest value, and one byte more to notice a larger one.
const MAX_VALUE: u64 = (64 << 10) + 1;

/// Set, list and delete secrets of your tenant; values are never shown
#[derive(Debug, clap::Args)]
pub struct Secret {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List the secrets
    List {
        #[command(flatten)]
        remote: Remote,
    },
    /// Set a secret, new or changed; the value comes from --file or from standard input
    Set {
        /// Its name, like API_TOKEN
        #[arg(value_name = "NAME")]
        name: String,
        /// File with the value, taken as it is; without it, standard input less one newline at the end
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
        #[command(flatten)]
        remote: Remote,
    },
    /// Delete a secret with all its versions
    Delete {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        #[command(flatten)]
        remote: Remote,
    },
}

impl Secret {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        let (What::List { remote } | What::Set { remote, .. } | What::Delete { remote, .. }) = &self.what;
        remote.json
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.json());
        match self.what {
            What::List { remote } => list(output, &Client::new(&remote.connection)?).await,
            What::Set { name, file, remote } => {
                let value = value(file)?;
                let client = Client::new(&remote.connection)?;
                use base64::Engine as _;
                let text = base64::prelude::BASE64_STANDARD.encode(&value);
                let request = Request::put(format!("/v1/secrets/{}", escape(&name)))
                    .json(&serde_json::json!({ "value_base64": text }))?;
                let answer = client.send(request).await?;
                if output.json {
                    output.line(answer.text())?;
                } else {
                    let row: Row = answer.json()?;
                    output.line(format!(
                        "{} is set, version {}",
                        output.paint(BOLD, &row.name),
                        row.version
                    ))?;
                }
                Ok(Exit::Done)
            }
            What::Delete { name, remote } => {
                let client = Client::new(&remote.connection)?;
                client.send(Request::delete(format!("/v1/secrets/{}", escape(&name)))).await?;
                if output.json {
                    output.document(&serde_json::json!({ "deleted": name }))?;
                } else {
                    output.line(format!("{} is deleted", output::printable(&name)))?;
                }
                Ok(Exit::Done)
            }
        }
    }
}

fn value(file: Option<PathBuf>) -> Result<Vec<u8>, Failure> {
    let mut value = Vec::new();
    match file {
        Some(path) => {
            let read =
                std::fs::File::open(&path).and_then(|file| file.take(MAX_VALUE).read_to_end(&mut value));
            read.map_err(|error| Failure::usage(format!("cannot read {}: {error}", path.display())))?;
        }
        None => {
            std::io::stdin().lock().take(MAX_VALUE + 1).read_to_end(&mut value)?;
            if value.last() == Some(&b'\n') {
                value.pop();
            }
        }
    }
    if value.is_empty() || value.len() as u64 >= MAX_VALUE {
        return Err(Failure::usage(format!("a value has 1 to {} bytes", MAX_VALUE - 1)));
    }
    Ok(value)
}

async fn list(output: Output, client: &Client) -> Outcome {
    let secrets: Secrets = client.fetch(Request::get("/v1/secrets")).await?;
    if output.json {
        for secret in &secrets.items {
            output.document(secret)?;
        }
        return Ok(Exit::Done);
    }
    if secrets.items.is_empty() {
        output.note("no secrets yet; set one: sandbar secret set NAME");
        return Ok(Exit::Done);
    }
    let mut rows = vec![output::head(&["SECRET", "VERSION", "SET"])];
    rows.extend(secrets.items.iter().map(|secret| {
        vec![
            Cell::styled(&secret.name, BOLD),
            secret.version.to_string().into(),
            output::moment(secret.updated_at).into(),
        ]
    }));
    for line in output::table(output, &rows) {
        output.line(line)?;
    }
    Ok(Exit::Done)
}
