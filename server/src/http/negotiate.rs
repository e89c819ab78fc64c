//! The choice of a representation by `Accept` and `Accept-Encoding` (RFC 9110, sections 12.5.1 and 12.5.3).

use axum::http::{HeaderMap, HeaderValue, header};

use crate::problem::{Problem, ProblemCode};

/// Chooses the best of the `offered` media types for the request, and the first when it has no preference.
///
/// # Errors
/// `not_acceptable` when every one is ruled out.
pub fn choose(headers: &HeaderMap, offered: &[&'static str]) -> Result<&'static str, Problem> {
    let accept: Vec<&str> =
        headers.get_all(header::ACCEPT).iter().filter_map(|v: &HeaderValue| v.to_str().ok()).collect();
    let accept = accept.join(",");
    let ranges: Vec<(&str, f32)> =
        accept.split(',').map(str::trim).filter(|r| !r.is_empty()).map(range).collect();
    if ranges.is_empty() {
        return offered.first().copied().ok_or_else(|| refused(offered));
    }
    let mut best: Option<(&'static str, f32)> = None;
    for media in offered {
        let quality = quality(media, &ranges);
        if quality > 0.0 && best.is_none_or(|(_, q)| quality > q) {
            best = Some((media, quality));
        }
    }
    best.map(|(media, _)| media).ok_or_else(|| refused(offered))
}

/// Whether the caller takes a body in gzip: it says so by name, or takes everything.
pub fn takes_gzip(headers: &HeaderMap) -> bool {
    let values =
        headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|v: &HeaderValue| v.to_str().ok());
    let codings: Vec<(&str, f32)> = values.flat_map(|v| v.split(',')).map(|c| range(c.trim())).collect();
    let of = |names: &[&str]| {
        let named = |coding: &str| names.iter().any(|n| n.eq_ignore_ascii_case(coding));
        codings.iter().find(|(coding, _)| named(coding)).map(|(_, quality)| *quality)
    };
    of(&["gzip", "x-gzip"]).or_else(|| of(&["*"])).is_some_and(|quality| quality > 0.0)
}

fn refused(offered: &[&str]) -> Problem {
    Problem::new(ProblemCode::NotAcceptable, format!("there is {}", offered.join(" and ")))
}

/// Splits a media range from its quality.
fn range(text: &str) -> (&str, f32) {
    let mut parts = text.split(';').map(str::trim);
    let media = parts.next().unwrap_or("");
    let quality = parts
        .find_map(|p| p.strip_prefix("q=").or_else(|| p.strip_prefix("Q=")))
        .map_or(1.0, |q| q.parse::<f32>().unwrap_or(0.0));
    (media, quality)
}

/// The quality of `media`, by the most specific range that includes it.
fn quality(media: &str, ranges: &[(&str, f32)]) -> f32 {
    let kind = media.split('/').next().unwrap_or("");
    let specificity = |range: &str| {
        if range.eq_ignore_ascii_case(media) {
            Some(2)
        } else if range == "*/*" {
            Some(0)
        } else {
            range.strip_suffix("/*").filter(|k| k.eq_ignore_ascii_case(kind)).map(|_| 1)
        }
    };
    ranges
        .iter()
        .filter_map(|(range, q)| Some((specificity(range)?, *q)))
        .max_by_key(|(specific, _)| *specific)
        .map_or(0.0, |(_, q)| q)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gzip_is_for_those_who_take_it() {
        for (values, wanted) in [
            (&[][..], false),
            (&["gzip"], true),
            (&["GZIP;q=0.5, br"], true),
            (&["br", "x-gzip"], true),
            (&["*"], true),
            (&["gzip;q=0, *"], false),
            (&["*;q=0"], false),
            (&["br, identity"], false),
            (&[""], false),
        ] {
            let values = values.iter().map(|v| (header::ACCEPT_ENCODING, HeaderValue::from_static(v)));
            assert_eq!(takes_gzip(&values.clone().collect()), wanted, "{:?}", values.collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_most_specific_range_and_the_highest_quality_win() {
        let (json, svg) = ("application/json", "image/svg+xml");
        for (accept, wanted) in [
            (None, Some(json)),
            (Some("*/*"), Some(json)),
            (Some("image/svg+xml"), Some(svg)),
            (Some("image/*"), Some(svg)),
            (Some("text/html, image/svg+xml;q=0.9, */*;q=0.1"), Some(svg)),
            (Some("application/json;q=0.5, image/svg+xml;q=0.6"), Some(svg)),
            (Some("application/json;q=0, */*"), Some(svg)),
            (Some("text/html"), None),
            (Some("image/svg+xml;q=0"), None),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(accept) = accept {
                headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
            }
            assert_eq!(choose(&headers, &[json, svg]).ok(), wanted, "{accept:?}");
        }
    }
}
