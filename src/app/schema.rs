//! Checking inputs against the schema that a task brought along. The schema is a tenant's, so it is hostile until
//! shown otherwise: no remote references, patterns in the linear-time engine, the cost counted before it is paid
//! (`cost`), and all of it on threads of its own with a deep stack, where a nested schema can overflow nothing of the
//! server's.

mod cost;

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jsonschema::{PatternOptions, Validator};
use sandbar_host::ModuleHash;
use sandbar_host::manifest::Manifest;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use crate::app::{Error, FieldError, Result};

/// Threads that check. Checks are short.
const THREADS: usize = 2;
/// Their stack (reserved, touched only as far as used): 128 levels of input times the references of a chain.
const STACK_BYTES: usize = 512 << 20;
/// Checks that may wait; beyond it the server is overloaded.
const MAX_WAITING: usize = 1_024;
/// Longest check, waiting included.
const MAX_TIME: Duration = Duration::from_secs(10);
/// Compiled schemas kept.
const MAX_COMPILED: usize = 64;
/// Compiled size of one pattern, and of its transition cache.
const MAX_PATTERN_BYTES: usize = 512 << 10;
/// Mismatches told at once.
const MAX_MISMATCHES: usize = 16;
/// Inputs up to this size are quoted in the words of a mismatch.
const MAX_QUOTED_BYTES: usize = 2 << 10;
/// Longest text of one mismatch, in characters.
const MAX_DETAIL_CHARS: usize = 400;

/// Checks inputs on threads of its own, which end with it.
#[derive(Debug)]
pub struct Checker {
    jobs: mpsc::Sender<Job>,
}

enum Job {
    /// Does the schema compile?
    Compile { schema: Value, answer: oneshot::Sender<std::result::Result<(), String>> },
    /// Does the input match? The input travels there and back instead of being copied.
    Check {
        hash: ModuleHash,
        manifest: Arc<Manifest>,
        input: Vec<u8>,
        answer: oneshot::Sender<(Vec<u8>, std::result::Result<(), Mismatch>)>,
    },
}

/// Why an input does not match: what is wrong where.
#[derive(Debug, PartialEq, Eq)]
enum Mismatch {
    /// Pointers into the input.
    Fields(Vec<FieldError>),
    /// The schema itself is at fault although it was accepted once.
    Schema(String),
}

impl Checker {
    /// Start the threads.
    ///
    /// # Errors
    /// The operating system refuses threads.
    pub fn start() -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel(MAX_WAITING);
        let queue = Arc::new(Mutex::new(queue));
        let compiled = Arc::new(Mutex::new(Compiled::default()));
        for _ in 0..THREADS {
            let (queue, compiled) = (Arc::clone(&queue), Arc::clone(&compiled));
            std::thread::Builder::new()
                .name("schema".to_owned())
                .stack_size(STACK_BYTES)
                .spawn(move || work(&queue, &compiled))?;
        }
        Ok(Self { jobs })
    }

    /// Whether a schema can be used. The inner error is for the author.
    ///
    /// # Errors
    /// Too many checks wait.
    pub async fn compile(&self, schema: Value) -> Result<std::result::Result<(), String>> {
        let (answer, answered) = oneshot::channel();
        self.ask(Job::Compile { schema, answer }, answered).await
    }

    /// Check `input` (nothing counts as `null`) against the input schema of `manifest`, which belongs to the module
    /// `hash`. Gives the input back. Pointers in errors begin with `field`, the input's place in the request body.
    ///
    /// # Errors
    /// [`Error::InputMismatch`]; or too many checks wait.
    pub async fn check(
        &self,
        hash: ModuleHash,
        manifest: &Arc<Manifest>,
        input: Vec<u8>,
        field: &str,
    ) -> Result<Vec<u8>> {
        let (answer, answered) = oneshot::channel();
        let job = Job::Check { hash, manifest: Arc::clone(manifest), input, answer };
        match self.ask(job, answered).await? {
            (input, Ok(())) => Ok(input),
            (_, Err(Mismatch::Fields(mut errors))) => {
                for error in &mut errors {
                    error.pointer.insert_str(0, field);
                }
                Err(Error::InputMismatch(errors))
            }
            (_, Err(Mismatch::Schema(why))) => Err(Error::Internal(anyhow::anyhow!(
                "the schema of module {hash} is not usable any more: {why}"
            ))),
        }
    }

    async fn ask<T>(&self, job: Job, answered: oneshot::Receiver<T>) -> Result<T> {
        self.jobs.try_send(job).map_err(|_| Error::Overloaded("too many inputs wait to be checked"))?;
        tokio::time::timeout(MAX_TIME, answered)
            .await
            .map_err(|_| Error::Overloaded("checking the input takes too long"))?
            .map_err(|_| Error::Internal(anyhow::anyhow!("checking an input panicked")))
    }
}

