//! Reading what callers wrote as JSON: every problem at once, each with its JSON pointer.
//!
//! Owns: the [`Decode`] trait, the reader of objects, what a problem with a field is. Must not know: any
//! particular body. Serde would stop at the first problem and lose the path inside tagged unions, and a
//! client deserves both. Whatever a driver takes of a definition is read by this, too.

pub mod json;
mod near;
pub mod shape;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use uuid::Uuid;

pub use json::Json;
pub use near::{did_you_mean, nearest, slips};

use json::Integer;

/// Largest integer that every JSON reader keeps exact: 2^53 - 1.
pub const MAX_SAFE_INTEGER: u64 = (1 << 53) - 1;

/// How many problems one answer lists at most.
const ERRORS_MAX: usize = 64;

/// How many characters of a wrong value an answer shows at most.
const SHOWN: usize = 64;

/// Fields that one line names.
const NAMED_MAX: usize = 8;

/// A field of a request and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// RFC 6901 pointer into the request's domain form, e.g. `/memory/blocks/0/size_bytes`.
    pub pointer: String,
    /// Stable code, `snake_case`.
    pub code: &'static str,
    /// What is wrong, with the value.
    pub detail: String,
}

impl FieldError {
    /// Names a field's problem.
    pub fn new(pointer: impl Into<String>, code: &'static str, detail: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), code, detail: detail.into() }
    }

    /// Notes `value` where it is out of its bound.
    pub fn check_bound(
        at: impl Into<String>,
        value: u64,
        bound: &RangeInclusive<u64>,
        errors: &mut Vec<Self>,
    ) {
        if !bound.contains(&value) {
            let detail = format!("{value} is not between {} and {}", bound.start(), bound.end());
            errors.push(Self::new(at, "out_of_range", detail));
        }
    }

    /// Each field with what is wrong with it, in one line: for whoever gets no list.
    pub(crate) fn list(errors: &[Self]) -> String {
        if errors.is_empty() {
            return "a value of the request cannot be used".to_owned();
        }
        let named = errors.iter().take(NAMED_MAX).map(|e| match e.pointer.as_str() {
            "" => e.detail.clone(),
            pointer => format!("{pointer}: {}", e.detail),
        });
        let mut text = named.collect::<Vec<_>>().join("; ");
        if errors.len() > NAMED_MAX {
            text.push_str(&format!("; and {} more", errors.len() - NAMED_MAX));
        }
        text
    }
}

/// The problems that decoding a body has found so far.
#[derive(Debug, Default)]
pub struct Errors(Vec<FieldError>);

impl Errors {
    /// Notes a problem with the value at `pointer`.
    pub fn add(&mut self, pointer: &str, code: &'static str, detail: impl Into<String>) {
        if !self.is_full() {
            self.0.push(FieldError::new(pointer, code, detail));
        }
    }

    /// Adds what was found elsewhere.
    pub fn extend(&mut self, others: impl IntoIterator<Item = FieldError>) {
        let room = ERRORS_MAX - self.0.len();
        self.0.extend(others.into_iter().take(room));
    }

    /// Whether nothing was found.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether what is found from here on is left out.
    fn is_full(&self) -> bool {
        self.0.len() >= ERRORS_MAX
    }

    /// What was found.
    pub fn into_list(self) -> Vec<FieldError> {
        self.0
    }

    fn wrong_type(&mut self, node: &Node<'_>, wanted: &str) {
        let found = match node.value {
            Json::Null => "null",
            Json::Bool(_) => "a boolean",
            Json::Number(_) => "a number",
            Json::String(_) => "a string",
            Json::Array(_) => "an array",
            Json::Object(_) => "an object",
        };
        self.add(&node.pointer, "wrong_type", format!("this is {found}, not {wanted}"));
    }
}

/// A value within the body, with the pointer that leads to it.
#[derive(Debug)]
pub struct Node<'v> {
    value: &'v Json,
    pointer: String,
}

impl<'v> Node<'v> {
    /// A value that is a part of a body, at `pointer` there.
    pub fn at(pointer: impl Into<String>, value: &'v Json) -> Self {
        Self { value, pointer: pointer.into() }
    }

    /// The value itself.
    pub const fn value(&self) -> &'v Json {
        self.value
    }
}

