//! From a request to a durable invocation, and waiting for its end. Everything is resolved and checked here, once:
//! version, input, limits, retry; what is queued runs as it was accepted, whatever changes later.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use sandbar_host::ModuleKind;
use sandbar_host::limits::PartialLimits;
use sandbar_host::run::Determinism;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::time::{Instant, timeout_at};

use crate::app::catalog::Target;
use crate::app::files::Files;
use crate::app::policy::{self, PartialRetry};
use crate::app::signals::Waiter;
use crate::app::{App, Error, FieldError, Result};
use crate::domain::admission::{Admission, MAX_CONCURRENCY, MAX_DEPENDENCIES, UniquePolicy};
use crate::domain::ids::{InvocationId, KeyId, TenantId};
use crate::domain::invocation::State;
use crate::domain::names::{IdempotencyKey, Tags, TaskName};
use crate::domain::retry::RetryPolicy;
use crate::store::invocation::{Family, InputKind, Invocation, Kept, Spec, Summary};
use crate::store::queue::{Enqueued, NewInvocation};
use crate::store::task::Kind;

/// Outputs up to this size come with the invocation when somebody waited for it.
pub const INLINE_BYTES: i32 = 64 << 10;
/// How far ahead an invocation may be asked for, and its expiry.
pub(super) const MAX_AHEAD: TimeDelta = TimeDelta::days(366);
/// Arguments of a command.
const MAX_ARGS: usize = 1_024;
/// Variables of a command.
const MAX_ENV: usize = 256;

/// A request to run a task.
#[derive(Debug, Default)]
pub struct Request {
    /// Which version; `None`: the current one.
    pub version: Option<i32>,
    /// What to run it on.
    pub payload: Payload,
    /// −100 to 100.
    pub priority: i16,
    /// Not before this time.
    pub run_at: Option<DateTime<Utc>>,
    /// Not before so many milliseconds from now. Not together with `run_at`.
    pub delay_ms: Option<u64>,
    /// Not to be started after.
    pub expires_at: Option<DateTime<Utc>>,
    /// Labels.
    pub tags: Tags,
    /// Limits in place of the task's.
    pub limits: PartialLimits,
    /// Retries in place of the task's.
    pub retry: PartialRetry,
    /// Files, and room for files.
    pub files: Files,
    /// Fixed clocks and random values.
    pub determinism: Option<Determinism>,
    /// The client's key for this request, and the fingerprint of the request.
    pub idempotency: Option<(IdempotencyKey, [u8; 32])>,
    /// Its place among others.
    pub admission: Admission,
    /// Where it belongs, if an attempt started it.
    pub family: Option<Family>,
    /// The key that brings it, whose limits it counts against.
    pub by: Option<KeyId>,
}

/// Input in the words of the request: which of them are allowed depends on the module.
#[derive(Debug, Default)]
pub struct Payload {
    /// Input of a task.
    pub input: Option<Part>,
    /// Stdin of a command.
    pub stdin: Option<Part>,
    /// Arguments of a command.
    pub args: Option<Vec<String>>,
    /// Environment of a command.
    pub env: Option<BTreeMap<String, String>>,
}

/// Bytes, and the field they came in.
#[derive(Debug)]
pub struct Part {
    /// Pointer to the field.
    pub pointer: &'static str,
    /// What it says.
    pub bytes: Vec<u8>,
}

/// An accepted invocation.
#[derive(Debug)]
pub struct Invoked {
    /// As it stands, with a small output if it ended while the caller waited.
    pub invocation: Invocation,
    /// The same request was accepted before; this is what it made.
    pub replayed: bool,
    /// Nothing was queued: this one holds the unique key.
    pub existing: bool,
}

