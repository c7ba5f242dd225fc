//! HTTP requests of guests, through real cells and a real worker to a server on this machine: what is granted arrives,
//! and nothing else does, whatever it is called.

mod http_tasks;
mod quotas;
mod tls;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::support::{self, Answer, Client, Deployment};

/// An HTTP server that counts who came, and keeps what they sent.
struct Target {
    port: u16,
    requests: Arc<Mutex<Vec<String>>>,
    connections: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
}

impl Target {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let target =
            Self { port, requests: Arc::default(), connections: Arc::default(), open: Arc::default() };
        let (connections, open) = (target.connections.clone(), target.open.clone());
        let requests = target.requests.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let number = connections.fetch_add(1, Ordering::SeqCst) + 1;
                open.fetch_add(1, Ordering::SeqCst);
                let (open, requests) = (open.clone(), requests.clone());
                tokio::spawn(async move {
                    serve(stream, number, &requests).await;
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        target
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    fn grant(&self) -> Value {
        json!({"http": [format!("http://127.0.0.1:{}", self.port)]})
    }

    /// The latest request, as it came.
    fn latest(&self) -> String {
        self.requests.lock().unwrap().last().cloned().unwrap_or_default()
    }

    fn seen(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// One request: `/echo` says what came, `/bytes/N` sends N bytes, `/never` nothing, `/away` sends
/// elsewhere, `/busy` is busy for the first connection.
async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    number: usize,
    requests: &Mutex<Vec<String>>,
) {
    let mut head = Vec::new();
    let mut buffer = vec![0; 16 << 10];
    let end = loop {
        if let Some(at) = head.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(n) => head.extend_from_slice(&buffer[..n]),
        }
    };
    let text = String::from_utf8_lossy(&head[..end]).to_lowercase();
    let length: usize = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .map_or(0, |length| length.trim().parse().unwrap());
    let mut received = head.len() - end;
    while received < length {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                received += n;
                if head.len() < 64 << 10 {
                    head.extend_from_slice(&buffer[..n]);
                }
            }
        }
    }
    requests.lock().unwrap().push(String::from_utf8_lossy(&head).into_owned());
    let path = text.split(' ').nth(1).unwrap_or_default();
    let (status, extra, body) = match path.strip_prefix("/bytes/") {
        Some(bytes) => ("200 OK", String::new(), vec![b'y'; bytes.parse().unwrap()]),
        None if path == "/never" => {
            // Until the other side goes away.
            while stream.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
            return;
        }
        None if path == "/busy" && number == 1 => {
            ("503 Service Unavailable", "retry-after: 0\r\n".to_owned(), Vec::new())
        }
        None if path == "/away" => {
            ("302 Found", "location: http://169.254.169.254/\r\n".to_owned(), Vec::new())
        }
        None => {
            ("200 OK", "content-type: text/plain\r\n".to_owned(), format!("{received} {text}").into_bytes())
        }
    };
    let answer = format!("HTTP/1.1 {status}\r\n{extra}content-length: {}\r\n\r\n", body.len());
    if stream.write_all(answer.as_bytes()).await.is_ok() {
        let _ = stream.write_all(&body).await;
        let _ = stream.shutdown().await;
    }
}

