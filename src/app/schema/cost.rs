//! What checking an input against a schema costs, found out before it is checked. References can double the work at
//! every level of schema or input, so a small schema and a small input can keep a checker busy for years. This counts
//! the places the checker will visit (each reference to each value once, so the counting itself is cheap) and says
//! when they are too many. It also refuses, once per schema, the references whose cost could not be counted.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use serde_json::Value;

/// `$ref` in one schema: chains of them cost stack.
const MAX_REFERENCES: usize = 256;
/// Patterns in one schema: each costs memory when compiled.
const MAX_PATTERNS: usize = 64;
/// Places that one check may visit: a second or so.
const MAX_COST: u64 = 5_000_000;
/// Places that the counting itself may visit.
const MAX_STEPS: u64 = 2_000_000;

/// The cost cannot be paid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooCostly;

/// Refuse a schema that has too many references or patterns, or refers in ways other than by JSON pointer to itself.
pub(super) fn check(schema: &Value) -> Result<(), String> {
    let mut counts = Counts::default();
    counts.walk(schema, schema, true)?;
    if counts.references > MAX_REFERENCES {
        return Err(format!("it has more than {MAX_REFERENCES} references"));
    }
    if counts.patterns > MAX_PATTERNS {
        return Err(format!("it has more than {MAX_PATTERNS} patterns"));
    }
    Ok(())
}

/// Counts also what only looks like a keyword: too strict is safe here.
#[derive(Default)]
struct Counts {
    references: usize,
    patterns: usize,
}

impl Counts {
    fn walk(&mut self, root: &Value, value: &Value, is_root: bool) -> Result<(), String> {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    match (key.as_str(), value) {
                        ("$ref", Value::String(reference)) => {
                            self.references += 1;
                            if target(root, reference).is_none() {
                                return Err(format!(
                                    "the reference `{reference}` does not lead to a place in the schema; \
                                     references must be JSON pointers such as `#/$defs/item`"
                                ));
                            }
                        }
                        ("$id", Value::String(_)) if is_root => {}
                        (
                            "$id" | "$anchor" | "$dynamicRef" | "$dynamicAnchor" | "$recursiveRef",
                            Value::String(_),
                        ) => {
                            return Err(format!(
                                "`{key}` is not supported; refer with `$ref` and a JSON pointer"
                            ));
                        }
                        ("pattern", _) => self.patterns += 1,
                        ("patternProperties", Value::Object(patterns)) => {
                            self.patterns += patterns.len();
                        }
                        _ => {}
                    }
                    self.walk(root, value, false)?;
                }
                Ok(())
            }
            Value::Array(items) => items.iter().try_for_each(|item| self.walk(root, item, false)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Ok(()),
        }
    }
}

/// Where `#…` leads.
fn target<'a>(root: &'a Value, reference: &str) -> Option<&'a Value> {
    let fragment = reference.strip_prefix('#')?;
    if !fragment.contains('%') {
        return root.pointer(fragment);
    }
    let mut bytes = Vec::with_capacity(fragment.len());
    let mut rest = fragment.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first == b'%' {
            let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = tail.get(2..)?;
        } else {
            bytes.push(*first);
        }
    }
    root.pointer(std::str::from_utf8(&bytes).ok()?)
}

/// Whether `instance` can be checked against `schema`, which passed [`check`].
pub(super) fn affordable(schema: &Value, instance: &Value) -> Result<(), TooCostly> {
    let mut count = Count { root: schema, steps: 0, known: HashMap::new() };
    if count.visit(schema, instance)? > MAX_COST {
        return Err(TooCostly);
    }
    Ok(())
}

struct Count<'a> {
    root: &'a Value,
    steps: u64,
    /// Cost of a reference's target for a value, both by address; `None` while it is being counted.
    known: HashMap<(*const Value, *const Value), Option<u64>>,
}

impl<'a> Count<'a> {
    fn visit(&mut self, schema: &'a Value, value: &Value) -> Result<u64, TooCostly> {
        self.steps += 1;
        if self.steps > MAX_STEPS {
            return Err(TooCostly);
        }
        let Value::Object(keywords) = schema else {
            return Ok(1);
        };
        let mut cost = 1u64;
        for (keyword, sub) in keywords {
            let more = match keyword.as_str() {
                "$ref" => match sub.as_str().and_then(|r| target(self.root, r)) {
                    Some(target) => self.follow(target, value)?,
                    None => 0,
                },
                // At the same place.
                "allOf" | "anyOf" | "oneOf" => self.all(elements(sub), value)?,
                "not" | "if" | "then" | "else" => self.visit(sub, value)?,
                "dependentSchemas" | "dependencies" => self.all(members(sub), value)?,
                // One level down.
                "properties" => {
                    let mut sum = 0u64;
                    if let (Value::Object(subs), Value::Object(map)) = (sub, value) {
                        for (name, sub) in subs {
                            if let Some(child) = map.get(name) {
                                sum = sum.saturating_add(self.visit(sub, child)?);
                            }
                        }
                    }
                    sum
                }
                "patternProperties" => {
                    let mut sum = 0u64;
                    for sub in members(sub) {
                        sum = sum.saturating_add(self.below(sub, members(value))?);
                    }
                    sum
                }
                "additionalProperties" | "unevaluatedProperties" => self.below(sub, members(value))?,
                "propertyNames" => {
                    let each = self.visit(sub, &Value::Null)?;
                    each.saturating_mul(members(value).count() as u64)
                }
                "items" | "prefixItems" if sub.is_array() => {
                    let mut sum = 0u64;
                    for (sub, child) in elements(sub).zip(elements(value)) {
                        sum = sum.saturating_add(self.visit(sub, child)?);
                    }
                    sum
                }
                "items" | "additionalItems" | "unevaluatedItems" | "contains" => {
                    self.below(sub, elements(value))?
                }
                // Lists that are gone through.
                "enum" | "required" => elements(sub).count() as u64,
                "uniqueItems" => elements(value).count() as u64,
                _ => 0,
            };
            cost = cost.saturating_add(more);
        }
        // To know what is unevaluated, the checker asks every keyword beside it again.
        let again = ["unevaluatedProperties", "unevaluatedItems"];
        if again.iter().any(|k| keywords.contains_key(*k)) {
            cost = cost.saturating_mul(2);
        }
        Ok(cost)
    }

