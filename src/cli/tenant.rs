//! `sandbar tenant`: for operators of the platform.

use std::io::{BufRead as _, IsTerminal as _};
use std::time::Duration;

use chrono::Utc;
use serde_json::json;

use super::client::{Answer, Client, Request, with_query};
use super::failure::{Exit, Failure, Outcome};
use super::list::{Pages, parse};
use super::output::{self, BOLD, Cell, Output, printable};
use super::target::Remote;
use super::value;
use crate::wire::Page;
use crate::wire::tenant::{MadeTenant, Tenant as Shown, TenantState};

/// List, make, suspend and delete tenants (for operators of the installation)
#[derive(Debug, clap::Args)]
pub struct Tenant {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List the tenants by name
    List {
        #[command(flatten)]
        pages: Pages,
        #[command(flatten)]
        remote: Remote,
    },
    /// Make a tenant; with an owner, print the token of the owner's invitation
    Create {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        /// Address of somebody to invite as owner
        #[arg(long, value_name = "EMAIL")]
        owner: Option<String>,
        #[command(flatten)]
        remote: Remote,
    },
    /// Let nothing new start in a tenant
    Suspend {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        /// Cancel what runs, too
        #[arg(long)]
        cancel: bool,
        #[command(flatten)]
        remote: Remote,
    },
    /// Let a tenant work again, also one whose deletion has not begun
    Resume {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        #[command(flatten)]
        remote: Remote,
    },
    /// Erase the data key of a suspended tenant: its secrets and all that is sealed can never be read again
    EraseKey {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        #[command(flatten)]
        remote: Remote,
    },
    /// Delete a tenant with everything of it, after a grace time
    Delete {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        /// Time in which it can be undone
        #[arg(long, value_name = "DURATION", value_parser = value::duration, default_value = "7d")]
        grace: Duration,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        #[command(flatten)]
        remote: Remote,
    },
}

impl Tenant {
    fn remote(&self) -> &Remote {
        match &self.what {
            What::List { remote, .. }
            | What::Create { remote, .. }
            | What::Suspend { remote, .. }
            | What::Resume { remote, .. }
            | What::EraseKey { remote, .. }
            | What::Delete { remote, .. } => remote,
        }
    }

    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote().json
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.json());
        let client = Client::new(&self.remote().connection)?;
        match self.what {
            What::List { pages, .. } => list(output, &client, &pages).await?,
            What::Create { name, owner, .. } => {
                let body = json!({"name": name, "owner": owner});
                let answer = client.send(Request::post("/v1/tenants").json(&body)?).await?;
                if output.json {
                    output.line(answer.text())?;
                } else {
                    let made: MadeTenant = answer.json()?;
                    output.note(format!("{} is made, id {}", made.tenant.name, made.tenant.id));
                    if let Some(token) = made.invitation_token {
                        output.note("the owner comes in with: sandbar user accept, and this token:");
                        output.line(token)?;
                    }
                }
            }
            What::Suspend { name, cancel, .. } => {
                let body = json!({"state": "suspended", "cancel": cancel});
                set(output, &client, &name, &body).await?;
            }
            What::Resume { name, .. } => set(output, &client, &name, &json!({"state": "active"})).await?,
            What::EraseKey { name, yes, .. } => {
                if !yes {
                    ask(output, &client, &name, ["erasing the key of", "Erase the key of", "for good"])?;
                }
                let id = find(&client, &name).await?.id;
                client.send(Request::delete(format!("/v1/tenants/{id}/key"))).await?;
                if output.json {
                    output.document(&json!({ "erased": name }))?;
                } else {
                    output.line(format!("the key of {} is erased", output.paint(BOLD, printable(&name))))?;
                }
            }
            What::Delete { name, grace, yes, .. } => {
                if !yes {
                    ask(output, &client, &name, ["deleting", "Delete", "with everything of it"])?;
                }
                let id = find(&client, &name).await?.id;
                let grace = grace.as_secs().to_string();
                let path = with_query(&format!("/v1/tenants/{id}"), &[("grace_s", grace)]);
                tell(output, &client.send(Request::delete(path)).await?)?;
            }
        }
        Ok(Exit::Done)
    }
}

/// `words`: what is about to be done, in the middle and at the beginning of a sentence, and how thoroughly.
fn ask(output: Output, client: &Client, name: &str, words: [&str; 3]) -> Result<(), Failure> {
    let [doing, command, how] = words;
    if !std::io::stdin().is_terminal() {
        return Err(Failure::usage(format!("{doing} {name} needs your word for it")).hint("add --yes"));
    }
    output.note(format!("{command} {name} {how} on {}? Type its name:", client.server()));
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    if line.trim() == name { Ok(()) } else { Err(Failure::new(Exit::Failed, "not done")) }
}

async fn set(output: Output, client: &Client, name: &str, body: &serde_json::Value) -> Result<(), Failure> {
    let id = find(client, name).await?.id;
    tell(output, &client.send(Request::patch(format!("/v1/tenants/{id}")).json(body)?).await?)
}

fn tell(output: Output, answer: &Answer) -> Result<(), Failure> {
    if output.json {
        output.line(answer.text())?;
        return Ok(());
    }
    let tenant: Shown = answer.json()?;
    let state = match (tenant.state, tenant.delete_after) {
        (TenantState::Active, _) => "is active".to_owned(),
        (TenantState::Suspended, _) => "is suspended".to_owned(),
        (TenantState::Deleting, at) => {
            format!("goes {}", at.map_or_else(|| "soon".to_owned(), |at| output::age(at, Utc::now())))
        }
    };
    output.line(format!("{} {state}", output.paint(BOLD, printable(&tenant.name))))?;
    Ok(())
}

/// A tenant by its name: the list goes by names, so it is the first after what sorts just before it.
async fn find(client: &Client, name: &str) -> Result<Shown, Failure> {
    let mut before = name.to_owned();
    before.pop();
    let path = with_query("/v1/tenants", &[("after", before), ("limit", "200".to_owned())]);
    let page: Page<Shown> = client.fetch(Request::get(path)).await?;
    page.items
        .into_iter()
        .find(|tenant| tenant.name == name)
        .ok_or_else(|| Failure::new(Exit::NotFound, format!("there is no tenant {}", printable(name))))
}

async fn list(output: Output, client: &Client, pages: &Pages) -> Result<(), Failure> {
    let mut first = true;
    pages
        .walk(client, output, "/v1/tenants", &[], |items| {
            if output.json {
                for item in &items {
                    output.line(item.get())?;
                }
                return Ok(());
            }
            let tenants: Vec<Shown> = parse(&items)?;
            let mut rows = vec![output::head(&["TENANT", "STATE", "WEIGHT", "CREATED", "ID"])];
            rows.extend(tenants.iter().map(|tenant| {
                let state = match tenant.state {
                    TenantState::Active => "active",
                    TenantState::Suspended => "suspended",
                    TenantState::Deleting => "deleting",
                };
                vec![
                    Cell::styled(printable(&tenant.name), BOLD),
                    state.into(),
                    tenant.weight.to_string().into(),
                    output::age(tenant.created_at, Utc::now()).into(),
                    tenant.id.to_string().into(),
                ]
            }));
            for line in output::table(output, &rows).into_iter().skip(usize::from(!first)) {
                output.line(line)?;
            }
            first = false;
            Ok(())
        })
        .await
}
