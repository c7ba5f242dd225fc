//! Following an invocation while it runs: log, progress, state, end; and Ctrl-C, which ends nothing but the following.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use serde_json::{Value, json};

use super::{Person, Said};
use crate::support::{self, Deployment};

async fn start(guests: &[&str]) -> (Deployment, Person) {
    let deployment = Deployment::start(1).await;
    let person = Person::of(&deployment);
    for task in guests {
        let module = support::guest(task).display().to_string();
        person.run(&["push", &module, "--task", task]).expect(0);
    }
    (deployment, person)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn following_shows_log_and_progress_and_ends_with_the_result() {
    let (_deployment, person) = start(&["word-count"]).await;
    let followed =
        person.run(&["invoke", "word-count", "--input", r#"{"text": "a b a"}"#, "--follow"]).expect(0);
    assert_eq!(followed.document()["total"], 3);
    assert!(followed.err.contains("counted the words of 5 bytes"), "{followed:?}");
    assert!(followed.err.contains("2/2 sorted"), "{followed:?}");
    assert!(followed.err.contains("succeeded") && followed.err.contains("fuel "), "{followed:?}");
    assert!(!followed.err.contains('\x1b'), "{followed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_json_following_is_a_stream_of_events_that_begins_and_ends_with_the_invocation() {
    let (_deployment, person) = start(&["flaky"]).await;
    let input = r#"{"succeed_on": 3}"#;
    let events =
        person.run(&["invoke", "flaky", "--input", input, "--follow", "--json"]).expect(0).documents();
    assert_eq!(events.first().unwrap()["event"], "accepted");
    let logged: Vec<&Value> =
        events.iter().filter(|e| e["event"] == "log").map(|e| &e["data"]["attempt"]).collect();
    assert_eq!(logged, [&json!(1), &json!(2), &json!(3)]);
    let end = events.last().unwrap();
    assert_eq!((&end["event"], &end["data"]["state"]), (&json!("end"), &json!("succeeded")));
    assert_eq!(end["data"]["result"]["json"]["attempt"], 3);
    assert_eq!(events.iter().filter(|e| e["event"] == "end").count(), 1);

    let id = end["data"]["id"].as_str().unwrap();
    let logs = person.run(&["logs", "-f", id, "--json"]).expect(0).documents();
    assert_eq!(logs.len(), 3);
    assert!(logs.iter().all(|record| record["level"] == "info"));
    assert_eq!(person.run(&["logs", id, "--attempt", "2", "--json"]).expect(0).documents().len(), 1);
    assert_eq!(person.run(&["logs", id, "--level", "warn", "--json"]).expect(0).documents().len(), 0);
    assert_eq!(person.run(&["logs", id, "--since", "1h", "--json"]).expect(0).documents().len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn following_a_failure_ends_with_one_and_a_retry_of_it_is_another_invocation() {
    let (_deployment, person) = start(&["flaky"]).await;
    let input = r#"{"succeed_on": 3}"#;
    let failed =
        person.run(&["invoke", "flaky", "--input", input, "--max-attempts", "2", "--follow"]).expect(1);
    assert!(failed.out.is_empty() && failed.err.contains("attempt 2 fails as asked"), "{failed:?}");
    let dead = person.run(&["list", "--state", "dead", "--json"]).expect(0).document();
    let id = dead["id"].as_str().unwrap();
    let again = person.run(&["retry", id, "--json"]).expect(0).document();
    assert_eq!(again["retry_of"], id);
    assert_ne!(again["id"], id);
    person.run(&["get", again["id"].as_str().unwrap(), "--follow"]).expect(1);
    let succeeded = person.run(&["invoke", "flaky", "--input", r#"{"succeed_on": 1}"#, "--wait", "--json"]);
    let succeeded = succeeded.expect(0).document()["id"].as_str().unwrap().to_owned();
    let refused = person.run(&["retry", &succeeded]).expect(6);
    assert!(refused.err.contains("[not-retryable]") && refused.err.contains("next:"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ctrl_c_while_following_says_that_it_goes_on_and_how_to_come_back() {
    let (_deployment, person) = start(&["echo"]).await;
    let args = ["invoke", "echo", "--input", "1", "--delay", "1h", "--follow"];
    let mut command = person.command(person.dir(), &args);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    // The id is said as soon as it is known.
    let first = lines.next().unwrap().unwrap();
    let id = first.split_whitespace().last().unwrap().to_owned();
    support::kill(child.id(), rustix::process::Signal::INT);
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    let rest = rest.join("\n");
    assert!(rest.contains("goes on") && rest.contains(&format!("sandbar logs -f {id}")), "{rest}");
    assert_eq!(person.run(&["get", &id, "--json"]).expect(0).document()["state"], "scheduled");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_are_changed_and_deleted_and_modules_downloaded_as_they_were() {
    let (_deployment, person) = start(&["echo"]).await;
    person.run(&["tasks", "update", "echo", "--timeout", "7s", "--description", "Says it again"]).expect(0);
    let shown = person.run(&["tasks", "show", "echo", "--json"]).expect(0).document();
    assert_eq!(
        (&shown["limits"]["timeout_ms"], &shown["description"]),
        (&json!(7_000), &json!("Says it again"))
    );
    person.run(&["tasks", "update", "echo", "--timeout", "default"]).expect(0);
    assert!(person.run(&["tasks", "show", "echo", "--json"]).expect(0).document()["limits"].is_null());
    person.run(&["tasks", "update", "echo"]).expect(2);
    person.run(&["tasks", "update", "echo", "--active", "false"]).expect(0);
    let refused = person.run(&["invoke", "echo", "--input", "1"]).expect(6);
    assert!(refused.err.contains("[task-inactive]") && refused.err.contains("--active true"), "{refused:?}");
    person.run(&["tasks", "update", "echo", "--active", "true"]).expect(0);

    let got = person.run(&["versions", "download", "echo", "1", "--json"]).expect(0).document();
    assert_eq!(got["file"], "echo-1.wasm");
    let bytes = std::fs::read(person.dir().join("echo-1.wasm")).unwrap();
    assert_eq!(bytes, std::fs::read(support::guest("echo")).unwrap());

    person.run(&["invoke", "echo", "--input", "1", "--delay", "1h"]).expect(0);
    person.run(&["tasks", "delete", "echo"]).expect(2);
    let used: Said = person.run(&["tasks", "delete", "echo", "--yes"]).expect(6);
    assert!(used.err.contains("[task-in-use]"), "{used:?}");
    person.run(&["tasks", "delete", "echo", "--yes", "--cancel"]).expect(0);
    person.run(&["tasks", "show", "echo"]).expect(3);
}
