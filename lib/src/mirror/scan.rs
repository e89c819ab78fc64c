//! Scans from the host's side: the request, and what may be believed of its answer.

use mirrorvm_abi::op::{Op, SCAN_BYTES, SCAN_MAX, Scan};

use super::{Done, Lane, LaneError};

impl Lane {
    /// Asks which of `scan`'s pages differ from what was last exported, in a slot that was acquired. They are
    /// what the plan calls helper pages ([`crate::address_space::MirrorPlan::helper_page`]).
    pub fn submit_scan(&mut self, slot: u32, scan: Scan, epoch: u32) {
        debug_assert!((1..=SCAN_MAX).contains(&scan.count));
        self.write_payload(slot, 0, &scan.encode());
        self.submit(slot, Op::Scan, 0, SCAN_BYTES as u32, epoch);
    }

    /// The answer to `scan`, as words: bit 0 of the first is the scan's first page. No bit is set behind its
    /// last.
    ///
    /// # Errors
    /// [`LaneError::Broken`] for an answer of another length or with other bits.
    pub fn read_scan(&self, done: &Done, scan: Scan, words: &mut Vec<u64>) -> Result<(), LaneError> {
        const WORDS: usize = SCAN_MAX as usize / 64;
        let bytes = scan.bitmap_bytes();
        if done.len != bytes {
            return Err(LaneError::Broken("a scan's answer of another length"));
        }
        let mut raw = [0; WORDS * 8];
        self.read_payload(done.slot, 0, &mut raw[..bytes]);
        words.clear();
        words.extend(raw[..bytes].as_chunks().0.iter().map(|w| u64::from_le_bytes(*w)));
        let beyond = match scan.count % 64 {
            0 => 0,
            used => u64::MAX << used,
        };
        if words.last().is_some_and(|last| last & beyond != 0) {
            return Err(LaneError::Broken("a scan's answer about other pages"));
        }
        Ok(())
    }
}
