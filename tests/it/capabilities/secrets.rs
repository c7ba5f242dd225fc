//! Secrets: put into headers by the host, and shown where the grant says so.

use std::sync::{Arc, Mutex};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::{Tenant, count};
use crate::support::{self, Database, Deployment};

/// 32 bytes as base64.
const MASTER_KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
const VALUE: &str = "hush-8f7a6b5c";

/// A server that keeps the heads of requests and answers none of their contents.
async fn target() -> (u16, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let heads: Arc<Mutex<Vec<String>>> = Arc::default();
    let kept = heads.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            let mut buffer = [0; 4096];
            while !head.windows(4).any(|w| w == b"\r\n\r\n") {
                match stream.read(&mut buffer).await {
                    Ok(0) | Err(_) => break,
                    Ok(n) => head.extend_from_slice(&buffer[..n]),
                }
            }
            kept.lock().unwrap().push(String::from_utf8_lossy(&head).into_owned());
            let _ = stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await;
        }
    });
    (port, heads)
}

async fn deployment() -> (Deployment, Tenant) {
    let settings = [
        ("SANDBAR_SECRETS__MASTER_KEY", MASTER_KEY.to_owned()),
        ("SANDBAR_EGRESS__PRIVATE_NETWORKS", "[127.0.0.0/8]".to_owned()),
    ];
    let deployment = Deployment::on(support::database().await, 1, &settings).await;
    let tenant = Tenant::first(&deployment);
    (deployment, tenant)
}

async fn set(tenant: &Tenant, name: &str, value: &str) {
    let path = format!("/v1/secrets/{name}");
    let answer = tenant.send(Method::PUT, &path, Some(&json!({"value": value}))).await;
    assert!(answer.status.is_success(), "{}", answer.text());
}

