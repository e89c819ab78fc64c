//! Rules about slots that hold under every strategy.

use super::{HostLimits, MirrorSlot, Purpose, Refusal, RefusalCode, SlotBacking};
use crate::addr::{MirrorGpa, RamAddr};

/// Every slot below the limit, without the C-bit, without overlap. Sorts them: an index is that of the
/// ascending list.
pub(super) fn check_slots(slots: &mut [MirrorSlot], limits: &HostLimits, refusals: &mut Vec<Refusal>) {
    slots.sort_by_key(|s| s.gpa);
    let (limit, c) = (limits.phys_limit(), limits.c_bit_mask());
    for (index, s) in slots.iter().enumerate() {
        let Some(end) = s.gpa.get().checked_add(s.len) else {
            refusals.push(Refusal::new(RefusalCode::Wraps, "slot", s.gpa.get()).at(index));
            continue;
        };
        if end > limit {
            refusals.push(Refusal::new(RefusalCode::AboveMaxPhys, "slot end", end).at(index).bound(limit));
        }
        if has_bit(s.gpa.get(), s.len, c) {
            refusals.push(Refusal::new(RefusalCode::CBitInAddress, "slot", s.gpa.get()).at(index).bound(c));
        }
    }
    let mut end = 0;
    for (index, s) in slots.iter().enumerate() {
        if s.gpa.get() < end {
            refusals.push(Refusal::new(RefusalCode::SlotOverlap, "slot", s.gpa.get()).at(index).bound(end));
        }
        end = end.max(s.gpa.get().saturating_add(s.len));
    }
}

/// Whether an address of the span has the bit of `mask` (0: there is no such bit): an end has it, or the span
/// is long enough to pass it. The span is not empty and does not wrap.
pub(super) const fn has_bit(start: u64, len: u64, mask: u64) -> bool {
    mask != 0 && (start & mask != 0 || (start + (len - 1)) & mask != 0 || len > mask)
}

/// No RAM is reachable through two slots, but for the bottom 4 GiB that `shifted` shows again; and then both
/// slots have the same permissions, or one would open what the other closes.
pub(super) fn check_aliases(slots: &[MirrorSlot], refusals: &mut Vec<Refusal>) {
    let seen = |low: bool| {
        let spans = slots.iter().enumerate().filter(|(_, s)| (s.purpose == Purpose::LowWindow) == low);
        let mut list: Vec<Seen> = spans.filter_map(|(index, s)| Seen::of(index, s)).collect();
        list.sort_unstable_by_key(|s| s.start);
        list
    };
    let (low, high) = (seen(true), seen(false));
    for list in [&low, &high] {
        for pair in list.windows(2).filter(|p| p[1].start < p[0].end) {
            refusals.push(Refusal::new(RefusalCode::SlotAlias, "ram", pair[1].start).at(pair[1].index));
        }
    }
    let mut others = high.iter().peekable();
    for one in &low {
        while others.next_if(|h| h.end <= one.start).is_some() {}
        let clash = others.clone().take_while(|h| h.start < one.end).find(|h| h.read_only != one.read_only);
        if let Some(other) = clash {
            let start = other.start.max(one.start);
            refusals.push(Refusal::new(RefusalCode::SlotAlias, "ram", start).at(other.index));
        }
    }
}

/// A slot as a span of RAM.
struct Seen {
    start: u64,
    end: u64,
    index: usize,
    read_only: bool,
}

impl Seen {
    fn of(index: usize, slot: &MirrorSlot) -> Option<Self> {
        let SlotBacking::Ram { ram_addr } = slot.backing else { return None };
        let start = ram_addr.get();
        Some(Self { start, end: start.saturating_add(slot.len), index, read_only: slot.read_only })
    }
}

/// Cuts the helper's code, the first `text` bytes of its block, out of the slots that reach it, as read-only
/// ones. All of them: a writable alias would make the others pointless.
pub(super) fn split_read_only(slots: &mut Vec<MirrorSlot>, block: RamAddr, text: u64) {
    let mut pieces = Vec::new();
    slots.retain_mut(|slot| {
        let start = match slot.backing {
            SlotBacking::Ram { ram_addr } => ram_addr.offset_from(block),
            SlotBacking::Private { offset } => Some(offset),
            SlotBacking::Mailbox => None,
        };
        // A slot that begins before the block belongs to other RAM: slots stay within one block.
        let Some(start) = start.filter(|s| *s < text) else { return true };
        let code = (text - start).min(slot.len);
        pieces.push(part(slot, 0, code, true));
        if code < slot.len {
            pieces.push(part(slot, code, slot.len - code, false));
        }
        false
    });
    slots.extend(pieces);
}