impl App {
    /// Accept an invocation; durable on return. With `wait`, return when it has ended, or after that time.
    ///
    /// # Errors
    /// No such task or version; the request does not fit it; overloaded; Postgres does not answer (then it is unknown
    /// whether the invocation was accepted: repeat with the same idempotency key).
    pub async fn invoke(
        &self,
        tenant: TenantId,
        task: &TaskName,
        request: Request,
        wait: Option<Duration>,
    ) -> Result<Invoked> {
        let by = request.by;
        let target = self.target(tenant, task, request.version).await?;
        let ready = self.seal(self.prepare(tenant, &target, request).await?).await?;
        let mut accepted = as_accepted(task, ready.row());
        // Registered before the row exists: an end cannot be missed.
        let waiter = wait.map(|_| self.inner.signals.wait_for(ready.row().id));
        let (id, replayed, existing) = match self.enqueue_within_quota(ready, by).await? {
            Enqueued::Accepted(id) => {
                accepted.waiting_on.clear();
                (id, false, false)
            }
            Enqueued::Waiting(id) => {
                accepted.summary.state = State::Scheduled;
                accepted.summary.due_at = None;
                (id, false, false)
            }
            Enqueued::Replayed(id) => (id, true, false),
            Enqueued::Existing(id) => (id, false, true),
            Enqueued::Conflict => return Err(Error::IdempotencyKeyReused),
            Enqueued::Duplicate(holder) => return Err(Error::UniqueKeyTaken { holder }),
            Enqueued::UnknownDependency(id) => return Err(Error::DependencyNotFound(id)),
        };
        let deadline = wait.map(|wait| Instant::now() + wait);
        let invocation = match (deadline, waiter, replayed || existing) {
            (Some(deadline), Some(waiter), false) => {
                let ended = self.ended(tenant, id, &waiter, deadline).await;
                // It is accepted, whatever happens to the waiting.
                ended.unwrap_or_else(|error| {
                    tracing::warn!(%id, %error, "cannot wait for the end");
                    accepted
                })
            }
            (_, _, false) => accepted,
            (deadline, _, true) => {
                let waiter = self.inner.signals.wait_for(id);
                let now = self.invocation(tenant, id, INLINE_BYTES).await?;
                match deadline {
                    Some(deadline) if !now.summary.state.is_terminal() => {
                        let ended = self.ended(tenant, id, &waiter, deadline).await;
                        ended.unwrap_or(now)
                    }
                    _ => now,
                }
            }
        };
        Ok(Invoked { invocation, replayed, existing })
    }

    /// The invocation when it has ended, or as it is at `deadline` or when the server drains.
    async fn ended(
        &self,
        tenant: TenantId,
        id: InvocationId,
        waiter: &Waiter,
        deadline: Instant,
    ) -> Result<Invocation> {
        loop {
            let nudged = tokio::select! {
                nudged = timeout_at(deadline, waiter.nudge()) => nudged.ok(),
                () = self.inner.draining.cancelled() => None,
            };
            let mut connection = self.tenant(tenant).await?;
            // Without a signal it has most likely not ended: ask the cheap question first.
            if nudged == Some(false) && !connection.invocation_finished(id).await? {
                continue;
            }
            let now = connection.invocation_get(id, INLINE_BYTES).await?;
            let now = self.open_payloads(tenant, now.ok_or(Error::InvocationNotFound(id))?).await?;
            if nudged.is_none() || now.summary.state.is_terminal() {
                return Ok(now);
            }
        }
    }

    pub(super) async fn prepare(
        &self,
        tenant: TenantId,
        target: &Target,
        request: Request,
    ) -> Result<NewInvocation> {
        let settings = &self.inner.settings;
        let now = Utc::now();
        let times = times(&request, now)?;
        if !(-100..=100).contains(&request.priority) {
            return Err(invalid("/priority", "must be from -100 to 100"));
        }
        check_admission(&request.admission, times.run_at)?;
        let one = |error: FieldError| Error::InvalidFields(vec![error]);
        let mut limits = policy::limits(settings.limits, &target.limits)
            .and_then(|limits| policy::limits(limits, &target.task_limits))
            .and_then(|limits| policy::limits(limits, &request.limits))
            .map_err(one)?;
        let named = [&target.limits, &target.task_limits, &request.limits];
        let asked = named.iter().any(|limits| limits.memory_bytes.is_some());
        self.quotas_of(tenant).await?.hold(target.task, &mut limits, asked)?;
        let retry = policy::retry(&RetryPolicy::default(), &target.retry)
            .and_then(|retry| policy::retry(&retry, &target.task_retry))
            .and_then(|retry| policy::retry(&retry, &request.retry))
            .map_err(one)?;
        let (kind, part) = fit(target.kind, request.payload, settings.max_input_bytes)?;
        let mut input = part.bytes;
        if (input.len() + request.files.input_bytes()) as u64 > settings.max_input_bytes {
            return Err(Error::InputTooLarge { max: settings.max_input_bytes });
        }
        if let (InputKind::Task, Some(manifest)) = (&kind, &target.manifest)
            && manifest.input_schema.as_ref().is_some_and(restricts)
        {
            input = self.inner.schemas.check(target.hash, manifest, input, part.pointer).await?;
        }
        if target.kind == Kind::Http && request.determinism.is_some() {
            return Err(invalid("/determinism", "not for a request: no guest runs"));
        }
        let scratch = request.files.stow(target.kind, &mut input)?;
        Ok(NewInvocation {
            tenant,
            id: InvocationId::generate(),
            task: target.task,
            version: target.number,
            priority: request.priority,
            input,
            spec: Spec {
                input: kind,
                limits,
                retry,
                retry_of: None,
                scratch,
                determinism: request.determinism,
                family: request.family,
                sealed: None,
            },
            tags: request.tags.into(),
            run_at: times.run_at,
            expires_at: times.expires_at,
            idempotency: request.idempotency.map(|(key, fingerprint)| (key.as_str().to_owned(), fingerprint)),
            admission: request.admission,
        })
    }
}

