//! What the drawing's colours are, by day and by night.
//!
//! Owns: the palette and the style sheet made of it. Must not know: what is drawn.

use std::fmt::Write as _;

/// A colour on a light ground, and its counterpart on a dark one.
type Pair = [&'static str; 2];

/// Ground, text, and text that matters less.
const GROUND: Pair = ["#ffffff", "#0d1117"];
const TEXT: Pair = ["#1b1f24", "#f0f3f6"];
const MUTED: Pair = ["#57606a", "#9ea7b3"];
const EDGE: Pair = ["#1b1f24", "#8b949e"];
const GAP: Pair = ["#8c959f", "#6e7681"];

/// Fills of pieces by class; text lies on them.
const FILLS: [(&str, Pair); 9] = [
    ("ram", ["#b6d7ff", "#1f4b82"]),
    ("low", ["#d0c8ff", "#453a86"]),
    ("off", ["#e4eefb", "#22303f"]),
    ("out", ["#ececec", "#33383e"]),
    ("vmsa", ["#f6c6ea", "#722a60"]),
    ("helper", ["#ffd8a8", "#6d4210"]),
    ("code", ["#ffb454", "#7f4a00"]),
    ("private", ["#f5a26f", "#7d3512"]),
    ("mailbox", ["#d8f5c8", "#2a5720"]),
];

/// Edges of bands by class; the others have those of pieces.
const BANDS: [(&str, Pair); 7] = [
    ("ram", ["#2f6fd0", "#6cb0ff"]),
    ("low", ["#5b45c9", "#a99aff"]),
    ("vmsa", ["#b02a8f", "#f08ed6"]),
    ("helper", ["#c2690a", "#ffb454"]),
    ("code", ["#c2690a", "#ffb454"]),
    ("private", ["#b3470f", "#ff9c66"]),
    ("mailbox", ["#3c8527", "#8fdc75"]),
];

/// The style sheet: shapes once, colours for each scheme.
pub(super) fn style() -> String {
    let mut css = String::from(
        "text{font:12px ui-monospace,Menlo,Consolas,monospace}.h{font:600 15px system-ui,sans-serif}\
         .s{font:12px system-ui,sans-serif}.a{font-size:10.5px}.c{font-weight:600}\
         .g{fill:none;stroke-dasharray:2 4}.p{stroke-width:1}.off,.out{stroke-dasharray:5 3}\
         .b{fill-opacity:.22;stroke-opacity:.55;stroke-width:.8}",
    );
    for (scheme, night) in ["", "@media(prefers-color-scheme:dark){"].into_iter().zip(0usize..) {
        css.push_str(scheme);
        // Writing to a String does not fail.
        let _ = write!(
            css,
            ".z{{fill:{}}}text{{fill:{}}}.s{{fill:{}}}.p{{stroke:{}}}.g{{stroke:{}}}",
            GROUND[night], TEXT[night], MUTED[night], EDGE[night], GAP[night]
        );
        for (class, fill) in FILLS {
            let _ = write!(css, ".{class}{{fill:{}}}", fill[night]);
        }
        for (class, edge) in BANDS {
            let _ = write!(css, ".b.{class}{{stroke:{}}}", edge[night]);
        }
        if !scheme.is_empty() {
            css.push('}');
        }
    }
    css
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relative luminance and contrast by WCAG 2.1.
    fn luminance(colour: &str) -> f64 {
        let channel = |at: usize| {
            let value = f64::from(u8::from_str_radix(&colour[at..at + 2], 16).unwrap()) / 255.0;
            if value <= 0.04045 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
        };
        0.2126 * channel(1) + 0.7152 * channel(3) + 0.0722 * channel(5)
    }

    fn contrast(a: &str, b: &str) -> f64 {
        let (a, b) = (luminance(a), luminance(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    #[test]
    fn all_text_can_be_read_by_day_and_by_night() {
        assert!((contrast("#ffffff", "#000000") - 21.0).abs() < 1e-9);
        for night in [0, 1] {
            let on_ground =
                [("text", TEXT), ("muted text", MUTED)].map(|(what, c)| (what, c[night], GROUND[night]));
            let on_pieces = FILLS.map(|(class, fill)| (class, TEXT[night], fill[night]));
            for (what, text, ground) in on_ground.into_iter().chain(on_pieces) {
                // Level AA, text of this size.
                assert!(contrast(text, ground) >= 4.5, "{what}: {text} on {ground}");
            }
            for (class, edge) in BANDS {
                // Level AA, graphics.
                assert!(contrast(edge[night], GROUND[night]) >= 3.0, "{class}");
            }
        }
    }
}
