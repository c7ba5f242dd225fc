//! How an invocation looks to a person: its end, its attempts, its log. Owns words and lines; fetches nothing.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Deserialize;

use super::output::{self, BOLD, Cell, DIM, Output, printable};
use crate::wire::invocation::{
    Attempt, Invocation, InvocationSummary, Payloads, Receipt, State, Termination,
};

/// Frames of a backtrace that are shown.
const MAX_FRAMES: usize = 20;

/// One record of a log, as far as it is shown.
#[derive(Debug, Clone, Deserialize)]
pub struct Record {
    /// Attempt that wrote it.
    pub attempt: i16,
    /// Microseconds since the attempt began.
    pub at_us: u64,
    /// `trace`, `debug`, `info`, `warn` or `error`.
    pub level: String,
    /// The message.
    pub message: String,
    /// Structured fields.
    #[serde(default)]
    pub fields: BTreeMap<String, String>,
}

/// How an attempt ended, in words.
pub fn termination(termination: &Termination) -> String {
    let word = |word: &str, message: &str| {
        if message.is_empty() { word.to_owned() } else { format!("{word}: {}", printable(message)) }
    };
    match termination {
        Termination::Succeeded => "succeeded".to_owned(),
        Termination::GuestError { retryable: true, message, .. } => word("error", message),
        Termination::GuestError { retryable: false, message, .. } => word("fatal error", message),
        Termination::ExitCode { code } => format!("exit code {code}"),
        Termination::Trap { kind, message } => word(&format!("trap ({})", printable(kind)), message),
        Termination::OutOfFuel => "out of fuel".to_owned(),
        Termination::OutOfMemory => "out of memory".to_owned(),
        Termination::StackOverflow => "stack overflow".to_owned(),
        Termination::Deadline => "deadline: it ran longer than its time limit".to_owned(),
        Termination::OutputTooLarge => "its result is larger than its limit".to_owned(),
        Termination::QuotaExceeded { quota } => format!("quota exceeded: {}", printable(quota)),
        // Some say why: `http: the task has no grant for …`.
        Termination::Denied { capability } if capability.contains(": ") => word("denied", capability),
        Termination::Denied { capability } => format!("denied: {} is not granted", printable(capability)),
        Termination::Cancelled => "cancelled".to_owned(),
        Termination::LeaseLost => "its worker was lost".to_owned(),
        Termination::HostFault { message } => word("a fault of the host", message),
    }
}

/// Which limit an attempt ran into, and the flag that raises it.
pub fn remedy(end: &Termination) -> Option<&'static str> {
    match end {
        Termination::OutOfFuel => Some("--fuel raises the limit"),
        Termination::OutOfMemory => Some("--memory raises the limit"),
        Termination::Deadline => Some("--timeout raises the limit"),
        Termination::OutputTooLarge => Some("--output raises the limit"),
        _ => None,
    }
}

/// What an attempt cost, in one line.
pub fn receipt(receipt: &Receipt) -> String {
    let mut text = format!(
        "fuel {}{} · cpu {} · wall {} · memory {}",
        output::count(receipt.fuel),
        if receipt.fuel_exact { "" } else { " at least" },
        output::nanoseconds(receipt.cpu_ns),
        output::nanoseconds(receipt.wall_ns),
        output::bytes(receipt.peak_memory_bytes),
    );
    for (what, count) in
        [("of the result", receipt.output_dropped_bytes), ("of the log", receipt.log_dropped_bytes)]
    {
        if count > 0 {
            text.push_str(&format!(" · {} {what} dropped", output::bytes(count)));
        }
    }
    text
}

/// The lines about one attempt: how it ended, where it was, what it cost.
fn attempt(attempt: &Attempt, paint: impl Fn(anstyle::Style, String) -> String) -> Vec<String> {
    let end = match &attempt.termination {
        Some(end) => termination(end),
        None => "running".to_owned(),
    };
    let mut lines = vec![format!("attempt {}  {end}", attempt.attempt)];
    for frame in attempt.backtrace.iter().take(MAX_FRAMES) {
        let mut line = format!("    at {}", printable(&frame.function));
        if let (Some(file), Some(number)) = (&frame.file, frame.line) {
            line.push_str(&format!(" ({}:{number})", printable(file)));
        }
        lines.push(paint(DIM, line));
    }
    if let Some(cost) = &attempt.receipt {
        lines.push(paint(DIM, format!("    {}", receipt(cost))));
    }
    if let Some(text) = attempt.termination.as_ref().and_then(remedy) {
        lines.push(paint(DIM, format!("    {text}")));
    }
    lines
}

/// How an invocation ended, for standard error: one line when it went well, all attempts when it did not.
pub fn end(output: Output, invocation: &Invocation) -> Vec<String> {
    let summary = &invocation.summary;
    let word = output.paint_err(output::state_style(summary.state), output::state_word(summary.state));
    let head = format!("{word}  {} version {}  {}", summary.task, summary.version, summary.id);
    let mut lines = vec![head];
    if summary.state == State::Succeeded {
        let cost = invocation.attempts.last().and_then(|a| a.receipt.as_ref()).map(receipt);
        let tries = match invocation.attempts.len() {
            0 | 1 => String::new(),
            n => format!("attempt {n} · "),
        };
        if let Some(cost) = cost {
            lines.push(output.paint_err(DIM, format!("  {tries}{cost}")));
        }
    } else {
        for one in &invocation.attempts {
            let painted = attempt(one, |style, text| output.paint_err(style, text));
            lines.extend(painted.into_iter().map(|line| format!("  {line}")));
        }
    }
    lines
}

