//! What a module says about itself: the custom section `sandbar:task`, JSON written by the SDK.
//! Owns its format and bounds; grants in it are wishes, never rights.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::egress::grant::HttpGrant;
use crate::limits::{Limits, PartialLimits};

/// Name of the custom section.
pub const SECTION: &str = "sandbar:task";
/// Bytes of the section.
pub const MAX_BYTES: usize = 256 << 10;
/// Hosts, and secrets, that one module may wish for: a list that a person can still judge.
pub const MAX_NAMED_GRANTS: usize = 32;
/// Bytes of a task's name.
const MAX_TASK: usize = 63;
/// Bytes of a secret's name.
const MAX_SECRET: usize = 64;
/// Bytes of scratch that one module may wish for; what it gets is the grant's.
pub const MAX_SCRATCH_BYTES: u64 = 64 << 30;

/// The self-description of a module. Keys this version does not know are ignored, so that modules
/// of newer SDKs can be uploaded.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Manifest {
    /// Name the author gave the task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it does, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Which SDK wrote this, with its version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sdk: Option<String>,
    /// JSON Schema of the input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_schema: Option<Value>,
    /// JSON Schema of the output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_schema: Option<Value>,
    /// Default limits; checked against the host's ranges.
    pub limits: PartialLimits,
    /// Default retry policy, as the control plane reads it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry: Option<Value>,
    /// Capabilities the task wishes for. None takes effect until an admin of the tenant grants it.
    #[serde(skip_serializing_if = "Grants::is_empty")]
    pub grants: Grants,
}

/// Capabilities that a module wishes for. Kinds this version does not know are ignored like other
/// unknown keys: what nobody can grant is denied when it is used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Grants {
    /// Hosts to reach by HTTP: `[http://|https://][*.]name[:port]`; at most [`MAX_NAMED_GRANTS`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub http: Vec<String>,
    /// The task's key-value store.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub kv: bool,
    /// Names of tasks to start; at most [`MAX_NAMED_GRANTS`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub invoke: Vec<String>,
    /// Names of secrets; at most [`MAX_NAMED_GRANTS`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// Bytes of a scratch directory; 1 to [`MAX_SCRATCH_BYTES`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scratch_bytes: Option<u64>,
}

impl Grants {
    /// Whether nothing is wished for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Refuses what no admin could sensibly be asked to grant.
    fn check(&self) -> Result<(), String> {
        for (what, names) in [("http", &self.http), ("invoke", &self.invoke), ("secrets", &self.secrets)] {
            if names.len() > MAX_NAMED_GRANTS {
                let found = names.len();
                return Err(format!(
                    "grants.{what} has {found} entries; at most {MAX_NAMED_GRANTS} are allowed"
                ));
            }
        }
        for host in &self.http {
            HttpGrant::parse(host).map_err(|error| {
                format!(
                    "grants.http holds {host:?}: {error}; expected a host such as \"api.example.com\", \
                     \"*.example.com\" or \"http://example.com:8080\", without a path"
                )
            })?;
        }
        if let Some(name) = self.invoke.iter().find(|name| !is_task(name)) {
            return Err(format!(
                "grants.invoke holds {name:?}; expected 1 to {MAX_TASK} of a-z, 0-9, - and _, beginning with a letter or a digit"
            ));
        }
        if let Some(name) = self.secrets.iter().find(|name| !is_secret(name)) {
            return Err(format!(
                "grants.secrets holds {name:?}; expected 1 to {MAX_SECRET} letters, digits and _, no digit first"
            ));
        }
        match self.scratch_bytes {
            None | Some(1..=MAX_SCRATCH_BYTES) => Ok(()),
            Some(bytes) => {
                Err(format!("grants.scratch_bytes is {bytes}; it must be from 1 to {MAX_SCRATCH_BYTES}"))
            }
        }
    }
}

fn is_task(name: &str) -> bool {
    (1..=MAX_TASK).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
        && !name.starts_with(['-', '_'])
}

fn is_secret(name: &str) -> bool {
    (1..=MAX_SECRET).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !name.starts_with(|c: char| c.is_ascii_digit())
}

