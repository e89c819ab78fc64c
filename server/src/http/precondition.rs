//! ETags and the conditions on them (RFC 9110, section 13).

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

use mirrorvm::host::Expected;

use crate::problem::{Problem, ProblemCode, ProblemError};

/// The strong ETag of a resource: its generation in quotes.
pub fn etag(generation: u64) -> HeaderValue {
    quoted(&generation.to_string())
}

/// The strong ETag with this text: digits, letters and hyphens.
pub fn quoted(text: &str) -> HeaderValue {
    // They and quotes are legal in every header.
    HeaderValue::try_from(format!("\"{text}\"")).unwrap_or(HeaderValue::from_static("\"\""))
}

/// What a condition header says.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Condition {
    Absent,
    Any,
    Tags(Vec<(bool, String)>),
}

/// Reads `If-Match` or `If-None-Match`: `*`, or a list of `"opaque"` and `W/"opaque"`.
fn read(headers: &HeaderMap, name: &HeaderName) -> Result<Condition, Problem> {
    let bad = || {
        let error =
            ProblemError::at_header(name, "invalid_format", format!("{name} is not * or a list of ETags"));
        Problem::validation(vec![error])
    };
    let mut tags = Vec::new();
    let mut any = false;
    for value in headers.get_all(name) {
        let mut rest = value.to_str().map_err(|_| bad())?.trim();
        if rest == "*" {
            any = true;
            continue;
        }
        while !rest.is_empty() {
            let (weak, quoted) = match rest.strip_prefix("W/") {
                Some(quoted) => (true, quoted),
                None => (false, rest),
            };
            let (tag, after) = quoted.strip_prefix('"').and_then(|t| t.split_once('"')).ok_or_else(bad)?;
            tags.push((weak, tag.to_owned()));
            rest = after.trim_start();
            rest = match rest.strip_prefix(',') {
                Some(next) => next.trim_start(),
                None if rest.is_empty() => rest,
                None => return Err(bad()),
            };
        }
    }
    match (any, tags.is_empty(), headers.contains_key(name)) {
        (true, true, _) => Ok(Condition::Any),
        (false, false, _) => Ok(Condition::Tags(tags)),
        (false, true, false) => Ok(Condition::Absent),
        _ => Err(bad()),
    }
}

/// `If-Match` of a request that changes a resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IfMatch(Condition);

impl IfMatch {
    /// Reads the header.
    ///
    /// # Errors
    /// `validation_failed` naming it.
    pub fn read(headers: &HeaderMap) -> Result<Self, Problem> {
        read(headers, &header::IF_MATCH).map(Self)
    }

    /// Whether there is anything to check.
    pub fn is_absent(&self) -> bool {
        self.0 == Condition::Absent
    }

    /// The condition for the library, which checks it in the act. Weak tags, and tags that are not a
    /// generation, match nothing.
    pub fn expected(&self) -> Expected {
        match &self.0 {
            Condition::Absent | Condition::Any => Expected::any(),
            Condition::Tags(tags) => Expected::one_of(
                tags.iter()
                    .filter(|(weak, _)| !weak)
                    // Only the one way in which a generation is written.
                    .filter_map(|(_, tag)| tag.parse::<u64>().ok().filter(|n| n.to_string() == *tag))
                    .collect(),
            ),
        }
    }

    /// Holds the resource's `generation` against the header; weak tags never match.
    ///
    /// # Errors
    /// `precondition_failed`.
    pub fn check(&self, generation: u64) -> Result<(), Problem> {
        let current = generation.to_string();
        let holds = match &self.0 {
            Condition::Absent | Condition::Any => true,
            Condition::Tags(tags) => tags.iter().any(|(weak, tag)| !weak && *tag == current),
        };
        if holds {
            return Ok(());
        }
        let detail = format!("the resource is at \"{generation}\"");
        Err(Problem::new(ProblemCode::PreconditionFailed, detail).with_header(header::ETAG, etag(generation)))
    }
}

/// `If-None-Match` of a request that reads a resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IfNoneMatch(Condition);

impl IfNoneMatch {
    /// Reads the header.
    ///
    /// # Errors
    /// `validation_failed` naming it.
    pub fn read(headers: &HeaderMap) -> Result<Self, Problem> {
        read(headers, &header::IF_NONE_MATCH).map(Self)
    }

    /// Whether it is `*`: on a `PUT`, only a resource that is not there yet may be made.
    pub fn is_any(&self) -> bool {
        self.0 == Condition::Any
    }

    /// Whether the caller has this `generation` already.
    pub fn has(&self, generation: u64) -> bool {
        self.has_tag(&generation.to_string())
    }

    /// Whether the caller has the representation with this tag already.
    pub fn has_tag(&self, current: &str) -> bool {
        match &self.0 {
            Condition::Absent => false,
            Condition::Any => true,
            Condition::Tags(tags) => tags.iter().any(|(_, tag)| tag == current),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: HeaderName, values: &[&str]) -> HeaderMap {
        values.iter().map(|v| (name.clone(), HeaderValue::from_str(v).unwrap())).collect()
    }

    fn if_match(values: &[&str]) -> Result<u16, u16> {
        let status = |p: Problem| p.code().status().as_u16();
        let condition = IfMatch::read(&headers(header::IF_MATCH, values)).map_err(status)?;
        Ok(condition.check(7).map_or_else(status, |()| 200))
    }

    #[test]
    fn if_match_compares_strongly() {
        for (values, wanted) in [
            (&[][..], Ok(200)),
            (&["*"], Ok(200)),
            (&["\"7\""], Ok(200)),
            (&["\"1\", \"7\""], Ok(200)),
            (&["\"1\"", "\"7\""], Ok(200)),
            (&["W/\"7\""], Ok(412)),
            (&["\"8\""], Ok(412)),
            (&["7"], Err(422)),
            (&["\"7\" x"], Err(422)),
            (&["*, \"7\""], Err(422)),
            (&[""], Err(422)),
        ] {
            assert_eq!(if_match(values), wanted, "{values:?}");
        }
    }

    #[test]
    fn if_none_match_compares_weakly() {
        let has =
            |values: &[&str]| IfNoneMatch::read(&headers(header::IF_NONE_MATCH, values)).unwrap().has(7);
        assert!(has(&["W/\"7\""]) && has(&["\"1\",\"7\""]) && has(&["*"]));
        assert!(!has(&[]) && !has(&["\"8\""]));
    }
}
