//! Query parameters: each known one at most once (or listed as repeatable), unknown ones refused.

use std::convert::Infallible;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{Extensions, Uri};
use mirrorvm::reading::did_you_mean;

use crate::api::labels::{self, Selector};
use crate::api::page::{self, LIMIT_DEFAULT, LIMIT_MAX, Order, PageRequest, Scope};
use crate::problem::{Problem, ProblemCode, ProblemError};

/// Longest long poll, in seconds.
pub const WAIT_MAX: u64 = 60;

type Pairs = Vec<(String, String)>;

/// The decoded query of a request. It is decoded once: everybody who looks at the request takes it from the
/// extensions.
#[derive(Clone, Debug)]
pub struct Query(Arc<Result<Pairs, Problem>>);

impl<S: Sync> FromRequestParts<S> for Query {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self::of(&parts.uri, &mut parts.extensions))
    }
}

impl Query {
    /// The query of the request with these extensions, which keep it.
    pub fn of(uri: &Uri, extensions: &mut Extensions) -> Self {
        if let Some(decoded) = extensions.get::<Self>() {
            return decoded.clone();
        }
        let decoded = Self(Arc::new(decode(uri.query().unwrap_or(""))));
        extensions.insert(decoded.clone());
        decoded
    }

    /// Whether the request is a dry run. A query that says so twice, or cannot be read, does not count: it
    /// will be refused.
    pub fn wants_dry_run(&self) -> bool {
        let Ok(pairs) = &*self.0 else { return false };
        let mut said = pairs.iter().filter(|(name, _)| name == DRY_RUN);
        said.next().is_some_and(|(_, value)| matches!(value.as_str(), "true" | "1")) && said.next().is_none()
    }

    /// The query in one form however it was written: each name and value escaped in the same way.
    pub fn canonical(&self) -> String {
        let Ok(pairs) = &*self.0 else { return String::new() };
        let pair = |(name, value): &(String, String)| format!("{}={}", escape(name), escape(value));
        pairs.iter().map(pair).collect::<Vec<_>>().join("&")
    }

    /// As [`Query::read`], with a bare `name` read as `name=true`: how health checks are asked for details.
    ///
    /// # Errors
    /// As there.
    pub fn read_flag(&self, name: &str) -> Result<Parameters, Problem> {
        let mut parameters = self.read()?;
        for (n, value) in &mut parameters.pairs {
            if n == name && value.is_empty() {
                "true".clone_into(value);
            }
        }
        Ok(parameters)
    }

    /// Splits and decodes the query.
    ///
    /// # Errors
    /// `malformed_request` when it has a broken escape or is not UTF-8.
    pub fn read(&self) -> Result<Parameters, Problem> {
        (*self.0).clone().map(Parameters::of)
    }
}

/// The parameter of dry runs.
pub const DRY_RUN: &str = "dry_run";

fn decode(query: &str) -> Result<Pairs, Problem> {
    let bad = || {
        let detail = "the query has a broken percent escape, or is not UTF-8: write %25 for a percent sign";
        Problem::new(ProblemCode::MalformedRequest, detail)
    };
    let pairs = query.split('&').filter(|p| !p.is_empty()).map(|p| {
        let (name, value) = p.split_once('=').unwrap_or((p, ""));
        Some((unescape(name)?, unescape(value)?))
    });
    pairs.collect::<Option<_>>().ok_or_else(bad)
}

/// A path in one form however it was written: each segment escaped in the same way. Unchanged where it cannot
/// be decoded.
pub fn canonical_path(path: &str) -> String {
    // A plus is one in a path.
    let segment = |s: &str| unescape(&s.replace('+', "%2B")).map_or_else(|| s.to_owned(), |s| escape(&s));
    path.split('/').map(segment).collect::<Vec<_>>().join("/")
}

/// Decoded parameters; taking one removes it.
#[derive(Debug)]
pub struct Parameters {
    pairs: Vec<(String, String)>,
    /// The names of what was asked for.
    known: Vec<String>,
    errors: Vec<ProblemError>,
}

