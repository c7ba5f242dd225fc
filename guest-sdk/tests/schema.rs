//! `#[derive(Schema)]` against serde: the schema is what it should be, and whatever serde writes or
//! reads is valid by it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    dead_code,
    clippy::tabs_in_doc_comments
)]

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;

use proptest::prelude::*;
use sandbar_guest::{Node, Schema, schema_of};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

fn accepts<T: Schema>(value: &Value) -> bool {
    jsonschema::validator_for(&schema_of::<T>()).expect("a valid schema").is_valid(value)
}

#[test]
fn standard_types_have_the_schema_of_their_json() {
    assert_eq!(schema_of::<bool>(), json!({"type": "boolean"}));
    assert_eq!(schema_of::<u8>(), json!({"type": "integer", "minimum": 0, "maximum": 255}));
    assert_eq!(schema_of::<u64>(), json!({"type": "integer", "minimum": 0}));
    assert_eq!(schema_of::<i64>(), json!({"type": "integer"}));
    assert_eq!(schema_of::<f32>(), json!({"type": "number"}));
    assert_eq!(schema_of::<&str>(), json!({"type": "string"}));
    assert_eq!(schema_of::<Cow<'_, str>>(), json!({"type": "string"}));
    assert_eq!(schema_of::<Box<str>>(), json!({"type": "string"}));
    assert_eq!(schema_of::<char>(), json!({"type": "string", "minLength": 1, "maxLength": 1}));
    assert_eq!(schema_of::<()>(), json!({"type": "null"}));
    assert_eq!(schema_of::<Value>(), json!(true));
    assert_eq!(schema_of::<Vec<bool>>(), json!({"type": "array", "items": {"type": "boolean"}}));
    assert_eq!(
        schema_of::<[bool; 12]>(),
        json!({"type": "array", "items": {"type": "boolean"}, "minItems": 12, "maxItems": 12})
    );
    assert_eq!(
        schema_of::<(bool, String)>(),
        json!({
            "type": "array",
            "prefixItems": [{"type": "boolean"}, {"type": "string"}],
            "minItems": 2,
            "maxItems": 2,
        })
    );
    assert_eq!(
        schema_of::<HashMap<String, f64>>(),
        json!({"type": "object", "additionalProperties": {"type": "number"}})
    );
    assert_eq!(schema_of::<BTreeMap<&str, Value>>(), json!({"type": "object", "additionalProperties": true}));
}

#[test]
fn an_option_is_the_type_or_null() {
    assert_eq!(schema_of::<Option<bool>>(), json!({"type": ["boolean", "null"]}));
    assert_eq!(schema_of::<Option<u8>>(), json!({"type": ["integer", "null"], "minimum": 0, "maximum": 255}));
    assert_eq!(schema_of::<Option<Option<bool>>>(), json!({"type": ["boolean", "null"]}));
    assert_eq!(schema_of::<Option<Value>>(), json!(true));
    assert_eq!(
        schema_of::<Option<Vec<bool>>>(),
        json!({"anyOf": [{"type": "array", "items": {"type": "boolean"}}, {"type": "null"}]})
    );
}

/// A "quoted" \ text.
///
/// Tab:	end.
#[derive(Schema)]
struct Escapes {
    #[serde(rename = "a\"b\\c\n\u{1}é")]
    odd: bool,
}

#[test]
fn names_and_descriptions_are_escaped() {
    assert_eq!(
        schema_of::<Escapes>(),
        json!({
            "description": "A \"quoted\" \\ text.\n\nTab:\tend.",
            "type": "object",
            "properties": {"a\"b\\c\n\u{1}é": {"type": "boolean"}},
            "required": ["a\"b\\c\n\u{1}é"],
        })
    );
}

struct Date;

impl Schema for Date {
    const NODE: &'static Node = &Node::Raw { json: r#"{"type":"string","format":"date"}"# };
}

struct Free;

impl Schema for Free {
    const NODE: &'static Node = &Node::Raw { json: "{}" };
}

#[derive(Schema)]
struct Described {
    /// The day.
    day: Date,
    /// Anything.
    any: Value,
    /// Anything else.
    free: Free,
    /// A word of this field.
    inner: Inner,
    /// Perhaps.
    maybe: Option<Inner>,
}

/// A word of the type.
#[derive(Schema)]
struct Inner;

#[test]
fn the_description_of_a_field_goes_before_that_of_its_type() {
    assert_eq!(
        schema_of::<Described>()["properties"],
        json!({
            "day": {"description": "The day.", "type": "string", "format": "date"},
            "any": {"description": "Anything."},
            "free": {"description": "Anything else."},
            "inner": {"description": "A word of this field.", "type": "null"},
            "maybe": {"description": "Perhaps.", "type": "null"},
        })
    );
    assert_eq!(schema_of::<Inner>(), json!({"description": "A word of the type.", "type": "null"}));
}

#[derive(Schema)]
#[serde(rename_all = "SCREAMING-KEBAB-CASE", deny_unknown_fields)]
struct Names {
    plain_name: bool,
    r#type: bool,
    #[serde(rename(serialize = "own", deserialize = "own"))]
    renamed: bool,
    #[serde(alias = "old-name")]
    aliased: bool,
    #[serde(skip)]
    skipped: Date,
}

#[test]
fn keys_are_named_as_serde_names_them() {
    assert_eq!(
        schema_of::<Names>(),
        json!({
            "type": "object",
            "properties": {
                "PLAIN-NAME": {"type": "boolean"},
                "TYPE": {"type": "boolean"},
                "own": {"type": "boolean"},
                "ALIASED": {"type": "boolean"},
                "old-name": {"type": "boolean"},
            },
            "required": ["PLAIN-NAME", "TYPE", "own"],
            "additionalProperties": false,
        })
    );
}

#[derive(Schema)]
struct Required<T> {
    plain: T,
    option: Option<T>,
    boxed: Box<Option<T>>,
    #[serde(default)]
    default: T,
    #[serde(skip_serializing_if = "Option::is_none")]
    conditional: Option<T>,
    #[serde(skip_deserializing)]
    only_written: T,
    #[serde(with = "somewhere")]
    #[schema(as = Option<String>)]
    with: T,
}

#[derive(Schema)]
#[serde(default)]
struct AllDefault {
    a: bool,
}

#[test]
fn what_serde_can_do_without_is_not_required() {
    assert_eq!(schema_of::<Required<bool>>()["required"], json!(["plain", "with"]));
    assert_eq!(schema_of::<AllDefault>().get("required"), None);
}

#[derive(Schema)]
struct Unit;

#[derive(Schema)]
struct Newtype(Vec<bool>);

#[derive(Schema)]
struct Tuple(bool, #[serde(default)] String);

#[derive(Schema)]
#[serde(transparent)]
struct Transparent {
    #[serde(skip)]
    marker: Date,
    inner: Option<bool>,
}

#[derive(Schema)]
struct HoldsTransparent {
    field: Transparent,
}

#[test]
fn structs_without_named_fields_are_what_serde_makes_of_them() {
    assert_eq!(schema_of::<Unit>(), json!({"type": "null"}));
    assert_eq!(schema_of::<Newtype>(), json!({"type": "array", "items": {"type": "boolean"}}));
    assert_eq!(
        schema_of::<Tuple>(),
        json!({
            "type": "array",
            "prefixItems": [{"type": "boolean"}, {"type": "string"}],
            "minItems": 1,
            "maxItems": 2,
        })
    );
    assert_eq!(schema_of::<Transparent>(), json!({"type": ["boolean", "null"]}));
    assert_eq!(schema_of::<HoldsTransparent>().get("required"), None);
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Schema)]
#[serde(rename_all = "snake_case")]
enum Plain {
    FirstOne,
    SecondOne,
}

#[derive(Schema)]
enum OneWord {
    Only,
}

#[derive(Schema)]
#[serde(rename_all = "lowercase")]
enum Documented {
    /// The first.
    First,
    #[serde(alias = "2nd")]
    Second,
}

#[test]
fn an_enum_of_units_is_a_list_of_strings() {
    assert_eq!(schema_of::<Plain>(), json!({"type": "string", "enum": ["first_one", "second_one"]}));
    assert_eq!(schema_of::<OneWord>(), json!({"type": "string", "const": "Only"}));
    assert_eq!(
        schema_of::<Documented>(),
        json!({"oneOf": [
            {"description": "The first.", "type": "string", "const": "first"},
            {"type": "string", "enum": ["second", "2nd"]},
        ]})
    );
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Schema)]
enum External {
    Unit,
    /// One number.
    Newtype(u8),
    Pair(bool, String),
    Struct {
        size: u8,
    },
    #[serde(skip)]
    Never,
}

