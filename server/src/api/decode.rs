//! Decoding of request bodies: every problem at once, each with its JSON pointer.
//!
//! Owns: the [`Decode`] trait and the reader of objects. Must not know: any particular body. Serde would stop
//! at the first problem and lose the path inside tagged unions, and a client deserves both.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::problem::{MAX_SAFE_INTEGER, ProblemError};

/// Most problems that one answer names.
const ERRORS_MAX: usize = 64;

/// Problems found so far.
#[derive(Debug, Default)]
pub struct Errors(Vec<ProblemError>);

impl Errors {
    /// Notes a problem with the value at `pointer`.
    pub fn add(&mut self, pointer: &str, code: &'static str, detail: impl Into<String>) {
        if self.0.len() < ERRORS_MAX {
            self.0.push(ProblemError::at_pointer(pointer, code, detail));
        }
    }

    fn wrong_type(&mut self, node: &Node<'_>, wanted: &str) {
        let found = match node.value {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::Array(_) => "an array",
            Value::Object(_) => "an object",
        };
        self.add(&node.pointer, "wrong_type", format!("this is {found}, not {wanted}"));
    }
}

/// A value of the body and where it is.
#[derive(Debug)]
pub struct Node<'v> {
    value: &'v Value,
    pointer: String,
}

impl Node<'_> {
    /// Notes that the value is not shaped as it should be.
    pub fn invalid(&self, errors: &mut Errors, detail: &str) {
        errors.add(&self.pointer, "invalid_format", detail);
    }
}

/// A type that a body can be decoded to. `None` means that `errors` got at least one entry.
pub trait Decode: Sized {
    /// Decodes `node`, noting every problem.
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self>;
}

/// Decodes a whole body.
///
/// # Errors
/// Every problem found.
pub fn decode<T: Decode>(value: &Value) -> Result<T, Vec<ProblemError>> {
    let mut errors = Errors::default();
    let decoded = T::decode(&Node { value, pointer: String::new() }, &mut errors);
    match decoded {
        Some(decoded) if errors.0.is_empty() => Ok(decoded),
        _ => Err(errors.0),
    }
}

/// `text` as it stands in a JSON pointer, cut where it gets absurd.
fn token(text: &str) -> String {
    text.chars().take(64).collect::<String>().replace('~', "~0").replace('/', "~1")
}

/// A field of a merge patch.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(untagged)]
pub enum Patch<T> {
    /// Not named: stays as it is.
    #[default]
    Keep,
    /// Null: removed, or back to its default.
    Clear,
    /// Set.
    Set(T),
}

impl<T> Patch<T> {
    /// The value after the patch.
    pub fn over(self, now: T, default: T) -> T {
        match self {
            Self::Keep => now,
            Self::Clear => default,
            Self::Set(value) => value,
        }
    }
}

/// Reader of an object's fields; remembers which were asked for, so that [`Fields::done`] can refuse the rest.
#[derive(Debug)]
pub struct Fields<'v, 'e> {
    map: &'v Map<String, Value>,
    pointer: String,
    known: Vec<&'static str>,
    errors: &'e mut Errors,
}

impl<'v, 'e> Fields<'v, 'e> {
    /// The fields of `node`, which must be an object.
    pub fn open(node: &Node<'v>, errors: &'e mut Errors) -> Option<Self> {
        match node.value {
            Value::Object(map) => {
                Some(Self { map, pointer: node.pointer.clone(), known: Vec::new(), errors })
            }
            _ => {
                errors.wrong_type(node, "an object");
                None
            }
        }
    }

    fn at(&self, name: &str) -> String {
        format!("{}/{}", self.pointer, token(name))
    }

