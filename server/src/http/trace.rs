//! W3C trace context: the caller's trace goes on through this daemon's log and answers.

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use uuid::Uuid;

use super::middleware::sole;

/// The header that carries a trace (W3C Trace Context).
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// A request's place in its trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    trace: String,
    span: String,
    flags: String,
}

/// Continues the caller's trace with a span of our own. Begins a new one when there is none, or it cannot be
/// read.
pub fn of(headers: &HeaderMap) -> Trace {
    let given = sole(headers, &TRACEPARENT).and_then(parse);
    let span = format!("{:016x}", Uuid::new_v4().as_u64_pair().1);
    match given {
        Some((trace, flags)) => Trace { trace, span, flags },
        None => Trace { trace: Uuid::new_v4().simple().to_string(), span, flags: "00".into() },
    }
}

impl Trace {
    /// The trace's id, for the log.
    pub fn id(&self) -> &str {
        &self.trace
    }

    /// The header as the answer carries it.
    pub fn header(&self) -> HeaderValue {
        // Hexadecimal digits and dashes.
        HeaderValue::try_from(format!("00-{}-{}-{}", self.trace, self.span, self.flags))
            .unwrap_or(HeaderValue::from_static(""))
    }
}

/// Trace id and flags of `version-trace-parent-flags` (W3C Trace Context, section 3.2).
fn parse(text: &str) -> Option<(String, String)> {
    let mut parts = text.split('-');
    let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |t: &str, len: usize| {
        t.len() == len && t.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let shaped = hex(version, 2) && hex(trace, 32) && hex(parent, 16) && hex(flags, 2);
    let zero = |t: &str| t.bytes().all(|b| b == b'0');
    // Version ff is none; version 00 has four parts.
    let known = version != "ff" && (version != "00" || parts.next().is_none());
    (shaped && known && !zero(trace) && !zero(parent)).then(|| (trace.to_owned(), flags.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_callers_trace_goes_on_with_another_span() {
        let given = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let headers: HeaderMap = [(TRACEPARENT, HeaderValue::from_static(given))].into_iter().collect();
        let trace = of(&headers);
        let answer = trace.header();
        let answer = answer.to_str().unwrap();
        assert!(answer.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && answer.ends_with("-01"));
        assert_ne!(answer, given);
        for bad in [
            "",
            "00-0-0-0",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
