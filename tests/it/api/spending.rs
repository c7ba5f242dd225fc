//! Budgets over the ledger: each threshold is one event in a period, whoever looks and however often.

use chrono::{DateTime, Utc};
use reqwest::Method;
use sandbar::app::spending::watch;
use sandbar::domain::ids::TaskId;
use serde_json::{Value, json};

use super::{Api, problem};
use crate::support::{self, Answer};

impl Api {
    async fn put_budget(&self, name: &str, body: Value) -> Answer {
        support::send(self.client.request(Method::PUT, &format!("/v1/budgets/{name}")).json(&body)).await
    }

    /// What an ack would add to the ledger.
    pub(super) async fn spend(&self, task: TaskId, attempts: i64, fuel: i64, cpu_s: i64) {
        sqlx::query(
            "INSERT INTO sandbar.usage_deltas (tenant_id, task_id, hour, attempts, succeeded, fuel, cpu_ns, wall_ns,
               input_bytes, output_bytes, log_bytes, egress_bytes)
             VALUES ($1, $2, date_trunc('hour', clock_timestamp(), 'UTC'), $3, 0, $4, $5, 0, 0, 0, 0, 0)",
        )
        .bind(self.tenant)
        .bind(task)
        .bind(attempts)
        .bind(fuel)
        .bind(cpu_s * 1_000_000_000)
        .execute(&self.admin)
        .await
        .unwrap();
    }

    /// Lets it be the turn of every budget.
    async fn due(&self) {
        sqlx::query("UPDATE sandbar.budgets SET looked_at = NULL").execute(&self.admin).await.unwrap();
    }

    /// Budgets and thresholds of all events, the oldest first.
    async fn told(&self) -> Vec<(String, i64)> {
        let page = self.client.get("/v1/events?limit=200").await.expect(200).json();
        let told = page["items"].as_array().unwrap().iter().map(|event| {
            assert_eq!(event["kind"], "budget-threshold");
            let data = &event["data"];
            (data["budget"].as_str().unwrap().to_owned(), data["threshold"].as_i64().unwrap())
        });
        let mut told: Vec<_> = told.collect();
        told.reverse();
        told
    }
}