impl Parameters {
    const fn of(pairs: Pairs) -> Self {
        Self { pairs, known: Vec::new(), errors: Vec::new() }
    }

    /// All values of a repeatable parameter.
    pub fn all(&mut self, name: &str) -> Vec<String> {
        self.known.push(name.to_owned());
        let (taken, rest) = std::mem::take(&mut self.pairs).into_iter().partition(|(n, _)| n == name);
        self.pairs = rest;
        let taken: Vec<(String, String)> = taken;
        taken.into_iter().map(|(_, value)| value).collect()
    }

    /// The value of a parameter that may be given only once.
    pub fn one(&mut self, name: &str) -> Option<String> {
        let mut values = self.all(name);
        if values.len() > 1 {
            self.problem(ProblemError::at_parameter(name, "duplicate", format!("{name} is given twice")));
        }
        values.pop()
    }

    /// Notes a problem with a parameter.
    pub fn problem(&mut self, error: ProblemError) {
        self.errors.push(error);
    }

    /// An integer between `low` and `high`.
    pub fn int<T: FromStr + PartialOrd + std::fmt::Display>(
        &mut self,
        name: &str,
        low: T,
        high: T,
    ) -> Option<T> {
        let text = self.one(name)?;
        let digits = !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
        let value = digits.then(|| text.parse().ok()).flatten().filter(|v| *v >= low && *v <= high);
        if value.is_none() {
            let detail = format!("{} is not an integer between {low} and {high}", shown(&text));
            self.problem(ProblemError::at_parameter(name, "out_of_range", detail));
        }
        value
    }

    /// The long poll's `wait`: seconds with the unit, as `30s`.
    pub fn wait(&mut self) -> Duration {
        let Some(text) = self.one("wait") else { return Duration::ZERO };
        let seconds = text
            .strip_suffix('s')
            .filter(|n| !n.is_empty() && n.len() <= 2 && n.bytes().all(|c| c.is_ascii_digit()))
            .and_then(|n| n.parse::<u64>().ok())
            .filter(|n| *n <= WAIT_MAX);
        if seconds.is_none() {
            let detail = format!("{} is not 0s to {WAIT_MAX}s, as 30s", shown(&text));
            self.problem(ProblemError::at_parameter("wait", "invalid_format", detail));
        }
        Duration::from_secs(seconds.unwrap_or(0))
    }

    /// A parameter that is `true` or `false`, or `1` or `0`, as some languages write them. Absent means
    /// false.
    pub fn flag(&mut self, name: &str) -> bool {
        match self.one(name).as_deref() {
            None | Some("false" | "0") => false,
            Some("true" | "1") => true,
            Some(text) => {
                let detail = format!("{} is not true or false", shown(text));
                self.problem(ProblemError::at_parameter(name, "invalid_format", detail));
                false
            }
        }
    }

    /// The label selectors: `label=key=value` or `label=key`, repeatable, of which all must hold.
    pub fn labels(&mut self) -> Vec<Selector> {
        let mut selectors = Vec::new();
        for text in self.all("label") {
            match labels::parse(&text) {
                Some(selector) => selectors.push(selector),
                None => {
                    let detail =
                        format!("{} is not KEY=VALUE or KEY, with a key of 1 to 63 bytes", shown(&text));
                    self.problem(ProblemError::at_parameter("label", "invalid_format", detail));
                }
            }
        }
        selectors
    }

    /// The values of a repeatable parameter with a closed list of values.
    pub fn each_of<T: Copy>(
        &mut self,
        name: &str,
        known: &'static [T],
        named: fn(T) -> &'static str,
    ) -> Vec<T> {
        let mut found = Vec::new();
        for text in self.all(name) {
            match known.iter().find(|value| named(**value) == text) {
                Some(value) => found.push(*value),
                None => {
                    let names: Vec<&str> = known.iter().map(|value| named(*value)).collect();
                    let shown: String = text.chars().take(64).collect();
                    let meant = did_you_mean(&shown, names.iter().copied());
                    let detail = format!("{shown:?} is not one of {}{meant}", names.join(", "));
                    self.problem(ProblemError::at_parameter(name, "unknown_value", detail));
                }
            }
        }
        found
    }