impl Node<'_> {
    fn is_null(&self) -> bool {
        *self.value == Json::Null
    }

    /// The number here, if it is an integer from `low` to `high`. It must be written in digits alone: values
    /// that only a double would round to an integer are refused.
    fn integer(&self, errors: &mut Errors, low: i128, high: i128) -> Option<i128> {
        let Json::Number(text) = self.value else {
            errors.wrong_type(self, "an integer");
            return None;
        };
        let shown: String = text.chars().take(SHOWN).collect();
        match Integer::of(text) {
            Integer::Exact(value) if (low..=high).contains(&value) => return Some(value),
            Integer::Exact(_) | Integer::Huge => {
                let detail = format!("{shown} is not between {low} and {high}");
                errors.add(&self.pointer, "out_of_range", detail);
            }
            Integer::NotOne => {
                let detail = format!("{shown} is not an integer: write {low} to {high} in digits alone");
                errors.add(&self.pointer, "wrong_type", detail);
            }
        }
        None
    }

    /// Notes that the value has the wrong shape.
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
pub fn decode<T: Decode>(value: &Json) -> Result<T, Vec<FieldError>> {
    decode_by(value, T::decode)
}

/// Decodes a whole body by something that knows more than its type.
///
/// # Errors
/// Every problem found.
pub fn decode_by<T>(
    value: &Json,
    by: impl FnOnce(&Node<'_>, &mut Errors) -> Option<T>,
) -> Result<T, Vec<FieldError>> {
    let mut errors = Errors::default();
    let decoded = by(&Node { value, pointer: String::new() }, &mut errors);
    match decoded {
        Some(decoded) if errors.0.is_empty() => Ok(decoded),
        _ => Err(errors.0),
    }
}

/// Escapes `text` for use in a JSON pointer, and cuts it where it gets absurdly long.
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
    /// Set to this value.
    Set(T),
}

impl<T> Patch<T> {
    /// Gives the value that results from patching `now`.
    pub fn over(self, now: T, default: T) -> T {
        match self {
            Self::Keep => now,
            Self::Clear => default,
            Self::Set(value) => value,
        }
    }
}

/// Reader of an object's fields; remembers which were asked for, so that [`Fields::done`] can refuse the
/// rest.
#[derive(Debug)]
pub struct Fields<'v, 'e> {
    map: &'v BTreeMap<String, Json>,
    pointer: String,
    known: Vec<&'static str>,
    errors: &'e mut Errors,
}

impl<'v, 'e> Fields<'v, 'e> {
    /// The fields of `node`, which must be an object.
    pub fn open(node: &Node<'v>, errors: &'e mut Errors) -> Option<Self> {
        match node.value {
            Json::Object(map) => Some(Self { map, pointer: node.pointer.clone(), known: Vec::new(), errors }),
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

    /// A field that must be there, decoded by something that knows more than its type.
    pub fn required_by<T>(
        &mut self,
        name: &'static str,
        by: impl FnOnce(&Node<'_>, &mut Errors) -> Option<T>,
    ) -> Option<T> {
        match self.node(name) {
            Some(node) => by(&node, self.errors),
            None => {
                self.missing(name);
                None
            }
        }
    }

    /// A field whose turn comes later, for what others depend on it for; what is wrong with it is told in its
    /// turn. `None` also when it cannot be read.
    pub fn ahead<T: Decode>(&mut self, name: &'static str) -> Option<T> {
        T::decode(&self.node(name)?, &mut Errors::default())
    }

    /// A field that may be absent, which stands for `default`.
    pub fn or<T: Decode>(&mut self, name: &'static str, default: T) -> Option<T> {
        match self.node(name) {
            Some(node) => T::decode(&node, self.errors),
            None => Some(default),
        }
    }

    /// Whether the field is present, even as null.
    pub fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// A field that may be absent or null. An outer `None` means that there was a problem, an inner one that
    /// there is no value.
    pub fn optional<T: Decode>(&mut self, name: &'static str) -> Option<Option<T>> {
        match self.node(name) {
            Some(node) if !node.is_null() => T::decode(&node, self.errors).map(Some),
            _ => Some(None),
        }
    }

    /// A field that may be absent, but must not be null when it is present.
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
            Some(node) if node.is_null() => Some(Patch::Clear),
            Some(node) => T::decode(&node, self.errors).map(Patch::Set),
        }
    }

    /// An integer in `range`, of a merge patch.
    pub fn patch_int(&mut self, name: &'static str, range: RangeInclusive<u64>) -> Option<Patch<u64>> {
        match self.node(name) {
            None => Some(Patch::Keep),
            Some(node) if node.is_null() => Some(Patch::Clear),
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
        let (low, high) = (i128::from(*range.start()), i128::from(*range.end()));
        node.integer(self.errors, low, high).and_then(|v| i8::try_from(v).ok())
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

    /// An integer in `range`; the field may be absent or null.
    pub fn optional_int<T: TryFrom<u64>>(
        &mut self,
        name: &'static str,
        range: RangeInclusive<u64>,
    ) -> Option<Option<T>> {
        match self.node(name) {
            Some(node) if !node.is_null() => self.ranged(&node, range).map(Some),
            _ => Some(None),
        }
    }

    /// An integer in `range`; the field may be absent, but must not be null when it is present.
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
        // The type's own bound where the range is wider: one statement of what is taken.
        let (low, high) = (i128::from(*range.start()), i128::from(*range.end()));
        let value = node.integer(self.errors, low, high)?;
        let fitting = u64::try_from(value).ok().and_then(|v| T::try_from(v).ok());
        if fitting.is_none() {
            let detail = format!("{value} is not a number of this field's kind");
            self.errors.add(&node.pointer, "out_of_range", detail);
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
            // No more would be listed, and what was meant is not guessed for each of a hundred thousand.
            if self.errors.is_full() {
                return None;
            }
            let meant = did_you_mean(name, self.known.iter().copied().filter(|k| !self.map.contains_key(*k)));
            let shown: String = name.chars().take(64).collect();
            let detail = format!("there is no field {shown:?} here{meant}");
            self.errors.add(&format!("{}/{}", self.pointer, token(name)), "unknown_field", detail);
            clean = None;
        }
        clean
    }
}

fn unknown(value: &str, known: &[&str]) -> String {
    let value: String = value.chars().take(64).collect();
    let meant = did_you_mean(&value, known.iter().copied());
    format!("{value:?} is not one of {}{meant}", known.join(", "))
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
            Json::String(text) => Some(text.clone()),
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
            Json::Bool(value) => Some(*value),
            _ => {
                errors.wrong_type(node, "a boolean");
                None
            }
        }
    }
}

