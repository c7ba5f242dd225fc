//! Secrets: written through the API, never read through it, sealed in Postgres, opened for workers, wrapped anew.

use std::sync::Arc;

use reqwest::Method;
use sandbar::app::vault::{KEY_BYTES, Vault};
use sandbar::app::{Settings, secret};
use serde_json::{Value, json};

use super::{Api, problem};
use crate::support::{self, Answer};

const VALUE: &str = "a-value-that-nobody-may-see";

async fn start() -> (Api, Arc<Vault>) {
    let vault = Arc::new(Vault::new(Some([7; KEY_BYTES]), Vec::new()));
    let settings = Settings { vault: Arc::clone(&vault), ..Settings::default() };
    (Api::on(&support::database().await, settings).await, vault)
}

async fn put(api: &Api, name: &str, body: Value) -> Answer {
    support::send(api.client.request(Method::PUT, &format!("/v1/secrets/{name}")).json(&body)).await
}

/// The value of a secret, as a worker gets it.
async fn value(api: &Api, vault: &Vault, name: &str) -> Option<Vec<u8>> {
    let sealed =
        api.worker.sealed_secrets(api.tenant, &[name.to_owned(), "ABSENT".to_owned()]).await.unwrap();
    let opened = secret::open(vault, api.tenant, &sealed).unwrap();
    opened.into_iter().find(|(found, _)| found == name).map(|(_, value)| value.to_vec())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_goes_in_and_comes_out_for_workers_only() {
    let (api, vault) = start().await;
    let set = put(&api, "TOKEN", json!({"value": VALUE})).await.expect(200).json();
    assert_eq!((&set["name"], &set["version"]), (&json!("TOKEN"), &json!(1)));
    assert_eq!(value(&api, &vault, "TOKEN").await.as_deref(), Some(VALUE.as_bytes()));
    let next = put(&api, "TOKEN", json!({"value_base64": "AP8="})).await.expect(200).json();
    assert_eq!(next["version"], 2);
    assert_eq!(value(&api, &vault, "TOKEN").await.unwrap(), [0, 255]);
    put(&api, "OTHER", json!({"value": VALUE})).await.expect(200);
    let list = api.client.get("/v1/secrets").await.expect(200);
    assert!(!list.text().contains(VALUE), "{}", list.text());
    let names: Vec<Value> =
        list.json()["items"].as_array().unwrap().iter().map(|s| s["name"].clone()).collect();
    assert_eq!(names, [json!("OTHER"), json!("TOKEN")]);
    assert!(!api.client.get("/v1/secrets/OTHER").await.expect(200).text().contains(VALUE));

    // Another tenant sees none of it, and has its own of the same name.
    let theirs = support::send(api.as_other(Method::GET, "/v1/secrets/TOKEN")).await;
    assert_eq!(problem(&theirs, 404), "secret-not-found");
    support::send(api.as_other(Method::PUT, "/v1/secrets/TOKEN").json(&json!({"value": "theirs"})))
        .await
        .expect(200);
    assert_eq!(value(&api, &vault, "TOKEN").await.unwrap(), [0, 255]);

    support::send(api.client.request(Method::DELETE, "/v1/secrets/TOKEN")).await.expect(204);
    let gone = support::send(api.client.request(Method::DELETE, "/v1/secrets/TOKEN")).await;
    assert_eq!(problem(&gone, 404), "secret-not-found");
    assert_eq!(value(&api, &vault, "TOKEN").await, None);
    let left: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM sandbar.secret_versions WHERE tenant_id = $1 AND name = 'TOKEN'",
    )
    .bind(api.tenant)
    .fetch_one(&api.admin)
    .await
    .unwrap();
    assert_eq!(left, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_postgres_has_is_sealed_bound_to_its_row_and_bounded() {
    let (api, vault) = start().await;
    for n in 0..13 {
        put(&api, "TOKEN", json!({"value": format!("{VALUE}-{n}")})).await.expect(200);
    }
    let rows: Vec<(i32, Vec<u8>)> =
        sqlx::query_as("SELECT version, sealed FROM sandbar.secret_versions ORDER BY version")
            .fetch_all(&api.admin)
            .await
            .unwrap();
    assert_eq!(rows.iter().map(|(version, _)| *version).collect::<Vec<_>>(), (4..=13).collect::<Vec<_>>());
    for (_, sealed) in &rows {
        assert!(!sealed.windows(VALUE.len()).any(|part| part == VALUE.as_bytes()));
    }
    // An old value in the place of the new one does not open.
    sqlx::query("UPDATE sandbar.secret_versions SET sealed = $1 WHERE version = 13")
        .bind(&rows[0].1)
        .execute(&api.admin)
        .await
        .unwrap();
    let moved = api.worker.sealed_secrets(api.tenant, &["TOKEN".to_owned()]).await.unwrap();
    assert!(secret::open(&vault, api.tenant, &moved).is_err());

    for (name, body, status) in [
        ("1A", json!({"value": "x"}), 404),
        ("A-B", json!({"value": "x"}), 404),
        ("A", json!({}), 422),
        ("A", json!({"value": ""}), 422),
        ("A", json!({"value": "x", "value_base64": "eA=="}), 422),
        ("A", json!({"value_base64": "?"}), 422),
        ("A", json!({"value": "x".repeat(65_537)}), 422),
        ("A", json!({"valu": "x"}), 422),
    ] {
        assert_eq!(put(&api, name, body.clone()).await.status.as_u16(), status, "{name}");
    }
    put(&api, "A", json!({"value": "x".repeat(65_536)})).await.expect(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_master_key_replaces_the_old_one_while_everything_is_readable() {
    let (api, old) = start().await;
    put(&api, "TOKEN", json!({"value": VALUE})).await.expect(200);
    support::send(api.as_other(Method::PUT, "/v1/secrets/TOKEN").json(&json!({"value": "theirs"})))
        .await
        .expect(200);
    let both = Arc::new(Vault::new(Some([8; KEY_BYTES]), vec![[7; KEY_BYTES]]));
    let new = Vault::new(Some([8; KEY_BYTES]), Vec::new());
    let token = ["TOKEN".to_owned()];
    let before = api.worker.sealed_secrets(api.tenant, &token).await.unwrap();
    assert!(secret::open(&new, api.tenant, &before).is_err());
    assert!(secret::open(&both, api.tenant, &before).is_ok());
    assert_eq!(secret::rewrap(&api.worker, &both).await.unwrap(), 2);
    assert_eq!(secret::rewrap(&api.worker, &both).await.unwrap(), 0);
    assert_eq!(value(&api, &new, "TOKEN").await.as_deref(), Some(VALUE.as_bytes()));
    let after = api.worker.sealed_secrets(api.tenant, &token).await.unwrap();
    assert!(secret::open(&old, api.tenant, &after).is_err(), "the old key is not needed any more");
    assert_eq!(before[0].sealed, after[0].sealed, "values are not sealed anew");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_master_key_there_are_no_secrets() {
    let api = Api::start().await;
    assert_eq!(problem(&put(&api, "TOKEN", json!({"value": "x"})).await, 503), "secrets-unavailable");
    assert_eq!(api.client.get("/v1/secrets").await.expect(200).json(), json!({"items": []}));
}
