//! The audit's digests from the host's side: what is asked for, and what may be believed of the answers.
//!
//! Owns: which chunks there are under a plan, which pages both hosts leave out, the three requests. Must not
//! know: links, what becomes of a verdict. What the helper makes of it is in `lib/helper/src/audit.rs`.

use std::collections::BTreeMap;

use mirrorvm_abi::op::{AUDIT_BITS_AT, CHUNK_BITS_BYTES, Op, VERDICT_BYTES, Verdict};
use mirrorvm_abi::record::{CHUNK_PAGES, CHUNKS_MAX, Front, group_bytes};

use super::{Lane, LaneError, Mirror};
use crate::addr::PAGE_SIZE;
use crate::address_space::MirrorPlan;
use crate::pages::PageSet;

/// Longest group of digests.
pub const DIGESTS_MAX: usize = group_bytes(CHUNKS_MAX);

/// What an audit looks at.
pub struct AuditScope {
    chunks: Vec<u64>,
    /// By chunk, a bit for each page that is left out.
    left_out: BTreeMap<u64, [u8; CHUNK_BITS_BYTES]>,
}

impl AuditScope {
    /// All that the helper may touch, without the pages that the guest shares: those went past the helpers.
    pub fn of(plan: &MirrorPlan, shared: &PageSet) -> Self {
        let mut chunks: Vec<u64> = Vec::new();
        for range in &plan.allowed {
            let (first, last) = (range.start() / PAGE_SIZE, (range.end() - 1) / PAGE_SIZE);
            let known = chunks.last().map_or(0, |last| last + 1);
            chunks.extend((first / CHUNK_PAGES).max(known)..=last / CHUNK_PAGES);
        }
        let mut left_out = BTreeMap::<u64, [u8; CHUNK_BITS_BYTES]>::new();
        for page in shared.iter().filter_map(|page| plan.helper_page(page)) {
            let (bits, bit) = (left_out.entry(page / CHUNK_PAGES).or_default(), page % CHUNK_PAGES);
            bits[(bit / 8) as usize] |= 1 << (bit % 8);
        }
        Self { chunks, left_out }
    }

    /// The chunks, as many at once as one request takes.
    pub fn groups(&self) -> impl ExactSizeIterator<Item = &[u64]> {
        self.chunks.chunks(CHUNKS_MAX)
    }

    fn lay_out(&self, lane: &Lane, slot: u32, chunks: &[u64]) {
        for (i, chunk) in chunks.iter().enumerate() {
            let bits = self.left_out.get(chunk).copied().unwrap_or_default();
            lane.write_list(slot, i * 8, &chunk.to_le_bytes());
            lane.write_list(slot, AUDIT_BITS_AT + i * CHUNK_BITS_BYTES, &bits);
        }
    }
}

impl Mirror {
    /// Source, after START: digests of some chunks, sealed. Each chunk once, in ascending order.
    ///
    /// # Errors
    /// [`LaneError`], as for all of these.
    pub fn seal_digests(&mut self, scope: &AuditScope, chunks: &[u64]) -> Result<Vec<u8>, LaneError> {
        let lane = self.control_lane();
        let slot = lane.acquire().ok_or(LaneError::NoSlot)?;
        scope.lay_out(lane, slot, chunks);
        lane.submit(slot, Op::Digests, chunks.len() as u32, 0, 0);
        let done = lane.wait()?;
        let mut group = vec![0; group_bytes(chunks.len())];
        let whole = done.len == group.len();
        if whole {
            lane.read_payload(slot, 0, &mut group);
        }
        lane.release(slot);
        let asked = |front: Front<'_>| front.pages().map(|chunk| chunk.page).eq(chunks.iter().copied());
        if whole && Front::read_digests(&group).is_some_and(asked) {
            Ok(group)
        } else {
            Err(LaneError::Broken("digests of something else"))
        }
    }

    /// Destination, after START: has a group of digests compared, which may be anybody's bytes. `None`: it
    /// does not look like one.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn compare_digests(&mut self, scope: &AuditScope, group: &[u8]) -> Result<Option<()>, LaneError> {
        let front = Front::read_digests(group).filter(|front| front.group_bytes() == group.len());
        let Some(front) = front else { return Ok(None) };
        let chunks: Vec<u64> = front.pages().map(|chunk| chunk.page).collect();
        let lane = self.control_lane();
        let slot = lane.acquire().ok_or(LaneError::NoSlot)?;
        scope.lay_out(lane, slot, &chunks);
        lane.write_payload(slot, 0, group);
        lane.submit(slot, Op::Compare, chunks.len() as u32, group.len() as u32, 0);
        let done = lane.wait()?;
        lane.release(done.slot);
        Ok(Some(()))
    }

    /// Destination: ends the audit and gives what it found. Refused when pages were missing.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn verdict(&mut self) -> Result<Verdict, LaneError> {
        let mut raw = [0; VERDICT_BYTES];
        self.control_lane().control(Op::Verdict, &[], &mut raw)?;
        Ok(Verdict::decode(&raw))
    }

    /// CPU time of its workers so far, microseconds.
    pub fn cpu_us(&self) -> u64 {
        self.watch().stats().iter().map(|worker| worker.cpu_ns).sum::<u64>() / 1000
    }
}