#[test]
fn an_externally_tagged_enum_is_a_string_or_an_object_with_one_key() {
    let byte = json!({"type": "integer", "minimum": 0, "maximum": 255});
    assert_eq!(
        schema_of::<External>(),
        json!({"oneOf": [
            {"type": "string", "const": "Unit"},
            {
                "description": "One number.",
                "type": "object",
                "properties": {"Newtype": byte},
                "required": ["Newtype"],
                "additionalProperties": false,
            },
            {
                "type": "object",
                "properties": {"Pair": {
                    "type": "array",
                    "prefixItems": [{"type": "boolean"}, {"type": "string"}],
                    "minItems": 2,
                    "maxItems": 2,
                }},
                "required": ["Pair"],
                "additionalProperties": false,
            },
            {
                "type": "object",
                "properties": {"Struct": {
                    "type": "object",
                    "properties": {"size": byte},
                    "required": ["size"],
                }},
                "required": ["Struct"],
                "additionalProperties": false,
            },
        ]})
    );
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Schema)]
#[serde(deny_unknown_fields)]
struct Circle {
    radius: u8,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Schema)]
#[serde(tag = "kind", rename_all = "camelCase", rename_all_fields = "camelCase")]
enum Internal {
    TheUnit,
    Circle(Circle),
    Free(BTreeMap<String, bool>),
    Nested(External),
    Square { side_length: u8, label: Option<String> },
}

