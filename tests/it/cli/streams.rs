//! Following when the server does not make it easy: streams that break, and streams that are not to be had.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;

use super::Person;

const ID: &str = "01a1fd4b-1501-7153-bc72-3cd5d72f09fb";

/// A server that answers each connection with what `answer` makes of the request's head, and closes it.
fn server(answer: impl Fn(usize, &str) -> String + Send + 'static) -> Person {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut person = Person::new();
    person.set("SANDBAR_URL", format!("http://{}", listener.local_addr().unwrap()));
    person.set("SANDBAR_API_KEY", "sbk_of-a-test");
    // It ends with the test process.
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
            let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
            let _ = stream.write_all(answer(number, &head.join("\n")).as_bytes());
        }
    });
    person
}

fn answer(status: &str, kind: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n{body}")
}

fn record(attempt: i32, message: &str) -> String {
    format!(
        r#"{{"attempt":{attempt},"at_us":5,"at":"2026-11-21T08:00:00Z","cursor":"{message}","level":"info","target":"t","message":"{message}"}}"#
    )
}

#[test]
fn a_stream_that_breaks_is_taken_up_where_it_broke() {
    let person = server(|number, head| {
        assert!(head.contains("x-api-key: sbk_of-a-test"), "{head}");
        let asked_to_go_on = head.contains("last-event-id: one");
        let body = match number {
            0 => format!("event: log\nid: one\ndata: {}\n\nevent: log\nid: lost\nda", record(1, "one")),
            _ if asked_to_go_on => {
                format!("event: log\nid: two\ndata: {}\n\nevent: end\ndata: {{}}\n\n", record(1, "two"))
            }
            _ => String::new(),
        };
        answer("200 OK", "text/event-stream", &body)
    });
    let said = person.run(&["logs", "-f", ID, "--json"]).expect(0);
    let messages: Vec<_> = said.documents().into_iter().map(|r| r["message"].clone()).collect();
    assert_eq!(messages, ["one", "two"]);
}

#[test]
fn without_a_stream_it_is_followed_by_asking() {
    let person = server(|_, head| {
        let path = head.split(' ').nth(1).unwrap();
        if head.contains("text/event-stream") {
            let problem = r#"{"type":"/errors/overloaded","title":"t","status":503,"code":"overloaded","detail":"too many streams"}"#;
            return answer("503 Service Unavailable", "application/problem+json", problem);
        }
        if path.ends_with("/logs") {
            let page = format!(r#"{{"items":[{}],"next":"one"}}"#, record(1, "one"));
            return answer("200 OK", "application/json", &page);
        }
        if path.ends_with("/logs?after=one") {
            let page = format!(r#"{{"items":[{}],"next":null}}"#, record(1, "two"));
            return answer("200 OK", "application/json", &page);
        }
        let limits = r#"{"fuel":1,"memory_bytes":1,"timeout_ms":1,"output_bytes":1,"log_bytes":1}"#;
        let retry =
            r#"{"max_attempts":1,"backoff":"fixed","initial_ms":1,"factor":1.0,"max_ms":1,"jitter":0.0}"#;
        let links = r#"{"self":"/v1/invocations/x","result":"/r","logs":"/l"}"#;
        let invocation = format!(
            r#"{{"id":"{ID}","task":"t","version":1,"state":"succeeded","priority":0,"tags":{{}},"created_at":"2026-11-21T08:00:00Z","links":{links},"attempts":[],"limits":{limits},"retry":{retry}}}"#
        );
        answer("200 OK", "application/json", &invocation)
    });
    let said = person.run(&["logs", "-f", ID, "--json"]).expect(0);
    let messages: Vec<_> = said.documents().into_iter().map(|r| r["message"].clone()).collect();
    assert_eq!(messages, ["one", "two"]);
}

#[test]
fn a_redirect_is_not_followed_with_the_key() {
    let person = server(|_, _| {
        "HTTP/1.1 307 Temporary Redirect\r\nlocation: http://127.0.0.1:9/\r\nconnection: close\r\n\r\n"
            .to_owned()
    });
    let said = person.run(&["list"]).expect(5);
    assert!(said.err.contains("redirect"), "{said:?}");
}

#[test]
fn what_is_no_sandbar_server_is_said_to_be_none() {
    let person = server(|_, _| answer("502 Bad Gateway", "text/html", "<html>\x1b[2J</html>"));
    let said = person.run(&["list"]).expect(5);
    assert!(said.err.contains("not as a Sandbar server does") && !said.err.contains('\x1b'), "{said:?}");
}
