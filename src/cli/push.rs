//! `sandbar push`: a module, or an HTTP request in its place, becomes a version of a task. Uploads, waits for the compiler's
//! verdict, says what it is.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::client::{Answer, Client, Request, TRANSFER};
use super::failure::{Exit, Failure, Outcome};
use super::output::{self, Output};
use super::target::Remote;
use super::{build, value};
use crate::domain::names::TaskName;
use crate::wire::task::{Definition, Expected, HttpTask, Version, VersionState};

/// Bytes handed to the connection at once; the bar moves by these.
const PIECE: usize = 64 << 10;
/// How long one request asks the server to wait for the compiler.
const WAIT: Duration = Duration::from_secs(20);
/// Pause between looks at a version that is being compiled.
const LOOK: Duration = Duration::from_millis(500);

/// Bytes of a request's body, as the server takes it.
const MAX_BODY: u64 = 64 << 10;
const REQUEST: &str = "A request in place of a module";

/// Upload a module as a new version of a task, and wait until it may be invoked. Or a request that the worker makes by itself
#[derive(Debug, clap::Args)]
pub struct Push {
    /// The module; without it, the project in this directory is built and pushed
    #[arg(value_name = "FILE.wasm")]
    file: Option<PathBuf>,
    /// Name of the task [default: the name in the module's own description]
    #[arg(long, short, value_name = "NAME", value_parser = value::task_name)]
    task: Option<TaskName>,
    /// Longest wait for the compiler
    #[arg(long, value_name = "DURATION", value_parser = value::duration, default_value = "2m")]
    timeout: Duration,
    #[command(flatten)]
    request: HttpRequest,
    #[command(flatten)]
    remote: Remote,
}

/// What makes an HTTP task.
#[derive(Debug, clap::Args)]
struct HttpRequest {
    /// No module: the worker makes this request, like POST https://api.example.com/hook, with the input as its body
    #[arg(long, num_args = 2, value_names = ["METHOD", "URL"], conflicts_with = "file", requires = "task", help_heading = REQUEST)]
    http: Vec<String>,
    /// A header, like 'authorization: Bearer {{secret:TOKEN}}'; again for each
    #[arg(long, value_name = "NAME: VALUE", requires = "http", value_parser = header, help_heading = REQUEST)]
    header: Vec<(String, String)>,
    /// The body; {{input}} stands for the input. @FILE: what is in it, -: standard input
    #[arg(long, value_name = "TEXT", requires = "http", help_heading = REQUEST)]
    body: Option<String>,
    /// A status of success, like 200, 2xx or 200-204; again for each [default: 2xx]
    #[arg(long, value_name = "STATUS", requires = "http", help_heading = REQUEST)]
    expect: Vec<String>,
    /// Longest time until the answer is complete [default: the attempt's]
    #[arg(long, value_name = "DURATION", requires = "http", value_parser = value::duration, help_heading = REQUEST)]
    answer_within: Option<Duration>,
    /// What it does, for people
    #[arg(long, value_name = "TEXT", requires = "http", help_heading = REQUEST)]
    description: Option<String>,
}

impl HttpRequest {
    /// The request, if one is named.
    fn task(&self) -> Result<Option<HttpTask>, Failure> {
        let (method, url) = match self.http.as_slice() {
            [] => return Ok(None),
            [method, url] => (method.clone(), url.clone()),
            _ => return Err(Failure::usage("a task makes one request: --http METHOD URL once")),
        };
        let body = self.body.as_ref().map(|text| value::text_or_file(text, MAX_BODY)).transpose()?;
        let body = body.map(String::from_utf8).transpose();
        Ok(Some(HttpTask {
            description: self.description.clone(),
            method,
            url,
            headers: self.header.iter().cloned().collect(),
            body: body.map_err(|_| Failure::usage("the body of a request in place of a module is text"))?,
            expect: self.expect.iter().cloned().map(Expected::Some).collect(),
            timeout_ms: self.answer_within.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        }))
    }
}

fn header(text: &str) -> Result<(String, String), String> {
    match text.split_once(':') {
        Some((name, value)) if !name.is_empty() => Ok((name.trim().to_owned(), value.trim().to_owned())),
        _ => Err("write it like 'NAME: VALUE'".to_owned()),
    }
}