#[test]
fn an_internally_tagged_enum_is_an_object_with_the_tag_among_its_keys() {
    let byte = json!({"type": "integer", "minimum": 0, "maximum": 255});
    assert_eq!(
        schema_of::<Internal>(),
        json!({"oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"type": "string", "const": "theUnit"}},
                "required": ["kind"],
            },
            {
                "type": "object",
                "properties": {"kind": {"type": "string", "const": "circle"}, "radius": byte},
                "required": ["kind", "radius"],
                "additionalProperties": false,
            },
            {
                "type": "object",
                "properties": {"kind": {"type": "string", "const": "free"}},
                "required": ["kind"],
            },
            {
                "type": "object",
                "properties": {"kind": {"type": "string", "const": "nested"}},
                "required": ["kind"],
            },
            {
                "type": "object",
                "properties": {
                    "kind": {"type": "string", "const": "square"},
                    "sideLength": byte,
                    "label": {"type": ["string", "null"]},
                },
                "required": ["kind", "sideLength"],
            },
        ]})
    );
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Schema)]
#[serde(tag = "t", content = "c", deny_unknown_fields)]
enum Adjacent {
    Unit,
    Newtype(Option<u8>),
    Pair(bool, bool),
    Struct { on: bool },
}

#[test]
fn an_adjacently_tagged_enum_is_an_object_of_tag_and_content() {
    let schema = schema_of::<Adjacent>();
    assert_eq!(
        schema["oneOf"][0],
        json!({
            "type": "object",
            "properties": {"t": {"type": "string", "const": "Unit"}},
            "required": ["t"],
            "additionalProperties": false,
        })
    );
    assert_eq!(schema["oneOf"][1]["required"], json!(["t"]));
    assert_eq!(
        schema["oneOf"][3],
        json!({
            "type": "object",
            "properties": {
                "t": {"type": "string", "const": "Struct"},
                "c": {
                    "type": "object",
                    "properties": {"on": {"type": "boolean"}},
                    "required": ["on"],
                    "additionalProperties": false,
                },
            },
            "required": ["t", "c"],
            "additionalProperties": false,
        })
    );
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Schema)]
#[serde(untagged)]
enum Untagged {
    Number(u8),
    Text(String),
    Struct { on: bool },
    Nothing,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Schema)]
