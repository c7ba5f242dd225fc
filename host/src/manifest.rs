//! What a module says about itself: the custom section `sandbar:task`, JSON written by the SDK.
//! Owns its format and bounds; grants in it are wishes, never rights.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::limits::{Limits, PartialLimits};

/// Name of the custom section.
pub const SECTION: &str = "sandbar:task";
/// Bytes of the section.
pub const MAX_BYTES: usize = 256 << 10;
/// Grants that one module may wish for.
pub const MAX_GRANTS: usize = 64;

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
    /// Capabilities the task wishes for.
    pub grants: Vec<Value>,
}

impl Manifest {
    /// Reads the content of the section.
    ///
    /// # Errors
    /// In words for the uploader: too large, not JSON of this shape, a limit out of range, too many
    /// grants, or a NUL character in a string.
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
        if manifest.grants.len() > MAX_GRANTS {
            return Err(format!(
                "the section `{SECTION}` wishes for {} grants; at most {MAX_GRANTS} are allowed",
                manifest.grants.len()
            ));
        }
        if manifest.has_nul() {
            return Err(format!("a string in the section `{SECTION}` contains a NUL character"));
        }
        Ok(manifest)
    }

    fn has_nul(&self) -> bool {
        [&self.name, &self.description, &self.sdk].into_iter().flatten().any(|text| text.contains('\0'))
            || [&self.input_schema, &self.output_schema, &self.retry]
                .into_iter()
                .flatten()
                .chain(&self.grants)
                .any(value_has_nul)
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
        let manifest =
            Manifest::parse(br#"{"name":"resize","limits":{"fuel":5},"grants":[{"http":["a"]}],"shiny":1}"#)
                .unwrap();
        assert_eq!(manifest.name.as_deref(), Some("resize"));
        assert_eq!(manifest.limits.fuel, Some(5));
        assert_eq!(manifest.grants.len(), 1);
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
