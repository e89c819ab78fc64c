//! A code that somebody else may have given.
//!
//! Owns: telling the codes of this build from others, of which none is lost. Must not know: what they are
//! about.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Code;

/// Longest code that is taken from a peer.
const LONGEST: usize = 64;

/// A code as a peer says it or a record has it: another build may have codes that this one does not know.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum AnyCode {
    /// One of this build's.
    Known(Code),
    /// Another's, as it was given.
    Other(Box<str>),
}

impl AnyCode {
    /// The code as it is published.
    pub const fn as_str(&self) -> &str {
        match self {
            Self::Known(code) => code.as_str(),
            Self::Other(code) => code,
        }
    }

    /// This build's code, if it is one.
    pub const fn known(&self) -> Option<Code> {
        match self {
            Self::Known(code) => Some(*code),
            Self::Other(_) => None,
        }
    }

    /// A stranger's code, which is shown to people and kept: 1 to 64 of `[a-z0-9_]`, or
    /// [`Code::PeerRefused`].
    #[must_use]
    pub fn bounded(self) -> Self {
        let text = self.as_str();
        let legal = (1..=LONGEST).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if legal { self } else { Self::Known(Code::PeerRefused) }
    }
}

impl<C: Into<Code>> From<C> for AnyCode {
    fn from(code: C) -> Self {
        Self::Known(code.into())
    }
}

impl PartialEq<Code> for AnyCode {
    fn eq(&self, code: &Code) -> bool {
        self.known() == Some(*code)
    }
}

impl From<String> for AnyCode {
    fn from(code: String) -> Self {
        Code::parse(&code).map_or_else(|| Self::Other(code.into_boxed_str()), Self::Known)
    }
}

impl From<AnyCode> for String {
    fn from(code: AnyCode) -> Self {
        code.as_str().to_owned()
    }
}

impl fmt::Display for AnyCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_that_nobody_knows_here_keeps_its_name() {
        let read = |text: &str| serde_json::from_str::<AnyCode>(text).unwrap();
        assert_eq!(read("\"no_memory\""), Code::NoMemory);
        let colour = read("\"colour\"");
        assert_eq!((colour.as_str(), colour.known()), ("colour", None));
        for code in [read("\"no_memory\""), colour, read("\"Go Away!\"")] {
            assert_eq!(serde_json::to_string(&code).unwrap(), format!("\"{code}\""));
        }
    }

    #[test]
    fn what_a_stranger_gives_for_a_code_is_one_or_gives_way() {
        let bounded = |text: &str| AnyCode::from(text.to_owned()).bounded();
        for text in ["no_memory", "colour", "x9", &"a".repeat(64)] {
            assert_eq!(bounded(text).as_str(), text);
        }
        for text in ["", "Go Away!", "a-b", "\u{e4}", &"a".repeat(65)] {
            assert_eq!(bounded(text), Code::PeerRefused, "{text}");
        }
    }
}
