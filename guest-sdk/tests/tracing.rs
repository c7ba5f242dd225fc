//! The macros of `tracing`: events with their fields and those of the spans around them.
#![allow(clippy::unwrap_used, missing_docs)]

use sandbar_guest::{Context, log, tracing};

fn fields(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn an_event_carries_level_target_message_and_fields() {
    let ctx = Context::test().capture_logs().build();
    let error = "x".parse::<u8>().unwrap_err();
    tracing::warn!(target: "t", n = 1, text = "a", shown = %2.5, debug = ?Some(3), yes = true, "said {}", "it");
    tracing::error!(error = &error as &dyn std::error::Error);
    log::info!(from = "log"; "beside it");

    let logs = ctx.captured_logs();
    assert_eq!(logs.len(), 3);
    assert_eq!((logs[0].level, logs[0].target.as_str()), (log::Level::Warn, "t"));
    assert_eq!(logs[0].message, "said it");
    let expected = [("n", "1"), ("text", "a"), ("shown", "2.5"), ("debug", "Some(3)"), ("yes", "true")];
    assert_eq!(logs[0].fields, fields(&expected));
    assert_eq!(logs[1].fields, fields(&[("error", "invalid digit found in string")]));
    assert_eq!((logs[2].level, logs[2].message.as_str()), (log::Level::Info, "beside it"));
}

#[test]
fn the_spans_around_an_event_are_named_and_their_fields_are_there_the_nearest_winning() {
    let ctx = Context::test().capture_logs().build();
    let outer = tracing::info_span!("import", file = "a.csv", row = 0, late = tracing::field::Empty);
    let entered = outer.enter();
    let inner = tracing::debug_span!("row", row = 7);
    outer.record("late", "set");
    inner.in_scope(|| tracing::info!(n = 1, "inside"));
    tracing::info!("between");
    tracing::info!(parent: None, "apart");
    drop(entered);
    // A span lives on in its children.
    drop(outer);
    tracing::info!(parent: &inner, "later");
    drop(inner);
    tracing::info!("outside");

    let logs = ctx.captured_logs();
    let inside =
        fields(&[("span", "import:row"), ("file", "a.csv"), ("row", "7"), ("late", "set"), ("n", "1")]);
    assert_eq!(logs[0].fields, inside);
    let between = fields(&[("span", "import"), ("file", "a.csv"), ("row", "0"), ("late", "set")]);
    assert_eq!(logs[1].fields, between);
    assert_eq!(logs[2].fields, []);
    assert_eq!(logs[3].fields, inside[..4]);
    assert_eq!(logs[4].fields, []);
}

#[test]
fn threads_do_not_share_spans_or_captures() {
    let ctx = Context::test().capture_logs().build();
    let span = tracing::info_span!("here").entered();
    std::thread::spawn(|| tracing::info!("there")).join().unwrap();
    tracing::info!("here");
    drop(span);
    let logs = ctx.captured_logs();
    assert_eq!(logs.len(), 1);
    assert_eq!(logs[0].fields, fields(&[("span", "here")]));
}
