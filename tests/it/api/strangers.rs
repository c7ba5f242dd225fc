//! What a tenant can learn of another: nothing. Lists, filters and problems are the same whether a stranger has thousands of
//! matching rows or none, and the queries behind them do not touch those rows.

use std::net::SocketAddr;
use std::time::Duration;

use reqwest::Method;
use sandbar::api::access::{OPERATIONS, Operation};
use sandbar::app::signals::Signals;
use sandbar::app::{App, Settings};
use sandbar::domain::permission::{Action, Role};
use sandbar::store::ApiStore;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::access::insert_key;
use super::{Api, connect, success};
use crate::support::{self, Answer, Client, Database, send};

/// Rows of the stranger for each of ours.
const MANY: i64 = 2_500;
/// A row may be read and a block looked at more or less: plans change with the size of tables.
const SLACK_ROWS: i64 = 100;
const SLACK_BLOCKS: i64 = 300;

/// Whoever owns the first tenant, and asks.
struct Owner {
    client: Client,
    key: String,
}

impl Owner {
    async fn ask(&self, op: &Operation, path: &str) -> Answer {
        let method: Method = op.method.parse().unwrap();
        let request = self.client.anonymous(method.clone(), path).header("x-api-key", &self.key);
        send(if method == Method::GET { request } else { request.json(&json!({})) }).await
    }
}

/// One of everything that lists show, in the first tenant. Gives an invocation that has ended.
async fn furnish(api: &Api) -> String {
    api.echo().await;
    api.dead(Some("no customer")).await;
    api.classify().await.unwrap();
    let me = api.register().await;
    let done = api.client.enqueue("echo", &json!({"input": 1, "tags": {"k": "v"}})).await.expect(202).json();
    let mut end = success(api.claim(me).await);
    end.outcome.artifacts =
        vec![sandbar_host::files::File { path: "left.txt".to_owned(), bytes: b"x".to_vec() }];
    let ends = [end];
    api.worker.artifacts_put(&ends).await.unwrap();
    assert_eq!(api.worker.ack(me.0, me.1, &ends).await.unwrap().accepted.len(), 1);
    for body in [json!({"tags": {"k": "v"}}), json!({"delay_ms": 3_600_000})] {
        api.client.enqueue("echo", &body).await.expect(202);
    }
    for (path, body) in [
        ("/v1/keys", json!({"name": "ci", "role": "viewer", "quotas": {"invocations_per_day": 5}})),
        ("/v1/invitations", json!({"email": "bob@example.org", "role": "viewer"})),
        ("/v1/pauses", json!({"kind": "tag", "key": "k", "value": "paused"})),
        ("/v1/bulk", json!({"action": "cancel", "filter": {"tags": {"k": "none"}}})),
    ] {
        let answer = api.client.post(path, &body).await;
        assert!(answer.status.is_success(), "{path}: {}", answer.text());
    }
    for (path, body) in [
        ("/v1/secrets/TOKEN", json!({"value": "hush"})),
        ("/v1/budgets/small", json!({"measure": "attempts", "period": "day", "amount": 1})),
    ] {
        let answer = send(api.client.request(Method::PUT, path).json(&body)).await;
        assert!(answer.status.is_success(), "{path}: {}", answer.text());
    }
    super::people::user(api, "ada@example.org", Role::Viewer).await;
    sqlx::query(
        "INSERT INTO sandbar.usage_deltas (tenant_id, task_id, hour, attempts, succeeded, fuel, cpu_ns, wall_ns, input_bytes, output_bytes, log_bytes, egress_bytes)
         SELECT tenant_id, task_id, date_bin('1 hour', clock_timestamp() - interval '2 hours', 'epoch'), 1, 1, 5, 5, 5, 5, 5, 5, 0
         FROM sandbar.tasks",
    )
    .execute(&api.admin)
    .await
    .unwrap();
    api.worker.tidy(1_000).await.unwrap();
    done["id"].as_str().unwrap().to_owned()
}

