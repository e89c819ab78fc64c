//! Looks up where RAM is in a mirror: in constant time for guests as they are, by bisection in the worst
//! case.

/// A run of RAM that lies in one piece under a plan, in numbers of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// First byte in RAM.
    pub ram: u64,
    /// Length in bytes.
    pub len: u64,
    /// What the helper calls the first byte: a `RamAddr` or a GPA.
    pub helper: u64,
    /// Where the mirror sees it.
    pub gpa: u64,
}

/// Spans by ascending `RamAddr`, disjoint, neighbours joined, with a table of buckets over them: RAM is cut
/// into equal powers of two, about two a span, and a bucket knows the span in force at its start. A guest
/// with evenly sized blocks needs one look at the table and one or two spans; blocks of wild sizes cost a
/// bisection within a bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SpanIndex {
    spans: Vec<Span>,
    /// Per bucket: how many spans start at or before its first byte.
    buckets: Vec<u32>,
    shift: u32,
}

impl SpanIndex {
    /// An index of `spans`, in any order; they must not overlap in RAM.
    pub fn new(mut spans: Vec<Span>) -> Self {
        spans.sort_unstable_by_key(|s| s.ram);
        spans.dedup_by(|next, last| {
            let adjoins = last.ram + last.len == next.ram
                && last.helper + last.len == next.helper
                && last.gpa + last.len == next.gpa;
            if adjoins {
                last.len += next.len;
            }
            adjoins
        });
        let Some(last) = spans.last() else { return Self::default() };
        let end = last.ram + last.len;
        let wanted = (spans.len() as u64 * 2).next_power_of_two();
        // At least a page a bucket; the index stays below 2^17 entries for the most blocks that there may be.
        let shift = (end.div_ceil(wanted)).next_power_of_two().trailing_zeros().max(12);
        let count = ((end - 1) >> shift) + 1;
        let mut buckets = Vec::with_capacity(count as usize + 1);
        let mut before = 0u32;
        for bucket in 0..count {
            while spans.get(before as usize).is_some_and(|s| s.ram <= bucket << shift) {
                before += 1;
            }
            buckets.push(before);
        }
        buckets.push(spans.len() as u32);
        Self { spans, buckets, shift }
    }

    /// The span that holds `ram`, and how far into it.
    #[inline]
    pub fn find(&self, ram: u64) -> Option<(&Span, u64)> {
        let bucket = (ram >> self.shift) as usize;
        let next = *self.buckets.get(bucket.checked_add(1)?)? as usize;
        let before = self.buckets[bucket] as usize;
        // The one in force at the bucket's start, or one of those that start within the bucket.
        let inside = &self.spans[before..next];
        let index = before + if inside.is_empty() { 0 } else { inside.partition_point(|s| s.ram <= ram) };
        let span = &self.spans[index.checked_sub(1)?];
        let offset = ram - span.ram;
        (offset < span.len).then_some((span, offset))
    }

    /// All spans, by ascending address.
    pub fn iter(&self) -> impl Iterator<Item = &Span> {
        self.spans.iter()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// By a look at every span.
    fn naive(spans: &[Span], ram: u64) -> Option<(u64, u64)> {
        let span = spans.iter().find(|s| s.ram <= ram && ram - s.ram < s.len)?;
        Some((span.helper + (ram - span.ram), span.gpa + (ram - span.ram)))
    }

    fn indexed(index: &SpanIndex, ram: u64) -> Option<(u64, u64)> {
        index.find(ram).map(|(span, offset)| (span.helper + offset, span.gpa + offset))
    }

    /// Cells of RAM: each is none, the continuation of the one before, or the beginning of something that the
    /// helper, or the mirror, has elsewhere.
    const CELLS: u64 = 6;

    fn cells(mut choice: u64, base: u64, unit: u64) -> Vec<Span> {
        let (mut helper_jumps, mut gpa_jumps) = (0, 0);
        let mut spans = Vec::new();
        for cell in 0..CELLS {
            let what = choice % 4;
            choice /= 4;
            helper_jumps += u64::from(what == 2);
            gpa_jumps += u64::from(what == 3);
            let at = cell * unit;
            if what != 0 {
                let (helper, gpa) = (at + helper_jumps * unit, at + (gpa_jumps + 3) * unit);
                spans.push(Span { ram: base + at, len: unit, helper, gpa });
            }
        }
        spans
    }

    #[test]
    fn every_small_layout_is_looked_up_as_by_looking_at_every_span() {
        // Several cells in a bucket, one, and many buckets a cell; at the bottom of RAM, and up to the last
        // byte but one that a number can name.
        for (unit, base) in
            [(1u64, 0), (1000, 0), (4096, 4096), (3 << 20, 1 << 30), (4096, u64::MAX - CELLS * 4096)]
        {
            for choice in 0..4u64.pow(CELLS as u32) {
                let spans = cells(choice, base, unit);
                let mut given = spans.clone();
                given.rotate_left(choice as usize % 3 % spans.len().max(1));
                let index = SpanIndex::new(given);
                for at in (0..CELLS).flat_map(|c| [c * unit, c * unit + unit - 1]).map(|at| base + at) {
                    assert_eq!(indexed(&index, at), naive(&spans, at), "{spans:?} at {at:#x}");
                }
                for outside in [base.wrapping_sub(1), base + CELLS * unit, u64::MAX] {
                    assert_eq!(index.find(outside), None, "{spans:?} at {outside:#x}");
                }
                assert_joined(&index);
            }
        }
    }

    /// Spans ascend, share nothing, and none goes on where the one before ends.
    fn assert_joined(index: &SpanIndex) {
        let list: Vec<_> = index.iter().copied().collect();
        for pair in list.windows(2) {
            let end = pair[0].ram + pair[0].len;
            assert!(end <= pair[1].ram, "{pair:?}");
            let goes_on = |span: &Span| (span.ram, span.helper, span.gpa);
            let after = (end, pair[0].helper + pair[0].len, pair[0].gpa + pair[0].len);
            assert_ne!(goes_on(&pair[1]), after, "neighbours are joined");
        }
    }

    #[test]
    fn no_ram_has_nothing_to_be_found() {
        let index = SpanIndex::new(Vec::new());
        assert!([0, 4096, u64::MAX].iter().all(|ram| index.find(*ram).is_none()));
        assert_eq!(index.iter().count(), 0);
    }

    proptest! {
        #[test]
        fn spans_of_wild_sizes_are_looked_up_as_by_looking_at_every_span(
            pieces in prop::collection::vec((0u64..3, 1u64..12, 0u32..34), 1..60), probes: [u64; 32],
        ) {
            let (mut spans, mut at) = (Vec::new(), 0);
            for (gap, len, scale) in pieces {
                let ram = at + (gap << scale);
                spans.push(Span { ram, len: len << scale, helper: ram ^ 1 << 50, gpa: ram + (1 << 51) });
                at = ram + (len << scale);
            }
            let index = SpanIndex::new(spans.clone());
            let edges = spans.iter().flat_map(|s| [s.ram.wrapping_sub(1), s.ram, s.ram + s.len - 1, s.ram + s.len]);
            for ram in edges.chain(probes.iter().map(|p| p % (at + 2))) {
                prop_assert_eq!(indexed(&index, ram), naive(&spans, ram), "at {:#x}", ram);
            }
            assert_joined(&index);
        }
    }
}
