//! The schema tree and its rendering to JSON text, all of it `const`, so that a schema is known when
//! the task is compiled. Owns JSON syntax and escaping; knows nothing of serde or of the types that
//! the trees describe.

/// One JSON Schema (draft 2020-12), as a tree of constants.
///
/// `#[derive(Schema)]` builds these. By hand you will want [`Node::Raw`] for a type of your own that
/// serialises as, say, a date.
///
/// ```
/// use sandbar_guest::{Node, Schema, schema_of};
///
/// struct Date;
///
/// impl Schema for Date {
///     const NODE: &'static Node = &Node::Raw { json: r#"{"type":"string","format":"date"}"# };
/// }
///
/// assert_eq!(schema_of::<Vec<Date>>()["items"]["format"], "date");
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Node {
    /// Every value is valid.
    Any,
    /// A finished schema as JSON text. It must be an object, `{…}`, else compilation fails.
    Raw {
        /// For example `{"type":"string","format":"date"}`.
        json: &'static str,
    },
    /// A schema of one JSON type.
    Primitive {
        /// The JSON type, for example `integer`.
        kind: &'static str,
        /// Further members as JSON text without braces, for example `"minimum":0`; empty for none.
        keywords: &'static str,
    },
    /// The inner schema or `null`.
    Nullable {
        /// What is valid beside `null`.
        inner: &'static Node,
    },
    /// An array of equal items.
    Array {
        /// The schema of every item.
        items: &'static Node,
        /// The exact number of items, where it is fixed.
        length: Option<usize>,
    },
    /// An array with one schema per place.
    Tuple {
        /// The schemas in order.
        items: &'static [&'static Node],
        /// How many of them must be present.
        required: usize,
    },
    /// An object whose keys are free and whose values share one schema.
    Map {
        /// The schema of every value.
        values: &'static Node,
    },
    /// An object with named properties.
    Object {
        /// The properties in order.
        fields: &'static [Field],
        /// Whether any other property is refused.
        closed: bool,
    },
    /// One of these strings.
    Strings {
        /// The strings; at least one.
        values: &'static [&'static str],
    },
    /// One of several schemas.
    Choice {
        /// The alternatives; at least one.
        nodes: &'static [&'static Node],
        /// True when no value can match two of them (`oneOf`), false when it can (`anyOf`).
        exclusive: bool,
    },
    /// An object that carries a tag beside the content of `inner`.
    Tagged {
        /// The property that carries the tag.
        tag: &'static Field,
        /// What else is in the object. Only the properties of a [`Node::Object`] are described;
        /// for anything else the rest of the object is free.
        inner: &'static Node,
    },
    /// The inner schema with a description.
    Described {
        /// For people.
        description: &'static str,
        /// What is described.
        inner: &'static Node,
    },
}

/// One property of an [`Node::Object`].
///
/// ```
/// use sandbar_guest::{Field, Node, Schema, schema_of};
///
/// /// What a foreign crate writes as `{"ms": 5}`.
/// struct Pause;
///
/// impl Schema for Pause {
///     const NODE: &'static Node = &Node::Object {
///         fields: &[Field { name: "ms", aliases: &[], description: "", node: u64::NODE, required: true }],
///         closed: true,
///     };
/// }
///
/// assert_eq!(schema_of::<Pause>()["required"][0], "ms");
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// The key as it stands in JSON.
    pub name: &'static str,
    /// Other keys that are accepted in its place. With any, the property counts as not required.
    pub aliases: &'static [&'static str],
    /// For people; empty for none.
    pub description: &'static str,
    /// The schema of the value.
    pub node: &'static Node,
    /// Whether the property must be present.
    pub required: bool,
}

impl Node {
    /// Bytes of this schema as JSON text.
    #[must_use]
    pub const fn len(&self) -> usize {
        schema(self, "", &mut [], 0)
    }

    /// Always false: the shortest schema is `true`. Here because `len` is.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// This schema as JSON text; `N` must be [`Node::len`].
    #[must_use]
    pub const fn render<const N: usize>(&self) -> [u8; N] {
        let mut out = [0; N];
        let end = schema(self, "", &mut out, 0);
        assert!(end == N, "N must be Node::len");
        out
    }
}

