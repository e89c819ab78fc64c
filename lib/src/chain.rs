//! An error in the words of all its causes.
//!
//! Owns: how they are put together. Must not know: who reads it; causes can name paths, so that is for a log
//! or for whoever sits at the machine.

use std::error::Error;

/// The error and its causes, outermost first, with a colon between each.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{said}")]
    struct Link {
        said: &'static str,
        source: Option<Box<Link>>,
    }

    #[test]
    fn every_cause_is_said_once_and_in_order() {
        let link = |said, source: Option<Link>| Link { said, source: source.map(Box::new) };
        let deep = link("no disk", Some(link("no write", Some(link("full", None)))));
        assert_eq!(chain(&deep), "no disk: no write: full");
        assert_eq!(chain(&link("alone", None)), "alone");
    }
}
