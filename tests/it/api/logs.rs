//! Logs in pages: filters, places between records, and what a running attempt has said so far.

use chrono::Utc;
use sandbar::domain::retry::Verdict;
use sandbar::store::log::Said;
use sandbar::store::queue::Claimed;
use sandbar_host::cell::Progress;
use sandbar_host::log::Log;
use sandbar_host::outcome::{LogLevel, LogRecord};
use serde_json::{Value, json};

use super::{Api, problem, success, trapped};
use crate::support;

async fn invoke(api: &Api) -> String {
    api.client.enqueue("echo", &json!({})).await.expect(202).json()["id"].as_str().unwrap().to_owned()
}

fn record(n: u32) -> LogRecord {
    LogRecord {
        at_us: u64::from(n) * 1_000_000,
        level: [LogLevel::Debug, LogLevel::Info, LogLevel::Error][n as usize % 3],
        target: "guest".to_owned(),
        message: n.to_string(),
        fields: Vec::new(),
    }
}

fn said(claimed: &Claimed, first: i32, records: &[LogRecord]) -> Said {
    Said {
        claim: claimed.claim(),
        started_at: Utc::now(),
        log: Some((first, records.iter().collect::<Log>().into_bytes())),
        progress: None,
    }
}

async fn page(api: &Api, id: &str, query: &str) -> Value {
    api.client.get(&format!("/v1/invocations/{id}/logs?{query}")).await.expect(200).json()
}

