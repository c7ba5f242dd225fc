//! `sandbar user`: members and invitations of the tenant; on the server, the first admin.

use std::io::{IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use chrono::Utc;
use serde_json::json;
use uuid::Uuid;

use super::args::Settings;
use super::client::{Client, Request};
use super::failure::{Exit, Failure, Outcome};
use super::key::ROLES;
use super::list::{Pages, parse};
use super::login::anonymous;
use super::output::{self, BOLD, Cell, Output, printable};
use super::target::Remote;
use super::value;
use crate::config::Config;
use crate::domain::permission::Role;
use crate::wire::people::{Invitation, MadeInvitation, MadeReset, Member, Session};

/// Largest password with the white space around it, in bytes.
const MAX_PASSWORD: u64 = 1_024;

/// List, invite, change and remove people; make the first admin
#[derive(Debug, clap::Args)]
pub struct User {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List the members of the tenant
    List {
        #[command(flatten)]
        pages: Pages,
        #[command(flatten)]
        remote: Remote,
    },
    /// Invite somebody, and print the token of the invitation
    Invite {
        /// Address
        #[arg(value_name = "EMAIL")]
        email: String,
        /// What they shall be
        #[arg(long, value_name = "ROLE", value_parser = ROLES)]
        role: String,
        #[command(flatten)]
        remote: Remote,
    },
    /// List invitations, newest first
    Invitations {
        #[command(flatten)]
        pages: Pages,
        #[command(flatten)]
        remote: Remote,
    },
    /// Take an invitation back
    Uninvite {
        /// Its id
        #[arg(value_name = "ID")]
        id: Uuid,
        #[command(flatten)]
        remote: Remote,
    },
    /// Accept an invitation; its token is asked for, or comes from a file
    Accept {
        /// Address of the server
        #[arg(long, value_name = "URL")]
        server: String,
        /// Name, if nobody has the address yet
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        /// File with the token of the invitation
        #[arg(long, value_name = "FILE")]
        token_file: Option<PathBuf>,
        /// File with the password
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
        /// Print JSON
        #[arg(long, help_heading = "Output")]
        json: bool,
    },
    /// Give a member another role
    Update {
        /// Id of the user
        #[arg(value_name = "ID")]
        id: Uuid,
        /// What they shall be
        #[arg(long, value_name = "ROLE", value_parser = ROLES)]
        role: String,
        #[command(flatten)]
        remote: Remote,
    },
    /// Remove a member from the tenant
    Remove {
        /// Id of the user
        #[arg(value_name = "ID")]
        id: Uuid,
        #[command(flatten)]
        remote: Remote,
    },
    /// Make a token for somebody who lost the password, and print it; nothing is sent
    ResetToken {
        /// Address
        #[arg(value_name = "EMAIL")]
        email: String,
        #[command(flatten)]
        remote: Remote,
    },
    /// Set a new password by such a token; both are asked for, or come from files
    NewPassword {
        /// Address of the server
        #[arg(long, value_name = "URL")]
        server: String,
        /// File with the token
        #[arg(long, value_name = "FILE")]
        token_file: Option<PathBuf>,
        /// File with the new password
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
        /// Print JSON
        #[arg(long, help_heading = "Output")]
        json: bool,
    },
    /// On the server: make a token for somebody who lost the password, and print it. Needs database.url
    Reset {
        /// Address
        #[arg(value_name = "EMAIL")]
        email: String,
        /// Print JSON
        #[arg(long, help_heading = "Output")]
        json: bool,
        #[command(flatten)]
        settings: Settings,
    },
    /// On the server: make an admin, or give one who lost the password a new one. Needs database.url
    CreateAdmin {
        /// Address
        #[arg(value_name = "EMAIL")]
        email: String,
        /// Name
        #[arg(long, value_name = "NAME", default_value = "admin")]
        name: String,
        /// Tenant
        #[arg(long, value_name = "TENANT", default_value = "default")]
        tenant: String,
        /// What they shall be
        #[arg(long, value_name = "ROLE", value_parser = ROLES, default_value = "platform")]
        role: String,
        /// File with the password [default: standard input, or the keyboard]
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
        /// Print JSON
        #[arg(long, help_heading = "Output")]
        json: bool,
        #[command(flatten)]
        settings: Settings,
    },
}

impl User {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        match &self.what {
            What::List { remote, .. }
            | What::Invite { remote, .. }
            | What::Invitations { remote, .. }
            | What::Uninvite { remote, .. }
            | What::Update { remote, .. }
            | What::ResetToken { remote, .. }
            | What::Remove { remote, .. } => remote.json,
            What::Accept { json, .. }
            | What::NewPassword { json, .. }
            | What::Reset { json, .. }
            | What::CreateAdmin { json, .. } => *json,
        }
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.json());
        let done = |what: &str, id: Uuid| {
            if output.json {
                output.document(&json!({ what: id }))
            } else {
                output.line(format!("{id} is {what}"))
            }
        };
        match self.what {
            What::List { pages, remote } => {
                members(output, &Client::new(&remote.connection)?, &pages).await?;
            }
            What::Invitations { pages, remote } => {
                invitations(output, &Client::new(&remote.connection)?, &pages).await?;
            }
            What::Invite { email, role, remote } => {
                let client = Client::new(&remote.connection)?;
                let body = json!({"email": email, "role": role});
                let answer = client.send(Request::post("/v1/invitations").json(&body)?).await?;
                if output.json {
                    output.line(answer.text())?;
                } else {
                    let made: MadeInvitation = answer.json()?;
                    output.line(&made.token)?;
                    output
                        .note(format!("they come in with: sandbar user accept --server {}", client.server()));
                }
            }
            What::Uninvite { id, remote } => {
                let client = Client::new(&remote.connection)?;
                client.send(Request::delete(format!("/v1/invitations/{id}"))).await?;
                done("taken back", id)?;
            }
            What::Update { id, role, remote } => {
                let client = Client::new(&remote.connection)?;
                let request = Request::patch(format!("/v1/members/{id}")).json(&json!({ "role": role }))?;
                let answer = client.send(request).await?;
                output.line(if output.json { answer.text() } else { format!("{id} is {role} now") })?;
            }
            What::Remove { id, remote } => {
                let client = Client::new(&remote.connection)?;
                client.send(Request::delete(format!("/v1/members/{id}"))).await?;
                done("removed", id)?;
            }
            What::Accept { server, name, token_file, password_file, .. } => {
                let token = secret("Token of the invitation", token_file.as_deref())?;
                let password = secret("Password", password_file.as_deref())?;
                let body = json!({"token": token, "password": password, "name": name});
                let answer = anonymous(&server)?.send(Request::post("/v1/auth/accept").json(&body)?).await?;
                let session: Session = answer.json()?;
                let tenant = printable(&session.acts_in.tenant);
                if output.json {
                    // Without the tokens: nobody asked for them.
                    output.document(&session.acts_in)?;
                } else {
                    output.line(format!(
                        "you are a member of {tenant}; next: sandbar login --server {server}"
                    ))?;
                }
            }
            What::ResetToken { email, remote } => {
                let client = Client::new(&remote.connection)?;
                let request = Request::post("/v1/password-resets").json(&json!({ "email": email }))?;
                let answer = client.send(request).await?;
                if output.json {
                    output.line(answer.text())?;
                } else {
                    let made: MadeReset = answer.json()?;
                    output.line(&made.token)?;
                    output.note(next_with_token(client.server()));
                }
            }
            What::NewPassword { server, token_file, password_file, .. } => {
                let token = secret("Token", token_file.as_deref())?;
                let password = secret("New password", password_file.as_deref())?;
                let body = json!({"token": token, "password": password});
                anonymous(&server)?.send(Request::post("/v1/auth/reset").json(&body)?).await?;
                if output.json {
                    output.document(&json!({"password": "set"}))?;
                } else {
                    output
                        .line(format!("the password is set; next: sandbar login --server {server} EMAIL"))?;
                }
            }
            What::Reset { email, settings, .. } => {
                let (token, until) = crate::server::make_reset(&database_url(&settings)?, &email).await?;
                if output.json {
                    output.document(&json!({"token": token, "email": email, "expires_at": until}))?;
                } else {
                    output.line(&token)?;
                    output.note(next_with_token("URL"));
                }
            }
            What::CreateAdmin { email, name, tenant, role, password_file, settings, .. } => {
                let url = database_url(&settings)?;
                let password = secret("New password", password_file.as_deref())?;
                let wanted = role.parse::<Role>().map_err(|e| Failure::usage(e.to_string()))?;
                crate::server::make_user(&url, &tenant, &email, &name, &password, wanted).await?;
                if output.json {
                    output.document(&json!({"email": email, "tenant": tenant, "role": role}))?;
                } else {
                    output.line(format!("{email} is {role} of {tenant}, with the new password"))?;
                }
            }
        }
        Ok(Exit::Done)
    }
}

