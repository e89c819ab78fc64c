//! Label selectors of lists and events, as callers write them.

use std::ops::RangeInclusive;

use mirrorvm::host::bounds;
pub use mirrorvm::host::lists::Selector;

/// Reads `KEY=VALUE` or `KEY` (any value).
pub fn parse(text: &str) -> Option<Selector> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, Some(value.to_owned())),
        None => (text, None),
    };
    let within = |text: &str, bytes: RangeInclusive<u64>| bytes.contains(&(text.len() as u64));
    let fits = within(key, bounds::LABEL_KEY_BYTES)
        && value.as_ref().is_none_or(|v| within(v, bounds::LABEL_VALUE_BYTES));
    fits.then(|| Selector { key: key.to_owned(), value })
}

/// The condition as the caller wrote it.
pub fn text(selector: &Selector) -> String {
    match &selector.value {
        Some(value) => format!("{}={value}", selector.key),
        None => selector.key.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn selectors_hold_by_key_and_value() {
        let labels = BTreeMap::from([("rack".to_owned(), "r1=a".to_owned()), ("gpu".into(), String::new())]);
        for (written, holds) in [
            ("rack=r1=a", true),
            ("rack", true),
            ("gpu", true),
            ("gpu=", true),
            ("rack=", false),
            ("rack=r2", false),
            ("zone", false),
        ] {
            let selector = parse(written).unwrap();
            assert_eq!((selector.holds(&labels), text(&selector).as_str()), (holds, written), "{written}");
        }
        assert!(parse("").is_none() && parse("=x").is_none());
        assert!(parse(&"k".repeat(64)).is_none());
    }
}
