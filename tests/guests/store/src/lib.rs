//! Uses its key-value store, step by step, and says what came of each in place of failing.

use sandbar_guest::{Schema, kv, task};
use serde::Deserialize;

/// One step.
#[derive(Deserialize, Schema)]
struct Step {
    /// `get`, `set`, `delete`, `exists`, `keys`, `increment`, `append` (by compare and swap), `get-many`, `set-many`,
    /// `delete-many`, `sleep`, `until-denied`.
    what: String,
    /// The key, or the beginning of several.
    #[serde(default)]
    key: String,
    /// The value, or what is added.
    #[serde(default)]
    value: String,
    /// How large a value is made of `value`, how many keys, how often, how many milliseconds.
    #[serde(default)]
    count: usize,
}

/// Takes steps.
#[task(grants(kv))]
fn store(steps: Vec<Step>) -> Vec<String> {
    let store = match kv::open() {
        Ok(store) => store,
        Err(error) => return vec![said(&error)],
    };
    steps.iter().map(|step| take(&store, step).unwrap_or_else(|error| said(&error))).collect()
}

fn said(error: &kv::Error) -> String {
    match error {
        kv::Error::Denied => "denied".to_owned(),
        other => format!("error: {other}"),
    }
}

fn text(value: Option<Vec<u8>>) -> String {
    value.map_or_else(|| "none".to_owned(), |value| String::from_utf8_lossy(&value).into_owned())
}

fn take(store: &kv::Store, step: &Step) -> Result<String, kv::Error> {
    let keys = || (0..step.count).map(|n| format!("{}{n:05}", step.key)).collect::<Vec<_>>();
    Ok(match step.what.as_str() {
        "get" => text(store.get(&step.key)?),
        "set" => {
            store.set(&step.key, step.value.repeat(step.count.max(1)).as_bytes())?;
            "ok".to_owned()
        }
        "delete" => {
            store.delete(&step.key)?;
            "ok".to_owned()
        }
        "exists" => store.exists(&step.key)?.to_string(),
        "keys" => {
            let mut all = Vec::new();
            let mut after = None;
            loop {
                let (page, next) = store.keys(after.as_deref())?;
                all.extend(page);
                if next.is_none() {
                    break all.join(" ");
                }
                after = next;
            }
        }
        "increment" => {
            let mut sum = 0;
            for _ in 0..step.count.max(1) {
                sum = store.increment(&step.key, step.value.parse().unwrap_or(1))?;
            }
            sum.to_string()
        }
        "append" => {
            let mut last = None;
            for _ in 0..step.count.max(1) {
                last = store.update(&step.key, |old| {
                    Some([old.unwrap_or_default(), step.value.clone().into_bytes()].concat())
                })?;
            }
            last.map_or(0, |value| value.len()).to_string()
        }
        "get-many" => store.get_many(&keys())?.into_iter().map(text).collect::<Vec<_>>().join(" "),
        "set-many" => {
            let pairs: Vec<_> =
                keys().into_iter().map(|key| (key, step.value.clone().into_bytes())).collect();
            store.set_many(&pairs)?;
            "ok".to_owned()
        }
        "delete-many" => {
            store.delete_many(&keys())?;
            "ok".to_owned()
        }
        "sleep" => {
            std::thread::sleep(std::time::Duration::from_millis(step.count as u64));
            "ok".to_owned()
        }
        "until-denied" => loop {
            if let Err(error) = store.increment(&step.key, 1) {
                break said(&error);
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        },
        other => format!("unknown step {other}"),
    })
}