/// Every row of the first tenant, many times over, as the second one's: the same names, states, tags and times.
async fn crowd(admin: &PgPool) -> i64 {
    crate::support::drop_rules(admin).await;
    let tables: Vec<(String,)> = sqlx::query_as(
        "SELECT c.relname::text FROM pg_class c
         WHERE c.relnamespace = 'sandbar'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relname <> 'tenants'
           AND EXISTS (SELECT 1 FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'tenant_id' AND NOT a.attisdropped)",
    )
    .fetch_all(admin)
    .await
    .unwrap();
    let mut put = 0;
    for (table,) in tables {
        // Ids are others; what else must differ within a tenant, or anywhere, gets a number.
        let columns: Vec<(String, String)> = sqlx::query_as(
            "SELECT quote_ident(a.attname), CASE
               WHEN a.attname = 'tenant_id' THEN '(SELECT tenant_id FROM sandbar.tenants WHERE name = ''two'')'
               WHEN t.typname = 'uuid' THEN 'CASE WHEN x.' || quote_ident(a.attname) || ' IS NULL THEN NULL ELSE gen_random_uuid() END'
               WHEN u.is_key AND t.typname = 'text' THEN 'x.' || quote_ident(a.attname) || ' || ''-'' || n'
               WHEN u.is_key AND t.typname = 'bytea' THEN 'sha256(uuid_send(gen_random_uuid()))'
               ELSE 'x.' || quote_ident(a.attname) END
             FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
             CROSS JOIN LATERAL (SELECT EXISTS (SELECT 1 FROM pg_index i
               WHERE i.indrelid = a.attrelid AND i.indisunique AND a.attnum = ANY (i.indkey)) AS is_key) u
             WHERE a.attrelid = ('sandbar.' || $1)::regclass AND a.attnum > 0 AND NOT a.attisdropped
               AND a.attidentity = '' AND a.attgenerated = '' ORDER BY a.attnum",
        )
        .bind(&table)
        .fetch_all(admin)
        .await
        .unwrap();
        let (names, values): (Vec<_>, Vec<_>) = columns.into_iter().unzip();
        let copy = format!(
            "INSERT INTO sandbar.{table} ({}) SELECT {} FROM sandbar.{table} x, generate_series(1, {MANY}) n
             WHERE x.tenant_id = (SELECT tenant_id FROM sandbar.tenants WHERE name = 'one') ON CONFLICT DO NOTHING",
            names.join(", "),
            values.join(", ")
        );
        let done = sqlx::query(&copy).execute(admin).await.unwrap_or_else(|error| panic!("{copy}: {error}"));
        put += i64::try_from(done.rows_affected()).unwrap();
    }
    sqlx::raw_sql("VACUUM ANALYZE").execute(admin).await.unwrap();
    put
}

/// Rows read and blocks looked at in the tables of the program, by everybody, ever.
async fn read_so_far(admin: &PgPool) -> (i64, i64) {
    sqlx::query_as(
        "SELECT (SELECT sum(seq_tup_read + COALESCE(idx_tup_fetch, 0))::bigint FROM pg_stat_user_tables WHERE schemaname = 'sandbar'),
           (SELECT sum(heap_blks_read + heap_blks_hit + COALESCE(idx_blks_read, 0) + COALESCE(idx_blks_hit, 0))::bigint
            FROM pg_statio_user_tables WHERE schemaname = 'sandbar')",
    )
    .fetch_one(admin)
    .await
    .unwrap()
}

/// What one request reads, and its answer: of a server that does nothing else, whose connections tell when they end.
pub(super) async fn measured(
    api: &Api,
    database: &Database,
    key: &str,
    op: &Operation,
    path: &str,
) -> (Answer, i64, i64) {
    let store = ApiStore::connect(&connect(database.api_url())).await.unwrap();
    let app = App::new(
        store.clone(),
        Signals::new(),
        Settings { vault: api.app.settings().vault.clone(), ..Settings::default() },
    );
    let app = app.unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = Client::new(format!("http://{}", listener.local_addr().unwrap()));
    let service = sandbar::api::router(app.clone()).into_make_service_with_connect_info::<SocketAddr>();
    let serving = tokio::spawn(async move { axum::serve(listener, service).await.unwrap() });
    let before = read_so_far(&api.admin).await;
    let owner = Owner { client, key: key.to_owned() };
    let answer = owner.ask(op, path).await;
    serving.abort();
    app.shutdown().await;
    store.close().await;
    // A backend adds its counts to everybody's before it is gone; one that somebody still keeps is told to go.
    support::eventually(Duration::from_secs(20), "the connections to end", async || {
        let left: i64 = sqlx::query_scalar(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND usename = 'sandbar_api'",
        )
        .fetch_one(&api.admin)
        .await
        .unwrap();
        (left == 0).then_some(())
    })
    .await;
    let after = read_so_far(&api.admin).await;
    (answer, after.0 - before.0, after.1 - before.1)
}