/// Whether a text stands anywhere in the database, as text or in bytes.
async fn is_stored(database: &Database, text: &str) -> Vec<String> {
    let admin = database.admin().await;
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT c.relname::text FROM pg_class c WHERE c.relnamespace = 'sandbar'::regnamespace AND c.relkind = 'r'",
    )
    .fetch_all(&admin)
    .await
    .unwrap();
    let mut found = Vec::new();
    for table in tables {
        let sql = format!(
            "SELECT count(*) FROM sandbar.{table} t WHERE t::text LIKE '%{text}%' OR t::text LIKE '%' || encode('{text}', 'hex') || '%'"
        );
        if count(database, &sql).await > 0 {
            found.push(table);
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_in_a_header_goes_where_its_grant_says_and_the_task_never_sees_it() {
    let (port, heads) = target().await;
    let (other_port, other_heads) = target().await;
    let (deployment, tenant) = deployment().await;
    tenant.upload("fetch", "fetch").await;
    set(&tenant, "API_TOKEN", VALUE).await;
    set(&tenant, "OTHER", "quite-another").await;
    set(&tenant, "SPLITS", "a\r\nx-forged: 1").await;
    let here = format!("http://127.0.0.1:{port}");
    let there = format!("http://127.0.0.1:{other_port}");
    let ask = |url: &str, header: &str, value: &str| json!({"url": url, "headers": {header: value}});
    let bearer = "Bearer {{secret:API_TOKEN}}";
    let http = json!([here, there]);

    // HTTP is granted, the secret is not.
    tenant.grant("fetch", &json!({"http": http})).await;
    let (out, ended) = tenant.run("fetch", &ask(&here, "authorization", bearer)).await;
    assert_eq!(out["error"], "HTTP-request-denied", "{ended:#}");
    let log = tenant.log(&ended).await;
    assert!(log.contains("no grant to send the secret `API_TOKEN` in the header `authorization`"), "{log}");
    assert!(heads.lock().unwrap().is_empty(), "not even the placeholder was sent");

    let sends = json!([
        {"secret": "API_TOKEN", "header": "authorization", "host": here},
        {"secret": "SPLITS", "header": "x-key", "host": here},
        {"secret": "NOBODY", "header": "x-key", "host": here},
        {"secret": "OTHER", "header": "x-key", "host": "http://127.0.0.2"},
    ]);
    tenant.grant("fetch", &json!({"secret_headers": sends})).await;
    let (out, ended) = tenant.run("fetch", &ask(&here, "Authorization", bearer)).await;
    assert_eq!(out["status"], 204, "{ended:#} {}", tenant.log(&ended).await);
    let head = heads.lock().unwrap().pop().unwrap();
    assert!(head.contains(&format!("authorization: Bearer {VALUE}\r\n")), "{head}");

    // Another host, another header, another secret, none of that name, one that would make two headers, and what is no
    // placeholder: nothing is sent.
    for (url, header, value) in [
        (&there, "authorization", bearer),
        (&here, "x-key", "{{secret:API_TOKEN}}"),
        (&here, "x-key", "{{secret:OTHER}}"),
        (&here, "x-key", "{{secret:NOBODY}}"),
        (&here, "x-key", "{{secret:SPLITS}}"),
        (&here, "x-key", "{{secret:1}}"),
    ] {
        let (out, ended) = tenant.run("fetch", &ask(url, header, value)).await;
        assert_eq!(out["error"], "HTTP-request-denied", "{url} {header} {value}: {ended:#}");
    }
    assert!(heads.lock().unwrap().is_empty() && other_heads.lock().unwrap().is_empty());
    // The path is no place for it.
    let (out, _) = tenant.run("fetch", &json!({"url": format!("{here}/%7B%7Bsecret:API_TOKEN%7D%7D")})).await;
    assert_eq!(out["status"], 204, "{out:#}");
    assert!(!heads.lock().unwrap().pop().unwrap().contains(VALUE));

    // A new value is sent from then on; a secret that is deleted, or a grant that is taken away, is gone.
    set(&tenant, "API_TOKEN", "hush-the-second").await;
    tenant.run("fetch", &ask(&here, "authorization", bearer)).await;
    assert!(heads.lock().unwrap().pop().unwrap().contains("Bearer hush-the-second\r\n"));
    tenant.grant("fetch", &json!({"secret_headers": null})).await;
    let (out, _) = tenant.run("fetch", &ask(&here, "authorization", bearer)).await;
    assert_eq!(out["error"], "HTTP-request-denied");

    // Another tenant has its own secrets, and none of ours.
    let second = Tenant::other(&deployment, "second").await;
    second.upload("fetch", "fetch").await;
    second.grant("fetch", &json!({"http": [here], "secret_headers": sends})).await;
    let (out, ended) = second.run("fetch", &ask(&here, "authorization", bearer)).await;
    assert_eq!(out["error"], "HTTP-request-denied", "{ended:#}");
    assert!(second.log(&ended).await.contains("there is no secret `API_TOKEN`"));
    assert!(heads.lock().unwrap().is_empty());

    // It stands nowhere in the clear: not in logs, results, errors, the audit log, or what the processes say.
    for value in [VALUE, "hush-the-second"] {
        assert_eq!(is_stored(&deployment.database, value).await, Vec::<String>::new(), "{value}");
        assert!(!deployment.server.log().contains(value) && !deployment.workers[0].log().contains(value));
    }

    // What is no grant is refused where it is given.
    for bad in [
        json!([{"secret": "1", "header": "x", "host": here}]),
        json!([{"secret": "A", "header": "Host", "host": here}]),
        json!([{"secret": "A", "header": "host", "host": here}]),
        json!([{"secret": "A", "header": "x", "host": "*"}]),
        json!([{"secret": "A", "header": "x", "host": here, "more": 1}]),
    ] {
        let body = json!({"grants": {"secret_headers": bad}});
        tenant.send(Method::PATCH, "/v1/tasks/fetch", Some(&body)).await.expect(422);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_sees_the_secrets_that_its_grant_shows_and_no_others() {
    let (deployment, tenant) = deployment().await;
    tenant.upload("settings", "settings").await;
    set(&tenant, "SHOWN", VALUE).await;
    set(&tenant, "HIDDEN", "quite-another").await;
    let look = json!([
        {"what": "reveal", "name": "SHOWN"}, {"what": "reveal", "name": "HIDDEN"},
        {"what": "reveal", "name": "NOBODY"}, {"what": "reveal", "name": "no name"},
    ]);
    let words = |out: &Value| {
        out.as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };

    // The module's wish gives nothing, and to have a secret sent is not to see it.
    tenant
        .grant(
            "settings",
            &json!({"secret_headers": [{"secret": "SHOWN", "header": "x", "host": "a.example"}]}),
        )
        .await;
    let (out, ended) = tenant.run("settings", &look).await;
    assert_eq!(words(&out)[..3], ["denied", "denied", "denied"], "{ended:#}");
    assert!(words(&out)[3].contains("letters, digits"), "{out}");
    let log = tenant.log(&ended).await;
    assert!(log.contains("no grant to see the secret `SHOWN`"), "{log}");

    tenant.grant("settings", &json!({"secrets": ["SHOWN", "NOBODY"]})).await;
    let (out, ended) = tenant.run("settings", &look).await;
    let length = format!("{} bytes", VALUE.len());
    assert_eq!(words(&out)[..3], [length.as_str(), "denied", "not found"], "{ended:#}");

    let second = Tenant::other(&deployment, "second").await;
    second.upload("settings", "settings").await;
    second.grant("settings", &json!({"secrets": ["SHOWN"]})).await;
    assert_eq!(words(&second.run("settings", &look).await.0)[0], "not found", "another tenant has its own");

    tenant.grant("settings", &json!({"secrets": null})).await;
    assert_eq!(words(&tenant.run("settings", &look).await.0)[0], "denied");
    assert_eq!(is_stored(&deployment.database, VALUE).await, Vec::<String>::new());
    assert!(!deployment.workers[0].log().contains(VALUE));
}
