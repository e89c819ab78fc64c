//! One bar: pieces of an address space from the bottom up, gaps cut short.

use std::fmt::Write as _;

use super::{Span, escape, size};

const GAP: f64 = 30.0;
const PIECE_MIN: f64 = 36.0;
const PIECE_MAX: f64 = 110.0;
/// More pieces than that, and the middle of a run of one kind is drawn as one.
const PIECES_MAX: usize = 12;
/// Of such a run: so many at its beginning stay by themselves, and one at its end.
const KEPT: usize = 2;
/// Characters that fit into a bar's width.
const FITS: usize = 29;
/// Pixels of a line of text.
const LINE: f64 = 14.0;

/// A used span of an address space.
pub(super) struct Piece {
    start: u64,
    len: u64,
    label: String,
    class: &'static str,
    /// What may be done there, where the drawing says so.
    access: &'static str,
    /// What of it the drawing shows: 1, or how many were folded.
    count: usize,
}

impl Piece {
    pub(super) fn new(start: u64, len: u64, label: String, class: &'static str) -> Self {
        Self { start, len, label, class, access: "", count: 1 }
    }

    pub(super) fn with_access(self, access: &'static str) -> Self {
        Self { access, ..self }
    }

    pub(super) fn class(&self) -> &'static str {
        self.class
    }

    fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// 4 KiB is lowest, every doubling adds a little.
    fn height(&self) -> f64 {
        let doublings = (self.len.max(4096) as f64 / 4096.0).log2();
        let folded = if self.count > 1 { LINE } else { 0.0 };
        (PIECE_MIN + doublings * 2.5).min(PIECE_MAX) + folded
    }

    /// The address line under the label.
    fn place(&self) -> String {
        format!("{:#x} +{}", self.start, size(self.len))
    }

    /// What was folded, if anything was.
    fn folded(&self) -> Option<String> {
        (self.count > 1).then(|| format!("{} pieces", self.count))
    }
}

/// A piece with its place in the drawing.
struct Placed {
    piece: Piece,
    /// From the bottom of the bar to the piece's.
    up: f64,
    /// Bytes that nothing uses right below the piece.
    gap: u64,
}

/// An address space as a column.
pub(super) struct Bar {
    placed: Vec<Placed>,
    height: f64,
    bottom: f64,
}

impl Bar {
    /// Puts `pieces`, which must not overlap, on each other; the lowest address is at the bottom.
    pub(super) fn new(mut pieces: Vec<Piece>) -> Self {
        pieces.sort_by_key(|p| p.start);
        if pieces.len() > PIECES_MAX {
            pieces = folded(pieces);
        }
        let (mut up, mut at) = (0.0, 0u64);
        let mut placed = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let gap = piece.start.saturating_sub(at);
            if gap > 0 {
                up += GAP;
            }
            at = piece.end();
            let height = piece.height();
            placed.push(Placed { piece, up, gap });
            up += height;
        }
        Self { placed, height: up, bottom: 0.0 }
    }

    /// How high it is.
    pub(super) fn height(&self) -> f64 {
        self.height
    }

    /// The same with its bottom at `y`.
    pub(super) fn standing_on(self, y: f64) -> Self {
        Self { bottom: y, ..self }
    }

    /// The classes of its pieces.
    pub(super) fn classes(&self) -> impl Iterator<Item = &'static str> {
        self.placed.iter().map(|p| p.piece.class())
    }

    /// Where `len` bytes from `start` are drawn, from top to bottom, when one piece holds the start.
    pub(super) fn span(&self, start: u64, len: u64) -> Option<Span> {
        let after = self.placed.partition_point(|p| p.piece.start <= start);
        let held = self.placed.get(after.checked_sub(1)?).filter(|p| start < p.piece.end())?;
        let scale = held.piece.height() / held.piece.len as f64;
        let from = (start - held.piece.start) as f64;
        let to = (from + len as f64).min(held.piece.len as f64);
        let low = self.bottom - held.up;
        Some((low - to * scale, low - from * scale))
    }

    /// Draws the bar with its left edge at `x`.
    pub(super) fn draw(&self, svg: &mut String, x: f64, width: f64) {
        for Placed { piece, up, gap } in &self.placed {
            let (height, low) = (piece.height(), self.bottom - up);
            let y = low - height;
            // Writing to a String does not fail.
            if *gap > 0 {
                let _ = write!(
                    svg,
                    "<rect class=\"g\" x=\"{x}\" y=\"{low:.1}\" width=\"{width}\" height=\"{GAP}\"/>\
                     <text class=\"a s\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">nothing for {}</text>",
                    x + width / 2.0,
                    low + GAP / 2.0 + 4.0,
                    size(*gap),
                );
            }
            let room = FITS - if piece.access.is_empty() { 0 } else { piece.access.len() + 1 };
            let _ = write!(
                svg,
                "<rect class=\"p {}\" x=\"{x}\" y=\"{y:.1}\" width=\"{width}\" height=\"{height:.1}\">\
                 <title>{}: {}</title></rect><text x=\"{}\" y=\"{:.1}\">{}</text>",
                piece.class,
                escape(&piece.label),
                [Some(piece.place()), piece.folded()].into_iter().flatten().collect::<Vec<_>>().join(", "),
                x + 8.0,
                y + 15.0,
                escape(&shorten(&piece.label, room)),
            );
            if !piece.access.is_empty() {
                let _ = write!(
                    svg,
                    "<text class=\"c\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                    x + width - 8.0,
                    y + 15.0,
                    piece.access,
                );
            }
            for (line, text) in (1..).zip([Some(piece.place()), piece.folded()].into_iter().flatten()) {
                let y = y + 15.0 + LINE * f64::from(line);
                let _ = write!(svg, "<text class=\"a\" x=\"{}\" y=\"{y:.1}\">{text}</text>", x + 8.0);
            }
        }
    }
}