fn database_url(settings: &Settings) -> Result<String, Failure> {
    let config = Config::load(&settings.overrides()).map_err(|e| Failure::usage(e.to_string()))?;
    let url = config.database.url.as_ref();
    let url = url.context("no database: set database.url in sandbar.toml, or SANDBAR_DATABASE__URL")?;
    Ok(url.expose().to_owned())
}

fn next_with_token(server: &str) -> String {
    format!("good for an hour, once; they set a password with: sandbar user new-password --server {server}")
}

/// A secret from a file, from standard input or from the keyboard; never from the command line itself.
pub fn secret(what: &str, file: Option<&Path>) -> Result<String, Failure> {
    let text = match file {
        Some(path) => String::from_utf8_lossy(&value::file(path, MAX_PASSWORD)?).into_owned(),
        None if std::io::stdin().is_terminal() => {
            let terminal = console::Term::stderr();
            terminal.write_str(&format!("{what} (not shown): "))?;
            terminal.read_secure_line()?
        }
        None => {
            let mut text = String::new();
            std::io::stdin().lock().take(MAX_PASSWORD).read_to_string(&mut text)?;
            text
        }
    };
    let text = text.trim_end_matches(['\n', '\r']).to_owned();
    if text.is_empty() { Err(Failure::usage(format!("{what}: nothing was given"))) } else { Ok(text) }
}

