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