#[serde(tag = "type")]
enum WithOther {
    Known {
        a: bool,
    },
    #[serde(other)]
    Unknown,
}

#[test]
fn an_untagged_enum_is_any_of_its_contents() {
    assert_eq!(
        schema_of::<Untagged>(),
        json!({"anyOf": [
            {"type": "integer", "minimum": 0, "maximum": 255},
            {"type": "string"},
            {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
            {"type": "null"},
        ]})
    );
    assert_eq!(schema_of::<WithOther>()["anyOf"][1]["properties"], json!({"type": {"type": "string"}}));
    assert!(accepts::<WithOther>(&json!({"type": "from the future"})));
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Schema)]
#[serde(tag = "version")]
struct TaggedStruct {
    a: bool,
}

#[derive(Schema)]
#[serde(try_from = "String", into = "String")]
#[schema(as = String)]
struct Email(String);

#[derive(Schema)]
struct Generic<'a, T, const N: usize>
where
    T: Clone,
{
    items: [T; N],
    name: &'a str,
}

#[derive(Schema)]
struct Branch {
    #[schema(as = Vec<serde_json::Value>)]
    branches: Vec<Branch>,
    error: Option<other::Branch>,
}

mod other {
    #[derive(sandbar_guest::Schema)]
    pub struct Branch;
}

#[test]
fn a_type_that_contains_itself_can_end_in_a_stand_in() {
    assert_eq!(
        schema_of::<Branch>()["properties"],
        json!({"branches": {"type": "array", "items": true}, "error": {"type": "null"}})
    );
}

#[test]
fn a_stand_in_gives_its_schema_and_generics_fill_theirs_in() {
    assert_eq!(schema_of::<Email>(), json!({"type": "string"}));
    assert_eq!(schema_of::<Generic<'_, u8, 3>>()["properties"]["items"]["maxItems"], 3);
    assert_eq!(schema_of::<TaggedStruct>()["properties"]["version"], true);
    assert_eq!(schema_of::<TaggedStruct>()["required"], json!(["a"]));
}

/// A little of everything, to be filled at random.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Schema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Everything {
    a_bool: bool,
    an_i8: i8,
    a_u64: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    maybe: Option<u16>,
    #[serde(default)]
    letter: char,
    words: Vec<String>,
    map: BTreeMap<String, Option<i32>>,
    pair: (bool, Box<u32>),
    plain: Plain,
    external: External,
    internal: Internal,
    adjacent: Adjacent,
    untagged: Untagged,
    tagged: TaggedStruct,
    array: [i16; 2],
}

fn external() -> impl Strategy<Value = External> {
    prop_oneof![
        Just(External::Unit),
        any::<u8>().prop_map(External::Newtype),
        any::<(bool, String)>().prop_map(|(a, b)| External::Pair(a, b)),
        any::<u8>().prop_map(|size| External::Struct { size }),
    ]
}

fn internal() -> impl Strategy<Value = Internal> {
    prop_oneof![
        Just(Internal::TheUnit),
        any::<u8>().prop_map(|radius| Internal::Circle(Circle { radius })),
        any::<BTreeMap<String, bool>>().prop_map(|mut map| {
            map.remove("kind");
            Internal::Free(map)
        }),
        any::<u8>().prop_map(|size| Internal::Nested(External::Struct { size })),
        any::<(u8, Option<String>)>()
            .prop_map(|(side_length, label)| Internal::Square { side_length, label }),
    ]
}

