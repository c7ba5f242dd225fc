//! The same task in every language of `examples/languages`, uploaded and invoked through the public API; and what the
//! SDK says of itself and sends on the way. A language whose tools cannot be had is skipped, loudly.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{self, Client, Deployment, Process};

/// All languages, and whether they are tasks of our world (else WASI commands).
const LANGUAGES: [(&str, bool); 4] = [("rust", true), ("zig", false), ("python", true), ("javascript", true)];

/// Longest compilation of an interpreter of 18 MiB on a busy machine.
const COMPILATION: Duration = Duration::from_secs(240);

/// Longest first run of one, which begins with the compiled code's way to the cell.
const RUN: Duration = Duration::from_secs(120);

/// The component of a language, or none if its tools cannot be had.
fn built(language: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = root.join("scripts/languages.sh");
    let output = Command::new(script).arg(language).current_dir(root).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{language} does not build:\n{said}");
    if said.contains("SKIPPED") {
        // Past the capture of the test harness: a skip must be seen.
        let _ = writeln!(std::io::stderr(), "\n==== {said}====\n");
        return None;
    }
    Some(root.join(format!("target/languages/{language}.wasm")))
}

/// Uploads a module and waits until it has been compiled.
async fn upload(client: &Client, task: &str, module: &Path) {
    let answer = client.upload(task, module).await;
    let version = answer.json();
    assert!(answer.status.is_success(), "{task}: {version:#}");
    let path = format!("/v1/tasks/{task}/versions/{}", version["version"]);
    support::eventually(COMPILATION, "the compilation", async || {
        let version = client.get(&path).await.expect(200).json();
        assert_ne!(version["state"], "rejected", "{task}: {version:#}");
        (version["state"] == "ready").then_some(())
    })
    .await;
}

/// Runs a task on an input text to its end.
async fn end_of(client: &Client, task: &str, in_world: bool, input: &str) -> Value {
    let mut body = if in_world { json!({"input": null}) } else { json!({"stdin": input}) };
    if in_world {
        body["input"] = serde_json::from_str(input).unwrap();
    }
    body["retry"] = json!({"max_attempts": 1});
    let id = client.enqueue(task, &body).await.expect(202).json()["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/invocations/{id}");
    support::eventually(RUN, "the end", async || {
        let now = client.get(&path).await.expect(200).json();
        ["succeeded", "dead"].contains(&now["state"].as_str().unwrap()).then_some(now)
    })
    .await
}

/// The records of an invocation's log.
async fn records(client: &Client, ended: &Value) -> Vec<Value> {
    let path = format!("/v1/invocations/{}/logs", ended["id"].as_str().unwrap());
    let logs = client.get(&path).await.expect(200).json();
    logs["items"].as_array().unwrap().clone()
}

