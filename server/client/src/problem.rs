//! Problems (RFC 9457): what the daemon says when it says no.
//!
//! Owns: reading them, and their sentence for people. Must not know: which codes there are; the list is open.

use std::fmt;
use std::time::Duration;

use serde_json::Value;

use crate::text::printable;

/// The media type of problems.
pub(crate) const PROBLEM_JSON: &str = "application/problem+json";
/// Where one text of a problem is cut when it is printed, in bytes.
const TEXT_MAX: usize = 2000;
/// Most values at fault that are printed.
const VALUES_MAX: usize = 16;

/// What the daemon says when it says no. Programs go by `code` and `retryable`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Problem {
    /// HTTP status.
    pub status: u16,
    /// What happened, for programs: stable, `snake_case`, an open list.
    pub code: String,
    /// Short name for people.
    pub title: String,
    /// What happened, for people.
    pub detail: String,
    /// Id of the request, as in the daemon's log.
    pub request_id: Option<String>,
    /// Whether the same request may work later.
    pub retryable: bool,
    /// When, as far as the daemon knows.
    pub retry_after: Option<Duration>,
    /// The values of the request that cannot be used.
    pub errors: Vec<ValueError>,
    /// What keeps the request from working now.
    pub blocked_reasons: Vec<BlockedReason>,
    /// State of the resource, with `state_conflict`.
    pub current_state: Option<String>,
    /// The ETag that the resource has, with `precondition_failed`.
    pub etag: Option<String>,
    /// The whole document, with what is not above.
    pub document: Value,
}

/// One value of the request that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueError {
    /// Where it is.
    pub place: Place,
    /// What is wrong, for programs.
    pub code: String,
    /// What is wrong, for people.
    pub detail: String,
}

/// Where in a request a value is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the body, by JSON pointer (RFC 6901); empty: the body itself.
    Pointer(String),
    /// A parameter of the path or the query, by name.
    Parameter(String),
    /// A header, by name.
    Header(String),
    /// The problem does not say.
    Unknown,
}

/// Something that keeps a request from working now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockedReason {
    /// What it is, for programs.
    pub code: String,
    /// What it is, for people.
    pub detail: String,
}

impl Problem {
    /// Reads a problem's document; `None` when it is none, or has no code.
    pub(crate) fn read(status: u16, body: &[u8]) -> Option<Self> {
        let document: Value = serde_json::from_slice(body).ok()?;
        let code = document["code"].as_str()?.to_owned();
        let list = |name: &str| document[name].as_array().into_iter().flatten();
        Some(Self {
            status,
            code,
            title: text(&document, "title"),
            detail: text(&document, "detail"),
            request_id: optional(&document, "request_id"),
            retryable: document["retryable"] == true,
            retry_after: None,
            errors: list("errors").map(ValueError::read).collect(),
            blocked_reasons: list("blocked_reasons")
                .map(|r| BlockedReason { code: text(r, "code"), detail: text(r, "detail") })
                .collect(),
            current_state: optional(&document, "current_state"),
            etag: None,
            document,
        })
    }

    /// What happened, with the values at fault that `detail` does not name itself. Fit for a terminal.
    pub fn sentence(&self) -> String {
        let detail = if self.detail.is_empty() { &self.title } else { &self.detail };
        let mut sentence = printable(detail, TEXT_MAX);
        let unsaid: Vec<&ValueError> = self.errors.iter().filter(|e| !detail.contains(&e.detail)).collect();
        for error in unsaid.iter().take(VALUES_MAX) {
            sentence.push_str(&format!("; {}: {}", error.place, printable(&error.detail, TEXT_MAX)));
        }
        if unsaid.len() > VALUES_MAX {
            sentence.push_str(&format!("; and {} more", unsaid.len() - VALUES_MAX));
        }
        sentence
    }

    /// The JSON pointers of the values that cannot be used.
    pub fn pointers(&self) -> impl Iterator<Item = &str> {
        self.errors.iter().filter_map(|e| match &e.place {
            Place::Pointer(pointer) => Some(pointer.as_str()),
            Place::Parameter(_) | Place::Header(_) | Place::Unknown => None,
        })
    }
}

