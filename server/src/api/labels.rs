//! Label selectors of lists and events.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use mirrorvm::host::bounds;

/// A condition on a resource's labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector {
    key: String,
    value: Option<String>,
}

impl Selector {
    /// Reads `KEY=VALUE` or `KEY` (any value).
    pub fn parse(text: &str) -> Option<Self> {
        let (key, value) = match text.split_once('=') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => (text, None),
        };
        let within = |text: &str, bytes: RangeInclusive<u64>| bytes.contains(&(text.len() as u64));
        let fits = within(key, bounds::LABEL_KEY_BYTES)
            && value.as_ref().is_none_or(|v| within(v, bounds::LABEL_VALUE_BYTES));
        fits.then(|| Self { key: key.to_owned(), value })
    }

    /// Whether `labels` meet the condition.
    pub fn holds(&self, labels: &BTreeMap<String, String>) -> bool {
        labels.get(&self.key).is_some_and(|v| self.value.as_ref().is_none_or(|wanted| wanted == v))
    }

    /// The condition as the caller wrote it.
    pub fn text(&self) -> String {
        match &self.value {
            Some(value) => format!("{}={value}", self.key),
            None => self.key.clone(),
        }
    }
}

/// Whether `labels` meet all of `selectors`.
pub fn all_hold(selectors: &[Selector], labels: &BTreeMap<String, String>) -> bool {
    selectors.iter().all(|s| s.holds(labels))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_hold_by_key_and_value() {
        let labels = BTreeMap::from([("rack".to_owned(), "r1=a".to_owned()), ("gpu".into(), String::new())]);
        for (text, holds) in [
            ("rack=r1=a", true),
            ("rack", true),
            ("gpu", true),
            ("gpu=", true),
            ("rack=", false),
            ("rack=r2", false),
            ("zone", false),
        ] {
            let selector = Selector::parse(text).unwrap();
            assert_eq!((selector.holds(&labels), selector.text().as_str()), (holds, text), "{text}");
        }
        assert!(Selector::parse("").is_none() && Selector::parse("=x").is_none());
        assert!(Selector::parse(&"k".repeat(64)).is_none());
    }
}
