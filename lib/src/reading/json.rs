//! Strict JSON: an object that names a key twice is refused, and a number is its text. Readers disagree on
//! which of two keys counts and on what a number beyond a double is, and that is how checks get bypassed.
//!
//! Owns: a value as it was written. Must not know: any particular body.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// A JSON value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Json {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A number as it was written, digit for digit.
    Number(Box<str>),
    /// A string, its escapes undone.
    String(String),
    /// An array.
    Array(Vec<Json>),
    /// An object.
    Object(BTreeMap<String, Json>),
}

/// An integer, as the text of a number says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Integer {
    /// An integer that can be held exactly.
    Exact(i128),
    /// An integer beyond everything that any field accepts.
    Huge,
    /// Not an integer: the text has a fraction, an exponent, or a sign without meaning. What it stands for
    /// would depend on the reader.
    NotOne,
}

impl Integer {
    /// Reads the text of a JSON number.
    pub fn of(text: &str) -> Self {
        let digits = text.strip_prefix('-').unwrap_or(text);
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        if !plain || text == "-0" {
            return Self::NotOne;
        }
        text.parse().map_or(Self::Huge, Self::Exact)
    }
}

/// Reads `bytes` as one JSON value.
///
/// # Errors
/// What is wrong and where, fit for the caller.
pub fn parse(bytes: &[u8]) -> Result<Json, serde_json::Error> {
    let numbers = Numbers(Cell::new(bytes));
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = Reader(&numbers).deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

/// The texts of the numbers that are still to come. The parser reports numbers in the order of the text, and
/// has checked everything before the current one.
struct Numbers<'t>(Cell<&'t [u8]>);

impl Numbers<'_> {
    fn following(&self) -> Box<str> {
        let mut rest = self.0.get();
        loop {
            match rest {
                [b'"', after @ ..] => rest = after_string(after),
                [b'-' | b'0'..=b'9', ..] => break,
                [_, after @ ..] => rest = after,
                [] => break,
            }
        }
        let part = |b: &u8| matches!(b, b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9');
        let end = rest.iter().position(|b| !part(b)).unwrap_or(rest.len());
        let (number, after) = rest.split_at(end);
        self.0.set(after);
        String::from_utf8_lossy(number).into()
    }
}

/// The rest of the text after a string whose opening quote has been consumed.
fn after_string(mut rest: &[u8]) -> &[u8] {
    loop {
        match rest {
            [b'\\', _, after @ ..] | [b'\\', after @ ..] => rest = after,
            [b'"', after @ ..] => return after,
            [_, after @ ..] => rest = after,
            [] => return rest,
        }
    }
}

#[derive(Clone, Copy)]
struct Reader<'n, 't>(&'n Numbers<'t>);

impl Reader<'_, '_> {
    fn number(self) -> Json {
        Json::Number(self.0.following())
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'_, '_> {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Json, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_, '_> {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Json, E> {
        Ok(Json::Bool(v))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Json, E> {
        Ok(self.number())
    }

    fn visit_u64<E>(self, _: u64) -> Result<Json, E> {
        Ok(self.number())
    }

    fn visit_f64<E>(self, _: f64) -> Result<Json, E> {
        Ok(self.number())
    }

    fn visit_str<E>(self, v: &str) -> Result<Json, E> {
        Ok(Json::String(v.to_owned()))
    }

    fn visit_string<E>(self, v: String) -> Result<Json, E> {
        Ok(Json::String(v))
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = seq.next_element_seed(self)? {
            list.push(value);
        }
        Ok(Json::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Json, A::Error> {
        let mut map = BTreeMap::new();
        while let Some(key) = access.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format_args!("key {key:?} is there twice")));
            }
            let value = access.next_value_seed(self)?;
            map.insert(key, value);
        }
        Ok(Json::Object(map))
    }
}

impl From<&serde_json::Value> for Json {
    fn from(value: &serde_json::Value) -> Self {
        use serde_json::Value;
        match value {
            Value::Null => Self::Null,
            Value::Bool(value) => Self::Bool(*value),
            Value::Number(number) => Self::Number(number.to_string().into()),
            Value::String(text) => Self::String(text.clone()),
            Value::Array(list) => Self::Array(list.iter().map(Self::from).collect()),
            Value::Object(map) => Self::Object(map.iter().map(|(k, v)| (k.clone(), Self::from(v))).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// Whether both values are equal, comparing numbers by their value.
    fn same(one: &Json, other: &Value) -> bool {
        match (one, other) {
            (Json::Null, Value::Null) => true,
            (Json::Bool(a), Value::Bool(b)) => a == b,
            // By the text first: reading a double back may miss its last bit.
            (Json::Number(a), Value::Number(b)) => {
                **a == *b.to_string() || serde_json::from_str::<Value>(a).unwrap() == *other
            }
            (Json::String(a), Value::String(b)) => a == b,
            (Json::Array(a), Value::Array(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
            }
            (Json::Object(a), Value::Object(b)) => {
                a.len() == b.len() && a.iter().all(|(k, v)| b.get(k).is_some_and(|b| same(v, b)))
            }
            _ => false,
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[a-z0-9\"\\\\{}:,. -]{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map("[a-z0-9\"\\\\-]{0,4}", inner, 0..4)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn agrees_with_serde_json_where_that_has_no_choice(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(value) = parse(&bytes) {
                prop_assert!(same(&value, &serde_json::from_slice::<Value>(&bytes).unwrap()));
            }
        }

        #[test]
        fn every_number_is_the_text_at_its_own_place(value in any_value(), pretty in any::<bool>()) {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            prop_assert!(same(&parse(text.unwrap().as_bytes()).unwrap(), &value));
        }
    }

    #[test]
    fn numbers_are_kept_as_they_were_written() {
        let texts = ["1e0", "-0", "0.0", "67108864.000000001", "18446744073709551616", "1E+2", "-7", "12"];
        let body = format!(r#"{{"1": "2\"3", "a": [{}], "z": {{"b": 5}}}}"#, texts.join(" ,\n"));
        let Json::Object(map) = parse(body.as_bytes()).unwrap() else { panic!() };
        let numbers: Vec<Json> = texts.iter().map(|t| Json::Number((*t).into())).collect();
        assert_eq!(map["a"], Json::Array(numbers));
        assert_eq!(map["z"], Json::Object([("b".to_owned(), Json::Number("5".into()))].into()));
    }

    #[test]
    fn an_integer_is_digits_alone() {
        for (text, integer) in [("0", 0), ("-7", -7), ("18446744073709551616", 1 << 64)] {
            assert_eq!(Integer::of(text), Integer::Exact(integer), "{text}");
        }
        assert_eq!(Integer::of(&"9".repeat(60)), Integer::Huge);
        for text in ["-0", "0.0", "1e0", "1E2", "2.5", "67108864.000000001", "1e-1", "-", ""] {
            assert_eq!(Integer::of(text), Integer::NotOne, "{text}");
        }
    }

    #[test]
    fn a_key_twice_and_deep_nesting_are_refused() {
        assert!(parse(br#"{"a":1,"a":1}"#).unwrap_err().to_string().contains("twice"));
        assert!(parse(br#"{"a":1,"\u0061":1}"#).unwrap_err().to_string().contains("twice"));
        assert!(parse(br#"[{"a":{"b":1,"b":2}}]"#).is_err());
        assert!(parse("[".repeat(10_000).as_bytes()).is_err());
        for bad in
            [&b"{} x"[..], b"\xef\xbb\xbf{}", b"\"\xff\"", b"\"\\ud800\"", b"01", b"+1", b"1e999", b"NaN"]
        {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
