//! Single enqueues by 64 callers, and batches of a thousand.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::figure;
use crate::peer::{PEERS, measure};
use crate::stage::Stage;
use crate::support::ADMIN_KEY;

/// Callers at once.
const CALLERS: usize = 64;
/// How long they call.
const SECONDS: u64 = 5;
/// Jobs enqueued in batches.
const BATCHED: usize = 200_000;
/// Callers of batches.
const BATCH_CALLERS: usize = 2;

/// All of them.
pub async fn run(stage: &Stage) {
    let (callers, seconds, batched) = (CALLERS.to_string(), SECONDS.to_string(), BATCHED.to_string());
    for peer in PEERS {
        if let Some(answer) = measure(stage, peer, &["single", &callers, &seconds]).await {
            figure(&format!("single.{peer}"), answer["rate"].as_f64().unwrap(), "/s");
        }
        if let Some(answer) = measure(stage, peer, &["batch", &batched]).await {
            figure(&format!("batch.{peer}"), answer["rate"].as_f64().unwrap(), "/s");
        }
    }

    let scene = stage.scene("echo").await;
    let (server, address) = scene.serve("server", &[]).await;
    let request = request("/v1/tasks/work/invocations", &json!({"input": {"n": 1, "pad": "x".repeat(80)}}));
    let count = AtomicUsize::new(0);
    let began = Instant::now();
    let until = began + Duration::from_secs(SECONDS);
    let caller = async || {
        let mut connection = Connection::open(&address).await;
        while Instant::now() < until {
            assert_eq!(connection.send(&request).await.0, 202);
            count.fetch_add(1, Ordering::Relaxed);
        }
    };
    futures_util::future::join_all((0..CALLERS).map(|_| caller())).await;
    figure("single.http", count.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64(), "/s");

    // Batches over HTTP, where the server has that operation.
    let one = json!({"task": "work", "input": {"n": 1, "pad": "x".repeat(80)}});
    let batch = self::request("/v1/invocations:batch", &json!({"invocations": vec![one; 1_000]}));
    if Connection::open(&address).await.send(&batch).await.0 == 200 {
        let left = AtomicUsize::new(BATCHED / 1_000);
        let began = Instant::now();
        let caller = async || {
            let mut connection = Connection::open(&address).await;
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
                assert_eq!(connection.send(&batch).await.0, 200);
            }
        };
        futures_util::future::join_all((0..BATCH_CALLERS).map(|_| caller())).await;
        figure("batch.http", BATCHED as f64 / began.elapsed().as_secs_f64(), "/s");
    }
    server.terminate().await;

    let scene = stage.scene("echo").await;
    scene.settle().await;
    let took = scene.preload(scene.tenant, scene.task, BATCHED, b"{\"n\":1}").await;
    figure("batch.store", BATCHED as f64 / took.as_secs_f64(), "/s");
}

/// A POST as bytes.
pub fn request(path: &str, body: &serde_json::Value) -> Vec<u8> {
    let body = body.to_string();
    format!(
        "POST {path} HTTP/1.1\r\nhost: sandbar\r\nx-api-key: {ADMIN_KEY}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// A connection kept alive. Knows as much HTTP as our own answers need: the caller shares two cores with what it
/// measures, and a full client would take a third of them.
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    /// Connects.
    pub async fn open(address: &str) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, buffer: Vec::with_capacity(4096) }
    }

    /// Sends a request and reads the whole answer: its status and body.
    pub async fn send(&mut self, request: &[u8]) -> (u16, Vec<u8>) {
        self.stream.write_all(request).await.unwrap();
        self.buffer.clear();
        let mut whole = None;
        loop {
            let n = self.stream.read_buf(&mut self.buffer).await.unwrap();
            assert!(n > 0, "the server closed: {}", String::from_utf8_lossy(&self.buffer));
            if whole.is_none()
                && let Some(end) = self.buffer.windows(4).position(|w| w == b"\r\n\r\n")
            {
                let head = String::from_utf8_lossy(&self.buffer[..end]).to_ascii_lowercase();
                let length = head
                    .split_once("content-length:")
                    .and_then(|(_, rest)| rest.split("\r\n").next()?.trim().parse::<usize>().ok());
                whole = Some((end + 4, end + 4 + length.expect("an answer of known length")));
            }
            if let Some((body, end)) = whole
                && self.buffer.len() >= end
            {
                let status = String::from_utf8_lossy(&self.buffer[9..12]).parse().unwrap();
                return (status, self.buffer[body..end].to_vec());
            }
        }
    }
}
