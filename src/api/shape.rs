//! Invocations from rows to wire types, field by field: a row that changes does not change what clients were promised.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use chrono::{DateTime, Utc};
use sandbar_host::outcome::{Frame, LogLevel, Termination, TrapKind};

use crate::app::log::Record;
use crate::domain::admission::Condition;
use crate::domain::ids::InvocationId;
use crate::domain::invocation::State;
use crate::domain::retry::Backoff;
use crate::store::invocation::{AttemptRow, Invocation, Output, ProgressRow, Summary};
use crate::wire::invocation as wire;

/// An invocation; with its result if `with_result`.
pub(super) fn invocation(row: &Invocation, with_result: bool) -> wire::Invocation {
    let mut attempts: Vec<wire::Attempt> = row.attempts.iter().map(attempt).collect();
    if let Some(running) = &row.running {
        attempts.push(wire::Attempt {
            attempt: running.attempt,
            worker: running.worker.0,
            started_at: running.started_at,
            finished_at: None,
            termination: None,
            receipt: None,
            backtrace: Vec::new(),
        });
    }
    wire::Invocation {
        summary: summary(&row.summary, row.cancelling),
        attempts,
        limits: wire::Limits {
            fuel: row.limits.fuel,
            memory_bytes: row.limits.memory_bytes,
            timeout_ms: row.limits.timeout_ms,
            output_bytes: row.limits.output_bytes,
            log_bytes: row.limits.log_bytes,
        },
        retry: wire::Retry {
            max_attempts: row.retry.max_attempts,
            backoff: backoff(row.retry.backoff),
            initial_ms: row.retry.initial_ms,
            factor: row.retry.factor,
            max_ms: row.retry.max_ms,
            jitter: row.retry.jitter,
        },
        progress: row.progress.as_ref().map(progress),
        payloads: match (&row.kept.sealed, row.lost || row.kept.erased_at.is_some()) {
            (_, true) => Some(wire::Payloads::Erased),
            (Some(_), false) => Some(wire::Payloads::Sealed),
            (None, false) => None,
        },
        waiting_on: row
            .waiting_on
            .iter()
            .map(|d| wire::DependsOn {
                id: d.id.0,
                condition: match d.condition {
                    Condition::Succeeded => wire::Condition::Succeeded,
                    Condition::Finished => wire::Condition::Finished,
                    Condition::Failed => wire::Condition::Failed,
                },
            })
            .collect(),
        result: row
            .output
            .as_ref()
            .filter(|output| with_result && (output.size_bytes > 0 || row.summary.state == State::Succeeded))
            .map(inline),
    }
}

/// The growth of waits.
pub(super) fn backoff(backoff: Backoff) -> wire::Backoff {
    match backoff {
        Backoff::Fixed => wire::Backoff::Fixed,
        Backoff::Exponential => wire::Backoff::Exponential,
    }
}

/// A report of progress.
pub(super) fn progress(row: &ProgressRow) -> wire::Progress {
    wire::Progress {
        done: row.report.done,
        total: row.report.total,
        message: row.report.message.clone(),
        attempt: row.attempt,
        at: row.at,
    }
}

/// An invocation as lists show it.
pub(super) fn summary(row: &Summary, cancelling: bool) -> wire::InvocationSummary {
    let this = format!("/v1/invocations/{}", row.id);
    wire::InvocationSummary {
        id: row.id.0,
        task: row.task.clone(),
        version: row.version,
        state: state(row.state),
        reason: row.reason.clone(),
        cancel_requested: cancelling,
        priority: row.priority,
        tags: row.tags.clone(),
        created_at: accepted_at(row.id).unwrap_or(row.created_at),
        run_at: row.run_at,
        expires_at: row.expires_at,
        due_at: row.due_at,
        finished_at: row.finished_at,
        retry_of: row.retry_of.map(|id| id.0),
        links: wire::InvocationLinks {
            result: format!("{this}/result"),
            logs: format!("{this}/logs"),
            cancel: (!row.state.is_terminal()).then(|| format!("{this}/cancel")),
            retry: matches!(row.state, State::Dead | State::Cancelled | State::Expired)
                .then(|| format!("{this}/retry")),
            this,
        },
    }
}

/// A state from the wire.
pub(super) fn stand(state: wire::State) -> State {
    match state {
        wire::State::Scheduled => State::Scheduled,
        wire::State::Queued => State::Queued,
        wire::State::Running => State::Running,
        wire::State::Succeeded => State::Succeeded,
        wire::State::Dead => State::Dead,
        wire::State::Cancelled => State::Cancelled,
        wire::State::Expired => State::Expired,
    }
}