/// Lists of what belongs to a tenant, by the document: their answers have items.
async fn lists(api: &Api) -> Vec<(&'static Operation, Vec<String>)> {
    let document = api.client.get("/openapi.json").await.expect(200).json();
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        let get = &item["get"];
        let schema = &get["responses"]["200"]["content"]["application/json"]["schema"];
        let name = schema["$ref"].as_str().and_then(|name| name.rsplit('/').next()).unwrap_or_default();
        let schema = if name.is_empty() { schema } else { &document["components"]["schemas"][name] };
        if schema["properties"]["items"].is_null() {
            continue;
        }
        let op = OPERATIONS.iter().find(|op| op.documented() == *path && op.method == "GET").unwrap();
        // What only the platform may is about the installation.
        if op.access.action().is_none_or(|action| !Role::Owner.may(action)) {
            continue;
        }
        let parameters = get["parameters"].as_array().into_iter().flatten();
        let queries = parameters.filter(|one| one["in"] == "query");
        found.push((op, queries.map(|one| one["name"].as_str().unwrap().to_owned()).collect()));
    }
    assert!(found.len() >= 14, "{found:?}");
    found
}

fn concrete(op: &Operation, task: &str, id: &str) -> String {
    op.path.replace("{task}", task).replace("{id}", id).replace("{version}", "1").replace("{name}", task)
}

/// Without what moves by itself.
fn still(answer: &Answer) -> Value {
    let mut body: Value = serde_json::from_slice(&answer.body).unwrap_or_else(|_| json!(answer.text()));
    for item in body["items"].as_array_mut().into_iter().flatten() {
        if let Some(item) = item.as_object_mut() {
            item.remove("last_used_at");
        }
    }
    json!({"status": answer.status.as_u16(), "body": body})
}

