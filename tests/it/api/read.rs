//! Reading, listing and cancelling.

use reqwest::Method;
use sandbar::api::access::OPERATIONS;
use sandbar::app::Settings;
use sandbar::domain::permission::Role;
use sandbar::domain::retry::Verdict;
use sandbar_host::outcome::Termination;
use serde_json::{Value, json};

use super::access::insert_key;
use super::strangers::measured;
use super::{Api, problem, success, trapped};
use crate::support;

/// Invocations that wait.
const MANY: i64 = 20_000;
/// Blocks that a read may look at beyond those of an empty queue: an index has one more level, a plan is another. All that
/// waits are some 200.
const SLACK_BLOCKS: i64 = 60;

async fn invoke(api: &Api, body: Value) -> String {
    let accepted = api.client.enqueue("echo", &body).await.expect(202);
    accepted.json()["id"].as_str().unwrap().to_owned()
}

fn ids(list: &Value) -> Vec<String> {
    let items = list["items"].as_array().unwrap();
    items.iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_result_has_the_bytes_and_the_type_of_the_guest_and_nothing_a_browser_could_run() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let id = invoke(&api, json!({"input_base64": "PGI+AP8="})).await;
    let path = format!("/v1/invocations/{id}/result");
    assert_eq!(problem(&api.client.get(&path).await, 409), "not-finished");
    let mut finished = success(api.claim(me).await);
    finished.outcome.content_type = "text/html".to_owned();
    api.ack(me, finished).await;
    let result = api.client.get(&path).await.expect(200);
    assert_eq!(result.body, b"<b>\0\xff");
    assert_eq!(result.headers["content-type"], "text/html");
    assert_eq!(result.headers["x-content-type-options"], "nosniff");
    assert_eq!(result.headers["content-security-policy"], "default-src 'none'; sandbox");
}

#[tokio::test]
async fn a_media_type_that_is_no_header_becomes_plain_bytes() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let id = invoke(&api, json!({})).await;
    let mut finished = success(api.claim(me).await);
    finished.outcome.content_type = "a\r\nset-cookie: x=y".to_owned();
    api.ack(me, finished).await;
    let result = api.client.get(&format!("/v1/invocations/{id}/result")).await.expect(200);
    assert_eq!(result.headers["content-type"], "application/octet-stream");
    assert!(result.headers.get("set-cookie").is_none());
    assert!(result.body.is_empty());
}

#[tokio::test]
async fn what_ended_without_output_has_none() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let dead = invoke(&api, json!({})).await;
    let mut finished = trapped(api.claim(me).await, Verdict::Dead);
    finished.outcome.termination = Termination::OutOfFuel;
    api.ack(me, finished).await;
    let cancelled = invoke(&api, json!({})).await;
    api.client.post(&format!("/v1/invocations/{cancelled}/cancel"), &json!({})).await.expect(200);
    for id in [&dead, &cancelled] {
        let answer = api.client.get(&format!("/v1/invocations/{id}/result")).await;
        assert_eq!(problem(&answer, 404), "no-output");
    }
    let dead = api.client.get(&format!("/v1/invocations/{dead}")).await.json();
    assert_eq!((&dead["state"], &dead["reason"]), (&json!("dead"), &json!("out-of-fuel")));
}

#[tokio::test]
async fn a_log_has_the_records_of_all_attempts_in_order_or_of_one() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let id = invoke(&api, json!({})).await;
    let path = format!("/v1/invocations/{id}/logs");
    assert_eq!(api.client.get(&path).await.expect(200).json(), json!({"items": []}));
    api.ack(me, trapped(api.claim(me).await, Verdict::Release { delay_ms: 0 })).await;
    api.ack(me, success(api.claim(me).await)).await;
    let records = api.client.get(&path).await.expect(200).json()["items"].clone();
    let told: Vec<(i64, &str)> = records
        .as_array()
        .unwrap()
        .iter()
        .map(|r| (r["attempt"].as_i64().unwrap(), r["message"].as_str().unwrap()))
        .collect();
    assert_eq!(told, [(1, "one"), (1, "two"), (2, "one"), (2, "two")]);
    assert_eq!(records[0]["fields"], json!({"k": "v"}));
    let second = api.client.get(&format!("{path}?attempt=2")).await.expect(200).json();
    assert_eq!(second["items"].as_array().unwrap().len(), 2);
    assert_eq!(problem(&api.client.get(&format!("{path}?attempt=x")).await, 400), "invalid-query");
}