fn word(role: crate::wire::key::Role) -> String {
    serde_json::to_value(role).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

async fn members(output: Output, client: &Client, pages: &Pages) -> Result<(), Failure> {
    let mut first = true;
    pages
        .walk(client, output, "/v1/members", &[], |items| {
            if output.json {
                for item in &items {
                    output.line(item.get())?;
                }
                return Ok(());
            }
            let members: Vec<Member> = parse(&items)?;
            let mut rows = vec![output::head(&["NAME", "EMAIL", "ROLE", "SINCE", "ID"])];
            rows.extend(members.iter().map(|member| {
                vec![
                    Cell::styled(printable(&member.name), BOLD),
                    printable(&member.email).into(),
                    word(member.role).into(),
                    output::age(member.since, Utc::now()).into(),
                    member.id.to_string().into(),
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

async fn invitations(output: Output, client: &Client, pages: &Pages) -> Result<(), Failure> {
    let mut first = true;
    pages
        .walk(client, output, "/v1/invitations", &[], |items| {
            if output.json {
                for item in &items {
                    output.line(item.get())?;
                }
                return Ok(());
            }
            let invitations: Vec<Invitation> = parse(&items)?;
            let mut rows = vec![output::head(&["EMAIL", "ROLE", "STATE", "ID"])];
            rows.extend(invitations.iter().map(|one| {
                let now = Utc::now();
                let state = match one.accepted_at {
                    Some(at) => format!("accepted {}", output::age(at, now)),
                    None if one.expires_at <= now => "over".to_owned(),
                    None => format!("open, ends {}", output::age(one.expires_at, now)),
                };
                vec![
                    Cell::styled(printable(&one.email), BOLD),
                    word(one.role).into(),
                    state.into(),
                    one.id.to_string().into(),
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
