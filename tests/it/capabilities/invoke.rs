//! Starting other tasks.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::{Tenant, count};
use crate::support::{Deployment, eventually};

/// The invocation with this id, when it has ended.
async fn ended(tenant: &Tenant, id: &str) -> Value {
    let path = format!("/v1/invocations/{id}");
    eventually(Duration::from_secs(120), "the end of what was started", async || {
        let now = tenant.send(Method::GET, &path, None).await.expect(200).json();
        now["finished_at"].is_string().then_some(now)
    })
    .await
}

fn words(out: &Value) -> Vec<String> {
    out.as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_starts_what_its_grant_names_once_for_each_key_by_the_rules_of_any_request() {
    let deployment = Deployment::start(1).await;
    let tenant = Tenant::first(&deployment);
    let second = Tenant::other(&deployment, "second").await;
    tenant.upload("starter", "starter").await;
    tenant.upload("echo", "echo").await;
    second.upload("starter", "starter").await;
    second.upload("theirs", "echo").await;
    let two = json!({"start": "echo", "times": 2, "with": 7});

    let (out, ended_) = tenant.run("starter", &two).await;
    assert_eq!(words(&out), ["denied", "denied"], "{ended_:#}");
    let log = tenant.log(&ended_).await;
    assert!(log.contains("no grant to start `echo`") && log.contains("sandbar.invoke"), "{log}");
    tenant.grant("starter", &json!({"invoke": ["starter"]})).await;
    assert_eq!(words(&tenant.run("starter", &two).await.0)[0], "denied", "another task's grant");

    // Two calls without a key are two invocations, on the input that was given.
    tenant.grant("starter", &json!({"invoke": ["echo", "nobody", "theirs"]})).await;
    let (out, ended_) = tenant.run("starter", &two).await;
    let ids = words(&out);
    assert_ne!(ids[0], ids[1], "{ended_:#}");
    for id in &ids {
        let one = ended(&tenant, id).await;
        assert_eq!((&one["task"], &one["state"]), (&json!("echo"), &json!("succeeded")), "{one:#}");
        let result =
            tenant.send(Method::GET, &format!("/v1/invocations/{id}/result"), None).await.expect(200);
        assert_eq!(result.text(), "7");
    }

    // With keys, the second attempt gets the same invocations.
    let keyed = json!({"start": "echo", "times": 3, "with": 1, "key": "k", "fail_first": true});
    let body = json!({"input": keyed, "retry": {"max_attempts": 2}});
    let before = count(&deployment.database, "SELECT count(*) FROM sandbar.invocations").await;
    let twice = tenant.wait("starter", &body).await;
    assert_eq!(twice["attempts"].as_array().unwrap().len(), 2, "{twice:#}");
    assert_eq!(twice["state"], "succeeded", "{twice:#}");
    assert_eq!(count(&deployment.database, "SELECT count(*) FROM sandbar.invocations").await, before + 4);

    // What cannot be is refused with its reason: no such task, also if another tenant has it; a quota; a task switched off.
    for (task, reason) in [("nobody", "nobody"), ("theirs", "theirs")] {
        let (out, ended_) = tenant.run("starter", &json!({"start": task, "times": 1, "with": 1})).await;
        assert!(
            words(&out)[0].contains("not started") && words(&out)[0].contains(reason),
            "{out} {ended_:#}"
        );
    }
    let body = json!({"active": false});
    tenant.send(Method::PATCH, "/v1/tasks/echo", Some(&body)).await.expect(200);
    let (out, _) = tenant.run("starter", &json!({"start": "echo", "times": 1, "with": 1})).await;
    assert!(words(&out)[0].contains("not started"), "{out}");
    assert_eq!(count(&deployment.database, "SELECT count(*) FROM sandbar.starts s JOIN sandbar.tenants t USING (tenant_id) WHERE t.name = 'second'").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_starts_itself_without_end_stops_at_the_bounds_of_its_family() {
    let deployment = Deployment::start(1).await;
    let tenant = Tenant::first(&deployment);
    tenant.upload("starter", "starter").await;
    tenant.upload("echo", "echo").await;
    tenant.grant("starter", &json!({"invoke": ["starter", "echo"]})).await;

    // Width: one invocation starts no more than a hundred.
    let wide = json!({"start": "echo", "times": 101, "with": 0});
    let (out, ended_) = tenant.run("starter", &wide).await;
    let said = words(&out);
    assert!(said[100].contains("at most 100"), "{} {ended_:#}", said[100]);
    assert!(said[..100].iter().all(|id| id.len() == 36), "{said:?}");

    // Depth, and both: each starts three of the same, and they do. Five levels below the first: 3 + 9 + 27 + 81 + 243.
    let families = "SELECT count(DISTINCT root_id) FROM sandbar.starts";
    assert_eq!(count(&deployment.database, families).await, 1);
    let (out, ended_) = tenant.run("starter", &json!({"start": "starter", "times": 3})).await;
    assert_eq!(words(&out).len(), 3, "{ended_:#}");
    let open = "SELECT count(*) FROM sandbar.invocations i WHERE NOT EXISTS (SELECT 1 FROM sandbar.results r WHERE r.invocation_id = i.invocation_id)";
    eventually(Duration::from_secs(120), "everything to end", async || {
        (count(&deployment.database, open).await == 0).then_some(())
    })
    .await;
    let deepest = "SELECT max(depth)::bigint FROM sandbar.starts";
    assert_eq!(count(&deployment.database, deepest).await, 5);
    assert_eq!(
        count(&deployment.database, "SELECT count(*) FROM sandbar.starts").await,
        100 + 3 + 9 + 27 + 81 + 243
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_started_for_an_attempt_that_was_handed_on_or_beyond_what_a_family_may_be() {
    let deployment = Deployment::start(1).await;
    let tenant = Tenant::first(&deployment);
    tenant.upload("starter", "starter").await;
    tenant.upload("echo", "echo").await;
    tenant.grant("starter", &json!({"invoke": ["echo"]})).await;
    let admin = deployment.database.admin().await;

    let slow = json!({"input": {"start": "echo", "times": 50, "with": 1}, "retry": {"max_attempts": 1}, "limits": {"timeout_ms": 110_000}});
    let id = tenant.send(Method::POST, "/v1/tasks/starter/invocations", Some(&slow)).await.expect(202).json()
        ["id"]
        .as_str()
        .unwrap()
        .to_owned();
    eventually(Duration::from_secs(20), "the first start", async || {
        (count(&deployment.database, "SELECT count(*) FROM sandbar.starts").await > 0).then_some(())
    })
    .await;
    // As the reaper does it, while the worker believes that it holds the lease.
    sqlx::query("DELETE FROM sandbar.leases WHERE $1::uuid = ANY (invocations)")
        .bind(uuid::Uuid::parse_str(&id).unwrap())
        .execute(&admin)
        .await
        .unwrap();
    let after = count(&deployment.database, "SELECT count(*) FROM sandbar.starts").await;
    eventually(Duration::from_secs(30), "the late end", async || {
        (count(&deployment.database, "SELECT count(*) FROM sandbar.late_acks").await > 0).then_some(())
    })
    .await;
    assert_eq!(count(&deployment.database, "SELECT count(*) FROM sandbar.starts").await, after);
    assert!(after < 50, "it was handed on in the midst of its work");

    // A family that is as large as it may be grows no more.
    let id = tenant.send(Method::POST, "/v1/tasks/starter/invocations", Some(&slow)).await.expect(202).json()
        ["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let uuid = uuid::Uuid::parse_str(&id).unwrap();
    let of_family = format!("SELECT count(*) FROM sandbar.starts WHERE root_id = '{uuid}'");
    eventually(Duration::from_secs(20), "the first start", async || {
        (count(&deployment.database, &of_family).await > 0).then_some(())
    })
    .await;
    sqlx::query(
        "INSERT INTO sandbar.starts (tenant_id, start_id, parent_id, root_id, depth, task, input, input_hash, refused)
         SELECT i.tenant_id, gen_random_uuid(), gen_random_uuid(), i.invocation_id, 1, 'echo', '', '', 'x'
         FROM sandbar.invocations i, generate_series(1, 1000) WHERE i.invocation_id = $1",
    )
    .bind(uuid)
    .execute(&admin)
    .await
    .unwrap();
    ended(&tenant, &id).await;
    let result = tenant.send(Method::GET, &format!("/v1/invocations/{id}/result"), None).await.expect(200);
    let said = words(&result.json());
    assert!(said[49].contains("at most 1000 starts"), "{}", said[49]);
}
