//! Encryption at rest: what Postgres and exports have, who can open it, and how it is erased. The test is its own worker,
//! with the worker's own keys.

use std::io::Read as _;
use std::sync::Arc;

use chrono::Utc;
use reqwest::Method;
use sandbar::app::Settings;
use sandbar::app::sealed::export;
use sandbar::app::sealed::keys::Keys;
use sandbar::app::vault::{KEY_BYTES, Vault};
use sandbar::domain::ids::WorkerId;
use sandbar::domain::retry::Verdict;
use sandbar::scheduler::retention;
use sandbar::store::invocation::InputKind;
use sandbar::store::log::Said;
use sandbar::store::queue::{Claimed, Finished, Withheld};
use sandbar_host::cell::Progress;
use sandbar_host::files::File;
use sandbar_host::log::Log;
use sandbar_host::outcome::{Frame, LogLevel, LogRecord, Termination, TrapKind};
use serde_json::{Value, json};

use super::{Api, problem, success};
use crate::support::{self, Answer, holds};

type Worker = (WorkerId, i64);

fn vault() -> Arc<Vault> {
    Arc::new(Vault::new(Some([7; KEY_BYTES]), Vec::new()))
}

async fn start(seal_payloads: bool) -> Api {
    let settings = Settings { vault: vault(), seal_payloads, ..Settings::default() };
    let api = Api::on(&support::database().await, settings).await;
    api.echo().await;
    api.task("shell", "command-p1", &json!({})).await;
    api
}

impl Api {
    async fn put_encryption(&self, payloads: bool) -> Answer {
        let request = self.client.request(Method::PUT, "/v1/encryption");
        support::send(request.json(&json!({ "payloads": payloads }))).await
    }

    async fn erase(&self, id: &str) -> Answer {
        support::send(self.client.request(Method::DELETE, &format!("/v1/invocations/{id}/payloads"))).await
    }

    /// A claimed attempt, its input opened as a worker does it.
    async fn opened(&self, me: Worker) -> Claimed {
        let mut claimed = self.claim(me).await;
        self.keys().open_claimed(std::iter::once(&mut claimed)).await;
        claimed
    }

    async fn say(&self, (worker, epoch): Worker, said: Said) {
        let mut said = vec![said];
        self.keys().seal_said(&mut said).await.unwrap();
        assert_eq!(self.worker.write_live(worker, epoch, &said).await.unwrap(), 1);
    }

    /// Acknowledges as a worker does it.
    async fn finish(&self, (worker, epoch): Worker, finished: Finished) {
        let mut ends = [finished];
        self.keys().seal_ends(&mut ends).await.unwrap();
        self.worker.artifacts_put(&ends).await.unwrap();
        assert_eq!(self.worker.ack(worker, epoch, &ends).await.unwrap().accepted.len(), 1);
    }

