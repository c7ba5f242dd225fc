//! Processes that are started before their Postgres: whoever brings up a host starts everything at once.

use std::time::Duration;

use sandbar::dev::EmbeddedPostgres;
use serde_json::json;

use crate::support::{self, Client, Database, Process};

const SOON: Duration = Duration::from_secs(60);

fn variables(database: &Database, role: &str, dir: &std::path::Path) -> Vec<(&'static str, String)> {
    vec![
        ("SANDBAR_DATABASE__URL", database.admin_url()),
        ("SANDBAR_DATABASE__API_URL", database.api_url()),
        ("SANDBAR_DATABASE__WORKER_URL", database.worker_url()),
        ("SANDBAR_SERVER__ADMIN_KEY", support::ADMIN_KEY.to_owned()),
        ("SANDBAR_SERVER__LISTEN", "127.0.0.1:0".to_owned()),
        ("SANDBAR_DATA_DIR", dir.join(role).display().to_string()),
    ]
}

#[tokio::test]
async fn a_server_and_a_worker_wait_for_a_postgres_that_comes_after_them() {
    let (postgres, database, dir) = support::own_postgres().await;
    postgres.stop().await.unwrap();
    let logs = support::data_dir();
    let start = |role| Process::spawn(role, logs.path(), &[role], &variables(&database, role, logs.path()));
    let (mut server, worker) = (start("server"), start("worker"));
    for process in [&server, &worker] {
        support::eventually(SOON, "both to find nobody", async || {
            process.log().contains("Postgres is not there yet").then_some(())
        })
        .await;
    }
    let postgres = EmbeddedPostgres::start(dir.path()).await.unwrap();
    let client = Client::new(format!("http://{}", server.address().await));
    server.ready(&client).await;
    client.upload("word-count", &support::guest("word-count")).await.expect(201);
    let done = client.invoke("word-count", &json!({"input": {"text": "a b a"}})).await.expect(200).json();
    assert_eq!(done["state"], "succeeded", "{done}");
    assert_eq!((server.terminate().await.code(), worker.terminate().await.code()), (Some(0), Some(0)));
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn one_whose_postgres_stays_away_ends_and_says_so() {
    let (postgres, database, _dir) = support::own_postgres().await;
    postgres.stop().await.unwrap();
    let logs = support::data_dir();
    for role in ["server", "worker"] {
        let mut variables = variables(&database, role, logs.path());
        variables.push(("SANDBAR_DATABASE__START_TIMEOUT_MS", "300".to_owned()));
        let mut process = Process::spawn(role, logs.path(), &[role], &variables);
        assert_eq!(process.ended(SOON).await.code(), Some(1), "{}", process.log());
        let log = process.log();
        assert!(log.lines().last().unwrap().contains("cannot connect to Postgres"), "{log}");
    }
}