fn work(queue: &Mutex<mpsc::Receiver<Job>>, compiled: &Mutex<Compiled>) {
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        let Some(job) = job else { return };
        // A panic drops the answer's sender, which the caller notices; the thread goes on.
        let done = catch_unwind(AssertUnwindSafe(|| match job {
            Job::Compile { schema, answer } => {
                let _ = answer.send(compile(&schema).map(drop));
            }
            Job::Check { hash, manifest, input, answer } => {
                let verdict = match compiled_for(compiled, hash, &manifest) {
                    Ok(Some((schema, validator))) => {
                        check(schema, &validator, &input).map_err(Mismatch::Fields)
                    }
                    Ok(None) => Ok(()),
                    Err(why) => Err(Mismatch::Schema(why)),
                };
                let _ = answer.send((input, verdict));
            }
        }));
        if let Err(panic) = done {
            let panic: &(dyn Any + Send) = panic.as_ref();
            let what = panic.downcast_ref::<String>().map_or("?", String::as_str);
            tracing::error!(panic = what, "checking a schema panicked");
        }
    }
}

/// Compiled schemas by module, with the time of last use.
#[derive(Default)]
struct Compiled {
    by_module: HashMap<ModuleHash, (Arc<Validator>, u64)>,
    clock: u64,
}

fn compiled_for<'a>(
    compiled: &Mutex<Compiled>,
    hash: ModuleHash,
    manifest: &'a Manifest,
) -> std::result::Result<Option<(&'a Value, Arc<Validator>)>, String> {
    let Some(schema) = &manifest.input_schema else {
        return Ok(None);
    };
    {
        let mut compiled = compiled.lock().unwrap_or_else(PoisonError::into_inner);
        compiled.clock += 1;
        let now = compiled.clock;
        if let Some((validator, used)) = compiled.by_module.get_mut(&hash) {
            *used = now;
            return Ok(Some((schema, Arc::clone(validator))));
        }
    }
    let validator = Arc::new(compile(schema)?);
    let mut compiled = compiled.lock().unwrap_or_else(PoisonError::into_inner);
    if compiled.by_module.len() >= MAX_COMPILED {
        let oldest = compiled.by_module.iter().min_by_key(|(_, (_, used))| *used);
        if let Some(oldest) = oldest.map(|(hash, _)| *hash) {
            compiled.by_module.remove(&oldest);
        }
    }
    let now = compiled.clock;
    compiled.by_module.insert(hash, (Arc::clone(&validator), now));
    Ok(Some((schema, validator)))
}

fn compile(schema: &Value) -> std::result::Result<Validator, String> {
    cost::check(schema)?;
    jsonschema::options()
        .offline()
        .with_pattern_options(
            PatternOptions::regex().size_limit(MAX_PATTERN_BYTES).dfa_size_limit(MAX_PATTERN_BYTES),
        )
        .build(schema)
        .map_err(|error| cut(&error.masked().to_string()))
}

