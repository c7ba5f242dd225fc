//! JSON Schema of the types that tasks take and give, known at compile time. Owns the trait and its
//! implementations for the standard library; the derive macro is in `sandbar-guest-macros`.

mod node;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

pub use node::{Field, Node};
pub(crate) use node::{schema, string, text};

/// A type whose JSON Schema is known at compile time.
///
/// Derive it beside serde's traits; the derive reads the same `#[serde(…)]` attributes, and refuses
/// those it cannot express, at the attribute. Doc comments become descriptions.
///
/// One schema serves both directions, so it accepts whatever either direction can produce: a field
/// is required only if serde needs it for reading *and* always writes it. Serde stays the judge: an
/// input that passes the schema but not serde fails as a fatal error.
///
/// ```
/// use sandbar_guest::Schema;
/// use serde::{Deserialize, Serialize};
///
/// /// A picture to make smaller.
/// #[derive(Deserialize, Serialize, Schema)]
/// #[serde(rename_all = "camelCase", deny_unknown_fields)]
/// struct Resize {
///     /// Where the picture is.
///     source_url: String,
///     max_width: Option<u32>,
///     #[serde(default)]
///     keep_metadata: bool,
/// }
///
/// assert_eq!(
///     sandbar_guest::schema_of::<Resize>(),
///     serde_json::json!({
///         "description": "A picture to make smaller.",
///         "type": "object",
///         "properties": {
///             "sourceUrl": {"description": "Where the picture is.", "type": "string"},
///             "maxWidth": {"type": ["integer", "null"], "minimum": 0, "maximum": 4294967295u32},
///             "keepMetadata": {"type": "boolean"},
///         },
///         "required": ["sourceUrl"],
///         "additionalProperties": false,
///     })
/// );
/// ```
///
/// Where a field's JSON is not that of its type (`#[serde(with = "…")]`), or its type has no schema
/// or contains itself, `#[schema(as = Type)]` on the field, or on the whole type, names a type whose
/// schema is used:
///
/// ```
/// # use sandbar_guest::Schema;
/// #[derive(Schema)]
/// struct Tree {
///     name: String,
///     #[schema(as = Vec<serde_json::Value>)]
///     children: Vec<Tree>,
/// }
/// ```
///
/// By hand, for a type that serialises its own way:
///
/// ```
/// use sandbar_guest::{Node, Schema};
///
/// struct Date(u32);
///
/// impl Schema for Date {
///     const NODE: &'static Node = &Node::Raw { json: r#"{"type":"string","format":"date"}"# };
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no JSON Schema",
    label = "no JSON Schema is known for this type",
    note = "put `#[derive(sandbar_guest::Schema)]` on `{Self}`, or `#[schema(as = Type)]` on the field that holds it"
)]
pub trait Schema {
    /// The schema.
    const NODE: &'static Node;

    /// Whether a field of this type may be missing from its object, as serde allows for `Option`.
    const OPTIONAL: bool = false;
}

/// The schema of a type as a JSON value, for tests.
///
/// ```
/// let schema = sandbar_guest::schema_of::<Option<bool>>();
/// assert_eq!(schema, serde_json::json!({"type": ["boolean", "null"]}));
/// ```
///
/// # Panics
/// If a [`Node::Raw`] in it holds text that is not JSON.
#[must_use]
#[allow(clippy::expect_used)] // The text comes from constants of the program itself.
pub fn schema_of<T: Schema + ?Sized>() -> serde_json::Value {
    let mut json = vec![0; T::NODE.len()];
    schema(T::NODE, "", &mut json, 0);
    serde_json::from_slice(&json).expect("Node::Raw holds a JSON object")
}

macro_rules! primitive {
    ($($kind:literal $keywords:literal: $($type:ty),+;)+) => {$($(
        impl Schema for $type {
            const NODE: &'static Node = &Node::Primitive { kind: $kind, keywords: $keywords };
        }
    )+)+};
}

primitive! {
    "boolean" "": bool;
    "integer" "\"minimum\":0,\"maximum\":255": u8;
    "integer" "\"minimum\":0,\"maximum\":65535": u16;
    "integer" "\"minimum\":0,\"maximum\":4294967295": u32;
    "integer" "\"minimum\":0": u64, u128, usize;
    "integer" "\"minimum\":1": std::num::NonZeroU32, std::num::NonZeroU64, std::num::NonZeroUsize;
    "integer" "\"minimum\":-128,\"maximum\":127": i8;
    "integer" "\"minimum\":-32768,\"maximum\":32767": i16;
    "integer" "\"minimum\":-2147483648,\"maximum\":2147483647": i32;
    "integer" "": i64, i128, isize;
    "number" "": f32, f64, serde_json::Number;
    "string" "": String, str;
    "string" "\"minLength\":1,\"maxLength\":1": char;
    "null" "": ();
}

impl Schema for serde_json::Value {
    const NODE: &'static Node = &Node::Any;
}

impl Schema for serde_json::Map<String, serde_json::Value> {
    const NODE: &'static Node = &Node::Primitive { kind: "object", keywords: "" };
}

impl<T: Schema> Schema for Option<T> {
    const NODE: &'static Node = &Node::Nullable { inner: T::NODE };
    const OPTIONAL: bool = true;
}

macro_rules! same {
    ($($type:ty),+) => {$(
        impl<T: Schema + ?Sized> Schema for $type {
            const NODE: &'static Node = T::NODE;
            const OPTIONAL: bool = T::OPTIONAL;
        }
    )+};
}

same!(Box<T>, &T);

impl<T: Schema + ToOwned + ?Sized> Schema for Cow<'_, T> {
    const NODE: &'static Node = T::NODE;
    const OPTIONAL: bool = T::OPTIONAL;
}

macro_rules! array {
    ($($type:ty $(, $hasher:ident)?;)+) => {$(
        impl<T: Schema $(, $hasher)?> Schema for $type {
            const NODE: &'static Node = &Node::Array { items: T::NODE, length: None };
        }
    )+};
}

array! {
    [T];
    Vec<T>;
    VecDeque<T>;
    BTreeSet<T>;
    HashSet<T, S>, S;
}

impl<T: Schema, const N: usize> Schema for [T; N] {
    const NODE: &'static Node = &Node::Array { items: T::NODE, length: Some(N) };
}

macro_rules! map {
    ($($key:ty),+) => {$(
        impl<V: Schema> Schema for BTreeMap<$key, V> {
            const NODE: &'static Node = &Node::Map { values: V::NODE };
        }

        impl<V: Schema, S> Schema for HashMap<$key, V, S> {
            const NODE: &'static Node = &Node::Map { values: V::NODE };
        }
    )+};
}

map!(String, &str, Cow<'_, str>, Box<str>);

macro_rules! tuple {
    ($($length:literal: $($item:ident)+;)+) => {$(
        impl<$($item: Schema),+> Schema for ($($item,)+) {
            const NODE: &'static Node = &Node::Tuple { items: &[$($item::NODE),+], required: $length };
        }
    )+};
}

tuple! {
    1: A;
    2: A B;
    3: A B C;
    4: A B C D;
    5: A B C D E;
    6: A B C D E F;
}