fn part(slot: &MirrorSlot, from: u64, len: u64, read_only: bool) -> MirrorSlot {
    // Wrapping: a slot that wraps is found by `check_slots`, as one that does.
    let gpa = MirrorGpa::new(slot.gpa.get().wrapping_add(from));
    let backing = match slot.backing {
        SlotBacking::Ram { ram_addr } => SlotBacking::Ram { ram_addr: RamAddr::new(ram_addr.get() + from) },
        SlotBacking::Private { offset } => SlotBacking::Private { offset: offset + from },
        SlotBacking::Mailbox => SlotBacking::Mailbox,
    };
    MirrorSlot { gpa, len, backing, purpose: slot.purpose, read_only }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(gpa: u64, len: u64, ram: u64, purpose: Purpose) -> MirrorSlot {
        let backing = SlotBacking::Ram { ram_addr: RamAddr::new(ram) };
        MirrorSlot { gpa: MirrorGpa::new(gpa), len, backing, purpose, read_only: false }
    }

    // No strategy makes overlapping slots of its own; this is the net below them.
    #[test]
    fn overlapping_and_wrapping_slots_are_refused_with_their_index() {
        let limits = HostLimits {
            max_phys_bits: 46,
            c_bit: None,
            phys_bit_reduction: 0,
            slot_budget: 8,
            gib_pages: false,
        };
        let codes = |list: &[(u64, u64)]| {
            let mut slots: Vec<_> =
                list.iter().map(|(gpa, len)| slot(*gpa, *len, 0, Purpose::RamWindow)).collect();
            let mut refusals = Vec::new();
            check_slots(&mut slots, &limits, &mut refusals);
            refusals.iter().map(|r| (r.code, r.index, r.value)).collect::<Vec<_>>()
        };
        assert_eq!(codes(&[(0, 0x2000), (0x2000, 0x1000), (0x8000, 0x1000)]), []);
        let overlap = (RefusalCode::SlotOverlap, Some(1), 0x1000);
        assert_eq!(codes(&[(0x1000, 0x1000), (0, 0x2000)]), [overlap]);
        // Not the neighbour alone: a long slot reaches over a short one.
        let far = (RefusalCode::SlotOverlap, Some(2), 0x4000);
        assert_eq!(codes(&[(0, 0x9000), (0x1000, 0x1000), (0x4000, 0x1000)])[1], far);
        let wraps = u64::MAX - 0xfff;
        assert_eq!(codes(&[(0, 0x1000), (wraps, 0x2000)]), [(RefusalCode::Wraps, Some(1), wraps)]);
        let beyond = (1 << 46) - 0x1000;
        assert_eq!(codes(&[(beyond, 0x1000)]), []);
        assert_eq!(codes(&[(beyond, 0x2000)]), [(RefusalCode::AboveMaxPhys, Some(0), (1 << 46) + 0x1000)]);
    }

    #[test]
    fn one_page_through_two_slots_is_refused_unless_it_is_the_low_window() {
        let codes = |slots: &[MirrorSlot]| {
            let mut refusals = Vec::new();
            check_aliases(slots, &mut refusals);
            refusals.iter().map(|r| (r.code, r.index, r.value)).collect::<Vec<_>>()
        };
        let low = slot(0, 0x4000, 0x1000, Purpose::LowWindow);
        let high = slot(1 << 32, 0x8000, 0, Purpose::RamWindow);
        assert_eq!(codes(&[low, high]), []);
        let piece = slot(1 << 33, 0x1000, 0x7000, Purpose::DeclaredPiece);
        assert_eq!(codes(&[low, high, piece]), [(RefusalCode::SlotAlias, Some(2), 0x7000)]);
        assert_eq!(codes(&[low, MirrorSlot { gpa: MirrorGpa::new(1 << 40), ..low }]).len(), 1);
        let read_only = MirrorSlot { read_only: true, ..low };
        assert_eq!(codes(&[read_only, high]), [(RefusalCode::SlotAlias, Some(1), 0x1000)]);
    }

    #[test]
    fn the_bit_is_found_wherever_it_is_in_a_span() {
        let c = 1 << 47;
        for (start, len, has) in [
            (0, c, false),
            (0, c + 1, true),
            (c, 1, true),
            (c - 1, 2, true),
            (2 * c, c, false),
            (c * 2 - 1, c + 2, true),
        ] {
            assert_eq!(has_bit(start, len, c), has, "{start:#x} {len:#x}");
        }
        assert!(!has_bit(u64::MAX, 1, 0));
    }

    #[test]
    fn code_is_cut_out_of_every_slot_that_reaches_it() {
        let block = RamAddr::new(0x10000);
        let mut slots = vec![
            slot(0, 0x8000, 0x10000, Purpose::LowWindow),
            slot(1 << 32, 0x1000, 0x11000, Purpose::DeclaredPiece),
            slot(1 << 33, 0x1000, 0, Purpose::RamWindow),
        ];
        split_read_only(&mut slots, block, 0x3000);
        check_slots(
            &mut slots,
            &HostLimits {
                max_phys_bits: 46,
                c_bit: None,
                phys_bit_reduction: 0,
                slot_budget: 8,
                gib_pages: false,
            },
            &mut Vec::new(),
        );
        let seen: Vec<_> = slots.iter().map(|s| (s.gpa.get(), s.len, s.read_only)).collect();
        assert_eq!(
            seen,
            [(0, 0x3000, true), (0x3000, 0x5000, false), (1 << 32, 0x1000, true), (1 << 33, 0x1000, false)]
        );
    }
}