/// False for the schema that allows everything.
pub(super) fn restricts(schema: &Value) -> bool {
    match schema {
        Value::Bool(allowed) => !allowed,
        Value::Object(keywords) => !keywords.is_empty(),
        _ => true,
    }
}

/// What distinguishes one request from another under the same idempotency key: the task, and the body whatever the
/// order of its keys and its white space. A body too deep to be looked into counts as its bytes.
#[must_use]
pub fn fingerprint(task: &TaskName, body: &[u8]) -> [u8; 32] {
    let mut canonical = Vec::with_capacity(body.len());
    match serde_json::from_slice(body) {
        Ok(value) => write_canonical(&mut canonical, &value),
        Err(_) => canonical.extend_from_slice(body),
    }
    Sha256::new().chain_update(task.as_str()).chain_update([0]).chain_update(canonical).finalize().into()
}

fn write_canonical(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Object(map) => {
            let mut keys: Vec<&String> = map.keys().collect();
            keys.sort_unstable();
            out.push(b'{');
            for key in keys {
                write_canonical(out, &Value::String(key.clone()));
                out.push(b':');
                write_canonical(out, &map[key]);
                out.push(b',');
            }
            out.push(b'}');
        }
        Value::Array(items) => {
            out.push(b'[');
            for item in items {
                write_canonical(out, item);
                out.push(b',');
            }
            out.push(b']');
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            out.extend_from_slice(value.to_string().as_bytes());
        }
    }
}

pub(super) fn invalid(pointer: &str, detail: impl Into<String>) -> Error {
    Error::InvalidFields(vec![FieldError::new(pointer, detail)])
}

/// When an invocation may run, and when it is too late.
#[derive(Debug)]
struct Times {
    run_at: Option<DateTime<Utc>>,
    expires_at: Option<DateTime<Utc>>,
}

fn times(request: &Request, now: DateTime<Utc>) -> Result<Times> {
    let run_at = match (request.run_at, request.delay_ms) {
        (Some(_), Some(_)) => {
            return Err(invalid("/delay_ms", "give `run_at` or `delay_ms`, not both"));
        }
        (at, None) => at,
        (None, Some(ms)) => {
            let delay = i64::try_from(ms).ok().and_then(TimeDelta::try_milliseconds);
            match delay {
                Some(delay) if delay <= MAX_AHEAD => Some(now + delay),
                _ => return Err(invalid("/delay_ms", "must be at most 366 days")),
            }
        }
    };
    if run_at.is_some_and(|at| at > now + MAX_AHEAD) {
        return Err(invalid("/run_at", "must be at most 366 days ahead"));
    }
    if let Some(expires_at) = request.expires_at {
        if expires_at <= now {
            return Err(invalid("/expires_at", "must be in the future"));
        }
        if run_at.is_some_and(|at| expires_at <= at) {
            return Err(invalid("/expires_at", "must be after the invocation may run"));
        }
        if expires_at > now + MAX_AHEAD + MAX_AHEAD {
            return Err(invalid("/expires_at", "must be at most two years ahead"));
        }
    }
    Ok(Times { run_at, expires_at: request.expires_at })
}

fn check_admission(admission: &Admission, run_at: Option<DateTime<Utc>>) -> Result<()> {
    if admission.unique.as_ref().is_some_and(|u| u.policy == UniquePolicy::Debounce) && run_at.is_none() {
        return Err(invalid("/unique_policy", "debounce needs `delay_ms` or `run_at`: until then it waits"));
    }
    if admission.concurrency.as_ref().is_some_and(|c| !(1..=MAX_CONCURRENCY).contains(&c.limit)) {
        return Err(invalid("/concurrency_limit", format!("must be from 1 to {MAX_CONCURRENCY}")));
    }
    if admission.depends_on.len() > MAX_DEPENDENCIES {
        return Err(invalid("/depends_on", format!("may be at most {MAX_DEPENDENCIES}")));
    }
    let mut ids: Vec<_> = admission.depends_on.iter().map(|d| d.id).collect();
    ids.sort_unstable();
    if ids.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(invalid("/depends_on", "may name an invocation once"));
    }
    Ok(())
}