fn events(of: &str, thresholds: &[i64]) -> Vec<(String, i64)> {
    thresholds.iter().map(|percent| (of.to_owned(), *percent)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_threshold_is_one_event_in_a_period_whoever_looks_and_however_often() {
    let api = Api::start().await;
    let echo = api.echo().await;
    let set = api.put_budget("fuel", json!({"measure": "fuel", "period": "month", "amount": 100})).await;
    let set = set.expect(200).json();
    assert_eq!((&set["thresholds"], &set["used"]), (&json!([50, 80, 100]), &json!(0)));
    api.spend(echo, 1, 49, 0).await;
    assert_eq!(watch(&api.worker).await.unwrap(), (0, false));
    assert_eq!(watch(&api.worker).await.unwrap(), (0, false), "it was looked at a moment ago");
    api.spend(echo, 1, 1, 0).await;
    api.due().await;
    assert_eq!(watch(&api.worker).await.unwrap().0, 1);
    api.spend(echo, 1, 75, 0).await;
    for _ in 0..5 {
        api.due().await;
        let looks = (watch(&api.worker), watch(&api.worker), watch(&api.worker));
        let (one, two, three) = tokio::join!(looks.0, looks.1, looks.2);
        let _ = (one.unwrap(), two.unwrap(), three.unwrap());
    }
    assert_eq!(api.told().await, events("fuel", &[50, 80, 100]));
    let listed = api.client.get("/v1/budgets").await.expect(200).json();
    assert_eq!((&listed["items"][0]["used"], &listed["items"][0]["name"]), (&json!(125), &json!("fuel")));
    // Two looks that meet at the row of the event itself: the key of `events` is the last fence.
    let twice: i64 = sqlx::query_scalar("SELECT count(*) - count(DISTINCT once) FROM sandbar.events")
        .fetch_one(&api.admin)
        .await
        .unwrap();
    assert_eq!(twice, 0);

    // Another amount of the same budget repeats nothing; what it reaches now, it says.
    let body =
        json!({"measure": "fuel", "period": "month", "amount": 10, "thresholds": [1000, 50, 100, 100]});
    let set = api.put_budget("fuel", body).await.expect(200).json();
    assert_eq!(set["thresholds"], json!([50, 100, 1000]));
    assert_eq!(watch(&api.worker).await.unwrap().0, 1);
    // One that measures something else begins anew.
    let body = json!({"measure": "attempts", "period": "month", "amount": 6});
    api.put_budget("fuel", body).await.expect(200);
    assert_eq!(watch(&api.worker).await.unwrap().0, 1);
    assert_eq!(api.told().await, events("fuel", &[50, 80, 100, 1000, 50]));
    let first = api.client.get("/v1/events?limit=2").await.expect(200).json();
    let next = api.client.get(first["next"].as_str().unwrap()).await.expect(200).json();
    assert_eq!(next["items"].as_array().unwrap().len(), 2, "{next}");
    assert_eq!(next["items"][0]["data"]["threshold"], 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_period_begins_anew_at_midnight_utc_whatever_the_sessions_zone_is() {
    let api = Api::start().await;
    let echo = api.echo().await;
    let mut connection = api.admin.acquire().await.unwrap();
    sqlx::query("SET TIME ZONE 'America/New_York'").execute(&mut *connection).await.unwrap();
    for (period, at, from, to) in [
        ("month", "2026-12-31T23:59:59Z", "2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"),
        ("month", "2026-03-08T07:00:00Z", "2026-03-01T00:00:00Z", "2026-04-01T00:00:00Z"),
        ("month", "2028-02-29T12:00:00Z", "2028-02-01T00:00:00Z", "2028-03-01T00:00:00Z"),
        ("day", "2026-11-01T00:00:00Z", "2026-11-01T00:00:00Z", "2026-11-02T00:00:00Z"),
    ] {
        let found: (DateTime<Utc>, DateTime<Utc>) = sqlx::query_as(
            "SELECT starts_at, ends_at FROM sandbar.budget_used($1, NULL, 'fuel', $2, $3::text::timestamptz)",
        )
        .bind(api.tenant)
        .bind(period)
        .bind(at)
        .fetch_one(&mut *connection)
        .await
        .unwrap();
        assert_eq!((found.0, found.1), (from.parse().unwrap(), to.parse().unwrap()), "{period} {at}");
    }
    // What was said of another period is no reason to be silent in this one.
    api.put_budget("day", json!({"measure": "fuel", "period": "day", "amount": 1, "thresholds": [100]}))
        .await
        .expect(200);
    api.spend(echo, 1, 1, 0).await;
    assert_eq!(watch(&api.worker).await.unwrap().0, 1);
    sqlx::query("UPDATE sandbar.events SET once = replace(once, split_part(once, ' ', 3), '0')")
        .execute(&api.admin)
        .await
        .unwrap();
    api.due().await;
    assert_eq!(watch(&api.worker).await.unwrap().0, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_of_a_task_counts_that_task_and_nobody_else_sees_it() {
    let api = Api::start().await;
    let (echo, other) = (api.echo().await, api.task("other", "task", &json!({})).await);
    let body =
        json!({"task": "echo", "measure": "cpu_s", "period": "day", "amount": 10, "thresholds": [100]});
    api.put_budget("cpu", body).await.expect(200);
    api.spend(other, 1, 0, 100).await;
    api.spend(echo, 1, 0, 9).await;
    assert_eq!(watch(&api.worker).await.unwrap().0, 0);
    api.spend(echo, 1, 0, 1).await;
    api.due().await;
    assert_eq!(watch(&api.worker).await.unwrap().0, 1);
    let event = api.client.get("/v1/events").await.expect(200).json()["items"][0]["data"].clone();
    assert_eq!((&event["task"], &event["used"], &event["amount"]), (&json!("echo"), &json!(10), &json!(10)));
    for (list, key) in [("/v1/budgets", "items"), ("/v1/events", "items")] {
        let theirs = support::send(api.as_other(Method::GET, list)).await.expect(200).json();
        assert_eq!(theirs[key], json!([]), "{list}");
    }
    let theirs = support::send(api.as_other(Method::DELETE, "/v1/budgets/cpu")).await;
    assert_eq!(problem(&theirs, 404), "budget-not-found");
    support::send(api.client.request(Method::DELETE, "/v1/budgets/cpu")).await.expect(204);
    assert_eq!(api.told().await.len(), 1, "its events stay");

    for (name, body, status) in [
        ("UPPER", json!({"measure": "fuel", "period": "day", "amount": 1}), 404),
        ("a", json!({"measure": "money", "period": "day", "amount": 1}), 422),
        ("a", json!({"measure": "fuel", "period": "week", "amount": 1}), 422),
        ("a", json!({"measure": "fuel", "period": "day", "amount": 0}), 422),
        ("a", json!({"measure": "fuel", "period": "day", "amount": 1, "thresholds": []}), 422),
        ("a", json!({"measure": "fuel", "period": "day", "amount": 1, "thresholds": [1001]}), 422),
        ("a", json!({"measure": "fuel", "period": "day", "amount": 1, "task": "none-such"}), 404),
        ("a", json!({"measure": "fuel", "period": "day", "amount": 1, "task": "A B"}), 422),
    ] {
        assert_eq!(api.put_budget(name, body.clone()).await.status.as_u16(), status, "{name} {body}");
    }
    let body = json!({"measure": "fuel", "period": "day", "amount": 1});
    for n in 0..100 {
        api.put_budget(&format!("b{n}"), body.clone()).await.expect(200);
    }
    assert_eq!(problem(&api.put_budget("one-more", body.clone()).await, 403), "over-quota");
    api.put_budget("b7", body).await.expect(200);
}
