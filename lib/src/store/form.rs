//! How a document looks on disk: a form of its own, apart from the type that the program works with.
//!
//! Owns: what a form is, the versions of forms, reading one of an earlier version. Must not know: any
//! document.
//!
//! A form says which version it is of: the version of the database that brought it. It is strict: a member
//! that it does not know, one that is missing, and a value that it has no meaning for are errors that name
//! them. Forms are made by taking their type apart member by member, so that a type with a new member does
//! not compile before its form has it. Why so: docs/decisions/0029-stored-forms.md.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use uuid::Uuid;

/// The version of documents that say none: forms began with the version after it.
pub const UNSAID: u64 = 4;

/// A type that is stored as part of a document, or as one.
pub trait Part: Sized {
    /// What of it is on disk.
    type Form: Serialize + DeserializeOwned;

    /// Its form.
    fn form(&self) -> Self::Form;

    /// What has this form.
    ///
    /// # Errors
    /// Values that cannot be.
    fn of(form: Self::Form) -> Result<Self, Wrong>;
}

/// A type that is stored by itself. Its form has a member `version`.
pub trait Document: Part {
    /// The version of its form.
    const VERSION: u64;

    /// Changes a document of version `from`, which is earlier, such that it can be read as this one; the
    /// member `version` is seen to. What it makes of a document that is none is found out by who reads it.
    fn forward(from: u64, document: &mut Value) {
        let _ = (from, document);
    }
}

/// A value in a document that means nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    at: String,
    why: String,
}

impl Wrong {
    /// What is wrong with a value: a clause.
    pub fn new(why: impl fmt::Display) -> Self {
        Self { at: String::new(), why: why.to_string() }
    }

    /// The same within the member `name` of something.
    #[must_use]
    pub fn within(mut self, name: &str) -> Self {
        self.at.insert_str(0, &format!("/{name}"));
        self
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.at.is_empty() { f.write_str(&self.why) } else { write!(f, "{}: {}", self.at, self.why) }
    }
}

impl std::error::Error for Wrong {}

/// Why a document cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    /// No JSON, a member that the form does not have or that is missing, a value of another type.
    #[error(
        "it is not what version {version} of it looks like; `mirrorvmd state restore` puts a backup of the state back"
    )]
    Malformed {
        /// The version of the form that it was read as.
        version: u64,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
    /// A value that cannot be.
    #[error("a value of it cannot be; `mirrorvmd state restore` puts a backup of the state back")]
    Wrong(#[source] Wrong),
    /// It was written by a later build.
    #[error(
        "it is of version {found}, and this build reads up to {known}: run the build that wrote it, or put a backup back \
         that this one made"
    )]
    Later {
        /// Its version.
        found: u64,
        /// The latest that this build reads.
        known: u64,
    },
}

/// A form's version: a number on disk that is this one and no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version<const N: u64>;

impl<const N: u64> Serialize for Version<N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(N)
    }
}

impl<'de, const N: u64> Deserialize<'de> for Version<N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let found = u64::deserialize(deserializer)?;
        if found == N {
            return Ok(Self);
        }
        Err(serde::de::Error::custom(format_args!("version {found} where version {N} is expected")))
    }
}

/// A document as it goes to the disk.
///
/// # Errors
/// Whatever keeps it from being JSON.
pub fn write<T: Document>(document: &T) -> Result<String, serde_json::Error> {
    serde_json::to_string(&document.form())
}

/// Bytes that something takes on disk.
pub(crate) fn length<T: Part>(part: &T) -> usize {
    serde_json::to_vec(&part.form()).map_or(0, |text| text.len())
}

/// Reads a document of this or an earlier version.
///
/// # Errors
/// [`Unread`].
pub fn read<T: Document>(body: &[u8]) -> Result<T, Unread> {
    let form = match serde_json::from_slice::<T::Form>(body) {
        Ok(form) => form,
        Err(error) => earlier::<T>(body, error)?,
    };
    T::of(form).map_err(Unread::Wrong)
}

/// The document in the form of this build; `None`: that is how it is.
///
/// # Errors
/// [`Unread`].
pub fn renewed<T: Document>(body: &[u8]) -> Result<Option<String>, Unread> {
    let malformed = |source| Unread::Malformed { version: T::VERSION, source };
    let text = write(&read::<T>(body)?).map_err(malformed)?;
    Ok((text.as_bytes() != body).then_some(text))
}

fn earlier<T: Document>(body: &[u8], error: serde_json::Error) -> Result<T::Form, Unread> {
    let malformed = |version, source| Unread::Malformed { version, source };
    let mut document: Value = serde_json::from_slice(body).map_err(|source| malformed(T::VERSION, source))?;
    let found = version_of(&document);
    if found == T::VERSION {
        return Err(malformed(found, error));
    }
    bring::<T>(&mut document)?;
    serde_json::from_value(document).map_err(|source| malformed(found, source))
}

fn version_of(document: &Value) -> u64 {
    document.get("version").map_or(UNSAID, |said| said.as_u64().unwrap_or(u64::MAX))
}

/// Changes a document of an earlier version such that it can be read as one of this.
///
/// # Errors
/// [`Unread::Later`].
pub(crate) fn bring<T: Document>(document: &mut Value) -> Result<(), Unread> {
    let found = version_of(document);
    if found > T::VERSION {
        return Err(Unread::Later { found, known: T::VERSION });
    }
    if found < T::VERSION {
        T::forward(found, document);
        if let Some(members) = document.as_object_mut() {
            members.insert("version".into(), T::VERSION.into());
        }
    }
    Ok(())
}

