//! `sandbar tasks`: list, show, update, delete.

use std::io::{BufRead as _, IsTerminal as _};
use std::time::Duration;

use chrono::Utc;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::client::{Client, Request, with_query};
use super::failure::{Exit, Failure, Outcome};
use super::invoke::millis;
use super::list::{Pages, parse};
use super::output::{self, BOLD, Cell, DIM, Output, printable};
use super::target::Remote;
use super::value;
use crate::domain::names::TaskName;
use crate::wire::task::{SecretHeader, Task, Version};

/// What gives a setting back to its default.
const DEFAULT: &str = "default";
/// Characters of a description in a list.
const SHORT: usize = 72;

/// List, show, change and delete tasks
#[derive(Debug, clap::Args)]
pub struct Tasks {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    pages: Pages,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List the tasks in the order of their names
    List {
        #[command(flatten)]
        pages: Pages,
        #[command(flatten)]
        remote: Remote,
    },
    /// Show a task and what its current version says about itself
    Show {
        /// Name of the task
        #[arg(value_name = "TASK", value_parser = value::task_name)]
        task: TaskName,
        #[command(flatten)]
        remote: Remote,
    },
    /// Change a task; what is not named stays, and `default` gives a setting back
    Update(Box<Update>),
    /// Delete a task and its versions; ended invocations stay readable
    Delete {
        /// Name of the task
        #[arg(value_name = "TASK", value_parser = value::task_name)]
        task: TaskName,
        /// Cancel its waiting and running invocations first
        #[arg(long)]
        cancel: bool,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        #[command(flatten)]
        remote: Remote,
    },
}

#[derive(Debug, clap::Args)]
struct Update {
    /// Name of the task
    #[arg(value_name = "TASK", value_parser = value::task_name)]
    task: TaskName,
    /// What it does, for people
    #[arg(long, value_name = "TEXT|default")]
    description: Option<String>,
    /// Whether it takes new invocations
    #[arg(long, value_name = "BOOL")]
    active: Option<bool>,
    /// The version that plain invocations use; `default`: the newest that is ready
    #[arg(long, value_name = "N|default", value_parser = setting::<i32>)]
    version: Option<Setting<i32>>,
    /// Fuel, like 500M or 20G
    #[arg(long, value_name = "N|default", value_parser = setting_fuel, help_heading = LIMITS)]
    fuel: Option<Setting<u64>>,
    /// Memory, like 128MiB
    #[arg(long, value_name = "SIZE|default", value_parser = setting_size, help_heading = LIMITS)]
    memory: Option<Setting<u64>>,
    /// Time, like 30s
    #[arg(long, value_name = "DURATION|default", value_parser = setting_duration, help_heading = LIMITS)]
    timeout: Option<Setting<Duration>>,
    /// Size of the result, like 4MiB
    #[arg(long, value_name = "SIZE|default", value_parser = setting_size, help_heading = LIMITS)]
    output: Option<Setting<u64>>,
    /// Size of the log, like 256KiB
    #[arg(long, value_name = "SIZE|default", value_parser = setting_size, help_heading = LIMITS)]
    log: Option<Setting<u64>>,
    /// Attempts at most, the first included
    #[arg(long, value_name = "N|default", value_parser = setting::<u16>, help_heading = RETRY)]
    max_attempts: Option<Setting<u16>>,
    /// Growth of the wait between attempts: fixed or exponential
    #[arg(long, value_name = "KIND|default", value_parser = ["fixed", "exponential", DEFAULT], help_heading = RETRY)]
    backoff: Option<String>,
    /// First wait between attempts
    #[arg(long, value_name = "DURATION|default", value_parser = setting_duration, help_heading = RETRY)]
    initial: Option<Setting<Duration>>,
    /// Longest wait between attempts
    #[arg(long, value_name = "DURATION|default", value_parser = setting_duration, help_heading = RETRY)]
    max: Option<Setting<Duration>>,
    /// Where its HTTP requests may go, like https://api.example.com; again for each. Replaces what was granted
    #[arg(long = "grant-http", value_name = "HOST|default", help_heading = GRANTS)]
    grant_http: Vec<String>,
    /// Whether it may use its key-value store
    #[arg(long = "grant-kv", value_name = "true|false|default", value_parser = setting::<bool>, help_heading = GRANTS)]
    grant_kv: Option<Setting<bool>>,
    /// A task that it may start; again for each. Replaces what was granted
    #[arg(long = "grant-invoke", value_name = "TASK|default", help_heading = GRANTS)]
    grant_invoke: Vec<String>,
    /// A secret that it may see; again for each. Replaces what was granted
    #[arg(long = "grant-secret", value_name = "NAME|default", help_heading = GRANTS)]
    grant_secret: Vec<String>,
    /// A secret that the host sends for it without showing it, like API_TOKEN:authorization:https://api.example.com;
    /// again for each. Replaces what was granted
    #[arg(long = "grant-secret-header", value_name = "SECRET:HEADER:HOST|default", help_heading = GRANTS)]
    grant_secret_header: Vec<String>,
    /// A text that it reads by wasi:config; again for each. KEY alone takes it away
    #[arg(long = "config", value_name = "KEY[=VALUE]")]
    config: Vec<String>,
    #[command(flatten)]
    remote: Remote,
}