    /// Which page of the list `scope` is asked for; lists of `named` items can be sorted by name.
    pub fn page(&mut self, scope: &Scope, named: bool) -> PageRequest {
        let limit = self.int("limit", 1, LIMIT_MAX).unwrap_or(LIMIT_DEFAULT);
        let order = match self.one("sort_by") {
            None => Order::default(),
            Some(text) => page::order(&text, named).unwrap_or_else(|| {
                let names = if named { ", name or -name" } else { "" };
                let detail = format!("{} is not created_at, -created_at{names}", shown(&text));
                self.problem(ProblemError::at_parameter("sort_by", "unknown_value", detail));
                Order::default()
            }),
        };
        let after = self.one("page_token").and_then(|token| match scope.place(order, &token) {
            Ok(place) => Some(place),
            Err(error) => {
                self.problem(*error);
                None
            }
        });
        PageRequest { limit, order, after }
    }

    /// Refuses parameters that nobody took, and reports all problems.
    ///
    /// # Errors
    /// `validation_failed` with all of them.
    pub fn done(mut self) -> Result<(), Problem> {
        for (name, _) in std::mem::take(&mut self.pairs).into_iter().take(16) {
            let name: String = name.chars().take(64).collect();
            let meant = did_you_mean(&name, self.known.iter().map(String::as_str));
            let detail = format!("there is no parameter {name:?} here{meant}");
            self.problem(ProblemError::at_parameter(name, "unknown_parameter", detail));
        }
        if self.errors.is_empty() { Ok(()) } else { Err(Problem::validation(self.errors)) }
    }
}

/// A value, as a message shows it.
fn shown(text: &str) -> String {
    format!("{:?}", text.chars().take(64).collect::<String>())
}

/// Decodes `%XX`, and `+` as a space, as HTML forms and client libraries write them.
pub(crate) fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || rest.next().and_then(|c| char::from(c).to_digit(16));
                let (high, low) = (digit()?, digit()?);
                (high << 4 | low) as u8
            }
            b'+' => b' ',
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