/// Long runs of one kind, with as little as a reader needs of them: the first ones, the last, and one piece
/// for all between, gaps included.
fn folded(pieces: Vec<Piece>) -> Vec<Piece> {
    let mut list: Vec<Piece> = Vec::new();
    let mut pieces = pieces.into_iter().peekable();
    while let Some(first) = pieces.next() {
        let is_alike = {
            let (class, access) = (first.class, first.access);
            move |next: &Piece| next.class == class && next.access == access
        };
        let mut run = vec![first];
        while let Some(next) = pieces.next_if(is_alike) {
            run.push(next);
        }
        if run.len() > KEPT + 2 {
            let middle: Vec<Piece> = run.drain(KEPT..run.len() - 1).collect();
            if let [from, .., to] = middle.as_slice() {
                let label = {
                    // What they are is said once.
                    let last = to.label.rsplit(": ").next().unwrap_or_default();
                    format!("{} \u{2026} {last}", from.label)
                };
                let whole = Piece {
                    count: middle.len(),
                    ..Piece::new(from.start, to.end() - from.start, label, from.class)
                };
                run.insert(KEPT, whole.with_access(from.access));
            }
        }
        list.append(&mut run);
    }
    list
}

/// As much of a label as fits.
fn shorten(label: &str, fits: usize) -> String {
    if label.chars().count() <= fits {
        return label.to_owned();
    }
    let mut short: String = label.chars().take(fits - 1).collect();
    short.push('\u{2026}');
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_pieces_are_drawn_as_few_and_still_found() {
        // With gaps that are larger than they.
        let piece = |i: u64| Piece::new(i * 0x9000, 0x2000, format!("b{i}"), "ram");
        let bar = Bar::new((0..10_000).map(piece).collect()).standing_on(500.0);
        let shown: Vec<_> = bar.placed.iter().map(|p| (p.piece.label.as_str(), p.piece.count)).collect();
        assert_eq!(shown, [("b0", 1), ("b1", 1), ("b2 \u{2026} b9998", 9997), ("b9999", 1)]);
        for i in [0, 1, 2, 5000, 9998, 9999] {
            let (top, low) = bar.span(i * 0x9000, 0x2000).unwrap();
            assert!(500.0 - bar.height() <= top && top < low && low <= 500.0, "{i}: {top} {low}");
        }
        assert_eq!(bar.span(10_000 * 0x9000, 1), None);
        // Few pieces stay by themselves, and so do short runs of a kind among many.
        let few = Bar::new((0..12).map(piece).collect());
        assert_eq!(few.placed.len(), 12);
        let kinds = ["ram", "low", "helper", "code"];
        let turns = (0..16).map(|i| Piece::new(i << 12, 4096, String::new(), kinds[i as usize / 4]));
        assert_eq!(Bar::new(turns.collect()).placed.len(), 16);
    }

    #[test]
    fn addresses_grow_upwards() {
        let bar = Bar::new(vec![
            Piece::new(0x8000, 0x1000, "high".into(), "ram"),
            Piece::new(0, 0x1000, "low".into(), "ram"),
        ]);
        let bar = bar.standing_on(300.0);
        let (low, high) = (bar.span(0, 0x1000).unwrap(), bar.span(0x8000, 0x1000).unwrap());
        assert!((low.1 - 300.0).abs() < 1e-9 && high.1 < low.0, "{low:?} {high:?}");
    }
}
