//! Parts of a definition that are read, stored and documented from one statement of their fields.
//!
//! Owns: the macros that make of such a statement a type, its [`Decode`], its serde form and its schema. Must
//! not know: any particular part.
//!
//! ```text
//! shape! {
//!     "QemuThing", "What it is.":
//!     pub struct Thing {
//!         req name: String = "Its name.", {"example": "root"};
//!         opt note: String = "A note.", {};
//!         or(true) on: bool = "Whether it is on.", {};
//!         or(1)[1..=16] count: u32 = "How many.", {};
//!         list parts: Vec<Part> = "Its parts.", {};
//!     }
//! }
//! ```

use serde_json::{Map, Value, json};

use super::{Decode, MAX_SAFE_INTEGER};

/// A value with a schema.
pub trait Shape: Decode {
    /// Its schema: a reference where it is a component.
    fn schema() -> Value;

    /// The components that the schema refers to, with theirs.
    fn components(list: &mut Vec<(&'static str, Value)>) {
        let _ = list;
    }
}

impl Shape for String {
    fn schema() -> Value {
        json!({"type": "string"})
    }
}

impl Shape for bool {
    fn schema() -> Value {
        json!({"type": "boolean"})
    }
}

impl Shape for u64 {
    fn schema() -> Value {
        json!({"type": "integer", "format": "int64", "minimum": 0, "maximum": MAX_SAFE_INTEGER})
    }
}

/// Integers of 32 bits; decoded by a field's own range ([`super::Fields::int`]).
impl Decode for u32 {
    fn decode(node: &super::Node<'_>, errors: &mut super::Errors) -> Option<Self> {
        node.integer(errors, 0, i128::from(Self::MAX)).and_then(|v| Self::try_from(v).ok())
    }
}

impl Shape for u32 {
    fn schema() -> Value {
        json!({"type": "integer", "format": "int32", "minimum": 0})
    }
}

impl<T: Shape> Shape for Vec<T> {
    fn schema() -> Value {
        json!({"type": "array", "items": T::schema()})
    }