fn messages(page: &Value) -> Vec<String> {
    page["items"].as_array().unwrap().iter().map(|r| r["message"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn pages_follow_each_other_without_gaps_or_repetitions_and_filters_pass_over_what_they_do_not_want() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let id = invoke(&api).await;
    for attempt in 0..2 {
        let mut finished = trapped(api.claim(me).await, Verdict::Release { delay_ms: 0 });
        finished.outcome.logs =
            (0..450).map(|n| record(attempt * 1_000 + n)).collect::<Vec<_>>().iter().collect();
        if attempt == 1 {
            finished.verdict = Verdict::Dead;
        }
        api.ack(me, finished).await;
    }
    let all: Vec<String> = (0..450).chain(1_000..1_450).map(|n| n.to_string()).collect();
    for limit in [1_000, 200, 137] {
        let (mut seen, mut after) = (Vec::new(), String::new());
        loop {
            let page = page(&api, &id, &format!("limit={limit}&{after}")).await;
            seen.extend(messages(&page));
            match page["next"].as_str() {
                Some(next) => after = format!("after={next}"),
                None => break,
            }
        }
        assert_eq!(seen, all, "{limit}");
    }
    assert_eq!(page(&api, &id, "").await["items"].as_array().unwrap().len(), 200);
    // A few errors far apart come in one page, and the last page says that it is.
    let errors = page(&api, &id, "level=error&attempt=2&limit=1000").await;
    assert_eq!(errors["items"].as_array().unwrap().len(), 150);
    assert!(errors.get("next").is_none());
    let some = page(&api, &id, "level=error&limit=2&after=1.440").await;
    assert_eq!(messages(&some), ["443", "446"]);
    assert_eq!(
        messages(
            &page(&api, &id, &format!("level=error&limit=3&after={}", some["next"].as_str().unwrap())).await
        ),
        ["449", "1001", "1004"]
    );
    let first = &page(&api, &id, "limit=1").await["items"][0];
    let since = chrono::DateTime::parse_from_rfc3339(first["at"].as_str().unwrap()).unwrap()
        + chrono::Duration::seconds(448);
    let late = page(&api, &id, &format!("attempt=1&since={}", since.to_rfc3339().replace('+', "%2B"))).await;
    assert_eq!(messages(&late), ["448", "449"]);
    assert_eq!(messages(&page(&api, &id, "after=2.449").await), Vec::<String>::new());
    for bad in ["level=loud", "limit=0", "limit=1001", "after=x", "since=now", "attempt=0", "follow=1"] {
        let answer = api.client.get(&format!("/v1/invocations/{id}/logs?{bad}")).await;
        assert_eq!(problem(&answer, 400), "invalid-query", "{bad}");
    }
}

#[tokio::test]
async fn a_running_attempts_words_have_the_places_they_keep_when_it_ends() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let id = invoke(&api).await;
    let claimed = api.claim(me).await;
    let records: Vec<LogRecord> = (0..6).map(record).collect();
    let pieces = [said(&claimed, 0, &records[..2]), said(&claimed, 2, &records[2..4])];
    assert_eq!(api.worker.write_live(me.0, me.1, &pieces).await.unwrap(), 2);
    // Again, as after an answer that was lost.
    api.worker.write_live(me.0, me.1, &pieces).await.unwrap();
    let live = page(&api, &id, "limit=3").await;
    assert_eq!(messages(&live), ["0", "1", "2"]);
    assert_eq!((&live["next"], &live["items"][2]["cursor"]), (&json!("1.2"), &json!("1.2")));
    assert_eq!(messages(&page(&api, &id, "after=1.2").await), ["3"]);
    // A piece that came before the one in front of it waits for that.
    api.worker.write_live(me.0, me.1, &[said(&claimed, 5, &records[5..])]).await.unwrap();
    assert_eq!(messages(&page(&api, &id, "after=1.2").await), ["3"]);
    let mut finished = success(claimed);
    finished.outcome.logs = records.iter().collect();
    api.ack(me, finished).await;
    assert_eq!(messages(&page(&api, &id, "after=1.2").await), ["3", "4", "5"]);
    assert_eq!(messages(&page(&api, &id, "").await).len(), 6);
    assert_eq!(api.worker.settle_live(100).await.unwrap(), 3);
    assert_eq!(messages(&page(&api, &id, "after=1.2").await), ["3", "4", "5"]);
    let left: i64 =
        sqlx::query_scalar("SELECT count(*) FROM sandbar.live_logs").fetch_one(&api.admin).await.unwrap();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn a_lost_lease_writes_nothing_and_what_was_written_before_stays() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let id = invoke(&api).await;
    let claimed = api.claim(me).await;
    let records: Vec<LogRecord> = (0..4).map(record).collect();
    let report = |done| Some((Progress { done, total: 0, message: "m".to_owned() }, Utc::now()));
    let first = Said { progress: report(1), ..said(&claimed, 0, &records[..2]) };
    assert_eq!(api.worker.write_live(me.0, me.1, &[first]).await.unwrap(), 1);
    // Not under another epoch, nor by another worker.
    let other = api.register().await;
    for who in [(me.0, me.1.wrapping_add(1)), other] {
        let more = Said { progress: report(9), ..said(&claimed, 2, &records[2..]) };
        assert_eq!(api.worker.write_live(who.0, who.1, &[more]).await.unwrap(), 0);
    }
    api.worker.reap(std::time::Duration::from_secs(6), 10, Some(me.0)).await.unwrap();
    let more = Said { progress: report(9), ..said(&claimed, 2, &records[2..]) };
    assert_eq!(api.worker.write_live(me.0, me.1, &[more]).await.unwrap(), 0);
    assert_eq!(messages(&page(&api, &id, "").await), ["0", "1"]);
    assert_eq!(api.worker.settle_live(100).await.unwrap(), 1);
    // Now in the place of logs that stay; the next attempt has its own.
    let again = api.claim(other).await;
    let second = Said { progress: report(2), ..said(&again, 0, &records[3..]) };
    assert_eq!(api.worker.write_live(other.0, other.1, &[second]).await.unwrap(), 1);
    let both = page(&api, &id, "").await;
    assert_eq!(messages(&both), ["0", "1", "3"]);
    assert_eq!((&both["items"][1]["cursor"], &both["items"][2]["cursor"]), (&json!("1.1"), &json!("2.0")));
    let progress = &api.client.get(&format!("/v1/invocations/{id}")).await.json()["progress"];
    assert_eq!(
        (&progress["done"], &progress["attempt"], &progress["message"]),
        (&json!(2), &json!(2), &json!("m"))
    );
}

#[tokio::test]
async fn the_last_report_of_an_attempt_counts_also_after_its_ack() {
    let api = Api::start().await;
    api.echo().await;
    let me = api.register().await;
    let id = invoke(&api).await;
    let claimed = api.claim(me).await;
    let report = Progress { done: u64::MAX, total: u64::MAX, message: "all".to_owned() };
    let last = Said { progress: Some((report, Utc::now())), log: None, ..said(&claimed, 0, &[record(0)]) };
    api.ack(me, success(claimed)).await;
    assert_eq!(api.worker.write_live(me.0, me.1, &[last]).await.unwrap(), 1);
    let ended = api.client.get(&format!("/v1/invocations/{id}")).await.json();
    assert_eq!((&ended["state"], &ended["progress"]["done"]), (&json!("succeeded"), &json!(u64::MAX)));
    let other = support::send(api.as_other(reqwest::Method::GET, &format!("/v1/invocations/{id}"))).await;
    assert_eq!(other.status, 404);
}
