//! The commands of operators: workers, duties, why, bulk operations, pauses and dead letters, against a real server and
//! worker.

use std::time::Duration;

use serde_json::{Value, json};

use super::Person;
use crate::support::{self, Deployment, eventually};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_looks_steers_pauses_redrives_and_purges() {
    let quick = [
        ("SANDBAR_WORKER__HEARTBEAT_MS", "100".to_owned()),
        ("SANDBAR_SCHEDULER__TICK_MS", "100".to_owned()),
    ];
    let deployment = Deployment::on(support::database().await, 1, &quick).await;
    let person = Person::of(&deployment);
    let module = support::guest("trap").display().to_string();
    person.run(&["push", &module, "--task", "trap"]).expect(0);
    let soon = Duration::from_secs(60);

    let workers = person.run(&["workers", "list", "--json"]).expect(0).documents();
    assert_eq!((workers.len(), &workers[0]["state"]), (1, &json!("active")));
    let id = workers[0]["id"].as_str().unwrap().to_owned();
    assert!(person.run(&["workers", "list"]).expect(0).out.contains(&id));
    let duties = person.run(&["duties", "list", "--json"]).expect(0).documents();
    assert!(duties.iter().any(|duty| duty["name"] == "reap" && duty["holder"].is_string()), "{duties:?}");
    let set = person.run(&["duties", "set", "tidy", "--interval-ms", "5000", "--json"]).expect(0).document();
    assert_eq!(set["interval_ms"], 5000);
    person.run(&["duties", "run", "nonsense"]).expect(3);

    // Dead, grouped, run again, purged.
    let fatal = ["invoke", "trap", "--input", r#"{"mode": "fatal", "message": "no customer 17"}"#];
    person.run(&[&fatal[..], &["--wait"][..]].concat());
    let groups = eventually(soon, "the kind of failure", async || {
        let groups = person.run(&["dead-letters", "groups", "--json"]).expect(0).documents();
        groups.first().filter(|group| group["fingerprint"].is_string()).cloned()
    })
    .await;
    assert_eq!((&groups["task"], &groups["count"]), (&json!("trap"), &json!(1)));
    person.run(&["bulk", "retry"]).expect(2);
    let count = person.run(&["bulk", "retry", "--task", "trap", "--dry-run", "--json"]).expect(0).document();
    assert_eq!(count, json!({"matched": 1, "exact": true}));
    let asked = person.run(&["bulk", "retry", "--task", "trap", "--json"]).expect(0).document();
    let bulk = asked["id"].as_str().unwrap().to_owned();
    let done = eventually(soon, "the operation", async || {
        let now = person.run(&["bulk", "show", &bulk, "--json"]).expect(0).document();
        (now["state"] == "done").then_some(now)
    })
    .await;
    assert_eq!(done["done"], 1, "{done:#}");
    eventually(soon, "the second death", async || {
        let letters = person.run(&["dead-letters", "list", "--json"]).expect(0).documents();
        (letters.len() == 2).then_some(())
    })
    .await;
    let letters = person.run(&["dead-letters", "list", "--open", "--json"]).expect(0).documents();
    let open: Vec<&str> = letters.iter().map(|letter| letter["id"].as_str().unwrap()).collect();
    assert_eq!(open.len(), 1, "the first was run again");
    person.run(&["dead-letters", "purge", open[0]]).expect(0);
    person.run(&["dead-letters", "purge", open[0]]).expect(3);

    // Paused, explained, resumed.
    let pause = person.run(&["pauses", "task", "trap", "--json"]).expect(0).document();
    let sleeper =
        person.run(&["invoke", "trap", "--input", r#"{"mode": "sleep", "ms": 1}"#, "--json"]).expect(0);
    let waits = sleeper.document()["id"].as_str().unwrap().to_owned();
    let why: Value = person.run(&["why", &waits, "--json"]).expect(0).document();
    assert_eq!(why["reasons"][0]["kind"], "paused", "{why}");
    assert!(person.run(&["why", &waits]).expect(0).out.contains("paused"));
    person.run(&["pauses", "end", pause["id"].as_str().unwrap()]).expect(0);
    eventually(soon, "what was paused", async || {
        let now = person.run(&["get", &waits, "--json"]).expect(0).document();
        (now["state"] == "succeeded").then_some(())
    })
    .await;

    person.run(&["workers", "cordon", &id]).expect(0);
    let listed = person.run(&["workers", "list", "--json"]).expect(0).documents();
    assert_eq!(listed[0]["state"], "cordoned");
}
