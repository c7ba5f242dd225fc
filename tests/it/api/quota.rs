//! Quotas: what is refused at the door, by whom it may be changed, and that servers together pass none.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::Method;
use sandbar::app::invoke::Request;
use sandbar::app::{App, Settings};
use sandbar::domain::names::TaskName;
use serde_json::{Value, json};

use super::{Api, problem};
use crate::support::{self, Answer};

/// Changes what the first tenant may use, as the platform.
async fn set(api: &Api, body: Value) -> Answer {
    support::send(api.client.request(Method::PATCH, "/v1/tenants/one/quotas").json(&body)).await
}

fn quota<'a>(answer: &'a Value, name: &str) -> &'a Value {
    answer["quotas"].as_array().unwrap().iter().find(|quota| quota["name"] == name).unwrap()
}

async fn accepted(api: &Api) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM sandbar.invocations").fetch_one(&api.admin).await.unwrap()
}

/// How many of `n` concurrent requests to these servers were accepted.
async fn rush(api: &Api, apps: &[&App], n: usize) -> usize {
    let task = TaskName::try_from("echo".to_owned()).unwrap();
    let requests = (0..n).map(|at| apps[at % apps.len()].invoke(api.tenant, &task, Request::default(), None));
    join_all(requests).await.into_iter().filter(Result::is_ok).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_servers_together_never_pass_a_quota_of_a_day_and_give_back_what_they_did_not_use() {
    let api = Api::start().await;
    api.echo().await;
    set(&api, json!({"quotas": {"invocations_per_day": 200}})).await.expect(200);
    let other = App::new(api.store.clone(), Arc::clone(&api.signals), Settings::default()).unwrap();
    // The other server takes four ahead and uses one.
    assert_eq!(rush(&api, &[&other], 1).await, 1);
    assert_eq!(rush(&api, &[&api.app], 150).await, 150);
    let more = rush(&api, &[&api.app, &other], 100).await;
    assert!((40..=49).contains(&more), "{more}");
    assert_eq!(accepted(&api).await, 151 + i64::try_from(more).unwrap());
    // What is left over there comes back when it stops.
    other.shutdown().await;
    support::eventually(Duration::from_secs(10), "the rest of the quota", async || {
        rush(&api, &[&api.app], 10).await;
        (accepted(&api).await == 200).then_some(())
    })
    .await;
    assert_eq!(rush(&api, &[&api.app], 20).await, 0);
    let refused = api.client.enqueue("echo", &json!({})).await;
    assert_eq!(problem(&refused, 429), "quota-exceeded");
    let told = refused.json()["quota"].clone();
    assert_eq!(
        (&told["name"], &told["limit"], &told["current"]),
        (&json!("invocations_per_day"), &json!(200), &json!(200))
    );
    assert!(told["resets_at"].as_str().unwrap().contains("T00:00:00"), "{told}");
    assert!(refused.headers["retry-after"].to_str().unwrap().parse::<u32>().unwrap() <= 86_400);
    let seen = api.client.get("/v1/quotas").await.expect(200).json();
    let day = quota(&seen, "invocations_per_day");
    assert_eq!(
        (&day["limit"], &day["used"], &day["source"]),
        (&json!(200), &json!(200), &json!("tenant")),
        "{day}"
    );
    // More is let through as soon as more is allowed.
    set(&api, json!({"quotas": {"invocations_per_day": null}})).await.expect(200);
    api.client.enqueue("echo", &json!({})).await.expect(202);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quota_of_a_second_refuses_with_a_second_to_wait_and_a_repetition_costs_nothing() {
    let api = Api::start().await;
    api.echo().await;
    set(&api, json!({"quotas": {"invocations_per_s": 3}})).await.expect(200);
    let body = json!({});
    let answers = join_all((0..20).map(|_| api.client.enqueue("echo", &body))).await;
    let refused: Vec<&Answer> = answers.iter().filter(|answer| answer.status == 429).collect();
    // All at once they fall into two seconds at most.
    assert!(refused.len() >= 14, "{}", refused.len());
    assert_eq!(problem(refused[0], 429), "quota-exceeded");
    assert_eq!(refused[0].headers["retry-after"], "1");
    support::eventually(Duration::from_secs(10), "the next second", async || {
        (api.client.enqueue("echo", &json!({})).await.status == 202).then_some(())
    })
    .await;

    set(&api, json!({"quotas": {"invocations_per_s": null, "invocations_per_day": 100}})).await.expect(200);
    let before = api.client.get("/v1/quotas").await.json();
    for _ in 0..30 {
        let request =
            api.client.request(Method::POST, "/v1/tasks/echo/invocations").header("idempotency-key", "same");
        let status = support::send(request.json(&json!({}))).await.status;
        assert!(status == 202 || status == 200, "{status}");
    }
    let batch = json!({"invocations": vec![json!({"task": "echo"}); 120]});
    let outcomes = api.client.post("/v1/invocations:batch", &batch).await.expect(200).json();
    let good = outcomes["outcomes"].as_array().unwrap().iter().filter(|o| o["status"] == 202).count();
    assert_eq!(good, 99, "thirty requests with one key are one invocation");
    let after = api.client.get("/v1/quotas").await.json();
    assert_eq!(quota(&before, "invocations_per_day")["used"], 0);
    assert_eq!(quota(&after, "invocations_per_day")["used"], 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenants_admin_gives_its_tasks_shares_and_changes_nothing_else() {
    let api = Api::start().await;
    api.echo().await;
    api.task("plenty", "task", &json!({})).await;
    let share = |task: &str, body: Value| {
        support::send(api.client.request(Method::PATCH, &format!("/v1/tasks/{task}/quotas")).json(&body))
    };
    let said = share("echo", json!({"quotas": {"invocations_per_day": 2}})).await.expect(200).json();
    assert_eq!(said, json!({"quotas": {"invocations_per_day": 2}}));
    for expected in [202, 202, 429] {
        api.client.enqueue("echo", &json!({})).await.expect(expected);
    }
    api.client.enqueue("plenty", &json!({})).await.expect(202);
    let refused = share("echo", json!({"quotas": {"modules": 2}})).await;
    assert_eq!(problem(&refused, 422), "invalid-body");
    assert_eq!(refused.json()["errors"][0]["pointer"], "/quotas/modules");
    assert_eq!(
        problem(&share("echo", json!({"quotas": {"invocations_per_day": 0}})).await, 422),
        "invalid-body"
    );
    assert_eq!(problem(&share("none", json!({"quotas": {}})).await, 404), "task-not-found");
    share("echo", json!({"quotas": {"invocations_per_day": null}})).await.expect(200);
    api.client.enqueue("echo", &json!({})).await.expect(202);

    // The other tenant's admin reads its own, and neither changes its own nor sees the first one's.
    let own = support::send(api.as_other(Method::GET, "/v1/quotas")).await.expect(200).json();
    assert_eq!(quota(&own, "weight")["limit"], 100, "a share is never without bound");
    for (method, path) in [
        (Method::PATCH, "/v1/tenants/two/quotas"),
        (Method::PATCH, "/v1/tenants/one/quotas"),
        (Method::GET, "/v1/tenants/one/quotas"),
        (Method::GET, "/v1/plans"),
        (Method::PUT, "/v1/plans/team"),
    ] {
        let answer = support::send(api.as_other(method.clone(), path).json(&json!({"quotas": {}}))).await;
        assert_eq!(problem(&answer, 403), "forbidden", "{method} {path}");
    }
    let other = support::send(api.as_other(Method::GET, "/v1/tasks/echo/quotas")).await;
    assert_eq!(problem(&other, 404), "task-not-found");
    let none = support::send(api.client.request(Method::GET, "/v1/tenants/three/quotas")).await;
    assert_eq!(problem(&none, 404), "tenant-not-found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn modules_and_memory_beyond_the_quota_are_forbidden_by_name() {
    let api = Api::start().await;
    api.echo().await;
    let before = api.dead(Some("no customer")).await;
    set(&api, json!({"quotas": {"modules": 2, "attempt_memory_bytes": 33_554_432}})).await.expect(200);
    let module = |n: u32| {
        wat::parse_str(format!(
            "(module (memory (export \"memory\") 1) (func (export \"_start\") (drop (i32.const {n}))))"
        ))
        .unwrap()
    };
    api.client.upload_no_wait("one", module(1)).await.expect(201);
    let refused = api.client.upload_no_wait("two", module(2)).await;
    assert_eq!(problem(&refused, 403), "over-quota");
    assert_eq!(refused.json()["quota"], json!({"name": "modules", "limit": 2, "current": 3}));
    // The same bytes are there already.
    let again = api.client.upload_no_wait("three", module(1)).await;
    assert!(again.status.is_success(), "{}", again.text());

    let asked = api.client.enqueue("echo", &json!({"limits": {"memory_bytes": 67_108_864}})).await;
    assert_eq!(problem(&asked, 403), "over-quota");
    let held = api.client.enqueue("echo", &json!({})).await.expect(202).json();
    assert_eq!(held["limits"]["memory_bytes"], 33_554_432);
    let less = api.client.enqueue("echo", &json!({"limits": {"memory_bytes": 1_048_576}})).await.expect(202);
    assert_eq!(less.json()["limits"]["memory_bytes"], 1_048_576);
    // What was accepted before with more is run again within what may be now.
    let again = api.client.post(&format!("/v1/invocations/{before}/retry"), &json!({})).await;
    assert!(again.status.is_success(), "{}", again.text());
    assert_eq!(again.json()["limits"]["memory_bytes"], 33_554_432);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_and_a_change_made_on_another_server_hold_within_five_seconds() {
    let api = Api::start().await;
    api.echo().await;
    let other = App::new(api.store.clone(), Arc::clone(&api.signals), Settings::default()).unwrap();
    assert_eq!(rush(&api, &[&other], 1).await, 1);
    let plan = support::send(
        api.client
            .request(Method::PUT, "/v1/plans/small")
            .json(&json!({"quotas": {"invocations_per_day": 1}})),
    );
    plan.await.expect(204);
    let said = set(&api, json!({"plan": "small"})).await.expect(200).json();
    assert_eq!(
        (&said["plan"], &quota(&said, "invocations_per_day")["source"]),
        (&json!("small"), &json!("plan"))
    );
    support::eventually(Duration::from_secs(5), "the plan to hold on the other server", async || {
        (rush(&api, &[&other], 1).await == 0).then_some(())
    })
    .await;
    // The tenant's own word is nearer.
    let own = set(&api, json!({"quotas": {"invocations_per_day": "unlimited", "weight": 300}}))
        .await
        .expect(200)
        .json();
    assert_eq!(quota(&own, "invocations_per_day")["limit"], "unlimited");
    assert_eq!(
        (&quota(&own, "weight")["limit"], &quota(&own, "weight")["source"]),
        (&json!(300), &json!("tenant"))
    );
    let weight: i32 = sqlx::query_scalar("SELECT weight FROM sandbar.tenants WHERE name = 'one'")
        .fetch_one(&api.admin)
        .await
        .unwrap();
    assert_eq!(weight, 300);
    support::eventually(Duration::from_secs(5), "the change to hold on the other server", async || {
        (rush(&api, &[&other], 1).await == 1).then_some(())
    })
    .await;
    let unknown = set(&api, json!({"plan": "none-such"})).await;
    assert_eq!(problem(&unknown, 422), "invalid-body");
    let back = set(&api, json!({"plan": null, "quotas": {"weight": null, "invocations_per_day": null}}))
        .await
        .expect(200)
        .json();
    assert!(back.get("plan").is_none() && quota(&back, "weight")["source"] == "default", "{back}");
    let plans = api.client.get("/v1/plans").await.expect(200).json();
    assert_eq!(plans["items"][0]["quotas"], json!({"invocations_per_day": 1}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plans_and_shares_of_tasks_are_counted_and_a_deleted_task_gives_its_share_back() {
    let api = Api::start().await;
    api.echo().await;
    for many in [
        "INSERT INTO sandbar.plans (name, quotas) SELECT 'p' || n, '{}' FROM generate_series(1, 1000) n",
        "INSERT INTO sandbar.tasks (tenant_id, task_id, name)
         SELECT tenant_id, gen_random_uuid(), 't' || n FROM sandbar.tenants, generate_series(1, 1000) n WHERE tenants.name = 'one'",
        "INSERT INTO sandbar.task_quotas (tenant_id, task_id, quotas)
         SELECT tenant_id, task_id, '{\"invocations_per_s\": 1}' FROM sandbar.tasks WHERE name <> 'echo'",
    ] {
        sqlx::query(many).execute(&api.admin).await.unwrap();
    }
    let plan = async |name: &str| {
        let request = api.client.request(Method::PUT, &format!("/v1/plans/{name}"));
        support::send(request.json(&json!({"quotas": {"modules": 1}}))).await
    };
    plan("p1").await.expect(204);
    let refused = plan("another").await;
    assert_eq!(problem(&refused, 403), "over-quota");
    assert_eq!(refused.json()["quota"], json!({"name": "plans", "limit": 1_000, "current": 1_001}));

    let share = async |task: &str, amount: Value| {
        let request = api.client.request(Method::PATCH, &format!("/v1/tasks/{task}/quotas"));
        support::send(request.json(&json!({"quotas": {"invocations_per_s": amount}}))).await
    };
    share("t1", json!(2)).await.expect(200);
    let refused = share("echo", json!(2)).await;
    assert_eq!(problem(&refused, 403), "over-quota");
    assert_eq!(refused.json()["quota"]["name"], "task_shares");
    // Nothing said is no share, and neither is one of a task that is gone.
    share("t1", Value::Null).await.expect(200);
    share("echo", json!(2)).await.expect(200);
    assert_eq!(problem(&share("t1", json!(2)).await, 403), "over-quota");
    support::send(api.client.request(Method::DELETE, "/v1/tasks/t2")).await.expect(204);
    share("t1", json!(2)).await.expect(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beyond_the_log_bytes_of_a_day_what_is_accepted_logs_nothing() {
    let api = Api::start().await;
    let task = api.echo().await;
    set(&api, json!({"quotas": {"log_bytes_per_day": 1_000}})).await.expect(200);
    let first = api.client.enqueue("echo", &json!({})).await.expect(202).json();
    assert_eq!(first["limits"]["log_bytes"], 1_000);
    sqlx::query(
        "INSERT INTO sandbar.usage_deltas (tenant_id, task_id, hour, attempts, succeeded, fuel, cpu_ns, wall_ns, input_bytes, output_bytes, log_bytes, egress_bytes)
         VALUES ($1, $2, date_bin('1 hour', clock_timestamp(), 'epoch'), 1, 1, 0, 0, 0, 0, 0, 999, 0)",
    )
    .bind(api.tenant)
    .bind(task)
    .execute(&api.admin)
    .await
    .unwrap();
    support::eventually(Duration::from_secs(5), "the log to count", async || {
        let next = api.client.enqueue("echo", &json!({})).await.expect(202).json();
        (next["limits"]["log_bytes"] == 1).then_some(())
    })
    .await;
}
