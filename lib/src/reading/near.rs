//! Which word was meant by one that nobody knows.
//!
//! Owns: how far off a slip of the hand is. Must not know: whether the words are fields, parameters or paths.

use std::iter::once;

/// Characters of a word that are looked at.
const LOOKED_AT: usize = 64;

/// How many slips are between two words, capitals and `-` for `_` aside; `None` when they are further apart
/// than somebody who means the one writes the other.
pub fn slips(given: &str, known: &str) -> Option<usize> {
    let plain =
        |text: &str| text.chars().take(LOOKED_AT).collect::<String>().to_ascii_lowercase().replace('-', "_");
    let (given, known) = (plain(given), plain(known));
    // Two letters that changed places are one slip.
    let slips = strsim::osa_distance(&given, &known);
    let bearable = known.chars().count().min(given.chars().count()).div_ceil(4);
    (slips <= bearable).then_some(slips)
}

/// The one of `known` that `given` was probably meant to be; of several the first.
pub fn nearest<'k>(given: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let with_slips = known.into_iter().filter_map(|word| Some((slips(given, word)?, word)));
    with_slips.min_by_key(|(slips, _)| *slips).map(|(_, word)| word)
}

/// The end of a sentence that says that there is no `given`: nothing, or what was probably meant.
pub fn did_you_mean<'k>(given: &str, known: impl IntoIterator<Item = &'k str>) -> String {
    nearest(given, known)
        .map_or_else(String::new, |word| once("; did you mean ").chain([word, "?"]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_understood_and_other_words_are_not() {
        const KNOWN: [&str; 7] = ["name", "driver", "memory", "labels", "size_bytes", "gpa", "vcpus"];
        for (given, meant) in [
            ("nmae", "name"),
            ("Driver", "driver"),
            ("drivers", "driver"),
            ("size-bytes", "size_bytes"),
            ("sizebytes", "size_bytes"),
            ("vcpu", "vcpus"),
            ("label", "labels"),
            ("gps", "gpa"),
        ] {
            assert_eq!(nearest(given, KNOWN), Some(meant), "{given}");
        }
        for given in
            ["", "x", "colour", "policy", "cpus_of_it", "na", &"name".repeat(40), "\u{1F600}\u{1F600}"]
        {
            assert_eq!(nearest(given, KNOWN), None, "{given}");
        }
        assert_eq!(did_you_mean("nmae", KNOWN), "; did you mean name?");
        assert_eq!(did_you_mean("colour", KNOWN), "");
    }
}
