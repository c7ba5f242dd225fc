//! Real guests on a real deployment, through HTTP and through `sandbar run`: how each ends, what it may reach, and
//! what is said of it.

use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{self, Client, Deployment};

/// The end of one invocation without retries, with these limits.
async fn end_of(client: &Client, task: &str, input: Value, limits: Value) -> Value {
    let body = json!({"input": input, "limits": limits, "retry": {"max_attempts": 1}});
    client.invoke(task, &body).await.expect(200).json()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_way_to_end_has_its_reason_and_its_receipt() {
    let deployment = Deployment::start(1).await;
    let client = deployment.client();
    client.upload("trap", &support::guest("trap")).await.expect(201);
    let small = json!({"fuel": 500_000_000u64});
    for (input, limits, reason, kind) in [
        (json!({"mode": "panic", "message": "oh"}), json!({}), "trap", Some("unreachable")),
        (json!({"mode": "unreachable"}), json!({}), "trap", Some("unreachable")),
        (json!({"mode": "out-of-bounds"}), json!({}), "trap", Some("memory-out-of-bounds")),
        (json!({"mode": "stack-overflow"}), json!({}), "stack-overflow", None),
        (json!({"mode": "spin"}), small.clone(), "out-of-fuel", None),
        (json!({"mode": "spin"}), json!({"timeout_ms": 200}), "deadline", None),
        (json!({"mode": "sleep", "ms": 60_000}), json!({"timeout_ms": 200}), "deadline", None),
        (json!({"mode": "allocate"}), json!({"memory_bytes": 8 << 20}), "out-of-memory", None),
        (
            json!({"mode": "output", "bytes": 100_000}),
            json!({"output_bytes": 1000}),
            "output-too-large",
            None,
        ),
        (json!({"mode": "fatal", "message": "no"}), json!({}), "guest-error", None),
    ] {
        let ended = end_of(&client, "trap", input.clone(), limits).await;
        let attempt = &ended["attempts"][0];
        assert_eq!(ended["state"], "dead", "{input}: {ended:#}");
        assert_eq!(attempt["termination"]["reason"], reason, "{input}: {ended:#}");
        if let Some(kind) = kind {
            assert_eq!(attempt["termination"]["kind"], kind, "{input}: {ended:#}");
        }
        let receipt = &attempt["receipt"];
        assert!(receipt["fuel"].as_u64().unwrap() > 0, "{input}: a receipt never says 0: {ended:#}");
        assert!(receipt["cpu_ns"].as_u64().unwrap() > 0, "{input}: {ended:#}");
        if input["mode"] == "unreachable" {
            let frames = attempt["backtrace"].as_array().unwrap();
            let found = frames.iter().any(|f| {
                f["function"].as_str().unwrap().contains("reach_the_unreachable")
                    && f["file"].as_str().is_some_and(|f| f.ends_with("lib.rs"))
                    && f["line"].as_u64().is_some()
            });
            assert!(found, "{frames:#?}");
        }
    }

    // Logs beyond the limit are dropped and counted, and are no failure.
    let flood = json!({"mode": "log-flood", "records": 5_000, "bytes": 100});
    let ended = end_of(&client, "trap", flood, json!({"log_bytes": 10_000})).await;
    let receipt = &ended["attempts"][0]["receipt"];
    assert_eq!(ended["state"], "succeeded", "{ended:#}");
    assert!(receipt["log_bytes"].as_u64().unwrap() <= 10_000, "{receipt}");
    assert!(receipt["log_dropped_bytes"].as_u64().unwrap() > 100_000, "{receipt}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_guest_is_cancelled_whether_it_spins_or_sleeps() {
    let deployment = Deployment::start(1).await;
    let client = deployment.client();
    client.upload("trap", &support::guest("trap")).await.expect(201);
    for input in [json!({"mode": "spin"}), json!({"mode": "sleep", "ms": 50_000})] {
        let id = client.enqueue("trap", &json!({"input": input})).await.expect(202).json()["id"].clone();
        let path = format!("/v1/invocations/{}", id.as_str().unwrap());
        support::eventually(Duration::from_secs(20), "the guest to run", async || {
            (client.get(&path).await.json()["state"] == "running").then_some(())
        })
        .await;
        client.post(&format!("{path}/cancel"), &json!({})).await.expect(202);
        let ended = support::eventually(Duration::from_secs(10), "the end", async || {
            let now = client.get(&path).await.json();
            (now["state"] != "running").then_some(now)
        })
        .await;
        assert_eq!(ended["state"], "cancelled", "{ended:#}");
        assert_eq!(ended["attempts"][0]["termination"]["reason"], "cancelled", "{ended:#}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_fails_twice_succeeds_at_its_third_attempt() {
    let deployment = Deployment::start(1).await;
    let client = deployment.client();
    client.upload("flaky", &support::guest("flaky")).await.expect(201);
    let body =
        json!({"input": {"succeed_on": 3}, "retry": {"max_attempts": 5, "initial_ms": 10, "jitter": 0}});
    let ended = client.invoke("flaky", &body).await.expect(200).json();
    assert_eq!(ended["state"], "succeeded", "{ended:#}");
    let reasons: Vec<_> =
        ended["attempts"].as_array().unwrap().iter().map(|a| a["termination"]["reason"].clone()).collect();
    assert_eq!(reasons, ["guest-error", "guest-error", "succeeded"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ordinary_programs_run_through_both_versions_of_wasi_and_reach_nothing() {
    let deployment = Deployment::start(1).await;
    let client = deployment.client();
    let once = json!({"max_attempts": 1});
    for (task, module) in [("p1", support::guest_p1("command")), ("p2", support::guest("command"))] {
        client.upload(task, &module).await.expect(201);
        let body = json!({"stdin": "hello", "args": ["-x"], "env": {"A": "b"}, "retry": once});
        let ended = client.invoke(task, &body).await.expect(200).json();
        assert_eq!(ended["state"], "succeeded", "{ended:#}");
        let id = ended["id"].as_str().unwrap();
        let result = client.get(&format!("/v1/invocations/{id}/result")).await.expect(200);
        assert_eq!(result.text(), "HELLO");
        let log = client.get(&format!("/v1/invocations/{id}/logs")).await.expect(200).text();
        assert!(log.contains("arg -x") && log.contains("env A=b"), "{log}");

        let body = json!({"stdin": "x", "args": ["--exit", "3"], "retry": once});
        let ended = client.invoke(task, &body).await.expect(200).json();
        assert_eq!(ended["attempts"][0]["termination"]["reason"], "exit-code", "{ended:#}");
        // 0.2 knows only success and failure.
        let code = if task == "p1" { 3 } else { 1 };
        assert_eq!(ended["attempts"][0]["termination"]["code"], code, "{ended:#}");
    }

    client.upload("net", &support::guest("net")).await.expect(201);
    let ended = client.invoke("net", &json!({"stdin": "", "retry": once})).await.expect(200).json();
    let id = ended["id"].as_str().unwrap();
    let tries = client.get(&format!("/v1/invocations/{id}/result")).await.expect(200).text();
    assert!(tries.lines().count() >= 9, "{tries}");
    for line in tries.lines() {
        assert!(line.contains(": error "), "a guest reached something: {line}");
    }
}

/// `sandbar run` with a cache of its own.
fn run(args: &[&str], stdin: &str) -> std::process::Output {
    use std::io::Write as _;
    let cache = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_sandbar"))
        .arg("run")
        .args(args)
        .env("XDG_CACHE_HOME", cache.path())
        .current_dir(cache.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn sandbar_run_gives_the_result_on_stdout_the_receipt_on_stderr_and_the_code_of_the_program() {
    let count = support::guest("word-count").display().to_string();
    let ran = run(&[&count, "--input", r#"{"text":"a b a"}"#], "");
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let result: Value = serde_json::from_slice(&ran.stdout).unwrap();
    assert_eq!(result["total"], 3);
    assert!(String::from_utf8_lossy(&ran.stderr).contains("fuel "));

    let command = support::guest_p1("command").display().to_string();
    let ran = run(&[&command, "--json", "--", "--exit", "5"], "in");
    assert_eq!(ran.status.code(), Some(5));
    let outcome: Value = serde_json::from_slice(&ran.stdout).unwrap();
    assert_eq!(outcome["output_text"], "IN");
    assert_eq!(outcome["termination"]["code"], 5);

    let text = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(text.path(), "(module)").unwrap();
    let ran = run(&[&text.path().display().to_string()], "");
    assert_eq!(ran.status.code(), Some(6));
    assert!(String::from_utf8_lossy(&ran.stderr).contains("text-format"), "{:?}", ran.stderr);
}
