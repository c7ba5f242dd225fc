//! Key-value stores.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::{Tenant, count};
use crate::support::{self, Deployment, eventually};

pub fn step(what: &str, key: &str, value: &str, count: usize) -> Value {
    json!({"what": what, "key": key, "value": value, "count": count})
}

async fn quota_used(tenant: &Tenant) -> u64 {
    let quotas = tenant.send(Method::GET, "/v1/quotas", None).await.expect(200).json();
    let kv = quotas["quotas"].as_array().unwrap().iter().find(|quota| quota["name"] == "kv_bytes").unwrap();
    assert_eq!(kv["effect"], "fails");
    kv["used"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_keeps_what_is_written_for_its_task_alone_and_only_while_there_is_a_grant() {
    let deployment = Deployment::start(1).await;
    let first = Tenant::first(&deployment);
    let second = Tenant::other(&deployment, "second").await;
    for tenant in [&first, &second] {
        tenant.upload("store", "store").await;
    }
    first.upload("beside", "store").await;

    // The module's wish alone gives nothing; the log says why.
    let (out, ended) = first.run("store", &json!([step("set", "a", "1", 0)])).await;
    assert_eq!(out, json!(["denied"]), "{ended:#}");
    let log = first.log(&ended).await;
    assert!(log.contains("no grant `kv`") && log.contains("sandbar.kv"), "{log}");

    for (tenant, task) in [(&first, "store"), (&first, "beside"), (&second, "store")] {
        tenant.grant(task, &json!({"kv": true})).await;
    }
    let steps = json!([
        step("get", "a", "", 0),
        step("exists", "a", "", 0),
        step("set", "a", "one", 0),
        step("get", "a", "", 0),
        step("exists", "a", "", 0),
        step("delete", "nothing", "", 0),
        step("increment", "n", "5", 0),
        step("increment", "n", "-7", 0),
        step("increment", "a", "1", 0),
        step("append", "a", "!", 2),
        step("set-many", "m", "v", 3),
        step("get-many", "m", "", 4),
        step("delete-many", "m", "", 2),
        step("keys", "", "", 0),
        step("set", "", "v", 0),
        step("set", "big", "v", (256 << 10) + 1),
        step("get-many", "m", "", 101),
    ]);
    let (out, ended) = first.run("store", &steps).await;
    let said: Vec<&str> =
        out.as_array().unwrap_or_else(|| panic!("{ended:#}")).iter().map(|v| v.as_str().unwrap()).collect();
    let expected = ["none", "false", "ok", "one", "true", "ok", "5", "-2"];
    assert_eq!(said[..8], expected, "{out:#}");
    assert!(said[8].contains("no whole number"), "{out:#}");
    assert_eq!(said[9..14], ["5", "ok", "v v v none", "ok", "a m00002 n"], "{out:#}");
    assert!(
        said[14].contains("1 to 256 bytes") && said[15].contains("262144") && said[16].contains("100 keys"),
        "{out:#}"
    );
    let receipt = &ended["attempts"][0]["receipt"];
    let calls = receipt["host_calls"].as_u64().unwrap();
    assert!(calls >= 17 && receipt["fuel"].as_u64().unwrap() >= calls * 1_000, "{receipt:#}");

    // Another invocation sees it; neither another task nor another tenant does, whatever they call it.
    let look = json!([step("get", "a", "", 0), step("keys", "", "", 0)]);
    assert_eq!(first.run("store", &look).await.0, json!(["one!!", "a m00002 n"]));
    for (tenant, task) in [(&first, "beside"), (&second, "store")] {
        assert_eq!(tenant.run(task, &look).await.0, json!(["none", ""]), "{task}");
        assert_eq!(tenant.run(task, &json!([step("set", "a", task, 0)])).await.0, json!(["ok"]));
    }
    assert_eq!(first.run("store", &look).await.0, json!(["one!!", "a m00002 n"]));

    // A grant that is taken away is gone for what runs, too; what was kept is there when it comes back.
    let running = tokio::spawn({
        let first = first.clone();
        async move { first.run("store", &json!([step("until-denied", "ticks", "", 0)])).await }
    });
    eventually(Duration::from_secs(20), "a tick", async || {
        (count(&deployment.database, "SELECT count(*) FROM sandbar.kv WHERE key = 'ticks'").await > 0)
            .then_some(())
    })
    .await;
    first.grant("store", &json!({"kv": null})).await;
    let (out, ended) = running.await.unwrap();
    assert_eq!(out, json!(["denied"]), "{ended:#}");
    first.grant("store", &json!({"kv": true})).await;
    assert_eq!(first.run("store", &json!([step("get", "a", "", 0)])).await.0, json!(["one!!"]));

    // It goes with its task, and nothing else does.
    let others = "SELECT count(*) FROM sandbar.kv";
    assert!(quota_used(&first).await > 0);
    first.send(Method::DELETE, "/v1/tasks/store", None).await.expect(204);
    assert_eq!(count(&deployment.database, others).await, 2);
    assert_eq!(quota_used(&first).await, 64 + "a".len() as u64 + "beside".len() as u64);
    first.upload("store", "store").await;
    first.grant("store", &json!({"kv": true})).await;
    assert_eq!(first.run("store", &look).await.0, json!(["none", ""]), "a new task begins with nothing");
}

/// That many attempts at once lose no addition of 3 and no append, of which each makes so many.
pub async fn adds_up(tenant: &Tenant, attempts: usize, (additions, appends): (usize, usize)) {
    let work = json!([step("increment", "n", "3", additions), step("append", "log", "x", appends)]);
    let runs = (0..attempts).map(|_| {
        let (tenant, work) = (tenant.clone(), work.clone());
        tokio::spawn(async move { tenant.run("store", &work).await })
    });
    for run in runs.collect::<Vec<_>>() {
        let (out, ended) = run.await.unwrap();
        assert!(out[0].as_str().is_some_and(|sum| sum.parse::<i64>().is_ok()), "{out} {ended:#}");
    }
    let (out, _) = tenant.run("store", &json!([step("get", "n", "", 0), step("get", "log", "", 0)])).await;
    let wanted = [(attempts * additions * 3).to_string(), "x".repeat(attempts * appends)];
    assert_eq!(out, json!(wanted), "no addition and no append was lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_many_attempts_write_at_once_on_several_workers_adds_up_and_is_counted_to_the_byte() {
    let deployment = Deployment::start(2).await;
    let tenant = Tenant::first(&deployment);
    tenant.upload("store", "store").await;
    tenant.grant("store", &json!({"kv": true})).await;
    adds_up(&tenant, 8, (40, 10)).await;
    let counted = "SELECT (SELECT bytes FROM sandbar.kv_usage) - (SELECT sum(octet_length(key) + octet_length(value) + 64) FROM sandbar.kv)::bigint";
    assert_eq!(count(&deployment.database, counted).await, 0);

    // More keys than a page.
    let mut steps: Vec<Value> = (0..25).map(|n| step("set-many", &format!("p{n:02}-"), "v", 100)).collect();
    steps.push(step("keys", "", "", 0));
    let (out, ended) = tenant.run("store", &steps.into()).await;
    let listed: Vec<&str> = out[25].as_str().unwrap_or_else(|| panic!("{ended:#}")).split(' ').collect();
    assert_eq!(listed.len(), 2_502);
    assert!(listed.is_sorted(), "pages follow each other");
    assert_eq!(count(&deployment.database, counted).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_full_takes_nothing_more_and_goes_on_when_something_goes() {
    let deployment = Deployment::start(1).await;
    let tenant = Tenant::first(&deployment);
    for task in ["store", "beside"] {
        tenant.upload(task, "store").await;
        tenant.grant(task, &json!({"kv": true})).await;
    }
    let quota = |bytes: Value| {
        let tenant = tenant.clone();
        async move {
            let body = json!({"quotas": {"kv_bytes": bytes}});
            tenant.send(Method::PATCH, "/v1/tenants/default/quotas", Some(&body)).await.expect(200);
        }
    };
    quota(json!(1_000)).await;
    // 64 for the key, its byte, and the value: to the byte.
    let fill = json!([step("set", "a", "v", 935), step("set", "b", "", 0), step("set", "a", "v", 936)]);
    let (out, ended) = tenant.run("store", &fill).await;
    assert_eq!(out[0], "ok", "{ended:#}");
    for refused in [&out[1], &out[2]] {
        assert!(refused.as_str().unwrap().contains("quota kv_bytes"), "{out:#}");
    }
    let log = tenant.log(&ended).await;
    assert!(log.contains("quota kv_bytes"), "{log}");
    assert_eq!(quota_used(&tenant).await, 1_000);
    // The quota is the tenant's, so it holds for its other tasks too; reading and making room always go.
    let (out, _) = tenant.run("beside", &json!([step("increment", "n", "1", 0)])).await;
    assert!(out[0].as_str().unwrap().contains("quota kv_bytes"), "{out:#}");
    let (out, _) =
        tenant.run("store", &json!([step("set", "a", "v", 10), step("increment", "n", "1", 0)])).await;
    assert_eq!(out, json!(["ok", "1"]));
    // A batch is written whole or not at all.
    let (out, _) =
        tenant.run("store", &json!([step("set-many", "m", "v", 100), step("keys", "", "", 0)])).await;
    assert!(out[0].as_str().unwrap().contains("quota kv_bytes"), "{out:#}");
    assert_eq!(out[1], "a n");
    quota(json!("unlimited")).await;
    assert_eq!(tenant.run("store", &json!([step("set-many", "m", "v", 100)])).await.0, json!(["ok"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_its_attempt_was_handed_on_a_guest_that_still_runs_writes_and_reads_nothing() {
    let deployment = Deployment::start(1).await;
    let tenant = Tenant::first(&deployment);
    tenant.upload("store", "store").await;
    tenant.grant("store", &json!({"kv": true})).await;
    let path = "/v1/tasks/store/invocations";
    let body = json!({"input": [step("until-denied", "ticks", "", 0)], "retry": {"max_attempts": 1}});
    tenant.send(Method::POST, path, Some(&body)).await.expect(202);
    let ticks = "SELECT COALESCE((SELECT convert_from(value, 'UTF8')::bigint FROM sandbar.kv WHERE key = 'ticks'), 0)";
    eventually(Duration::from_secs(20), "three ticks", async || {
        (count(&deployment.database, ticks).await >= 3).then_some(())
    })
    .await;
    // As the reaper does it, while the worker believes that it holds the lease.
    let admin = deployment.database.admin().await;
    sqlx::query("DELETE FROM sandbar.leases").execute(&admin).await.unwrap();
    let after = count(&deployment.database, ticks).await;
    // The guest ends by itself, which it only does when a call fails; its end comes too late.
    eventually(Duration::from_secs(20), "the late end", async || {
        (count(&deployment.database, "SELECT count(*) FROM sandbar.late_acks").await > 0).then_some(())
    })
    .await;
    assert_eq!(
        count(&deployment.database, ticks).await,
        after,
        "nothing was written after the lease was gone"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_over_its_rate_waits_its_deadline_holds_and_others_do_not_wait() {
    let settings = [("SANDBAR_CAPABILITIES__CALLS_PER_S", "20".to_owned())];
    let deployment = Deployment::on(support::database().await, 1, &settings).await;
    let loud = Tenant::first(&deployment);
    let quiet = Tenant::other(&deployment, "quiet").await;
    for tenant in [&loud, &quiet] {
        tenant.upload("store", "store").await;
        tenant.grant("store", &json!({"kv": true})).await;
    }
    let flood = json!({"input": [step("increment", "n", "1", 100_000)], "retry": {"max_attempts": 1}, "limits": {"timeout_ms": 4_000}});
    let flooding = tokio::spawn({
        let loud = loud.clone();
        async move { loud.wait("store", &flood).await }
    });
    tokio::time::sleep(Duration::from_secs(2)).await;
    let began = std::time::Instant::now();
    assert_eq!(quiet.run("store", &json!([step("increment", "n", "1", 5)])).await.0, json!(["5"]));
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let ended = flooding.await.unwrap();
    assert_eq!(ended["attempts"][0]["termination"]["reason"], "deadline", "{ended:#}");
    let calls = ended["attempts"][0]["receipt"]["host_calls"].as_u64().unwrap();
    // A second's worth at once, and four seconds' worth after it.
    assert!((20..=130).contains(&calls), "{calls} calls");
}

#[test]
fn a_component_imports_only_the_capabilities_that_it_uses() {
    // Names of imports stand in a component as they are.
    let names = |guest: &str, part: &str| {
        let bytes = std::fs::read(support::guest(guest)).unwrap();
        bytes.windows(part.len()).any(|window| window == part.as_bytes())
    };
    assert!(names("store", "wasi:keyvalue/store@0.2.0-draft2") && !names("store", "wasi:http/"));
    assert!(names("echo", "sandbar:task/log") && !names("echo", "wasi:keyvalue"));
}
