//! From bytes to versions.

use std::time::Duration;

use futures_util::StreamExt as _;
use reqwest::Method;
use sandbar_host::inspect::{Rejection, RejectionCode};
use serde_json::{Value, json};

use super::{Api, problem};
use crate::support::{self, Answer};

/// A preview 1 command; another `n` gives other bytes.
fn command(n: u32) -> Vec<u8> {
    wat::parse_str(format!(
        r#"(module (memory (export "memory") 1) (func (export "_start") (drop (i32.const {n}))))"#
    ))
    .unwrap()
}

async fn upload(api: &Api, task: &str, bytes: Vec<u8>) -> Answer {
    let request = api
        .client
        .request(Method::POST, &format!("/v1/tasks/{task}/versions"))
        .header("content-type", "application/wasm")
        .body(bytes);
    support::send(request).await
}

#[tokio::test]
async fn new_bytes_make_a_version_and_the_same_bytes_give_it_back() {
    let api = Api::start().await;
    let first = upload(&api, "hello", command(1)).await.expect(201);
    assert_eq!(first.headers["location"], "/v1/tasks/hello/versions/1");
    let body = first.json();
    assert_eq!(
        (&body["version"], &body["state"], &body["kind"]),
        (&json!(1), &json!("compiling"), &json!("command-p1"))
    );
    assert_eq!(body["size_bytes"], command(1).len());
    assert_eq!(upload(&api, "hello", command(1)).await.expect(200).json(), body);
    assert_eq!(upload(&api, "hello", command(2)).await.expect(201).json()["version"], 2);
    // The same bytes in another task are a version of that task.
    assert_eq!(upload(&api, "hello-2", command(1)).await.expect(201).json()["version"], 1);
    assert_eq!(api.client.get("/v1/tasks/hello").await.expect(200).json()["current_version"], Value::Null);

    api.compile().await;
    let task = api.client.get("/v1/tasks/hello").await.expect(200).json();
    assert_eq!(task["current_version"], 2);
    let version = api.client.get("/v1/tasks/hello/versions/1").await.expect(200).json();
    assert_eq!(version["state"], "ready");
    let all = api.client.get("/v1/tasks/hello/versions").await.expect(200).json();
    let numbers: Vec<&Value> = all["items"].as_array().unwrap().iter().map(|v| &v["version"]).collect();
    assert_eq!(numbers, [&json!(2), &json!(1)]);
    assert_eq!(all["next"], Value::Null);
}

#[tokio::test]
async fn uploads_of_one_task_at_once_get_numbers_without_gaps_and_same_bytes_one_version() {
    let api = Api::start().await;
    let uploads: Vec<_> = (0..12).map(|i| upload(&api, "many", command(i % 6))).collect();
    let mut created = Vec::new();
    for answer in futures_util::future::join_all(uploads).await {
        let number = answer.json()["version"].as_i64().unwrap();
        assert!((1..=6).contains(&number));
        if answer.status == 201 {
            created.push(number);
        }
    }
    created.sort_unstable();
    assert_eq!(created, [1, 2, 3, 4, 5, 6]);
}

#[tokio::test]
async fn a_version_that_becomes_ready_late_does_not_replace_a_newer_one() {
    let api = Api::start().await;
    upload(&api, "late", command(1)).await.expect(201);
    upload(&api, "late", command(2)).await.expect(201);
    let lease = Duration::from_secs(60);
    let first = api.worker.version_to_compile(lease, 64).await.unwrap().unwrap();
    let second = api.worker.version_to_compile(lease, 64).await.unwrap().unwrap();
    assert_eq!((first.number, second.number), (1, 2));
    assert!(api.worker.version_to_compile(lease, 64).await.unwrap().is_none(), "leased");
    let bytes = api.worker.module_bytes(second.tenant, &second.sha256).await.unwrap();
    assert_eq!(bytes.unwrap(), command(2));
    for version in [second, first] {
        assert!(api.worker.version_ready(version.tenant, version.task, version.number).await.unwrap());
        assert!(
            !api.worker.version_ready(version.tenant, version.task, version.number).await.unwrap(),
            "twice"
        );
    }
    assert_eq!(api.client.get("/v1/tasks/late").await.json()["current_version"], 2);
}