    fn components(list: &mut Vec<(&'static str, Value)>) {
        T::components(list);
    }
}

/// Schema of a field: its type's, with what is said of the field; `default` makes it one that may be left
/// out.
pub fn field(schema: Value, description: &str, more: Value, default: Option<Value>) -> Value {
    let mut schema = schema;
    let Value::Object(map) = &mut schema else { return schema };
    map.insert("description".into(), description.into());
    if let Value::Object(more) = more {
        map.extend(more);
    }
    if let Some(default) = default {
        map.insert("default".into(), default);
    }
    schema
}

/// Schema of a field that may be absent or null.
pub fn optional(schema: Value, description: &str, more: Value) -> Value {
    let plain = schema.get("type").is_some_and(Value::is_string);
    let schema = if plain {
        let mut schema = schema;
        let kind = schema["type"].take();
        schema["type"] = json!([kind, "null"]);
        schema
    } else {
        json!({"oneOf": [schema, {"type": "null"}]})
    };
    field(schema, description, more, None)
}

/// Schema of an object.
pub fn object(description: &str, properties: Map<String, Value>, required: &[&str]) -> Value {
    let mut schema = json!({
        "additionalProperties": false,
        "description": description,
        "properties": properties,
        "type": "object",
    });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

/// A reference to a component.
pub fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

/// Notes a component, once.
pub fn component(list: &mut Vec<(&'static str, Value)>, name: &'static str, schema: impl FnOnce() -> Value) {
    if !list.iter().any(|(known, _)| *known == name) {
        list.push((name, schema()));
    }
}

/// A struct with its reading, its form and its schema.
macro_rules! shape {
    (
        $component:literal, $about:literal:
        pub struct $name:ident {
            $( $kind:ident $(($default:expr))? $([$range:expr])? $field:ident : $ty:ty = $text:literal, $more:tt ; )*
        }
    ) => {
        #[doc = $about]
        #[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
        pub struct $name {
            $(
                #[doc = $text]
                pub $field: crate::reading::shape::shape!(@type $kind $ty),
            )*
        }

        impl $name {
            /// Reads its fields, whoever has opened the object.
            pub fn read(fields: &mut crate::reading::Fields<'_, '_>) -> Option<Self> {
                $( let $field = crate::reading::shape::shape!(
                    @read fields, stringify!($field), $kind $(($default))? $(range [$range])? $ty); )*
                Some(Self { $( $field: $field?, )* })
            }

            /// Schemas of its fields.
            #[must_use]
            pub fn properties() -> serde_json::Map<String, serde_json::Value> {
                let mut properties = serde_json::Map::new();
                $(
                    #[allow(unused_mut, reason = "not every field has a range")]
                    let mut schema = <$ty as crate::reading::shape::Shape>::schema();
                    $(
                        schema["minimum"] = serde_json::json!($range.start());
                        schema["maximum"] = serde_json::json!($range.end());
                    )?
                    let schema = crate::reading::shape::shape!(
                        @schema schema, $text, $more, $kind $(($default))?);
                    properties.insert(stringify!($field).to_owned(), schema);
                )*
                properties
            }

            /// Names of the fields that must be there.
            #[must_use]
            pub fn required() -> Vec<&'static str> {
                let all = [$( (stringify!($field), stringify!($kind) == "req") ),*];
                all.into_iter().filter(|(_, required)| *required).map(|(name, _)| name).collect()
            }

            /// Components that its fields refer to.
            pub fn parts(list: &mut Vec<(&'static str, serde_json::Value)>) {
                let _ = &list;
                $( <$ty as crate::reading::shape::Shape>::components(list); )*
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            /// As a caller's definition is read, so that what a later build adds has its default in what an
            /// earlier one wrote.
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let value = serde_json::Value::deserialize(deserializer)?;
                let read = crate::reading::decode::<Self>(&crate::reading::Json::from(&value));
                read.map_err(|errors| serde::de::Error::custom(crate::reading::FieldError::list(&errors)))
            }
        }

        impl crate::reading::Decode for $name {
            fn decode(node: &crate::reading::Node<'_>, errors: &mut crate::reading::Errors) -> Option<Self> {
                let mut fields = crate::reading::Fields::open(node, errors)?;
                let read = Self::read(&mut fields);
                fields.done()?;
                read
            }
        }

        impl crate::reading::shape::Shape for $name {
            fn schema() -> serde_json::Value {
                crate::reading::shape::reference($component)
            }

            fn components(list: &mut Vec<(&'static str, serde_json::Value)>) {
                crate::reading::shape::component(list, $component, || {
                    crate::reading::shape::object($about, Self::properties(), &Self::required())
                });
                Self::parts(list);
            }
        }
    };
    (@type opt $ty:ty) => { Option<$ty> };
    (@type $kind:ident $ty:ty) => { $ty };
    (@read $fields:ident, $name:expr, req range [$range:expr] $ty:ty) => { $fields.int::<$ty>($name, $range) };
    (@read $fields:ident, $name:expr, req $ty:ty) => { $fields.required::<$ty>($name) };
    (@read $fields:ident, $name:expr, opt range [$range:expr] $ty:ty) => {
        $fields.optional_int::<$ty>($name, $range)
    };
    (@read $fields:ident, $name:expr, opt $ty:ty) => { $fields.optional::<$ty>($name) };
    (@read $fields:ident, $name:expr, or($default:expr) range [$range:expr] $ty:ty) => {
        $fields.int_or::<$ty>($name, $range, $default)
    };
    (@read $fields:ident, $name:expr, or($default:expr) $ty:ty) => { $fields.or::<$ty>($name, $default) };
    (@read $fields:ident, $name:expr, list $ty:ty) => { $fields.or::<$ty>($name, Vec::new()) };
    (@schema $schema:ident, $text:literal, $more:tt, opt) => {
        crate::reading::shape::optional($schema, $text, serde_json::json!($more))
    };
    (@schema $schema:ident, $text:literal, $more:tt, or($default:expr)) => {
        crate::reading::shape::field($schema, $text, serde_json::json!($more), Some(serde_json::json!($default)))
    };
    (@schema $schema:ident, $text:literal, $more:tt, $kind:ident) => {
        crate::reading::shape::field($schema, $text, serde_json::json!($more), None)
    };
}

/// An enum of names that are written in definitions, with its reading, its form and its schema.
macro_rules! word {
    (
        $component:literal, $about:literal:
        pub enum $name:ident { $($(#[$doc:meta])* $value:ident = $word:literal,)+ }
    ) => {
        crate::named::named! {
            #[doc = $about]
            #[derive(Clone, Copy, Debug, PartialEq, Eq)]
            pub enum $name { $($(#[$doc])* $value = $word,)+ }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.name())
            }
        }

        impl crate::reading::Decode for $name {
            fn decode(node: &crate::reading::Node<'_>, errors: &mut crate::reading::Errors) -> Option<Self> {
                crate::reading::one_of(node, errors, &[$(($word, Self::$value)),+])
            }
        }

        impl crate::reading::shape::Shape for $name {
            fn schema() -> serde_json::Value {
                crate::reading::shape::reference($component)
            }

            fn components(list: &mut Vec<(&'static str, serde_json::Value)>) {
                crate::reading::shape::component(list, $component, || {
                    serde_json::json!({"description": $about, "type": "string", "enum": Self::NAMES})
                });
            }
        }
    };
}

/// The same value without members that say nothing, at any depth.
pub fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            map.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k, without_nulls(v))).collect()
        }
        Value::Array(list) => list.into_iter().map(without_nulls).collect(),
        other => other,
    }
}

pub(crate) use {shape, word};
