//! Examples that read tables and JSON: csv-report, and jaq as it is on crates.io.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{Sequence, end, oracle, patient, push, succeed};
use crate::support;

/// Room for the rest of the input beside the table, in bytes.
const BESIDE: usize = 200;

/// Orders of a shop as CSV: quoted commas, quotes and line breaks, empty fields, negative numbers. As many rows as
/// fit `bytes` as a JSON string.
fn orders(bytes: usize) -> String {
    const CITIES: [&str; 6] =
        ["Oslo", "\"Washington, D.C.\"", "São Paulo", "\"The \"\"Hague\"\"\"", "東京", "Ulm"];
    let mut random = Sequence(2);
    let mut csv = "order,date,city,article,quantity,price,discount,note\r\n".to_owned();
    // What the table takes inside JSON: two bytes for each of these.
    let escaped = |text: &str| text.len() + text.bytes().filter(|b| b"\"\r\n".contains(b)).count();
    let mut taken = escaped(&csv);
    for order in 1.. {
        let mut row = String::new();
        let (day, month) = (1 + random.below(28), 1 + random.below(12));
        let city = CITIES[usize::try_from(random.below(6)).unwrap()];
        let cents = i64::try_from(random.below(1_000_000)).unwrap() - 50_000;
        let sign = if cents < 0 { "-" } else { "" };
        let (whole, part) = (cents.abs() / 100, cents.abs() % 100);
        write!(row, "{order},2026-{month:02}-{day:02},{city},art-{:05},", random.below(20_000)).unwrap();
        write!(row, "{},{sign}{whole}.{part:02},", 1 + random.below(9)).unwrap();
        row.push_str(["", "5", "7.5"][usize::try_from(random.below(3)).unwrap()]);
        row.push_str([",", ",\"two\nlines\"", ",nan"][usize::try_from(random.below(3)).unwrap()]);
        row.push_str("\r\n");
        taken += escaped(&row);
        if taken + BESIDE > bytes {
            break;
        }
        csv.push_str(&row);
    }
    csv
}

/// The same numbers, but for the last bits of sums.
fn agrees(ours: &Value, theirs: &Value, at: &str) {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>(), "{at}");
            a.iter().for_each(|(key, value)| agrees(value, &b[key], &format!("{at}/{key}")));
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{at}");
            a.iter().zip(b).enumerate().for_each(|(n, (a, b))| agrees(a, b, &format!("{at}/{n}")));
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            assert!((a - b).abs() <= 1e-12 * b.abs(), "{at}: {a} is not {b}");
        }
        _ => assert_eq!(ours, theirs, "{at}"),
    }
}

async fn reports(settings: &[(&'static str, String)], bytes: usize) {
    let deployment = patient(settings).await;
    let client = deployment.client();
    push(&client, "csv-report", &support::guest("csv-report")).await;
    let csv = orders(bytes);
    let group = json!({"by": "city", "sum": "price"});
    let body = json!({"input": {"csv": csv, "group": group}});
    let (ended, media_type, result) = succeed(&client, "csv-report", &body).await;
    assert_eq!(media_type, "application/json");
    let read = ended["attempts"][0]["receipt"]["input_bytes"].as_u64().unwrap();
    assert!((bytes - 2 * BESIDE..=bytes).contains(&usize::try_from(read).unwrap()), "{read} of {bytes}");
    agrees(&serde_json::from_slice(&result).unwrap(), &oracle("csv", csv.as_bytes()), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_as_large_as_inputs_may_be_by_default_is_reported_as_python_reports_it() {
    reports(&[], 4 << 20).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_of_thirty_two_megabytes_is_reported_where_the_installation_allows_it() {
    let allowed = 32 << 20;
    reports(&[("SANDBAR_SERVER__MAX_INPUT_BYTES", allowed.to_string())], allowed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jaq_from_crates_io_runs_unmodified_with_arguments_and_stdin() {
    let deployment = patient(&[]).await;
    let client = deployment.client();
    let version = push(&client, "jaq", &support::jaq()).await;
    assert_eq!(version["kind"], "command-p1", "{version:#}");
    let mut random = Sequence(3);
    let people: Vec<Value> = (0..20_000)
        .map(|n| json!({"name": format!("Zoë {n}"), "age": random.below(90), "tags": ["a", "b"]}))
        .collect();
    let people = Value::Array(people).to_string();
    let filter = "[.[] | select(.age < ($age | tonumber))] | group_by(.age) | map({age: .[0].age, n: length, last: (map(.name) | max)})";
    let body = json!({"args": ["-c", "--arg", "age", "18", filter], "stdin": people});
    let (_, _, result) = succeed(&client, "jaq", &body).await;
    let result: Value = serde_json::from_slice(&result).unwrap();
    assert_eq!(result, oracle("young", people.as_bytes()));

    // What the program says of a mistake, and its own exit code, come back.
    let body = json!({"args": ["."], "stdin": "{\"cut", "retry": {"max_attempts": 1}});
    let ended = end(&client, "jaq", &body).await;
    assert_eq!(ended["attempts"][0]["termination"], json!({"reason": "exit-code", "code": 5}), "{ended:#}");
    let log = client.get(ended["links"]["logs"].as_str().unwrap()).await.expect(200).text();
    assert!(log.contains("Error") && log.contains("stderr"), "{log}");
}