const GRANTS: &str = "What it is given (`default`: nothing)";
const LIMITS: &str = "Default limits of each attempt";
const RETRY: &str = "Default retry policy";

/// A value, or back to the default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Setting<T> {
    Default,
    To(T),
}

fn setting_by<T>(text: &str, read: impl FnOnce(&str) -> Result<T, String>) -> Result<Setting<T>, String> {
    if text == DEFAULT { Ok(Setting::Default) } else { read(text).map(Setting::To) }
}

fn setting<T: std::str::FromStr>(text: &str) -> Result<Setting<T>, String> {
    setting_by(text, |text| text.parse().map_err(|_| "write a number, or `default`".to_owned()))
}

fn setting_size(text: &str) -> Result<Setting<u64>, String> {
    setting_by(text, value::size)
}

fn setting_fuel(text: &str) -> Result<Setting<u64>, String> {
    setting_by(text, value::fuel)
}

fn setting_duration(text: &str) -> Result<Setting<Duration>, String> {
    setting_by(text, value::duration)
}

impl Tasks {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        match &self.what {
            None => self.remote.json,
            Some(What::List { remote, .. } | What::Show { remote, .. } | What::Delete { remote, .. }) => {
                remote.json
            }
            Some(What::Update(update)) => update.remote.json,
        }
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        match self.what {
            None => list(&self.pages, &self.remote).await,
            Some(What::List { pages, remote }) => list(&pages, &remote).await,
            Some(What::Show { task, remote }) => show(&task, &remote).await,
            Some(What::Update(update)) => update.run().await,
            Some(What::Delete { task, cancel, yes, remote }) => delete(&task, cancel, yes, &remote).await,
        }
    }
}

async fn list(pages: &Pages, remote: &Remote) -> Outcome {
    let output = Output::new(remote.json);
    let client = Client::new(&remote.connection)?;
    let mut empty = true;
    let show = |items: Vec<Box<RawValue>>| {
        if output.json {
            for item in &items {
                output.line(item.get())?;
            }
            return Ok(());
        }
        let tasks: Vec<Task> = parse(&items)?;
        let mut rows = vec![output::head(&["TASK", "VERSION", "UPDATED", "DESCRIPTION"])];
        rows.extend(tasks.iter().map(|task| {
            vec![
                Cell::styled(&task.name, BOLD),
                task.current_version.map_or_else(|| "-".to_owned(), |n| n.to_string()).into(),
                output::age(task.updated_at, Utc::now()).into(),
                output::headline(task.description.as_deref().unwrap_or_default(), SHORT).into(),
            ]
        }));
        let head = usize::from(!empty || items.is_empty());
        empty &= items.is_empty();
        for line in output::table(output, &rows).into_iter().skip(head) {
            output.line(line)?;
        }
        Ok(())
    };
    pages.walk(&client, output, "/v1/tasks", &[], show).await?;
    if empty && !output.json {
        output.note("no tasks yet; make one: sandbar new NAME, then sandbar push in it");
    }
    Ok(Exit::Done)
}