/// Writes `node` at `at`, with `description` in place of its own unless that is empty, and returns
/// where it ends. An `out` that is too short is left alone, so an empty one measures.
pub(crate) const fn schema(node: &Node, description: &str, out: &mut [u8], at: usize) -> usize {
    let (own, node) = peel(node);
    let description = if description.is_empty() { own } else { description };
    let lifted = match node {
        Node::Nullable { inner } if description.is_empty() => peel(inner).0,
        _ => description,
    };
    if let Node::Choice { nodes: [only], .. } = node {
        return schema(only, description, out, at);
    }
    if let Node::Any = node {
        if description.is_empty() {
            return text("true", out, at);
        }
        let at = text("{\"description\":", out, at);
        let at = string(description, out, at);
        return text("}", out, at);
    }
    let mut at = text("{", out, at);
    if !lifted.is_empty() {
        at = text("\"description\":", out, at);
        at = string(lifted, out, at);
        at = match node {
            Node::Raw { json } if members(json).is_empty() => at,
            _ => text(",", out, at),
        };
    }
    at = match node {
        Node::Raw { json } => copy(members(json), out, at),
        Node::Primitive { kind, keywords } => {
            at = text("\"type\":", out, at);
            at = string(kind, out, at);
            keywords_after(keywords, out, at)
        }
        Node::Nullable { inner } => match peel(inner).1 {
            Node::Primitive { kind, keywords } => {
                at = text("\"type\":", out, at);
                at = if matches!(kind.as_bytes(), b"null") {
                    string(kind, out, at)
                } else {
                    strings(&[kind, "null"], out, at)
                };
                keywords_after(keywords, out, at)
            }
            inner => {
                at = text("\"anyOf\":[", out, at);
                at = schema(inner, "", out, at);
                text(",{\"type\":\"null\"}]", out, at)
            }
        },
        Node::Array { items, length } => {
            at = text("\"type\":\"array\",\"items\":", out, at);
            at = schema(items, "", out, at);
            match length {
                Some(length) => bounds(*length, *length, out, at),
                None => at,
            }
        }
        Node::Tuple { items, required } => {
            at = text("\"type\":\"array\"", out, at);
            if !items.is_empty() {
                at = text(",\"prefixItems\":", out, at);
                at = list(items, out, at);
            }
            bounds(*required, items.len(), out, at)
        }
        Node::Map { values } => {
            at = text("\"type\":\"object\",\"additionalProperties\":", out, at);
            schema(values, "", out, at)
        }
        Node::Object { fields, closed } => object(None, fields, *closed, out, at),
        Node::Tagged { tag, inner } => match peel(inner).1 {
            Node::Object { fields, closed } => object(Some(tag), fields, *closed, out, at),
            _ => object(Some(tag), &[], false, out, at),
        },
        Node::Strings { values } => {
            at = text("\"type\":\"string\",", out, at);
            if let [only] = values {
                at = text("\"const\":", out, at);
                string(only, out, at)
            } else {
                at = text("\"enum\":", out, at);
                strings(values, out, at)
            }
        }
        Node::Choice { nodes, exclusive } => {
            at = text(if *exclusive { "\"oneOf\":" } else { "\"anyOf\":" }, out, at);
            list(nodes, out, at)
        }
        // Both are handled above.
        Node::Any | Node::Described { .. } => at,
    };
    text("}", out, at)
}

/// The outermost description of a node, and the node below its descriptions. An optional that can
/// be null anyway is the inner one.
const fn peel(mut node: &Node) -> (&'static str, &Node) {
    let mut description = "";
    loop {
        match node {
            Node::Described { description: found, inner } => {
                if description.is_empty() {
                    description = found;
                }
                node = inner;
            }
            Node::Nullable { inner: inner @ (Node::Nullable { .. } | Node::Any) } => node = inner,
            _ => return (description, node),
        }
    }
}