/// A state on the wire.
pub(super) fn state(state: State) -> wire::State {
    match state {
        State::Scheduled => wire::State::Scheduled,
        State::Queued => wire::State::Queued,
        State::Running => wire::State::Running,
        State::Succeeded => wire::State::Succeeded,
        State::Dead => wire::State::Dead,
        State::Cancelled => wire::State::Cancelled,
        State::Expired => wire::State::Expired,
    }
}

/// Ids carry the time at which they were made: the same in the first answer, before the row was read, as ever after.
fn accepted_at(id: InvocationId) -> Option<DateTime<Utc>> {
    let (seconds, nanos) = id.0.get_timestamp()?.to_unix();
    DateTime::from_timestamp(i64::try_from(seconds).ok()?, nanos)
}

fn attempt(row: &AttemptRow) -> wire::Attempt {
    wire::Attempt {
        attempt: row.attempt,
        worker: row.worker_id.0,
        started_at: row.started_at,
        finished_at: Some(row.finished_at),
        termination: Some(termination(&row.termination)),
        receipt: row.fuel.map(|fuel| wire::Receipt {
            fuel,
            fuel_exact: row.fuel_exact.unwrap_or_default(),
            cpu_ns: row.cpu_ns.unwrap_or_default(),
            wall_ns: row.wall_ns.unwrap_or_default(),
            peak_memory_bytes: row.peak_memory_bytes.unwrap_or_default(),
            input_bytes: row.input_bytes.unwrap_or_default(),
            output_bytes: row.output_bytes.unwrap_or_default(),
            output_dropped_bytes: row.output_dropped_bytes.unwrap_or_default(),
            log_bytes: row.log_bytes.unwrap_or_default(),
            log_dropped_bytes: row.log_dropped_bytes.unwrap_or_default(),
            egress_bytes: row.egress_bytes.unwrap_or_default(),
            host_calls: row.host_calls.unwrap_or_default(),
        }),
        backtrace: row.backtrace.iter().flatten().map(frame).collect(),
    }
}

fn frame(frame: &Frame) -> wire::Frame {
    wire::Frame {
        function: frame.function.clone(),
        file: frame.file.clone(),
        line: frame.line,
        module_offset: frame.module_offset,
    }
}

fn termination(termination: &Termination) -> wire::Termination {
    match termination {
        Termination::Succeeded => wire::Termination::Succeeded,
        Termination::GuestError { retryable, message, retry_after_ms } => wire::Termination::GuestError {
            retryable: *retryable,
            message: message.clone(),
            retry_after_ms: *retry_after_ms,
        },
        Termination::ExitCode { code } => wire::Termination::ExitCode { code: *code },
        Termination::Trap { kind, message } => {
            wire::Termination::Trap { kind: trap(*kind).to_owned(), message: message.clone() }
        }
        Termination::OutOfFuel => wire::Termination::OutOfFuel,
        Termination::OutOfMemory => wire::Termination::OutOfMemory,
        Termination::StackOverflow => wire::Termination::StackOverflow,
        Termination::Deadline => wire::Termination::Deadline,
        Termination::OutputTooLarge => wire::Termination::OutputTooLarge,
        Termination::QuotaExceeded { quota } => wire::Termination::QuotaExceeded { quota: quota.clone() },
        Termination::Denied { capability } => wire::Termination::Denied { capability: capability.clone() },
        Termination::Cancelled => wire::Termination::Cancelled,
        Termination::LeaseLost => wire::Termination::LeaseLost,
        Termination::HostFault { message } => wire::Termination::HostFault { message: message.clone() },
    }
}

fn trap(kind: TrapKind) -> &'static str {
    match kind {
        TrapKind::Unreachable => "unreachable",
        TrapKind::MemoryOutOfBounds => "memory-out-of-bounds",
        TrapKind::TableOutOfBounds => "table-out-of-bounds",
        TrapKind::BadIndirectCall => "bad-indirect-call",
        TrapKind::Arithmetic => "arithmetic",
        TrapKind::BadHostCall => "bad-host-call",
        TrapKind::Other => "other",
    }
}