async fn show(name: &TaskName, remote: &Remote) -> Outcome {
    let output = Output::new(remote.json);
    let client = Client::new(&remote.connection)?;
    let answer = client.send(Request::get(format!("/v1/tasks/{name}"))).await?;
    if output.json {
        output.line(answer.text())?;
        return Ok(Exit::Done);
    }
    let task: Task = answer.json()?;
    let row = |name: &str, value: String| {
        output.line(format!("{} {value}", output.paint(DIM, format!("{name:<11}"))))
    };
    row("task", output.paint(BOLD, &task.name))?;
    if let Some(text) = &task.description {
        row("about", printable(text.trim()).replace('\n', "\n            "))?;
    }
    let current = match (task.current_version, task.pinned_version) {
        (None, _) => "none is ready yet".to_owned(),
        (Some(n), Some(_)) => format!("{n} (pinned)"),
        (Some(n), None) => format!("{n} (the newest that is ready)"),
    };
    row("version", current)?;
    row("active", if task.active { "yes" } else { "no: new invocations are refused" }.to_owned())?;
    for (what, values) in
        [("limits", serde_json::to_value(task.limits)), ("retry", serde_json::to_value(task.retry))]
    {
        if let Ok(Value::Object(values)) = values {
            let text: Vec<String> = values.iter().map(|(key, value)| format!("{key} {value}")).collect();
            row(what, printable(&text.join(" · ")))?;
        }
    }
    if let Some(grants) = &task.grants {
        if !grants.http.is_empty() {
            row("http", printable(&grants.http.join(" · ")))?;
        }
        if grants.kv {
            row("kv", "yes".to_owned())?;
        }
        if !grants.invoke.is_empty() {
            row("starts", printable(&grants.invoke.join(" · ")))?;
        }
        if !grants.secrets.is_empty() {
            row("secrets", printable(&grants.secrets.join(" · ")))?;
        }
        for SecretHeader { secret, header, host } in &grants.secret_headers {
            row("sends", printable(&format!("{secret} in {header} to {host}")))?;
        }
    }
    row("created", output::moment(task.created_at))?;
    row("updated", output::moment(task.updated_at))?;
    let Some(number) = task.current_version else { return Ok(Exit::Done) };
    let version: Version = client.fetch(Request::get(format!("/v1/tasks/{name}/versions/{number}"))).await?;
    let manifest = version.manifest.unwrap_or_default();
    for (title, key) in [("input", "input_schema"), ("output", "output_schema")] {
        if let Some(schema) = manifest.get(key) {
            let text = serde_json::to_string_pretty(schema).unwrap_or_default();
            row(title, printable(&text).replace('\n', "\n            "))?;
        }
    }
    Ok(Exit::Done)
}

impl Update {
    async fn run(self) -> Outcome {
        let output = Output::new(self.remote.json);
        let patch = self.patch();
        if patch.is_empty() {
            return Err(Failure::usage("nothing to change is named")
                .hint(format!("for example: sandbar tasks update {} --timeout 2m", self.task)));
        }
        let client = Client::new(&self.remote.connection)?;
        let request = Request::patch(format!("/v1/tasks/{}", self.task)).json(&patch)?;
        let answer = client.send(request).await?;
        if output.json {
            output.line(answer.text())?;
        } else {
            let changed: Vec<&str> = patch.keys().map(String::as_str).collect();
            output.line(format!("{} changed: {}", output.paint(BOLD, &self.task), changed.join(", ")))?;
        }
        Ok(Exit::Done)
    }

    /// A merge patch: absent stays, null gives back.
    fn patch(&self) -> Map<String, Value> {
        fn put<T: Copy + Into<Value>>(map: &mut Map<String, Value>, key: &str, setting: Option<Setting<T>>) {
            match setting {
                None => {}
                Some(Setting::Default) => _ = map.insert(key.to_owned(), Value::Null),
                Some(Setting::To(value)) => _ = map.insert(key.to_owned(), value.into()),
            }
        }
        let ms = |setting: Option<Setting<Duration>>| match setting {
            Some(Setting::To(duration)) => Some(Setting::To(millis(duration))),
            Some(Setting::Default) => Some(Setting::Default),
            None => None,
        };
        let text = |text: &String| if text == DEFAULT { Value::Null } else { text.as_str().into() };
        let mut patch = Map::new();
        if let Some(description) = &self.description {
            patch.insert("description".to_owned(), text(description));
        }
        if let Some(active) = self.active {
            patch.insert("active".to_owned(), active.into());
        }
        put(&mut patch, "version", self.version);
        let mut limits = Map::new();
        put(&mut limits, "fuel", self.fuel);
        put(&mut limits, "memory_bytes", self.memory);
        put(&mut limits, "timeout_ms", ms(self.timeout));
        put(&mut limits, "output_bytes", self.output);
        put(&mut limits, "log_bytes", self.log);
        let mut retry = Map::new();
        put(&mut retry, "max_attempts", self.max_attempts);
        if let Some(backoff) = &self.backoff {
            retry.insert("backoff".to_owned(), text(backoff));
        }
        put(&mut retry, "initial_ms", ms(self.initial));
        put(&mut retry, "max_ms", ms(self.max));
        let mut grants = Map::new();
        match self.grant_http.as_slice() {
            [] => {}
            [one] if one == DEFAULT => _ = grants.insert("http".to_owned(), Value::Null),
            hosts => _ = grants.insert("http".to_owned(), hosts.into()),
        }
        put(&mut grants, "kv", self.grant_kv);
        match self.grant_invoke.as_slice() {
            [] => {}
            [one] if one == DEFAULT => _ = grants.insert("invoke".to_owned(), Value::Null),
            tasks => _ = grants.insert("invoke".to_owned(), tasks.into()),
        }
        match self.grant_secret.as_slice() {
            [] => {}
            [one] if one == DEFAULT => _ = grants.insert("secrets".to_owned(), Value::Null),
            names => _ = grants.insert("secrets".to_owned(), names.into()),
        }
        match self.grant_secret_header.as_slice() {
            [] => {}
            [one] if one == DEFAULT => _ = grants.insert("secret_headers".to_owned(), Value::Null),
            sent => {
                let sent: Vec<Value> = sent.iter().map(|text| secret_header(text)).collect();
                grants.insert("secret_headers".to_owned(), sent.into());
            }
        }
        let mut config = Map::new();
        for text in &self.config {
            match text.split_once('=') {
                Some((key, value)) => config.insert(key.to_owned(), value.into()),
                None => config.insert(text.clone(), Value::Null),
            };
        }
        for (key, part) in [("limits", limits), ("retry", retry), ("grants", grants), ("config", config)] {
            if !part.is_empty() {
                patch.insert(key.to_owned(), part.into());
            }
        }
        patch
    }
}

