//! Versions without a module: the worker makes their request, by the rules of those that guests make.

use std::sync::atomic::Ordering;
use std::time::Duration;

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Target, log};
use crate::cli::Person;
use crate::support::{self, Answer, Client, Deployment};

/// 32 bytes as base64.
const MASTER_KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
const SOON: Duration = Duration::from_secs(20);

async fn start(workers: usize, settings: &[(&'static str, String)]) -> (Deployment, Client) {
    let mut all = vec![("SANDBAR_EGRESS__PRIVATE_NETWORKS", "[127.0.0.0/8]".to_owned())];
    all.extend_from_slice(settings);
    let deployment = Deployment::on(support::database().await, workers, &all).await;
    let client = deployment.client();
    (deployment, client)
}

async fn define(client: &Client, task: &str, http: &Value) -> Answer {
    client.post(&format!("/v1/tasks/{task}/versions"), &json!({"http": http})).await
}

async fn grant(client: &Client, task: &str, grants: &Value) {
    let body = json!({"grants": grants});
    support::send(client.request(Method::PATCH, &format!("/v1/tasks/{task}")).json(&body)).await.expect(200);
}

/// The one attempt of an invocation without retries.
async fn once(client: &Client, task: &str, mut body: Value) -> Value {
    body["retry"] = json!({"max_attempts": 1});
    client.invoke(task, &body).await.expect(200).json()
}

async fn result(client: &Client, ended: &Value) -> Answer {
    client.get(&format!("/v1/invocations/{}/result", ended["id"].as_str().unwrap())).await
}

fn reason(ended: &Value) -> &Value {
    &ended["attempts"][0]["termination"]["reason"]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_needs_no_module_and_goes_where_its_task_has_a_grant() {
    let target = Target::start().await;
    let (_deployment, client) = start(1, &[]).await;
    let hook = json!({
        "description": "Tells the shop", "method": "POST", "url": target.url("/echo?shop=1"),
        "headers": {"X-Shop": "one"}, "body": r#"{"order": {{input}}}"#,
    });
    let made = define(&client, "hook", &hook).await.expect(201).json();
    assert_eq!(
        (&made["state"], &made["kind"], &made["version"]),
        (&json!("ready"), &json!("http"), &json!(1))
    );
    assert_eq!(define(&client, "hook", &hook).await.expect(200).json()["version"], 1);
    let module = client.get("/v1/tasks/hook/versions/1/module").await.expect(200);
    assert_eq!(module.headers["content-type"], "application/json");
    assert_eq!(module.json()["http"], hook);
    assert_eq!(client.get("/v1/tasks/hook").await.json()["description"], "Tells the shop");

    // No grant: nobody is even dialled.
    let ended = once(&client, "hook", json!({"input": {"n": 7}})).await;
    assert_eq!((&ended["state"], reason(&ended)), (&json!("dead"), &json!("denied")), "{ended:#}");
    assert!(log(&client, &ended).await.contains("no grant for http://127.0.0.1"));
    assert_eq!(target.seen(), 0);

    grant(&client, "hook", &target.grant()).await;
    let ended = once(&client, "hook", json!({"input": {"n": 7}})).await;
    assert_eq!(ended["state"], "succeeded", "{ended:#} {}", log(&client, &ended).await);
    let sent = target.latest();
    assert!(sent.starts_with("POST /echo?shop=1 HTTP/1.1\r\n"), "{sent}");
    assert!(sent.ends_with("\r\n\r\n{\"order\": {\"n\":7}}"), "{sent}");
    let id = ended["id"].as_str().unwrap();
    for header in [
        "x-shop: one",
        "content-type: application/json",
        "content-length: 18",
        &format!("idempotency-key: {id}"),
    ] {
        assert!(sent.contains(&format!("\r\n{header}\r\n")), "{header} in {sent}");
    }
    let out = result(&client, &ended).await.expect(200).text();
    assert!(out.starts_with("18 post /echo?shop=1 http/1.1"), "{out}");
    let receipt = &ended["attempts"][0]["receipt"];
    assert_eq!(receipt["egress_bytes"].as_u64().unwrap(), 18 + out.len() as u64, "{receipt:#}");
    assert_eq!(
        (&receipt["fuel"], &receipt["fuel_exact"], &receipt["host_calls"]),
        (&json!(0), &json!(true), &json!(1))
    );
    assert!(receipt["cpu_ns"].as_u64().unwrap() > 0, "{receipt:#}");
    let said = log(&client, &ended).await;
    assert!(said.contains(&format!("POST http://127.0.0.1:{}: 200", target.port)), "{said}");
    assert!(!said.contains("shop=1"), "paths may say more than is meant for logs: {said}");

    // Where it leads is another request, which nobody makes.
    define(&client, "hook", &json!({"method": "GET", "url": target.url("/away")})).await.expect(201);
    let ended = once(&client, "hook", json!({})).await;
    let end = &ended["attempts"][0]["termination"];
    assert_eq!((&end["reason"], &end["retryable"]), (&json!("guest-error"), &json!(false)), "{ended:#}");
    assert!(
        end["message"].as_str().unwrap().starts_with("unexpected-status: GET http://127.0.0.1"),
        "{ended:#}"
    );
    let away = json!({"method": "GET", "url": target.url("/away"), "expect": ["2xx", 302]});
    define(&client, "hook", &away).await.expect(201);
    let ended = once(&client, "hook", json!({})).await;
    assert_eq!((&ended["state"], &ended["version"]), (&json!("succeeded"), &json!(3)), "{ended:#}");
    assert!(!target.latest().contains("idempotency-key"), "{}", target.latest());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_could_never_be_sent_is_no_version_and_a_request_takes_input_only() {
    let (_deployment, client) = start(0, &[]).await;
    for (http, pointer) in [
        (json!({"method": "post", "url": "https://a.example"}), "/http/method"),
        (json!({"method": "POST", "url": "https://user@a.example"}), "/http/url"),
        (
            json!({"method": "POST", "url": "https://a.example", "headers": {"host": "b"}}),
            "/http/headers/host",
        ),
        (json!({"method": "POST", "url": "https://a.example", "expect": ["ok"]}), "/http/expect/0"),
        (json!({"method": "POST", "url": "https://a.example", "retries": 3}), "/http/retries"),
    ] {
        let answer = define(&client, "hook", &http).await.expect(422).json();
        assert_eq!(
            (&answer["code"], &answer["errors"][0]["pointer"]),
            (&json!("invalid-body"), &json!(pointer))
        );
    }
    client.get("/v1/tasks/hook").await.expect(404);
    define(&client, "hook", &json!({"method": "POST", "url": "https://a.example"})).await.expect(201);
    for (body, code) in [
        (json!({"stdin": "x"}), "wrong-input-kind"),
        (json!({"args": ["x"]}), "wrong-input-kind"),
        (json!({"files": {"a": "b"}}), "invalid-body"),
        (json!({"determinism": {"clock": "2026-01-01T00:00:00Z", "seed": 1}}), "invalid-body"),
    ] {
        assert_eq!(client.enqueue("hook", &body).await.expect(422).json()["code"], code, "{body}");
    }
    client.enqueue("hook", &json!({"input": 1})).await.expect(202);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_receiver_is_asked_again_and_a_closed_one_too() {
    let target = Target::start().await;
    let (_deployment, client) = start(1, &[]).await;
    define(&client, "busy", &json!({"method": "PUT", "url": target.url("/busy")})).await.expect(201);
    grant(&client, "busy", &target.grant()).await;
    let body = json!({"input": 1, "retry": {"initial_ms": 10, "jitter": 0}});
    let ended = client.invoke("busy", &body).await.expect(200).json();
    assert_eq!(
        (&ended["state"], ended["attempts"].as_array().unwrap().len()),
        (&json!("succeeded"), 2),
        "{ended:#}"
    );
    let first = &ended["attempts"][0]["termination"];
    assert_eq!((&first["retryable"], &first["retry_after_ms"]), (&json!(true), &json!(0)), "{ended:#}");

    // Nobody listens on port 1.
    define(&client, "closed", &json!({"method": "GET", "url": "http://127.0.0.1:1/"})).await.expect(201);
    grant(&client, "closed", &json!({"http": ["http://127.0.0.1:1"]})).await;
    let body = json!({"retry": {"max_attempts": 2, "initial_ms": 1, "jitter": 0}});
    let ended = client.invoke("closed", &body).await.expect(200).json();
    assert_eq!(ended["attempts"].as_array().unwrap().len(), 2, "{ended:#}");
    let message = ended["attempts"][1]["termination"]["message"].as_str().unwrap();
    assert!(message.starts_with("connection-refused: "), "{message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_ends_with_its_deadline_its_timeout_its_cancellation_and_its_workers_lease() {
    let target = Target::start().await;
    let (mut deployment, client) = start(1, &[]).await;
    let closed = async || {
        support::eventually(SOON, "the connection to be closed", async || {
            (target.open.load(Ordering::SeqCst) == 0).then_some(())
        })
        .await;
    };
    define(&client, "never", &json!({"method": "GET", "url": target.url("/never")})).await.expect(201);
    grant(&client, "never", &target.grant()).await;
    let ended = once(&client, "never", json!({"limits": {"timeout_ms": 500}})).await;
    assert_eq!(reason(&ended), "deadline", "{ended:#}");
    assert!(log(&client, &ended).await.contains("GET http://127.0.0.1"), "{ended:#}");
    closed().await;

    let slow = json!({"method": "GET", "url": target.url("/never"), "timeout_ms": 300});
    define(&client, "slow", &slow).await.expect(201);
    grant(&client, "slow", &target.grant()).await;
    let ended = once(&client, "slow", json!({})).await;
    let message = ended["attempts"][0]["termination"]["message"].as_str().unwrap();
    assert!(message.starts_with("http-response-timeout: "), "{message}");
    closed().await;

    let begin = async || {
        let body = json!({"retry": {"max_attempts": 1}});
        let id = client.enqueue("never", &body).await.expect(202).json()["id"].as_str().unwrap().to_owned();
        support::eventually(SOON, "the request", async || {
            (target.open.load(Ordering::SeqCst) == 1).then_some(())
        })
        .await;
        id
    };
    let id = begin().await;
    client.post(&format!("/v1/invocations/{id}/cancel"), &json!({})).await.expect(202);
    closed().await;
    support::eventually(SOON, "the cancellation", async || {
        (client.get(&format!("/v1/invocations/{id}")).await.json()["state"] == "cancelled").then_some(())
    })
    .await;

    // A worker that slept too long finds its lease lost, and lets go before anything else.
    let id = begin().await;
    let slept = deployment.workers.remove(0);
    slept.signal(Signal::STOP);
    let _other = deployment.spawn_worker();
    support::eventually(Duration::from_secs(60), "the request of the other worker", async || {
        (target.open.load(Ordering::SeqCst) == 2).then_some(())
    })
    .await;
    slept.signal(Signal::CONT);
    support::eventually(SOON, "the first connection to be closed", async || {
        (target.open.load(Ordering::SeqCst) == 1).then_some(())
    })
    .await;
    client.post(&format!("/v1/invocations/{id}/cancel"), &json!({})).await.expect(202);
    closed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_is_cut_at_the_output_limit_and_counted_and_bytes_are_capped_both_ways() {
    let target = Target::start().await;
    let caps = [
        ("SANDBAR_EGRESS__MAX_SENT_BYTES", "1000".to_owned()),
        ("SANDBAR_EGRESS__MAX_RECEIVED_BYTES", "200000".to_owned()),
    ];
    let (_deployment, client) = start(1, &caps).await;
    for (task, path) in [("some", "/bytes/150000"), ("many", "/bytes/200001"), ("echo", "/echo")] {
        define(&client, task, &json!({"method": "POST", "url": target.url(path)})).await.expect(201);
        grant(&client, task, &target.grant()).await;
    }
    let ended = once(&client, "some", json!({"limits": {"output_bytes": 1_000}})).await;
    assert_eq!(ended["state"], "succeeded", "{ended:#}");
    let receipt = &ended["attempts"][0]["receipt"];
    assert_eq!(
        (&receipt["output_bytes"], &receipt["output_dropped_bytes"], &receipt["egress_bytes"]),
        (&json!(1_000), &json!(149_000), &json!(150_000)),
        "{receipt:#}"
    );
    assert_eq!(result(&client, &ended).await.expect(200).body, vec![b'y'; 1_000]);
    let ended = once(&client, "many", json!({})).await;
    assert_eq!(reason(&ended), "quota-exceeded", "{ended:#}");
    let seen = target.seen();
    let ended = once(&client, "echo", json!({"input": "x".repeat(999)})).await;
    assert_eq!(reason(&ended), "quota-exceeded", "{ended:#}");
    assert_eq!(target.seen(), seen, "nobody was dialled");
    let ended = once(&client, "echo", json!({"input": "x".repeat(998), "limits": {"log_bytes": 0}})).await;
    assert_eq!(ended["state"], "succeeded", "{ended:#}");
    assert!(ended["attempts"][0]["receipt"]["log_dropped_bytes"].as_u64().unwrap() > 0, "{ended:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_reaches_the_receiver_and_no_log_and_sealed_answers_stay_sealed() {
    let target = Target::start().await;
    let settings = [
        ("SANDBAR_SECRETS__MASTER_KEY", MASTER_KEY.to_owned()),
        ("SANDBAR_SECRETS__SEAL_PAYLOADS", "true".to_owned()),
    ];
    let (deployment, client) = start(1, &settings).await;
    let put = client.request(Method::PUT, "/v1/secrets/TOKEN").json(&json!({"value": "hush-1f2e3d"}));
    assert!(support::send(put).await.status.is_success());
    let definition = json!({
        "method": "POST", "url": target.url("/bytes/3"), "headers": {"authorization": "Bearer {{secret:TOKEN}}"},
    });
    define(&client, "hook", &definition).await.expect(201);
    grant(&client, "hook", &target.grant()).await;
    let ended = once(&client, "hook", json!({"input": "sealed-4c5b6a"})).await;
    assert_eq!(reason(&ended), "denied", "{ended:#}");
    assert_eq!(target.seen(), 0, "not even the placeholder was sent");

    let host = target.url("");
    let header = json!([{"secret": "TOKEN", "header": "authorization", "host": host}]);
    grant(&client, "hook", &json!({"secret_headers": header})).await;
    let ended = once(&client, "hook", json!({"input": "sealed-4c5b6a"})).await;
    assert_eq!(ended["state"], "succeeded", "{ended:#}");
    let sent = target.latest();
    assert!(
        sent.contains("\r\nauthorization: Bearer hush-1f2e3d\r\n") && sent.ends_with("\"sealed-4c5b6a\""),
        "{sent}"
    );
    assert_eq!(result(&client, &ended).await.expect(200).text(), "yyy");
    let said = format!("{ended} {} {}", log(&client, &ended).await, deployment.workers[0].log());
    assert!(!said.contains("hush-"), "{said}");
    for (table, text) in [("results", "yyy"), ("attempts", "POST http"), ("invocations", "sealed-4c5b6a")] {
        let sql = format!(
            "SELECT count(*) FROM sandbar.{table} t WHERE t::text LIKE '%' || encode('{text}', 'hex') || '%' OR t::text LIKE '%{text}%'"
        );
        let found: i64 =
            sqlx::query_scalar(&sql).fetch_one(&deployment.database.admin().await).await.unwrap();
        assert_eq!(found, 0, "{text} in {table}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_makes_one_with_one_command_and_invokes_it() {
    let target = Target::start().await;
    let (deployment, _client) = start(1, &[]).await;
    let person = Person::of(&deployment);
    let url = target.url("/echo");
    let push = [
        "push",
        "--task",
        "tell",
        "--http",
        "POST",
        &url,
        "--header",
        "x-own: 1",
        "--body",
        "<{{input}}>",
        "--expect",
        "200-204",
        "--answer-within",
        "10s",
        "--description",
        "Tells",
    ];
    let made = person.run(&push).expect(0);
    assert!(made.out.contains("tell version 1 is ready"), "{made:?}");
    let host = target.url("");
    assert!(made.err.contains(&format!("sandbar tasks update tell --grant-http {host}\n")), "{made:?}");
    person.run(&["tasks", "update", "tell", "--grant-http", &host]).expect(0);
    let told = person.run(&["invoke", "tell", "--input", "1", "--wait"]).expect(0);
    assert!(told.out.starts_with("3 post /echo"), "{told:?}");
    assert!(
        target.latest().contains("\r\nx-own: 1\r\n") && target.latest().ends_with("<1>"),
        "{}",
        target.latest()
    );
    person.run(&["push", "--http", "POST", &url]).expect(2);
    let refused = person.run(&["push", "--task", "tell", "--http", "post", &url]);
    assert!(refused.code != 0 && refused.err.contains("/http/method"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_ends_with_its_lease_while_its_worker_is_wide_awake() {
    let target = Target::start().await;
    let (deployment, client) = start(1, &[]).await;
    define(&client, "never", &json!({"method": "GET", "url": target.url("/never")})).await.expect(201);
    grant(&client, "never", &target.grant()).await;
    client.enqueue("never", &json!({"retry": {"max_attempts": 1}})).await.expect(202);
    support::eventually(SOON, "the request", async || {
        (target.open.load(Ordering::SeqCst) == 1).then_some(())
    })
    .await;
    // As after the reaper, which believed that the worker was dead: its row is gone, and its leases with it.
    let admin = deployment.database.admin().await;
    for table in ["leases", "workers"] {
        let gone = sqlx::query(&format!("DELETE FROM sandbar.{table}")).execute(&admin).await.unwrap();
        assert_eq!(gone.rows_affected(), 1, "{table}");
    }
    support::eventually(SOON, "the connection to be closed", async || {
        (target.open.load(Ordering::SeqCst) == 0).then_some(())
    })
    .await;
    assert_eq!(target.seen(), 1, "and nobody sent it again who has no lease");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_starts_a_request_which_has_its_own_grants_and_not_those_of_who_started_it() {
    let target = Target::start().await;
    let (_deployment, client) = start(1, &[]).await;
    client.upload("starter", &support::guest("starter")).await.expect(201);
    let hook = json!({"method": "POST", "url": target.url("/echo"), "body": "<{{input}}>"});
    define(&client, "hook", &hook).await.expect(201);
    let begin = json!({"start": "hook", "times": 1, "with": 7});
    // Its starter may go there; it may not.
    let mut grants = target.grant();
    grants["invoke"] = json!(["hook"]);
    grant(&client, "starter", &grants).await;
    let started = async || {
        let ended = once(&client, "starter", json!({"input": begin})).await;
        let said = result(&client, &ended).await.expect(200).json();
        let path = format!("/v1/invocations/{}", said[0].as_str().unwrap());
        support::eventually(SOON, "the end of what was started", async || {
            let now = client.get(&path).await.expect(200).json();
            now["finished_at"].is_string().then_some(now)
        })
        .await
    };
    let ended = started().await;
    assert_eq!(reason(&ended), "denied", "{ended:#}");
    assert_eq!(target.seen(), 0);

    grant(&client, "hook", &target.grant()).await;
    let ended = started().await;
    assert_eq!((&ended["task"], &ended["state"]), (&json!("hook"), &json!("succeeded")), "{ended:#}");
    assert!(target.latest().ends_with("\r\n\r\n<7>"), "{}", target.latest());
    assert!(result(&client, &ended).await.expect(200).text().starts_with("3 post /echo"));
    assert_eq!(target.seen(), 1);
}
