//! The collector behind the `tracing` macros: every event goes to the host as one record, with its own
//! fields and those of the spans around it. Owns the open spans; a task has few, so there is no pool.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};

/// Takes one record: level, target, message, fields.
pub(crate) type Emit = fn(log::Level, &str, &str, Vec<(String, String)>);

/// Name of the field that lists the spans around an event, outermost first.
const SPAN_FIELD: &str = "span";

/// Installs the collector for the process, unless there is one already.
pub(crate) fn install(level: log::LevelFilter, emit: Emit) {
    let spans = Spans { emit, level, next: AtomicU64::new(1), open: Mutex::default() };
    // The author's own collector, or an earlier call of the same component, stays.
    let _ = tracing::subscriber::set_global_default(spans);
}

struct Spans {
    emit: Emit,
    level: log::LevelFilter,
    next: AtomicU64,
    open: Mutex<HashMap<u64, Span>>,
}

struct Span {
    name: &'static str,
    fields: Vec<(String, String)>,
    parent: Option<Id>,
    /// Handles to it, and open spans within it.
    handles: usize,
}

thread_local! {
    /// The spans that this thread is in, innermost last.
    static ENTERED: RefCell<Vec<Id>> = const { RefCell::new(Vec::new()) };
}

fn current() -> Option<Id> {
    ENTERED.with_borrow(|entered| entered.last().cloned())
}

impl Spans {
    fn open(&self) -> MutexGuard<'_, HashMap<u64, Span>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Subscriber for Spans {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        level(metadata.level()) <= self.level
    }

    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.enabled(metadata) { Interest::always() } else { Interest::never() }
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        use tracing::level_filters::LevelFilter;
        Some(match self.level {
            log::LevelFilter::Off => LevelFilter::OFF,
            log::LevelFilter::Error => LevelFilter::ERROR,
            log::LevelFilter::Warn => LevelFilter::WARN,
            log::LevelFilter::Info => LevelFilter::INFO,
            log::LevelFilter::Debug => LevelFilter::DEBUG,
            log::LevelFilter::Trace => LevelFilter::TRACE,
        })
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut fields = Fields::default();
        span.record(&mut fields);
        let parent = if span.is_contextual() { current() } else { span.parent().cloned() };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut open = self.open();
        if let Some(parent) = parent.as_ref().and_then(|id| open.get_mut(&id.into_u64())) {
            parent.handles += 1;
        }
        let name = span.metadata().name();
        open.insert(id, Span { name, fields: fields.all(), parent, handles: 1 });
        Id::from_u64(id)
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        let mut fields = Fields::default();
        values.record(&mut fields);
        if let Some(span) = self.open().get_mut(&span.into_u64()) {
            for field in fields.all() {
                put(&mut span.fields, field);
            }
        }
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut found = Fields::default();
        event.record(&mut found);
        let parent = if event.is_contextual() { current() } else { event.parent().cloned() };
        let mut around = Vec::new();
        let mut fields = Vec::new();
        {
            let open = self.open();
            let mut next = parent;
            while let Some(span) = next.and_then(|id| open.get(&id.into_u64())) {
                around.push(span);
                next = span.parent.clone();
            }
            around.reverse();
            if !around.is_empty() {
                let names: Vec<&str> = around.iter().map(|span| span.name).collect();
                fields.push((SPAN_FIELD.to_owned(), names.join(":")));
            }
            for field in around.iter().flat_map(|span| &span.fields) {
                put(&mut fields, field.clone());
            }
        }
        for field in found.fields {
            put(&mut fields, field);
        }
        let metadata = event.metadata();
        (self.emit)(level(metadata.level()), metadata.target(), &found.message, fields);
    }

    fn enter(&self, span: &Id) {
        ENTERED.with_borrow_mut(|entered| entered.push(span.clone()));
    }

    fn exit(&self, span: &Id) {
        ENTERED.with_borrow_mut(|entered| {
            if let Some(at) = entered.iter().rposition(|id| id == span) {
                entered.remove(at);
            }
        });
    }

    fn clone_span(&self, span: &Id) -> Id {
        if let Some(span) = self.open().get_mut(&span.into_u64()) {
            span.handles += 1;
        }
        span.clone()
    }

    fn try_close(&self, span: Id) -> bool {
        let mut open = self.open();
        let mut closed = false;
        let mut next = Some(span);
        // The last handle of a span frees its own on the span around it.
        while let Some(id) = next.take() {
            let Some(span) = open.get_mut(&id.into_u64()) else { break };
            span.handles = span.handles.saturating_sub(1);
            if span.handles == 0 {
                next = open.remove(&id.into_u64()).and_then(|span| span.parent);
                closed = true;
            }
        }
        closed
    }
}

/// What is nearer to the event wins.
fn put(fields: &mut Vec<(String, String)>, field: (String, String)) {
    match fields.iter_mut().find(|(name, _)| *name == field.0) {
        Some(found) => found.1 = field.1,
        None => fields.push(field),
    }
}

fn level(level: &Level) -> log::Level {
    match *level {
        Level::ERROR => log::Level::Error,
        Level::WARN => log::Level::Warn,
        Level::INFO => log::Level::Info,
        Level::DEBUG => log::Level::Debug,
        Level::TRACE => log::Level::Trace,
    }
}

/// Values as text, the message apart.
#[derive(Default)]
struct Fields {
    message: String,
    fields: Vec<(String, String)>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: String) {
        if field.name() == "message" {
            self.message = value;
        } else {
            self.fields.push((field.name().to_owned(), value));
        }
    }

    /// For spans, where `message` is a name like any other.
    fn all(mut self) -> Vec<(String, String)> {
        if !self.message.is_empty() {
            self.fields.push(("message".to_owned(), self.message));
        }
        self.fields
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.to_owned());
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, value.to_string());
    }
}
