//! Starts other tasks, as often as it is told, and says what came of it in place of failing.

use sandbar_guest::{Context, Schema, TaskError, invoke, task};
use serde::{Deserialize, Serialize};

/// What to start.
#[derive(Clone, Deserialize, Serialize, Schema)]
struct Input {
    /// The task; absent: nothing is started.
    start: Option<String>,
    /// How often.
    #[serde(default)]
    times: usize,
    /// Begins the keys; absent: none.
    key: Option<String>,
    /// What they get in place of this same input.
    with: Option<u64>,
    /// Fails its first attempt after it has started them.
    #[serde(default)]
    fail_first: bool,
}

/// Starts tasks.
#[task(grants(invoke = ["echo"]))]
fn starter(ctx: &Context, input: Input) -> Result<Vec<String>, TaskError> {
    let Some(task) = &input.start else { return Ok(Vec::new()) };
    let mut said = Vec::new();
    for n in 0..input.times {
        let key = input.key.as_ref().map(|key| format!("{key}{n}"));
        let started = match input.with {
            Some(number) => invoke::start(task, &number, key.as_deref()),
            None => invoke::start(task, &input, key.as_deref()),
        };
        said.push(match started {
            Ok(id) => id,
            Err(invoke::Error::Denied) => "denied".to_owned(),
            Err(error) => error.to_string(),
        });
    }
    if input.fail_first && ctx.attempt() == 1 {
        return Err(TaskError::retryable("the first attempt fails").retry_after(std::time::Duration::ZERO));
    }
    Ok(said)
}