#[tokio::test]
async fn a_wait_ends_with_the_verdict_of_the_compiler() {
    let api = Api::start().await;
    let both = async |n: u32| {
        let waiting = api.client.upload_bytes("waits", command(n));
        let compiling = async {
            let version = support::eventually(super::SOON, "an upload", async || {
                api.worker.version_to_compile(Duration::from_secs(60), 64).await.unwrap()
            })
            .await;
            if n == 1 {
                api.worker.version_ready(version.tenant, version.task, version.number).await.unwrap();
                return;
            }
            // A NUL in it would not go into jsonb.
            let rejection =
                Rejection { code: RejectionCode::CompileTimeout, detail: "too \0 slow".to_owned() };
            let told =
                api.worker.version_rejected(version.tenant, version.task, version.number, &rejection).await;
            assert!(told.unwrap());
        };
        tokio::join!(waiting, compiling).0
    };
    let ready = both(1).await.expect(201);
    assert_eq!(ready.json()["state"], "ready");
    assert_eq!(ready.headers["preference-applied"], "wait=60");

    let rejected = both(2).await;
    assert_eq!(problem(&rejected, 422), "module-compile-timeout");
    assert_eq!(rejected.json()["rejection"]["code"], "compile-timeout");
    // The verdict stands for these bytes.
    let again = upload(&api, "waits", command(2)).await;
    assert_eq!(problem(&again, 422), "module-compile-timeout");
    assert_eq!(again.json()["rejection"], rejected.json()["rejection"]);
    let version = api.client.get("/v1/tasks/waits/versions/2").await.expect(200).json();
    assert_eq!(
        (&version["state"], &version["rejection"]["code"]),
        (&json!("rejected"), &json!("compile-timeout"))
    );
    let invoked = api.client.enqueue("waits", &json!({"version": 2})).await;
    assert_eq!(problem(&invoked, 409), "version-rejected");
}

