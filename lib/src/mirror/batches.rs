//! Sealed batches by themselves: pages of RAM that leave through one helper for another of the same guest,
//! without a migration around them.
//!
//! Owns: the course of such a session at both ends, and what is sealed for whom. Must not know: who carries
//! the batches. An importing helper greets first, so that a batch opens in that session of that helper
//! and in no other; each batch is one epoch, with its token, so that batches open once and in order. No state
//! of vCPUs goes along, START is never minted, and no guest changes hosts.

use mirrorvm_abi::mailbox::{BATCH_MAX, PAYLOAD_BYTES};
use mirrorvm_abi::op::{Begin, Status};
use mirrorvm_abi::record::{Suite, group_bytes};
use ring::digest;
use uuid::Uuid;

use super::records::{SealedGroup, groups};
use super::{Greeting, LaneError, Mirror, SealedToken};
use crate::addr::RamPage;
use crate::address_space::{Addressing, GuestLayout};

/// Pages of one batch at most.
pub const BATCH_PAGES_MAX: usize = 256;
/// Bytes of a batch's records at most, however few pages its groups have.
pub const BATCH_BYTES_MAX: usize = BATCH_PAGES_MAX * group_bytes(1);

/// By what batches are sealed.
const SUITE: Suite = Suite::Aes256Gcm;

/// What both ends agree on; ends that do not have different keys.
#[derive(Clone, Copy, Debug)]
pub struct BatchTerms<'a> {
    /// The session, which the importing end names.
    pub session: Uuid,
    /// Id of the guest.
    pub guest: Uuid,
    /// The layout of its RAM.
    pub layout: &'a GuestLayout,
    /// What the records call pages.
    pub addressing: Addressing,
}

/// Why records are not framed as groups are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("byte {at} of the records begins no group of sealed pages")]
pub struct NotRecords {
    /// Offset of the group in the batch.
    pub at: usize,
}

/// Why a batch was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchFault {
    /// The helper refuses a page, or the token (`index` is then the number of pages). The session is over.
    #[error("the helper refuses page {index} of the records: {}", super::error::reason(*status))]
    Refused {
        /// The helper's reason.
        status: Status,
        /// Index of the page.
        index: usize,
    },
    /// The helper, its vCPU or its rings.
    #[error("the helper failed")]
    Lane(#[source] LaneError),
}

impl BatchTerms<'_> {
    fn transcript(&self, mirror: &Mirror) -> Result<[u8; 32], LaneError> {
        let layout = serde_json::to_vec(self.layout)
            .map_err(|_| LaneError::Broken("a layout that cannot be written"))?;
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(b"mirrorvm batch v2");
        context.update(&mirrorvm_abi::ABI_VERSION.to_le_bytes());
        context.update(&mirrorvm_abi::layout::LAYOUT_HASH.to_le_bytes());
        context.update(&mirror.helper_measurement());
        context.update(self.guest.as_bytes());
        context.update(&[match self.addressing {
            Addressing::RamAddr => 1,
            Addressing::Gpa => 2,
        }]);
        context.update(&(layout.len() as u64).to_le_bytes());
        context.update(&layout);
        let mut out = [0; 32];
        out.copy_from_slice(context.finish().as_ref());
        Ok(out)
    }

    fn begin(&self, mirror: &mut Mirror, source: bool, peer: Greeting) -> Result<(), LaneError> {
        let transcript = self.transcript(mirror)?;
        mirror.begin(&Begin {
            digests: false,
            audit: false,
            source,
            // Which pages are zero is nobody's business.
            elide_zero: false,
            fresh: false,
            suite: SUITE,
            streams: 1,
            session: *self.session.as_bytes(),
            transcript,
            peer,
        })
    }
}

/// Groups of sealed pages, one after the other, of at most [`BATCH_PAGES_MAX`] pages together. Host and
/// helper both look: what comes is anybody's bytes.
///
/// # Errors
/// [`NotRecords`].
pub fn parse_records(bytes: &[u8]) -> Result<Vec<SealedGroup>, NotRecords> {
    let (mut at, mut pages, mut all) = (0, 0, Vec::new());
    for found in groups(bytes) {
        let group = found.map_err(|at| NotRecords { at })?;
        pages += group.pages.len();
        if group.pages.len() > BATCH_MAX || group.bytes > PAYLOAD_BYTES || pages > BATCH_PAGES_MAX {
            return Err(NotRecords { at });
        }
        at += group.bytes;
        all.push(group);
    }
    Ok(all)
}

impl Mirror {
    /// Exporting end: begins a session with an importer that greeted, and greets back.
    ///
    /// # Errors
    /// [`LaneError`]; the helper has a session already.
    pub fn begin_export(
        &mut self,
        terms: &BatchTerms<'_>,
        importer: Greeting,
    ) -> Result<Greeting, LaneError> {
        let own = self.hello()?;
        terms.begin(self, true, importer)?;
        Ok(own)
    }

