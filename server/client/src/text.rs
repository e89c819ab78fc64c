//! Text that goes into a target, and text of others that goes to a terminal.
//!
//! Owns: escaping. Must not know: where the text comes from.

use std::fmt::Write as _;

/// Percent-encodes `text` for one segment of a path, or for one name or value of a query.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            // Writing to a String does not fail.
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

/// `text` as it may be printed: control characters escaped, and cut where that has `most` bytes or more.
pub(crate) fn printable(text: &str, most: usize) -> String {
    let mut shown = String::new();
    for c in text.chars() {
        if shown.len() >= most {
            shown.push_str("...");
            break;
        }
        if c.is_control() {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// `bytes` with every occurrence of `secret` replaced by stars.
pub(crate) fn without(bytes: &[u8], secret: &[u8]) -> Vec<u8> {
    let mut rest = bytes;
    let mut clean = Vec::with_capacity(bytes.len());
    if secret.is_empty() {
        return bytes.to_vec();
    }
    while let Some(at) = rest.windows(secret.len()).position(|w| w == secret) {
        clean.extend_from_slice(&rest[..at]);
        clean.extend_from_slice(b"***");
        rest = &rest[at + secret.len()..];
    }
    clean.extend_from_slice(rest);
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_meaning_in_a_target_is_escaped() {
        assert_eq!(escape("web-1.example_~"), "web-1.example_~");
        assert_eq!(escape("a/b?c=d&e f#g%\u{fc}"), "a%2Fb%3Fc%3Dd%26e%20f%23g%25%C3%BC");
    }

    #[test]
    fn what_a_terminal_would_obey_is_escaped_and_long_text_is_cut() {
        assert_eq!(printable("no \u{1b}[31mred\n", 100), "no \\u{1b}[31mred\\n");
        assert_eq!(printable("abcdef", 3), "abc...");
        assert_eq!(printable("abc", 3), "abc");
    }

    #[test]
    fn a_secret_is_taken_out_wherever_it_is() {
        assert_eq!(without(b"s3 a s3s3", b"s3"), b"*** a ******");
        assert_eq!(without(b"nothing", b"s3"), b"nothing");
        assert_eq!(without(b"x", b""), b"x");
    }
}
