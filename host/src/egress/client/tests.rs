#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::sync::atomic::{AtomicUsize, Ordering};

use http_body_util::{BodyExt, Empty, Full};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

fn request(method: &str, scheme: Scheme, authority: &str, path: &str) -> Request {
    Request {
        method: method.to_owned(),
        scheme,
        authority: authority.to_owned(),
        path: path.to_owned(),
        headers: Vec::new(),
        body: false,
        connect_ms: Some(5_000),
        first_byte_ms: Some(5_000),
        between_bytes_ms: None,
    }
}

fn get(authority: &str, path: &str) -> Request {
    request("GET", Scheme::Http, authority, path)
}

fn nothing() -> RequestBody {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

fn loopback() -> Networks {
    Networks::new(vec!["127.0.0.0/8".parse().unwrap(), "::1".parse().unwrap()])
}

fn grant(text: &str) -> HttpGrant {
    HttpGrant::parse(text).unwrap()
}

/// A client for which every name has these addresses.
fn client(networks: Networks, addresses: &'static [&'static str]) -> Client {
    Client::resolving_by(networks, &[], move |_| {
        Box::pin(async move { Ok(addresses.iter().map(|text| text.parse().unwrap()).collect()) })
    })
    .unwrap()
}

/// Answers every connection with these bytes, and keeps what it was sent until the first empty line.
async fn server(answer: impl Into<Vec<u8>>) -> (u16, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sender, heads) = tokio::sync::mpsc::unbounded_channel();
    let answer = answer.into();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (sender, answer) = (sender.clone(), answer.clone());
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.windows(4).any(|w| w == b"\r\n\r\n")
                    && stream.read_buf(&mut head).await.unwrap() > 0
                {}
                sender.send(String::from_utf8(head).unwrap()).unwrap();
                let _ = stream.write_all(&answer).await;
                let _ = stream.shutdown().await;
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest).await;
            });
        }
    });
    (port, heads)
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-a: 1\r\n\r\nhi";

async fn refused(client: &Client, grants: &[HttpGrant], request: &Request) -> Code {
    match client.send(grants, request, nothing()).await {
        Err(refusal) => refusal.code,
        Ok(answer) => panic!("answered with {}", answer.status),
    }
}

#[tokio::test]
async fn a_granted_request_arrives_with_our_host_header_and_nothing_the_guest_did_not_say() {
    let (port, mut heads) = server(OK).await;
    let client = client(loopback(), &["127.0.0.1"]);
    let mut request = get(&format!("API.test.:{port}"), "/a?b=c");
    request.headers.push(("x-own".to_owned(), b"1".to_vec()));
    let answer =
        client.send(&[grant(&format!("http://api.test:{port}"))], &request, nothing()).await.unwrap();
    assert_eq!(answer.status, 200);
    assert!(answer.headers.contains(&("x-a".to_owned(), b"1".to_vec())), "{:?}", answer.headers);
    assert_eq!(answer.body.collect().await.unwrap().to_bytes(), "hi");
    let head = heads.recv().await.unwrap();
    assert_eq!(head, format!("GET /a?b=c HTTP/1.1\r\nhost: api.test:{port}\r\nx-own: 1\r\n\r\n"));
}

#[tokio::test]
async fn a_body_is_sent_in_pieces_and_one_shorter_than_it_says_is_refused() {
    let (port, mut heads) = server(OK).await;
    let client = client(loopback(), &["127.0.0.1"]);
    let grants = [grant(&format!("http://api.test:{port}"))];
    let mut post = request("POST", Scheme::Http, &format!("api.test:{port}"), "");
    post.headers.push(("content-length".to_owned(), b"5".to_vec()));
    let body = |text: &'static str| -> RequestBody {
        Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync()
    };
    client.send(&grants, &post, body("hello")).await.unwrap();
    assert!(heads.recv().await.unwrap().starts_with("POST / HTTP/1.1\r\n"));
    for lengths in [&["5", "5"][..], &["+5"], &["five"], &["5, 5"]] {
        post.headers = lengths.iter().map(|n| ("content-length".to_owned(), n.as_bytes().to_vec())).collect();
        assert_eq!(refused(&client, &grants, &post).await, Code::HttpProtocolError, "{lengths:?}");
    }
}