    /// Exporting end: seals pages, and ends the epoch. At most [`BATCH_PAGES_MAX`], none twice.
    ///
    /// # Errors
    /// [`LaneError`]; the session should be ended.
    pub fn export_batch(
        &mut self,
        pages: &[RamPage],
        epoch: u32,
    ) -> Result<(Vec<u8>, SealedToken), LaneError> {
        let plan = std::sync::Arc::clone(self.plan());
        let beyond = LaneError::Refused { status: Status::PageRefused, index: 0 };
        let named: Option<Vec<u64>> = pages.iter().map(|p| plan.helper_page(*p)).collect();
        let named = named.ok_or(beyond)?;
        let mut records = Vec::with_capacity(BATCH_BYTES_MAX.min(named.len() * group_bytes(1)));
        for chunk in named.chunks(BATCH_MAX) {
            let lane = self.control_lane();
            let slot = lane.acquire().ok_or(LaneError::NoSlot)?;
            lane.submit_export(slot, chunk, epoch);
            let done = lane.wait()?;
            let at = records.len();
            records.resize(at + done.len, 0);
            lane.read_payload(done.slot, 0, &mut records[at..]);
            lane.release(done.slot);
        }
        Ok((records, self.end_epoch()?))
    }

    /// Importing end: begins the session for which [`Mirror::hello`] greeted.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn begin_import(&mut self, terms: &BatchTerms<'_>, exporter: Greeting) -> Result<(), LaneError> {
        terms.begin(self, false, exporter)
    }

    /// Importing end: opens a batch into RAM, page by page, and checks its token. After a fault the pages
    /// before it were written, and the session is over.
    ///
    /// # Errors
    /// [`BatchFault`].
    pub fn import_batch(
        &mut self,
        records: &[u8],
        groups: &[SealedGroup],
        epoch: u32,
        token: &SealedToken,
    ) -> Result<(), BatchFault> {
        let (mut at, mut before) = (0, 0);
        for group in groups {
            let lane = self.control_lane();
            let slot = lane.acquire().ok_or(BatchFault::Lane(LaneError::NoSlot))?;
            lane.write_payload(slot, 0, &records[at..at + group.bytes]);
            lane.submit_import(slot, group.pages.len() as u32, group.bytes as u32, epoch);
            let done = lane.wait().map_err(|e| fault(e, before))?;
            lane.release(done.slot);
            at += group.bytes;
            before += group.pages.len();
        }
        self.check_epoch(token).map_err(|e| fault(e, before))
    }
}

/// An index within a group is one within the whole.
fn fault(e: LaneError, before: usize) -> BatchFault {
    match e {
        LaneError::Refused { status, index } => {
            BatchFault::Refused { status, index: before + index as usize }
        }
        e => BatchFault::Lane(e),
    }
}

#[cfg(test)]
mod tests {
    use mirrorvm_abi::record::Listed;
    use proptest::prelude::*;

    use super::*;
    use crate::mirror::records::tests::group;

    fn pages(numbers: std::ops::Range<u64>, zero: bool) -> Vec<u8> {
        group(&numbers.map(|page| Listed { page, zero }).collect::<Vec<_>>())
    }

    #[test]
    fn records_are_framed_or_refused_where_they_stop_being() {
        let whole = [pages(0..2, false), pages(2..3, false)].concat();
        let found = parse_records(&whole).unwrap();
        let listed: Vec<u64> = found.iter().flat_map(|g| g.pages.iter().map(|p| p.page)).collect();
        assert_eq!((found.len(), listed), (2, vec![0, 1, 2]));
        assert_eq!(parse_records(&[]), Ok(vec![]));
        let one = group_bytes(2);
        assert_eq!(parse_records(&whole[..one + 9]), Err(NotRecords { at: one }));
        assert_eq!(parse_records(&whole[..one - 9]), Err(NotRecords { at: 0 }));
        // More pages than a batch has, and more than a slot takes at once.
        let many: Vec<u8> = (0..=BATCH_PAGES_MAX as u64).flat_map(|p| pages(p..p + 1, true)).collect();
        let at = BATCH_PAGES_MAX * pages(0..1, true).len();
        assert_eq!(parse_records(&many), Err(NotRecords { at }));
        let large = [pages(0..BATCH_MAX as u64, true), pages(0..BATCH_MAX as u64 + 1, true)].concat();
        let at = pages(0..BATCH_MAX as u64, true).len();
        assert_eq!(parse_records(&large), Err(NotRecords { at }));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..9000)) {
            if let Ok(groups) = parse_records(&bytes) {
                prop_assert_eq!(groups.iter().map(|g| g.bytes).sum::<usize>(), bytes.len());
            }
        }
    }
}