fn check(schema: &Value, validator: &Validator, input: &[u8]) -> std::result::Result<(), Vec<FieldError>> {
    let json: &[u8] = if input.is_empty() { b"null" } else { input };
    let value: Value = match serde_json::from_slice(json) {
        Ok(value) => value,
        Err(error) => {
            return Err(vec![FieldError::new(
                "",
                format!("the input is not JSON that can be checked: {error}"),
            )]);
        }
    };
    if cost::affordable(schema, &value).is_err() {
        return Err(vec![FieldError::new(
            "",
            "the schema has so many ways to look at this input that it cannot be checked in reasonable time",
        )]);
    }
    if validator.is_valid(&value) {
        return Ok(());
    }
    let quote = json.len() <= MAX_QUOTED_BYTES;
    let errors: Vec<FieldError> = validator
        .iter_errors(&value)
        .take(MAX_MISMATCHES)
        .map(|error| {
            let text = if quote { error.to_string() } else { error.masked().to_string() };
            FieldError::new(error.instance_path().as_str(), cut(&text))
        })
        .collect();
    Err(errors)
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(MAX_DETAIL_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use serde_json::json;

    fn manifest(schema: &Value) -> Arc<Manifest> {
        Arc::new(serde_json::from_value(json!({ "input_schema": schema })).unwrap())
    }

    async fn run(checker: &Checker, n: u8, schema: &Value, input: &str) -> Result<Vec<u8>> {
        let hash = ModuleHash::from_bytes([n; 32]);
        let input = input.as_bytes().to_vec();
        checker.check(hash, &manifest(schema), input, "/input").await
    }

    #[tokio::test]
    async fn a_mismatch_is_told_by_its_pointer_and_a_match_gives_the_input_back() {
        let checker = Checker::start().unwrap();
        let schema =
            json!({"type": "object", "properties": {"n": {"type": "array", "items": {"type": "integer"}}}});
        let good = r#"{"n": [1, 2]}"#;
        assert_eq!(run(&checker, 1, &schema, good).await.unwrap(), good.as_bytes());
        let Err(Error::InputMismatch(errors)) = run(&checker, 1, &schema, r#"{"n": [1, "x"]}"#).await else {
            panic!("accepted");
        };
        assert_eq!(errors[0].pointer, "/input/n/1");
        let Err(Error::InputMismatch(errors)) = run(&checker, 1, &schema, "").await else {
            panic!("accepted");
        };
        assert_eq!(errors[0].pointer, "/input");
    }

    #[tokio::test]
    async fn schemas_that_reach_out_or_cost_too_much_are_refused() {
        let checker = Checker::start().unwrap();
        let references: Vec<Value> = (0..300).map(|_| json!({"$ref": "#/$defs/a"})).collect();
        let patterns: Vec<Value> = (0..100).map(|_| json!({"pattern": "a"})).collect();
        for bad in [
            json!({"$ref": "https://example.com/schema.json"}),
            json!({"$ref": "file:///etc/passwd"}),
            json!({"$defs": {"a": {}}, "allOf": references}),
            json!({"allOf": patterns}),
            json!({"pattern": "(a)\\1"}),
            json!({"pattern": "(((a{1000}){1000}){1000})"}),
            json!({"type": "no such type"}),
        ] {
            assert!(checker.compile(bad.clone()).await.unwrap().is_err(), "{bad}");
        }
        assert!(checker.compile(json!(true)).await.unwrap().is_ok());
    }

    #[tokio::test]
    async fn recursion_that_never_descends_or_doubles_every_level_ends_quickly() {
        let checker = Checker::start().unwrap();
        let began = std::time::Instant::now();
        // References in a circle.
        let circle =
            json!({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"});
        let _ = run(&checker, 1, &circle, "1").await;
        let around = json!({"anyOf": [{"$ref": "#"}, {"$ref": "#"}], "type": "object"});
        let _ = run(&checker, 2, &around, "1").await;
        // Two ways into every level, and the wrong leaf at the end: 2^100 without memory.
        let doubling = json!({
            "$ref": "#/$defs/n",
            "$defs": {"n": {"anyOf": [
                {"properties": {"x": {"$ref": "#/$defs/n"}}, "type": "object"},
                {"properties": {"x": {"$ref": "#/$defs/n"}}, "type": "object", "minProperties": 1}]}}
        });
        let deep = format!("{}1{}", "{\"x\":".repeat(100), "}".repeat(100));
        assert!(run(&checker, 3, &doubling, &deep).await.is_err());
        // A ladder: every definition uses the next one twice at the same place.
        let mut defs = serde_json::Map::new();
        for i in 0..40 {
            let next = format!("#/$defs/d{}", i + 1);
            defs.insert(format!("d{i}"), json!({"anyOf": [{"$ref": next}, {"$ref": next}]}));
        }
        defs.insert("d40".to_owned(), json!({"type": "string"}));
        let ladder = json!({"$defs": defs, "$ref": "#/$defs/d0"});
        assert!(run(&checker, 4, &ladder, "1").await.is_err());
        assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_deep_chain_of_references_on_a_deep_input_does_not_overflow_the_stack() {
        let checker = Checker::start().unwrap();
        let mut defs = serde_json::Map::new();
        for i in 0..250 {
            defs.insert(format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", i + 1)}));
        }
        defs.insert("d250".to_owned(), json!({"properties": {"x": {"$ref": "#/$defs/d0"}}}));
        let schema = json!({"$defs": defs, "$ref": "#/$defs/d0"});
        let deep = format!("{}{{}}{}", "{\"x\":".repeat(120), "}".repeat(120));
        assert!(run(&checker, 1, &schema, &deep).await.is_ok());
        let wrong = deep.replace("{}", "{\"y\": 1}");
        let strict = json!({"$ref": "#/$defs/d0", "$defs": schema["$defs"], "not": {}});
        assert!(run(&checker, 2, &strict, &wrong).await.is_err());
    }
}