    fn node(&mut self, name: &'static str) -> Option<Node<'v>> {
        self.known.push(name);
        let value = self.map.get(name)?;
        Some(Node { value, pointer: self.at(name) })
    }

    fn missing(&mut self, name: &str) {
        self.errors.add(&self.at(name), "missing", format!("{name:?} is required"));
    }

    /// A field that must be there.
    pub fn required<T: Decode>(&mut self, name: &'static str) -> Option<T> {
        match self.node(name) {
            Some(node) => T::decode(&node, self.errors),
            None => {
                self.missing(name);
                None
            }
        }
    }

    /// A field that may be absent, which stands for `default`.
    pub fn or<T: Decode>(&mut self, name: &'static str, default: T) -> Option<T> {
        match self.node(name) {
            Some(node) => T::decode(&node, self.errors),
            None => Some(default),
        }
    }

    /// Whether a field is there, be it null.
    pub fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// A field that may be absent or null. The outer `None` is a problem, the inner an absent value.
    pub fn optional<T: Decode>(&mut self, name: &'static str) -> Option<Option<T>> {
        match self.node(name) {
            Some(node) if !node.value.is_null() => T::decode(&node, self.errors).map(Some),
            _ => Some(None),
        }
    }

    /// A field that may be absent, and is not null when it is there.
    pub fn optional_not_null<T: Decode>(&mut self, name: &'static str) -> Option<Option<T>> {
        match self.node(name) {
            Some(node) => T::decode(&node, self.errors).map(Some),
            None => Some(None),
        }
    }

    /// A field of a merge patch.
    pub fn patch<T: Decode>(&mut self, name: &'static str) -> Option<Patch<T>> {
        match self.node(name) {
            None => Some(Patch::Keep),
            Some(node) if node.value.is_null() => Some(Patch::Clear),
            Some(node) => T::decode(&node, self.errors).map(Patch::Set),
        }
    }

    /// An integer in `range`, of a merge patch.
    pub fn patch_int(&mut self, name: &'static str, range: RangeInclusive<u64>) -> Option<Patch<u64>> {
        match self.node(name) {
            None => Some(Patch::Keep),
            Some(node) if node.value.is_null() => Some(Patch::Clear),
            Some(node) => self.ranged(&node, range).map(Patch::Set),
        }
    }

    /// An integer in `range`; absent stands for `default`.
    pub fn int_or<T: TryFrom<u64>>(
        &mut self,
        name: &'static str,
        range: RangeInclusive<u64>,
        default: T,
    ) -> Option<T> {
        match self.node(name) {
            Some(node) => self.ranged(&node, range),
            None => Some(default),
        }
    }

    /// An integer in `range`, which may be negative; absent stands for `default`.
    pub fn signed_or(&mut self, name: &'static str, range: RangeInclusive<i8>, default: i8) -> Option<i8> {
        let Some(node) = self.node(name) else { return Some(default) };
        let Value::Number(number) = node.value else {
            self.errors.wrong_type(&node, "an integer");
            return None;
        };
        let (low, high) = (*range.start(), *range.end());
        let value = number.as_f64().filter(|f| f.fract() == 0.0);
        let fitting = value.filter(|f| (f64::from(low)..=f64::from(high)).contains(f)).map(|f| f as i8);
        if fitting.is_none() {
            let detail = format!("{number} is not an integer between {low} and {high}");
            self.errors.add(&node.pointer, "out_of_range", detail);
        }
        fitting
    }

    /// An integer in `range`, which must be there.
    pub fn int<T: TryFrom<u64>>(&mut self, name: &'static str, range: RangeInclusive<u64>) -> Option<T> {
        match self.node(name) {
            Some(node) => self.ranged(&node, range),
            None => {
                self.missing(name);
                None
            }
        }
    }

    /// An integer in `range`, absent or null.
    pub fn optional_int<T: TryFrom<u64>>(
        &mut self,
        name: &'static str,
        range: RangeInclusive<u64>,
    ) -> Option<Option<T>> {
        match self.node(name) {
            Some(node) if !node.value.is_null() => self.ranged(&node, range).map(Some),
            _ => Some(None),
        }
    }

    /// An integer in `range` that may be absent, and is not null when it is there.
    pub fn optional_int_not_null<T: TryFrom<u64>>(
        &mut self,
        name: &'static str,
        range: RangeInclusive<u64>,
    ) -> Option<Option<T>> {
        match self.node(name) {
            Some(node) => self.ranged(&node, range).map(Some),
            None => Some(None),
        }
    }

    fn ranged<T: TryFrom<u64>>(&mut self, node: &Node<'_>, range: RangeInclusive<u64>) -> Option<T> {
        let value = u64::decode(node, self.errors)?;
        let fitting = range.contains(&value).then(|| T::try_from(value).ok()).flatten();
        if fitting.is_none() {
            let (low, high) = (range.start(), range.end());
            self.errors.add(
                &node.pointer,
                "out_of_range",
                format!("{value} is not between {low} and {high}"),
            );
        }
        fitting
    }

    /// The `kind` of a tagged union, one of `kinds`.
    pub fn kind(&mut self, kinds: &[&'static str]) -> Option<&'static str> {
        let kind: String = self.required("kind")?;
        let found = kinds.iter().copied().find(|k| *k == kind);
        if found.is_none() {
            self.errors.add(&self.at("kind"), "unknown_value", unknown(&kind, kinds));
        }
        found
    }

    /// Refuses every field that was not asked for.
    pub fn done(self) -> Option<()> {
        let mut clean = Some(());
        for name in self.map.keys().filter(|n| !self.known.contains(&n.as_str())) {
            let detail = format!("there is no field {:?} here", name.chars().take(64).collect::<String>());
            self.errors.add(&format!("{}/{}", self.pointer, token(name)), "unknown_field", detail);
            clean = None;
        }
        clean
    }
}

fn unknown(value: &str, known: &[&str]) -> String {
    let value: String = value.chars().take(64).collect();
    format!("{value:?} is not one of {}", known.join(", "))
}

/// Decodes a string that is one of a closed list.
pub fn one_of<T: Copy>(node: &Node<'_>, errors: &mut Errors, known: &[(&'static str, T)]) -> Option<T> {
    let text = String::decode(node, errors)?;
    let found = known.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
    if found.is_none() {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        errors.add(&node.pointer, "unknown_value", unknown(&text, &names));
    }
    found
}

impl Decode for String {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        match node.value {
            Value::String(text) => Some(text.clone()),
            _ => {
                errors.wrong_type(node, "a string");
                None
            }
        }
    }
}