/// Integers are 0 to 2^53 - 1 and written in digits alone, because readers disagree about what `8.0` or `1e0`
/// is.
impl Decode for u64 {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        node.integer(errors, 0, i128::from(MAX_SAFE_INTEGER)).and_then(|v| Self::try_from(v).ok())
    }
}

impl<T: Decode> Decode for Vec<T> {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let Json::Array(list) = node.value else {
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
        let Json::Object(map) = node.value else {
            errors.wrong_type(node, "an object");
            return None;
        };
        let decoded: Vec<Option<(String, Option<String>)>> = map
            .iter()
            .map(|(key, value)| {
                let pointer = format!("{}/{}", node.pointer, token(key));
                if *value == Json::Null {
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
        let Json::Object(map) = node.value else {
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

impl Decode for Uuid {
    fn decode(node: &Node<'_>, errors: &mut Errors) -> Option<Self> {
        let text = String::decode(node, errors)?;
        let id = Self::try_parse(&text).ok();
        if id.is_none() {
            node.invalid(errors, "this is not a UUID");
        }
        id
    }
}

#[cfg(test)]
mod tests {
    use super::json::parse;
    use super::*;
    use proptest::prelude::*;

    fn int(text: &str) -> Result<u64, String> {
        decode::<u64>(&parse(text.as_bytes()).unwrap()).map_err(|e| e[0].code.to_owned())
    }

    #[test]
    fn integers_are_digits_alone() {
        assert_eq!(int("8"), Ok(8));
        assert_eq!(int("9007199254740991"), Ok(MAX_SAFE_INTEGER));
        for big in
            ["9007199254740992", "9007199254740993", "18446744073709551615", "18446744073709551616", "-1"]
        {
            assert_eq!(int(big), Err("out_of_range".into()), "{big}");
        }
        let odd = [
            "67108864.000000001",
            "67108863.9999999999",
            "1e0",
            "-0",
            "0.0",
            "8.0",
            "8.5",
            "-1.0",
            "1e300",
            "1E2",
            "9007199254740991.0",
            "\"8\"",
            "null",
            "true",
        ];
        for text in odd {
            assert_eq!(int(text), Err("wrong_type".into()), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_number_names_it_exactly_and_what_may_be() {
        let detail =
            |text: &str| decode::<u64>(&parse(text.as_bytes()).unwrap()).unwrap_err()[0].detail.clone();
        let taken = format!("0 to {MAX_SAFE_INTEGER}");
        assert_eq!(
            detail("67108864.000000001"),
            format!("67108864.000000001 is not an integer: write {taken} in digits alone")
        );
        assert!(detail("18446744073709551617").starts_with("18446744073709551617 is not between 0 and "));
    }

    proptest! {
        #[test]
        fn any_safe_integer_comes_through(value in 0..=MAX_SAFE_INTEGER) {
            prop_assert_eq!(int(&value.to_string()), Ok(value));
            prop_assert_eq!(int(&format!("{value}.0")), Err("wrong_type".into()));
        }
    }

    #[test]
    fn pointers_are_escaped_and_short() {
        assert_eq!(token("a/b~c"), "a~1b~0c");
        assert!(token(&"é/".repeat(1000)).len() < 256);
    }
}
