//! Following an invocation by events, on real processes and guests.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Api, problem, success};
use crate::support::{self, Client, Deployment};

/// A stream that is being read.
struct Events {
    bytes: std::pin::Pin<Box<dyn futures_util::Stream<Item = reqwest::Result<bytes::Bytes>> + Send>>,
    text: String,
    comments: usize,
}

#[derive(Debug, Clone, PartialEq)]
struct Event {
    name: String,
    id: Option<String>,
    data: Value,
}

impl Events {
    async fn open(client: &Client, id: &str, query: &str, last: Option<&str>) -> Self {
        let mut request = client.request(Method::GET, &format!("/v1/invocations/{id}/logs?{query}"));
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let response = request.header("accept", "text/event-stream").send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { bytes: Box::pin(response.bytes_stream()), text: String::new(), comments: 0 }
    }

    /// The next event; `None` when the stream has ended.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some((block, rest)) = self.text.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.text = rest;
                let field = |name: &str| {
                    let prefix = format!("{name}: ");
                    block.lines().find_map(|line| line.strip_prefix(&prefix)).map(str::to_owned)
                };
                if let Some(name) = field("event") {
                    let data = serde_json::from_str(&field("data").unwrap()).unwrap();
                    return Some(Event { name, id: field("id"), data });
                }
                self.comments += 1;
                continue;
            }
            let piece =
                tokio::time::timeout(Duration::from_secs(40), self.bytes.next()).await.expect("silence");
            self.text.push_str(std::str::from_utf8(&piece?.ok()?).unwrap());
        }
    }

    async fn rest(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

fn words(events: &[Event]) -> Vec<&str> {
    events.iter().filter(|e| e.name == "log").map(|e| e.data["message"].as_str().unwrap()).collect()
}

async fn talk(client: &Client, records: u32, every_ms: u64) -> String {
    let body = json!({"input": {"mode": "talk", "records": records, "every_ms": every_ms}});
    client.enqueue("trap", &body).await.expect(202).json()["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_guest_is_heard_while_it_talks_by_several_servers_and_by_who_comes_back() {
    let mut deployment = Deployment::start(1).await;
    let client = deployment.client();
    client.upload("trap", &support::guest("trap")).await.expect(201);
    let id = talk(&client, 80, 100).await;
    let mut events = Events::open(&client, &id, "", None).await;
    let mut heard = Vec::new();
    while words(&heard).len() < 3 {
        heard.push(events.next().await.expect("the stream ended early"));
    }
    let running = client.get(&format!("/v1/invocations/{id}")).await.json();
    assert_eq!(running["state"], "running", "heard before the end: {heard:?}");
    assert_eq!(heard[0].name, "state");
    // In pages too.
    let page = client.get(&format!("/v1/invocations/{id}/logs?limit=2")).await.expect(200).json();
    assert_eq!((page["items"].as_array().unwrap().len(), &page["next"]), (2, &json!("1.1")));
    // Another server hears the same, from where the first was left.
    let last = heard.iter().rev().find_map(|e| e.id.clone()).unwrap();
    drop(events);
    let second = deployment.spawn_server_too().await;
    let mut events = Events::open(&second, &id, "", Some(&last)).await;
    let rest = events.rest().await;
    let all: Vec<String> = (0..80).map(|n| format!("word {n}")).collect();
    let both: Vec<&str> = words(&heard).into_iter().chain(words(&rest)).collect();
    assert_eq!(both, all);
    let names: Vec<&str> = rest.iter().map(|e| e.name.as_str()).collect();
    assert!(names.contains(&"progress"), "{names:?}");
    let end = rest.last().unwrap();
    assert_eq!(
        (end.name.as_str(), &end.data["state"], &end.data["id"]),
        ("end", &json!("succeeded"), &json!(id))
    );
    // The last report comes before the end of the stream, and stays.
    let reported = rest.iter().rev().find(|e| e.name == "progress").unwrap();
    assert_eq!(reported.data["done"], 80);
    let progress = support::eventually(Duration::from_secs(5), "the last report", async || {
        let progress = client.get(&format!("/v1/invocations/{id}")).await.json()["progress"].clone();
        (progress["done"] == 80).then_some(progress)
    })
    .await;
    assert_eq!((&progress["total"], &progress["message"]), (&json!(80), &json!("said 80")));
    // After the end: all of it, filtered, and closed at once.
    let asked = Instant::now();
    let mut events = Events::open(&client, &id, "level=warn", None).await;
    let after = events.rest().await;
    assert_eq!(words(&after).len(), 40);
    assert_eq!(after.last().unwrap().name, "end");
    assert!(asked.elapsed() < Duration::from_secs(20));
    deployment.server.signal(Signal::TERM);
    deployment.server.ended(Duration::from_secs(60)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_cell_said_before_it_was_killed_stays_readable() {
    let deployment = Deployment::start(1).await;
    let client = deployment.client();
    client.upload("trap", &support::guest("trap")).await.expect(201);
    let id = talk(&client, 40, 100).await;
    let path = format!("/v1/invocations/{id}/logs");
    let before = support::eventually(Duration::from_secs(30), "the first words", async || {
        let page = client.get(&path).await.expect(200).json();
        let items = page["items"].as_array().unwrap().clone();
        (items.len() >= 2).then_some(items)
    })
    .await;
    for cell in deployment.workers[0].children() {
        support::kill(cell, Signal::KILL);
    }
    support::eventually(Duration::from_secs(60), "the end", async || {
        (client.get(&format!("/v1/invocations/{id}")).await.json()["state"] == "succeeded").then_some(())
    })
    .await;
    let all = client.get(&format!("{path}?limit=1000")).await.expect(200).json();
    let of = |attempt: i64| {
        all["items"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|r| r["attempt"] == attempt)
            .cloned()
            .collect::<Vec<_>>()
    };
    for (a, b) in of(1).iter().zip(&before) {
        assert_eq!((&a["cursor"], &a["message"]), (&b["cursor"], &b["message"]));
    }
    assert!(of(1).len() >= before.len());
    let attempts = client.get(&format!("/v1/invocations/{id}")).await.json()["attempts"].clone();
    assert_eq!(of(2).len(), 40, "{attempts:#}");
}

#[tokio::test]
async fn a_stream_ends_with_the_invocation_and_when_the_server_drains() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let invoke = async || {
        api.client.enqueue("echo", &json!({})).await.expect(202).json()["id"].as_str().unwrap().to_owned()
    };
    let id = invoke().await;
    let mut events = Events::open(&api.client, &id, "", None).await;
    assert_eq!(events.next().await.unwrap().data, json!({"state": "queued", "attempt": null}));
    let claimed = api.claim(me).await;
    assert_eq!(events.next().await.unwrap().data, json!({"state": "running", "attempt": 1}));
    api.ack(me, success(claimed)).await;
    let rest = events.rest().await;
    let names: Vec<&str> = rest.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names, ["state", "log", "log", "end"]);
    assert_eq!((&rest[1].id, &rest[1].data["cursor"]), (&Some("1.0".to_owned()), &json!("1.0")));

    let waiting = invoke().await;
    let mut events = Events::open(&api.client, &waiting, "", None).await;
    assert_eq!(events.next().await.unwrap().name, "state");
    api.app.drain();
    assert_eq!(events.rest().await, []);
}

#[tokio::test]
async fn streams_are_refused_like_pages_and_are_not_more_than_a_tenant_may_have() {
    let api = Api::start().await;
    api.echo().await;
    let id =
        api.client.enqueue("echo", &json!({})).await.expect(202).json()["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/invocations/{id}/logs");
    let stream = |request: reqwest::RequestBuilder| request.header("accept", "text/event-stream");
    let refused = support::send(stream(api.as_other(Method::GET, &path))).await;
    assert_eq!(problem(&refused, 404), "invocation-not-found");
    let bad = stream(api.client.request(Method::GET, &path).header("last-event-id", "x"));
    assert_eq!(problem(&support::send(bad).await, 400), "invalid-query");
    let mut open = Vec::new();
    for _ in 0..128 {
        open.push(Events::open(&api.client, &id, "", None).await);
    }
    let one_more = support::send(stream(api.client.request(Method::GET, &path))).await;
    assert_eq!(problem(&one_more, 503), "overloaded");
    assert_eq!(one_more.headers["retry-after"], "1");
    // The other tenant has its own places, and a place that is left is free.
    drop(open);
    support::eventually(Duration::from_secs(10), "a free place", async || {
        let response = stream(api.client.request(Method::GET, &path)).send().await.unwrap();
        (response.status() == 200).then_some(())
    })
    .await;
}