#[tokio::test]
async fn without_a_grant_nobody_is_even_resolved() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let client = Client::resolving_by(loopback(), &[], move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(vec!["127.0.0.1".parse().unwrap()]) })
    })
    .unwrap();
    for grants in [&[][..], &[grant("http://other.test:80")], &[grant("https://api.test")]] {
        assert_eq!(refused(&client, grants, &get("api.test", "/")).await, Code::HttpRequestDenied);
    }
    assert_eq!(asked.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn names_and_numbers_that_lead_inside_are_refused_although_granted() {
    let (port, mut heads) = server(OK).await;
    for addresses in [
        &["127.0.0.1"][..],
        &["::1"],
        &["10.0.0.1"],
        &["169.254.169.254"],
        &["::ffff:127.0.0.1"],
        &["64:ff9b::127.0.0.1"],
        &["2002:7f00:1::"],
        &["0.0.0.0"],
        &["8.8.8.8", "127.0.0.1"],
    ] {
        let client = client(Networks::default(), addresses);
        let (grants, request) =
            ([grant(&format!("http://inside.test:{port}"))], get(&format!("inside.test:{port}"), "/"));
        assert_eq!(refused(&client, &grants, &request).await, Code::DestinationIpProhibited, "{addresses:?}");
    }
    let client = client(Networks::default(), &[]);
    for host in ["127.0.0.1", "[::1]", "[::ffff:7f00:1]", "169.254.169.254", "10.0.0.1"] {
        let (grants, request) =
            ([grant(&format!("http://{host}:{port}"))], get(&format!("{host}:{port}"), "/"));
        assert_eq!(refused(&client, &grants, &request).await, Code::DestinationIpProhibited, "{host}");
    }
    for host in ["2130706433", "0x7f000001", "0177.0.0.1", "127.1"] {
        let (grants, request) =
            ([grant(&format!("http://127.0.0.1:{port}"))], get(&format!("{host}:{port}"), "/"));
        assert_eq!(refused(&client, &grants, &request).await, Code::HttpRequestUriInvalid, "{host}");
    }
    assert!(heads.try_recv().is_err(), "nobody was dialled");
}

#[tokio::test]
async fn a_name_that_changes_its_address_is_dialled_where_it_was_checked() {
    let (port, _heads) = server(OK).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    // Good once, and bad from then on.
    let client = Client::resolving_by(Networks::new(vec!["127.0.0.1".parse().unwrap()]), &[], move |_| {
        let first = count.fetch_add(1, Ordering::SeqCst) == 0;
        Box::pin(async move { Ok(vec![if first { "127.0.0.1" } else { "127.0.0.2" }.parse().unwrap()]) })
    })
    .unwrap();
    let (grants, request) =
        ([grant(&format!("http://turn.test:{port}"))], get(&format!("turn.test:{port}"), "/"));
    assert_eq!(client.send(&grants, &request, nothing()).await.unwrap().status, 200);
    assert_eq!(asked.load(Ordering::SeqCst), 1, "asked once per request");
    assert_eq!(refused(&client, &grants, &request).await, Code::DestinationIpProhibited);
}

#[tokio::test]
async fn a_redirect_is_an_answer_and_not_followed() {
    let (port, mut heads) =
        server("HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n").await;
    let client = client(loopback(), &["127.0.0.1"]);
    let grants = [grant(&format!("http://a.test:{port}"))];
    let answer = client.send(&grants, &get(&format!("a.test:{port}"), "/"), nothing()).await.unwrap();
    assert_eq!(answer.status, 302);
    assert!(heads.recv().await.is_some() && heads.try_recv().is_err());
}

#[tokio::test]
async fn requests_that_could_be_more_than_one_or_go_elsewhere_are_refused() {
    let client = client(loopback(), &["127.0.0.1"]);
    let grants = [grant("http://a.test")];
    for (method, path, code) in [
        ("CONNECT", "/", Code::HttpRequestMethodInvalid),
        ("GET /x HTTP/1.1\r\nhost: b", "/", Code::HttpRequestMethodInvalid),
        ("", "/", Code::HttpRequestMethodInvalid),
        ("GET", "http://b.test/", Code::HttpRequestUriInvalid),
        ("GET", "*", Code::HttpRequestUriInvalid),
        ("GET", "@b.test/", Code::HttpRequestUriInvalid),
        ("GET", "/a b", Code::HttpRequestUriInvalid),
        ("GET", "/ HTTP/1.1\r\nx: y", Code::HttpRequestUriInvalid),
    ] {
        assert_eq!(
            refused(&client, &grants, &request(method, Scheme::Http, "a.test", path)).await,
            code,
            "{method} {path}"
        );
    }
    assert_eq!(
        refused(&client, &grants, &get("a.test", &format!("/{}", "a".repeat(MAX_PATH)))).await,
        Code::HttpRequestUriTooLong
    );
    for (name, value) in [
        ("host", "b.test"),
        ("connection", "upgrade"),
        ("transfer-encoding", "chunked"),
        ("upgrade", "h2c"),
        ("proxy-authorization", "x"),
        ("a b", "x"),
        ("a:b", "x"),
        ("", "x"),
        ("x", "a\r\nhost: b"),
        ("x", "a\0"),
    ] {
        let mut request = get("a.test", "/");
        request.headers.push((name.to_owned(), value.as_bytes().to_vec()));
        assert_eq!(refused(&client, &grants, &request).await, Code::HttpProtocolError, "{name}: {value}");
    }
    for many in [
        vec![("x".to_owned(), vec![b'a'; MAX_HEADER_BYTES])],
        vec![("x".to_owned(), Vec::new()); MAX_HEADERS + 1],
    ] {
        let mut request = get("a.test", "/");
        request.headers = many;
        assert_eq!(refused(&client, &grants, &request).await, Code::HttpRequestHeaderSectionSize);
    }
}

#[tokio::test]
async fn answers_beyond_the_bounds_and_answers_that_are_none_are_refused() {
    let grants = |port: u16| [grant(&format!("http://a.test:{port}"))];
    for (answer, code) in [
        (
            format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "a".repeat(MAX_HEADER_BYTES)),
            Code::HttpResponseHeaderSectionSize,
        ),
        (
            format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "a".repeat(4 * HEAD_BYTES)),
            Code::HttpResponseHeaderSectionSize,
        ),
        (
            format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: a\r\n".repeat(MAX_HEADERS + 1)),
            Code::HttpResponseHeaderSectionSize,
        ),
        ("SSH-2.0-OpenSSH\r\n\r\n".to_owned(), Code::HttpProtocolError),
        (String::new(), Code::HttpResponseIncomplete),
        (
            "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n".to_owned(),
            Code::HttpProtocolError,
        ),
    ] {
        let (port, _heads) = server(answer.clone()).await;
        let client = client(loopback(), &["127.0.0.1"]);
        let shown: String = answer.chars().take(40).collect();
        assert_eq!(
            refused(&client, &grants(port), &get(&format!("a.test:{port}"), "/")).await,
            code,
            "{shown}"
        );
    }
}

#[tokio::test]
async fn who_does_not_answer_is_given_up_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let client = client(loopback(), &["127.0.0.1"]);
    let mut request = get(&format!("a.test:{port}"), "/");
    request.first_byte_ms = Some(50);
    let grants = [grant(&format!("http://a.test:{port}"))];
    assert_eq!(refused(&client, &grants, &request).await, Code::HttpResponseTimeout);
    // TLS with somebody who does not speak it.
    let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = plain.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = plain.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    let grants = [grant(&format!("https://a.test:{port}"))];
    let secure = self::request("GET", Scheme::Https, &format!("a.test:{port}"), "/");
    assert_eq!(refused(&client, &grants, &secure).await, Code::TlsProtocolError);
    drop(listener);
}

#[tokio::test]
async fn the_second_address_is_tried_when_the_first_is_closed() {
    let (port, _heads) = server(OK).await;
    // Nobody listens on 127.0.0.2.
    let client = client(loopback(), &["127.0.0.2", "127.0.0.1"]);
    let grants = [grant(&format!("http://a.test:{port}"))];
    let answer = client.send(&grants, &get(&format!("a.test:{port}"), "/"), nothing()).await.unwrap();
    assert_eq!(answer.status, 200);
}
