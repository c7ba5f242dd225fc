//! Retention: what ended long ago goes, exported first; what has not ended stays, however old.

use std::io::Read as _;
use std::time::Duration;

use chrono::Utc;
use sandbar::domain::ids::{InvocationId, WorkerId};
use sandbar::scheduler::retention;
use sandbar::store::Error;
use serde_json::{Value, json};

use crate::api::{Api, problem, success};

impl Api {
    /// Makes an invocation look as if it had been accepted, and had ended, days ago. Its new id.
    async fn aged(&self, id: &str, days: u64) -> InvocationId {
        let then = Utc::now() - Duration::from_secs(days * 86_400);
        let millis = u128::try_from(then.timestamp_millis()).unwrap();
        let old: uuid::Uuid = id.parse().unwrap();
        let new = uuid::Uuid::from_u128((old.as_u128() & (u128::MAX >> 48)) | (millis << 80));
        let mut transaction = self.admin.begin().await.unwrap();
        sqlx::query("SET LOCAL session_replication_role = replica").execute(&mut *transaction).await.unwrap();
        for table in [
            "invocations",
            "invocation_tags",
            "attempts",
            "results",
            "logs",
            "scheduled",
            "ready",
            "dead_letters",
        ] {
            sqlx::query(&format!("UPDATE sandbar.{table} SET invocation_id = $2 WHERE invocation_id = $1"))
                .bind(old)
                .bind(new)
                .execute(&mut *transaction)
                .await
                .unwrap();
        }
        sqlx::query("UPDATE sandbar.results SET finished_at = $2 WHERE invocation_id = $1")
            .bind(new)
            .bind(then)
            .execute(&mut *transaction)
            .await
            .unwrap();
        transaction.commit().await.unwrap();
        InvocationId(new)
    }

    async fn ended(&self, input: &Value) -> String {
        let body = json!({"input": input, "tags": {"k": "v"}});
        let answer = self.client.enqueue("echo", &body).await.expect(202).json();
        let me = self.register().await;
        let claimed = self.claim(me).await;
        self.ack(me, success(claimed)).await;
        answer["id"].as_str().unwrap().to_owned()
    }

    async fn left(&self, table: &str) -> i64 {
        sqlx::query_scalar(&format!("SELECT count(*) FROM sandbar.{table}"))
            .fetch_one(&self.admin)
            .await
            .unwrap()
    }
}

#[tokio::test]
async fn what_ended_long_ago_is_exported_and_deleted_and_what_is_young_or_open_stays() {
    let api = Api::start().await;
    api.echo().await;
    let old = api.aged(&api.ended(&json!({"n": 1})).await, 40).await;
    let young = api.aged(&api.ended(&json!(2)).await, 20).await;
    let open =
        api.client.enqueue("echo", &json!({"input": 3, "delay_ms": 3_600_000})).await.expect(202).json();
    let open = api.aged(open["id"].as_str().unwrap(), 40).await;

    let dir = tempfile::tempdir().unwrap();
    assert_eq!(retention::turn(&api.worker, 30, Some(dir.path())).await.unwrap(), (1, false));
    let gone = api.client.get(&format!("/v1/invocations/{old}")).await;
    assert_eq!(problem(&gone, 404), "invocation-not-found");
    for kept in [young, open] {
        api.client.get(&format!("/v1/invocations/{kept}")).await.expect(200);
    }
    for (table, rows) in [
        ("invocations", 2),
        ("invocation_tags", 1),
        ("attempts", 1),
        ("results", 1),
        ("logs", 1),
        ("scheduled", 1),
    ] {
        assert_eq!(api.left(table).await, rows, "{table}");
    }

    let mine = dir.path().join(api.tenant.to_string());
    let files: Vec<_> = std::fs::read_dir(mine).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    let mut text = String::new();
    flate2::read::GzDecoder::new(std::fs::File::open(&files[0]).unwrap()).read_to_string(&mut text).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 1);
    let line = &lines[0];
    assert_eq!(
        (&line["invocation"]["invocation_id"], &line["invocation"]["task"]),
        (&json!(old), &json!("echo"))
    );
    assert_eq!(
        (&line["input_base64"], &line["output_base64"]),
        (&json!("eyJuIjoxfQ=="), &json!("eyJuIjoxfQ=="))
    );
    assert_eq!((&line["attempts"][0]["fuel"], &line["logs"][1]["message"]), (&json!(7), &json!("two")));

    // A tenant's own number goes before the installation's; the walk comes again when it is its time.
    sqlx::query("UPDATE sandbar.tenants SET retention_days = 10").execute(&api.admin).await.unwrap();
    assert_eq!(retention::turn(&api.worker, 30, None).await.unwrap(), (0, false), "an hour has not passed");
    sqlx::query("UPDATE sandbar.retention_walks SET next_at = now()").execute(&api.admin).await.unwrap();
    assert_eq!(retention::turn(&api.worker, 30, None).await.unwrap(), (1, false));
    api.client.get(&format!("/v1/invocations/{open}")).await.expect(200);
}

#[tokio::test]
async fn nothing_is_deleted_that_could_not_be_exported_or_by_who_lost_the_duty() {
    let api = Api::start().await;
    api.echo().await;
    api.aged(&api.ended(&json!(1)).await, 40).await;
    let no_dir = tempfile::NamedTempFile::new().unwrap();
    assert!(retention::turn(&api.worker, 30, Some(no_dir.path())).await.is_err());
    assert_eq!(api.left("invocations").await, 1);

    let long = Duration::from_secs(60);
    api.worker.duty_announce("retention", long).await.unwrap();
    let held = api.worker.duty_hold("retention", WorkerId::generate(), long, true).await.unwrap().unwrap();
    api.worker.duties_release(WorkerId::generate()).await.unwrap();
    sqlx::query("UPDATE sandbar.duties SET fence = fence + 1").execute(&api.admin).await.unwrap();
    let refused = retention::turn(&api.worker.under(&held), 30, None).await.unwrap_err();
    assert!(matches!(refused.downcast_ref(), Some(Error::FenceLost)), "{refused:#}");
    assert_eq!(api.left("invocations").await, 1);
}
