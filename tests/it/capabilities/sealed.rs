//! What guests keep and start, and what people set for them, sealed at rest: by real guests on real workers.

use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::kv::{adds_up, step};
use super::{Tenant, count};
use crate::support::{self, Deployment, eventually};

const SOON: Duration = Duration::from_secs(60);
const CANARY: &str = "canary-that-nobody-may-see-in-postgres";
/// One that can be a number: it is counted in a store, and is the input of a start.
const NUMBER: i64 = 771_188_229_933_447;

/// A deployment with a master key. What is asked to be started is also written down where nobody empties it.
async fn deployment(seal: bool, workers: usize) -> (Deployment, PgPool, tempfile::TempDir) {
    let dir = support::data_dir();
    let master = dir.path().join("master");
    std::fs::write(&master, BASE64_STANDARD.encode([1; 32])).unwrap();
    let settings = [
        ("SANDBAR_SECRETS__MASTER_KEY_FILE", master.display().to_string()),
        ("SANDBAR_SECRETS__SEAL_PAYLOADS", seal.to_string()),
    ];
    let deployment = Deployment::on(support::database().await, workers, &settings).await;
    let admin = deployment.database.admin().await;
    sqlx::raw_sql(
        "CREATE TABLE sandbar.asked (input bytea, hash bytea);
         CREATE FUNCTION sandbar.write_down() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
           BEGIN INSERT INTO sandbar.asked VALUES (NEW.input, NEW.input_hash); RETURN NEW; END $$;
         CREATE TRIGGER write_down AFTER INSERT ON sandbar.starts FOR EACH ROW EXECUTE FUNCTION sandbar.write_down();",
    )
    .execute(&admin)
    .await
    .unwrap();
    (deployment, admin, dir)
}

async fn tasks(tenant: &Tenant) {
    for (task, grants) in [
        ("store", json!({"kv": true})),
        ("settings", json!({})),
        ("starter", json!({"invoke": ["echo"]})),
        ("echo", json!({})),
    ] {
        tenant.upload(task, task).await;
        tenant.grant(task, &grants).await;
    }
}

async fn set(tenant: &Tenant, config: &Value) -> Value {
    let body = json!({ "config": config });
    tenant.send(Method::PATCH, "/v1/tasks/settings", Some(&body)).await.expect(200).json()
}

