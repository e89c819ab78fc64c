//! Address and size newtypes of the project's vocabulary, and ranges over them.
//!
//! Owns: what an address is, checked arithmetic on it, alignment. Must not know: memory, KVM, plans.
//!
//! There is deliberately no `+` or `-` on addresses (the lesson of vm-memory's `address.rs`): every
//! computation names what happens on overflow.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in the smallest page that anything here deals in (x86: 4 KiB).
pub const PAGE_SIZE: u64 = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a 2 MiB page.
pub const PAGE_2M: u64 = 2 << 20;
/// Bytes in a 1 GiB page.
pub const PAGE_1G: u64 = 1 << 30;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw value; every `u64` is a possible address, legality is the planner's business.
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The raw value.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// This address moved up by `bytes`, or `None` past 2^64.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(raw) => Some(Self(raw)),
                    None => None,
                }
            }

            /// Bytes from `base` up to this address, or `None` when this lies below `base`.
            pub const fn offset_from(self, base: Self) -> Option<u64> {
                self.0.checked_sub(base.0)
            }

            /// Whether the address is a multiple of `alignment`, a power of two.
            pub const fn is_aligned(self, alignment: u64) -> bool {
                self.0 & (alignment - 1) == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(
    /// A guest physical address, as the guest itself sees it.
    Gpa
);
address!(
    /// A physical address inside the mirror VM. Not the guest's: the strategies differ in how the two relate.
    MirrorGpa
);
address!(
    /// A position in the guest's RAM counted across its RAM blocks (QEMU's `ram_addr_t`). Constant for the
    /// guest's life, also for RAM that is not plugged at any GPA at the moment.
    RamAddr
);
address!(
    /// A virtual address in the helper's page tables.
    HelperVa
);

/// A guest frame number: a [`Gpa`] divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Gfn(u64);

impl Gfn {
    /// Wraps a frame number.
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The frame number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The first address of the frame, or `None` past 2^64.
    pub const fn gpa(self) -> Option<Gpa> {
        match self.0.checked_mul(PAGE_SIZE) {
            Some(raw) => Some(Gpa(raw)),
            None => None,
        }
    }
}

impl Gpa {
    /// The frame that holds this address.
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }
}

impl RamAddr {
    /// The number of the 4 KiB page that holds this address.
    pub const fn page(self) -> RamPage {
        RamPage(self.0 >> PAGE_SHIFT)
    }
}

/// Number of a 4 KiB page of RAM: a [`RamAddr`] divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RamPage(u64);

impl RamPage {
    /// Wraps a page number.
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The page number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// Why a range could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// A range holds at least one byte.
    #[error("length is zero")]
    ZeroLength,
    /// Start and length are multiples of the page size.
    #[error("{start:#x}+{len:#x} is not aligned to {alignment:#x}")]
    Unaligned {
        /// First address.
        start: u64,
        /// Length in bytes.
        len: u64,
        /// Alignment asked for.
        alignment: u64,
    },
    /// The end would lie past 2^64.
    #[error("{start:#x}+{len:#x} wraps past 2^64")]
    Wraps {
        /// First address.
        start: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// A non-empty, page-aligned span of bytes that does not wrap. Half open: `start..end`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize)]
pub struct PageRange {
    start: u64,
    len: u64,
}

impl PageRange {
    /// `len` bytes from `start`, both multiples of 4 KiB.
    ///
    /// # Errors
    /// [`RangeError`] names what is wrong with the two values.
    pub const fn new(start: u64, len: u64) -> Result<Self, RangeError> {
        if len == 0 {
            return Err(RangeError::ZeroLength);
        }
        if !start.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(RangeError::Unaligned { start, len, alignment: PAGE_SIZE });
        }
        // The end itself may not be 2^64 either: an exclusive end must be representable.
        if start.checked_add(len).is_none() {
            return Err(RangeError::Wraps { start, len });
        }
        Ok(Self { start, len })
    }

    /// First byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// Bytes in the range; never zero.
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub const fn len(self) -> u64 {
        self.len
    }

    /// First byte after the range.
    pub const fn end(self) -> u64 {
        self.start + self.len
    }

    /// 4 KiB pages in the range.
    pub const fn pages(self) -> u64 {
        self.len >> PAGE_SHIFT
    }

    /// Whether `address` lies inside.
    pub const fn contains(self, address: u64) -> bool {
        address >= self.start && address < self.end()
    }

    /// Whether the two ranges share a byte.
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    /// The bytes that lie in both.
    pub fn intersection(self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| Self { start, len: end - start })
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end())
    }
}

