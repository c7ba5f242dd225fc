//! The audit log: every change and every denied attempt. Requests are observed at one place (`api::access`); whatever
//! changes something says with [`changed`] what was and what is. Owns what is kept out of it (secrets, what is large) and
//! how it is written: a change is written before it is answered; denials are counted together, so that many cost little.
//!
//! Submissions are not audited one by one: each is in `invocations` with its time, and the log would be as large as the
//! queue. Denied submissions are.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::stream::{self, Stream};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::app::task::page;
use crate::app::{App, Result};
use crate::domain::ids::TenantId;
use crate::store::ApiStore;
use crate::store::audit::{AuditFilter, Entry};
use crate::store::tenant::Actor;

/// Entries that wait to be written. Beyond it denials are only counted, and changes wait.
const BACKLOG: usize = 4_096;
/// Entries of one statement.
const PER_STATEMENT: usize = 500;
/// Denials are collected for so long before they are written.
const COLLECT: Duration = Duration::from_secs(1);
/// Different denials that are collected at once; beyond it they are only counted.
const MAX_COLLECTED: usize = 2_000;
/// An answer waits at most so long for its entry to be written.
const MAX_WAIT: Duration = Duration::from_secs(5);
/// Tries of a statement.
const TRIES: u32 = 3;
/// Bytes of what was or what is; of more only the size is kept.
const MAX_VALUE: usize = 16 << 10;
/// Entries of one page of an export.
const EXPORT_PAGE: i64 = 500;
/// Words in names of fields whose values are never written.
const SECRETS: [&str; 7] = ["secret", "password", "token", "hash", "private", "credential", "value"];

/// What a request said of its change.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Said {
    /// What was.
    pub before: Option<Value>,
    /// What is.
    pub after: Option<Value>,
    /// Who did it, when the request alone does not say: a login.
    pub by: Option<(TenantId, Actor, String)>,
}

tokio::task_local! {
    static SAID: Arc<Mutex<Said>>;
}

/// Do something and hear what it changed.
pub async fn observed<T>(work: impl Future<Output = T>) -> (T, Said) {
    let said = Arc::new(Mutex::new(Said::default()));
    let done = SAID.scope(Arc::clone(&said), work).await;
    let said = std::mem::take(&mut *said.lock().unwrap_or_else(PoisonError::into_inner));
    (done, said)
}

/// Say what was and what is; `null`: nothing. Without anybody who observes, nothing happens.
pub fn changed(before: Value, after: Value) {
    let tidy = |value: Value| (!value.is_null()).then(|| masked(value));
    let (before, after) = (tidy(before), tidy(after));
    say(|said| (said.before, said.after) = (before, after));
}

/// Say who does it.
pub fn by(tenant: TenantId, actor: Actor, name: &str) {
    say(|said| said.by = Some((tenant, actor, name.to_owned())));
}

fn say(say: impl FnOnce(&mut Said)) {
    let _ = SAID.try_with(|slot| say(&mut slot.lock().unwrap_or_else(PoisonError::into_inner)));
}

/// Without secrets, and not large.
fn masked(mut value: Value) -> Value {
    fn mask(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                for (name, field) in fields.iter_mut() {
                    let name = name.to_lowercase();
                    if SECRETS.iter().any(|word| name.contains(word)) && !field.is_null() {
                        *field = json!("***");
                    } else {
                        mask(field);
                    }
                }
            }
            Value::Array(items) => items.iter_mut().for_each(mask),
            _ => {}
        }
    }
    mask(&mut value);
    let size = value.to_string().len();
    if size > MAX_VALUE { json!({ "too_large_bytes": size }) } else { value }
}

#[derive(Debug)]
enum Note {
    Change(Box<Entry>, oneshot::Sender<()>),
    Denial(Box<Entry>),
    /// Write what was collected, and say so.
    Flush(oneshot::Sender<()>),
}

/// The way to the log.
#[derive(Debug)]
pub struct Audit {
    notes: mpsc::Sender<Note>,
}

impl Audit {
    /// Start writing. Ends when the last sender is gone, with everything written.
    pub(super) fn start(store: &ApiStore) -> Self {
        let (notes, inbox) = mpsc::channel(BACKLOG);
        tokio::spawn(write_all(store.clone(), inbox));
        Self { notes }
    }
}

/// What makes two denials equal.
fn sameness(e: &Entry) -> (TenantId, Option<Uuid>, Option<String>, String, Option<String>) {
    (e.tenant_id, e.actor_id, e.address.clone(), e.operation.clone(), e.code.clone())
}