    /// One invocation of each kind with the canary in every payload that there is: a command that dies, with live log,
    /// progress, output, artifact, message and backtrace; a task that succeeds; and one that waits.
    async fn leave(&self, canary: &str) -> (String, String, String) {
        let me = self.register().await;
        let id = |answer: &Value| answer["id"].as_str().unwrap().to_owned();
        let body = json!({"stdin": canary, "args": [canary], "env": {"K": canary}, "tags": {"kind": "dies"}});
        let dies = id(&self.client.enqueue("shell", &body).await.expect(202).json());
        let claimed = self.opened(me).await;
        assert_eq!((claimed.withheld, claimed.input.as_slice()), (None, canary.as_bytes()));
        let InputKind::Command { args, env } = &claimed.spec.input else { panic!("a command") };
        assert_eq!((args.as_slice(), env["K"].as_str()), ([canary.to_owned()].as_slice(), canary));
        let record = |level, message: &str| LogRecord {
            at_us: 5,
            level,
            target: "guest".to_owned(),
            message: message.to_owned(),
            fields: vec![("k".to_owned(), canary.to_owned())],
        };
        let logs = [record(LogLevel::Info, "first"), record(LogLevel::Error, canary)];
        let said = Said {
            claim: claimed.claim(),
            started_at: Utc::now(),
            log: Some((0, logs[..1].iter().collect::<Log>().into_bytes())),
            progress: Some((Progress { done: 1, total: 2, message: canary.to_owned() }, Utc::now())),
        };
        self.say(me, said).await;
        let live = self.client.get(&format!("/v1/invocations/{dies}/logs")).await.expect(200).json();
        assert_eq!(live["items"][0]["fields"]["k"], canary, "{live}");
        let mut end = success(claimed);
        end.verdict = Verdict::Dead;
        end.outcome.output = canary.as_bytes().to_vec();
        end.outcome.logs = logs.iter().collect();
        end.outcome.termination =
            Termination::Trap { kind: TrapKind::Unreachable, message: format!("it saw {canary}") };
        end.outcome.backtrace =
            vec![Frame { function: canary.to_owned(), file: None, line: Some(3), module_offset: None }];
        end.outcome.artifacts = vec![File { path: "left.txt".to_owned(), bytes: canary.as_bytes().to_vec() }];
        self.finish(me, end).await;
        self.classify().await.unwrap();

        let succeeds = id(&self.client.enqueue("echo", &json!({"input": canary})).await.expect(202).json());
        let claimed = self.opened(me).await;
        self.finish(me, success(claimed)).await;
        let waits = json!({"input": canary, "delay_ms": 3_600_000});
        let waits = id(&self.client.enqueue("echo", &waits).await.expect(202).json());
        (dies, succeeds, waits)
    }

    /// All that the API shows of what [`Api::leave`] made is what it was.
    async fn reads(&self, canary: &str, (dies, succeeds, _): &(String, String, String)) {
        let shown = self.client.get(&format!("/v1/invocations/{dies}")).await.expect(200).json();
        let attempt = &shown["attempts"][0];
        assert_eq!(attempt["termination"]["message"], format!("it saw {canary}"), "{shown}");
        assert_eq!(
            (&attempt["backtrace"][0]["function"], &attempt["backtrace"][0]["line"]),
            (&json!(canary), &json!(3))
        );
        assert_eq!((&shown["progress"]["message"], &shown["progress"]["done"]), (&json!(canary), &json!(1)));
        let result = self.client.get(&format!("/v1/invocations/{dies}/result")).await.expect(200);
        assert_eq!(result.text(), canary);
        let result = self.client.get(&format!("/v1/invocations/{succeeds}/result")).await.expect(200);
        assert_eq!(result.json(), canary);
        let list = self.client.get(&format!("/v1/invocations/{dies}/artifacts")).await.expect(200).json();
        assert_eq!(
            (&list["items"][0]["path"], &list["items"][0]["size_bytes"]),
            (&json!("left.txt"), &json!(canary.len()))
        );
        let file = self.client.get(&format!("/v1/invocations/{dies}/artifacts/left.txt")).await.expect(200);
        assert_eq!(file.text(), canary);
        // Filters look at what is opened.
        let log = format!("/v1/invocations/{dies}/logs");
        let all = self.client.get(&log).await.expect(200).json();
        assert_eq!(all["items"].as_array().unwrap().len(), 2, "{all}");
        let errors = self.client.get(&format!("{log}?level=error")).await.expect(200).json();
        assert_eq!(errors["items"].as_array().unwrap().len(), 1, "{errors}");
        assert_eq!(errors["items"][0]["message"], canary);
        let soon =
            (Utc::now() + chrono::TimeDelta::minutes(5)).to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
        let later = self.client.get(&format!("{log}?since={soon}")).await.expect(200).json();
        assert_eq!(later["items"], json!([]));
        let letters = self.client.get("/v1/dead-letters").await.expect(200).json();
        let letter = letters["items"].as_array().unwrap().iter().find(|l| l["id"] == *dies).unwrap().clone();
        assert!(letter["summary"].as_str().unwrap().contains(canary), "{letter}");
        let groups = self.client.get("/v1/dead-letters/groups").await.expect(200);
        assert!(groups.text().contains(canary), "{}", groups.text());
    }

    async fn tables_with(&self, text: &str) -> Vec<String> {
        support::tables_with(&self.admin, text).await
    }
}

