//! Dead letters: listed, grouped, and deleted for good; another tenant sees none of it.

use reqwest::Method;
use sandbar::domain::retry::Verdict;
use sandbar_host::outcome::Termination;
use serde_json::{Value, json};

use crate::api::{Api, problem, success, trapped};
use crate::support::send;

impl Api {
    /// An invocation that died of a trap, or with a message of its own.
    pub(super) async fn dead(&self, message: Option<&str>) -> String {
        let answer =
            self.client.enqueue("echo", &json!({"input": 1, "tags": {"k": "v"}})).await.expect(202).json();
        let me = self.register().await;
        let mut end = trapped(self.claim(me).await, Verdict::Dead);
        if let Some(message) = message {
            end.outcome.backtrace = Vec::new();
            end.outcome.termination = Termination::GuestError {
                retryable: false,
                message: message.to_owned(),
                retry_after_ms: None,
            };
        }
        self.ack(me, end).await;
        answer["id"].as_str().unwrap().to_owned()
    }

    async fn letters(&self, query: &str) -> Vec<Value> {
        let list = self.client.get(&format!("/v1/dead-letters{query}")).await.expect(200).json();
        list["items"].as_array().unwrap().clone()
    }
}

#[tokio::test]
async fn what_dies_is_listed_at_once_and_grouped_by_what_killed_it() {
    let api = Api::start().await;
    api.echo().await;
    let trap = api.dead(None).await;
    let fresh = api.letters("").await;
    assert_eq!(
        (&fresh[0]["id"], &fresh[0]["reason"], &fresh[0]["fingerprint"]),
        (&json!(trap), &json!("trap"), &Value::Null)
    );
    for message in ["no customer 17", "no customer 4711", "no address 5"] {
        api.dead(Some(message)).await;
    }
    assert_eq!(api.classify().await.unwrap(), 4);
    assert_eq!(api.classify().await.unwrap(), 0);

    let groups = api.client.get("/v1/dead-letters/groups").await.expect(200).json();
    let groups = groups["items"].as_array().unwrap();
    let counts: Vec<i64> = groups.iter().map(|g| g["count"].as_i64().unwrap()).collect();
    assert_eq!(counts, [2, 1, 1], "{groups:?}");
    assert_eq!(groups[0]["summary"], "guest-error (fatal): no customer 4711");
    let link = groups[0]["link"].as_str().unwrap();
    let same = api.client.get(link).await.expect(200).json();
    assert_eq!(same["items"].as_array().unwrap().len(), 2);

    assert_eq!(api.letters("?reason=trap").await.len(), 1);
    assert_eq!(api.letters("?task=echo&limit=200").await.len(), 4);
    assert_eq!(api.letters("?task=other").await.len(), 0);
    assert_eq!(api.letters("?died_after=2100-01-01T00:00:00Z").await.len(), 0);
    assert_eq!(api.letters("?redriven=true").await.len(), 0);
    let first = api.client.get("/v1/dead-letters?reason=guest-error&limit=2").await.expect(200).json();
    let rest = api.client.get(first["next"].as_str().unwrap()).await.expect(200).json();
    assert_eq!((rest["items"].as_array().unwrap().len(), &rest["next"]), (1, &Value::Null));
    for bad in ["?fingerprint=xyz", "?died_after=now", "?redriven=maybe", "?state=dead", "?reason=%00"] {
        assert_eq!(
            problem(&api.client.get(&format!("/v1/dead-letters{bad}")).await, 400),
            "invalid-query",
            "{bad}"
        );
    }

    let other = send(api.as_other(Method::GET, "/v1/dead-letters")).await.expect(200).json();
    assert_eq!(other["items"], json!([]));
    let other = send(api.as_other(Method::GET, "/v1/dead-letters/groups")).await.expect(200).json();
    assert_eq!(other["items"], json!([]));
    let other = send(api.as_other(Method::DELETE, &format!("/v1/dead-letters/{trap}"))).await;
    assert_eq!(problem(&other, 404), "dead-letter-not-found");
}

#[tokio::test]
async fn a_purge_leaves_nothing_of_a_dead_letter_and_touches_nothing_else() {
    let api = Api::start().await;
    api.echo().await;
    let dead = api.dead(None).await;
    let kept = api.dead(None).await;
    let answer = api.client.enqueue("echo", &json!({"input": 1})).await.expect(202).json();
    let ended = answer["id"].as_str().unwrap();
    let me = api.register().await;
    let claimed = api.claim(me).await;
    api.ack(me, success(claimed)).await;
    let purge =
        async |id: &str| send(api.client.request(Method::DELETE, &format!("/v1/dead-letters/{id}"))).await;
    purge(&dead).await.expect(204);
    for table in ["invocations", "invocation_tags", "attempts", "results", "logs", "dead_letters"] {
        let left: i64 = sqlx::query_scalar(&format!(
            "SELECT count(*) FROM sandbar.{table} WHERE invocation_id = $1::uuid"
        ))
        .bind(&dead)
        .fetch_one(&api.admin)
        .await
        .unwrap();
        assert_eq!(left, 0, "{table}");
    }
    assert_eq!(problem(&purge(&dead).await, 404), "dead-letter-not-found");
    assert_eq!(problem(&purge(ended).await, 404), "dead-letter-not-found", "a success is no dead letter");
    assert_eq!(api.letters("").await[0]["id"], json!(kept));
    api.client.get(&format!("/v1/invocations/{ended}")).await.expect(200);
    api.client.get(&format!("/v1/invocations/{kept}")).await.expect(200);
}
