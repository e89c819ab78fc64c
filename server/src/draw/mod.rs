//! Draws a mirror's address space: guest-physical space, RAM and mirror-physical space as three bars side by
//! side, with a band for every mapping between them.
//!
//! Address spaces are sparse (a window at 2^51, a few MiB of RAM), so nothing is to scale: a piece is as high as
//! the logarithm of its size, and a gap is a dotted strip that names its size.

mod bar;

use std::fmt::Write as _;

use mirrorvm::address_space::{BlockRole, GuestLayout, MirrorPlan, Purpose, SlotBacking};

use crate::api::layout::purpose_name;
use bar::{Bar, Piece};

/// The media type of drawings.
pub const SVG: &str = "image/svg+xml";

const TOP: f64 = 96.0;
const BAR_WIDTH: f64 = 200.0;
const BARS: [f64; 3] = [30.0, 430.0, 830.0];
const WIDTH: f64 = 1060.0;

const STYLE: &str = "text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#1b1f24}\
    .h{font:600 15px system-ui,sans-serif}.s{font:12px system-ui,sans-serif;fill:#57606a}\
    .a{font-size:10.5px;fill:#57606a}.g{fill:none;stroke:#afb8c1;stroke-dasharray:2 4}\
    .p{stroke:#1b1f24;stroke-width:1}.ram{fill:#b6d7ff}.helper{fill:#ffd8a8}.mailbox{fill:#d8f5c8}\
    .low{fill:#d0c8ff}.b{fill-opacity:.22;stroke-opacity:.55;stroke-width:.8}\
    .b.ram{stroke:#2f6fd0}.b.helper{stroke:#c2690a}.b.low{stroke:#5b45c9}";

/// The drawing of `plan` for a guest called `name`.
pub fn layout(plan: &MirrorPlan, layout: &GuestLayout, name: &str) -> String {
    let guest = Bar::new(guest_pieces(layout), TOP);
    let ram = Bar::new(ram_pieces(layout), TOP);
    let mirror = Bar::new(mirror_pieces(plan, layout), TOP);
    let height = [&guest, &ram, &mirror].iter().map(|b| b.bottom()).fold(TOP, f64::max) + 62.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" \
         height=\"{height:.0}\" role=\"img\"><title>Address space of a mirror of {name}</title>\
         <style>{STYLE}</style><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>",
        name = escape(name),
    );
    let titles = ["guest-physical", "RAM (RamAddr)", "mirror-physical"];
    let heading = format!("{}: strategy {}, shift {}", name, plan.strategy.name(), size(plan.shift));
    text(&mut svg, (BARS[0], 28.0), "h", &heading);
    text(&mut svg, (BARS[0], 47.0), "s", "addresses grow downwards; heights are logarithmic, gaps are cut");
    for (x, title) in BARS.iter().zip(titles) {
        text(&mut svg, (*x, TOP - 14.0), "h", title);
    }
    // Bands first: bars and their text lie on top.
    for (block, plug) in layout.plugged() {
        let from = guest.span(plug.gpa.get(), plug.len);
        let to = ram.span(block.ram_addr.get() + plug.offset, plug.len);
        band(&mut svg, (BARS[0] + BAR_WIDTH, from), (BARS[1], to), class_of(block.role));
    }
    for slot in &plan.slots {
        if let SlotBacking::Ram { ram_addr } = slot.backing {
            let from = ram.span(ram_addr.get(), slot.len);
            let to = mirror.span(slot.gpa.get(), slot.len);
            let class = mirror_class(slot.purpose, ram_addr.get(), layout);
            band(&mut svg, (BARS[1] + BAR_WIDTH, from), (BARS[2], to), class);
        }
    }
    for (x, bar) in BARS.iter().zip([&guest, &ram, &mirror]) {
        bar.draw(&mut svg, *x, BAR_WIDTH);
    }
    legend(&mut svg, height - 26.0);
    svg.push_str("</svg>\n");
    svg
}

fn guest_pieces(layout: &GuestLayout) -> Vec<Piece> {
    let plugged = layout.plugged().into_iter();
    plugged.map(|(b, p)| Piece::new(p.gpa.get(), p.len, b.name.clone(), class_of(b.role))).collect()
}

fn ram_pieces(layout: &GuestLayout) -> Vec<Piece> {
    let piece = |b: &mirrorvm::address_space::RamBlock| {
        let note = if b.plugs.is_empty() { " (unplugged)" } else { "" };
        Piece::new(b.ram_addr.get(), b.size, format!("{}{note}", b.name), class_of(b.role))
    };
    layout.blocks().iter().map(piece).collect()
}

fn mirror_pieces(plan: &MirrorPlan, layout: &GuestLayout) -> Vec<Piece> {
    let piece = |s: &mirrorvm::address_space::MirrorSlot| {
        let (class, label) = match s.backing {
            SlotBacking::Ram { ram_addr } => {
                let block = layout.blocks().iter().find(|b| b.ram_range().contains(ram_addr.get()));
                let block = block.map_or("", |b| b.name.as_str());
                (
                    mirror_class(s.purpose, ram_addr.get(), layout),
                    format!("{}: {block}", purpose_name(s.purpose)),
                )
            }
            SlotBacking::Private { .. } => ("helper", purpose_name(s.purpose).to_owned()),
            SlotBacking::Mailbox => ("mailbox", "mailbox".to_owned()),
        };
        Piece::new(s.gpa.get(), s.len, label, class)
    };
    plan.slots.iter().map(piece).collect()
}

const fn class_of(role: BlockRole) -> &'static str {
    match role {
        BlockRole::Ram | BlockRole::Vmsa => "ram",
        BlockRole::Helper => "helper",
    }
}

fn mirror_class(purpose: Purpose, ram_addr: u64, layout: &GuestLayout) -> &'static str {
    let block = layout.blocks().iter().find(|b| b.ram_range().contains(ram_addr));
    match block.map(|b| b.role) {
        Some(BlockRole::Helper) => "helper",
        _ if purpose == Purpose::LowWindow => "low",
        _ => "ram",
    }
}

/// A band from the right edge of one bar to the left edge of the next; each side has an x and a span of y.
fn band(svg: &mut String, left: (f64, Option<(f64, f64)>), right: (f64, Option<(f64, f64)>), class: &str) {
    let (x0, Some((a0, a1)), x1, Some((b0, b1))) = (left.0, left.1, right.0, right.1) else { return };
    let middle = f64::midpoint(x0, x1);
    // Writing to a String does not fail.
    let _ = write!(
        svg,
        "<path class=\"b {class}\" d=\"M{x0} {a0:.1}C{middle} {a0:.1} {middle} {b0:.1} {x1} {b0:.1}L{x1} {b1:.1}\
         C{middle} {b1:.1} {middle} {a1:.1} {x0} {a1:.1}Z\"/>"
    );
}

fn legend(svg: &mut String, y: f64) {
    let entries = [
        ("ram", "RAM"),
        ("low", "RAM again, bottom 4 GiB one to one"),
        ("helper", "the helper's block"),
        ("mailbox", "mailbox (host memory)"),
    ];
    let mut x = BARS[0];
    for (class, label) in entries {
        let _ = write!(
            svg,
            "<rect class=\"p {class}\" x=\"{x}\" y=\"{}\" width=\"14\" height=\"14\"/>",
            y - 11.0
        );
        text(svg, (x + 20.0, y), "s", label);
        x += 60.0 + label.len() as f64 * 6.6;
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
