//! What a command says when it did not do what it was asked: one message, details, the next step, and the exit code.
//! Owns the exit codes and how a failure is printed; knows no command.

use std::fmt;
use std::process::ExitCode;

use crate::wire::problem::Problem;

/// How a command ended, for the shell. The numbers are a promise: they are in `--help` and in `docs/cli.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It did what it was asked.
    Done = 0,
    /// The invocation ended other than well, a build failed, or something here went wrong.
    Failed = 1,
    /// The command line or a setting is wrong. The argument parser's own number.
    Usage = 2,
    /// No such task, version, invocation, profile or file.
    NotFound = 3,
    /// No key, a wrong one, or one that may not do this.
    Denied = 4,
    /// The server cannot be reached or cannot answer now: try again later.
    Unreachable = 5,
    /// The server understood and refused: an invalid value, a conflict, a limit.
    Refused = 6,
    /// The time given to `--wait` is over. The invocation goes on.
    TimeUp = 7,
    /// Ctrl-C. What runs on the server goes on.
    Interrupted = 130,
}

impl Exit {
    /// Every code with its meaning, as the reference shows them.
    pub const TABLE: &'static [(Self, &'static str)] = &[
        (Self::Done, "done"),
        (Self::Failed, "the invocation did not succeed, a build failed, or something here went wrong"),
        (Self::Usage, "the command line or a setting is wrong"),
        (Self::NotFound, "no such task, version, invocation, profile or file"),
        (Self::Denied, "no key, a wrong key, or one that may not do this"),
        (Self::Unreachable, "the server cannot be reached or cannot answer now"),
        (Self::Refused, "the server refused: an invalid value, a conflict, a limit"),
        (Self::TimeUp, "the time of --wait is over; the invocation goes on"),
        (Self::Interrupted, "Ctrl-C; what runs on the server goes on"),
    ];
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// What a command answers to `main`.
pub type Outcome = Result<Exit, Failure>;

/// Why a command failed, for a person and for a script.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// One sentence: what did not work.
    message: String,
    /// More about it, a line each.
    details: Vec<String>,
    /// What to do next.
    hint: Option<String>,
    /// What the server said, when it did.
    problem: Option<Box<Problem>>,
    /// Address of the page about the problem.
    page: Option<String>,
    /// Nobody reads our output any more: say nothing, and this is no failure.
    quiet: bool,
}

impl Failure {
    /// A failure with its sentence.
    pub fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Self {
            exit,
            message: message.to_string(),
            details: Vec::new(),
            hint: None,
            problem: None,
            page: None,
            quiet: false,
        }
    }

    /// The command line is wrong in a way that only the command can see.
    pub fn usage(message: impl fmt::Display) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// An end that has been explained already, on standard error.
    pub fn explained(exit: Exit) -> Self {
        Self { quiet: true, ..Self::new(exit, "") }
    }

    /// With one more line about it.
    #[must_use]
    pub fn detail(mut self, line: impl fmt::Display) -> Self {
        self.details.push(line.to_string());
        self
    }

    /// With what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }

    /// What the server's problem means here. `base` is the server's address, for the problem's page.
    pub fn from_problem(problem: Problem, base: &str) -> Self {
        let exit = match problem.status {
            401 | 403 => Exit::Denied,
            404 => Exit::NotFound,
            408 | 500.. => Exit::Unreachable,
            _ => Exit::Refused,
        };
        let mut failure = Self::new(exit, &problem.detail);
        for error in &problem.errors {
            let place = if error.pointer.is_empty() { "(the whole body)" } else { &error.pointer };
            failure = failure.detail(format!("{place}: {}", error.detail));
        }
        if let Some(rejection) = problem.rejection.as_ref().filter(|r| !problem.detail.contains(&r.detail)) {
            failure = failure.detail(format!("{}: {}", rejection.code, rejection.detail));
        }
        failure.hint = next_step(&problem.code).map(str::to_owned);
        failure.page = Some(if problem.kind.starts_with('/') {
            format!("{base}{}", problem.kind)
        } else {
            problem.kind.clone()
        });
        failure.problem = Some(Box::new(problem));
        failure
    }

    /// The server's word for the kind of problem.
    pub fn code(&self) -> Option<&str> {
        self.problem.as_ref().map(|problem| problem.code.as_str())
    }

    /// Says it on standard error: for a person, or as one line of JSON. Returns the exit code.
    pub fn report(&self, json: bool, colour: bool) -> Exit {
        use std::io::Write as _;
        if !self.quiet {
            let text = if json { self.json() } else { self.text(colour) };
            // When standard error is gone there is nobody left to tell.
            let _ = std::io::stderr().lock().write_all(text.as_bytes());
        }
        self.exit
    }

    /// For a person.
    pub fn text(&self, colour: bool) -> String {
        let (red, dim, off) = if colour { ("\x1b[1;31m", "\x1b[2m", "\x1b[0m") } else { ("", "", "") };
        let mut text = format!("{red}sandbar:{off} {}", super::output::printable(&self.message));
        if let Some(code) = self.code() {
            text.push_str(&format!(" {dim}[{}]{off}", super::output::printable(code)));
        }
        text.push('\n');
        for line in &self.details {
            text.push_str(&format!("  {}\n", super::output::printable(line)));
        }
        if let Some(hint) = &self.hint {
            text.push_str(&format!("  next: {hint}\n"));
        }
        if let Some(page) = &self.page {
            text.push_str(&format!("  {dim}more: {}{off}\n", super::output::printable(page)));
        }
        text
    }

    /// For a script: one line.
    fn json(&self) -> String {
        let mut value = serde_json::json!({ "message": self.message, "exit": self.exit as u8 });
        if !self.details.is_empty() {
            value["details"] = self.details.clone().into();
        }
        if let Some(hint) = &self.hint {
            value["next"] = hint.clone().into();
        }
        if let Some(problem) = &self.problem {
            value["problem"] = serde_json::to_value(problem).unwrap_or_default();
        }
        format!("{}\n", serde_json::json!({ "error": value }))
    }
}

