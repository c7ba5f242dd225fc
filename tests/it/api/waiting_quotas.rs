//! Quotas of days and months: what has used one up waits, says so, and goes on when there is more; and plans and defaults
//! for what the queue goes by.

use std::collections::BTreeMap;

use reqwest::Method;
use sandbar::domain::quota::{Amount, Level, Quota};
use sandbar::store::queue::Holds;
use serde_json::{Value, json};

use super::{Api, problem, success};
use crate::support::{self, Answer};

async fn set(api: &Api, body: Value) -> Answer {
    support::send(api.client.request(Method::PATCH, "/v1/tenants/one/quotas").json(&body)).await
}

async fn share(api: &Api, task: &str, body: Value) {
    let request = api.client.request(Method::PATCH, &format!("/v1/tasks/{task}/quotas"));
    support::send(request.json(&body)).await.expect(200);
}

async fn standing(api: &Api, name: &str) -> Value {
    let all = api.client.get("/v1/quotas").await.expect(200).json();
    all["quotas"].as_array().unwrap().iter().find(|quota| quota["name"] == name).unwrap().clone()
}

/// A run of the duty: how many are held that were not, and how many were let go.
async fn look(api: &Api) -> (i32, i32) {
    let (_, tenants) = api.worker.fold_usage(1_000).await.unwrap();
    let Holds { held, released } =
        api.worker.hold_spent(&tenants, &api.app.defaults_of_queues(), false).await.unwrap();
    (held, released)
}

async fn why(api: &Api, id: &Value) -> Value {
    api.client.get(&format!("/v1/invocations/{}/why", id.as_str().unwrap())).await.expect(200).json()
}

/// The tenant's row, as the queue sees it: weight, depth, concurrency, memory, days of retention.
type Row = (i32, Option<i64>, Option<i32>, Option<i64>, Option<i32>);

