//! Lines of exported history: one JSON object per invocation. What is sealed in Postgres is exported as it is there, so
//! that an erased key takes the exports along; opened again, a line is what it would have been if nothing had been sealed.

use anyhow::{Context as _, anyhow, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sandbar_host::log;
use sandbar_host::outcome::{Frame, Termination};
use serde_json::{Value, json};

use crate::app::sealed::keys::Keys;
use crate::app::sealed::{Part, Sealer};
use crate::domain::ids::{InvocationId, TenantId};
use crate::store::invocation::Spec;
use crate::store::queue::Withheld;
use crate::store::retention::History;

/// One invocation.
#[must_use]
pub fn line(history: &History) -> Value {
    let encode = |bytes: &Vec<u8>| BASE64_STANDARD.encode(bytes);
    let Some(id) = &history.sealed else {
        let logs: Vec<Value> = history.logs.iter().flat_map(|(_, _, lines)| records(lines)).collect();
        return json!({
            "invocation": history.invocation,
            "input_base64": encode(&history.input),
            "attempts": history.attempts,
            "result": history.result,
            "output_base64": history.output.as_ref().map(encode),
            "logs": logs,
        });
    };
    let piece = |(attempt, chunk, sealed): &(i16, i32, Vec<u8>)| json!({"attempt": attempt, "chunk": chunk, "sealed_base64": encode(sealed)});
    json!({
        "sealed": id,
        "invocation": history.invocation,
        "input_sealed_base64": encode(&history.input),
        "attempts": history.attempts,
        "result": history.result,
        "output_sealed_base64": history.output.as_ref().map(encode),
        "logs_sealed": history.logs.iter().map(piece).collect::<Vec<_>>(),
    })
}

fn records(lines: &[u8]) -> Vec<Value> {
    log::lines(lines)
        .map(|line| {
            serde_json::from_slice(line).unwrap_or_else(|_| json!({"broken": String::from_utf8_lossy(line)}))
        })
        .collect()
}

/// A line with its payloads opened. One that is not sealed stays as it is.
///
/// # Errors
/// It is not what [`line()`] writes, its key is gone or not here, or somebody changed it.
pub async fn open(keys: &Keys, line: &str) -> anyhow::Result<Value> {
    let mut value: Value = serde_json::from_str(line).context("it is not JSON")?;
    let Some(id) = value["sealed"].as_str().map(str::to_owned) else { return Ok(value) };
    let id_of = |name: &str| -> anyhow::Result<uuid::Uuid> {
        let text = value["invocation"][name].as_str();
        text.and_then(|text| text.parse().ok()).with_context(|| format!("it has no {name}"))
    };
    let (tenant, invocation) = (TenantId(id_of("tenant_id")?), InvocationId(id_of("invocation_id")?));
    if value["invocation"]["erased_at"].is_string() {
        return Ok(value);
    }
    let sealer = keys.sealer_of(tenant, invocation, &id).await?.map_err(|why| match why {
        Withheld::NoKey => anyhow!("no master key that is configured opens the data key of tenant {tenant}"),
        Withheld::Erased | Withheld::Broken => anyhow!("the data key {id} of tenant {tenant} was erased"),
    })?;
    open_with(&sealer, &mut value).with_context(|| format!("invocation {invocation}"))?;
    Ok(value)
}

fn open_with(sealer: &Sealer, value: &mut Value) -> anyhow::Result<()> {
    let bytes = |value: &Value| -> anyhow::Result<Option<Vec<u8>>> {
        value.as_str().map(|text| BASE64_STANDARD.decode(text)).transpose().context("it is not base64")
    };
    let mut spec: Spec = serde_json::from_value(value["invocation"]["spec"].clone())?;
    let mut input = bytes(&value["input_sealed_base64"])?.unwrap_or_default();
    sealer.open_input(&mut spec, &mut input)?;
    spec.sealed = None;
    let output = match bytes(&value["output_sealed_base64"])? {
        Some(sealed) => Some(sealer.open(0, Part::Output, &sealed)?),
        None => None,
    };
    let mut logs = Vec::new();
    for piece in value["logs_sealed"].as_array().map(Vec::as_slice).unwrap_or_default() {
        let number = |name: &str| piece[name].as_i64().with_context(|| format!("a log without {name}"));
        let (attempt, chunk) = (i16::try_from(number("attempt")?)?, i32::try_from(number("chunk")?)?);
        // 0 is the whole log; from 1 on they are pieces, one more than the number of their first record.
        let part = if chunk == 0 { Part::Log } else { Part::Piece(chunk - 1) };
        let sealed = bytes(&piece["sealed_base64"])?.unwrap_or_default();
        logs.extend(records(&sealer.open(attempt, part, &sealed)?));
    }
    for attempt in value["attempts"].as_array_mut().map(Vec::as_mut_slice).unwrap_or_default() {
        let number = i16::try_from(attempt["attempt"].as_i64().context("an attempt without a number")?)?;
        let mut termination: Termination = serde_json::from_value(attempt["termination"].clone())?;
        sealer.open_termination(number, &mut termination)?;
        attempt["termination"] = serde_json::to_value(termination)?;
        if !attempt["backtrace"].is_null() {
            let mut frames: Vec<Frame> = serde_json::from_value(attempt["backtrace"].clone())?;
            sealer.open_backtrace(number, &mut frames)?;
            attempt["backtrace"] = serde_json::to_value(frames)?;
        }
    }
    value["invocation"]["spec"] = serde_json::to_value(spec)?;
    let object = value.as_object_mut().context("it is not an object")?;
    for gone in ["sealed", "input_sealed_base64", "output_sealed_base64", "logs_sealed"] {
        ensure!(object.remove(gone).is_some(), "it has no {gone}");
    }
    object.insert("input_base64".to_owned(), BASE64_STANDARD.encode(input).into());
    object.insert("output_base64".to_owned(), output.map(|bytes| BASE64_STANDARD.encode(bytes)).into());
    object.insert("logs".to_owned(), logs.into());
    Ok(())
}