fn settings() -> Settings {
    let vault = sandbar::app::vault::Vault::new(Some([7; sandbar::app::vault::KEY_BYTES]), Vec::new());
    Settings { vault: vault.into(), ..Settings::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_list_shows_counts_or_reads_any_row_of_a_stranger_however_many_there_are() {
    let database = support::database().await;
    let api = Api::on(&database, settings()).await;
    let done = furnish(&api).await;
    let key = insert_key(&api, api.tenant, Role::Owner, &[]).await;
    let lists = lists(&api).await;
    // The server of the test itself holds connections of the same role.
    api.stop.cancel();
    api.app.shutdown().await;
    api.store.close().await;
    let mut before = Vec::new();
    for (op, _) in &lists {
        let path = concrete(op, "echo", &done);
        before.push((path.clone(), measured(&api, &database, &key, op, &path).await));
    }
    let filled = before.iter().filter(|(_, (answer, ..))| {
        serde_json::from_slice::<Value>(&answer.body)
            .is_ok_and(|body| body["items"].as_array().is_some_and(|i| !i.is_empty()))
    });
    assert!(
        filled.count() >= 11,
        "{:?}",
        before.iter().map(|(path, (a, ..))| (path, a.text())).collect::<Vec<_>>()
    );
    // Its own reading is counted when its connections end.
    let admin = database.admin().await;
    let put = crowd(&admin).await;
    admin.close().await;
    assert!(put > 10 * MANY, "{put}");
    for ((op, _), (path, (answer, rows, blocks))) in lists.iter().zip(&before) {
        assert_eq!(answer.status.as_u16(), 200, "{path}: {}", answer.text());
        let (mut rows_now, mut blocks_now) = (i64::MAX, i64::MAX);
        // Postgres itself looks at tables now and then; whoever reads a stranger's rows does so every time.
        for _ in 0..4 {
            let (now, rows_read, blocks_seen) = measured(&api, &database, &key, op, path).await;
            assert_eq!(still(&now), still(answer), "{path}");
            (rows_now, blocks_now) = (rows_now.min(rows_read), blocks_now.min(blocks_seen));
            if rows_now <= rows + SLACK_ROWS && blocks_now <= blocks + SLACK_BLOCKS {
                break;
            }
        }
        assert!(
            rows_now <= rows + SLACK_ROWS,
            "{path} reads {rows_now} rows, and {rows} when nobody else has any"
        );
        assert!(
            blocks_now <= blocks + SLACK_BLOCKS,
            "{path} looks at {blocks_now} blocks, and {blocks} when nobody else has any"
        );
    }

    // This test would see it: without indexes a list goes through everybody's rows.
    sqlx::raw_sql(
        "DO $$ DECLARE i record; BEGIN
           ALTER TABLE sandbar.api_keys DROP CONSTRAINT api_keys_pkey;
           FOR i IN SELECT indexrelid::regclass AS name FROM pg_index x
             WHERE indrelid = 'sandbar.api_keys'::regclass AND NOT EXISTS (SELECT 1 FROM pg_constraint c WHERE c.conindid = x.indexrelid)
           LOOP EXECUTE format('DROP INDEX %s', i.name); END LOOP;
         END $$",
    )
    .execute(&api.admin)
    .await
    .unwrap();
    let (op, _) = lists.iter().find(|(op, _)| op.path == "/v1/keys").unwrap();
    let rows = before.iter().find(|(path, _)| path == "/v1/keys").unwrap().1.1;
    let (_, scanned, _) = measured(&api, &database, &key, op, "/v1/keys").await;
    assert!(scanned > rows + SLACK_ROWS, "{scanned}, and {rows} before");
}

/// Ids, names and cursors of a stranger, each beside one that does not exist: no answer tells them apart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_stranger_has_answers_like_what_does_not_exist_in_paths_filters_cursors_and_bodies() {
    let database = support::database().await;
    let api = Api::on(&database, settings()).await;
    let done = furnish(&api).await;
    let key = insert_key(&api, api.tenant, Role::Owner, &[]).await;
    // The stranger, too, is somebody with all of it, and with names of its own.
    crowd(&api.admin).await;
    for named in [
        "UPDATE sandbar.tasks SET name = 'theirs' WHERE tenant_id = (SELECT tenant_id FROM sandbar.tenants WHERE name = 'two') AND name = 'echo-1'",
        "UPDATE sandbar.secrets SET name = 'theirs' WHERE tenant_id = (SELECT tenant_id FROM sandbar.tenants WHERE name = 'two') AND name = 'TOKEN-1'",
        "UPDATE sandbar.budgets SET name = 'theirs' WHERE tenant_id = (SELECT tenant_id FROM sandbar.tenants WHERE name = 'two') AND name = 'small-1'",
    ] {
        assert_eq!(sqlx::query(named).execute(&api.admin).await.unwrap().rows_affected(), 1, "{named}");
    }
    let owner = Owner { client: api.client.clone(), key: key.clone() };
    let mut pairs: Vec<(String, String)> = vec![("theirs".to_owned(), "nobody".to_owned())];
    for (table, column) in [
        ("invocations", "invocation_id"),
        ("tasks", "task_id"),
        ("api_keys", "key_id"),
        ("bulk_operations", "bulk_id"),
        ("pauses", "pause_id"),
        ("invitations", "invitation_id"),
        ("events", "event_id"),
        ("audit", "audit_id"),
    ] {
        let exists: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM information_schema.columns WHERE table_schema = 'sandbar' AND table_name = $1 AND column_name = $2)",
        )
        .bind(table)
        .bind(column)
        .fetch_one(&api.admin)
        .await
        .unwrap();
        if !exists {
            continue;
        }
        let id: Option<String> = sqlx::query_scalar(&format!(
            "SELECT {column}::text FROM sandbar.{table} WHERE tenant_id = (SELECT tenant_id FROM sandbar.tenants WHERE name = 'two') LIMIT 1"
        ))
        .fetch_optional(&api.admin)
        .await
        .unwrap();
        let Some(id) = id else { continue };
        // Beside it in every order.
        let last = id.chars().last().unwrap();
        let beside = format!("{}{}", &id[..id.len() - 1], if last == '7' { '6' } else { '7' });
        pairs.push((id, beside));
    }
    assert!(pairs.len() >= 5, "{pairs:?}");
    let alike = |real: &Answer, none: &Answer, what: &str, (theirs, nobody): &(String, String)| {
        let blank = |answer: &Answer, value: &str| {
            let mut text = still(answer).to_string().replace(value, "X");
            // Every problem has an id of its own request.
            if let Some(id) = answer.headers.get("x-request-id").and_then(|id| id.to_str().ok()) {
                text = text.replace(id, "R");
            }
            text
        };
        assert_eq!(blank(real, theirs), blank(none, nobody), "{what}: {theirs} and {nobody}");
    };
    let mut compared = 0;
    for op in OPERATIONS.iter().filter(|op| op.access.action().is_some_and(|a| Role::Owner.may(a))) {
        // An upload, a secret and a budget are made in the caller's own tenant under any name.
        if !op.path.contains('{') || op.method == "PUT" || op.access.action() == Some(Action::Upload) {
            continue;
        }
        for pair in &pairs {
            let answers = (
                owner.ask(op, &concrete(op, &pair.0, &pair.0)).await,
                owner.ask(op, &concrete(op, &pair.1, &pair.1)).await,
            );
            alike(&answers.0, &answers.1, &format!("{} {}", op.method, op.path), pair);
            compared += 1;
        }
    }
    for (op, parameters) in lists(&api).await {
        let path = concrete(op, "echo", &done);
        for parameter in parameters {
            for pair in &pairs {
                for form in ["{}", "k:{}", "k={}"] {
                    let asked = |value: &str| {
                        format!("{path}?{parameter}={}", form.replace("{}", value).replace('=', "%3D"))
                    };
                    let answers =
                        (owner.ask(op, &asked(&pair.0)).await, owner.ask(op, &asked(&pair.1)).await);
                    alike(&answers.0, &answers.1, &format!("{path}?{parameter}="), pair);
                    compared += 1;
                }
            }
        }
        // A page of the stranger's own: where it goes on is nowhere in particular for others.
        let theirs = send(api.as_other(Method::GET, &format!("{path}?limit=1"))).await;
        let next = serde_json::from_slice::<Value>(&theirs.body).unwrap_or_default()["next"].clone();
        if let Some(next) = next.as_str() {
            let full = owner.ask(op, &path).await;
            let mine = full.json()["items"].clone();
            let seen = owner.ask(op, next).await;
            let settled = |item: &Value| {
                let mut item = item.clone();
                item.as_object_mut().map(|fields| fields.remove("last_used_at"));
                item
            };
            for item in seen.json()["items"].as_array().into_iter().flatten() {
                let known = mine.as_array().unwrap().iter().any(|one| settled(one) == settled(item));
                assert!(known, "{next} shows {item}");
            }
        }
    }
    for (method, path, body) in [
        (Method::POST, "/v1/tasks/echo/invocations", "{\"depends_on\": [\"V\"]}"),
        (
            Method::POST,
            "/v1/bulk",
            "{\"action\": \"cancel\", \"dry_run\": true, \"filter\": {\"task\": \"V\"}}",
        ),
        (Method::POST, "/v1/pauses", "{\"kind\": \"task\", \"task\": \"V\"}"),
        (
            Method::PUT,
            "/v1/budgets/mine",
            "{\"measure\": \"attempts\", \"period\": \"day\", \"amount\": 1, \"task\": \"V\"}",
        ),
        (Method::POST, "/v1/invocations:batch", "{\"invocations\": [{\"task\": \"V\"}]}"),
    ] {
        for pair in &pairs {
            let ask = async |value: &str| {
                let body: Value = serde_json::from_str(&body.replace('V', value)).unwrap();
                let request = api.client.anonymous(method.clone(), path).header("x-api-key", &key);
                send(request.json(&body)).await
            };
            alike(&ask(&pair.0).await, &ask(&pair.1).await, path, pair);
            compared += 1;
        }
    }
    assert!(compared > 300, "{compared}");
}
