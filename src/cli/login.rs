//! `sandbar login` and `logout`: address and password become a key of this person, kept in a profile; logging out revokes it
//! and forgets it. No browser is needed, and no password is kept.

use std::path::PathBuf;

use serde_json::json;

use super::client::{Client, Request};
use super::failure::{Exit, Failure, Outcome};
use super::output::{Output, printable};
use super::profiles::{self, Profiles};
use super::target::{PROFILE_VARIABLE, Target, check_server, is_local, local_certificate};
use super::user::secret;
use crate::wire::key::MadeKey;
use crate::wire::people::Session;

/// Log in with address and password, and keep a key of your own in a profile
#[derive(Debug, clap::Args)]
pub struct Login {
    /// Address
    #[arg(value_name = "EMAIL")]
    email: String,
    /// Address of the server
    #[arg(long, value_name = "URL")]
    server: String,
    /// Tenant to act in [default: the first you became a member of]
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// Name of the profile
    #[arg(long, value_name = "NAME", value_parser = profiles::check_name, default_value = "default")]
    profile: String,
    /// File with the password [default: standard input, or the keyboard]
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// Print JSON: who you are and where; the key stays in the profile
    #[arg(long, help_heading = "Output")]
    json: bool,
}

/// A client without a credential: what it sends in its place opens nothing.
pub fn anonymous(server: &str) -> Result<Client, Failure> {
    with_key(server, "none")
}

fn with_key(server: &str, key: &str) -> Result<Client, Failure> {
    let server = check_server(server)?;
    let certificate = local_certificate(&server);
    Client::to(Target {
        server,
        key: key.to_owned(),
        from: "--server".to_owned(),
        key_from: "the login".to_owned(),
        certificate,
    })
}

impl Login {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.json
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.json);
        let server = check_server(&self.server)?;
        if !server.starts_with("https://") && !is_local(&server) {
            output.note(format!(
                "warning: {server} is not encrypted; whoever listens on the way gets the password"
            ));
        }
        let password = secret("Password", self.password_file.as_deref())?;
        let body = json!({"email": self.email, "password": password, "tenant": self.tenant});
        let request = Request::post("/v1/auth/login").json(&body)?;
        let session: Session = anonymous(&server)?.fetch(request).await?;
        // The session is only for making the key. It is sent as a key is: the server knows both by their looks.
        let client = with_key(&server, &session.access_token)?;
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let name = format!("sandbar login of {} on {host}", self.email);
        let made: MadeKey =
            client.fetch(Request::post("/v1/auth/key").json(&json!({ "name": name }))?).await?;
        client.send(Request::post("/v1/auth/logout")).await?;
        let path = profiles::path()?;
        let mut known = Profiles::load(&path)?;
        let profile = profiles::Profile { server: server.clone(), key: Some(made.secret) };
        known.profiles.insert(self.profile.clone(), profile);
        known.current = Some(self.profile.clone());
        known.save(&path)?;
        if output.json {
            output.document(&json!({"profile": self.profile, "server": server, "acts_in": session.acts_in, "expires_at": made.key.expires_at}))?;
        } else {
            let tenant = printable(&session.acts_in.tenant);
            output.line(format!("logged in to {tenant}; profile {} is used from now on", self.profile))?;
        }
        Ok(Exit::Done)
    }
}

/// Log out: revoke the key that `sandbar login` made, and forget it
#[derive(Debug, clap::Args)]
pub struct Logout {
    /// The profile [default: SANDBAR_PROFILE, else the one in use]
    #[arg(long, value_name = "NAME", value_parser = profiles::check_name)]
    profile: Option<String>,
    /// Print JSON: the profile, the server, and whether the key worked until now
    #[arg(long, help_heading = "Output")]
    json: bool,
}

impl Logout {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.json
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.json);
        let path = profiles::path()?;
        let mut known = Profiles::load(&path)?;
        let named =
            self.profile.or_else(|| std::env::var(PROFILE_VARIABLE).ok().filter(|name| !name.is_empty()));
        let Some(name) = named.or_else(|| known.current.clone()) else {
            return Err(Failure::new(Exit::NotFound, "no profile is in use").hint("name one: --profile NAME"));
        };
        let profile = known.find(&name)?.clone();
        let login = format!("sandbar login EMAIL --server {} --profile {name}", profile.server);
        let Some(key) = profile.key else {
            return Err(Failure::new(Exit::NotFound, format!("profile {name} has no key")).hint(login));
        };
        let sent = with_key(&profile.server, &key)?.send(Request::post("/v1/auth/logout").repeatable()).await;
        let ended = match sent {
            Ok(_) => true,
            // It was revoked or has expired: there is nothing left but to forget it.
            Err(failure) if failure.code() == Some("unauthenticated") => false,
            Err(failure) if failure.code() == Some("no-user") => {
                return Err(failure.hint(format!(
                    "the key of profile {name} was not made by `sandbar login`: `sandbar profile remove {name}` forgets \
                     it here, `sandbar key revoke ID` ends it"
                )));
            }
            Err(failure) => {
                return Err(failure.detail(format!("the key of profile {name} works on and is still kept")));
            }
        };
        let server = profile.server.clone();
        known.profiles.insert(name.clone(), profiles::Profile { key: None, ..profile });
        known.save(&path)?;
        if output.json {
            output.document(&json!({"profile": name, "server": server, "ended": ended}))?;
        } else {
            let what = if ended { "its key is revoked" } else { "its key had ended before" };
            output.line(format!("logged out of profile {name}; {what}"))?;
            output.note(format!("next: {login}"));
        }
        Ok(Exit::Done)
    }
}