async fn exported(dir: &std::path::Path) -> Vec<String> {
    let mut lines = Vec::new();
    for tenant in std::fs::read_dir(dir).unwrap() {
        for file in std::fs::read_dir(tenant.unwrap().path()).unwrap() {
            let mut text = String::new();
            let file = std::fs::File::open(file.unwrap().path()).unwrap();
            flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
            lines.extend(text.lines().map(str::to_owned));
        }
    }
    lines
}

const CANARY: &str = "canary-that-nobody-may-see-in-postgres";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_table_and_no_export_has_a_payload_in_plain_when_sealing_is_on_and_the_api_shows_all_of_it() {
    // Without sealing, to see that the search finds what there is.
    let plain = start(false).await;
    let ids = plain.leave(CANARY).await;
    plain.reads(CANARY, &ids).await;
    let found = plain.tables_with(CANARY).await;
    for table in
        ["artifacts", "attempts", "dead_letters", "invocations", "live_logs", "logs", "progress", "results"]
    {
        assert!(found.iter().any(|found| found == table), "{table} is not searched: {found:?}");
    }
    let plain_dir = tempfile::tempdir().unwrap();
    assert_eq!(retention::turn(&plain.worker, 0, Some(plain_dir.path())).await.unwrap().0, 2);
    let plain_lines = exported(plain_dir.path()).await;
    assert!(plain_lines.iter().all(|line| holds(line, CANARY)));

    let api = start(true).await;
    let shown = api.client.get("/v1/encryption").await.expect(200).json();
    assert_eq!(
        (&shown["payloads"], &shown["tenant"], &shown["installation"]),
        (&json!(true), &json!(false), &json!(true))
    );
    let ids = api.leave(CANARY).await;
    api.reads(CANARY, &ids).await;
    assert_eq!(api.tables_with(CANARY).await, Vec::<String>::new());
    // A live piece of an attempt that was lost becomes a part of its log, and opens there.
    api.worker.settle_live(100).await.unwrap();
    api.reads(CANARY, &ids).await;
    let now = api.client.get(&format!("/v1/invocations/{}", ids.0)).await.expect(200).json();
    assert_eq!(now["payloads"], "sealed");

    let dir = tempfile::tempdir().unwrap();
    assert_eq!(retention::turn(&api.worker, 0, Some(dir.path())).await.unwrap().0, 2);
    let lines = exported(dir.path()).await;
    assert_eq!(lines.len(), 2);
    let keys = api.keys();
    for (line, as_plain) in lines.iter().zip(&plain_lines) {
        assert!(!holds(line, CANARY), "{line}");
        let opened = export::open(&keys, line).await.unwrap();
        let as_plain: Value = serde_json::from_str(as_plain).unwrap();
        for field in ["input_base64", "output_base64", "logs"] {
            assert_eq!(opened[field], as_plain[field], "{field}");
        }
        assert_eq!(opened["invocation"]["spec"], as_plain["invocation"]["spec"]);
        for field in ["termination", "backtrace"] {
            assert_eq!(opened["attempts"][0][field], as_plain["attempts"][0][field], "{field}");
        }
        let fields = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(fields(&opened), fields(&as_plain));
        assert_eq!(export::open(&keys, &as_plain.to_string()).await.unwrap(), as_plain, "a plain line stays");
        let other = Keys::new(api.worker.clone(), Arc::new(Vault::new(Some([9; KEY_BYTES]), Vec::new())));
        assert!(export::open(&other, line).await.is_err(), "without the master key it stays closed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_turns_sealing_on_and_off_while_work_waits_and_both_kinds_stand_side_by_side() {
    let api = start(false).await;
    let me = api.register().await;
    let queued = api.client.enqueue("echo", &json!({"input": "before"})).await.expect(202).json();
    let on = api.put_encryption(true).await.expect(200).json();
    assert_eq!(
        (&on["payloads"], &on["tenant"], &on["installation"]),
        (&json!(true), &json!(true), &json!(false))
    );
    assert!(on["key"]["id"].as_str().is_some_and(|id| id.len() == 16), "{on}");
    let sealed = api.client.enqueue("echo", &json!({"input": CANARY})).await.expect(202).json();
    assert_eq!((&queued["payloads"], &sealed["payloads"]), (&Value::Null, &json!("sealed")));
    assert!(api.tables_with(CANARY).await.is_empty());
    // Turned off while the sealed one waits: what was accepted stays as it was accepted, to its end.
    assert_eq!(api.put_encryption(false).await.expect(200).json()["payloads"], false);
    for expected in ["before", CANARY] {
        let claimed = api.opened(me).await;
        assert_eq!(claimed.input, json!(expected).to_string().into_bytes());
        api.finish(me, success(claimed)).await;
    }
    assert!(api.tables_with(CANARY).await.is_empty());
    for (id, expected) in [(&queued["id"], "before"), (&sealed["id"], CANARY)] {
        let path = format!("/v1/invocations/{}/result", id.as_str().unwrap());
        assert_eq!(api.client.get(&path).await.expect(200).json(), expected);
    }
    let plain = api.client.enqueue("echo", &json!({"input": "after"})).await.expect(202).json();
    assert_eq!(plain["payloads"], Value::Null);
    // The other tenant has its own word, and this one's key is none of its business.
    let theirs = support::send(api.as_other(Method::GET, "/v1/encryption")).await.expect(200).json();
    assert_eq!((&theirs["payloads"], &theirs["key"]), (&json!(false), &Value::Null));
    let audit = api.client.get("/v1/audit").await.expect(200);
    assert!(audit.text().contains("PUT /v1/encryption"), "{}", audit.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_that_is_moved_to_another_invocation_opens_nowhere() {
    let api = start(true).await;
    let me = api.register().await;
    let mut ids = Vec::new();
    for text in ["one", "two"] {
        let answer = api.client.enqueue("echo", &json!({"input": text})).await.expect(202).json();
        ids.push(answer["id"].as_str().unwrap().to_owned());
        let claimed = api.opened(me).await;
        api.finish(me, success(claimed)).await;
    }
    for (table, column) in [("results", "output"), ("logs", "records")] {
        let moved = sqlx::query(&format!(
            "UPDATE sandbar.{table} a SET {column} = b.{column} FROM sandbar.{table} b
             WHERE a.invocation_id::text = $1 AND b.invocation_id::text = $2"
        ))
        .bind(&ids[0])
        .bind(&ids[1])
        .execute(&api.admin)
        .await
        .unwrap();
        assert_eq!(moved.rows_affected(), 1);
    }
    for what in ["result", "logs"] {
        let moved = api.client.get(&format!("/v1/invocations/{}/{what}", ids[0])).await;
        assert_eq!(problem(&moved, 500), "sealed-unreadable");
        assert!(!moved.text().contains("two"));
        api.client.get(&format!("/v1/invocations/{}/{what}", ids[1])).await.expect(200);
    }

    // A server with another master key names the one that it lacks.
    let other = Arc::new(Vault::new(Some([9; KEY_BYTES]), Vec::new()));
    let (other, _serving) = api.beside(Settings { vault: other, ..Settings::default() }).await;
    let path = format!("/v1/invocations/{}/result", ids[1]);
    let lacking = other.get(&path).await;
    assert_eq!(problem(&lacking, 500), "sealed-unreadable");
    let mine = vault().current().unwrap().to_owned();
    assert!(lacking.text().contains(&mine) && !lacking.text().contains("two"), "{}", lacking.text());
    let (none, _serving) = api.beside(Settings::default()).await;
    assert_eq!(problem(&none.get(&path).await, 503), "secrets-unavailable");
    api.client.get(&path).await.expect(200);

    for text in ["three", "four"] {
        api.client.enqueue("echo", &json!({"input": text})).await.expect(202);
    }
    sqlx::query(
        "UPDATE sandbar.invocations a SET input = b.input FROM sandbar.invocations b
         WHERE a.invocation_id <> b.invocation_id AND NOT EXISTS (SELECT 1 FROM sandbar.results r
           WHERE r.invocation_id IN (a.invocation_id, b.invocation_id))",
    )
    .execute(&api.admin)
    .await
    .unwrap();
    for _ in 0..2 {
        assert_eq!(api.opened(me).await.withheld, Some(Withheld::Broken));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_idempotency_key_is_one_request_before_while_and_after_payloads_are_sealed() {
    let api = start(false).await;
    let ask = async |key: &str, input: &str| {
        let request = api.client.request(Method::POST, "/v1/tasks/echo/invocations");
        support::send(request.header("idempotency-key", key).json(&json!({ "input": input }))).await
    };
    let before = ask("before", "a").await.expect(202).json();
    api.put_encryption(true).await.expect(200);
    let during = ask("during", "a").await.expect(202).json();
    let same = |answer: Answer, first: &Value| assert_eq!(answer.expect(202).json()["id"], first["id"]);
    for seal in [true, false] {
        api.put_encryption(seal).await.expect(200);
        for (key, first) in [("before", &before), ("during", &during)] {
            same(ask(key, "a").await, first);
            assert_eq!(problem(&ask(key, "b").await, 422), "idempotency-key-reused");
        }
    }
    // What is remembered of a sealed request says nothing to whoever guesses its body.
    let digest = |key: &'static str| {
        sqlx::query_scalar::<_, Vec<u8>>("SELECT fingerprint FROM sandbar.idempotency_keys WHERE key = $1")
            .bind(key)
            .fetch_one(&api.admin)
    };
    let task = sandbar::domain::names::TaskName::try_from("echo".to_owned()).unwrap();
    let guessed = sandbar::app::invoke::fingerprint(&task, br#"{"input":"a"}"#);
    assert_eq!(digest("before").await.unwrap(), guessed);
    assert_ne!(digest("during").await.unwrap(), guessed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn erased_payloads_are_gone_from_every_table_and_everything_else_stays() {
    for sealed in [false, true] {
        let api = start(sealed).await;
        let me = api.register().await;
        let ids = api.leave(CANARY).await;
        assert_eq!(problem(&api.erase(&ids.2).await, 409), "not-finished");
        let theirs = format!("/v1/invocations/{}/payloads", ids.0);
        let theirs = support::send(api.as_other(Method::DELETE, &theirs)).await;
        assert_eq!(problem(&theirs, 404), "invocation-not-found");
        support::send(api.client.request(Method::POST, &format!("/v1/invocations/{}/cancel", ids.2)))
            .await
            .expect(200);
        for id in [&ids.0, &ids.1, &ids.2] {
            for _ in 0..2 {
                let answer = api.erase(id).await.expect(200);
                assert_eq!(answer.json()["payloads"], "erased");
                assert!(!answer.text().contains(CANARY), "{}", answer.text());
            }
            for what in ["result", "artifacts", "artifacts/left.txt"] {
                let gone = api.client.get(&format!("/v1/invocations/{id}/{what}")).await;
                assert_eq!(problem(&gone, 410), "payloads-erased", "{what}");
            }
            let log = api.client.get(&format!("/v1/invocations/{id}/logs")).await.expect(200).json();
            assert_eq!(log["items"], json!([]));
        }
        assert_eq!(api.tables_with(CANARY).await, Vec::<String>::new());
        let again =
            support::send(api.client.request(Method::POST, &format!("/v1/invocations/{}/retry", ids.0)))
                .await;
        assert_eq!(problem(&again, 410), "payloads-erased");
        let kept = api.client.get(&format!("/v1/invocations/{}", ids.0)).await.expect(200).json();
        assert_eq!(
            (&kept["state"], &kept["reason"], &kept["tags"]["kind"]),
            (&json!("dead"), &json!("trap"), &json!("dies"))
        );
        assert_eq!(kept["attempts"][0]["receipt"]["fuel"], 7, "{kept}");
        // A report that comes late, after the erasure, does not bring anything back.
        let late = sqlx::query(
            "INSERT INTO sandbar.progress (tenant_id, invocation_id, attempt, report, at)
             SELECT tenant_id, invocation_id, 1, '{}', now() FROM sandbar.invocations WHERE invocation_id::text = $1",
        );
        assert_eq!(late.bind(&ids.0).execute(&api.admin).await.unwrap().rows_affected(), 0);
        let audit = api.client.get("/v1/audit").await.expect(200);
        assert!(audit.text().contains("DELETE /v1/invocations/{id}/payloads"), "{}", audit.text());
        // The others are as they were.
        let (claimed, _) = (api.client.enqueue("echo", &json!({"input": 1})).await.expect(202), ());
        let one = api.opened(me).await;
        api.finish(me, success(one)).await;
        let result = format!("/v1/invocations/{}/result", claimed.json()["id"].as_str().unwrap());
        assert_eq!(api.client.get(&result).await.expect(200).json(), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_erased_key_takes_all_that_it_sealed_along_and_a_new_one_begins_anew() {
    let api = start(true).await;
    let me = api.register().await;
    let ids = api.leave(CANARY).await;
    api.client.enqueue("echo", &json!({"input": CANARY})).await.expect(202);
    let secret = api.client.request(Method::PUT, "/v1/secrets/TOKEN");
    support::send(secret.json(&json!({"value": "hush"}))).await.expect(200);
    let other = support::send(api.as_other(Method::PUT, "/v1/secrets/TOKEN").json(&json!({"value": "x"})));
    other.await.expect(200);

    let erase =
        || support::send(api.client.request(Method::DELETE, &format!("/v1/tenants/{}/key", api.tenant)));
    assert_eq!(problem(&erase().await, 409), "tenant-active");
    let nobody = format!("/v1/tenants/{}/key", uuid::Uuid::now_v7());
    let nobody = support::send(api.client.request(Method::DELETE, &nobody)).await;
    assert_eq!(problem(&nobody, 404), "tenant-not-found");
    api.set_state("suspended").await;
    erase().await.expect(204);
    api.set_state("active").await;

    for what in ["result", "logs", "artifacts/left.txt"] {
        let gone = api.client.get(&format!("/v1/invocations/{}/{what}", ids.0)).await;
        assert_eq!(problem(&gone, 410), "payloads-erased", "{what}");
    }
    let shown = api.client.get(&format!("/v1/invocations/{}", ids.0)).await.expect(200);
    assert_eq!((&shown.json()["payloads"], &shown.json()["state"]), (&json!("erased"), &json!("dead")));
    assert!(!shown.text().contains(CANARY));
    let letters = api.client.get("/v1/dead-letters").await.expect(200);
    assert!(!letters.text().contains(CANARY), "{}", letters.text());
    assert_eq!(api.client.get("/v1/secrets").await.expect(200).json(), json!({"items": []}));
    let theirs = support::send(api.as_other(Method::GET, "/v1/secrets")).await.expect(200).json();
    assert_eq!(theirs["items"].as_array().unwrap().len(), 1, "another's key is untouched");

    // What was accepted under the old key cannot be run; what comes is sealed by a new one, and can.
    let answer = api.client.enqueue("echo", &json!({"input": "new"})).await.expect(202).json();
    assert_eq!(api.opened(me).await.withheld, Some(Withheld::Erased));
    let claimed = api.opened(me).await;
    assert_eq!((claimed.withheld, claimed.input.as_slice()), (None, br#""new""#.as_slice()));
    api.finish(me, success(claimed)).await;
    let result = format!("/v1/invocations/{}/result", answer["id"].as_str().unwrap());
    assert_eq!(api.client.get(&result).await.expect(200).json(), "new");
}

/// Servers and workers remember open data keys for two seconds: what was erased elsewhere is used no longer than that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_another_server_erased_is_used_no_more_after_the_bound() {
    let api = start(true).await;
    let me = api.register().await;
    let settings = Settings { vault: vault(), seal_payloads: true, ..Settings::default() };
    let (elsewhere, _serving) = api.beside(settings).await;
    let worker = api.keys();
    let sealed_by = async |id: &str| -> String {
        sqlx::query_scalar("SELECT spec ->> 'sealed' FROM sandbar.invocations WHERE invocation_id::text = $1")
            .bind(id)
            .fetch_one(&api.admin)
            .await
            .unwrap()
    };
    let submit = async || {
        let answer = elsewhere.enqueue("echo", &json!({"input": CANARY})).await.expect(202).json();
        answer["id"].as_str().unwrap().to_owned()
    };
    let id = submit().await;
    let claimed = api.opened(me).await;
    api.finish(me, success(claimed)).await;
    let result = format!("/v1/invocations/{id}/result");
    assert_eq!(elsewhere.get(&result).await.expect(200).json(), CANARY);
    let old = sealed_by(&id).await;
    assert!(worker.by_id(api.tenant, &old).await.unwrap().is_ok());

    for state in ["suspended", "active"] {
        api.set_state(state).await;
        if state == "suspended" {
            let key = api.client.request(Method::DELETE, &format!("/v1/tenants/{}/key", api.tenant));
            support::send(key).await.expect(204);
        }
    }
    let bound = std::time::Duration::from_secs(4);
    support::eventually(bound, "the server to forget the key", async || {
        (elsewhere.get(&result).await.status == 410).then_some(())
    })
    .await;
    support::eventually(bound, "the worker to forget the key", async || {
        (worker.by_id(api.tenant, &old).await.unwrap().err() == Some(Withheld::Erased)).then_some(())
    })
    .await;
    assert_ne!(worker.current(api.tenant).await.unwrap().map(|(id, _)| id).as_ref(), Some(&old));
    // From then on for good, and what comes is sealed by another.
    for _ in 0..5 {
        assert_eq!(problem(&elsewhere.get(&result).await, 410), "payloads-erased");
        assert_ne!(sealed_by(&submit().await).await, old);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_the_master_key_refuses_what_must_be_sealed_and_a_worker_without_it_opens_nothing() {
    let api = Api::start().await;
    api.echo().await;
    let refused = api.put_encryption(true).await;
    assert_eq!(problem(&refused, 503), "secrets-unavailable");
    api.client.enqueue("echo", &json!({"input": 1})).await.expect(202);
    sqlx::query("UPDATE sandbar.tenants SET seal_payloads = true").execute(&api.admin).await.unwrap();
    let refused = support::eventually(super::SOON, "the setting to hold", async || {
        let answer = api.client.enqueue("echo", &json!({"input": 1})).await;
        (answer.status.as_u16() != 202).then_some(answer)
    })
    .await;
    assert_eq!(problem(&refused, 503), "secrets-unavailable");

    let api = start(true).await;
    api.client.enqueue("echo", &json!({"input": CANARY})).await.expect(202);
    let mut claimed = api.claim(api.register().await).await;
    let sealed = claimed.input.clone();
    for wrong in [Vault::default(), Vault::new(Some([9; KEY_BYTES]), Vec::new())] {
        let keys = Keys::new(api.worker.clone(), Arc::new(wrong));
        keys.open_claimed(std::iter::once(&mut claimed)).await;
        assert_eq!((claimed.withheld, &claimed.input), (Some(Withheld::NoKey), &sealed));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_and_sizes_count_plain_bytes() {
    let settings =
        Settings { vault: vault(), seal_payloads: true, max_input_bytes: 1_000, ..Settings::default() };
    let api = Api::on(&support::database().await, settings).await;
    api.echo().await;
    let me = api.register().await;
    let text = |bytes: usize| json!({"input": "x".repeat(bytes - 2)});
    let answer = api.client.enqueue("echo", &text(1_000)).await.expect(202).json();
    assert_eq!(problem(&api.client.enqueue("echo", &text(1_001)).await, 413), "input-too-large");
    let claimed = api.opened(me).await;
    assert_eq!(claimed.input.len(), 1_000);
    // The largest output that comes inline is as large as it was before.
    let inline = usize::try_from(sandbar::app::invoke::INLINE_BYTES).unwrap();
    let mut end = success(claimed);
    end.outcome.output = vec![b'7'; inline];
    api.finish(me, end).await;
    let id = answer["id"].as_str().unwrap().parse().unwrap();
    let shown = api.app.invocation(api.tenant, id, sandbar::app::invoke::INLINE_BYTES).await.unwrap();
    let output = shown.output.unwrap();
    assert_eq!(output.size_bytes, i64::from(sandbar::app::invoke::INLINE_BYTES));
    assert_eq!(output.bytes.unwrap().len(), inline);
}
