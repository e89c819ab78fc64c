//! Memory that a VM registered (KVM_MEMORY_ENCRYPT_REG_REGION), and so holds in place.

use std::sync::Arc;

use crate::memory::Mapping;

/// Registered spans, as the kernel lists them: they may overlap, and are given back as they were registered.
#[derive(Debug, Default)]
pub(super) struct Regions(Vec<(Arc<Mapping>, u64, u64)>);

impl Regions {
    pub fn add(&mut self, memory: &Arc<Mapping>, offset: u64, len: u64) {
        self.0.push((Arc::clone(memory), offset, len));
    }

    /// Whether there was one just like this.
    pub fn remove(&mut self, memory: &Arc<Mapping>, offset: u64, len: u64) -> bool {
        let same = |(m, o, l): &(Arc<Mapping>, u64, u64)| Arc::ptr_eq(m, memory) && (*o, *l) == (offset, len);
        self.0.iter().position(same).map(|i| self.0.swap_remove(i)).is_some()
    }

    /// Whether all of the span is registered, be it in pieces.
    pub fn cover(&self, memory: &Mapping, offset: u64, len: u64) -> bool {
        let Some(end) = offset.checked_add(len) else { return false };
        let mut at = offset;
        while at < end {
            let reach = self
                .0
                .iter()
                .filter(|(m, o, l)| std::ptr::eq(Arc::as_ptr(m), memory) && *o <= at && at < o + l)
                .map(|(_, o, l)| o + l)
                .max();
            match reach {
                Some(reach) => at = reach,
                None => return false,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::addr::PAGE_SIZE;

    proptest! {
        #[test]
        fn cover_is_the_union(spans in prop::collection::vec((0u64..16, 1u64..6), 0..8), at in 0u64..20, len in 0u64..8) {
            let memory = Mapping::memfd("t", 32 * PAGE_SIZE).unwrap();
            let mut regions = Regions::default();
            let mut bytes = [false; 32];
            for (offset, len) in &spans {
                regions.add(&memory, *offset, *len);
                bytes[*offset as usize..(offset + len) as usize].fill(true);
            }
            let all = bytes[at as usize..(at + len) as usize].iter().all(|b| *b);
            prop_assert_eq!(regions.cover(&memory, at, len), all);
            for (offset, len) in &spans {
                prop_assert!(regions.remove(&memory, *offset, *len));
            }
            prop_assert!(len == 0 || !regions.cover(&memory, at, len));
        }
    }
}
