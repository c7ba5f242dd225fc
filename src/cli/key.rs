//! `sandbar key`: list, create, update, rotate, revoke; and who one is.

use std::time::Duration;

use chrono::Utc;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::client::{Client, Request};
use super::failure::{Exit, Failure, Outcome};
use super::list::{Pages, parse};
use super::output::{self, BOLD, Cell, Output, printable};
use super::quota::{assignment, body};
use super::target::Remote;
use super::value;
use crate::domain::quota::{Amount, Quota};
use crate::wire::key::{Key as Shown, MadeKey, Me};

/// Roles that a key can have.
pub const ROLES: [&str; 6] = ["platform", "owner", "admin", "developer", "operator", "viewer"];

/// List, make, change, rotate and revoke API keys
#[derive(Debug, clap::Args)]
pub struct Key {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List the keys of the tenant, newest first; never the keys themselves
    List {
        /// Only those whose first characters begin with this
        #[arg(long, value_name = "TEXT")]
        prefix: Option<String>,
        /// Also those that are revoked
        #[arg(long)]
        revoked: bool,
        #[command(flatten)]
        pages: Pages,
        #[command(flatten)]
        remote: Remote,
    },
    /// Make a key and print it: once, and never again
    Create {
        /// What it is for
        #[arg(value_name = "NAME")]
        name: String,
        /// What it may at most (docs/permissions.md)
        #[arg(long, value_name = "ROLE", value_parser = ROLES)]
        role: String,
        /// Narrow it: ACTION, ACTION:TASK or *:TASK; may be repeated
        #[arg(long, value_name = "SCOPE")]
        scope: Vec<String>,
        /// Refuse it after this time, like 30d
        #[arg(long, value_name = "DURATION", value_parser = value::duration)]
        expires: Option<Duration>,
        /// Limit what is submitted with it, like invocations_per_day=1000; may be repeated
        #[arg(long, value_name = "QUOTA=AMOUNT", value_parser = assignment)]
        quota: Vec<(Quota, Option<Amount>)>,
        #[command(flatten)]
        remote: Remote,
    },
    /// Change a key's name, scopes, expiry or limits; what is not named stays
    Update {
        /// Its id
        #[arg(value_name = "ID")]
        id: Uuid,
        /// What it is for
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        /// Its scopes, in place of those it has; may be repeated
        #[arg(long, value_name = "SCOPE")]
        scope: Vec<String>,
        /// Refuse it after this time, like 30d
        #[arg(long, value_name = "DURATION", value_parser = value::duration)]
        expires: Option<Duration>,
        /// Limit what is submitted with it, like invocations_per_day=1000, or =default for no limit; may be repeated
        #[arg(long, value_name = "QUOTA=AMOUNT", value_parser = assignment)]
        quota: Vec<(Quota, Option<Amount>)>,
        #[command(flatten)]
        remote: Remote,
    },
    /// Make a key in the place of another, which works on for a while; print the new one
    Rotate {
        /// Id of the old one
        #[arg(value_name = "ID")]
        id: Uuid,
        /// How long the old one works on
        #[arg(long, value_name = "DURATION", value_parser = value::duration, default_value = "24h")]
        overlap: Duration,
        #[command(flatten)]
        remote: Remote,
    },
    /// Revoke a key: it stops within five seconds everywhere
    Revoke {
        /// Its id
        #[arg(value_name = "ID")]
        id: Uuid,
        #[command(flatten)]
        remote: Remote,
    },
    /// Say whose key is in use, and what it may
    Whoami {
        #[command(flatten)]
        remote: Remote,
    },
}

