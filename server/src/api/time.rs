//! Times on the wire: RFC 3339 in UTC, to the millisecond, always with three digits behind the point. The
//! store keeps events that precisely, and what is compared as text must look the same everywhere.

use jiff::Timestamp;
use serde::{Serialize as _, Serializer};

/// Writes a time.
pub fn to_ms<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{time:.3}"))
}

/// Writes a time, or null.
pub fn to_ms_or_null<S: Serializer>(time: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
    time.map(|time| format!("{time:.3}")).serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_times_have_one_precision() {
        for (nanosecond, text) in [
            (0, "2026-11-22T19:27:00.000Z"),
            (999_999, "2026-11-22T19:27:00.000Z"),
            (120_000_000, "2026-11-22T19:27:00.120Z"),
            (999_999_999, "2026-11-22T19:27:00.999Z"),
        ] {
            let time = Timestamp::new(1_795_375_620, nanosecond).unwrap();
            assert_eq!(to_ms(&time, serde_json::value::Serializer).unwrap(), text);
            assert_eq!(to_ms_or_null(&Some(time), serde_json::value::Serializer).unwrap(), text);
        }
        assert!(to_ms_or_null(&None, serde_json::value::Serializer).unwrap().is_null());
    }
}