impl Manifest {
    /// Reads the content of the section.
    ///
    /// # Errors
    /// In words for the uploader: too large, not JSON of this shape, a limit or a grant out of range, or
    /// a NUL character in a string.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > MAX_BYTES {
            return Err(format!(
                "the section `{SECTION}` has {} bytes; at most {MAX_BYTES} are allowed",
                bytes.len()
            ));
        }
        let manifest: Self = serde_json::from_slice(bytes)
            .map_err(|err| format!("the section `{SECTION}` cannot be read: {err}"))?;
        Limits::default()
            .with(&manifest.limits)
            .check()
            .map_err(|err| format!("the section `{SECTION}` asks for too much: {err}"))?;
        manifest
            .grants
            .check()
            .map_err(|err| format!("the section `{SECTION}` wishes for what cannot be granted: {err}"))?;
        if manifest.has_nul() {
            return Err(format!("a string in the section `{SECTION}` contains a NUL character"));
        }
        Ok(manifest)
    }

    fn has_nul(&self) -> bool {
        [&self.name, &self.description, &self.sdk].into_iter().flatten().any(|text| text.contains('\0'))
            || [&self.input_schema, &self.output_schema, &self.retry].into_iter().flatten().any(value_has_nul)
    }
}

/// Bounded by the parser's own depth limit, so the recursion is too.
fn value_has_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(items) => items.iter().any(value_has_nul),
        Value::Object(map) => map.iter().any(|(key, value)| key.contains('\0') || value_has_nul(value)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn unknown_keys_are_ignored_and_known_ones_are_read() {
        let manifest = Manifest::parse(
            br#"{"name":"resize","limits":{"fuel":5},"grants":{"http":["a"],"gpu":2},"shiny":1}"#,
        )
        .unwrap();
        assert_eq!(manifest.name.as_deref(), Some("resize"));
        assert_eq!(manifest.limits.fuel, Some(5));
        assert_eq!(manifest.grants, Grants { http: vec!["a".to_owned()], ..Grants::default() });
    }

    #[test]
    fn grants_of_every_kind_are_read_and_shown_as_they_came() {
        let json = r#"{"http":["api.example.com","http://*.a-b.example:8080"],"kv":true,"invoke":["fetch-page"],"secrets":["API_TOKEN"],"scratch_bytes":1048576}"#;
        let manifest = Manifest::parse(format!(r#"{{"grants":{json}}}"#).as_bytes()).unwrap();
        assert_eq!(serde_json::to_string(&manifest.grants).unwrap(), json);
        assert!(!serde_json::to_string(&Manifest::default()).unwrap().contains("grants"));
    }

    #[test]
    fn grants_that_nobody_could_judge_are_refused_by_name() {
        for (grants, part) in [
            (r#"{"http":["https://a/b"]}"#, "grants.http"),
            (r#"{"http":["Example.com"]}"#, "grants.http"),
            (r#"{"http":["*"]}"#, "grants.http"),
            (r#"{"http":["a.*.b"]}"#, "grants.http"),
            (r#"{"http":["a:0"]}"#, "grants.http"),
            (r#"{"http":["a:65536"]}"#, "grants.http"),
            (r#"{"http":["a\u0000"]}"#, "grants.http"),
            (r#"{"http":[""]}"#, "grants.http"),
            (r#"{"secrets":["1A"]}"#, "grants.secrets"),
            (r#"{"invoke":["A"]}"#, "grants.invoke"),
            (r#"{"secrets":["A\u0000"]}"#, "grants.secrets"),
            (r#"{"scratch_bytes":0}"#, "grants.scratch_bytes"),
            (r#"{"scratch_bytes":99999999999}"#, "grants.scratch_bytes"),
            (r#"{"kv":"yes"}"#, "cannot be read"),
            (r#"["http:a"]"#, "cannot be read"),
        ] {
            let error = Manifest::parse(format!(r#"{{"grants":{grants}}}"#).as_bytes()).unwrap_err();
            assert!(error.contains(part), "{grants}: {error}");
        }
        let many: Vec<String> = (0..=MAX_NAMED_GRANTS).map(|n| format!("h{n}")).collect();
        let error = Manifest::parse(serde_json::json!({"grants": {"http": many}}).to_string().as_bytes())
            .unwrap_err();
        assert!(error.contains("33 entries"), "{error}");
    }

    #[test]
    fn limits_beyond_the_hosts_are_refused_by_name() {
        let error = Manifest::parse(br#"{"limits":{"memory_bytes":1}}"#).unwrap_err();
        assert!(error.contains("memory_bytes"), "{error}");
    }

    #[test]
    fn nul_in_a_nested_string_is_refused() {
        let error = Manifest::parse(br#"{"input_schema":{"a":["b\u0000"]}}"#).unwrap_err();
        assert!(error.contains("NUL"), "{error}");
    }

    #[test]
    fn a_section_that_is_too_large_is_refused() {
        assert!(Manifest::parse(&vec![b' '; MAX_BYTES + 1]).is_err());
    }
}
