//! Draws a mirror's address space: guest-physical space, RAM and mirror-physical space as three bars side by
//! side, with a band for every mapping between them.
//!
//! Address spaces are sparse (a window at 2^51, a few MiB of RAM), so nothing is to scale: a piece is as high
//! as the logarithm of its size, and a gap is a dotted strip that names its size.

mod bar;
mod pieces;

use std::collections::HashSet;
use std::fmt::Write as _;

use mirrorvm::address_space::{GuestLayout, MirrorPlan, Strategy};

use bar::Bar;
use pieces::{Band, LEGEND};

/// The media type of drawings.
pub const SVG: &str = "image/svg+xml";

const TOP: f64 = 118.0;
const BAR_WIDTH: f64 = 230.0;
const BARS: [f64; 3] = [30.0, 430.0, 830.0];
const WIDTH: f64 = 1090.0;

const STYLE: &str = "text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#1b1f24}\
    .h{font:600 15px system-ui,sans-serif}.s{font:12px system-ui,sans-serif;fill:#57606a}\
    .a{font-size:10.5px;fill:#57606a}.g{fill:none;stroke:#afb8c1;stroke-dasharray:2 4}\
    .p{stroke:#1b1f24;stroke-width:1}.ram{fill:#b6d7ff}.low{fill:#d0c8ff}.vmsa{fill:#f6c6ea}\
    .helper{fill:#ffd8a8}.code{fill:#ffb454}.private{fill:#f08c4a}.mailbox{fill:#d8f5c8}\
    .off{fill:#e4eefb;stroke-dasharray:5 3}.out{fill:#ececec;stroke-dasharray:5 3}\
    .b{fill-opacity:.22;stroke-opacity:.55;stroke-width:.8}\
    .b.ram{stroke:#2f6fd0}.b.helper,.b.code{stroke:#c2690a}.b.low{stroke:#5b45c9}.b.vmsa{stroke:#b02a8f}";

/// From where to where something is drawn, downwards.
type Span = (f64, f64);

/// The drawing of `plan` for a guest called `name`.
pub fn layout(plan: &MirrorPlan, layout: &GuestLayout, name: &str) -> String {
    let guest = Bar::new(pieces::guest(layout), TOP);
    let ram = Bar::new(pieces::ram(plan, layout), TOP);
    let mirror = Bar::new(pieces::mirror(plan, layout), TOP);
    let classes: HashSet<&str> = [&guest, &ram, &mirror].iter().flat_map(|b| b.classes()).collect();
    let entries: Vec<_> = LEGEND.iter().filter(|(class, _)| classes.contains(class)).collect();
    let bottom = [&guest, &ram, &mirror].iter().map(|b| b.bottom()).fold(TOP, f64::max);
    let height = bottom + 40.0 + 22.0 * entries.len().div_ceil(3) as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" \
         height=\"{height:.0}\" role=\"img\"><title>Address space of a mirror of {name}</title>\
         <style>{STYLE}</style><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>",
        name = escape(name),
    );
    text(&mut svg, (BARS[0], 28.0), "h", &heading(plan, name));
    for (y, line) in [48.0, 66.0].into_iter().zip(pieces::facts(plan)) {
        text(&mut svg, (BARS[0], y), "s", &line);
    }
    let titles = ["guest-physical", "RAM (RamAddr)", "mirror-physical"];
    for (x, title) in BARS.iter().zip(titles) {
        text(&mut svg, (*x, TOP - 14.0), "h", title);
    }
    // Bands first: bars and their text lie on top.
    let (left, right) = (pieces::guest_bands(layout), pieces::mirror_bands(plan, layout));
    bands(&mut svg, &left, (&guest, BARS[0] + BAR_WIDTH), (&ram, BARS[1]), |b| (b.address, b.ram));
    bands(&mut svg, &right, (&ram, BARS[1] + BAR_WIDTH), (&mirror, BARS[2]), |b| (b.ram, b.address));
    for (x, bar) in BARS.iter().zip([&guest, &ram, &mirror]) {
        bar.draw(&mut svg, *x, BAR_WIDTH);
    }
    legend(&mut svg, &entries, bottom + 36.0);
    svg.push_str("</svg>\n");
    svg
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

/// Bands between two bars, neighbours of one kind as one. `sides` says which address of a band belongs to
/// which bar.
fn bands(
    svg: &mut String,
    list: &[Band],
    left: (&Bar, f64),
    right: (&Bar, f64),
    sides: impl Fn(&Band) -> (u64, u64),
) {
    // Closer than what an eye tells apart.
    const CLOSE: f64 = 0.75;
    let mut open: Option<(&str, Span, Span)> = None;
    for b in list {
        let (from, to) = sides(b);
        let (Some(l), Some(r)) = (left.0.span(from, b.len), right.0.span(to, b.len)) else { continue };
        match &mut open {
            Some((class, (_, l1), (_, r1)))
                if *class == b.class
                    && (l.0 - *l1).abs() < CLOSE
                    && (r.0 - *r1).abs() < CLOSE
                    && list.len() > 64 =>
            {
                (*l1, *r1) = (l.1, r.1);
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

/// Three columns under the bars, of what occurs.
fn legend(svg: &mut String, entries: &[&(&str, &str)], y: f64) {
    for (i, (class, label)) in entries.iter().enumerate() {
        let (x, y) = (BARS[i % 3], y + 22.0 * (i / 3) as f64);
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
