//! Encryption at rest in real processes: two servers, workers, compiled guests, commands on the server.

use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::support::{self, ADMIN_KEY, Client, Database, Deployment, Process};

const SOON: Duration = Duration::from_secs(60);

fn key(dir: &std::path::Path, name: &str, byte: u8) -> String {
    let path = dir.join(name);
    std::fs::write(&path, BASE64_STANDARD.encode([byte; 32])).unwrap();
    path.display().to_string()
}

/// What a command on the server is told.
fn told(database: &Database, current: &str, previous: &str) -> Vec<(&'static str, String)> {
    vec![
        ("SANDBAR_DATABASE__WORKER_URL", database.worker_url()),
        ("SANDBAR_SECRETS__MASTER_KEY_FILE", current.to_owned()),
        ("SANDBAR_SECRETS__PREVIOUS_MASTER_KEY_FILES", format!("[{previous:?}]")),
    ]
}

async fn invoked(client: &Client, n: u32) -> String {
    let answer = client.enqueue("word-count", &json!({"input": {"text": format!("canary {n} words")}})).await;
    answer.expect(202).json()["id"].as_str().unwrap().to_owned()
}

async fn succeeded(client: &Client, id: &str) -> Value {
    support::eventually(SOON, "the end", async || {
        let now = client.get(&format!("/v1/invocations/{id}")).await.expect(200).json();
        assert_ne!(now["state"], "dead", "{now}");
        (now["state"] == "succeeded").then_some(now)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_key_is_replaced_while_sealed_invocations_run_on_two_servers_and_a_worker() {
    let dir = support::data_dir();
    let (old, new) = (key(dir.path(), "old", 1), key(dir.path(), "new", 2));
    let settings = [
        ("SANDBAR_SECRETS__MASTER_KEY_FILE", old.clone()),
        // Everybody knows both keys before the first one is replaced.
        ("SANDBAR_SECRETS__PREVIOUS_MASTER_KEY_FILES", format!("[{new:?}]")),
        ("SANDBAR_SECRETS__SEAL_PAYLOADS", "true".to_owned()),
    ];
    let mut deployment = Deployment::on(support::database().await, 1, &settings).await;
    let one = deployment.client();
    let two = deployment.spawn_server_too().await;
    one.upload("word-count", &support::guest("word-count")).await.expect(201);
    let before = invoked(&one, 0).await;
    succeeded(&two, &before).await;

    let rewrap = async |current: &str, previous: &str| {
        let variables = told(&deployment.database, current, previous);
        let mut process = Process::spawn("rewrap", dir.path(), &["rewrap"], &variables);
        process.ended(SOON).await
    };
    let mut ids = vec![before];
    for n in 1..60 {
        ids.push(invoked(if n % 2 == 0 { &one } else { &two }, n).await);
        if n == 20 {
            assert!(rewrap(&new, &old).await.success());
        }
    }
    for id in &ids {
        let now = succeeded(&one, id).await;
        assert_eq!(now["payloads"], "sealed");
        two.get(&format!("/v1/invocations/{id}/result")).await.expect(200);
    }
    let admin = deployment.database.admin().await;
    let masters: Vec<String> = sqlx::query_scalar("SELECT DISTINCT master FROM sandbar.tenant_keys")
        .fetch_all(&admin)
        .await
        .unwrap();
    assert_eq!(masters.len(), 1);
    let plain: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM sandbar.invocations WHERE position('canary'::bytea IN input) > 0",
    )
    .fetch_one(&admin)
    .await
    .unwrap();
    assert_eq!(plain, 0);
    // Nobody needs the old key any more.
    let gone = dir.path().join("other");
    std::fs::write(&gone, BASE64_STANDARD.encode([3; 32])).unwrap();
    let again = rewrap(&new, gone.to_str().unwrap()).await;
    assert!(again.success());
    assert!(!rewrap(gone.to_str().unwrap(), &old).await.success(), "neither of these opens a key");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_without_the_key_hands_sealed_work_back_and_one_with_it_finishes_it() {
    let dir = support::data_dir();
    let master = key(dir.path(), "master", 1);
    let settings =
        [("SANDBAR_SECRETS__MASTER_KEY_FILE", master), ("SANDBAR_SECRETS__SEAL_PAYLOADS", "true".to_owned())];
    let deployment = Deployment::on(support::database().await, 0, &settings).await;
    let client = deployment.client();
    client.upload("word-count", &support::guest("word-count")).await.expect(201);
    let id = invoked(&client, 1).await;
    let variables = [
        ("SANDBAR_DATABASE__URL", deployment.database.admin_url()),
        ("SANDBAR_DATABASE__API_URL", deployment.database.api_url()),
        ("SANDBAR_DATABASE__WORKER_URL", deployment.database.worker_url()),
        ("SANDBAR_DATABASE__MAX_CONNECTIONS", "8".to_owned()),
        ("SANDBAR_DATA_DIR", dir.path().join("without").display().to_string()),
    ];
    let without = Process::spawn("without", dir.path(), &["worker"], &variables);
    let shown = support::eventually(SOON, "the work to be handed back", async || {
        let now = client.get(&format!("/v1/invocations/{id}")).await.expect(200).json();
        (now["state"] == "scheduled").then_some(now)
    })
    .await;
    assert_eq!(shown["attempts"][0]["termination"]["reason"], "host-fault", "{shown}");
    assert!(without.terminate().await.success());
    let _with = deployment.spawn_worker();
    let end = succeeded(&client, &id).await;
    assert_eq!(end["attempts"].as_array().unwrap().last().unwrap()["termination"]["reason"], "succeeded");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_turn_sealing_on_erase_payloads_and_open_exports() {
    let dir = support::data_dir();
    let (master, exports) = (key(dir.path(), "master", 1), dir.path().join("exports"));
    let settings = [
        ("SANDBAR_SECRETS__MASTER_KEY_FILE", master.clone()),
        ("SANDBAR_SCHEDULER__EXPORT_DIR", exports.display().to_string()),
    ];
    let deployment = Deployment::on(support::database().await, 1, &settings).await;
    let client = deployment.client();
    client.upload("word-count", &support::guest("word-count")).await.expect(201);
    let command = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_sandbar"));
        command.args(args).env("SANDBAR_URL", deployment.url()).env("SANDBAR_API_KEY", ADMIN_KEY);
        command.envs(told(&deployment.database, &master, &master)).current_dir(dir.path());
        let output = command.stdin(Stdio::null()).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, shown, _) = command(&["encryption", "show"]);
    assert!(code == Some(0) && shown.contains("not sealed"), "{shown}");
    let (code, shown, error) = command(&["encryption", "on", "--json"]);
    assert_eq!(code, Some(0), "{error}");
    assert_eq!(serde_json::from_str::<Value>(&shown).unwrap()["payloads"], true);

    let (gone, kept) = (invoked(&client, 1).await, invoked(&client, 2).await);
    for id in [&gone, &kept] {
        succeeded(&client, id).await;
    }
    assert_eq!(command(&["erase", &gone]).0, Some(2), "without a word for it");
    let (code, said, error) = command(&["erase", &gone, "--yes"]);
    assert!(code == Some(0) && said.contains("payloads erased"), "{said}{error}");
    assert_eq!(client.get(&format!("/v1/invocations/{gone}/result")).await.status.as_u16(), 410);
    client.get(&format!("/v1/invocations/{kept}/result")).await.expect(200);

    // As if both had ended long ago: the ids stay, which their payloads are bound to.
    let admin = deployment.database.admin().await;
    let store = sandbar::store::WorkerStore::connect(&sandbar::store::Connect {
        url: deployment.database.worker_url(),
        max_connections: 2,
        acquire_timeout: SOON,
        statement_timeout: SOON,
    })
    .await
    .unwrap();
    sqlx::query("DELETE FROM sandbar.retention_walks").execute(&admin).await.unwrap();
    let (rows, _) = sandbar::scheduler::retention::turn(&store, 0, Some(&exports)).await.unwrap();
    assert_eq!(rows, 2);
    let folder = std::fs::read_dir(&exports).unwrap().next().unwrap().unwrap().path();
    let file = std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let (code, lines, error) = command(&["unseal", file.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{error}");
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |id: &str| lines.iter().find(|line| line["invocation"]["invocation_id"] == id).unwrap();
    let input = BASE64_STANDARD.decode(of(&kept)["input_base64"].as_str().unwrap()).unwrap();
    assert!(String::from_utf8(input).unwrap().contains("canary 2 words"));
    assert_eq!(of(&gone)["input_base64"], Value::Null, "nothing is left to be opened");

    let tenant = client.get("/v1/tenants").await.expect(200).json()["items"][0]["name"].clone();
    let (code, _, error) = command(&["tenant", "erase-key", tenant.as_str().unwrap(), "--yes"]);
    assert!(code == Some(6) && error.contains("suspend"), "{code:?} {error}");
}
