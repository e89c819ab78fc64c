//! One bar: pieces of an address space in order, gaps cut short.

use std::fmt::Write as _;

use super::{escape, size};

const GAP: f64 = 34.0;
const PIECE_MIN: f64 = 34.0;
const PIECE_MAX: f64 = 190.0;
/// Most pieces of one bar; with more, neighbours of one kind are drawn as one.
const PIECES_MAX: usize = 64;

/// A used span of an address space.
pub(super) struct Piece {
    start: u64,
    len: u64,
    label: String,
    class: &'static str,
    /// What of it the drawing shows: 1, or how many were joined.
    count: usize,
}

impl Piece {
    pub(super) fn new(start: u64, len: u64, label: String, class: &'static str) -> Self {
        Self { start, len, label, class, count: 1 }
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
        (PIECE_MIN + doublings * 5.0).min(PIECE_MAX)
    }

    /// The address line under the label.
    fn place(&self) -> String {
        let more = if self.count > 1 { format!(", {} pieces", self.count) } else { String::new() };
        format!("{:#x} +{}{more}", self.start, size(self.len))
    }
}

/// A piece with its place in the drawing.
struct Placed {
    piece: Piece,
    y: f64,
    /// Bytes that nothing uses right before the piece.
    gap: u64,
}

/// An address space as a column.
pub(super) struct Bar {
    placed: Vec<Placed>,
    bottom: f64,
}

impl Bar {
    /// Places `pieces`, which must not overlap, from `top` downwards.
    pub(super) fn new(mut pieces: Vec<Piece>, top: f64) -> Self {
        pieces.sort_by_key(|p| p.start);
        if pieces.len() > PIECES_MAX {
            pieces = joined(pieces);
        }
        let (mut y, mut at) = (top, 0u64);
        let mut placed = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let gap = piece.start.saturating_sub(at);
            if gap > 0 {
                y += GAP;
            }
            at = piece.end();
            let height = piece.height();
            placed.push(Placed { piece, y, gap });
            y += height;
        }
        Self { placed, bottom: y }
    }

    /// Where the bar ends.
    pub(super) fn bottom(&self) -> f64 {
        self.bottom
    }

    /// The classes of its pieces.
    pub(super) fn classes(&self) -> impl Iterator<Item = &'static str> {
        self.placed.iter().map(|p| p.piece.class())
    }

    /// Where `len` bytes from `start` are drawn, when one piece holds the start.
    pub(super) fn span(&self, start: u64, len: u64) -> Option<(f64, f64)> {
        let after = self.placed.partition_point(|p| p.piece.start <= start);
        let held = self.placed.get(after.checked_sub(1)?).filter(|p| start < p.piece.end())?;
        let scale = held.piece.height() / held.piece.len as f64;
        let from = (start - held.piece.start) as f64;
        let to = (from + len as f64).min(held.piece.len as f64);
        Some((held.y + from * scale, held.y + to * scale))
    }

    /// Draws the bar with its left edge at `x`.
    pub(super) fn draw(&self, svg: &mut String, x: f64, width: f64) {
        for Placed { piece, y, gap } in &self.placed {
            // Writing to a String does not fail.
            if *gap > 0 {
                let _ = write!(
                    svg,
                    "<rect class=\"g\" x=\"{x}\" y=\"{:.1}\" width=\"{width}\" height=\"{GAP}\"/>\
                     <text class=\"a\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">nothing for {}</text>",
                    y - GAP,
                    x + width / 2.0,
                    y - GAP / 2.0 + 4.0,
                    size(*gap),
                );
            }
            let _ = write!(
                svg,
                "<rect class=\"p {}\" x=\"{x}\" y=\"{y:.1}\" width=\"{width}\" height=\"{:.1}\">\
                 <title>{}: {}</title></rect>\
                 <text x=\"{}\" y=\"{:.1}\">{}</text><text class=\"a\" x=\"{}\" y=\"{:.1}\">{}</text>",
                piece.class,
                piece.height(),
                escape(&piece.label),
                piece.place(),
                x + 8.0,
                y + 15.0,
                escape(&shorten(&piece.label)),
                x + 8.0,
                y + 29.0,
                piece.place(),
            );
        }
    }
}

/// Neighbours of one class as one piece, with the gaps between them, if those are smaller than what is around
/// them.
fn joined(pieces: Vec<Piece>) -> Vec<Piece> {
    let mut list: Vec<Piece> = Vec::new();
    for piece in pieces {
        match list.last_mut() {
            Some(last)
                if last.class == piece.class && piece.start - last.end() <= last.len.max(piece.len) =>
            {
                last.len = piece.end() - last.start;
                last.count += piece.count;
                let first = last.label.split(" \u{2026} ").next().unwrap_or_default();
                last.label = format!("{first} \u{2026} {}", piece.label);
            }
            _ => list.push(piece),
        }
    }
    list
}

/// What fits into a bar's width.
fn shorten(label: &str) -> String {
    const FITS: usize = 30;
    if label.chars().count() <= FITS {
        return label.to_owned();
    }
    let mut short: String = label.chars().take(FITS - 1).collect();
    short.push('\u{2026}');
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_pieces_are_drawn_as_few_and_still_found() {
        let piece = |i: u64| Piece::new(i * 0x3000, 0x2000, format!("b{i}"), "ram");
        let bar = Bar::new((0..10_000).map(piece).collect(), 0.0);
        assert_eq!(bar.placed.len(), 1);
        assert_eq!(
            (bar.placed[0].piece.count, bar.placed[0].piece.label.as_str()),
            (10_000, "b0 \u{2026} b9999")
        );
        let (from, to) = bar.span(9_999 * 0x3000, 0x2000).unwrap();
        assert!(from < to && to <= bar.bottom());
        assert_eq!(bar.span(10_000 * 0x3000, 1), None);
        // Few pieces, and those of another kind, stay by themselves.
        let few = Bar::new((0..60).map(piece).collect(), 0.0);
        assert_eq!(few.placed.len(), 60);
    }
}
