//! Owns the reading of `info mtree -f`: where in guest-physical space the main RAM block shows. Pure text in,
//! values out; must not know where the text came from.
//!
//! The view changes while firmware runs: until SeaBIOS has copied itself, 0xc0000-0xfffff show option ROMs
//! and the BIOS; afterwards they show RAM, partly read-only. RAM that does not show keeps its bytes, so what
//! is copied is chosen by offset in the block, never by this view.

use super::ramblock::LayoutError;

/// More ranges than any machine we start has; a longer view is refused.
const MAX_RANGES: usize = 4096;

/// A stretch of guest-physical space that shows a stretch of the main RAM block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamPiece {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Offset of that byte in the block, which is also its offset in the memfd.
    pub offset_in_block: u64,
    /// Length in bytes, never zero.
    pub len: u64,
}

/// Finds the flat view of the address space `memory` and returns where the block called `block` (of
/// `block_len` bytes) shows in it, in rising address order, with neighbours merged. Pieces that the guest may
/// only read count.
///
/// # Errors
/// [`LayoutError::NoView`], or the first thing in the view that cannot be believed. A block that shows
/// nowhere is no error: the answer is empty.
pub fn parse_ram_pieces(text: &str, block: &str, block_len: u64) -> Result<Vec<RamPiece>, LayoutError> {
    let mut pieces: Vec<RamPiece> = Vec::new();
    let mut next_free = Some(0u64);
    for (number, line) in memory_view(text).ok_or(LayoutError::NoView)? {
        let range = parse_range(line).ok_or(LayoutError::BadRange { line: number })?;
        if next_free.is_none_or(|free| range.first < free) {
            return Err(LayoutError::Disorder { gpa: range.first });
        }
        next_free = range.last.checked_add(1);
        if !range.is_memory || range.region != block {
            continue;
        }
        let outside =
            |len| LayoutError::OutsideBlock { gpa: range.first, offset: range.offset, len, block_len };
        let len = (range.last - range.first).checked_add(1).ok_or_else(|| outside(u64::MAX))?;
        if range.offset.checked_add(len).is_none_or(|end| end > block_len) {
            return Err(outside(len));
        }
        if let Some(last) = pieces.last_mut()
            && last.gpa + last.len == range.first
            && last.offset_in_block + last.len == range.offset
        {
            last.len += len;
            continue;
        }
        if pieces.len() == MAX_RANGES {
            return Err(LayoutError::TooMany { limit: MAX_RANGES });
        }
        pieces.push(RamPiece { gpa: range.first, offset_in_block: range.offset, len });
    }
    Ok(pieces)
}

/// The range lines (with their numbers, from 1) of the flat view that the address space `memory` uses. A view
/// opens with the names of all address spaces that share it.
fn memory_view(text: &str) -> Option<impl Iterator<Item = (usize, &str)>> {
    let mut lines = text.lines().enumerate();
    lines.find(|(_, line)| line.trim_start().starts_with("AS \"memory\","))?;
    Some(
        lines
            .take_while(|(_, line)| !line.trim().is_empty() && !line.starts_with("FlatView"))
            .map(|(index, line)| (index + 1, line.trim()))
            .filter(|(_, line)| {
                !["AS \"", "Root memory region:", "No rendered FlatView"]
                    .iter()
                    .any(|heading| line.starts_with(heading))
            }),
    )
}

/// `first-last (prio N, kind): region[ @offset][ accelerator]`.
struct Range<'a> {
    first: u64,
    last: u64,
    is_memory: bool,
    region: &'a str,
    offset: u64,
}

fn parse_range(line: &str) -> Option<Range<'_>> {
    let (bounds, rest) = line.split_once(" (prio ")?;
    let (first, last) = bounds.split_once('-')?;
    let (first, last) = (hex(first)?, hex(last)?);
    let (attributes, named) = rest.split_once("): ")?;
    let (_, kind) = attributes.split_once(", ")?;
    let mut words = named.split_whitespace();
    let region = words.next()?;
    // Device names may hold spaces and `@`; the block looked for does not, so a second word that is no offset
    // only ever belongs to something else.
    let offset = words.next().and_then(|word| word.strip_prefix('@')).and_then(hex).unwrap_or(0);
    // `ram` and `rom`; also `nv-ram` and `nv-rom` (persistent memory). `romd`, `ramd` and `i/o` are devices.
    let is_memory = matches!(kind.trim_start_matches("nv-"), "ram" | "rom");
    (first <= last).then_some(Range { first, last, is_memory, region, offset })
}

