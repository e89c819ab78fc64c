//! Draws a mirror's address space: guest-physical space, RAM, mirror-physical space and the helper's virtual
//! space as four bars side by side, with a band for every mapping between them, and beside them what the
//! plan lays open.
//!
//! Address spaces are sparse (a window at 2^51, a few MiB of RAM), so nothing is to scale: a piece is as high
//! as the logarithm of its size, and a gap is a dotted strip that names its size.

mod bar;
mod colours;
mod pieces;

use std::collections::HashSet;
use std::fmt::Write as _;

use mirrorvm::address_space::{Exposure, GuestLayout, MirrorPlan, Strategy};

use bar::Bar;
use pieces::{Band, LEGEND};

/// The media type of drawings.
pub const SVG: &str = "image/svg+xml";

const TOP: f64 = 134.0;
const BAR_WIDTH: f64 = 230.0;
const BARS: [f64; 4] = [30.0, 370.0, 710.0, 1050.0];
/// Where what is laid open is said, and how many characters fit there.
const BESIDE: f64 = 1330.0;
const BESIDE_FITS: usize = 52;
const WIDTH: f64 = 1710.0;
/// Pixels between lines of text.
const LINE: f64 = 16.0;

/// From where to where something is drawn, downwards.
type Span = (f64, f64);

/// The drawing of `plan` for a guest called `name`.
pub fn layout(plan: &MirrorPlan, layout: &GuestLayout, name: &str) -> String {
    let spaces = [
        pieces::guest(layout),
        pieces::ram(plan, layout),
        pieces::mirror(plan, layout),
        pieces::helper(plan),
    ];
    let bars = spaces.map(Bar::new);
    let bottom = TOP + bars.iter().map(Bar::height).fold(0.0, f64::max);
    let bars = bars.map(|bar| bar.standing_on(bottom));
    let classes: HashSet<&str> = bars.iter().flat_map(Bar::classes).collect();
    let entries: Vec<_> = LEGEND.iter().filter(|(class, _)| classes.contains(class)).collect();
    let below = bottom + 40.0 + 22.0 * entries.len().div_ceil(BARS.len()) as f64;
    let mut beside = String::new();
    let height = exposures(&mut beside, &plan.exposures).max(below);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" \
         height=\"{height:.0}\" role=\"img\"><title>Address space of a mirror of {name}</title>\
         <style>{style}</style><rect class=\"z\" width=\"100%\" height=\"100%\"/>",
        name = escape(name),
        style = colours::style(),
    );
    text(&mut svg, (BARS[0], 28.0), "h", &heading(plan, name));
    for (y, line) in [48.0, 66.0, 84.0].into_iter().zip(pieces::facts(plan)) {
        text(&mut svg, (BARS[0], y), "s", &line);
    }
    let titles = ["guest-physical", "RAM (RamAddr)", "mirror-physical", "helper-virtual"];
    for (x, title) in BARS.iter().zip(titles) {
        text(&mut svg, (*x, TOP - 14.0), "h", title);
    }
    // Bands first: bars and their text lie on top.
    let between =
        [pieces::guest_bands(layout), pieces::mirror_bands(plan, layout), pieces::helper_bands(plan)];
    for (i, list) in between.iter().enumerate() {
        bands(&mut svg, list, (&bars[i], BARS[i] + BAR_WIDTH), (&bars[i + 1], BARS[i + 1]));
    }
    for (x, bar) in BARS.iter().zip(&bars) {
        bar.draw(&mut svg, *x, BAR_WIDTH);
    }
    legend(&mut svg, &entries, bottom + 36.0);
    svg.push_str(&beside);
    svg.push_str("</svg>\n");
    svg
}

/// What the plan lays open, beside the bars; gives where that ends.
fn exposures(svg: &mut String, list: &[Exposure]) -> f64 {
    text(svg, (BESIDE, TOP - 14.0), "h", "what it lays open");
    let mut y = TOP + 12.0;
    for exposure in list {
        text(svg, (BESIDE, y), "c", exposure.code);
        y += LINE;
        for line in wrapped(&exposure.detail, BESIDE_FITS) {
            text(svg, (BESIDE, y), "s", &line);
            y += LINE;
        }
        y += LINE / 2.0;
    }
    y + LINE
}