/// `value` rounded up to a multiple of `alignment` (a power of two), or `None` past 2^64.
pub const fn align_up(value: u64, alignment: u64) -> Option<u64> {
    match value.checked_add(alignment - 1) {
        Some(v) => Some(v & !(alignment - 1)),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_range_that_was_made_is_aligned_nonempty_and_does_not_wrap(start: u64, len: u64) {
            match PageRange::new(start, len) {
                Ok(r) => {
                    prop_assert!(r.len() > 0 && r.start().is_multiple_of(PAGE_SIZE));
                    prop_assert_eq!(u128::from(r.end()), u128::from(start) + u128::from(len));
                }
                Err(RangeError::ZeroLength) => prop_assert_eq!(len, 0),
                Err(RangeError::Unaligned { .. }) => prop_assert!(start % PAGE_SIZE != 0 || len % PAGE_SIZE != 0),
                Err(RangeError::Wraps { .. }) => prop_assert!(start.checked_add(len).is_none()),
            }
        }

        #[test]
        fn overlap_is_a_nonempty_intersection(a in 0u64..64, al in 1u64..64, b in 0u64..64, bl in 1u64..64) {
            let x = PageRange::new(a * PAGE_SIZE, al * PAGE_SIZE).unwrap();
            let y = PageRange::new(b * PAGE_SIZE, bl * PAGE_SIZE).unwrap();
            prop_assert_eq!(x.overlaps(y), x.intersection(y).is_some());
            prop_assert_eq!(x.overlaps(y), (a..a + al).any(|p| (b..b + bl).contains(&p)));
        }
    }

    /// Numbers about the edges of pages at both ends of what 64 bits name, and about their middle.
    fn edges() -> Vec<u64> {
        let near = |at: u64| [at.wrapping_sub(PAGE_SIZE), at.wrapping_sub(1), at, at.wrapping_add(1)];
        [0, PAGE_SIZE, 2 * PAGE_SIZE, PAGE_2M, PAGE_1G, 1 << 52, 1 << 63, u64::MAX - PAGE_SIZE + 1]
            .into_iter()
            .flat_map(near)
            .collect()
    }

    #[test]
    fn arithmetic_on_addresses_is_that_of_numbers_without_an_end() {
        let fits = |n: u128| u64::try_from(n).ok();
        for a in edges() {
            for b in edges() {
                let sum = fits(u128::from(a) + u128::from(b));
                assert_eq!(Gpa::new(a).checked_add(b).map(Gpa::get), sum);
                assert_eq!(HelperVa::new(a).checked_add(b).map(HelperVa::get), sum);
                let below = u128::from(a).checked_sub(u128::from(b)).and_then(fits);
                assert_eq!(MirrorGpa::new(a).offset_from(MirrorGpa::new(b)), below);
                assert_eq!(RamAddr::new(a).offset_from(RamAddr::new(b)), below);
            }
            for alignment in (0..64).map(|bit| 1u64 << bit) {
                let up = u128::from(a).div_ceil(alignment.into()) * u128::from(alignment);
                assert_eq!(align_up(a, alignment), fits(up), "{a:#x} to {alignment:#x}");
                assert_eq!(Gpa::new(a).is_aligned(alignment), a.is_multiple_of(alignment));
            }
            assert_eq!(Gpa::new(a).gfn(), Gfn::new(a / PAGE_SIZE));
            assert_eq!(RamAddr::new(a).page(), RamPage::new(a / PAGE_SIZE));
            assert_eq!(Gfn::new(a).gpa().map(Gpa::get), fits(u128::from(a) * u128::from(PAGE_SIZE)));
        }
    }

    #[test]
    fn ranges_of_a_small_universe_are_sets_of_pages() {
        const PAGES: u64 = 7;
        // At the bottom, across 4 GiB, and up to the last page whose end has a number: the universe's last
        // page but one at the top.
        for base in [0, (4 << 30) - 3 * PAGE_SIZE, u64::MAX - PAGES * PAGE_SIZE + 1] {
            let top = base.checked_add(PAGES * PAGE_SIZE).is_none();
            let mut all = Vec::new();
            for first in 0..PAGES {
                for count in 0..=PAGES - first {
                    let range = PageRange::new(base + first * PAGE_SIZE, count * PAGE_SIZE);
                    if count == 0 {
                        assert_eq!(range, Err(RangeError::ZeroLength));
                    } else if top && first + count == PAGES {
                        assert!(matches!(range, Err(RangeError::Wraps { .. })), "the end has no number");
                    } else {
                        all.push((range.unwrap(), ((1u32 << count) - 1) << first));
                    }
                }
            }
            for (range, bits) in &all {
                assert_eq!(range.pages(), u64::from(bits.count_ones()));
                for page in 0..PAGES {
                    let (at, inside) = (base + page * PAGE_SIZE, bits >> page & 1 != 0);
                    assert_eq!((range.contains(at), range.contains(at + (PAGE_SIZE - 1))), (inside, inside));
                }
                for (other, others) in &all {
                    assert_eq!(range.overlaps(*other), bits & others != 0, "{range} and {other}");
                    let both = all.iter().find(|(_, b)| *b == bits & others).map(|(r, _)| *r);
                    assert_eq!(range.intersection(*other), both, "{range} and {other}");
                }
            }
        }
    }

    #[test]
    fn align_up_stops_at_the_top() {
        assert_eq!(align_up(1, PAGE_SIZE), Some(PAGE_SIZE));
        assert_eq!(align_up(u64::MAX, PAGE_SIZE), None);
        assert_eq!(Gpa::new(u64::MAX).checked_add(1), None);
    }
}