impl Decode for bool {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        match node.value {
            Value::Bool(value) => Some(*value),
            _ => {
                errors.wrong_type(node, "a boolean");
                None
            }
        }
    }
}

/// Integers are 0 to 2^53 - 1. `8.0` is one too: to JSON Schema, and to every client that has only doubles.
impl Decode for u64 {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let Value::Number(number) = node.value else {
            errors.wrong_type(node, "an integer");
            return None;
        };
        let integral = number.as_u64().or_else(|| {
            let float = number
                .as_f64()
                .filter(|f| f.fract() == 0.0 && (0.0..=MAX_SAFE_INTEGER as f64).contains(f))?;
            Some(float as u64)
        });
        match integral {
            Some(value) if value <= MAX_SAFE_INTEGER => Some(value),
            _ if number.as_f64().is_some_and(|f| f.fract() != 0.0) => {
                errors.add(&node.pointer, "wrong_type", format!("{number} is not an integer"));
                None
            }
            _ => {
                let detail = format!("{number} is not between 0 and {MAX_SAFE_INTEGER}");
                errors.add(&node.pointer, "out_of_range", detail);
                None
            }
        }
    }
}

impl<T: Decode> Decode for Vec<T> {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let Value::Array(list) = node.value else {
            errors.wrong_type(node, "an array");
            return None;
        };
        let decoded: Vec<Option<T>> = list
            .iter()
            .enumerate()
            .map(|(i, value)| T::decode(&Node { value, pointer: format!("{}/{i}", node.pointer) }, errors))
            .collect();
        decoded.into_iter().collect()
    }
}

impl Decode for BTreeMap<String, Option<String>> {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let Value::Object(map) = node.value else {
            errors.wrong_type(node, "an object");
            return None;
        };
        let decoded: Vec<Option<(String, Option<String>)>> = map
            .iter()
            .map(|(key, value)| {
                let pointer = format!("{}/{}", node.pointer, token(key));
                if value.is_null() {
                    return Some((key.clone(), None));
                }
                String::decode(&Node { value, pointer }, errors).map(|v| (key.clone(), Some(v)))
            })
            .collect();
        decoded.into_iter().collect()
    }
}

impl Decode for BTreeMap<String, String> {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let Value::Object(map) = node.value else {
            errors.wrong_type(node, "an object");
            return None;
        };
        let decoded: Vec<Option<(String, String)>> = map
            .iter()
            .map(|(key, value)| {
                let pointer = format!("{}/{}", node.pointer, token(key));
                String::decode(&Node { value, pointer }, errors).map(|v| (key.clone(), v))
            })
            .collect();
        decoded.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn int(value: &Value) -> Result<u64, String> {
        decode::<u64>(value).map_err(|e| e[0].code.clone())
    }

    #[test]
    fn integers_are_what_json_schema_calls_integers() {
        assert_eq!(int(&json!(8)), Ok(8));
        assert_eq!(int(&json!(8.0)), Ok(8));
        assert_eq!(int(&json!(9_007_199_254_740_991_u64)), Ok(MAX_SAFE_INTEGER));
        assert_eq!(int(&json!(9_007_199_254_740_991.0)), Ok(MAX_SAFE_INTEGER));
        assert_eq!(int(&json!(9_007_199_254_740_992_u64)), Err("out_of_range".into()));
        assert_eq!(int(&json!(-1)), Err("out_of_range".into()));
        assert_eq!(int(&json!(-1.0)), Err("out_of_range".into()));
        assert_eq!(int(&json!(1e300)), Err("out_of_range".into()));
        assert_eq!(int(&json!(8.5)), Err("wrong_type".into()));
        assert_eq!(int(&json!("8")), Err("wrong_type".into()));
        assert_eq!(int(&json!(null)), Err("wrong_type".into()));
    }

    proptest! {
        #[test]
        fn any_safe_integer_comes_through_also_as_a_float(value in 0..=MAX_SAFE_INTEGER) {
            prop_assert_eq!(int(&json!(value)), Ok(value));
            prop_assert_eq!(int(&json!(value as f64)), Ok(value));
        }
    }

    #[test]
    fn pointers_are_escaped_and_short() {
        assert_eq!(token("a/b~c"), "a~1b~0c");
        assert!(token(&"é/".repeat(1000)).len() < 256);
    }
}