impl Key {
    fn remote(&self) -> &Remote {
        match &self.what {
            What::List { remote, .. }
            | What::Create { remote, .. }
            | What::Update { remote, .. }
            | What::Rotate { remote, .. }
            | What::Revoke { remote, .. }
            | What::Whoami { remote } => remote,
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
        let at = |after: Option<Duration>| after.map(|after| Utc::now() + after);
        match self.what {
            What::List { prefix, revoked, pages, .. } => {
                list(output, &client, prefix, revoked, &pages).await?;
            }
            What::Create { name, role, scope, expires, quota, .. } => {
                let body = json!({
                    "name": name, "role": role, "scopes": scope, "expires_at": at(expires), "quotas": body(&quota),
                });
                made(output, &client, Request::post("/v1/keys").json(&body)?).await?;
            }
            What::Update { id, name, scope, expires, quota, .. } => {
                let mut patch = Map::new();
                if let Some(name) = name {
                    patch.insert("name".to_owned(), name.into());
                }
                if !scope.is_empty() {
                    patch.insert("scopes".to_owned(), scope.into());
                }
                if let Some(at) = at(expires) {
                    patch.insert("expires_at".to_owned(), json!(at));
                }
                if !quota.is_empty() {
                    patch.insert("quotas".to_owned(), body(&quota));
                }
                if patch.is_empty() {
                    return Err(Failure::usage("nothing to change is named"));
                }
                let request = Request::patch(format!("/v1/keys/{id}")).json(&Value::from(patch))?;
                let answer = client.send(request).await?;
                output.line(if output.json { answer.text() } else { format!("{id} is changed") })?;
            }
            What::Rotate { id, overlap, .. } => {
                let body = json!({ "overlap_s": overlap.as_secs() });
                made(output, &client, Request::post(format!("/v1/keys/{id}/rotate")).json(&body)?).await?;
            }
            What::Revoke { id, .. } => {
                client.send(Request::delete(format!("/v1/keys/{id}"))).await?;
                if output.json {
                    output.document(&json!({ "revoked": id }))?;
                } else {
                    output.line(format!("{id} is revoked"))?;
                }
            }
            What::Whoami { .. } => {
                let answer = client.send(Request::get("/v1/me")).await?;
                if output.json {
                    output.line(answer.text())?;
                } else {
                    let me: Me = answer.json()?;
                    let role = serde_json::to_value(me.role).unwrap_or_default();
                    output.line(format!(
                        "{} · {} in {}",
                        output.paint(BOLD, printable(&me.name)),
                        role.as_str().unwrap_or_default(),
                        printable(&me.tenant)
                    ))?;
                    output.line(me.may.join(" "))?;
                }
            }
        }
        Ok(Exit::Done)
    }
}

/// The key alone on standard output, so that it can be piped; what is known of it on standard error.
async fn made(output: Output, client: &Client, request: Request) -> Result<(), Failure> {
    let answer = client.send(request).await?;
    if output.json {
        output.line(answer.text())?;
        return Ok(());
    }
    let made: MadeKey = answer.json()?;
    output.line(&made.secret)?;
    output.note(format!("id {}; keep the key: it is not shown again", made.key.id));
    Ok(())
}

fn limits(key: &Shown) -> String {
    let limits: Vec<String> =
        key.quotas.iter().map(|quota| format!("{}={}", printable(&quota.name), quota.limit)).collect();
    limits.join(" ")
}

async fn list(
    output: Output,
    client: &Client,
    prefix: Option<String>,
    revoked: bool,
    pages: &Pages,
) -> Result<(), Failure> {
    let mut pairs = vec![("revoked", revoked.to_string())];
    pairs.extend(prefix.map(|prefix| ("prefix", prefix)));
    let mut first = true;
    pages
        .walk(client, output, "/v1/keys", &pairs, |items| {
            if output.json {
                for item in &items {
                    output.line(item.get())?;
                }
                return Ok(());
            }
            let keys: Vec<Shown> = parse(&items)?;
            let mut rows =
                vec![output::head(&["ID", "KEY", "NAME", "ROLE", "STATE", "USED", "SCOPES", "LIMITS"])];
            let word = |value: Result<Value, serde_json::Error>| {
                value.ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
            };
            rows.extend(keys.iter().map(|key| {
                vec![
                    Cell::from(key.id.to_string()),
                    format!("{}…", printable(&key.prefix)).into(),
                    Cell::styled(printable(&key.name), BOLD),
                    word(serde_json::to_value(key.role)).into(),
                    word(serde_json::to_value(key.state)).into(),
                    key.last_used_at
                        .map_or_else(|| "never".to_owned(), |at| output::age(at, Utc::now()))
                        .into(),
                    if key.scopes.is_empty() { "-".to_owned() } else { key.scopes.join(" ") }.into(),
                    if key.quotas.is_empty() { "-".to_owned() } else { limits(key) }.into(),
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