#[tokio::test]
async fn a_log_longer_than_one_look_at_it_comes_whole() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let id = invoke(&api, json!({})).await;
    let long = "x".repeat(5 << 20);
    for attempt in 1..=3 {
        let mut finished = trapped(api.claim(me).await, Verdict::Release { delay_ms: 0 });
        finished.outcome.logs = [super::record(&long)].iter().collect();
        if attempt == 3 {
            finished.verdict = Verdict::Dead;
        }
        api.ack(me, finished).await;
    }
    // More bytes than one look brings.
    let all = api.client.get(&format!("/v1/invocations/{id}/logs")).await.expect(200).json();
    let attempts: Vec<&Value> = all["items"].as_array().unwrap().iter().map(|r| &r["attempt"]).collect();
    assert_eq!(attempts, [&json!(1), &json!(2), &json!(3)]);
    let second =
        api.client.get(&format!("/v1/invocations/{id}/logs?limit=1&after=1.0")).await.expect(200).json();
    assert_eq!((&second["items"][0]["attempt"], &second["next"]), (&json!(2), &json!("2.0")));
}

#[tokio::test]
async fn cancelling_ends_what_waits_tells_what_runs_and_refuses_what_has_ended() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let cancel = async |id: &str| api.client.post(&format!("/v1/invocations/{id}/cancel"), &json!({})).await;
    for body in [json!({}), json!({"delay_ms": 60_000})] {
        let id = invoke(&api, body).await;
        let answer = cancel(&id).await.expect(200).json();
        assert_eq!((&answer["state"], &answer["reason"]), (&json!("cancelled"), &json!("cancelled")));
        assert_eq!(problem(&cancel(&id).await, 409), "already-finished");
    }
    let id = invoke(&api, json!({})).await;
    let claimed = api.claim(me).await;
    let mut told = api.signals.subscribe_cancelled();
    let answer = cancel(&id).await.expect(202).json();
    assert_eq!((&answer["state"], &answer["cancel_requested"]), (&json!("running"), &json!(true)));
    assert_eq!(told.recv().await.unwrap().to_string(), id);
    cancel(&id).await.expect(202);
    api.ack(me, success(claimed)).await;
    let ended = api.client.get(&format!("/v1/invocations/{id}")).await.json();
    assert_eq!(ended["state"], "succeeded");
    assert!(ended.get("cancel_requested").is_none());
}