impl ValueError {
    fn read(entry: &Value) -> Self {
        let place = optional(entry, "pointer").map(Place::Pointer);
        let place = place.or_else(|| optional(entry, "parameter").map(Place::Parameter));
        Self {
            place: place.or_else(|| optional(entry, "header").map(Place::Header)).unwrap_or(Place::Unknown),
            code: text(entry, "code"),
            detail: text(entry, "detail"),
        }
    }
}

fn optional(value: &Value, name: &str) -> Option<String> {
    value[name].as_str().map(str::to_owned)
}

fn text(value: &Value, name: &str) -> String {
    optional(value, name).unwrap_or_default()
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pointer(name) | Self::Parameter(name) | Self::Header(name) if !name.is_empty() => {
                f.write_str(&printable(name, TEXT_MAX))
            }
            Self::Pointer(_) | Self::Parameter(_) | Self::Header(_) | Self::Unknown => {
                f.write_str("the body")
            }
        }
    }
}

impl fmt::Display for Problem {
    /// The sentence, status and code.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} {})", self.sentence(), self.status, printable(&self.code, TEXT_MAX))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(status: u16, document: &Value) -> Option<Problem> {
        Problem::read(status, document.to_string().as_bytes())
    }

    #[test]
    fn a_problem_names_the_values_at_fault() {
        let problem = read(
            422,
            &json!({
                "code": "validation_failed", "detail": "2 values of the request cannot be used", "title": "t",
                "request_id": "r-1", "retryable": false,
                "errors": [
                    {"pointer": "/name", "code": "missing", "detail": "this is missing"},
                    {"parameter": "limit", "code": "out_of_range", "detail": "too much"},
                    {"header": "if-match", "code": "invalid_format", "detail": "no tag"},
                ],
            }),
        );
        let problem = problem.unwrap();
        assert_eq!(
            problem.to_string(),
            "2 values of the request cannot be used; /name: this is missing; limit: too much; if-match: no tag \
             (422 validation_failed)"
        );
        assert_eq!(problem.pointers().collect::<Vec<_>>(), ["/name"]);
        assert_eq!(problem.errors[1].place, Place::Parameter("limit".into()));
        assert_eq!((problem.request_id.as_deref(), problem.retryable), (Some("r-1"), false));
    }

    #[test]
    fn what_the_sentence_says_already_is_not_said_again() {
        let one = json!({"code": "c", "detail": "/a: too long", "errors": [{"pointer": "/a", "detail": "too long"}]});
        assert_eq!(read(422, &one).unwrap().to_string(), "/a: too long (422 c)");
    }

    #[test]
    fn what_has_no_code_is_no_problem() {
        for body in [&b"<html>"[..], b"", b"[]", b"{}", br#"{"code": 1}"#, b"\"code\""] {
            assert_eq!(Problem::read(502, body), None);
        }
    }

    #[test]
    fn a_problem_of_others_cannot_steer_a_terminal_or_flood_it() {
        let many: Vec<Value> =
            (0..1000).map(|n| json!({"pointer": format!("/{n}"), "detail": n.to_string()})).collect();
        let evil = json!({"code": "\u{1b}[2J", "detail": "\u{1b}]0;x\u{7}".repeat(10_000), "errors": many});
        let shown = read(500, &evil).unwrap().to_string();
        assert!(!shown.chars().any(char::is_control) && shown.len() < 3 * TEXT_MAX, "{}", shown.len());
        assert!(shown.contains("and 983 more"), "{shown}");
    }

    #[test]
    fn members_of_wrong_types_are_left_out() {
        let odd =
            json!({"code": "c", "detail": 7, "errors": {"x": 1}, "blocked_reasons": [3], "retryable": "yes"});
        let problem = read(503, &odd).unwrap();
        assert_eq!((problem.detail.as_str(), problem.errors.len(), problem.retryable), ("", 0, false));
        assert_eq!(problem.blocked_reasons[0].code, "");
        assert_eq!(problem.document, odd);
    }
}