/// The payload in the form that a module of this kind takes.
fn fit(version: Kind, payload: Payload, max_bytes: u64) -> Result<(InputKind, Part)> {
    let Payload { input, stdin, args, env } = payload;
    let mut unfit = Vec::new();
    let mut refuse = |pointer: &str, what: &str| {
        unfit.push(FieldError::new(pointer, format!("not for a {what}")));
    };
    let (kind, part) = match version {
        Kind::Module(ModuleKind::Task) | Kind::Http => {
            let (kind, what) = match version {
                Kind::Http => (InputKind::Http, "request"),
                Kind::Module(_) => (InputKind::Task, "task"),
            };
            if let Some(part) = &stdin {
                refuse(part.pointer, what);
            }
            if args.is_some() {
                refuse("/args", what);
            }
            if env.is_some() {
                refuse("/env", what);
            }
            (kind, input.unwrap_or(Part { pointer: "/input", bytes: Vec::new() }))
        }
        Kind::Module(ModuleKind::CommandP1 | ModuleKind::CommandP2) => {
            if let Some(part) = &input {
                refuse(part.pointer, "command");
            }
            let args = args.unwrap_or_default();
            let env = env.unwrap_or_default();
            check_command(&args, &env)?;
            (InputKind::Command { args, env }, stdin.unwrap_or(Part { pointer: "/stdin", bytes: Vec::new() }))
        }
    };
    if !unfit.is_empty() {
        return Err(Error::WrongInputKind { kind: version, errors: unfit });
    }
    let words = match &kind {
        InputKind::Task | InputKind::Http => 0,
        InputKind::Command { args, env } => {
            args.iter().map(String::len).sum::<usize>()
                + env.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>()
        }
    };
    if (part.bytes.len() + words) as u64 > max_bytes {
        return Err(Error::InputTooLarge { max: max_bytes });
    }
    Ok((kind, part))
}

fn check_command(args: &[String], env: &BTreeMap<String, String>) -> Result<()> {
    if args.len() > MAX_ARGS {
        return Err(invalid("/args", format!("may be at most {MAX_ARGS}")));
    }
    if env.len() > MAX_ENV {
        return Err(invalid("/env", format!("may be at most {MAX_ENV}")));
    }
    // C strings carry them: nothing after a NUL would arrive. (Nor can jsonb hold one.)
    for (index, arg) in args.iter().enumerate() {
        if arg.contains('\0') {
            return Err(invalid(&format!("/args/{index}"), "may not contain a NUL character"));
        }
    }
    for (key, value) in env {
        if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
            return Err(invalid(
                "/env",
                "names may not be empty or contain `=`; names and values may not contain a NUL character",
            ));
        }
    }
    Ok(())
}

