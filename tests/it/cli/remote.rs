//! Commands that talk to a server: data on stdout and nothing else, exit codes, failures that say what to do.

use serde_json::json;

use super::Person;
use crate::support::{self, Deployment};

/// A deployment with the guests `echo`, `flaky` and `command`, and a person who may use it.
async fn start() -> (Deployment, Person) {
    let deployment = Deployment::start(1).await;
    let person = Person::of(&deployment);
    for task in ["echo", "flaky"] {
        let module = support::guest(task).display().to_string();
        person.run(&["push", &module, "--task", task]).expect(0);
    }
    let module = support::guest("command").display().to_string();
    person.run(&["push", &module, "--task", "command"]).expect(0);
    (deployment, person)
}

/// Runs `echo`, waits, and gives the id.
fn echoed(person: &Person, input: &str) -> String {
    let ended = person.run(&["invoke", "echo", "--input", input, "--wait", "--json"]).expect(0).document();
    ended["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_command_prints_json_and_nothing_else_on_stdout() {
    let (_deployment, person) = start().await;
    let module = support::guest("echo").display().to_string();
    let pushed = person.run(&["push", &module, "--task", "echo", "--json"]).expect(0).document();
    assert_eq!((&pushed["version"], &pushed["state"]), (&json!(1), &json!("ready")));

    let accepted = person.run(&["invoke", "echo", "--input", "1", "--json"]).expect(0).document();
    let id = accepted["id"].as_str().unwrap();
    let waited = person.run(&["get", id, "--wait", "--json"]).expect(0).document();
    assert_eq!((&waited["state"], &waited["result"]["json"]), (&json!("succeeded"), &json!(1)));
    assert_eq!(person.run(&["get", id, "--json"]).expect(0).document()["id"], id);
    for line in person.run(&["list", "--json"]).expect(0).documents() {
        assert!(line["id"].is_string());
    }
    assert_eq!(person.run(&["tasks", "--json"]).expect(0).documents().len(), 3);
    assert_eq!(person.run(&["tasks", "list", "--json"]).expect(0).documents().len(), 3);
    assert_eq!(person.run(&["tasks", "show", "echo", "--json"]).expect(0).document()["name"], "echo");
    assert_eq!(person.run(&["versions", "list", "echo", "--json"]).expect(0).documents().len(), 1);
    assert_eq!(person.run(&["versions", "show", "echo", "1", "--json"]).expect(0).document()["version"], 1);

    let ahead =
        person.run(&["invoke", "echo", "--input", "2", "--delay", "1h", "--json"]).expect(0).document();
    assert_eq!(ahead["state"], "scheduled");
    let ahead = ahead["id"].as_str().unwrap();
    assert_eq!(person.run(&["cancel", ahead, "--json"]).expect(0).document()["state"], "cancelled");
    let again = person.run(&["cancel", ahead, "--json"]).expect(6).error();
    assert_eq!((&again["exit"], &again["problem"]["code"]), (&json!(6), &json!("already-finished")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_for_scripts_is_on_stdout_and_what_is_for_people_is_not() {
    let (_deployment, person) = start().await;
    let accepted = person.run(&["invoke", "echo", "--input", "1"]).expect(0);
    let id = accepted.out.trim_end();
    assert_eq!(id.len(), 36, "{accepted:?}");
    assert!(accepted.err.contains(&format!("sandbar logs -f {id}")), "{accepted:?}");

    // Results are not decorated.
    let waited = person.run(&["invoke", "echo", "--wait", "--input", r#"{"n": 1}"#]).expect(0);
    assert_eq!(waited.out, r#"{"n":1}"#);
    assert!(waited.err.contains("succeeded") && waited.err.contains("fuel "), "{waited:?}");
    let file = person.dir().join("input.json");
    std::fs::write(&file, "[1]").unwrap();
    let from_file = person.run(&["invoke", "echo", "--wait", "--input", &format!("@{}", file.display())]);
    assert_eq!(from_file.expect(0).out, "[1]");
    assert_eq!(person.run_with(&["invoke", "echo", "--wait", "--input", "-"], "[2]").expect(0).out, "[2]");
    let raw = person.run_with(&["invoke", "echo", "--wait", "--raw", "--input", "-"], r#""bytes""#).expect(0);
    assert_eq!(raw.out, r#""bytes""#);

    let command = ["invoke", "command", "--wait", "--stdin", "-", "--env", "A=b", "--", "one", "--exit", "0"];
    let told = person.run_with(&command, "to a command\n").expect(0);
    assert_eq!(told.out, "TO A COMMAND\n");
    let latest = person.run(&["list", "--task", "command", "--json"]).expect(0).document();
    let logged = person.run(&["logs", latest["id"].as_str().unwrap()]).expect(0);
    assert!(logged.out.contains("arg one") && logged.out.contains("env A=b"), "{logged:?}");

    for args in [&["list"][..], &["tasks"], &["get", id], &["logs", id], &["versions", "list", "echo"]] {
        let said = person.run(args).expect(0);
        assert!(!said.out.contains('\x1b') && !said.err.contains('\x1b'), "{said:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_are_filtered_and_cut_and_go_through_all_pages() {
    let (_deployment, person) = start().await;
    for n in 0..5 {
        let tag = format!("n={n}");
        person.run(&["invoke", "echo", "--input", "1", "--tag", &tag, "--tag", "team:a"]).expect(0);
    }
    let list = |args: &[&str]| {
        let args: Vec<&str> = ["list", "--json"].iter().chain(args).copied().collect();
        person.run(&args).expect(0).documents()
    };
    assert_eq!(list(&["--tag", "n=3"]).len(), 1);
    assert_eq!(list(&["--tag", "team=a", "--task", "echo"]).len(), 5);
    assert_eq!(list(&["--task", "flaky"]).len(), 0);
    assert_eq!(list(&["-n", "2"]).len(), 2);
    assert_eq!(list(&["--all"]).len(), 5);
    let cut = person.run(&["list", "-n", "2"]).expect(0);
    assert_eq!(cut.out.lines().count(), 3, "{cut:?}");
    assert!(cut.err.contains("--all"), "{cut:?}");
    person.run(&["list", "--state", "sleeping"]).expect(2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_module_that_the_server_does_not_take_is_said_to_be_too_large() {
    let settings = [("SANDBAR_SERVER__MAX_MODULE_BYTES", (1 << 20).to_string())];
    let deployment = Deployment::on(support::database().await, 0, &settings).await;
    let person = Person::of(&deployment);
    std::fs::write(person.dir().join("large.wasm"), vec![0; 48 << 20]).unwrap();
    let refused = person.run(&["push", "large.wasm", "--task", "t"]);
    // The answer, or the connection that ended before it.
    let told = refused.err.contains("[module-too-large]")
        || refused.err.contains("server.max_module_bytes") && refused.err.contains("this one has 48.0 MiB");
    assert!(told && refused.code != 0, "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_of_failure_has_its_exit_code_and_says_what_to_do() {
    let (deployment, mut person) = start().await;
    let nobody = uuid::Uuid::nil().to_string();
    for (args, code) in [
        (&["invoke", "echo", "--input", "Ada"][..], 2),
        (&["invoke", "Echo"], 2),
        (&["get", "not-an-id"], 2),
        (&["get", &nobody], 3),
        (&["invoke", "nothing"], 3),
        (&["push", "nowhere.wasm"], 3),
        (&["versions", "show", "echo", "99"], 3),
        (&["invoke", "command", "--input", "1"], 6),
        (&["--profile", "x"], 2),
        (&["list", "--profile", "x"], 3),
    ] {
        let said = person.run(args).expect(code);
        assert!(said.out.is_empty(), "{said:?}");
    }
    let unknown = person.run(&["invoke", "nothing"]).expect(3);
    let shown = unknown.err.replace(&deployment.url(), "http://SERVER");
    insta::assert_snapshot!("an_unknown_task", shown);
    let text = person.run(&["invoke", "echo", "--input", "Ada"]).expect(2);
    insta::assert_snapshot!("an_input_that_is_not_json", text.err);

    let file = person.dir().join("text.wasm");
    std::fs::write(&file, "(module)").unwrap();
    let refused = person.run(&["push", "text.wasm", "--task", "t", "--json"]).expect(6).error();
    assert_eq!(refused["problem"]["code"], "module-text-format");

    person.set("SANDBAR_API_KEY", "sbk_wrong");
    let denied = person.run(&["list"]).expect(4);
    assert!(denied.err.contains("[unauthenticated]") && denied.err.contains("next:"), "{denied:?}");
    person.set("SANDBAR_URL", "http://127.0.0.1:9");
    let gone = person.run(&["list"]).expect(5);
    assert!(gone.err.contains("cannot be reached") && gone.err.contains("next:"), "{gone:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_invocation_ends_with_one_and_shows_each_attempt() {
    let (_deployment, person) = start().await;
    let module = support::guest("trap").display().to_string();
    person.run(&["push", &module, "--task", "trap"]).expect(0);
    let failed = person
        .run(&["invoke", "trap", "--input", r#"{"mode": "unreachable"}"#, "--max-attempts", "1", "--wait"])
        .expect(1);
    assert!(failed.out.is_empty(), "{failed:?}");
    assert!(
        failed.err.contains("dead") && failed.err.contains("attempt 1  trap (unreachable)"),
        "{failed:?}"
    );
    assert!(failed.err.contains("    at ") && failed.err.contains("sandbar retry "), "{failed:?}");
    let json = person
        .run(&[
            "invoke",
            "trap",
            "--input",
            r#"{"mode": "unreachable"}"#,
            "--max-attempts",
            "1",
            "--wait",
            "--json",
        ])
        .expect(1)
        .document();
    assert_eq!(json["state"], "dead");

    let waits = person.run(&["invoke", "echo", "--input", "1", "--delay", "1h", "--wait=1s"]).expect(7);
    assert!(waits.err.contains("scheduled") && waits.err.contains("sandbar get"), "{waits:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_key_gives_the_same_invocation() {
    let (_deployment, person) = start().await;
    let invoke = |input: &str| person.run(&["invoke", "echo", "--input", input, "--idempotency-key", "k1"]);
    let first = invoke("1").expect(0);
    let second = invoke("1").expect(0);
    assert_eq!(first.out, second.out);
    assert!(second.err.contains("used before"), "{second:?}");
    invoke("2").expect(6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_goes_away_is_no_failure() {
    let (_deployment, person) = start().await;
    let id = echoed(&person, "1");
    for args in [
        &["list", "--json"][..],
        &["list"],
        &["get", &id],
        &["get", &id, "--result"],
        &["completions", "zsh"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ended = person.command(person.dir(), args).stdout(writer).output().unwrap();
        assert!(ended.status.success() && ended.stderr.is_empty(), "{args:?}: {ended:?}");
    }
}
