//! `sandbar encryption`: whether payloads are sealed at rest. `sandbar erase`: payloads of invocations, for good. `sandbar
//! unseal`: exports that retention wrote sealed.

use std::io::{BufRead as _, BufWriter, IsTerminal as _, Write as _};
use std::path::PathBuf;

use uuid::Uuid;

use super::args::Settings;
use super::client::{Client, Request};
use super::failure::{Exit, Failure, Outcome};
use super::output::{BOLD, Output};
use super::target::Remote;
use crate::config::{Config, Overrides};
use crate::wire::encryption::{Encryption as Shown, EncryptionRequest};

/// Show whether payloads are sealed at rest, and turn that on and off for your tenant
#[derive(Debug, clap::Args)]
pub struct Encryption {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Show what holds for your tenant
    Show {
        #[command(flatten)]
        remote: Remote,
    },
    /// Seal the payloads of what is submitted from now on
    On {
        #[command(flatten)]
        remote: Remote,
    },
    /// Keep the payloads of what is submitted from now on as they are
    Off {
        #[command(flatten)]
        remote: Remote,
    },
}

impl Encryption {
    fn remote(&self) -> &Remote {
        let (What::Show { remote } | What::On { remote } | What::Off { remote }) = &self.what;
        remote
    }

    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote().json
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.json());
        let client = Client::new(&self.remote().connection)?;
        let set = |payloads| Request::put("/v1/encryption").json(&EncryptionRequest { payloads });
        let request = match self.what {
            What::Show { .. } => Request::get("/v1/encryption"),
            What::On { .. } => set(true)?,
            What::Off { .. } => set(false)?,
        };
        let answer = client.send(request).await?;
        if output.json {
            output.line(answer.text())?;
            return Ok(Exit::Done);
        }
        let shown: Shown = answer.json()?;
        let who = match (shown.installation, shown.tenant) {
            (true, _) => "sealed: the installation wants it",
            (false, true) => "sealed: your tenant wants it",
            (false, false) => "not sealed",
        };
        output.line(format!("{}  new payloads are {who}", output.paint(BOLD, "payloads")))?;
        let key = shown.key.map_or_else(
            || "none yet".to_owned(),
            |key| format!("{}, wrapped by master key {}", key.id, key.master),
        );
        output.line(format!("{}  {key}", output.paint(BOLD, "data key")))?;
        Ok(Exit::Done)
    }
}

/// Erase the payloads of ended invocations for good: input, result, artifacts, log and messages
#[derive(Debug, clap::Args)]
pub struct Erase {
    /// Ids of the invocations
    #[arg(value_name = "ID", required = true)]
    ids: Vec<Uuid>,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    #[command(flatten)]
    remote: Remote,
}

impl Erase {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote.json
    }

    /// Does it: all that can be erased, and the first failure at the end.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.remote.json);
        let client = Client::new(&self.remote.connection)?;
        if !self.yes {
            ask(output, self.ids.len())?;
        }
        let mut first = None;
        for id in self.ids {
            let request = Request::delete(format!("/v1/invocations/{id}/payloads")).repeatable();
            match client.send(request).await {
                Ok(answer) if output.json => output.line(answer.text())?,
                Ok(_) => output.line(format!("{id}  payloads erased"))?,
                Err(failure) => match first {
                    None => first = Some(failure),
                    Some(_) => output.note(failure.text(output.colour_err()).trim_end()),
                },
            }
        }
        first.map_or(Ok(Exit::Done), Err)
    }
}

fn ask(output: Output, count: usize) -> Result<(), Failure> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::usage("erasing payloads needs your word for it").hint("add --yes"));
    }
    let what = if count == 1 { "its payloads".to_owned() } else { format!("the payloads of {count}") };
    output.note(format!("Erase {what} for good? Type yes:"));
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    if line.trim() == "yes" { Ok(()) } else { Err(Failure::new(Exit::Failed, "not erased")) }
}

/// Open exports that retention wrote sealed, and print their lines (on a server: needs the master key and Postgres)
#[derive(Debug, clap::Args)]
pub struct Unseal {
    /// Files of the export directory, *.jsonl.gz
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

impl Unseal {
    /// As the configuration takes them.
    pub fn overrides(&self) -> Overrides {
        self.settings.overrides()
    }

    /// Does it.
    pub async fn run(&self, config: Config) -> anyhow::Result<()> {
        let mut out = BufWriter::new(std::io::stdout());
        for file in &self.files {
            crate::server::open_export(&config, file, &mut out).await?;
        }
        out.flush()?;
        Ok(())
    }
}
