//! The keys that sign tokens: sealed in Postgres by the master key, and usable through every change of it.

use std::sync::Arc;

use reqwest::Method;
use sandbar::app::vault::{KEY_BYTES, Vault};
use sandbar::app::{Settings, secret};
use sandbar::domain::permission::Role;
use serde_json::{Value, json};

use super::people::{PASSWORD, user};
use super::{Api, problem};
use crate::support::{Answer, Client, send};

fn with(current: u8, previous: &[u8]) -> Arc<Vault> {
    let key = |byte: &u8| [*byte; KEY_BYTES];
    Arc::new(Vault::new(Some(key(&current)), previous.iter().map(key).collect()))
}

fn settings(vault: &Arc<Vault>) -> Settings {
    Settings { vault: Arc::clone(vault), ..Settings::default() }
}

async fn login(client: &Client) -> Answer {
    let body = json!({"email": "ada@example.org", "password": PASSWORD});
    send(client.anonymous(Method::POST, "/v1/auth/login").json(&body)).await
}

fn token(answer: Answer) -> String {
    answer.expect(200).json()["access_token"].as_str().unwrap().to_owned()
}

async fn accepts(client: &Client, token: &str) {
    send(client.anonymous(Method::GET, "/v1/me").bearer_auth(token)).await.expect(200);
}

async fn stored(api: &Api) -> Vec<(Vec<u8>, Option<String>)> {
    sqlx::query_as("SELECT seed, master FROM sandbar.issuer_keys").fetch_all(&api.admin).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signing_key_in_the_clear_is_sealed_by_the_first_server_with_a_master_key_and_its_tokens_stay_good()
{
    // As an earlier version left it, or an installation without a master key.
    let api = Api::start().await;
    user(&api, "ada@example.org", Role::Developer).await;
    let before = token(login(&api.client).await);
    let rows = stored(&api).await;
    let [(seed, None)] = rows.as_slice() else { panic!("{rows:?}") };
    assert_eq!(seed.len(), 32);

    let (one, _one) = api.beside(settings(&with(1, &[]))).await;
    // Reading the keys is enough, as a server does when it starts.
    let jwks: Value = send(one.anonymous(Method::GET, "/.well-known/jwks.json")).await.expect(200).json();
    assert_eq!(jwks["keys"].as_array().unwrap().len(), 1);
    let rows = stored(&api).await;
    let [(sealed, Some(master))] = rows.as_slice() else { panic!("{rows:?}") };
    assert_eq!(Some(master.as_str()), with(1, &[]).current());
    assert!(!sealed.windows(32).any(|part| part == seed.as_slice()));
    accepts(&one, &before).await;
    let after = token(login(&one).await);
    for token in [&before, &after] {
        accepts(&api.client, token).await;
    }

    // Without the master key, or with another, tokens are still believed, and none are made.
    let (without, _without) = api.beside(Settings::default()).await;
    accepts(&without, &after).await;
    assert_eq!(problem(&login(&without).await, 503), "secrets-unavailable");
    let (other, _other) = api.beside(settings(&with(2, &[]))).await;
    accepts(&other, &after).await;
    assert_eq!(problem(&login(&other).await, 500), "sealed-unreadable");

    // Under a new master key: wrapped anew while servers know both, and then the old one is not needed.
    let both = with(2, &[1]);
    assert_eq!(secret::rewrap(&api.worker, &both).await.unwrap(), 1);
    assert_eq!(secret::rewrap(&api.worker, &both).await.unwrap(), 0);
    let rows = stored(&api).await;
    assert!(matches!(rows.as_slice(), [(_, Some(master))] if Some(master.as_str()) == both.current()));
    let (new, _new) = api.beside(settings(&with(2, &[]))).await;
    accepts(&new, &after).await;
    accepts(&one, &token(login(&new).await)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signing_key_made_by_a_server_with_a_master_key_is_never_in_the_clear_and_opens_under_its_name_alone()
 {
    let vault = with(1, &[]);
    let api = Api::on(&crate::support::database().await, settings(&vault)).await;
    user(&api, "ada@example.org", Role::Developer).await;
    token(login(&api.client).await);
    let rows = stored(&api).await;
    assert!(matches!(rows.as_slice(), [(seed, Some(_))] if seed.len() > 32), "{rows:?}");
    // Nobody at all reads them but by functions, and workers only what is sealed by another key.
    for (url, statement) in [
        ("api", "SELECT count(*) FROM sandbar.issuer_keys"),
        ("worker", "SELECT count(*) FROM sandbar.issuer_keys"),
        ("worker", "SELECT count(*) FROM sandbar.issuer_keys_list()"),
    ] {
        let role = format!("SET LOCAL ROLE sandbar_{url}");
        let mut transaction = api.admin.begin().await.unwrap();
        sqlx::query(&role).execute(&mut *transaction).await.unwrap();
        let refused = sqlx::query(statement).execute(&mut *transaction).await.unwrap_err();
        assert!(refused.to_string().contains("permission denied"), "{url}: {refused}");
    }
    sqlx::query("UPDATE sandbar.issuer_keys SET kid = 'moved'").execute(&api.admin).await.unwrap();
    let (next, _next) = api.beside(settings(&vault)).await;
    assert_eq!(problem(&login(&next).await, 500), "sealed-unreadable");
}