async fn deployment(settings: &[(&'static str, String)]) -> (Deployment, Client) {
    let mut all = vec![("SANDBAR_EGRESS__PRIVATE_NETWORKS", "[127.0.0.0/8]".to_owned())];
    all.extend_from_slice(settings);
    let deployment = Deployment::on(support::database().await, 1, &all).await;
    let client = deployment.client();
    client.upload("fetch", &support::guest("fetch")).await.expect(201);
    (deployment, client)
}

async fn patch(client: &Client, body: &Value) -> Answer {
    support::send(client.request(Method::PATCH, "/v1/tasks/fetch").json(body)).await
}

async fn grant(client: &Client, grants: &Value) -> Value {
    patch(client, &json!({"grants": grants})).await.expect(200).json()
}

/// What the guest made of it, and the invocation.
async fn fetch(client: &Client, input: &Value) -> (Value, Value) {
    fetch_within(client, input, json!({})).await
}

async fn fetch_within(client: &Client, input: &Value, limits: Value) -> (Value, Value) {
    let body = json!({"input": input, "limits": limits, "retry": {"max_attempts": 1}});
    let ended = client.invoke("fetch", &body).await.expect(200).json();
    let result = client.get(&format!("/v1/invocations/{}/result", ended["id"].as_str().unwrap())).await;
    (serde_json::from_slice(&result.body).unwrap_or_default(), ended)
}

async fn log(client: &Client, ended: &Value) -> String {
    client.get(&format!("/v1/invocations/{}/logs", ended["id"].as_str().unwrap())).await.expect(200).text()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_goes_where_its_task_has_a_grant_and_nowhere_else_and_a_grant_taken_away_is_gone() {
    let target = Target::start().await;
    let other = Target::start().await;
    let (_deployment, client) = deployment(&[]).await;
    let get = json!({"url": target.url("/echo")});

    // The module's wish alone gives nothing.
    let (out, ended) = fetch(&client, &get).await;
    assert_eq!(out["error"], "HTTP-request-denied", "{ended:#}");
    let text = log(&client, &ended).await;
    assert!(text.contains("no grant for http://127.0.0.1") && text.contains("sandbar.http"), "{text}");
    assert_eq!(ended["attempts"][0]["receipt"]["egress_bytes"], 0, "{ended:#}");
    assert_eq!(target.seen(), 0);

    let task = grant(&client, &target.grant()).await;
    assert_eq!(task["grants"], target.grant(), "{task:#}");
    let post = json!({"url": target.url("/echo?a=b"), "method": "POST", "body_bytes": 3_000_000, "headers": {"x-own": "1"}});
    let (out, ended) = fetch(&client, &post).await;
    assert_eq!(out["status"], 200, "{out:#}");
    let echo = out["body"].as_str().unwrap();
    assert!(echo.starts_with("3000000 post /echo?a=b http/1.1\r\n"), "{echo}");
    assert!(
        echo.contains(&format!("host: 127.0.0.1:{}\r\n", target.port)) && echo.contains("x-own: 1"),
        "{echo}"
    );
    let bytes = ended["attempts"][0]["receipt"]["egress_bytes"].as_u64().unwrap();
    assert_eq!(bytes, 3_000_000 + echo.len() as u64, "{ended:#}");
    let (out, _) = fetch(&client, &json!({"url": target.url("/bytes/5000000")})).await;
    assert_eq!(out["body_bytes"], 5_000_000, "{out:#}");

    // Another port, another scheme, another name for the same machine.
    for url in [
        other.url("/echo"),
        target.url("/echo").replace("http:", "https:"),
        target.url("/echo").replace("127.0.0.1", "localhost"),
        target.url("/echo").replace("127.0.0.1", "127.0.0.2"),
    ] {
        let (out, ended) = fetch(&client, &json!({"url": url})).await;
        assert_eq!(out["error"], "HTTP-request-denied", "{url}: {ended:#}");
    }
    assert_eq!(other.seen(), 0);
    // A redirect is an answer; where it leads is another request.
    let (out, _) = fetch(&client, &json!({"url": target.url("/away")})).await;
    assert_eq!(out["status"], 302, "{out:#}");

    // Taken away while a guest runs: its next request is refused.
    let body = json!({"input": {"url": target.url("/echo"), "again_after_ms": 2_000}});
    let id = client.enqueue("fetch", &body).await.expect(202).json()["id"].as_str().unwrap().to_owned();
    let before = target.seen();
    support::eventually(Duration::from_secs(20), "the first request", async || {
        (target.seen() > before).then_some(())
    })
    .await;
    assert!(grant(&client, &Value::Null).await.get("grants").is_none());
    let out = support::eventually(Duration::from_secs(20), "the end", async || {
        let answer = client.get(&format!("/v1/invocations/{id}/result")).await;
        (answer.status == 200).then(|| answer.json())
    })
    .await;
    assert_eq!(
        (&out["status"], &out["error_again"]),
        (&json!(200), &json!("HTTP-request-denied")),
        "{out:#}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_operators_list_nothing_inside_is_reached_whatever_is_granted() {
    let target = Target::start().await;
    let deployment = Deployment::start(1).await;
    let client = deployment.client();
    client.upload("fetch", &support::guest("fetch")).await.expect(201);
    let port = target.port;
    let hosts = ["127.0.0.1", "localhost", "10.0.0.1", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]"];
    let granted: Vec<String> = hosts.iter().map(|host| format!("http://{host}:{port}")).collect();
    grant(&client, &json!({"http": granted})).await;
    for host in hosts {
        let (out, ended) = fetch(&client, &json!({"url": format!("http://{host}:{port}/echo")})).await;
        assert_eq!(out["error"], "destination-IP-prohibited", "{host}: {ended:#}");
    }
    for host in ["2130706433", "0x7f000001", "0177.0.0.1", "127.1"] {
        let (out, ended) = fetch(&client, &json!({"url": format!("http://{host}:{port}/echo")})).await;
        assert_eq!(out["error"], "HTTP-request-URI-invalid", "{host}: {ended:#}");
    }
    assert_eq!(target.seen(), 0, "nobody was dialled");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_calls_and_their_memory_are_capped_and_the_guest_is_told() {
    let target = Target::start().await;
    let caps = [
        ("SANDBAR_EGRESS__MAX_SENT_BYTES", "100000".to_owned()),
        ("SANDBAR_EGRESS__MAX_RECEIVED_BYTES", "200000".to_owned()),
    ];
    let (_deployment, client) = deployment(&caps).await;
    grant(&client, &target.grant()).await;
    let sent = |bytes: usize| json!({"url": target.url("/echo"), "method": "PUT", "body_bytes": bytes});
    let (out, _) = fetch(&client, &sent(100_000)).await;
    assert_eq!(out["status"], 200, "{out:#}");
    let (out, ended) = fetch(&client, &sent(100_001)).await;
    assert_eq!(out["error"], "HTTP-request-body-size", "{ended:#}");
    let (out, _) = fetch(&client, &json!({"url": target.url("/bytes/200000")})).await;
    assert_eq!(out["body_bytes"], 200_000, "{out:#}");
    let (out, ended) = fetch(&client, &json!({"url": target.url("/bytes/200001")})).await;
    assert_eq!(out["error"], "HTTP-response-body-size", "{ended:#}");
    assert!(log(&client, &ended).await.contains("may receive 200000 bytes"));

    let (out, ended) = fetch(&client, &json!({"url": target.url("/never"), "at_once": 20})).await;
    assert_eq!(out["began"], 8, "{ended:#}");
    // Each holds buffers that count against the memory of the attempt.
    let many = json!({"url": target.url("/never"), "at_once": 20});
    let (out, ended) = fetch_within(&client, &many, json!({"memory_bytes": 2_500_000})).await;
    let began = out["began"].as_u64().unwrap();
    assert!((1..8).contains(&began), "{began}: {ended:#}");
    assert!(log(&client, &ended).await.contains("memory left for the buffers"));
    support::eventually(Duration::from_secs(10), "all connections to be closed", async || {
        (target.open.load(Ordering::SeqCst) == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_ends_with_its_attempt_at_a_deadline_a_cancellation_and_the_death_of_the_worker() {
    let target = Target::start().await;
    let (mut deployment, client) = deployment(&[]).await;
    grant(&client, &target.grant()).await;
    let never = json!({"url": target.url("/never")});
    let closed = async || {
        support::eventually(Duration::from_secs(10), "the connection to be closed", async || {
            (target.open.load(Ordering::SeqCst) == 0).then_some(())
        })
        .await;
    };
    let (_, ended) = fetch_within(&client, &never, json!({"timeout_ms": 500})).await;
    assert_eq!(ended["attempts"][0]["termination"]["reason"], "deadline", "{ended:#}");
    closed().await;

    let start = async || {
        let body = json!({"input": never, "retry": {"max_attempts": 1}});
        let id = client.enqueue("fetch", &body).await.expect(202).json()["id"].as_str().unwrap().to_owned();
        support::eventually(Duration::from_secs(20), "the request", async || {
            (target.open.load(Ordering::SeqCst) == 1).then_some(())
        })
        .await;
        id
    };
    let id = start().await;
    client.post(&format!("/v1/invocations/{id}/cancel"), &json!({})).await.expect(202);
    closed().await;
    support::eventually(Duration::from_secs(10), "the cancellation", async || {
        (client.get(&format!("/v1/invocations/{id}")).await.json()["state"] == "cancelled").then_some(())
    })
    .await;

    start().await;
    deployment.workers.remove(0).kill_9();
    closed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_webhook_example_delivers_to_a_receiver_that_was_busy_at_first() {
    let target = Target::start().await;
    let (_deployment, client) = deployment(&[]).await;
    client.upload("webhook", &support::guest("webhook")).await.expect(201);
    let grants = json!({"grants": target.grant()});
    support::send(client.request(Method::PATCH, "/v1/tasks/webhook").json(&grants)).await.expect(200);
    let input = json!({"url": target.url("/busy"), "event": "order.paid", "data": {"order": 7}});
    let body = json!({"input": input, "retry": {"initial_ms": 10, "jitter": 0}});
    let ended = client.invoke("webhook", &body).await.expect(200).json();
    assert_eq!(ended["state"], "succeeded", "{ended:#}");
    assert_eq!(ended["attempts"].as_array().unwrap().len(), 2, "{ended:#}");
    let id = ended["id"].as_str().unwrap();
    let out = client.get(&format!("/v1/invocations/{id}/result")).await.expect(200).json();
    let answer = out["answer"].as_str().unwrap();
    assert!(answer.starts_with("11 post /busy http/1.1"), "{answer}");
    for header in ["x-event: order.paid", "content-type: application/json", &format!("idempotency-key: {id}")]
    {
        assert!(answer.contains(header), "{header} in {answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grants_that_nobody_could_judge_are_refused_where_they_stand() {
    let (_deployment, client) = deployment(&[]).await;
    for (grants, pointer) in [
        (json!({"http": ["api.example.com", "https://*.com"]}), "/grants/http/1"),
        (json!({"http": ["https://api.example.com/path"]}), "/grants/http/0"),
        (json!({"http": ["0x7f.1"]}), "/grants/http/0"),
        (json!({"http": vec!["a.example"; 33]}), "/grants/http"),
    ] {
        let answer = patch(&client, &json!({"grants": grants})).await.expect(422).json();
        assert_eq!(answer["errors"][0]["pointer"], pointer, "{grants}: {answer:#}");
    }
    patch(&client, &json!({"grants": {"gpu": true}})).await.expect(422);
    let task = grant(&client, &json!({"http": ["*.example.com"]})).await;
    assert_eq!(task["grants"], json!({"http": ["*.example.com"]}));
    assert_eq!(client.get("/v1/tasks/fetch").await.json()["grants"], task["grants"]);
}
