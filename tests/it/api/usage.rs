//! The bill: whatever happens to attempts, the ledger is the sum of their receipts.

use chrono::Utc;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use reqwest::Method;
use sandbar::domain::retry::Verdict;
use sandbar::store::queue::Want;
use sandbar_host::outcome::Receipt;
use serde_json::{Value, json};

use super::{Api, success};
use crate::support;

const SUMS: &str = "count(*) FILTER (WHERE fuel IS NOT NULL), COALESCE(sum(fuel), 0)::bigint, COALESCE(sum(cpu_ns), 0)::bigint,
  COALESCE(sum(wall_ns), 0)::bigint, COALESCE(sum(input_bytes), 0)::bigint, COALESCE(sum(output_bytes), 0)::bigint,
  COALESCE(sum(log_bytes), 0)::bigint, COALESCE(sum(egress_bytes), 0)::bigint";
type Sums = (i64, i64, i64, i64, i64, i64, i64, i64);

/// What the receipts of all attempts of a task sum up to, and what the ledger says.
async fn balance(api: &Api, task: &str) -> (Sums, Sums) {
    let receipts = format!(
        "SELECT {SUMS} FROM sandbar.attempts a JOIN sandbar.invocations i USING (tenant_id, invocation_id)
         JOIN sandbar.tasks t USING (tenant_id, task_id) WHERE t.name = $1"
    );
    let ledger = "SELECT COALESCE(sum(attempts), 0)::bigint, COALESCE(sum(fuel), 0)::bigint, COALESCE(sum(cpu_ns), 0)::bigint,
         COALESCE(sum(wall_ns), 0)::bigint, COALESCE(sum(u.input_bytes), 0)::bigint, COALESCE(sum(u.output_bytes), 0)::bigint,
         COALESCE(sum(u.log_bytes), 0)::bigint, COALESCE(sum(egress_bytes), 0)::bigint
       FROM sandbar.usage u JOIN sandbar.tasks t USING (tenant_id, task_id) WHERE t.name = $1";
    (
        sqlx::query_as(&receipts).bind(task).fetch_one(&api.admin).await.unwrap(),
        sqlx::query_as(ledger).bind(task).fetch_one(&api.admin).await.unwrap(),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ledger_equals_the_receipts_after_any_run_of_ends_retries_repetitions_and_lost_workers() {
    let api = Api::start().await;
    for task in ["echo", "other"] {
        api.task(task, "task", &json!({})).await;
    }
    // The same run every time; the seed stands for a run that somebody may want to change.
    let mut random = StdRng::seed_from_u64(6);
    let mut workers = [api.register().await, api.register().await];
    let mut stolen = Vec::new();
    for round in 0..25 {
        for _ in 0..random.random_range(0..6) {
            let task = if random.random_bool(0.5) { "echo" } else { "other" };
            let body = json!({"input": round, "retry": {"max_attempts": 5, "initial_ms": 1, "jitter": 0}});
            api.client.enqueue(task, &body).await.expect(202);
        }
        let at = random.random_range(0..workers.len());
        let (worker, epoch) = workers[at];
        let claimed = api.worker.claim(worker, epoch, &[Want::of(api.tenant, 4)]).await.unwrap();
        let finished: Vec<_> = claimed
            .into_iter()
            .map(|claimed| {
                let mut finished = success(claimed);
                finished.outcome.receipt = Receipt {
                    fuel: random.random_range(0..1_000_000),
                    cpu_ns: random.random_range(0..1_000_000),
                    wall_ns: random.random_range(0..1_000_000),
                    output_bytes: random.random_range(0..1_000),
                    log_bytes: random.random_range(0..1_000),
                    egress_bytes: random.random_range(0..1_000),
                    ..finished.outcome.receipt
                };
                if random.random_bool(0.3) {
                    finished.verdict = Verdict::Retry { delay_ms: 0 };
                }
                finished
            })
            .collect();
        match random.random_range(0..4) {
            // The worker dies with them; what it says later counts for nothing.
            0 => {
                sqlx::query("UPDATE sandbar.workers SET heartbeat_at = now() - interval '1 hour' WHERE worker_id = $1")
                    .bind(worker)
                    .execute(&api.admin)
                    .await
                    .unwrap();
                stolen.push((workers[at], finished));
                sqlx::query("SELECT * FROM sandbar.reap(interval '1 minute', 10)")
                    .execute(&api.admin)
                    .await
                    .unwrap();
                workers[at] = api.register().await;
            }
            // Said twice, at the same time.
            1 => {
                let (a, b) = tokio::join!(
                    api.worker.ack(worker, epoch, &finished),
                    api.worker.ack(worker, epoch, &finished)
                );
                a.and(b).unwrap();
            }
            _ => drop(api.worker.ack(worker, epoch, &finished).await.unwrap()),
        }
        sqlx::query("SELECT sandbar.promote(100)").execute(&api.admin).await.unwrap();
        if random.random_bool(0.3) {
            sqlx::query("SELECT sandbar.fold_usage(3)").execute(&api.admin).await.unwrap();
        }
    }
    for ((worker, epoch), finished) in stolen {
        let _ = api.worker.ack(worker, epoch, &finished).await;
    }
    let mut attempts = 0;
    for task in ["echo", "other"] {
        let (receipts, ledger) = balance(&api, task).await;
        assert_eq!(receipts, ledger, "{task}");
        attempts += receipts.0;
    }
    assert!(attempts > 20, "{attempts}");
    // And so says the API, in whatever groups.
    for group in ["none", "hour", "day", "task", "hour,task", "day,task"] {
        let bill = api.client.get(&format!("/v1/usage?group={group}")).await.expect(200).json();
        let items = bill["items"].as_array().unwrap();
        assert_eq!(
            items.iter().map(|row| row["attempts"].as_i64().unwrap()).sum::<i64>(),
            attempts,
            "{group}"
        );
        assert!(items.iter().all(|row| row["task"].is_string() == group.contains("task")), "{group}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bill_is_the_tenants_own_and_comes_as_csv_too() {
    let api = Api::start().await;
    api.echo().await;
    api.client.enqueue("echo", &json!({"input": 1})).await.expect(202);
    let me = api.register().await;
    let claimed = api.claim(me).await;
    api.ack(me, success(claimed)).await;
    let bill = api.client.get("/v1/usage?group=hour,task").await.expect(200).json();
    let row = &bill["items"][0];
    assert_eq!(
        (&row["task"], &row["attempts"], &row["succeeded"], &row["fuel"]),
        (&json!("echo"), &json!(1), &json!(1), &json!(7))
    );
    assert_eq!(bill["next"], Value::Null);
    let theirs = support::send(api.as_other(Method::GET, "/v1/usage?group=task")).await.expect(200).json();
    assert_eq!(theirs["items"], json!([]));
    let csv =
        support::send(api.client.request(Method::GET, "/v1/usage?group=task").header("accept", "text/csv"))
            .await;
    let csv = csv.expect(200);
    assert_eq!(csv.headers["content-type"], "text/csv; charset=utf-8");
    let text = csv.text();
    let lines: Vec<&str> = text.split("\r\n").collect();
    assert!(lines[0].starts_with("at,task,attempts,succeeded,fuel,"), "{lines:?}");
    assert!(lines[1].starts_with(",echo,1,1,7,"), "{lines:?}");
    let past =
        api.client.get("/v1/usage?from=2020-01-01T00:00:00Z&to=2020-02-01T00:00:00Z").await.expect(200);
    assert_eq!(past.json()["items"], json!([]));
    for bad in ["group=week", "from=x", "from=2030-01-01T00:00:00Z&to=2029-01-01T00:00:00Z", "x=1"] {
        let answer = api.client.get(&format!("/v1/usage?{bad}")).await;
        assert_eq!(super::problem(&answer, 400), "invalid-query", "{bad}");
    }
    assert!(Utc::now().to_rfc3339().as_str() > bill["from"].as_str().unwrap());
}
