//! The edge: keys, addresses, methods, bodies, and a database that is not there.

use std::time::{Duration, Instant};

use reqwest::Method;
use sandbar::app::Settings;
use sandbar::domain::rate::{Rate, Rates};
use serde_json::json;
use sqlx::{Connection as _, PgConnection};

use super::{Api, problem};
use crate::support;

#[tokio::test]
async fn every_documented_operation_wants_a_key_and_the_rest_is_open() {
    let api = Api::start().await;
    let document = support::send(api.client.anonymous(Method::GET, "/openapi.json")).await.expect(200).json();
    let mut guarded = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            let id = uuid::Uuid::nil().to_string();
            let concrete = path.replace("{task}", "a").replace("{version}", "1").replace("{id}", &id);
            let method: Method = method.to_uppercase().parse().unwrap();
            let open = ["/livez", "/readyz", "/.well-known/jwks.json"].contains(&path.as_str());
            // Whoever has no credential yet gets one here, by what the body says.
            let door = ["login", "refresh", "accept", "reset"].map(|way| format!("/v1/auth/{way}"));
            let door = door.contains(path);
            for key in [None, Some("wrong"), Some("")] {
                let mut request = api.client.anonymous(method.clone(), &concrete);
                if let Some(key) = key {
                    request = request.header("authorization", format!("Bearer {key}"));
                }
                let answer = support::send(request).await;
                if open {
                    assert_eq!(answer.status, 200, "{path}");
                } else if door {
                    assert_ne!(answer.json()["code"], "unauthenticated", "{path}");
                    assert!((400..500).contains(&answer.status.as_u16()), "{path}: {}", answer.status);
                } else {
                    assert_eq!(problem(&answer, 401), "unauthenticated", "{method} {path}");
                    assert_eq!(answer.headers["www-authenticate"], "Bearer");
                    guarded += 1;
                }
            }
        }
    }
    assert!(guarded >= 30, "{guarded}");
    let bearer = api.client.anonymous(Method::GET, "/v1/tasks").bearer_auth(support::ADMIN_KEY);
    support::send(bearer).await.expect(200);
}

#[tokio::test]
async fn a_revoked_key_stops_working_within_seconds() {
    let api = Api::start().await;
    api.client.get("/v1/tasks").await.expect(200);
    sqlx::query("UPDATE sandbar.api_keys SET revoked_at = now()").execute(&api.admin).await.unwrap();
    support::eventually(Duration::from_secs(8), "the key to stop working", async || {
        (api.client.get("/v1/tasks").await.status == 401).then_some(())
    })
    .await;
}

#[tokio::test]
async fn addresses_and_methods_that_are_not_there_are_problems_too() {
    let api = Api::start().await;
    for path in ["/", "/v1", "/v2/tasks", "/v1/tasks/", "/v1/invocations/a/b/c", "/errors/none"] {
        assert_eq!(problem(&api.client.get(path).await, 404), "route-not-found", "{path}");
    }
    let wrong = support::send(api.client.request(Method::DELETE, "/v1/tasks")).await;
    assert_eq!(problem(&wrong, 405), "method-not-allowed");
    assert!(wrong.headers["allow"].to_str().unwrap().contains("GET"), "{:?}", wrong.headers);
    for id in ["1", "../x", "00000000-0000-0000-0000-000000000000", "%00"] {
        let answer = api.client.get(&format!("/v1/invocations/{id}")).await;
        assert_eq!(answer.status, 404, "{id}");
    }
    assert_eq!(problem(&api.client.get("/v1/tasks/a/versions/x").await, 404), "version-not-found");
    assert_eq!(problem(&api.client.get("/v1/tasks/%00").await, 404), "task-not-found");
}

#[tokio::test]
async fn the_type_of_a_problem_leads_to_its_page() {
    let api = Api::start().await;
    let answer = api.client.get("/v1/tasks/none").await;
    let kind = answer.json()["type"].as_str().unwrap().to_owned();
    let page = support::send(api.client.anonymous(Method::GET, &kind)).await.expect(200);
    assert!(page.text().starts_with("# task-not-found"));
}