/// The invocation as it is when its row is durable, without asking for it.
pub(super) fn as_accepted(task: &TaskName, row: &NewInvocation) -> Invocation {
    let now = Utc::now();
    let later = row.run_at.filter(|at| *at > now);
    Invocation {
        summary: Summary {
            id: row.id,
            task: task.as_str().to_owned(),
            version: row.version,
            state: if later.is_some() { State::Scheduled } else { State::Queued },
            reason: None,
            priority: row.priority,
            tags: row.tags.clone(),
            created_at: now,
            run_at: row.run_at,
            expires_at: row.expires_at,
            due_at: later,
            finished_at: None,
            retry_of: row.spec.retry_of,
        },
        cancelling: false,
        limits: row.spec.limits,
        retry: row.spec.retry.clone(),
        attempts: Vec::new(),
        running: None,
        waiting_on: row.admission.depends_on.clone(),
        output: None,
        progress: None,
        kept: Kept { sealed: row.spec.sealed.clone(), erased_at: None },
        lost: false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn pointer<T: std::fmt::Debug>(result: Result<T>) -> String {
        match result {
            Err(Error::InvalidFields(errors) | Error::WrongInputKind { errors, .. }) => {
                errors[0].pointer.clone()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_order_of_keys_and_white_space_do_not_change_a_fingerprint_but_values_and_the_task_do() {
        let task = TaskName::try_from("a".to_owned()).unwrap();
        let other = TaskName::try_from("b".to_owned()).unwrap();
        let one = fingerprint(&task, br#"{"a": 1, "b": {"c": [1, 2], "d": null}}"#);
        assert_eq!(one, fingerprint(&task, br#"{"b":{"d":null,"c":[1,2]},"a":1}"#));
        assert_ne!(one, fingerprint(&other, br#"{"a": 1, "b": {"c": [1, 2], "d": null}}"#));
        for different in [
            r#"{"a": 1, "b": {"c": [2, 1], "d": null}}"#,
            r#"{"a": "1", "b": {"c": [1, 2], "d": null}}"#,
            r#"{"a": 1, "b": {"c": [1, 2]}, "d": null}"#,
        ] {
            assert_ne!(one, fingerprint(&task, different.as_bytes()));
        }
        let quoted = br#"{"a": "x\",\"b\":\"y"}"#;
        assert_ne!(fingerprint(&task, quoted), fingerprint(&task, br#"{"a": "x", "b": "y"}"#));
        let deep = |inside: &str| format!("{}{inside}{}", "[".repeat(200), "]".repeat(200));
        assert_ne!(fingerprint(&task, deep("1").as_bytes()), fingerprint(&task, deep("2").as_bytes()));
    }

    #[test]
    fn run_at_excludes_delay_and_times_out_of_range_are_refused() {
        let now = Utc::now();
        let day = TimeDelta::days(1);
        let times = |request: Request| times(&request, now);
        let both = Request { run_at: Some(now), delay_ms: Some(1), ..Request::default() };
        assert_eq!(pointer(times(both)), "/delay_ms");
        let far = |ms| Request { delay_ms: Some(ms), ..Request::default() };
        assert_eq!(pointer(times(far(u64::MAX))), "/delay_ms");
        assert_eq!(pointer(times(far(367 * 86_400_000))), "/delay_ms");
        assert_eq!(times(far(5)).unwrap().run_at, Some(now + TimeDelta::milliseconds(5)));
        let expired =
            |expires_at, run_at| Request { expires_at: Some(expires_at), run_at, ..Request::default() };
        assert_eq!(pointer(times(expired(now, None))), "/expires_at");
        assert_eq!(pointer(times(expired(now + day, Some(now + day)))), "/expires_at");
        assert!(times(expired(now + day, Some(now - day))).is_ok());
    }

    #[test]
    fn a_task_takes_input_and_a_command_takes_stdin_and_words() {
        let part = |pointer| Some(Part { pointer, bytes: b"x".to_vec() });
        let for_command =
            Payload { stdin: part("/stdin_base64"), args: Some(Vec::new()), ..Payload::default() };
        assert_eq!(pointer(fit(Kind::Module(ModuleKind::Task), for_command, 10)), "/stdin_base64");
        let for_task = Payload { input: part("/input"), ..Payload::default() };
        assert_eq!(pointer(fit(Kind::Module(ModuleKind::CommandP2), for_task, 10)), "/input");
        assert!(fit(Kind::Module(ModuleKind::Task), Payload::default(), 0).is_ok());
        assert!(fit(Kind::Module(ModuleKind::CommandP1), Payload::default(), 0).is_ok());
        let for_command = Payload { args: Some(Vec::new()), ..Payload::default() };
        assert_eq!(pointer(fit(Kind::Http, for_command, 10)), "/args");
        assert_eq!(fit(Kind::Http, Payload::default(), 0).unwrap().0, InputKind::Http);
    }

    #[test]
    fn words_that_no_program_could_receive_are_refused_and_words_count_as_input() {
        let command = |args: &[&str], env: &[(&str, &str)], max| {
            let own = |s: &&str| (*s).to_owned();
            let payload = Payload {
                args: Some(args.iter().map(own).collect()),
                env: Some(env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()),
                ..Payload::default()
            };
            fit(Kind::Module(ModuleKind::CommandP1), payload, max)
        };
        assert_eq!(pointer(command(&["a", "b\0"], &[], 99)), "/args/1");
        for bad in [("", "v"), ("a=b", "v"), ("a", "\0")] {
            assert_eq!(pointer(command(&[], &[bad], 99)), "/env");
        }
        assert!(command(&["ab"], &[("c", "d")], 4).is_ok());
        assert!(matches!(command(&["ab"], &[("c", "d")], 3), Err(Error::InputTooLarge { max: 3 })));
        assert_eq!(pointer(command(&vec!["x"; 1025], &[], 9_999)), "/args");
    }
}