fn hex(digits: &str) -> Option<u64> {
    // `from_str_radix` would take a sign.
    if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOOTED: &str = include_str!("testdata/mtree-7.2-pc-booted.txt");
    const PRELAUNCH: &str = include_str!("testdata/mtree-7.2-pc-prelaunch.txt");
    const FOUR_GIB: &str = include_str!("testdata/mtree-7.2-pc-4g-prelaunch.txt");
    const Q35: &str = include_str!("testdata/mtree-7.2-q35-booted.txt");
    const V10: &str = include_str!("testdata/mtree-10.0-pc-booted.txt");
    const MIB: u64 = 1 << 20;

    fn piece(gpa: u64, offset_in_block: u64, len: u64) -> RamPiece {
        RamPiece { gpa, offset_in_block, len }
    }

    #[test]
    fn a_booted_machine_shows_all_of_its_ram_in_one_piece() {
        for text in [BOOTED, Q35, V10] {
            let pieces = parse_ram_pieces(text, "ram0", 256 * MIB).unwrap();
            assert_eq!(pieces, [piece(0, 0, 256 * MIB)]);
        }
    }

    #[test]
    fn before_the_firmware_ran_roms_hide_a_piece() {
        let pieces = parse_ram_pieces(PRELAUNCH, "ram0", 256 * MIB).unwrap();
        assert_eq!(pieces, [piece(0, 0, 0xc0000), piece(MIB, MIB, 255 * MIB)]);
    }

    #[test]
    fn ram_past_the_pci_hole_keeps_its_offset() {
        let pieces = parse_ram_pieces(FOUR_GIB, "ram0", 4096 * MIB).unwrap();
        assert_eq!(
            pieces,
            [piece(0, 0, 0xc0000), piece(MIB, MIB, 3071 * MIB), piece(4096 * MIB, 3072 * MIB, 1024 * MIB)]
        );
    }

    #[test]
    fn refuses_lies() {
        let view = |ranges: &str| format!("FlatView #0\n AS \"memory\", root: system\n{ranges}\n");
        let parse = |ranges: &str| parse_ram_pieces(&view(ranges), "ram0", MIB);
        assert_eq!(parse_ram_pieces("", "ram0", MIB), Err(LayoutError::NoView));
        assert_eq!(parse("  0-fffff (prio 0, ram): ram0"), Ok(vec![piece(0, 0, MIB)]));
        assert!(matches!(parse("  0-100000 (prio 0, ram): ram0"), Err(LayoutError::OutsideBlock { .. })));
        assert!(matches!(
            parse("  0-ffffffffffffffff (prio 0, ram): ram0"),
            Err(LayoutError::OutsideBlock { len: u64::MAX, .. })
        ));
        assert!(matches!(
            parse("  0-fff (prio 0, ram): ram0 @ffffffffffffffff"),
            Err(LayoutError::OutsideBlock { .. })
        ));
        assert_eq!(parse("  2-1 (prio 0, ram): ram0"), Err(LayoutError::BadRange { line: 3 }));
        assert_eq!(
            parse("  0-fff (prio 0, ram): ram0\n  800-1fff (prio 0, i/o): x"),
            Err(LayoutError::Disorder { gpa: 0x800 })
        );
        assert_eq!(parse("  0-fff (prio 0, romd): ram0"), Ok(vec![]));
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,400}") {
            let text = format!(" AS \"memory\", root: system\n{text}");
            let _ = parse_ram_pieces(&text, "ram0", u64::MAX);
        }

        #[test]
        fn never_panics_near_the_truth(at in 0..Q35.len(), with in "[ -~\\n]{0,8}", cut in 0usize..16) {
            let mut bytes = Q35.as_bytes().to_vec();
            let end = (at + cut).min(bytes.len());
            bytes.splice(at..end, with.bytes());
            let _ = parse_ram_pieces(&String::from_utf8_lossy(&bytes), "ram0", 256 * MIB);
        }
    }
}