#[tokio::test]
async fn malformed_bodies_are_told_by_position_and_other_types_are_refused() {
    let api = Api::start().await;
    api.echo().await;
    let send = async |content_type: Option<&str>, body: &str| {
        let mut request =
            api.client.request(Method::POST, "/v1/tasks/echo/invocations").body(body.to_owned());
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        support::send(request).await
    };
    for (body, place) in
        [("{\n \"input\": ,}", "line 2 column 11"), ("", "line 1 column 0"), ("{}{}", "line 1 column 3")]
    {
        let answer = send(Some("application/json"), body).await;
        assert_eq!(problem(&answer, 400), "malformed-json");
        assert!(answer.json()["detail"].as_str().unwrap().contains(place), "{}", answer.text());
    }
    assert_eq!(problem(&send(Some("text/plain"), "{}").await, 415), "unsupported-media-type");
    assert_eq!(problem(&send(None, "{}").await, 415), "unsupported-media-type");
    // Deeper than anybody nests; and an input that no parser of ours has to descend into.
    let deep = format!("{{\"input\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    send(Some("application/json"), &deep).await.expect(202);
    let limits = format!("{{\"limits\": {}}}", "[".repeat(100_000));
    let status = send(Some("application/json"), &limits).await.status.as_u16();
    assert!(status == 400 || status == 422, "{status}");
}

#[tokio::test]
async fn every_answer_has_a_request_id_and_a_plain_one_of_the_client_is_kept() {
    let api = Api::start().await;
    let answer = api.client.get("/v1/tasks").await;
    answer.headers["x-request-id"].to_str().unwrap().parse::<uuid::Uuid>().unwrap();
    let mine = api.client.request(Method::GET, "/none").header("x-request-id", "mine-1");
    assert_eq!(support::send(mine).await.headers["x-request-id"], "mine-1");
    let long = api.client.request(Method::GET, "/none").header("x-request-id", "x".repeat(500));
    assert_ne!(support::send(long).await.headers["x-request-id"].len(), 500);
}

#[tokio::test]
async fn without_a_database_everything_answers_503_in_time_and_recovers_with_it() {
    let (postgres, database, _dir) = support::own_postgres().await;
    let settings = Settings { request_timeout: Duration::from_secs(8), ..Settings::default() };
    let api = Api::on(&database, settings).await;
    api.echo().await;
    api.client.enqueue("echo", &json!({})).await.expect(202);
    // A backend may outlive its postmaster by a request or two: only a server that started later has recovered.
    let admin = database.admin_url();
    let started = async || -> Option<chrono::DateTime<chrono::Utc>> {
        let mut connection = PgConnection::connect(&admin).await.ok()?;
        sqlx::query_scalar("SELECT pg_postmaster_start_time()").fetch_one(&mut connection).await.ok()
    };
    let before = started().await.unwrap();
    let killed = Instant::now();
    support::kill(postgres.pid().unwrap(), rustix::process::Signal::KILL);
    let mut refused = 0;
    support::eventually(Duration::from_secs(60), "recovery", async || {
        let asked = Instant::now();
        let answer = api.client.enqueue("echo", &json!({"input": refused})).await;
        assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
        if answer.status == 202 {
            return started().await.filter(|at| *at > before).map(drop);
        }
        let code = problem(&answer, 503);
        assert!(code == "database-unavailable" || code == "timeout", "{code}");
        refused += 1;
        None
    })
    .await;
    assert!(killed.elapsed() < Duration::from_secs(60));
    // One dead connection in the pool must not cost one request each.
    for path in ["/readyz", "/v1/tasks", "/v1/invocations", "/readyz", "/v1/tasks"] {
        let answer = api.client.get(path).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    }
    let _ = postgres.stop().await;
    let dead = support::send(api.client.anonymous(Method::GET, "/readyz")).await;
    assert_eq!(problem(&dead, 503), "database-unavailable");
    assert_eq!(dead.headers["retry-after"], "1");
    let refused = api.client.enqueue("echo", &json!({})).await;
    assert_eq!(refused.status, 503, "{}", refused.text());
    support::send(api.client.anonymous(Method::GET, "/livez")).await.expect(200);
}

#[tokio::test]
async fn the_page_about_the_api_is_open_and_may_reach_nothing_but_this_server() {
    let api = Api::start().await;
    let page = support::send(api.client.anonymous(Method::GET, "/docs")).await.expect(200);
    assert_eq!(page.headers["content-type"], "text/html; charset=utf-8");
    let policy = page.headers["content-security-policy"].to_str().unwrap();
    for part in ["default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "script-src 'sha256-"]
    {
        assert!(policy.contains(part), "{policy}");
    }
    assert!(page.text().contains("fetch(\"/openapi.json\")"));
}

#[tokio::test]
async fn browsers_are_told_with_every_answer_to_show_and_frame_nothing() {
    let api = Api::start().await;
    for path in ["/v1/tasks", "/none", "/livez", "/openapi.json", "/docs", "/errors/internal"] {
        let answer = api.client.get(path).await;
        assert_eq!(answer.headers["x-content-type-options"], "nosniff", "{path}");
        assert_eq!(answer.headers["x-frame-options"], "DENY", "{path}");
        assert_eq!(answer.headers["referrer-policy"], "no-referrer", "{path}");
        let policies: Vec<_> = answer.headers.get_all("content-security-policy").iter().collect();
        assert_eq!(policies.len(), 1, "{path}");
        let policy = policies[0].to_str().unwrap();
        assert!(
            policy.starts_with("default-src 'none'") && policy.contains("frame-ancestors 'none'"),
            "{path}"
        );
        assert!(!answer.headers.contains_key("strict-transport-security"), "{path}");
        assert!(!answer.headers.contains_key("access-control-allow-origin"), "{path}");
    }
}

/// One call per second after `burst` at once: what a test does at once is over before anything comes back.
fn slow(burst: u32) -> Rate {
    Rate { per_s: 1, burst }
}

#[tokio::test]
async fn a_key_and_a_tenant_are_held_to_their_rates_and_told_how_they_stand() {
    let settings = Settings {
        rates: Rates { key: slow(20), tenant: slow(30), ..Rates::UNLIMITED },
        ..Settings::default()
    };
    let api = Api::on(&support::database().await, settings).await;
    let mut refused = None;
    for n in 0..25 {
        let answer = api.client.get("/v1/tasks").await;
        assert_eq!(
            answer.headers["ratelimit-policy"].to_str().unwrap().split(',').next(),
            Some("\"key\";q=20;w=20")
        );
        if answer.status == 429 {
            assert!(n >= 20, "{n}");
            refused = Some(answer);
        } else {
            let standing = answer.headers["ratelimit"].to_str().unwrap();
            assert!(standing.contains("\"key\";r=") && standing.contains("\"tenant\";r="), "{standing}");
        }
    }
    let refused = refused.expect("to be refused");
    assert_eq!(problem(&refused, 429), "rate-limited");
    assert_eq!(refused.headers["retry-after"], "1");
    assert!(refused.headers["ratelimit"].to_str().unwrap().starts_with("\"key\";r=0;t=20"));
    // Others have their own.
    support::send(api.as_other(Method::GET, "/v1/tasks")).await.expect(200);
    // A second key of the first tenant is held by what the tenant has left.
    sqlx::query(
        "INSERT INTO sandbar.api_keys (tenant_id, key_id, prefix, hash, role) VALUES ($1, gen_random_uuid(), 'sbk', sha256('second-key'), 'admin')",
    )
    .bind(api.tenant)
    .execute(&api.admin)
    .await
    .unwrap();
    let mut let_through = 0;
    for _ in 0..20 {
        let second = api.client.anonymous(Method::GET, "/v1/tasks").header("x-api-key", "second-key");
        let answer = support::send(second).await;
        let_through += usize::from(answer.status == 200);
        if answer.status != 200 {
            assert!(answer.text().contains("this tenant"), "{}", answer.text());
        }
    }
    assert!((1..20).contains(&let_through), "{let_through}");
    // More holds as soon as it is said.
    api.app.set_rates(Rates::UNLIMITED);
    assert!(!api.client.get("/v1/tasks").await.expect(200).headers.contains_key("ratelimit"));
}

#[tokio::test]
async fn strangers_are_held_by_their_address_and_those_with_a_valid_key_are_not() {
    let settings = Settings { rates: Rates { address: slow(10), ..Rates::UNLIMITED }, ..Settings::default() };
    let api = Api::on(&support::database().await, settings).await;
    api.client.get("/v1/tasks").await.expect(200);
    let mut statuses = Vec::new();
    for n in 0..30 {
        let request =
            api.client.anonymous(Method::GET, if n % 2 == 0 { "/v1/tasks" } else { "/openapi.json" });
        let request = if n % 4 == 0 { request.header("x-api-key", format!("guess-{n}")) } else { request };
        let answer = support::send(request).await;
        if answer.status == 429 {
            assert_eq!(problem(&answer, 429), "rate-limited");
            assert!(answer.headers["ratelimit"].to_str().unwrap().starts_with("\"address\";r=0"));
        }
        statuses.push(answer.status.as_u16());
    }
    let refused = statuses.iter().filter(|status| **status == 429).count();
    // The first known call counted as well, before its key was known.
    assert!((10..=22).contains(&refused), "{statuses:?}");
    // Who is known is served, and whether the process runs is always told.
    api.client.get("/v1/tasks").await.expect(200);
    support::send(api.client.anonymous(Method::GET, "/livez")).await.expect(200);
}