/// A result in the form that is easiest to read.
fn inline(output: &Output) -> wire::InlineResult {
    let mut result = wire::InlineResult {
        content_type: output.content_type.clone(),
        size_bytes: output.size_bytes,
        json: None,
        text: None,
        base64: None,
    };
    let Some(bytes) = &output.bytes else {
        return result;
    };
    let essence = output.content_type.split(';').next().unwrap_or_default();
    let essence = essence.trim().to_ascii_lowercase();
    if essence == "application/json" || essence.ends_with("+json") {
        result.json = serde_json::from_slice(bytes).ok();
    } else if essence.starts_with("text/") {
        result.text = String::from_utf8(bytes.clone()).ok();
    }
    if result.json.is_none() && result.text.is_none() {
        result.base64 = Some(BASE64_STANDARD.encode(bytes));
    }
    result
}

/// One record of a log.
pub(super) fn record(row: &Record) -> wire::LogRecord {
    wire::LogRecord {
        cursor: format!("{}.{}", row.place.attempt, row.place.index),
        attempt: row.place.attempt,
        at: row.at,
        at_us: row.record.at_us,
        level: match row.record.level {
            LogLevel::Trace => wire::Level::Trace,
            LogLevel::Debug => wire::Level::Debug,
            LogLevel::Info => wire::Level::Info,
            LogLevel::Warn => wire::Level::Warn,
            LogLevel::Error => wire::Level::Error,
        },
        target: row.record.target.clone(),
        message: row.record.message.clone(),
        fields: row.record.fields.iter().cloned().collect(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::domain::admission::Dependency;
    use crate::domain::ids::WorkerId;
    use crate::domain::retry::RetryPolicy;
    use crate::store::invocation::Kept;
    use crate::store::invocation::RunningAttempt;
    use crate::store::log::Place;
    use sandbar_host::limits::Limits;
    use sandbar_host::outcome::LogRecord;
    use uuid::Uuid;

    fn at(millis: i64) -> DateTime<Utc> {
        DateTime::from_timestamp_millis(1_760_000_000_000 + millis).unwrap()
    }

    /// Version 7, made at `at(0)`.
    fn id() -> InvocationId {
        InvocationId(Uuid::from_u128((1_760_000_000_000_u128 << 80) | (7 << 76) | (2 << 62) | 5))
    }

    fn row(state: State) -> Invocation {
        Invocation {
            summary: Summary {
                id: id(),
                task: "word-count".to_owned(),
                version: 3,
                state,
                reason: None,
                priority: -5,
                tags: [("team".to_owned(), "a".to_owned())].into(),
                created_at: at(99),
                run_at: None,
                expires_at: None,
                due_at: None,
                finished_at: None,
                retry_of: None,
            },
            cancelling: false,
            limits: Limits::default(),
            retry: RetryPolicy::default(),
            attempts: Vec::new(),
            running: None,
            waiting_on: Vec::new(),
            output: None,
            progress: None,
            kept: Kept::default(),
            lost: false,
        }
    }

    fn ended() -> AttemptRow {
        AttemptRow {
            attempt: 1,
            worker_id: WorkerId(Uuid::from_u128(9)),
            started_at: at(5),
            finished_at: at(8),
            termination: Termination::Trap {
                kind: TrapKind::MemoryOutOfBounds,
                message: "out of bounds memory access".to_owned(),
            },
            fuel: Some(1234),
            fuel_exact: Some(false),
            cpu_ns: Some(2_000_000),
            wall_ns: Some(3_000_000),
            peak_memory_bytes: Some(1 << 20),
            input_bytes: Some(10),
            output_bytes: Some(0),
            output_dropped_bytes: Some(0),
            log_bytes: Some(40),
            log_dropped_bytes: Some(0),
            egress_bytes: Some(0),
            host_calls: Some(2),
            backtrace: Some(vec![Frame {
                function: "guest::work".to_owned(),
                file: Some("src/lib.rs".to_owned()),
                line: Some(7),
                module_offset: Some(64),
            }]),
        }
    }

    fn json(invocation: &wire::Invocation) -> serde_json::Value {
        serde_json::to_value(invocation).unwrap()
    }

    #[test]
    fn shape_of_an_invocation_that_waits() {
        let mut row = row(State::Scheduled);
        row.summary.due_at = Some(at(60_000));
        row.summary.run_at = Some(at(60_000));
        insta::assert_json_snapshot!(json(&invocation(&row, true)));
    }

    #[test]
    fn shape_of_an_invocation_that_waits_for_another() {
        let mut row = row(State::Scheduled);
        row.waiting_on = vec![Dependency { id: id(), condition: Condition::Finished }];
        insta::assert_json_snapshot!(json(&invocation(&row, true)));
    }

    #[test]
    fn shape_of_an_invocation_that_runs_again_after_a_trap() {
        let mut row = row(State::Running);
        row.cancelling = true;
        row.attempts = vec![ended()];
        row.running =
            Some(RunningAttempt { attempt: 2, worker: WorkerId(Uuid::from_u128(10)), started_at: at(1_000) });
        insta::assert_json_snapshot!(json(&invocation(&row, true)));
    }

    #[test]
    fn shape_of_an_attempt_whose_worker_was_lost() {
        let lost = AttemptRow { termination: Termination::LeaseLost, fuel: None, backtrace: None, ..ended() };
        insta::assert_json_snapshot!(attempt(&lost));
    }

    #[test]
    fn every_termination_has_the_same_shape_as_the_hosts() {
        let text = || "x".to_owned();
        for host in [
            Termination::Succeeded,
            Termination::GuestError { retryable: true, message: text(), retry_after_ms: Some(5) },
            Termination::GuestError { retryable: false, message: text(), retry_after_ms: None },
            Termination::ExitCode { code: 3 },
            Termination::Trap { kind: TrapKind::BadIndirectCall, message: text() },
            Termination::OutOfFuel,
            Termination::OutOfMemory,
            Termination::StackOverflow,
            Termination::Deadline,
            Termination::OutputTooLarge,
            Termination::QuotaExceeded { quota: text() },
            Termination::Denied { capability: text() },
            Termination::Cancelled,
            Termination::LeaseLost,
            Termination::HostFault { message: text() },
        ] {
            assert_eq!(
                serde_json::to_value(termination(&host)).unwrap(),
                serde_json::to_value(&host).unwrap()
            );
        }
    }

    fn result(content_type: &str, bytes: &[u8]) -> serde_json::Value {
        let output = Output {
            content_type: content_type.to_owned(),
            size_bytes: i64::try_from(bytes.len()).unwrap(),
            bytes: Some(bytes.to_vec()),
        };
        serde_json::to_value(inline(&output)).unwrap()
    }

    #[test]
    fn a_result_comes_as_json_as_text_or_in_base64_and_json_keeps_its_digits() {
        let json = result("application/json; charset=utf-8", b"{\"n\": 1.10}");
        assert_eq!(json["json"]["n"], 1.1);
        assert_eq!(json["size_bytes"], 11);
        assert_eq!(result("application/json", b"null")["json"], serde_json::Value::Null);
        assert!(result("application/json", b"null").get("json").is_some());
        assert_eq!(result("application/json", b"{")["base64"], "ew==");
        assert_eq!(result("TEXT/plain", b"hi")["text"], "hi");
        assert_eq!(result("text/plain", b"\xff")["base64"], "/w==");
        assert_eq!(result("image/png", b"hi")["base64"], "aGk=");
        let large = Output { content_type: "text/plain".to_owned(), size_bytes: 70_000, bytes: None };
        insta::assert_json_snapshot!(inline(&large));
    }

    #[test]
    fn a_failure_without_output_shows_no_result_and_an_empty_success_does() {
        let empty =
            Some(Output { content_type: "text/plain".to_owned(), size_bytes: 0, bytes: Some(Vec::new()) });
        let mut row = row(State::Dead);
        row.output.clone_from(&empty);
        assert!(invocation(&row, true).result.is_none());
        row.summary.state = State::Succeeded;
        assert!(invocation(&row, true).result.is_some());
        assert!(invocation(&row, false).result.is_none());
    }

    #[test]
    fn the_time_of_acceptance_is_in_the_id() {
        assert_eq!(summary(&row(State::Queued).summary, false).created_at, at(0));
    }

    #[test]
    fn shape_of_a_log() {
        let plain = LogRecord {
            at_us: 12,
            level: LogLevel::Info,
            target: "guest".to_owned(),
            message: "low".to_owned(),
            fields: Vec::new(),
        };
        let rich = LogRecord {
            fields: vec![("left".to_owned(), "3".to_owned())],
            level: LogLevel::Warn,
            ..plain.clone()
        };
        let items = [(7, rich), (8, plain)].map(|(index, one)| {
            record(&Record { place: Place { attempt: 2, index }, at: at(12), record: one })
        });
        insta::assert_json_snapshot!(wire::LogPage { items: items.into(), next: Some("2.8".to_owned()) });
    }

    #[test]
    fn shape_of_progress() {
        let report = sandbar_host::cell::Progress { done: 3, total: u64::MAX, message: "three".to_owned() };
        insta::assert_json_snapshot!(progress(&ProgressRow { attempt: 2, report, at: at(5) }));
    }
}