/// Of a document that has not changed but for its version.
pub(crate) fn unchanged(_from: u64, _document: &mut Value) {}

/// Gives a document the members that it did not have to have.
pub fn fill<const N: usize>(document: &mut Value, missing: [(&str, Value); N]) {
    if let Some(members) = document.as_object_mut() {
        for (name, value) in missing {
            members.entry(name).or_insert(value);
        }
    }
}

/// Reads a member that has to be there, be it null.
///
/// # Errors
/// What is there is of another type.
pub fn there<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    T::deserialize(deserializer)
}

/// Types that are their own form: numbers, texts, times, and what has a text of its own everywhere.
macro_rules! leaves {
    ($($leaf:ty),+ $(,)?) => {$(
        impl $crate::store::form::Part for $leaf {
            type Form = Self;

            fn form(&self) -> Self {
                self.clone()
            }

            fn of(form: Self) -> Result<Self, $crate::store::form::Wrong> {
                Ok(form)
            }
        }
    )+};
}

leaves!(bool, i8, u8, u16, u32, u64, i64, f64, String, Uuid, Timestamp, [u8; 32]);
leaves!(BTreeMap<String, String>, Map<String, Value>);

impl<T: Part> Part for Option<T> {
    type Form = Option<T::Form>;

    fn form(&self) -> Self::Form {
        self.as_ref().map(T::form)
    }

    fn of(form: Self::Form) -> Result<Self, Wrong> {
        form.map(T::of).transpose()
    }
}

impl<T: Part> Part for Vec<T> {
    type Form = Vec<T::Form>;

    fn form(&self) -> Self::Form {
        self.iter().map(T::form).collect()
    }

    fn of(form: Self::Form) -> Result<Self, Wrong> {
        let each = form.into_iter().enumerate();
        each.map(|(at, form)| T::of(form).map_err(|wrong| wrong.within(&at.to_string()))).collect()
    }
}

impl<T: Part> Part for Box<T> {
    type Form = Box<T::Form>;

    fn form(&self) -> Self::Form {
        Box::new(T::form(self))
    }

    fn of(form: Self::Form) -> Result<Self, Wrong> {
        T::of(*form).map(Box::new)
    }
}

/// The form of a type with members: all of them, by name, in the order in which they are written. Those that
/// are `live` are not stored. With a version it is the form of a document; what leads there from earlier
/// ones is then given, too.
macro_rules! form {
    ($form:ident of $domain:ident { $($field:ident: $part:ty),+ $(,)? }) => {
        $crate::store::form::form!(@part $form of $domain; {} { $($field: $part),+ } {});
    };
    (
        $form:ident of $domain:ident, version $version:literal by $forward:path
        { $($field:ident: $part:ty),+ $(,)? } $(live { $($live:ident),+ })?
    ) => {
        $crate::store::form::form!(
            @part $form of $domain; { version: $version } { $($field: $part),+ } { $($($live),+)? }
        );

        impl $crate::store::form::Document for $domain {
            const VERSION: u64 = $version;

            fn forward(from: u64, document: &mut serde_json::Value) {
                $forward(from, document);
            }
        }
    };
    (
        @part $form:ident of $domain:ident; { $($label:ident: $version:literal)? }
        { $($field:ident: $part:ty),+ } { $($live:ident),* }
    ) => {
        #[doc = concat!("The form of [`", stringify!($domain), "`].")]
        #[derive(serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $form {
            $($label: $crate::store::form::Version<$version>,)?
            $(
                #[serde(deserialize_with = "crate::store::form::there")]
                $field: <$part as $crate::store::form::Part>::Form,
            )+
        }

        impl $crate::store::form::Part for $domain {
            type Form = $form;

            fn form(&self) -> $form {
                let Self { $($field,)+ $($live: _,)* } = self;
                $form {
                    $($label: $crate::store::form::Version,)?
                    $($field: <$part as $crate::store::form::Part>::form($field),)+
                }
            }

            fn of(form: $form) -> Result<Self, $crate::store::form::Wrong> {
                let $form { $($label: _,)? $($field,)+ } = form;
                Ok(Self {
                    $($field: <$part as $crate::store::form::Part>::of($field)
                        .map_err(|wrong| wrong.within(stringify!($field)))?,)+
                    $($live: Default::default(),)*
                })
            }
        }
    };
}

/// The form of a type that is one of some words.
macro_rules! words {
    ($form:ident of $domain:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        #[doc = concat!("The form of [`", stringify!($domain), "`].")]
        #[derive(Clone, Copy, serde::Serialize, serde::Deserialize)]
        pub enum $form {
            $(
                #[doc = concat!("`", $word, "`")]
                #[serde(rename = $word)]
                $variant,
            )+
        }

        #[cfg(test)]
        impl $form {
            /// What has a word.
            pub const ALL: &[$domain] = &[$($domain::$variant),+];
        }

        impl $crate::store::form::Part for $domain {
            type Form = $form;

            fn form(&self) -> $form {
                match self {
                    $(Self::$variant => $form::$variant,)+
                }
            }

            fn of(form: $form) -> Result<Self, $crate::store::form::Wrong> {
                Ok(match form {
                    $($form::$variant => Self::$variant,)+
                })
            }
        }
    };
}

pub(crate) use {form, leaves, words};
