//! `sandbar dev` as a person uses it: it starts alone, stops as a whole, comes back after a kill, and refuses
//! company.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;

use crate::support::{self, ADMIN_KEY, Process, data_dir, eventually};

/// The postmaster that a directory's cluster names; `None` when there is none or it is gone.
fn postmaster(dir: &std::path::Path) -> Option<u32> {
    let text = std::fs::read_to_string(dir.join("pg/postmaster.pid")).ok()?;
    let pid = text.lines().next()?.trim().parse().ok()?;
    is_alive(pid).then_some(pid)
}

/// Whether a process runs. One that ended but was never collected by its parent does not.
fn is_alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[tokio::test]
async fn sigterm_and_ctrl_c_stop_everything_in_order_and_nothing_is_lost() {
    let dir = data_dir();
    let mut invocation = String::new();
    for signal in [Signal::TERM, Signal::INT] {
        let (mut dev, client) = Process::dev(dir.path()).await;
        if invocation.is_empty() {
            client.upload("echo", &support::guest("echo")).await.expect(201);
            let answer = client.invoke("echo", &json!({"input": {"kept": true}})).await.expect(200).json();
            invocation = answer["id"].as_str().unwrap().to_owned();
        }
        let result = client.get(&format!("/v1/invocations/{invocation}/result")).await.expect(200);
        assert_eq!(result.json(), json!({"kept": true}));

        let mut family = dev.children();
        let server = postmaster(dir.path()).unwrap();
        assert!(family.contains(&server), "Postgres is a child of sandbar");
        assert!(family.len() > 1, "a cell is a child of sandbar");
        family.push(dev.pid());
        dev.signal(signal);
        let status = dev.ended(Duration::from_secs(30)).await;
        assert!(status.success(), "{status} after {signal:?}:\n{}", dev.log());
        for pid in family {
            assert!(!is_alive(pid), "process {pid} outlived sandbar dev");
        }
    }
}

#[tokio::test]
async fn a_killed_one_recovers_at_its_next_start() {
    let dir = data_dir();
    let (dev, client) = Process::dev(dir.path()).await;
    client.upload("echo", &support::guest("echo")).await.expect(201);
    // Accepted, and perhaps not yet run.
    let mut accepted = Vec::new();
    for n in 0..50 {
        let answer = client.enqueue("echo", &json!({"input": n})).await.expect(202).json();
        accepted.push((n, answer["id"].as_str().unwrap().to_owned()));
    }
    let orphans = dev.children();
    dev.kill_9();

    let (dev, client) = Process::dev(dir.path()).await;
    for (n, id) in accepted {
        let state = eventually(Duration::from_secs(60), "an accepted invocation to end", async || {
            let invocation = client.get(&format!("/v1/invocations/{id}")).await.expect(200).json();
            invocation["finished_at"].is_string().then(|| invocation["state"].clone())
        })
        .await;
        assert_eq!(state, "succeeded");
        let result = client.get(&format!("/v1/invocations/{id}/result")).await.expect(200);
        assert_eq!(result.json(), json!(n));
    }
    for pid in orphans {
        assert!(!is_alive(pid), "process {pid} of the killed one still runs");
    }
    assert!(dev.terminate().await.success());
}

#[tokio::test]
async fn a_second_one_on_the_same_directory_is_refused_with_a_clear_message() {
    let dir = data_dir();
    let (first, client) = Process::dev(dir.path()).await;
    let variables = [
        ("SANDBAR_SERVER__ADMIN_KEY", ADMIN_KEY.to_owned()),
        ("SANDBAR_SERVER__LISTEN", "127.0.0.1:0".to_owned()),
        ("SANDBAR_DATA_DIR", dir.path().display().to_string()),
    ];
    let mut second = Process::spawn("second", dir.path(), &["dev"], &variables);
    let status = second.ended(Duration::from_secs(30)).await;
    assert!(!status.success());
    let log = second.log();
    assert!(log.contains("is using") && log.contains(&first.pid().to_string()), "{log}");
    assert!(client.is_ready().await, "the first one was disturbed");
    assert!(first.terminate().await.success());
}
