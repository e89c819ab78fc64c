//! Which path of the API was meant by one that it does not have.
//!
//! Must not know: who may call what. What the API has is no secret.

use mirrorvm::reading::slips;

use crate::access::table::OPERATIONS;

/// Longest path that is compared, in bytes.
const LONGEST: usize = 256;

/// The path that `path` was probably meant to be, with the names that the caller put into it; none where that
/// is what the caller wrote (not every listener serves all).
pub fn path(path: &str) -> Option<String> {
    if path.len() > LONGEST {
        return None;
    }
    let given: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    // The version is what is forgotten most.
    let versioned: Vec<&str> = std::iter::once("v1").chain(given.iter().copied()).collect();
    let found = OPERATIONS.iter().flat_map(|o| [fit(&given, o.path), fit(&versioned, o.path)]);
    found.flatten().min_by_key(|(slips, _)| *slips).map(|(_, meant)| meant).filter(|meant| meant != path)
}

/// How many slips lie between the segments and the path `known`, and that with the caller's names.
fn fit(given: &[&str], known: &str) -> Option<(usize, String)> {
    let segments: Vec<&str> = known.split('/').skip(1).collect();
    if segments.len() != given.len() {
        return None;
    }
    let (mut all, mut meant) = (0, String::new());
    for (given, known) in given.iter().zip(segments) {
        meant.push('/');
        if known.starts_with('{') {
            meant.push_str(given);
        } else {
            all += slips(given, known)?;
            meant.push_str(known);
        }
    }
    Some((all, meant))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_with_slips_are_understood_and_others_are_not() {
        for (given, meant) in [
            ("/v1/guest", "/v1/guests"),
            ("/v1/guests/", "/v1/guests"),
            ("/guests", "/v1/guests"),
            ("/guests/g1/strat", "/v1/guests/g1/start"),
            ("//v1//guests", "/v1/guests"),
            ("/v1/guests/g1/address_space_plans", "/v1/guests/g1/address-space-plans"),
            ("/v1/migration-check", "/v1/migration-checks"),
            ("/health/livez", ""),
            ("/live", "/livez"),
            ("/doc", "/docs"),
            ("/v1/frobnicate", ""),
            ("/v2/guests", "/v1/guests"),
            ("/v1/guests", ""),
            ("/", ""),
            ("", ""),
        ] {
            assert_eq!(path(given).as_deref().unwrap_or_default(), meant, "{given}");
        }
        assert_eq!(path(&"/x".repeat(200)), None);
    }
}