/// `SECRET:HEADER:HOST`; what is missing is empty, and the server says so.
fn secret_header(text: &str) -> Value {
    let mut parts = text.splitn(3, ':').map(str::to_owned);
    let mut next = || parts.next().unwrap_or_default();
    let (secret, header, host) = (next(), next().to_ascii_lowercase(), next());
    serde_json::json!({"secret": secret, "header": header, "host": host})
}

async fn delete(name: &TaskName, cancel: bool, yes: bool, remote: &Remote) -> Outcome {
    let output = Output::new(remote.json);
    let client = Client::new(&remote.connection)?;
    if !yes {
        if !std::io::stdin().is_terminal() {
            return Err(Failure::usage(format!("deleting {name} needs your word for it")).hint("add --yes"));
        }
        output
            .note(format!("Delete {name} and its versions on {}? Type its name to go on:", client.server()));
        let mut line = String::new();
        std::io::stdin().lock().read_line(&mut line)?;
        if line.trim() != name.as_str() {
            return Err(Failure::new(Exit::Failed, "not deleted"));
        }
    }
    let mut pairs = Vec::new();
    if cancel {
        pairs.push(("cancel", "true".to_owned()));
    }
    client.send(Request::delete(with_query(&format!("/v1/tasks/{name}"), &pairs))).await?;
    if output.json {
        output.document(&serde_json::json!({ "deleted": name }))?;
    } else {
        output.line(format!("{name} is deleted"))?;
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        update: Update,
    }

    fn patch(line: &str) -> Value {
        let words = ["x", "task"].into_iter().chain(line.split_whitespace());
        Line::try_parse_from(words).unwrap_or_else(|e| panic!("{e}")).update.patch().into()
    }

    #[test]
    fn what_is_not_named_is_absent_and_default_is_null() {
        assert_eq!(patch(""), serde_json::json!({}));
        assert_eq!(
            patch(
                "--active false --version default --timeout 2m --fuel default --max-attempts 3 --backoff default"
            ),
            serde_json::json!({
                "active": false,
                "version": null,
                "limits": { "timeout_ms": 120_000, "fuel": null },
                "retry": { "max_attempts": 3, "backoff": null },
            })
        );
        assert_eq!(
            patch("--description default --version 3"),
            serde_json::json!({"description": null, "version": 3})
        );
        assert_eq!(
            patch("--grant-http a.example --grant-http http://b.example:8080"),
            serde_json::json!({"grants": {"http": ["a.example", "http://b.example:8080"]}})
        );
        assert_eq!(
            patch(
                "--grant-kv true --grant-secret A --grant-secret-header B:Authorization:https://a.example:8443 --config k=v=w --config gone"
            ),
            serde_json::json!({
                "grants": {"kv": true, "secrets": ["A"], "secret_headers": [
                    {"secret": "B", "header": "authorization", "host": "https://a.example:8443"}]},
                "config": {"k": "v=w", "gone": null},
            })
        );
        assert_eq!(patch("--grant-http default"), serde_json::json!({"grants": {"http": null}}));
    }
}