/// A sentence in lines of at most `fits` characters, unless a word is longer.
fn wrapped(text: &str, fits: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= fits => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

fn heading(plan: &MirrorPlan, name: &str) -> String {
    let more = match plan.strategy {
        Strategy::Shifted { .. } => format!(", shift {}", size(plan.shift)),
        Strategy::IdentityCbit if plan.confidentiality.is_encrypted() => {
            ", C-bit on every private page".into()
        }
        Strategy::IdentityCbit => ", no C-bit here".into(),
        Strategy::Declared => format!(", {} pieces, window at {}", plan.helper.len(), size(plan.shift)),
        Strategy::PspCopied { .. } => ", helper private to the mirror".into(),
    };
    format!("{name}: strategy {}{more}", plan.strategy.name())
}

/// Bands between two bars, neighbours of one kind as one.
fn bands(svg: &mut String, list: &[Band], left: (&Bar, f64), right: (&Bar, f64)) {
    // Closer than what is worth telling apart, where there are many.
    const CLOSE: f64 = 4.0;
    /// Fewer are drawn one by one.
    const MANY: usize = 24;
    let mut open: Option<(&str, Span, Span)> = None;
    for b in list {
        let (Some(l), Some(r)) = (left.0.span(b.left, b.len), right.0.span(b.right, b.len)) else { continue };
        match &mut open {
            // The next one lies above.
            Some((class, (l0, _), (r0, _)))
                if *class == b.class
                    && (l.1 - *l0).abs() < CLOSE
                    && (r.1 - *r0).abs() < CLOSE
                    && list.len() > MANY =>
            {
                (*l0, *r0) = (l.0, r.0);
            }
            _ => {
                if let Some((class, l, r)) = open.replace((b.class, l, r)) {
                    band(svg, (left.1, l), (right.1, r), class);
                }
            }
        }
    }
    if let Some((class, l, r)) = open {
        band(svg, (left.1, l), (right.1, r), class);
    }
}

/// A band from the right edge of one bar to the left edge of the next; each side has an x and a span of y.
fn band(svg: &mut String, left: (f64, Span), right: (f64, Span), class: &str) {
    let ((x0, (a0, a1)), (x1, (b0, b1))) = (left, right);
    let middle = f64::midpoint(x0, x1);
    // Writing to a String does not fail.
    let _ = write!(
        svg,
        "<path class=\"b {class}\" d=\"M{x0} {a0:.1}C{middle} {a0:.1} {middle} {b0:.1} {x1} {b0:.1}L{x1} {b1:.1}\
         C{middle} {b1:.1} {middle} {a1:.1} {x0} {a1:.1}Z\"/>"
    );
}

/// Under each bar a column, of what occurs.
fn legend(svg: &mut String, entries: &[&(&str, &str)], y: f64) {
    for (i, (class, label)) in entries.iter().enumerate() {
        let (x, y) = (BARS[i % BARS.len()], y + 22.0 * (i / BARS.len()) as f64);
        let _ = write!(
            svg,
            "<rect class=\"p {class}\" x=\"{x}\" y=\"{}\" width=\"14\" height=\"14\"/>",
            y - 11.0
        );
        text(svg, (x + 20.0, y), "s", label);
    }
}

fn text(svg: &mut String, (x, y): (f64, f64), class: &str, content: &str) {
    let _ = write!(svg, "<text class=\"{class}\" x=\"{x}\" y=\"{y:.1}\">{}</text>", escape(content));
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A size for people, exact where it is a whole number of a unit.
fn size(bytes: u64) -> String {
    let units = [(1u64 << 50, "PiB"), (1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) if bytes.is_multiple_of(*unit) => format!("{} {name}", bytes / unit),
        Some((unit, name)) => format!("{:.1} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(size(4 << 30), "4 GiB");
        assert_eq!(size((3 << 30) + (512 << 20)), "3.5 GiB");
        assert_eq!(size(4096), "4 KiB");
        assert_eq!(size(1 << 51), "2 PiB");
    }

    #[test]
    fn text_cannot_end_an_element() {
        assert_eq!(escape("<a>&\"\u{1}"), "&lt;a&gt;&amp;&quot;\u{fffd}");
    }
}