impl Push {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote.json
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.remote.json);
        let client = Client::new(&self.remote.connection)?;
        let request = self.request.task()?;
        let (task, answer) = match (request, &self.task) {
            (Some(http), Some(task)) => {
                let to = Request::post(format!("/v1/tasks/{task}/versions"));
                (task.clone(), client.send(to.json(&Definition { http })?).await?)
            }
            _ => self.upload(&client, output).await?,
        };
        let mut text = answer.text();
        let mut version: Version = answer.json()?;

        let deadline = Instant::now() + self.timeout;
        let spinner = output.spinner(format!("compiling {task} version {}", version.version));
        while version.state == VersionState::Compiling {
            if Instant::now() >= deadline {
                return Err(Failure::new(
                    Exit::TimeUp,
                    format!("{task} version {} is still being compiled", version.version),
                )
                .hint(format!("look again: sandbar versions show {task} {}", version.version)));
            }
            tokio::time::sleep(LOOK).await;
            let answer = client.send(Request::get(version.links.this.clone())).await?;
            text = answer.text();
            version = answer.json()?;
        }
        spinner.finish_and_clear();
        if version.state == VersionState::Rejected {
            let why = version.rejection.as_ref();
            let mut failure =
                Failure::new(Exit::Refused, format!("{task} version {} cannot run here", version.version));
            if let Some(why) = why {
                failure = failure.detail(format!("{}: {}", why.code, why.detail)).hint(format!(
                    "{}/errors/module-{} says what helps",
                    client.server(),
                    why.code
                ));
            }
            return Err(failure);
        }
        if output.json {
            output.line(text)?;
            return Ok(Exit::Done);
        }
        let known = answer.status == reqwest::StatusCode::OK;
        output.line(format!(
            "{} version {} {}",
            output.paint(output::BOLD, &version.task),
            version.version,
            if known { "was there already, with the same bytes" } else { "is ready" },
        ))?;
        output.note(format!(
            "{}, {}, sha256 {}",
            version.kind,
            output::bytes(u64::try_from(version.size_bytes).unwrap_or(0)),
            version.sha256.get(..16).unwrap_or(&version.sha256),
        ));
        if let [_, url] = self.request.http.as_slice() {
            output.note(format!(
                "unless it is granted: sandbar tasks update {task} --grant-http {}",
                origin(url)
            ));
        }
        output.note(format!("next: {}", example(&version)));
        Ok(Exit::Done)
    }

    /// Sends the module, and says as which task.
    async fn upload(&self, client: &Client, output: Output) -> Result<(TaskName, Answer), Failure> {
        let file = match &self.file {
            Some(file) => file.clone(),
            None => build::project(&PathBuf::from("."), output)?.path,
        };
        let module = value::file(&file, value::MAX_MODULE)?;
        let task = match &self.task {
            Some(task) => task.clone(),
            None => own_name(&module, &file)?,
        };
        let size = module.len() as u64;
        let bar = output.byte_bar(size, &format!("uploading {task}"));
        let request = Request::post(format!("/v1/tasks/{task}/versions"))
            .header("content-type", "application/wasm")?
            .wait(WAIT.min(self.timeout))?
            .within(TRANSFER + WAIT);
        let answer = client.upload(&request, size, pieces(module.into(), bar.clone())).await;
        bar.finish_and_clear();
        Ok((task, answer?))
    }
}

/// Scheme, host and port of a URL, which the server has found to be one.
fn origin(url: &str) -> String {
    let from = url.find("://").map_or(0, |at| at + 3);
    let end = url[from..].find(['/', '?']).map_or(url.len(), |at| from + at);
    url[..end].to_ascii_lowercase()
}

/// How this version is invoked.
fn example(version: &Version) -> String {
    if version.kind == "http" {
        format!("sandbar invoke {} --input JSON --wait", version.task)
    } else if version.kind == "task" {
        let takes_input = version.manifest.as_ref().is_some_and(|m| m.get("input_schema").is_some());
        let input = if takes_input { " --input JSON" } else { "" };
        format!("sandbar invoke {}{input} --wait", version.task)
    } else {
        format!("sandbar invoke {} --wait --stdin TEXT -- ARGS…", version.task)
    }
}

/// The name in the module's self-description.
fn own_name(module: &[u8], file: &std::path::Path) -> Result<TaskName, Failure> {
    let inspection = sandbar_host::inspect::inspect(module).map_err(|rejection| {
        Failure::new(Exit::Refused, format!("{} cannot run in Sandbar", file.display()))
            .detail(rejection)
            .hint("`sandbar build` makes modules that can; so does any compiler for wasm32-wasip1 or wasm32-wasip2")
    })?;
    let name = inspection.manifest.and_then(|manifest| manifest.name);
    let name = name.ok_or_else(|| {
        let stem = file.file_stem().map(|s| s.to_string_lossy().to_lowercase().replace('_', "-"));
        Failure::usage(format!("{} does not say what it is called", file.display())).hint(format!(
            "name it: sandbar push {} --task {}",
            file.display(),
            stem.unwrap_or_default()
        ))
    })?;
    TaskName::try_from(name).map_err(|error| {
        Failure::usage(format!("the module's own name cannot be used: {error}")).hint("name it: --task NAME")
    })
}

/// The module in pieces; the bar follows.
fn pieces(
    module: Bytes,
    bar: indicatif::ProgressBar,
) -> impl futures_util::Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    futures_util::stream::unfold((module, bar), |(mut rest, bar)| async move {
        if rest.is_empty() {
            return None;
        }
        let piece = rest.split_to(PIECE.min(rest.len()));
        bar.inc(piece.len() as u64);
        Some((Ok(piece), (rest, bar)))
    })
}
