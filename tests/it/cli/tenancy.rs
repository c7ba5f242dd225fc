//! Commands about what a tenant may use, uses and keeps secret, and about the configuration.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;

use super::Person;
use crate::support::{self, Deployment, eventually};

/// 32 bytes as base64.
const MASTER_KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quotas_secrets_and_usage_are_shown_and_changed() {
    let settings = [("SANDBAR_SECRETS__MASTER_KEY", MASTER_KEY.to_owned())];
    let deployment = Deployment::on(support::database().await, 1, &settings).await;
    let person = Person::of(&deployment);
    let module = support::guest("echo").display().to_string();
    person.run(&["push", &module, "--task", "echo"]).expect(0);

    let shown = person.run(&["quota"]).expect(0).out;
    assert!(shown.contains("invocations_per_day") && shown.contains("unlimited"), "{shown}");
    person.run(&["quota", "plan", "small", "invocations_per_day=2"]).expect(0);
    assert!(person.run(&["quota", "plans"]).expect(0).out.contains("small"));
    let set = ["quota", "set", "--tenant", "default", "--plan", "small", "modules=7", "--json"];
    assert_eq!(person.run(&set).expect(0).document()["plan"], "small");
    person.run(&["quota", "set", "--task", "echo", "attempt_memory_bytes=32MiB"]).expect(0);
    let share = person.run(&["quota", "show", "--task", "echo", "--json"]).expect(0).document();
    assert_eq!(share["quotas"], json!({"attempt_memory_bytes": 33_554_432}));
    for _ in 0..2 {
        person.run(&["invoke", "echo", "--input", "1", "--wait"]).expect(0);
    }
    let refused = person.run(&["invoke", "echo", "--input", "1", "--json"]).expect(6).error();
    assert_eq!(refused["problem"]["quota"]["name"], "invocations_per_day");
    person.run(&["quota", "set", "--tenant", "default", "--plan", "none"]).expect(0);
    person.run(&["quota", "set", "modules=1"]).expect(2);
    person.run(&["quota", "set", "--tenant", "nobody", "modules=1"]).expect(3);

    let said = person.run_with(&["secret", "set", "TOKEN"], "hush\n").expect(0);
    assert!(said.out.contains("version 1") && !said.out.contains("hush"), "{said:?}");
    assert_eq!(person.run(&["secret", "list", "--json"]).expect(0).document()["name"], "TOKEN");
    person.run(&["secret", "delete", "TOKEN"]).expect(0);
    person.run(&["secret", "delete", "TOKEN"]).expect(3);
    person.run_with(&["secret", "set", "TOKEN"], "").expect(2);

    let row = person.run(&["usage", "--group", "task", "--json"]).expect(0).document();
    assert_eq!((&row["task"], &row["attempts"]), (&json!("echo"), &json!(2)));
    let csv = person.run(&["usage", "--group", "task", "--csv"]).expect(0).out;
    assert!(csv.lines().nth(1).is_some_and(|line| line.starts_with(",echo,2,2,")), "{csv}");
    assert!(person.run(&["usage"]).expect(0).out.contains("ATTEMPTS"));

    // Two attempts of four are half of the budget, and the scheduler says so once.
    let set = ["budget", "set", "small", "--measure", "attempts", "--amount", "4", "--json"];
    assert_eq!(person.run(&set).expect(0).document()["used"], 2);
    assert!(person.run(&["budget", "list"]).expect(0).out.contains("2 (50%)"));
    let told = eventually(Duration::from_secs(60), "the event", async || {
        let rows = person.run(&["events", "--json"]).expect(0).documents();
        (!rows.is_empty()).then_some(rows)
    })
    .await;
    assert_eq!((told.len(), &told[0]["data"]["threshold"]), (1, &json!(50)));
    assert!(person.run(&["events"]).expect(0).out.contains("small at 50%: 2 of 4 attempts"));
    assert!(deployment.server.log().contains("a threshold of a budget is reached"));
    person.run(&["budget", "delete", "small"]).expect(0);
    person.run(&["budget", "delete", "small"]).expect(3);
    person.run(&["budget", "set", "small", "--measure", "money", "--amount", "4"]).expect(2);

    let made = ["key", "create", "ci", "--role", "operator", "--quota", "invocations_per_day=2", "--json"];
    let made = person.run(&made).expect(0).document();
    let id = made["key"]["id"].as_str().unwrap();
    let mut program = Person::new();
    program.set("SANDBAR_URL", deployment.url());
    program.set("SANDBAR_API_KEY", made["secret"].as_str().unwrap());
    let invoke = ["invoke", "echo", "--input", "1", "--json"];
    program.run(&invoke).expect(0);
    let set = ["quota", "set", "--key", id, "invocations_per_day=1", "--json"];
    let set = person.run(&set).expect(0).document();
    assert_eq!((&set["quotas"][0]["limit"], &set["quotas"][0]["used"]), (&json!(1), &json!(1)));
    let refused = program.run(&invoke).expect(6).error();
    assert_eq!(refused["problem"]["quota"]["limit"], 1, "{refused}");
    let shown = person.run(&["quota", "show", "--key", id]).expect(0).out;
    assert!(shown.contains("invocations_per_day") && shown.contains("LIMIT"), "{shown}");
    assert!(person.run(&["key", "list"]).expect(0).out.contains("invocations_per_day=1"));
    person.run(&["key", "update", id, "--quota", "invocations_per_day=default"]).expect(0);
    assert!(person.run(&["quota", "show", "--key", id]).expect(0).err.contains("no limits of its own"));
    program.run(&invoke).expect(0);
    person.run(&["quota", "show", "--key", id, "--task", "echo"]).expect(2);
}

