//! The clients of `examples/clients` against a real server: what they print, how they end, and that a lost answer makes
//! no second invocation.

use std::process::Output;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;

use super::{file, patient};
use crate::support::{self, ADMIN_KEY};

/// Longest run of a client.
const LIMIT: Duration = Duration::from_secs(120);
/// Longest silence of a client that is still sending its request.
const PAUSE: Duration = Duration::from_millis(300);

/// Runs a client to its end, with the key and the address of a server.
async fn client(program: &str, script: &str, url: &str, key: &str, args: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(program);
    command.arg(file(script)).args(args).env("SANDBAR_URL", url).env("SANDBAR_KEY", key);
    command.env("PYTHONDONTWRITEBYTECODE", "1").kill_on_drop(true);
    tokio::time::timeout(LIMIT, command.output()).await.expect("the client does not end").unwrap()
}

async fn python(url: &str, args: &[&str]) -> Output {
    client("python3", "clients/python/sandbar_client.py", url, ADMIN_KEY, args).await
}

async fn curl(url: &str, args: &[&str]) -> Output {
    client("bash", "clients/curl.sh", url, ADMIN_KEY, args).await
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_curl_script_goes_the_whole_way_and_its_exit_code_tells() {
    let deployment = patient(&[]).await;
    let url = deployment.client().base().to_owned();
    let module = support::guest("word-count").display().to_string();
    let dir = tempfile::tempdir().unwrap();
    let request = dir.path().join("request.json");
    std::fs::write(&request, r#"{"input": {"text": "The cat saw the dog.", "top": 1}}"#).unwrap();
    let request = request.display().to_string();

    let ran = curl(&url, &["word-count", &module, &request]).await;
    assert_eq!(ran.status.code(), Some(0), "{}", stderr(&ran));
    let result: Value = serde_json::from_slice(&ran.stdout).unwrap();
    assert_eq!(result, json!({"total": 5, "distinct": 4, "top": [{"word": "the", "count": 2}]}));
    let said = stderr(&ran);
    for part in ["word-count version 1 is ready", "counted the words", "\"fuel\":", "state    succeeded"] {
        assert!(said.contains(part), "no {part} in {said}");
    }
    assert!(!said.contains(ADMIN_KEY));

    // A task that ends badly, and requests that are refused.
    let flaky = support::guest("flaky").display().to_string();
    let dead = dir.path().join("dead.json");
    std::fs::write(&dead, r#"{"input": {"succeed_on": 9}, "retry": {"max_attempts": 2, "initial_ms": 1}}"#)
        .unwrap();
    let wrong = dir.path().join("wrong.json");
    std::fs::write(&wrong, r#"{"input": {"words": 1}}"#).unwrap();
    let no_module = dir.path().join("no.wasm");
    std::fs::write(&no_module, "no module").unwrap();
    for (args, code, says) in [
        (&["flaky", &flaky, dead.to_str().unwrap()][..], 1, "attempt 2 fails as asked"),
        (&["word-count", &module, wrong.to_str().unwrap()], 1, "input-mismatch"),
        (&["no-module", no_module.to_str().unwrap()], 1, "module-not-wasm"),
        (&["word-count"], 2, "curl.sh TASK MODULE.wasm"),
    ] {
        let ran = curl(&url, args).await;
        assert_eq!(ran.status.code(), Some(code), "{args:?}: {}", stderr(&ran));
        assert!(stderr(&ran).contains(says), "{args:?}: {}", stderr(&ran));
        assert!(ran.stdout.is_empty());
    }
    let ran = client("bash", "clients/curl.sh", &url, "sbk_wrong", &["word-count", &module]).await;
    assert!(ran.status.code() == Some(1) && stderr(&ran).contains("unauthenticated"), "{}", stderr(&ran));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_client_pushes_invokes_and_follows() {
    let deployment = patient(&[]).await;
    let url = deployment.client().base().to_owned();
    let module = support::guest("order-import").display().to_string();
    let pushed = python(&url, &["push", "order-import", &module]).await;
    assert!(pushed.status.success() && stderr(&pushed).contains("version 1 is ready"), "{}", stderr(&pushed));

    let request = json!({"input": {
        "orders": [{"id": "a", "cents": 100}, {"id": "ü", "cents": 250}],
        "outage": {"attempts": 2, "retry_after_ms": 50},
    }})
    .to_string();
    for follow in [false, true] {
        let mut args = vec!["invoke", "order-import", "--request", &request];
        if follow {
            args.push("--follow");
        }
        let ran = python(&url, &args).await;
        let said = stderr(&ran);
        assert_eq!(ran.status.code(), Some(0), "{said}");
        let result: Value = serde_json::from_slice(&ran.stdout).unwrap();
        assert_eq!(result["cents"], 350);
        for part in ["#1 guest-error: fuel ", "#2 guest-error: fuel ", "#3 succeeded: fuel "] {
            assert!(said.contains(part), "no {part} in {said}");
        }
        let logged = ["#1 warn  the supplier is down", "#3 debug booked", "order=ü", "#3 info  imported"];
        assert!(logged.iter().all(|part| said.contains(part) == follow), "{said}");
        let id = result["keys"][0].as_str().unwrap().split('/').next().unwrap();
        for args in [&["logs", id][..], &["logs", id, "--follow"]] {
            let logs = python(&url, args).await;
            let lines = String::from_utf8(logs.stdout.clone()).unwrap();
            assert!(logs.status.success() && lines.lines().count() == 8, "{lines}{}", stderr(&logs));
        }
    }

    let request = r#"{"input": {"orders": [{"id": "a", "cents": 0}]}}"#;
    let dead = python(&url, &["invoke", "order-import", "--request", request, "--follow"]).await;
    assert!(dead.status.code() == Some(1) && dead.stdout.is_empty(), "{}", stderr(&dead));
    let refused = python(&url, &["invoke", "nothing"]).await;
    assert!(
        refused.status.code() == Some(1) && stderr(&refused).contains("task-not-found"),
        "{}",
        stderr(&refused)
    );
}

/// Reads from a connection until the other side waits for an answer.
async fn request(connection: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    while let Ok(Ok(n)) = tokio::time::timeout(PAUSE, connection.read(&mut part)).await {
        if n == 0 {
            break;
        }
        bytes.extend_from_slice(&part[..n]);
    }
    bytes
}

/// A way to a server that has troubles: request number `first` is told to come back, the next one arrives and its
/// answer is lost, all others go through.
async fn troubled(server: String, first: u32) -> (String, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let serving = tokio::spawn(async move {
        for number in 1.. {
            let (mut from, _) = listener.accept().await.unwrap();
            if number == first {
                request(&mut from).await;
                let body = r#"{"code": "overloaded", "detail": "as the test wants"}"#;
                let length = body.len();
                let answer = format!(
                    "HTTP/1.1 503 Service Unavailable\r\nretry-after: 0\r\nconnection: close\r\n\
                     content-type: application/problem+json\r\ncontent-length: {length}\r\n\r\n{body}"
                );
                from.write_all(answer.as_bytes()).await.unwrap();
                continue;
            }
            let mut to = TcpStream::connect(&server).await.unwrap();
            if number == first + 1 {
                to.write_all(&request(&mut from).await).await.unwrap();
                // The head of the answer: by now the invocation is durable. It goes nowhere.
                assert!(to.read(&mut [0; 512]).await.unwrap() > 0);
                continue;
            }
            tokio::spawn(async move { copy_bidirectional(&mut from, &mut to).await });
        }
    });
    (url, AbortOnDropHandle::new(serving))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_clients_come_back_after_retry_after_and_a_lost_answer_makes_no_second_invocation() {
    let deployment = patient(&[]).await;
    let api = deployment.client();
    let server = api.base().strip_prefix("http://").unwrap().to_owned();
    api.upload("word-count", &support::guest("word-count")).await.expect(201);
    let request = r#"{"input": {"text": "once"}}"#;

    let (url, _serving) = troubled(server.clone(), 1).await;
    let ran = python(&url, &["invoke", "word-count", "--request", request]).await;
    assert_eq!(ran.status.code(), Some(0), "{}", stderr(&ran));
    let made = async || api.get("/v1/invocations?task=word-count").await.expect(200).json();
    assert_eq!(made().await["items"].as_array().unwrap().len(), 1, "python");

    // Its first request is the upload.
    let (url, _serving) = troubled(server, 2).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("request.json");
    std::fs::write(&file, request).unwrap();
    let module = support::guest("word-count").display().to_string();
    let ran = curl(&url, &["word-count", &module, file.to_str().unwrap()]).await;
    assert_eq!(ran.status.code(), Some(0), "{}", stderr(&ran));
    assert_eq!(made().await["items"].as_array().unwrap().len(), 2, "curl");
}

/// What stands in a README in the block of code that begins with a line.
fn block(readme: &str, first: &str) -> Option<String> {
    let (_, rest) = readme.split_once(&format!("```{first}\n"))?;
    Some(rest.split_once("\n```")?.0.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_readmes_show_requests_that_work_and_their_real_results() {
    let deployment = patient(&[]).await;
    let url = deployment.client().base().to_owned();
    let dir = tempfile::tempdir().unwrap();
    for example in ["word-count", "csv-report", "order-import", "markdown", "jaq"] {
        let readme = std::fs::read_to_string(file(example).join("README.md")).unwrap();
        let request = dir.path().join("request.json");
        std::fs::write(&request, block(&readme, "json request").expect(example)).unwrap();
        let module = if example == "jaq" { support::jaq() } else { support::guest(example) };
        let ran = curl(&url, &[example, module.to_str().unwrap(), request.to_str().unwrap()]).await;
        assert!(ran.status.success(), "{example}: {}", stderr(&ran));
        let Some(shown) = block(&readme, "json result") else {
            let shown = block(&readme, "text result").or(block(&readme, "html result")).expect(example);
            assert_eq!(String::from_utf8(ran.stdout).unwrap().trim(), shown.trim(), "{example}");
            continue;
        };
        let shown: Value = serde_json::from_str(&shown).unwrap_or_else(|error| panic!("{example}: {error}"));
        let mut result: Value = serde_json::from_slice(&ran.stdout).unwrap();
        if example == "order-import" {
            // They begin with the id of the invocation.
            result.as_object_mut().unwrap().remove("keys");
        }
        assert_eq!(result, shown, "{example}");
    }
}