fn adjacent() -> impl Strategy<Value = Adjacent> {
    prop_oneof![
        Just(Adjacent::Unit),
        any::<Option<u8>>().prop_map(Adjacent::Newtype),
        any::<(bool, bool)>().prop_map(|(a, b)| Adjacent::Pair(a, b)),
        any::<bool>().prop_map(|on| Adjacent::Struct { on }),
    ]
}

fn untagged() -> impl Strategy<Value = Untagged> {
    prop_oneof![
        any::<u8>().prop_map(Untagged::Number),
        any::<String>().prop_map(Untagged::Text),
        any::<bool>().prop_map(|on| Untagged::Struct { on }),
        Just(Untagged::Nothing),
    ]
}

fn everything() -> impl Strategy<Value = Everything> {
    let scalars = any::<(bool, i8, u64, Option<u16>, char, bool, [i16; 2])>();
    let composites = any::<(Vec<String>, BTreeMap<String, Option<i32>>, (bool, Box<u32>))>();
    let plain = prop_oneof![Just(Plain::FirstOne), Just(Plain::SecondOne)];
    (scalars, composites, plain, external(), internal(), adjacent(), untagged()).prop_map(
        |(scalars, composites, plain, external, internal, adjacent, untagged)| Everything {
            a_bool: scalars.0,
            an_i8: scalars.1,
            a_u64: scalars.2,
            maybe: scalars.3,
            letter: scalars.4,
            words: composites.0,
            map: composites.1,
            pair: composites.2,
            plain,
            external,
            internal,
            adjacent,
            untagged,
            tagged: TaggedStruct { a: scalars.5 },
            array: scalars.6,
        },
    )
}

/// Every change of one value inside `value`: removed, or put in place of by a stranger.
fn mutations(value: &Value) -> Vec<Value> {
    let strangers =
        [json!(null), json!(-1), json!(1e6), json!("stranger"), json!([]), json!({}), json!(true)];
    let mut found: Vec<Value> = strangers.to_vec();
    match value {
        Value::Object(map) => {
            for (key, inner) in map {
                let mut without = map.clone();
                without.remove(key);
                found.push(Value::Object(without));
                for changed in mutations(inner) {
                    let mut with = map.clone();
                    with.insert(key.clone(), changed);
                    found.push(Value::Object(with));
                }
            }
            let mut more = map.clone();
            more.insert("stranger".to_owned(), json!(1));
            found.push(Value::Object(more));
        }
        Value::Array(items) => {
            found.push(items.iter().skip(1).cloned().collect());
            found.push(items.iter().chain(&[json!("stranger")]).cloned().collect());
        }
        _ => {}
    }
    found
}

fn check_both_directions<T>(value: &T) -> Result<(), TestCaseError>
where
    T: Schema + Serialize + DeserializeOwned + PartialEq + Debug,
{
    let validator = jsonschema::validator_for(&schema_of::<T>()).unwrap();
    let written = serde_json::to_value(value).unwrap();
    prop_assert!(validator.is_valid(&written), "serde wrote what the schema refuses: {written}");
    for changed in mutations(&written) {
        if serde_json::from_value::<T>(changed.clone()).is_ok() {
            prop_assert!(validator.is_valid(&changed), "serde reads what the schema refuses: {changed}");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_serde_writes_or_reads_is_valid(value in everything()) {
        check_both_directions(&value)?;
    }
}

#[test]
fn what_serde_refuses_for_its_shape_is_mostly_refused_by_the_schema() {
    for (value, valid) in [
        (json!({"kind": "circle", "radius": 1}), true),
        (json!({"kind": "circle", "radius": 256}), false),
        (json!({"kind": "circle", "radius": 1, "x": 1}), false),
        (json!({"kind": "circle"}), false),
        (json!({"kind": "oval"}), false),
        (json!({"kind": "square", "sideLength": 1}), true),
        (json!({"kind": "square", "side_length": 1}), false),
        (json!("circle"), false),
    ] {
        assert_eq!(accepts::<Internal>(&value), valid, "{value}");
        assert_eq!(serde_json::from_value::<Internal>(value.clone()).is_ok(), valid, "{value}");
    }
}
