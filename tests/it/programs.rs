//! WebAssembly programs that nobody here wrote, from package registries, run unmodified through the public API under
//! the default limits, raised only in size. What cannot be had is skipped, loudly (`scripts/programs.sh`).

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{self, Client, Process};

/// Longest compilation of an interpreter of 25 MiB on a busy machine.
const COMPILATION: Duration = Duration::from_secs(400);
/// Longest first run of one, which begins with the compiled code's way to the cell.
const RUN: Duration = Duration::from_secs(150);

/// A program, or none if it cannot be had.
fn program(name: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(root.join("scripts/programs.sh")).arg(name).current_dir(root).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} cannot be had:\n{said}");
    if said.contains("SKIPPED") {
        // Past the capture of the test harness: a skip must be seen.
        let _ = writeln!(std::io::stderr(), "\n==== {said}====\n");
        return None;
    }
    Some(root.join(format!("target/programs/{name}.wasm")))
}

/// All roles in one process, which has compiled this program; none if the program cannot be had.
async fn deployed(name: &str) -> Option<(Process, TempDir, Client)> {
    let module = program(name)?;
    let (database, dir) = (support::database().await, support::data_dir());
    let settings = [
        ("SANDBAR_DATABASE__URL", database.admin_url()),
        ("SANDBAR_DATABASE__API_URL", database.api_url()),
        ("SANDBAR_DATABASE__WORKER_URL", database.worker_url()),
        ("SANDBAR_SERVER__ADMIN_KEY", support::ADMIN_KEY.to_owned()),
        ("SANDBAR_SERVER__LISTEN", "127.0.0.1:0".to_owned()),
        ("SANDBAR_WORKER__SLOTS", "4".to_owned()),
        ("SANDBAR_DATA_DIR", dir.path().display().to_string()),
        // A quiet machine needs none of it; this one may run other tests.
        ("SANDBAR_COMPILE__WALL_MS", "200000".to_owned()),
    ];
    let mut process = Process::spawn("dev", dir.path(), &["dev"], &settings);
    let client = Client::new(format!("http://{}", process.address().await));
    process.ready(&client).await;
    let answer = client.upload(name, &module).await;
    let version = answer.json();
    assert!(answer.status.is_success(), "{name}: {version:#}");
    let path = format!("/v1/tasks/{name}/versions/{}", version["version"]);
    support::eventually(COMPILATION, "the compilation", async || {
        let version = client.get(&path).await.expect(200).json();
        assert_ne!(version["state"], "rejected", "{name}: {version:#}");
        (version["state"] == "ready").then_some(())
    })
    .await;
    Some((process, dir, client))
}

/// Runs it once, to its end.
async fn run(client: &Client, name: &str, mut body: Value) -> Value {
    body["retry"] = json!({"max_attempts": 1});
    let id = client.enqueue(name, &body).await.expect(202).json()["id"].as_str().unwrap().to_owned();
    support::eventually(RUN, "the end", async || {
        let now = client.get(&format!("/v1/invocations/{id}")).await.expect(200).json();
        ["succeeded", "dead"].contains(&now["state"].as_str().unwrap()).then_some(now)
    })
    .await
}

/// What it wrote to stdout; it succeeded.
async fn stdout(client: &Client, ended: &Value) -> String {
    assert_eq!(ended["state"], "succeeded", "{ended:#}");
    client.get(ended["links"]["result"].as_str().unwrap()).await.expect(200).text()
}

async fn artifact(client: &Client, ended: &Value, path: &str) -> String {
    let path = format!("/v1/invocations/{}/artifacts/{path}", ended["id"].as_str().unwrap());
    client.get(&path).await.expect(200).text()
}

/// Sums by SQLite, which this build links in; what it leaves, and what its environment says.
const MAIN_PY: &str = r#"
import csv, hashlib, io, json, os, sqlite3, sys
rows = list(csv.DictReader(io.StringIO(sys.stdin.read())))
db = sqlite3.connect(":memory:")
db.execute("create table t (who text, n integer)")
db.executemany("insert into t values (?, ?)", [(r["who"], int(r["n"])) for r in rows])
sums = dict(db.execute("select who, sum(n) from t group by who order by who"))
os.mkdir("out")
with open("out/sums.json", "w") as f:
    json.dump(sums, f)
