//! Fields of a JSON merge patch (RFC 7396), where `null` is not the same as absent. The only place that tells them
//! apart.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One field of a merge patch. In a struct it needs `#[serde(default, skip_serializing_if = "Field::is_absent")]` and,
/// for the OpenAPI document, `#[schema(value_type = Option<T>)]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Field<T> {
    /// Not there: nothing changes.
    #[default]
    Absent,
    /// `null`: back to the default.
    Null,
    /// This.
    Value(T),
}

impl<T> Field<T> {
    /// Whether nothing changes.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }

    /// `None` when absent; inside, `None` for null.
    pub fn into_option(self) -> Option<Option<T>> {
        match self {
            Self::Absent => None,
            Self::Null => Some(None),
            Self::Value(value) => Some(Some(value)),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Field<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Called only for a field that is there.
        Ok(Option::<T>::deserialize(deserializer)?.map_or(Self::Null, Self::Value))
    }
}

impl<T: Serialize> Serialize for Field<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Absent | Self::Null => serializer.serialize_none(),
            Self::Value(value) => value.serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Patch {
        #[serde(default, skip_serializing_if = "Field::is_absent")]
        a: Field<u8>,
    }

    #[test]
    fn null_absent_and_a_value_are_three_things_both_ways() {
        for (json, a) in
            [("{}", Field::Absent), (r#"{"a":null}"#, Field::Null), (r#"{"a":7}"#, Field::Value(7))]
        {
            let patch = Patch { a };
            assert_eq!(serde_json::from_str::<Patch>(json).unwrap(), patch);
            assert_eq!(serde_json::to_string(&patch).unwrap(), json);
        }
        assert!(serde_json::from_str::<Patch>(r#"{"a":"x"}"#).is_err());
    }
}