async fn row(api: &Api) -> Row {
    sqlx::query_as(
        "SELECT weight, max_queued, max_concurrency, max_memory, retention_days FROM sandbar.tenants WHERE name = 'one'",
    )
    .fetch_one(&api.admin)
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_that_has_used_up_a_periods_fuel_waits_and_says_so_until_there_is_more() {
    let api = Api::start().await;
    let echo = api.echo().await;
    let me = api.register().await;
    set(&api, json!({"quotas": {"fuel_per_day": 100, "fuel_per_month": 1_000}})).await.expect(200);
    api.spend(echo, 1, 99, 0).await;
    assert_eq!(look(&api).await, (0, 0));
    api.client.enqueue("echo", &json!({})).await.expect(202);
    let running = api.claim(me).await;
    api.spend(echo, 1, 1, 0).await;
    assert_eq!(look(&api).await, (1, 0));
    assert_eq!(look(&api).await, (0, 0), "it is held already");
    let waits = api.client.enqueue("echo", &json!({})).await.expect(202).json();
    assert!(api.try_claim(me).await.is_empty(), "a worker that remembers the tenant gets nothing");
    assert!(api.worker.ready_tenants(10).await.unwrap().is_empty());
    let said = why(&api, &waits["id"]).await;
    let reason = &said["reasons"][0];
    assert_eq!((&reason["kind"], &reason["of"]), (&json!("quota"), &json!("tenant")), "{said:#}");
    assert!(reason["detail"].as_str().unwrap().contains("fuel_per_day"), "{said:#}");
    assert!(reason["until"].as_str().unwrap().contains("T00:00:00"), "{said:#}");
    assert!(said["estimate"]["starts_in_ms"].as_u64().unwrap() <= 86_400_000, "{said:#}");
    let day = standing(&api, "fuel_per_day").await;
    assert_eq!((&day["used"], &day["limit"], &day["effect"]), (&json!(100), &json!(100), &json!("waits")));
    assert_eq!(day["resets_at"], reason["until"], "{day:#}");
    // What runs goes on, and ends as it would have.
    assert_eq!(api.ack(me, success(running)).await.state.as_str(), "succeeded");
    look(&api).await;

    // More: what was accepted is all there.
    set(&api, json!({"quotas": {"fuel_per_day": 200}})).await.expect(200);
    assert_eq!(look(&api).await, (0, 1));
    assert_eq!(api.claim(me).await.invocation.to_string(), waits["id"]);
    // Less than what is used already holds at the next look, without any more use.
    set(&api, json!({"quotas": {"fuel_per_day": 101}})).await.expect(200);
    assert_eq!(look(&api).await, (1, 0));
    // Of two that are used up, the longer one counts.
    api.spend(echo, 1, 1_000, 0).await;
    look(&api).await;
    let held: (String, String) = sqlx::query_as(
        "SELECT held_by, to_char(held_until AT TIME ZONE 'UTC', 'DD HH24:MI') FROM sandbar.tenants WHERE name = 'one'",
    )
    .fetch_one(&api.admin)
    .await
    .unwrap();
    assert_eq!((held.0.as_str(), held.1.as_str()), ("fuel_per_month", "01 00:00"));
    // The other tenant's work has its turn all the while.
    let others: i64 = sqlx::query_scalar("SELECT count(*) FROM sandbar.tenants WHERE held_until IS NOT NULL")
        .fetch_one(&api.admin)
        .await
        .unwrap();
    assert_eq!(others, 1);
    // The periods end: the use was in months that are over.
    sqlx::query("UPDATE sandbar.usage_hours SET hour = hour - interval '40 days'")
        .execute(&api.admin)
        .await
        .unwrap();
    assert_eq!(look(&api).await, (0, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_has_used_up_its_share_of_cpu_waits_and_other_tasks_go_on() {
    let api = Api::start().await;
    let echo = api.echo().await;
    api.task("plenty", "task", &json!({})).await;
    let me = api.register().await;
    share(&api, "echo", json!({"quotas": {"cpu_s_per_month": 5}})).await;
    api.spend(echo, 1, 0, 4).await;
    assert_eq!(look(&api).await, (0, 0));
    api.spend(echo, 1, 0, 1).await;
    assert_eq!(look(&api).await, (1, 0));
    let waits = api.client.enqueue("echo", &json!({})).await.expect(202).json();
    let goes = api.client.enqueue("plenty", &json!({})).await.expect(202).json();
    assert_eq!(api.claim(me).await.invocation.to_string(), goes["id"]);
    assert!(api.try_claim(me).await.is_empty());
    let said = why(&api, &waits["id"]).await;
    let reason = &said["reasons"][0];
    assert_eq!((&reason["kind"], &reason["of"]), (&json!("quota"), &json!("task")), "{said:#}");
    assert!(reason["detail"].as_str().unwrap().contains("cpu_s_per_month"), "{said:#}");
    share(&api, "echo", json!({"quotas": {"cpu_s_per_month": null}})).await;
    assert_eq!(look(&api).await, (0, 1));
    assert_eq!(api.worker.unpark(100).await.unwrap(), 1);
    assert_eq!(api.claim(me).await.invocation.to_string(), waits["id"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_plan_and_the_configuration_say_of_queues_and_history_holds_where_nothing_nearer_is_said() {
    let api = Api::start().await;
    api.echo().await;
    let put = |body: Value| support::send(api.client.request(Method::PUT, "/v1/plans/team").json(&body));
    let plan = json!({"quotas": {
        "weight": 300, "queue_depth": 7, "concurrency": 2, "memory_bytes": 1_000_000, "retention_days": 9,
    }});
    put(plan).await.expect(204);
    assert_eq!(row(&api).await, (100, None, None, None, None));
    set(&api, json!({"plan": "team", "quotas": {"concurrency": 5}})).await.expect(200);
    assert_eq!(row(&api).await, (300, Some(7), Some(5), Some(1_000_000), Some(9)));
    let shown = standing(&api, "concurrency").await;
    assert_eq!((&shown["limit"], &shown["source"]), (&json!(5), &json!("tenant")));
    assert_eq!(standing(&api, "weight").await["source"], "plan");

    // The plan says something else: the duty tells its tenants.
    put(json!({"quotas": {"weight": 50, "concurrency": 1, "fuel_per_day": 10}})).await.expect(204);
    look(&api).await;
    assert_eq!(row(&api).await, (50, None, Some(5), None, None));
    set(&api, json!({"quotas": {"concurrency": "unlimited", "queue_depth": "unlimited"}})).await.expect(200);
    assert_eq!(row(&api).await, (50, Some(1_000_000_000), None, None, None));
    for (name, amount) in [("weight", json!("unlimited")), ("retention_days", json!("unlimited"))] {
        let refused = set(&api, json!({"quotas": BTreeMap::from([(name, amount)])})).await;
        assert_eq!(problem(&refused, 422), "invalid-body", "{name}");
    }

    // The configuration's word, for everybody of whom nothing is said; and gone with it.
    set(&api, json!({"plan": null, "quotas": {"concurrency": null, "queue_depth": null}})).await.expect(200);
    let mut defaults = Level::default();
    defaults.set(Quota::Concurrency, Some(Amount::At(3))).unwrap();
    defaults.set(Quota::MemoryBytes, Some(Amount::At(70_000))).unwrap();
    api.worker.hold_spent(&[], &defaults, true).await.unwrap();
    assert_eq!(row(&api).await, (100, None, Some(3), Some(70_000), None));
    sqlx::query("INSERT INTO sandbar.tenants (tenant_id, name) VALUES (gen_random_uuid(), 'late')")
        .execute(&api.admin)
        .await
        .unwrap();
    api.worker.hold_spent(&[], &defaults, false).await.unwrap();
    let told: i64 = sqlx::query_scalar("SELECT count(*) FROM sandbar.tenants WHERE max_concurrency = 3")
        .fetch_one(&api.admin)
        .await
        .unwrap();
    assert_eq!(told, 3, "one that was made since too");
    api.worker.hold_spent(&[], &Level::default(), true).await.unwrap();
    assert_eq!(row(&api).await, (100, None, None, None, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_wants_more_memory_than_all_of_its_tenant_may_is_refused_and_the_rest_waits_with_that_reason() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    set(&api, json!({"quotas": {"memory_bytes": 3 << 20}})).await.expect(200);
    let wants = |bytes: u64| json!({"limits": {"memory_bytes": bytes}});
    let refused = api.client.enqueue("echo", &wants(4 << 20)).await;
    assert_eq!(problem(&refused, 403), "over-quota");
    assert!(refused.text().contains("memory_bytes"), "{}", refused.text());
    api.client.enqueue("echo", &wants(2 << 20)).await.expect(202);
    let waits = api.client.enqueue("echo", &wants(2 << 20)).await.expect(202).json();
    let running = api.claim(me).await;
    assert!(api.try_claim(me).await.is_empty());
    assert_eq!(standing(&api, "memory_bytes").await["used"], 2 << 20);
    let said = why(&api, &waits["id"]).await;
    let reason = &said["reasons"][0];
    assert_eq!(
        (&reason["kind"], &reason["limit"], &reason["current"]),
        (&json!("memory-quota"), &json!(3 << 20), &json!(2 << 20)),
        "{said:#}"
    );
    api.ack(me, success(running)).await;
    assert_eq!(api.claim(me).await.invocation.to_string(), waits["id"]);
    // What names nothing is taken down to it.
    set(&api, json!({"quotas": {"memory_bytes": 1 << 20}})).await.expect(200);
    let small = api.client.enqueue("echo", &json!({})).await.expect(202).json();
    let shown = api.client.get(&format!("/v1/invocations/{}", small["id"].as_str().unwrap())).await.json();
    assert_eq!(shown["limits"]["memory_bytes"], 1 << 20, "{shown:#}");
}

#[tokio::test]
async fn the_database_and_the_code_know_the_same_quotas_of_periods() {
    let api = Api::start().await;
    let stored: Vec<(String, String, String)> =
        sqlx::query_as("SELECT name, measure, period FROM sandbar.period_quotas ORDER BY name")
            .fetch_all(&api.admin)
            .await
            .unwrap();
    let mut known: Vec<_> = Quota::ALL
        .iter()
        .filter_map(|quota| {
            let (measure, period) = quota.of_period()?;
            Some((quota.as_str().to_owned(), measure.as_str().to_owned(), period.as_str().to_owned()))
        })
        .collect();
    known.sort();
    assert_eq!(stored, known);
}
