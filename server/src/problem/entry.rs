//! The catalogue as it is read: the problems that requests are answered with, and the library's codes that
//! stand in resources alone.
//!
//! Owns: that every code which can stand in an answer has one entry. Must not know: what is said of a code:
//! `codes` has the words of problems, the library those of its other codes.

use mirrorvm::codes::{AnyCode, Code, Explained, Explanation, THEIR_LOG};

use super::ProblemCode;

/// A code with what is said of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A problem's.
    Problem(ProblemCode),
    /// Of resources, checks and reasons alone.
    Resource(Code, Explanation),
}

impl Entry {
    /// Every entry: first the problems, in their order, then the others in theirs.
    pub fn all() -> impl Iterator<Item = Self> {
        let others = Code::ALL.iter().map(|code| Self::of(*code));
        let problems = ProblemCode::ALL.iter().copied().map(Self::Problem);
        problems.chain(others.filter(|entry| matches!(entry, Self::Resource(..))))
    }

    /// The entry of a code of the library's.
    pub fn of(code: Code) -> Self {
        match code.explained() {
            Explained::Answer(answer) => Self::Problem(answer.into()),
            Explained::Here(explanation) => Self::Resource(code, explanation),
        }
    }

    /// The entry of the code that is spelled so.
    pub fn find(code: &str) -> Option<Self> {
        ProblemCode::parse(code).map(Self::Problem).or_else(|| Code::parse(code).map(Self::of))
    }

    /// The code.
    pub const fn code(self) -> &'static str {
        match self {
            Self::Problem(code) => code.as_str(),
            Self::Resource(code, _) => code.as_str(),
        }
    }

    /// The HTTP status of an answer in which the code stands: a resource is read with 200, whatever has
    /// become of it.
    pub const fn status(self) -> u16 {
        match self {
            Self::Problem(code) => code.status().as_u16(),
            Self::Resource(..) => 200,
        }
    }

    /// Short name, for people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Problem(code) => code.title(),
            Self::Resource(_, of) => of.title(),
        }
    }

    /// Whether the same attempt may work later.
    pub const fn retryable(self) -> bool {
        match self {
            Self::Problem(code) => code.retryable(),
            Self::Resource(_, of) => of.retryable,
        }
    }

    /// What leads to it.
    pub const fn cause(self) -> &'static str {
        match self {
            Self::Problem(code) => code.cause(),
            Self::Resource(_, of) => of.cause,
        }
    }

    /// What to do about it, in sentences.
    pub fn fix(self) -> String {
        match self {
            Self::Problem(code) => code.fix().to_owned(),
            Self::Resource(_, of) => sentence(of.fix),
        }
    }

    /// What to do about a code that may be another build's.
    pub fn fix_of(code: &AnyCode) -> String {
        code.known().map_or_else(|| sentence(THEIR_LOG), |code| Self::of(code).fix())
    }
}

/// Part of a sentence as a sentence of its own.
pub fn sentence(part: &str) -> String {
    let mut rest = part.chars();
    let first = rest.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(rest).chain((!part.ends_with('.')).then_some('.')).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_code_that_the_library_has_is_in_the_catalogue_once() {
        let mut seen = BTreeSet::new();
        for entry in Entry::all() {
            assert!(seen.insert(entry.code()), "{} is there twice", entry.code());
            assert_eq!(Entry::find(entry.code()), Some(entry));
        }
        for code in Code::ALL.iter().copied() {
            let entry = Entry::of(code);
            assert_eq!(entry.code(), code.as_str());
            assert!(seen.contains(code.as_str()), "{code} is not in the catalogue");
            assert!(entry.cause().ends_with('.') && !entry.title().ends_with('.'), "{code}");
            let fix = entry.fix();
            assert!(fix.contains(' ') && fix.ends_with('.') && !fix.starts_with(char::is_lowercase), "{fix}");
            assert!(entry.status() == 200 || entry.status() >= 400, "{code}");
            // What stands in a resource says the same.
            assert_eq!(Entry::fix_of(&code.into()), fix);
        }
        assert_eq!(Entry::find("colour"), None);
        assert_eq!(Entry::fix_of(&AnyCode::from("colour".to_owned())), "Look into the other daemon's log.");
    }
}