/// The members of an object schema: the tag first, then the fields.
const fn object(tag: Option<&Field>, fields: &[Field], closed: bool, out: &mut [u8], mut at: usize) -> usize {
    at = text("\"type\":\"object\"", out, at);
    let mut before = ",\"properties\":{";
    if let Some(tag) = tag {
        at = text(before, out, at);
        at = property(tag.name, tag, out, at);
        before = ",";
    }
    let mut i = 0;
    while i < fields.len() {
        at = text(before, out, at);
        before = ",";
        at = property(fields[i].name, &fields[i], out, at);
        let mut alias = 0;
        while alias < fields[i].aliases.len() {
            at = text(",", out, at);
            at = property(fields[i].aliases[alias], &fields[i], out, at);
            alias += 1;
        }
        i += 1;
    }
    if tag.is_some() || !fields.is_empty() {
        at = text("}", out, at);
    }

    let mut before = ",\"required\":[";
    let mut any = false;
    if let Some(tag) = tag {
        if tag.required {
            at = text(before, out, at);
            at = string(tag.name, out, at);
            before = ",";
            any = true;
        }
    }
    i = 0;
    while i < fields.len() {
        if fields[i].required && fields[i].aliases.is_empty() {
            at = text(before, out, at);
            at = string(fields[i].name, out, at);
            before = ",";
            any = true;
        }
        i += 1;
    }
    if any {
        at = text("]", out, at);
    }
    if closed {
        at = text(",\"additionalProperties\":false", out, at);
    }
    at
}

const fn property(name: &str, field: &Field, out: &mut [u8], at: usize) -> usize {
    let at = string(name, out, at);
    let at = text(":", out, at);
    schema(field.node, field.description, out, at)
}

/// `[a,b,c]` of schemas.
const fn list(nodes: &[&Node], out: &mut [u8], at: usize) -> usize {
    let mut at = text("[", out, at);
    let mut i = 0;
    while i < nodes.len() {
        if i > 0 {
            at = text(",", out, at);
        }
        at = schema(nodes[i], "", out, at);
        i += 1;
    }
    text("]", out, at)
}

/// `["a","b"]`.
const fn strings(values: &[&str], out: &mut [u8], at: usize) -> usize {
    let mut at = text("[", out, at);
    let mut i = 0;
    while i < values.len() {
        if i > 0 {
            at = text(",", out, at);
        }
        at = string(values[i], out, at);
        i += 1;
    }
    text("]", out, at)
}

const fn keywords_after(keywords: &str, out: &mut [u8], at: usize) -> usize {
    if keywords.is_empty() {
        return at;
    }
    let at = text(",", out, at);
    text(keywords, out, at)
}

const fn bounds(min: usize, max: usize, out: &mut [u8], at: usize) -> usize {
    let at = text(",\"minItems\":", out, at);
    let at = number(min, out, at);
    let at = text(",\"maxItems\":", out, at);
    number(max, out, at)
}

/// What is between the braces of `json`.
const fn members(json: &str) -> &[u8] {
    let bytes = json.as_bytes();
    assert!(
        bytes.len() >= 2 && bytes[0] == b'{' && bytes[bytes.len() - 1] == b'}',
        "Node::Raw must hold a JSON object, without space around it"
    );
    bytes.split_at(bytes.len() - 1).0.split_at(1).1
}

/// Writes text as it is.
pub(crate) const fn text(text: &str, out: &mut [u8], at: usize) -> usize {
    copy(text.as_bytes(), out, at)
}

/// Writes a JSON string: quoted, with quotes, backslashes and control characters escaped.
pub(crate) const fn string(value: &str, out: &mut [u8], at: usize) -> usize {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let bytes = value.as_bytes();
    let mut at = text("\"", out, at);
    let mut plain = 0;
    let mut i = 0;
    while i < bytes.len() {
        let byte = bytes[i];
        if byte < 0x20 || byte == b'"' || byte == b'\\' {
            at = copy(bytes.split_at(i).0.split_at(plain).1, out, at);
            plain = i + 1;
            at = match byte {
                b'"' => text("\\\"", out, at),
                b'\\' => text("\\\\", out, at),
                b'\n' => text("\\n", out, at),
                b'\t' => text("\\t", out, at),
                b'\r' => text("\\r", out, at),
                _ => {
                    at = text("\\u00", out, at);
                    copy(&[HEX[(byte >> 4) as usize], HEX[(byte & 15) as usize]], out, at)
                }
            };
        }
        i += 1;
    }
    at = copy(bytes.split_at(plain).1, out, at);
    text("\"", out, at)
}

/// Writes a decimal number.
const fn number(value: usize, out: &mut [u8], at: usize) -> usize {
    let at = if value >= 10 { number(value / 10, out, at) } else { at };
    copy(&[b'0' + (value % 10) as u8], out, at)
}

const fn copy(bytes: &[u8], out: &mut [u8], at: usize) -> usize {
    let end = at + bytes.len();
    if end <= out.len() {
        out.split_at_mut(at).1.split_at_mut(bytes.len()).0.copy_from_slice(bytes);
    }
    end
}