/// What helps against a problem, when a command does. The page of the problem has the rest.
fn next_step(code: &str) -> Option<&'static str> {
    Some(match code {
        "unauthenticated" => {
            "check the key: SANDBAR_API_KEY, --key-file, or `sandbar profile set` for a kept one"
        }
        "forbidden" => "use a key whose role may do this, or ask an admin of your tenant",
        "task-not-found" => "`sandbar tasks` lists the tasks; `sandbar push` uploads one",
        "version-not-found" | "version-rejected" => "`sandbar versions list TASK` shows which there are",
        "version-not-ready" => "try again in a moment; it is being compiled",
        "invocation-not-found" => "`sandbar list` shows the latest invocations",
        "not-finished" => "`sandbar logs -f ID` follows it to its end",
        "not-retryable" => "`sandbar get ID` shows its state; a new one starts with `sandbar invoke`",
        "input-mismatch" => "`sandbar tasks show TASK` prints the schema of the input",
        "wrong-input-kind" => {
            "a task or a request takes --input; a command takes --stdin, --env and arguments after `--`"
        }
        "task-inactive" => "`sandbar tasks update TASK --active true` switches it on again",
        "task-in-use" => "wait for them, or add --cancel to end them",
        "overloaded" | "database-unavailable" | "timeout" => "try again in a moment",
        _ => return None,
    })
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        if is_broken_pipe(&error) {
            return Self::explained(Exit::Done);
        }
        Self::new(Exit::Failed, format!("{error:#}"))
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        anyhow::Error::new(error).into()
    }
}

/// True when the reader of our output has gone (`sandbar list | head`): it has what it wanted.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::wire::problem::{FieldProblem, Rejection};

    fn problem(status: u16, code: &str) -> Problem {
        Problem {
            kind: format!("/errors/{code}"),
            title: "A title".to_owned(),
            status,
            code: code.to_owned(),
            detail: "what went wrong".to_owned(),
            errors: Vec::new(),
            rejection: None,
            quota: None,
        }
    }

    #[test]
    fn a_problem_is_shown_with_its_fields_its_code_the_next_step_and_its_page() {
        let mut problem = problem(422, "input-mismatch");
        problem.errors = vec![
            FieldProblem { pointer: "/input/top".to_owned(), detail: "-1 is less than 1".to_owned() },
            FieldProblem { pointer: String::new(), detail: "is not an object".to_owned() },
        ];
        let failure = Failure::from_problem(problem, "http://127.0.0.1:7260");
        insta::assert_snapshot!(failure.text(false));
        insta::assert_snapshot!(failure.json());
    }

    #[test]
    fn a_rejected_module_is_shown_with_the_reason() {
        let mut problem = problem(422, "module-unknown-import");
        problem.rejection = Some(Rejection {
            code: "unknown-import".to_owned(),
            detail: "it imports `env.f`, which no host offers".to_owned(),
        });
        insta::assert_snapshot!(Failure::from_problem(problem, "https://example.com").text(false));
    }

    #[test]
    fn each_kind_of_status_has_its_exit_code() {
        let exit = |status| Failure::from_problem(problem(status, "x"), "").exit;
        assert_eq!(exit(401), Exit::Denied);
        assert_eq!(exit(403), Exit::Denied);
        assert_eq!(exit(404), Exit::NotFound);
        assert_eq!(exit(409), Exit::Refused);
        assert_eq!(exit(422), Exit::Refused);
        assert_eq!(exit(429), Exit::Refused);
        assert_eq!(exit(500), Exit::Unreachable);
        assert_eq!(exit(503), Exit::Unreachable);
    }

    #[test]
    fn what_a_server_says_cannot_steer_the_terminal() {
        let mut problem = problem(422, "x");
        problem.detail = "a\x1b[2Jb".to_owned();
        assert!(!Failure::from_problem(problem, "").text(false).contains('\x1b'));
    }
}