/// Leaves the canary by every way that there is for a guest and its people, and reads it back by each.
async fn leave(tenant: &Tenant) {
    let number = NUMBER.to_string();
    let steps = json!([
        step("set", "a", CANARY, 0),
        step("append", "b", CANARY, 2),
        step("set-many", "m", CANARY, 3),
        step("increment", "n", &number, 0),
        step("get", "a", "", 0),
        step("get-many", "m", "", 4),
        step("get", "n", "", 0),
        step("keys", "", "", 0),
        step("exists", "b", "", 0),
        step("increment", "a", "1", 0),
    ]);
    let (out, ended) = tenant.run("store", &steps).await;
    let many = format!("{CANARY} {CANARY} {CANARY} none");
    let said: Vec<&str> =
        out.as_array().unwrap_or_else(|| panic!("{ended:#}")).iter().map(|v| v.as_str().unwrap()).collect();
    let length = (2 * CANARY.len()).to_string();
    let expected =
        ["ok", &length, "ok", &number, CANARY, &many, &number, "a b m00000 m00001 m00002 n", "true"];
    assert_eq!(said[..9], expected, "{ended:#}");
    assert!(said[9].contains("no whole number"), "{out:#}");

    let shown = set(tenant, &json!({"text": CANARY, "other": CANARY})).await;
    assert_eq!(shown["config"], json!({"text": CANARY, "other": CANARY}), "{shown:#}");
    let shown = set(tenant, &json!({"other": null, "more": CANARY})).await;
    assert_eq!(shown["config"], json!({"text": CANARY, "more": CANARY}), "{shown:#}");
    let listed = tenant.send(Method::GET, "/v1/tasks", None).await.expect(200);
    assert!(listed.text().contains(CANARY), "{}", listed.text());
    let steps = json!([
        {"what": "all"}, {"what": "get", "name": "text"}, {"what": "log", "name": "c", "text": CANARY}
    ]);
    let (out, ended) = tenant.run("settings", &steps).await;
    assert_eq!(out, json!([format!("more={CANARY} text={CANARY}"), CANARY, "ok"]), "{ended:#}");
    assert!(tenant.log(&ended).await.contains(CANARY));

    let start = json!({"start": "echo", "times": 1, "with": NUMBER, "key": "k", "fail_first": true});
    let started = tenant.wait("starter", &json!({"input": start, "retry": {"max_attempts": 2}})).await;
    let id = started["id"].as_str().unwrap();
    let result = tenant.send(Method::GET, &format!("/v1/invocations/{id}/result"), None).await.expect(200);
    let child = result.json()[0].as_str().unwrap().to_owned();
    let result = format!("/v1/invocations/{child}/result");
    let out = eventually(SOON, "what was started to end", async || {
        let answer = tenant.send(Method::GET, &result, None).await;
        (answer.status.as_u16() == 200).then(|| answer.text())
    })
    .await;
    assert_eq!(out, number, "{started:#}");

    let secret = json!({ "value": CANARY });
    tenant.send(Method::PUT, "/v1/secrets/SHOWN", Some(&secret)).await.expect(200);
    tenant.grant("settings", &json!({"secrets": ["SHOWN"]})).await;
    let (out, ended) = tenant.run("settings", &json!([{"what": "reveal", "name": "SHOWN"}])).await;
    assert_eq!(out, json!([format!("{} bytes", CANARY.len())]), "{ended:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_guests_keep_or_start_and_nothing_set_for_them_stands_anywhere_in_plain_when_sealed() {
    // Without sealing, to see that the search finds what there is.
    let (plain, admin, _dir) = deployment(false, 1).await;
    let tenant = Tenant::first(&plain);
    tasks(&tenant).await;
    leave(&tenant).await;
    let found = support::tables_with(&admin, CANARY).await;
    for table in ["audit", "invocations", "kv", "logs", "results", "tasks"] {
        assert!(found.iter().any(|found| found == table), "{table} is not searched: {found:?}");
    }
    assert!(!found.iter().any(|found| found == "secret_versions"), "{found:?}");
    let found = support::tables_with(&admin, &NUMBER.to_string()).await;
    for table in ["asked", "invocations", "kv", "results"] {
        assert!(found.iter().any(|found| found == table), "{table} is not searched: {found:?}");
    }

    let (sealed, admin, _dir) = deployment(true, 1).await;
    let tenant = Tenant::first(&sealed);
    tasks(&tenant).await;
    leave(&tenant).await;
    for text in [CANARY, &NUMBER.to_string()] {
        assert_eq!(support::tables_with(&admin, text).await, Vec::<String>::new());
    }
    let guess = format!("SELECT count(*) FROM sandbar.starts WHERE input_hash = sha256('{NUMBER}'::bytea)");
    assert_eq!(
        count(&sealed.database, "SELECT count(*) FROM sandbar.asked WHERE length(input) > 0").await,
        1
    );
    assert_eq!(count(&sealed.database, &guess).await, 0, "who guesses an input is not told that he is right");
    let counted = "SELECT (SELECT bytes FROM sandbar.kv_usage) - (SELECT sum(octet_length(key) + octet_length(value) + 64) FROM sandbar.kv)::bigint";
    assert_eq!(count(&sealed.database, counted).await, 0, "the quota counts what is stored");
    // The audit log says which text changed.
    let audit = tenant.send(Method::GET, "/v1/audit", None).await.expect(200).text();
    assert!(audit.contains(r#""more":{"sealed":""#), "{audit}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_and_sealed_values_stand_side_by_side_and_an_erased_key_takes_the_sealed_ones_along() {
    let (deployment, admin, _dir) = deployment(false, 1).await;
    let platform = Tenant::first(&deployment);
    let tenant = Tenant::other(&deployment, "second").await;
    tasks(&tenant).await;
    set(&tenant, &json!({"old": "plain"})).await;
    tenant.run("store", &json!([step("set", "old", "plain", 0), step("increment", "n", "5", 0)])).await;

    let seal = async |payloads: bool| {
        let body = json!({ "payloads": payloads });
        tenant.send(Method::PUT, "/v1/encryption", Some(&body)).await.expect(200);
        let wanted = if payloads { "new" } else { "again" };
        // Workers hear of it within two seconds.
        eventually(SOON, "workers to hear of it", async || {
            tenant.run("store", &json!([step("set", wanted, CANARY, 0)])).await;
            let sql = format!(
                "SELECT count(*) FROM sandbar.kv WHERE key = '{wanted}' AND (sealed IS NOT NULL) = {payloads}"
            );
            (count(&deployment.database, &sql).await == 1).then_some(())
        })
        .await;
    };
    seal(true).await;
    set(&tenant, &json!({"new": CANARY})).await;
    let look = json!([
        step("get", "old", "", 0),
        step("get", "new", "", 0),
        step("increment", "n", "2", 0),
        step("append", "old", "!", 1),
        step("get", "old", "", 0)
    ]);
    let (out, ended) = tenant.run("store", &look).await;
    assert_eq!(out, json!(["plain", CANARY, "7", "6", "plain!"]), "{ended:#}");
    let (out, _) = tenant.run("settings", &json!([{"what": "all"}])).await;
    assert_eq!(out, json!([format!("new={CANARY} old=plain")]));
    // A server that serves no master key or another tenant's row cannot swap them: a value opens where it was put alone.
    sqlx::query(
        "UPDATE sandbar.kv a SET value = b.value FROM sandbar.kv b WHERE a.key = 'n' AND b.key = 'new'",
    )
    .execute(&admin)
    .await
    .unwrap();
    let (out, _) =
        tenant.run("store", &json!([step("get", "n", "", 0), step("increment", "n", "1", 0)])).await;
    for said in out.as_array().unwrap() {
        assert!(said.as_str().unwrap().contains("does not open"), "{out}");
    }
    let (out, _) =
        tenant.run("store", &json!([step("set", "n", "40", 0), step("increment", "n", "2", 0)])).await;
    assert_eq!(out, json!(["ok", "42"]));

    // Turned off again: what is sealed is still read, and what is written is plain.
    seal(false).await;
    let (out, _) = tenant
        .run(
            "store",
            &json!([
                step("get", "new", "", 0),
                step("increment", "n", "1", 0),
                step("increment", "n", "1", 0)
            ]),
        )
        .await;
    assert_eq!(out, json!([CANARY, "43", "44"]));
    let plain = "SELECT count(*) FROM sandbar.kv WHERE key = 'n' AND sealed IS NULL AND value = '44'::bytea";
    assert_eq!(count(&deployment.database, plain).await, 1);

    let id: uuid::Uuid = sqlx::query_scalar("SELECT tenant_id FROM sandbar.tenants WHERE name = 'second'")
        .fetch_one(&admin)
        .await
        .unwrap();
    let state = async |state: &str| {
        sqlx::query("UPDATE sandbar.tenants SET state = $1 WHERE tenant_id = $2")
            .bind(state)
            .bind(id)
            .execute(&admin)
            .await
            .unwrap();
    };
    state("suspended").await;
    platform.send(Method::DELETE, &format!("/v1/tenants/{id}/key"), None).await.expect(204);
    state("active").await;
    let task = eventually(SOON, "the tenant to be active", async || {
        let answer = tenant.send(Method::GET, "/v1/tasks/settings", None).await;
        (answer.status.as_u16() == 200).then(|| answer.json())
    })
    .await;
    assert_eq!(task["config"], json!({"old": "plain"}), "what nobody can open is left out");
    let gone = eventually(SOON, "workers to forget the key", async || {
        let (out, _) =
            tenant.run("store", &json!([step("get", "new", "", 0), step("get", "old", "", 0)])).await;
        (out[0] != CANARY).then_some(out)
    })
    .await;
    for said in gone.as_array().unwrap() {
        assert!(said.as_str().unwrap().contains("has been erased"), "{gone}");
    }
    let (out, _) = tenant.run("settings", &json!([{"what": "all"}])).await;
    assert!(out[0].as_str().unwrap().contains("has been erased"), "{out}");
    // Written anew, it is there again.
    set(&tenant, &json!({"new": "x"})).await;
    assert_eq!(tenant.run("settings", &json!([{"what": "all"}])).await.0, json!(["new=x old=plain"]));
    let (out, _) = tenant.run("store", &json!([step("set", "new", "y", 0), step("get", "new", "", 0)])).await;
    assert_eq!(out, json!(["ok", "y"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_many_attempts_add_to_one_sealed_number_on_several_workers_adds_up() {
    let (deployment, _admin, _dir) = deployment(true, 2).await;
    let tenant = Tenant::first(&deployment);
    tenant.upload("store", "store").await;
    tenant.grant("store", &json!({"kv": true})).await;
    adds_up(&tenant, 6, (20, 5)).await;
    let plain = "SELECT count(*) FROM sandbar.kv WHERE sealed IS NULL";
    assert_eq!(count(&deployment.database, plain).await, 0);
}
