//! Reads what people have set on it, sees secrets, and logs by the standard interface; says what came of it.

use sandbar_guest::__private::capabilities::wasi::logging::logging;
use sandbar_guest::{Schema, config, secrets, task};
use serde::Deserialize;

/// One step.
#[derive(Deserialize, Schema)]
struct Step {
    /// `get`, `all`, `reveal`, `log`, `sleep`.
    what: String,
    /// Of the text or the secret, or the context of the record.
    #[serde(default)]
    name: String,
    /// What is logged.
    #[serde(default)]
    text: String,
    /// How often, or how many milliseconds.
    #[serde(default)]
    count: usize,
}

/// Takes steps.
#[task(grants(secrets = ["SHOWN"]))]
fn settings(steps: Vec<Step>) -> Vec<String> {
    steps.iter().map(take).collect()
}

fn take(step: &Step) -> String {
    match step.what.as_str() {
        "get" => match config::get(&step.name) {
            Ok(text) => text.unwrap_or_else(|| "none".to_owned()),
            Err(error) => error.to_string(),
        },
        "all" => match config::all() {
            Ok(pairs) => {
                pairs.iter().map(|(key, text)| format!("{key}={text}")).collect::<Vec<_>>().join(" ")
            }
            Err(error) => error.to_string(),
        },
        // Its length: the value has no business in a result.
        "reveal" => match secrets::reveal(&step.name) {
            Ok(value) => format!("{} bytes", value.len()),
            Err(secrets::Error::Denied) => "denied".to_owned(),
            Err(secrets::Error::NotFound) => "not found".to_owned(),
            Err(error) => error.to_string(),
        },
        "log" => {
            for _ in 0..step.count.max(1) {
                logging::log(logging::Level::Critical, &step.name, &step.text);
                logging::log(logging::Level::Info, &step.name, &step.text);
            }
            "ok".to_owned()
        }
        "sleep" => {
            std::thread::sleep(std::time::Duration::from_millis(step.count as u64));
            "ok".to_owned()
        }
        other => format!("unknown step {other}"),
    }
}