#[tokio::test]
async fn what_cannot_run_is_refused_with_its_reason_and_leaves_nothing_behind() {
    let api = Api::start().await;
    let whole = command(1);
    let cases: [(&str, Vec<u8>); 6] = [
        ("module-not-wasm", Vec::new()),
        ("module-not-wasm", b"#!/bin/sh\n".to_vec()),
        ("module-text-format", b"(module)".to_vec()),
        ("module-truncated", whole[..whole.len() - 3].to_vec()),
        (
            "module-unknown-import",
            wat::parse_str(r#"(module (import "env" "abort" (func)) (memory (export "memory") 1) (func (export "_start")))"#)
                .unwrap(),
        ),
        ("module-no-usable-export", wat::parse_str("(module (memory 1))").unwrap()),
    ];
    for (code, bytes) in cases {
        let answer = upload(&api, "bad", bytes).await;
        assert_eq!(problem(&answer, 422), code);
        assert_eq!(format!("module-{}", answer.json()["rejection"]["code"].as_str().unwrap()), code);
    }
    assert_eq!(problem(&api.client.get("/v1/tasks/bad").await, 404), "task-not-found");
    let blobs: i64 =
        sqlx::query_scalar("SELECT count(*) FROM sandbar.blobs").fetch_one(&api.admin).await.unwrap();
    assert_eq!(blobs, 0);
}

#[tokio::test]
async fn names_types_and_sizes_are_refused_before_anything_is_looked_at() {
    let settings = sandbar::app::Settings { max_module_bytes: 1_000, ..Default::default() };
    let api = Api::on(&support::database().await, settings).await;
    let bad_name = upload(&api, "Hello", command(1)).await;
    assert_eq!(problem(&bad_name, 422), "invalid-task-name");
    let request = api.client.request(Method::POST, "/v1/tasks/a/versions").body(command(1));
    assert_eq!(problem(&support::send(request).await, 415), "unsupported-media-type");
    let announced = upload(&api, "a", vec![0; 1_001]).await;
    assert_eq!(problem(&announced, 413), "module-too-large");
    let pieces: Vec<Result<Vec<u8>, std::io::Error>> = (0..11).map(|_| Ok(vec![0; 100])).collect();
    let streamed = api
        .client
        .request(Method::POST, "/v1/tasks/a/versions")
        .header("content-type", "application/wasm")
        .body(reqwest::Body::wrap_stream(futures_util::stream::iter(pieces)));
    assert_eq!(problem(&support::send(streamed).await, 413), "module-too-large");
    upload(&api, "a", command(1)).await.expect(201);
}

/// Uploads as the second tenant.
async fn upload_as_other(api: &Api, task: &str, bytes: Vec<u8>) -> Answer {
    let request = api.as_other(Method::POST, &format!("/v1/tasks/{task}/versions"));
    support::send(request.header("content-type", "application/wasm").body(bytes)).await
}

#[tokio::test]
async fn tenants_take_turns_at_the_compiler_and_one_has_only_so_many_at_once() {
    let api = Api::start().await;
    for n in 0..6 {
        upload(&api, "many", command(n)).await.expect(201);
    }
    upload_as_other(&api, "one", command(0)).await.expect(201);
    let lease = Duration::from_secs(60);
    let next = async |of_one| api.worker.version_to_compile(lease, of_one).await.unwrap();
    let first = next(1).await.unwrap();
    assert_eq!((first.tenant, first.number), (api.tenant, 1));
    // A place is free: it is for the other, who came last, and not for the one who has a place.
    let other = next(1).await.unwrap();
    assert_ne!(other.tenant, api.tenant);
    assert_eq!(next(1).await, None, "the tenant with five more has its place");
    let second = next(2).await.unwrap();
    assert_eq!((second.tenant, second.number), (api.tenant, 2));
    assert_eq!(next(2).await, None, "or its two places");

    // With one place in all, an upload waits for one of the other tenant's at most.
    for v in [first, second, other] {
        assert!(api.worker.version_ready(v.tenant, v.task, v.number).await.unwrap());
    }
    let mut order = Vec::new();
    let mut late = Some(7);
    while let Some(v) = next(1).await {
        if let Some(n) = late.take() {
            upload_as_other(&api, "one", command(n)).await.expect(201);
        }
        order.push(v.tenant == api.tenant);
        assert!(api.worker.version_ready(v.tenant, v.task, v.number).await.unwrap());
    }
    assert_eq!(order, [true, false, true, true, true]);
}

#[tokio::test]
async fn servers_that_choose_at_the_same_moment_give_a_tenant_no_more_places_than_it_has() {
    let api = Api::start().await;
    for n in 0..8 {
        upload(&api, "many", command(n)).await.expect(201);
    }
    let lease = Duration::from_secs(60);
    let chosen = (0..6).map(|_| api.worker.version_to_compile(lease, 2));
    let chosen = futures_util::future::join_all(chosen).await;
    assert_eq!(chosen.into_iter().filter(|c| c.as_ref().unwrap().is_some()).count(), 2);
}

#[tokio::test]
async fn so_many_uploads_may_wait_for_the_compiler_of_one_tenant_and_in_all() {
    let settings = sandbar::app::Settings { max_compiling: 5, max_compiling_of_one: 3, ..Default::default() };
    let api = Api::on(&support::database().await, settings).await;
    // At once, to several tasks: none passes the bound.
    let uploads: Vec<_> = (0..8).map(|n| (format!("t{}", n % 4), command(n))).collect();
    let uploads = uploads.into_iter().map(|(task, bytes)| {
        let api = &api;
        async move { upload(api, &task, bytes).await }
    });
    let answers = futures_util::future::join_all(uploads).await;
    let (made, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.status == 201);
    assert_eq!(made.len(), 3);
    for answer in &refused {
        assert_eq!(problem(answer, 429), "compile-queue-full");
        assert!(answer.headers["retry-after"].to_str().unwrap().parse::<u32>().unwrap() > 0);
    }
    // What is known needs no compilation, and a definition neither.
    let task = made[0].headers["location"].to_str().unwrap().split('/').nth(3).unwrap().to_owned();
    let bytes = (0..8).filter(|n| format!("t{}", n % 4) == task).map(command);
    let again = futures_util::future::join_all(bytes.map(|bytes| upload(&api, &task, bytes))).await;
    assert!(again.iter().any(|answer| answer.status == 200), "{again:?}");
    let http = json!({"http": {"method": "GET", "url": "https://example.com/"}});
    api.client.post("/v1/tasks/hook/versions", &http).await.expect(201);

    // The other tenant is not kept out by that, but by what waits in all.
    for n in 0..2 {
        upload_as_other(&api, "one", command(n)).await.expect(201);
    }
    let full = upload_as_other(&api, "one", command(9)).await;
    assert_eq!(problem(&full, 503), "overloaded");
    assert!(full.headers.contains_key("retry-after"));

    // There is room again as soon as one has been compiled, or its task is deleted.
    let first = api.worker.version_to_compile(Duration::from_secs(60), 1).await.unwrap().unwrap();
    api.worker.version_ready(first.tenant, first.task, first.number).await.unwrap();
    let more = if first.tenant == api.tenant {
        upload(&api, "more", command(10)).await
    } else {
        upload_as_other(&api, "more", command(10)).await
    };
    more.expect(201);
    support::send(api.as_other(Method::DELETE, "/v1/tasks/one")).await.expect(204);
    upload_as_other(&api, "again", command(11)).await.expect(201);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_whose_uploads_stand_still_keeps_no_other_from_uploading() {
    // The largest module is one unit of memory: four are there, and two of one tenant.
    let settings = sandbar::app::Settings { max_module_bytes: 64 << 10, ..Default::default() };
    let api = Api::on(&support::database().await, settings).await;
    let mut still = Vec::new();
    for n in 0..4 {
        let begins = futures_util::stream::once(async { Ok::<_, std::io::Error>(b"\0asm".to_vec()) });
        let never = begins.chain(futures_util::stream::pending());
        let request = api
            .client
            .request(Method::POST, &format!("/v1/tasks/still-{n}/versions"))
            .header("content-type", "application/wasm")
            .body(reqwest::Body::wrap_stream(never));
        still.push(tokio_util::task::AbortOnDropHandle::new(tokio::spawn(request.send())));
    }
    // Two have begun when the other two are refused.
    support::eventually(super::SOON, "the tenant's share to be used up", async || {
        (still.iter().filter(|request| request.is_finished()).count() == 2).then_some(())
    })
    .await;
    let refused = upload(&api, "mine", command(1)).await;
    assert_eq!(problem(&refused, 503), "overloaded");
    assert!(refused.json()["detail"].as_str().unwrap().contains("of this tenant"), "{}", refused.text());
    upload_as_other(&api, "theirs", command(1)).await.expect(201);
    // Whoever goes away gives back what it held.
    drop(still);
    support::eventually(super::SOON, "the memory to come back", async || {
        let answer = upload(&api, "mine", command(1)).await;
        answer.status.is_success().then_some(())
    })
    .await;
}