print(sys.version_info[:2], hashlib.sha256(b"abc").hexdigest()[:8], dict(os.environ), sorted(os.listdir(".")))
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cpython_runs_a_script_with_its_library_and_leaves_a_file() {
    let Some((_process, _dir, client)) = deployed("python").await else { return };
    let body = json!({
        "args": ["main.py"],
        "env": {"WHO": "me"},
        "stdin": "who,n\nann,1\nbob,2\nann,4\n",
        "files": {"main.py": MAIN_PY},
        "collect": ["out/*"],
    });
    let ended = run(&client, "python", body.clone()).await;
    assert_eq!(stdout(&client, &ended).await, "(3, 12) ba7816bf {'WHO': 'me'} ['main.py', 'out']\n");
    assert_eq!(artifact(&client, &ended, "out/sums.json").await, r#"{"ann": 5, "bob": 2}"#);
    // Nothing of it is there for the next, which would fail to make its directory.
    let again = run(&client, "python", body).await;
    assert_eq!(stdout(&client, &again).await, stdout(&client, &ended).await);

    let failed = run(&client, "python", json!({"args": ["-c", "raise SystemExit(7)"]})).await;
    let end = &failed["attempts"][0]["termination"];
    assert_eq!(*end, json!({"reason": "exit-code", "code": 7}), "{failed:#}");
    let network = "import socket\nsocket.create_connection(('127.0.0.1', 80))";
    let refused = run(&client, "python", json!({"args": ["-c", network]})).await;
    assert_eq!(refused["attempts"][0]["termination"]["code"], 1, "{refused:#}");
    let hungry = run(&client, "python", json!({"args": ["-c", "x = 'x' * (1 << 28)"]})).await;
    assert_eq!(hungry["state"], "dead", "{hungry:#}");
}

const MAIN_RB: &str = r##"
require "json"
words = STDIN.read.split.tally.sort.to_h
Dir.mkdir("/out")
File.write("/out/words.json", JSON.generate(words))
puts "#{RUBY_VERSION} #{words.size} #{ARGV.join(",")}"
"##;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ruby_runs_a_script_with_arguments_and_leaves_a_file() {
    let Some((_process, _dir, client)) = deployed("ruby").await else { return };
    let body = json!({
        "args": ["/main.rb", "x", "y"],
        "limits": {"memory_bytes": 256 << 20},
        "stdin": "b a b c",
        "files": {"main.rb": MAIN_RB},
        "collect": ["out/words.json"],
    });
    let ended = run(&client, "ruby", body).await;
    assert_eq!(stdout(&client, &ended).await, "3.2.0 3 x,y\n");
    assert_eq!(artifact(&client, &ended, "out/words.json").await, r#"{"a":1,"b":2,"c":1}"#);
}

const PAGE_PHP: &str = r#"<?php
$in = json_decode(file_get_contents("/in.json"), true);
usort($in, fn($a, $b) => $b["n"] <=> $a["n"]);
file_put_contents("/top.txt", $in[0]["who"]);
echo PHP_VERSION, " ", preg_replace("/[aeiou]/", "*", $in[0]["who"]), " ", array_sum(array_column($in, "n")), "\n";
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn php_runs_a_page_on_a_file_it_was_brought() {
    let Some((_process, _dir, client)) = deployed("php").await else { return };
    let body = json!({
        "args": ["-q", "/page.php"],
        "files": {"page.php": PAGE_PHP, "in.json": r#"[{"who": "ann", "n": 1}, {"who": "bob", "n": 41}]"#},
        "collect": ["*.txt"],
    });
    let ended = run(&client, "php", body).await;
    assert_eq!(stdout(&client, &ended).await, "8.2.0 b*b 42\n");
    assert_eq!(artifact(&client, &ended, "top.txt").await, "bob");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tool_for_hardware_designers_answers_and_fails_by_exit_code() {
    let Some((_process, _dir, client)) = deployed("icepll").await else { return };
    let ended = run(&client, "icepll", json!({"args": ["-i", "12", "-o", "48"]})).await;
    let said = stdout(&client, &ended).await;
    assert!(said.contains("F_PLLOUT:   48.000 MHz (achieved)"), "{said}");
    assert!(said.contains("DIVF: 63 (7'b0111111)"), "{said}");
    let failed = run(&client, "icepll", json!({"args": ["-i", "nothing", "-o", "1"]})).await;
    assert_eq!(failed["attempts"][0]["termination"]["reason"], "exit-code", "{failed:#}");
}