#[test]
fn the_configuration_is_checked_and_shown_without_its_secrets() {
    let mut person = Person::new();
    std::fs::write(
        person.dir().join("sandbar.toml"),
        "[server]\nadmin_key = \"hush-hush-hush-hush\"\n[worker]\nslots = 3\n",
    )
    .unwrap();
    person.set("SANDBAR_DATABASE__URL", "postgres://a:hush@db/x");
    let shown = person.run(&["config", "show"]).expect(0).out;
    assert!(!shown.contains("hush") && shown.contains("admin_key = \"***\""), "{shown}");
    assert!(shown.contains("slots = 3") && shown.contains("max_wait_s = 60"), "{shown}");
    let shown = person.run(&["config", "show", "--json"]).expect(0).document();
    assert_eq!((&shown["worker"]["slots"], &shown["database"]["url"]), (&json!(3), &json!("***")));
    person.run(&["config", "check"]).expect(0);
    std::fs::write(person.dir().join("sandbar.toml"), "[server]\nlistn = 1\n").unwrap();
    assert!(person.run(&["config", "check"]).expect(2).err.contains("listn"));
    std::fs::write(person.dir().join("sandbar.toml"), "[log]\nfilter = \"sandbar=loud\"\n").unwrap();
    assert!(person.run(&["config", "check", "--json"]).expect(2).err.contains("loud"));
    std::fs::write(person.dir().join("sandbar.toml"), "[secrets]\nmaster_key = \"hush-hush-hush-hush\"\n")
        .unwrap();
    let refused = person.run(&["config", "check"]).expect(2).err;
    assert!(refused.contains("secrets.master_key") && !refused.contains("hush"), "{refused}");
    person.set("SANDBAR_SERVER__TLS_CERT", "/nonexistent");
    person.set("SANDBAR_SERVER__TLS_KEY", "/nonexistent");
    std::fs::write(person.dir().join("sandbar.toml"), "").unwrap();
    assert!(person.run(&["config", "check"]).expect(2).err.contains("/nonexistent"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sighup_reads_rates_quotas_and_the_log_filter_again_and_a_bad_file_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("sandbar.toml");
    std::fs::write(&file, "").unwrap();
    let settings = [("SANDBAR_CONFIG", file.display().to_string())];
    let deployment = Deployment::on(support::database().await, 0, &settings).await;
    let client = deployment.client();
    let soon = Duration::from_secs(20);
    client.get("/v1/tasks").await.expect(200);

    std::fs::write(
        &file,
        "[rate_limits]\nkey_per_s = 1\nkey_burst = 3\n[quotas]\nmodules = 5\n[log]\nfilter = \"debug\"\n",
    )
    .unwrap();
    deployment.server.signal(Signal::HUP);
    eventually(soon, "the new rate", async || {
        let answer = client.get("/v1/quotas").await;
        (answer.status == 429).then_some(())
    })
    .await;
    eventually(soon, "the new quota", async || {
        let answer = client.get("/v1/quotas").await;
        let found = answer.status == 200
            && answer.json()["quotas"]
                .as_array()
                .unwrap()
                .iter()
                .any(|q| q["name"] == "modules" && q["limit"] == 5);
        found.then_some(())
    })
    .await;
    assert!(deployment.server.log().contains("DEBUG"));

    std::fs::write(&file, "[rate_limits]\nkey_per_second = 0\n").unwrap();
    deployment.server.signal(Signal::HUP);
    eventually(soon, "the refusal", async || {
        deployment.server.log().contains("nothing has changed").then_some(())
    })
    .await;
    std::fs::write(&file, "[rate_limits]\nkey_per_s = 0\n[worker]\nslots = 5\n").unwrap();
    deployment.server.signal(Signal::HUP);
    eventually(soon, "what needs a restart", async || {
        deployment.server.log().contains("a restart is needed for what changed in: worker").then_some(())
    })
    .await;
    for _ in 0..10 {
        client.get("/v1/tasks").await.expect(200);
    }
}