/// All about an invocation, for standard output.
pub fn invocation(output: Output, invocation: &Invocation) -> Vec<String> {
    let s = &invocation.summary;
    let row = |name: &str, value: String| format!("{} {value}", output.paint(DIM, format!("{name:<11}")));
    let time = |at: DateTime<Utc>| format!("{} ({})", output::moment(at), output::age(at, Utc::now()));
    let mut lines = vec![
        row("invocation", output.paint(BOLD, s.id)),
        row("task", format!("{} version {}", s.task, s.version)),
        row("state", state(output, s)),
        row("created", time(s.created_at)),
    ];
    let mut times = |name: &str, at: Option<DateTime<Utc>>| {
        if let Some(at) = at {
            lines.push(row(name, time(at)));
        }
    };
    times("run at", s.run_at);
    times("due", s.due_at);
    times("expires", s.expires_at);
    times("finished", s.finished_at);
    if s.priority != 0 {
        lines.push(row("priority", s.priority.to_string()));
    }
    if !s.tags.is_empty() {
        lines.push(row("tags", tags(s)));
    }
    if let Some(first) = s.retry_of {
        lines.push(row("retry of", first.to_string()));
    }
    match invocation.payloads {
        Some(Payloads::Sealed) => lines.push(row("payloads", "sealed at rest".to_owned())),
        Some(Payloads::Erased) => lines.push(row("payloads", "erased".to_owned())),
        None => {}
    }
    if let Some(progress) = &invocation.progress {
        lines.push(row("progress", progress_line(progress.done, progress.total, &progress.message)));
    }
    let (l, r) = (&invocation.limits, &invocation.retry);
    lines.push(row(
        "limits",
        format!(
            "fuel {} · memory {} · time {} ms · result {} · log {}",
            output::count(l.fuel),
            output::bytes(l.memory_bytes),
            output::count(l.timeout_ms),
            output::bytes(l.output_bytes),
            output::bytes(l.log_bytes)
        ),
    ));
    lines.push(row("attempts", format!("{} of at most {}", invocation.attempts.len(), r.max_attempts)));
    for one in &invocation.attempts {
        let painted = attempt(one, |style, text| output.paint(style, text));
        lines.extend(painted.into_iter().map(|line| format!("  {line}")));
    }
    lines
}

/// The state with what belongs to it.
fn state(output: Output, summary: &InvocationSummary) -> String {
    let mut text = output.paint(output::state_style(summary.state), output::state_word(summary.state));
    if let Some(reason) = summary.reason.as_ref().filter(|r| *r != output::state_word(summary.state)) {
        text.push_str(&format!(" ({})", printable(reason)));
    }
    if summary.cancel_requested {
        text.push_str(", cancellation asked for");
    }
    text
}

/// Tags in one line.
pub fn tags(summary: &InvocationSummary) -> String {
    let tags: Vec<String> = summary.tags.iter().map(|(k, v)| format!("{k}={v}")).collect();
    printable(&tags.join(" "))
}

/// Invocations as rows.
pub fn table(output: Output, items: &[InvocationSummary], now: DateTime<Utc>) -> Vec<String> {
    let mut rows = vec![output::head(&["ID", "TASK", "VERSION", "STATE", "CREATED", "REASON", "TAGS"])];
    for item in items {
        let reason = item.reason.as_deref().filter(|r| *r != output::state_word(item.state));
        rows.push(vec![
            Cell::from(item.id.to_string()),
            Cell::styled(&item.task, BOLD),
            item.version.to_string().into(),
            Cell::styled(output::state_word(item.state), output::state_style(item.state)),
            output::age(item.created_at, now).into(),
            printable(reason.unwrap_or("")).into(),
            tags(item).into(),
        ]);
    }
    output::table(output, &rows)
}

/// One record of a log, for a stream of text. `paint` knows where it goes.
pub fn log(record: &Record, paint: impl Fn(anstyle::Style, String) -> String) -> String {
    #[allow(clippy::cast_precision_loss)] // for people
    let millis = record.at_us as f64 / 1e3;
    let level = paint(output::level_style(&record.level), format!("{:<5}", printable(&record.level)));
    // A line break inside a message must not look like another record.
    let mut line = format!(
        "{} {level} {}",
        paint(DIM, format!("{:>2} {millis:>10.1} ms", record.attempt)),
        printable(&record.message).replace('\n', "\n                  ")
    );
    for (key, value) in &record.fields {
        line.push_str(&paint(DIM, format!(" {}={}", printable(key), printable(value))));
    }
    line
}

/// Progress in one line.
pub fn progress_line(done: u64, total: u64, message: &str) -> String {
    let message = printable(message).replace('\n', " ");
    let counts = if total > 0 {
        format!("{}/{}", output::count(done), output::count(total))
    } else {
        output::count(done)
    };
    format!("{counts} {message}").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_says_why_where_the_worker_does() {
        let denied =
            |capability: &str| termination(&Termination::Denied { capability: capability.to_owned() });
        assert_eq!(denied("kv"), "denied: kv is not granted");
        assert_eq!(denied("run: the module is in quarantine"), "denied: run: the module is in quarantine");
    }
}