#[tokio::test]
async fn lists_show_the_newest_first_in_pages_without_gaps_or_repetitions() {
    let api = Api::start().await;
    api.echo().await;
    let mut all = Vec::new();
    for n in 0..7 {
        all.push(invoke(&api, json!({"tags": {"n": n.to_string(), "kind": "ä&b"}})).await);
    }
    all.reverse();
    let mut seen = Vec::new();
    let mut path = "/v1/invocations?limit=3&tag=kind:%C3%A4%26b".to_owned();
    loop {
        let page = api.client.get(&path).await.expect(200).json();
        seen.push(ids(&page));
        match page["next"].as_str() {
            Some(next) => path = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(seen.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 1]);
    assert_eq!(seen.concat(), all);
}

#[tokio::test]
async fn a_list_shows_what_passes_every_filter() {
    let api = Api::start().await;
    api.echo().await;
    api.task("other", "task", &json!({})).await;
    let me = api.register().await;
    let succeeded = invoke(&api, json!({"tags": {"a": "1", "b": "1"}})).await;
    api.ack(me, success(api.claim(me).await)).await;
    let dead = invoke(&api, json!({"tags": {"a": "1"}})).await;
    api.ack(me, trapped(api.claim(me).await, Verdict::Dead)).await;
    let running = invoke(&api, json!({})).await;
    let _claimed = api.claim(me).await;
    let queued = invoke(&api, json!({"tags": {"a": "2"}})).await;
    let scheduled = invoke(&api, json!({"delay_ms": 60_000})).await;
    let cancelled = invoke(&api, json!({})).await;
    api.client.post(&format!("/v1/invocations/{cancelled}/cancel"), &json!({})).await.expect(200);
    let elsewhere =
        api.client.enqueue("other", &json!({})).await.expect(202).json()["id"].as_str().unwrap().to_owned();
    for (query, expected) in [
        ("state=succeeded", vec![&succeeded]),
        ("state=dead", vec![&dead]),
        ("state=running", vec![&running]),
        ("state=queued", vec![&elsewhere, &queued]),
        ("state=scheduled", vec![&scheduled]),
        ("state=cancelled", vec![&cancelled]),
        ("state=expired", vec![]),
        ("task=other", vec![&elsewhere]),
        ("task=none", vec![]),
        ("tag=a:1", vec![&dead, &succeeded]),
        ("tag=a:1&tag=b:1", vec![&succeeded]),
        ("tag=a:1&state=dead&task=echo", vec![&dead]),
        ("", vec![&elsewhere, &cancelled, &scheduled, &queued, &running, &dead, &succeeded]),
    ] {
        let list = api.client.get(&format!("/v1/invocations?{query}")).await.expect(200).json();
        assert_eq!(ids(&list).iter().collect::<Vec<_>>(), expected, "{query}");
        for item in list["items"].as_array().unwrap() {
            if let Some(state) = query.strip_prefix("state=") {
                assert_eq!(item["state"], state);
            }
        }
    }
    for bad in ["state=done", "tag=a", "tag=a:%00", "after=x", "limit=0", "limit=201", "sort=id", "task=%00"]
    {
        let answer = api.client.get(&format!("/v1/invocations?{bad}")).await;
        assert_eq!(problem(&answer, 400), "invalid-query", "{bad}");
    }
}

#[tokio::test]
async fn tasks_come_in_the_order_of_their_names_in_pages() {
    let api = Api::start().await;
    for name in ["c", "a", "b"] {
        api.task(name, "task", &json!({"description": "x"})).await;
    }
    let first = api.client.get("/v1/tasks?limit=2").await.expect(200).json();
    let next = first["next"].as_str().unwrap();
    let second = api.client.get(next).await.expect(200).json();
    let names: Vec<&Value> = [&first, &second]
        .iter()
        .flat_map(|page| page["items"].as_array().unwrap())
        .map(|task| &task["name"])
        .collect();
    assert_eq!(names, ["a", "b", "c"]);
    assert_eq!(second["next"], Value::Null);
    let version = api.client.get("/v1/tasks/a/versions/1").await.expect(200).json();
    assert_eq!(version["manifest"]["description"], "x");
}

#[tokio::test]
async fn what_belongs_to_another_tenant_does_not_exist() {
    let api = Api::start().await;
    api.echo().await;
    let id = invoke(&api, json!({"tags": {"a": "1"}})).await;
    let not_found = [
        (Method::GET, "/v1/tasks/echo".to_owned()),
        (Method::GET, "/v1/tasks/echo/versions".to_owned()),
        (Method::GET, "/v1/tasks/echo/versions/1".to_owned()),
        (Method::GET, format!("/v1/invocations/{id}")),
        (Method::GET, format!("/v1/invocations/{id}/result")),
        (Method::GET, format!("/v1/invocations/{id}/logs")),
        (Method::POST, format!("/v1/invocations/{id}/cancel")),
        (Method::POST, format!("/v1/invocations/{id}/retry")),
        (Method::PATCH, format!("/v1/invocations/{id}")),
        (Method::PATCH, "/v1/tasks/echo".to_owned()),
        (Method::DELETE, "/v1/tasks/echo?cancel=true".to_owned()),
        (Method::GET, "/v1/tasks/echo/versions/1/module".to_owned()),
    ];
    for (method, path) in not_found {
        let mut request = api.as_other(method.clone(), &path);
        if method == Method::PATCH {
            let field = if path.starts_with("/v1/tasks") { "description" } else { "tags" };
            request = request.json(&json!({field: null}));
        }
        let answer = support::send(request).await;
        assert_eq!(answer.status, 404, "{method} {path}: {}", answer.text());
    }
    let invoked = api.as_other(Method::POST, "/v1/tasks/echo/invocations").json(&json!({}));
    assert_eq!(problem(&support::send(invoked).await, 404), "task-not-found");
    let many =
        api.as_other(Method::POST, "/v1/invocations:batch").json(&json!({"invocations": [{"task": "echo"}]}));
    assert_eq!(support::send(many).await.expect(200).json()["outcomes"][0]["status"], 404);
    for list in ["/v1/tasks", "/v1/invocations", "/v1/invocations?tag=a:1", "/v1/invocations?state=queued"] {
        let answer = support::send(api.as_other(Method::GET, list)).await.expect(200);
        assert_eq!(answer.json()["items"], json!([]), "{list}");
    }
    let mine = api.client.get(&format!("/v1/invocations/{id}")).await.json();
    assert_eq!((&mine["state"], &mine["tags"]), (&json!("queued"), &json!({"a": "1"})));
}

/// In the first minute of an installation Postgres knows nothing of its tables, and takes them for empty.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_read_costs_does_not_grow_with_what_waits_whatever_statistics_say() {
    let database = support::database().await;
    let api = Api::on(&database, Settings::default()).await;
    api.echo().await;
    let id = invoke(&api, json!({})).await;
    let key = insert_key(&api, api.tenant, Role::Owner, &[]).await;
    sqlx::raw_sql(
        "DO $$ DECLARE t record; BEGIN
           FOR t IN SELECT oid::regclass AS name FROM pg_class WHERE relnamespace = 'sandbar'::regnamespace AND relkind = 'r'
           LOOP EXECUTE format('ALTER TABLE %s SET (autovacuum_enabled = false)', t.name); END LOOP;
         END $$",
    )
    .execute(&api.admin)
    .await
    .unwrap();
    api.stop.cancel();
    api.app.shutdown().await;
    api.store.close().await;

    let paths = [
        format!("/v1/invocations/{id}"),
        format!("/v1/invocations/{id}/why"),
        "/v1/invocations?limit=1".to_owned(),
        "/v1/invocations?limit=1&state=dead".to_owned(),
        "/v1/invocations?limit=1&state=running".to_owned(),
    ];
    let look = async |path: &String| {
        let plain = path.split('?').next().unwrap().replace(&id, "{id}");
        let op = OPERATIONS.iter().find(|op| op.path == plain && op.method == "GET").unwrap();
        let (answer, _, blocks) = measured(&api, &database, &key, op, path).await;
        assert_eq!(answer.status.as_u16(), 200, "{path}: {}", answer.text());
        blocks
    };
    let mut before = Vec::new();
    for path in &paths {
        before.push(look(path).await);
    }
    let admin = database.admin().await;
    // Behind ours: how many are ahead of it is counted.
    let filled = sqlx::query(
        "WITH more AS (
           INSERT INTO sandbar.invocations
             SELECT (jsonb_populate_record(x, jsonb_build_object('invocation_id', gen_random_uuid(), 'created_at', now() + interval '1 s'))).*
             FROM sandbar.invocations x, generate_series(1, $1) RETURNING *)
         INSERT INTO sandbar.ready (tenant_id, rank, invocation_id, attempt, spent)
           SELECT tenant_id, sandbar.rank_of(created_at, run_at, priority), invocation_id, 1, 0 FROM more",
    )
    .bind(MANY)
    .execute(&admin)
    .await
    .unwrap();
    assert_eq!(filled.rows_affected(), MANY.unsigned_abs());
    admin.close().await;
    for (path, before) in paths.iter().zip(before) {
        // Postgres itself looks at tables now and then.
        let mut least = i64::MAX;
        for _ in 0..3 {
            least = least.min(look(path).await);
            if least <= before + SLACK_BLOCKS {
                break;
            }
        }
        assert!(
            least <= before + SLACK_BLOCKS,
            "{path} looks at {least} blocks, and {before} when nothing else waits"
        );
    }
}
