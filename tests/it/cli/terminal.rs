//! On a terminal: bars, colour, and neither where there is none. The terminal is that of `script`, which every Debian has.

use std::process::Command;

use super::{Person, Said};
use crate::support::{self, Deployment};

/// Runs it on a terminal; what it shows there, of both outputs.
fn on_terminal(person: &Person, args: &[&str]) -> String {
    let plain = person.command(person.dir(), args);
    let quoted = |text: &std::ffi::OsStr| format!("'{}'", text.to_str().unwrap().replace('\'', r"'\''"));
    let line: Vec<String> =
        std::iter::once(plain.get_program()).chain(plain.get_args()).map(quoted).collect();
    let mut command = Command::new("script");
    command.args(["--quiet", "--return", "--command", &line.join(" "), "/dev/null"]);
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.env("TERM", "xterm").env_remove("NO_COLOR").current_dir(person.dir());
    Said::of(command.stdin(std::process::Stdio::null()).output().unwrap()).expect(0).out
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_and_waits_show_bars_and_colour_on_a_terminal_and_nowhere_else() {
    let deployment = Deployment::start(1).await;
    let person = Person::of(&deployment);
    let module = support::guest("flaky").display().to_string();
    let shown = on_terminal(&person, &["push", &module, "--task", "flaky"]);
    assert!(shown.contains("uploading flaky") && shown.contains("KiB/"), "{shown:?}");
    // In colours, which stand between the words.
    assert!(shown.contains("ready"), "{shown:?}");
    let wait = ["invoke", "flaky", "--input", r#"{"succeed_on": 2}"#, "--wait"];
    let waited = on_terminal(&person, &wait);
    // The spinner beside what it waits for, wiped at the end, and the last word in green.
    assert!(waited.contains("\x1b[2K") && waited.contains("\x1b[32m"), "{waited:?}");
    assert!(waited.contains("succeeded") && waited.contains(r#""attempt":2"#), "{waited:?}");

    let json = on_terminal(&person, &["push", &module, "--task", "again", "--json"]);
    assert!(!json.contains("uploading") && !json.contains('\x1b'), "{json:?}");
    let piped = person.run(&["push", &module, "--task", "piped"]).expect(0);
    assert!(!piped.err.contains("uploading") && !piped.err.contains('\x1b'), "{piped:?}");
    let piped = person.run(&wait).expect(0);
    assert!(!piped.err.contains('\x1b'), "{piped:?}");
}