async fn write_all(store: ApiStore, mut inbox: mpsc::Receiver<Note>) {
    let mut denials: HashMap<_, Entry> = HashMap::new();
    let mut dropped = 0u64;
    let mut tick = tokio::time::interval(COLLECT);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let mut notes = Vec::new();
        let open = tokio::select! {
            n = inbox.recv_many(&mut notes, PER_STATEMENT) => n > 0,
            _ = tick.tick() => {
                if !denials.is_empty() {
                    let rows: Vec<Entry> = denials.drain().map(|(_, entry)| entry).collect();
                    write(&store, &rows).await;
                }
                if dropped > 0 {
                    tracing::warn!(dropped, "denied attempts that are not in the audit log: there were too many");
                    dropped = 0;
                }
                continue;
            }
        };
        let (mut rows, mut waiting) = (Vec::new(), Vec::new());
        let mut flush = !open;
        for note in notes {
            match note {
                Note::Change(entry, done) => {
                    rows.push(*entry);
                    waiting.push(done);
                }
                Note::Flush(done) => {
                    flush = true;
                    waiting.push(done);
                }
                Note::Denial(entry) => {
                    let full = denials.len() >= MAX_COLLECTED;
                    match denials.get_mut(&sameness(&entry)) {
                        Some(known) => known.times = known.times.saturating_add(1),
                        None if full => dropped += 1,
                        None => drop(denials.insert(sameness(&entry), *entry)),
                    }
                }
            }
        }
        if flush {
            rows.extend(denials.drain().map(|(_, entry)| entry));
        }
        if !rows.is_empty() {
            write(&store, &rows).await;
        }
        for done in waiting {
            let _ = done.send(());
        }
        if !open {
            return;
        }
    }
}

/// What cannot be written is in the process's log at least.
async fn write(store: &ApiStore, entries: &[Entry]) {
    for some in entries.chunks(PER_STATEMENT) {
        let mut tries = TRIES;
        while let Err(error) = store.audit_write(some).await {
            tries -= 1;
            if tries == 0 {
                for entry in some {
                    let entry = serde_json::to_string(entry).unwrap_or_default();
                    tracing::error!(%error, entry, "cannot write to the audit log");
                }
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

impl App {
    /// Write down a change. Returns when it is written, or could not be for five seconds.
    pub async fn audit_change(&self, entry: Entry) {
        let (done, written) = oneshot::channel();
        let sent = async {
            let note = Note::Change(Box::new(entry), done);
            if self.inner.audit.notes.send(note).await.is_ok() {
                let _ = written.await;
            }
        };
        if tokio::time::timeout(MAX_WAIT, sent).await.is_err() {
            tracing::warn!("an answer did not wait any longer for its entry in the audit log");
        }
    }

    /// Write what was collected, before Postgres cannot be reached any more.
    pub(super) async fn audit_flush(&self) {
        let (done, written) = oneshot::channel();
        let flushed = async {
            if self.inner.audit.notes.send(Note::Flush(done)).await.is_ok() {
                let _ = written.await;
            }
        };
        if tokio::time::timeout(MAX_WAIT, flushed).await.is_err() {
            tracing::warn!("the last denied attempts may not be in the audit log: Postgres did not answer");
        }
    }

    /// Write down a denied attempt, soon.
    pub fn audit_denial(&self, entry: Entry) {
        if self.inner.audit.notes.try_send(Note::Denial(Box::new(entry))).is_err() {
            tracing::warn!("a denied attempt is not in the audit log: too many wait");
        }
    }

    /// Entries, newest first, and whether there are more.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn audit(
        &self,
        tenant: TenantId,
        filter: &AuditFilter,
        limit: u16,
    ) -> Result<(Vec<Entry>, bool)> {
        let rows = self.tenant(tenant).await?.audit_list(filter, i64::from(limit) + 1).await?;
        Ok(page(rows, limit))
    }

    /// All entries that pass the filter, newest first, page by page. No connection is held while the client reads.
    pub fn audit_export(
        &self,
        tenant: TenantId,
        filter: AuditFilter,
    ) -> impl Stream<Item = Result<Vec<Entry>>> + Send + 'static {
        let app = self.clone();
        stream::try_unfold(Some(filter), move |next| {
            let app = app.clone();
            async move {
                let Some(mut filter) = next else { return Ok(None) };
                let rows = app.tenant(tenant).await?.audit_list(&filter, EXPORT_PAGE).await?;
                let Some(last) = rows.last() else { return Ok(None) };
                filter.after = Some(last.audit_id);
                let more = i64::try_from(rows.len()).unwrap_or(i64::MAX) >= EXPORT_PAGE;
                Ok(Some((rows, more.then_some(filter))))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[tokio::test]
    async fn what_is_said_is_heard_without_secrets_and_not_when_large() {
        let (answer, said) = observed(async {
            changed(
                json!({"name": "a", "Password": "p", "list": [{"api_secret": 1}], "token": null}),
                json!({"text": "x".repeat(MAX_VALUE)}),
            );
            7
        })
        .await;
        assert_eq!(answer, 7);
        assert_eq!(
            said.before,
            Some(json!({"name": "a", "Password": "***", "list": [{"api_secret": "***"}], "token": null}))
        );
        assert!(said.after.unwrap()["too_large_bytes"].as_u64().unwrap() > 16_000);
        changed(json!(1), json!(2)); // nobody observes
        let (_, silent) = observed(async {}).await;
        assert_eq!(silent, Said::default());
    }
}