fn fields(record: &Value) -> BTreeMap<String, String> {
    serde_json::from_value(record["fields"].clone()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_task_in_every_language_gives_the_same_answer() {
    // One process, so that the interpreters are compiled once and not by server and worker.
    let data = support::data_dir();
    let (process, client) = Process::dev(&data.path().join("dev")).await;
    let mut ran = Vec::new();
    for (language, in_world) in LANGUAGES {
        let Some(module) = built(language) else { continue };
        let task = format!("text-stats-{language}");
        upload(&client, &task, &module).await;

        for (text, expected) in [
            ("one two\nthree seven\n", json!({"lines": 2, "words": 4, "longest": "three"})),
            ("", json!({"lines": 0, "words": 0, "longest": ""})),
            (" \t\r\n", json!({"lines": 1, "words": 0, "longest": ""})),
            ("abc äö 日本\n\nx", json!({"lines": 3, "words": 4, "longest": "日本"})),
        ] {
            let ended = end_of(&client, &task, in_world, &json!({"text": text}).to_string()).await;
            assert_eq!(ended["state"], "succeeded", "{language}: {ended:#}");
            let path = format!("/v1/invocations/{}/result", ended["id"].as_str().unwrap());
            let result = client.get(&path).await.expect(200);
            assert_eq!(result.json(), expected, "{language} of {text:?}");

            let records = records(&client, &ended).await;
            let said = records.iter().find(|r| r["message"].as_str().unwrap().contains("counted the words"));
            let said = said.unwrap_or_else(|| panic!("{language}: {records:#?}"));
            if in_world {
                let fields = fields(said);
                assert_eq!(fields["words"], expected["words"].to_string(), "{language}: {said:#}");
                assert_eq!(fields["attempt"], "1", "{language}: {said:#}");
                assert_eq!(said["level"], "info", "{language}: {said:#}");
                assert_eq!(result.headers["content-type"], "application/json", "{language}");
            }
        }

        // A task that says what it takes is not even queued with something else. Of the others, what no other attempt
        // can mend is fatal in our world; a program can only fail.
        let wrong = "{\"text\": 7}";
        if language == "rust" {
            let refused = client.enqueue(&task, &json!({"input": {"text": 7}})).await.expect(422).json();
            assert_eq!(refused["code"], "input-mismatch", "{refused:#}");
        } else {
            let ended = end_of(&client, &task, in_world, wrong).await;
            assert_eq!(ended["state"], "dead", "{language}: {ended:#}");
            let termination = &ended["attempts"][0]["termination"];
            let reason = if in_world { "guest-error" } else { "exit-code" };
            assert_eq!(termination["reason"], reason, "{language}: {ended:#}");
            if in_world {
                assert_eq!(termination["retryable"], false, "{language}: {ended:#}");
            }
        }
        ran.push(language);
    }
    process.terminate().await;
    // Two or more, unless nothing can be had: Rust is always here.
    assert!(ran.contains(&"rust"), "{ran:?}");
    let _ = writeln!(std::io::stderr(), "\nlanguages: built and run through the API: {}\n", ran.join(", "));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_of_both_logging_facades_reach_the_host_with_their_fields() {
    let deployment = Deployment::start(1).await;
    let client = deployment.client();

    // `tracing`.
    upload(&client, "with-tracing", &built("rust").unwrap()).await;
    let ended = end_of(&client, "with-tracing", true, r#"{"text": "a b"}"#).await;
    let said = records(&client, &ended).await;
    assert_eq!(said.len(), 1, "{said:#?}");
    assert_eq!((&said[0]["level"], &said[0]["message"]), (&json!("info"), &json!("counted the words")));
    assert_eq!(said[0]["target"], "text_stats");
    let expected = [("attempt", "1"), ("words", "2")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    assert_eq!(fields(&said[0]), BTreeMap::from(expected));

    // `log`.
    upload(&client, "with-log", &support::guest("word-count")).await;
    let ended = end_of(&client, "with-log", true, r#"{"text": "a b a"}"#).await;
    let said = records(&client, &ended).await;
    assert_eq!(said.len(), 1, "{said:#?}");
    let expected = [("distinct", "2"), ("total", "3")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    assert_eq!(fields(&said[0]), BTreeMap::from(expected));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_module_says_of_itself_is_shown_and_a_wish_out_of_bounds_is_refused_by_name() {
    let deployment = Deployment::start(1).await;
    let client = deployment.client();
    upload(&client, "text-stats", &built("rust").unwrap()).await;
    let version = client.get("/v1/tasks/text-stats/versions/1").await.expect(200).json();
    let manifest = &version["manifest"];
    assert_eq!(manifest["name"], "text-stats");
    assert_eq!(manifest["description"], "Counts the lines and words of a text and finds its longest word.");
    assert_eq!(manifest["limits"], json!({"timeout_ms": 10_000}));
    assert_eq!(manifest["retry"], json!({"max_attempts": 2}));
    assert_eq!(manifest["input_schema"]["properties"]["text"]["description"], "Any text.");
    assert_eq!(manifest["output_schema"]["required"], json!(["lines", "words", "longest"]));
    assert!(manifest["grants"].is_null(), "{manifest:#}");

    let module = std::fs::read(support::guest("echo")).unwrap();
    let grants =
        json!({"http": ["api.example.com"], "kv": true, "secrets": ["TOKEN"], "scratch_bytes": 4096});
    let wishing = with_section(&module, &json!({"name": "wishes", "grants": grants}));
    client.upload_bytes("wishes", wishing).await.expect(201);
    let version = client.get("/v1/tasks/wishes/versions/1").await.expect(200).json();
    assert_eq!(version["manifest"]["grants"], grants);

    let greedy = with_section(&module, &json!({"grants": {"http": ["https://example.com/path"]}}));
    let refused = client.upload_bytes("greedy", greedy).await.expect(422).json();
    assert_eq!(refused["code"], "module-bad-manifest", "{refused:#}");
    assert!(refused["detail"].as_str().unwrap().contains("grants.http"), "{refused:#}");
}

/// A component with a self-description of its own, which goes before what is within.
fn with_section(module: &[u8], manifest: &Value) -> Vec<u8> {
    let (name, text) = ("sandbar:task", manifest.to_string());
    let mut content = vec![u8::try_from(name.len()).unwrap()];
    content.extend_from_slice(name.as_bytes());
    content.extend_from_slice(text.as_bytes());
    let mut module = module.to_vec();
    module.push(0);
    // LEB128 of two bytes.
    let len = u16::try_from(content.len()).unwrap();
    module.extend([u8::try_from(len & 0x7f).unwrap() | 0x80, u8::try_from(len >> 7).unwrap()]);
    module.extend(content);
    module
}