    /// A reference's target: counted once per value, however often it is reached.
    fn follow(&mut self, target: &'a Value, value: &Value) -> Result<u64, TooCostly> {
        let key = (std::ptr::from_ref(target), std::ptr::from_ref(value));
        match self.known.entry(key) {
            Entry::Occupied(known) => match known.get() {
                Some(cost) => return Ok(*cost),
                // It refers to itself at the same place: no end.
                None => return Err(TooCostly),
            },
            Entry::Vacant(place) => {
                place.insert(None);
            }
        }
        let cost = self.visit(target, value)?;
        self.known.insert(key, Some(cost));
        Ok(cost)
    }

    fn all(&mut self, subs: impl Iterator<Item = &'a Value>, value: &Value) -> Result<u64, TooCostly> {
        let mut sum = 0u64;
        for sub in subs {
            sum = sum.saturating_add(self.visit(sub, value)?);
        }
        Ok(sum)
    }

    fn below<'v>(
        &mut self,
        sub: &'a Value,
        children: impl Iterator<Item = &'v Value>,
    ) -> Result<u64, TooCostly> {
        let mut sum = 0u64;
        for child in children {
            sum = sum.saturating_add(self.visit(sub, child)?);
        }
        Ok(sum)
    }
}

fn elements(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn members(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_object().into_iter().flat_map(|map| map.values())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use serde_json::json;

    fn cost(schema: &Value, instance: &Value) -> Result<u64, TooCostly> {
        check(schema).unwrap();
        let mut count = Count { root: schema, steps: 0, known: HashMap::new() };
        count.visit(schema, instance)
    }

    #[test]
    fn a_tree_costs_as_much_as_it_has_places() {
        let schema = json!({
            "$ref": "#/$defs/node",
            "$defs": {"node": {"properties": {
                "left": {"$ref": "#/$defs/node"}, "right": {"$ref": "#/$defs/node"}}}}
        });
        let small = cost(&schema, &json!({"left": {}})).unwrap();
        let large = cost(&schema, &json!({"left": {}, "right": {"left": {}}})).unwrap();
        assert!(small < large && large < 3 * small, "{small} {large}");
    }

    #[test]
    fn doubling_at_every_level_of_schema_or_input_is_too_costly() {
        let doubling = json!({
            "$ref": "#/$defs/n",
            "$defs": {"n": {"anyOf": [
                {"properties": {"x": {"$ref": "#/$defs/n"}}},
                {"additionalProperties": {"$ref": "#/$defs/n"}}]}}
        });
        let nested = |depth| (0..depth).fold(json!(1), |inner, _| json!({ "x": inner }));
        assert!(affordable(&doubling, &nested(10)).is_ok());
        assert_eq!(affordable(&doubling, &nested(100)), Err(TooCostly));
        let many: Vec<Value> = (0..1_000).map(|i| json!({ "const": i })).collect();
        let wide = json!({"items": {"anyOf": many}});
        assert!(affordable(&wide, &json!(vec![0; 100])).is_ok());
        assert_eq!(affordable(&wide, &json!(vec![0; 100_000])), Err(TooCostly));
    }

    #[test]
    fn a_reference_that_comes_back_to_the_same_place_is_too_costly() {
        let circle =
            json!({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"});
        assert_eq!(affordable(&circle, &json!(1)), Err(TooCostly));
        assert_eq!(affordable(&json!({"anyOf": [{"$ref": "#"}]}), &json!(1)), Err(TooCostly));
    }

    #[test]
    fn only_pointers_into_the_schema_are_references() {
        assert!(check(&json!({"$id": "x", "$ref": "#/a%20b", "a b": {}})).is_ok());
        for bad in [
            json!({"$ref": "https://example.com/x"}),
            json!({"$ref": "#name", "$defs": {"n": {"$anchor": "name"}}}),
            json!({"$ref": "#/$defs/none"}),
            json!({"$ref": "#/%"}),
            json!({"$dynamicRef": "#a"}),
            json!({"$defs": {"a": {"$id": "b"}}}),
        ] {
            assert!(check(&bad).is_err(), "{bad}");
        }
    }
}