/// Encodes everything but unreserved characters.
pub(crate) fn escape(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String does not fail.
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn codes(query: &str, take: impl FnOnce(&mut Parameters)) -> Vec<String> {
        let mut p = match decode(query) {
            Ok(pairs) => Parameters::of(pairs),
            Err(problem) => return vec![problem.code().as_str().to_owned()],
        };
        take(&mut p);
        p.done().err().map_or(Vec::new(), |p| p.errors().iter().map(|e| e.code.clone()).collect())
    }

    #[test]
    fn states_are_taken_by_their_names_and_others_refused() {
        use mirrorvm::host::MigrationState as S;
        let states = |p: &mut Parameters| p.each_of("state", S::ALL, S::name);
        for state in S::ALL {
            let query = format!("state=failed&state={}", state.name());
            assert!(codes(&query, |p| assert_eq!(states(p), [S::Failed, *state])).is_empty(), "{query}");
        }
        for query in ["state=done", "state=", "state=Failed"] {
            assert_eq!(codes(query, |p| assert!(states(p).is_empty())), ["unknown_value"], "{query}");
        }
    }

    #[test]
    fn waits_limits_and_unknown_parameters() {
        for (query, seconds) in [("", 0), ("wait=0s", 0), ("wait=60s", 60), ("wait=7s", 7)] {
            assert!(codes(query, |p| assert_eq!(p.wait().as_secs(), seconds)).is_empty(), "{query}");
        }
        for query in ["wait=61s", "wait=1", "wait=-1s", "wait=s", "wait=1m", "wait=", "wait=%31"] {
            assert_eq!(codes(query, |p| _ = p.wait()), ["invalid_format"], "{query}");
        }
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &[1]);
        let page = |p: &mut Parameters| _ = p.page(&Scope::new(&key, "x", &[]), false);
        let mut p = Parameters::of(decode("limt=3&colour=1").unwrap());
        p.page(&Scope::new(&key, "x", &[]), false);
        let said: Vec<String> = p.done().unwrap_err().errors().iter().map(|e| e.detail.clone()).collect();
        assert!(said[0].ends_with("; did you mean limit?") && said[1].ends_with("here"), "{said:?}");
        assert_eq!(codes("sort_by=name", page), ["unknown_value"]);
        assert!(codes("sort_by=-created_at", page).is_empty());
        assert_eq!(codes("dry_run=yes", |p| _ = p.flag("dry_run")), ["invalid_format"]);
        assert_eq!(codes("label==x&label=k&label=k=v=w", |p| _ = p.labels()), ["invalid_format"]);
        assert_eq!(codes("limit=0", page), ["out_of_range"]);
        assert_eq!(codes("limit=1&limit=2", page), ["duplicate"]);
        assert_eq!(codes("page_token=00&x=1", page), ["invalid_page_token", "unknown_parameter"]);
        assert_eq!(codes("limit=%", page), ["malformed_request"]);
        assert!(codes("limit=1000&", page).is_empty());
    }

    fn query(text: &str) -> Query {
        Query(Arc::new(decode(text)))
    }

    #[test]
    fn however_a_query_is_written_it_says_the_same_to_everybody() {
        for text in ["dry_run=true", "dry%5Frun=true", "dry_run=tru%65", "%64ry_run=%74rue", "&dry_run=true&"]
        {
            let query = query(text);
            assert!(query.wants_dry_run() && query.read().unwrap().flag(DRY_RUN), "{text}");
            assert_eq!(query.canonical(), "dry_run=true");
        }
        for (text, dry) in [("dry_run=1", true), ("dry_run=0", false), ("dry_run=%31", true)] {
            let query = query(text);
            assert_eq!(query.wants_dry_run(), dry, "{text}");
            let mut parameters = query.read().unwrap();
            assert_eq!(parameters.flag(DRY_RUN), dry, "{text}");
            parameters.done().unwrap();
        }
        for text in [
            "",
            "dry_run=false",
            "dry_run=true&dry_run=true",
            "dry_run=false&dry%5frun=true",
            "dry_run=true+",
            "DRY_RUN=true",
            "dry_run=%74rue%",
            "dry_run=+true",
            "dry_run",
            "dry+run=true",
        ] {
            let query = query(text);
            assert!(!query.wants_dry_run(), "{text}");
            // What is said twice, or cannot be read, is refused by whoever would act.
            let read = query.read().map(|mut p| p.flag(DRY_RUN) && p.done().is_ok());
            assert!(!read.unwrap_or(false), "{text}");
        }
    }

    #[test]
    fn a_path_is_the_same_however_it_is_written() {
        assert_eq!(canonical_path("/v1/guests/%67%31"), "/v1/guests/g1");
        assert_eq!(canonical_path("/v1/guests/a%2Fb/c%20d"), "/v1/guests/a%2Fb/c%20d");
        assert_eq!(canonical_path("/a+b/%2b"), "/a%2Bb/%2B");
        assert_eq!(canonical_path("/%ff/%"), "/%ff/%");
    }

    proptest! {
        #[test]
        fn escaping_is_undone(text in "\\PC{0,20}") {
            prop_assert_eq!(unescape(&escape(&text)), Some(text));
        }

        #[test]
        fn no_query_panics(query in "[ -~]{0,60}") {
            let _ = codes(&query, |p| { p.wait(); p.labels(); p.flag("dry_run"); });
        }
    }
}
