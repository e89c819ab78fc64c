//! Sealed batches by themselves: pages of RAM that leave through one helper for another of the same guest,
//! without a migration around them.
//!
//! Owns: the course of such a session at both ends, and what is sealed for whom. Must not know: who carries
//! the batches. An importing helper draws a nonce first, so that a batch opens in that session of that helper
//! and in no other; each batch is one epoch, with its token, so that batches open once and in order. No state
//! of vCPUs goes along, START is never minted, and no guest changes hosts.

use mirrorvm_abi::PAGE_BYTES;
use mirrorvm_abi::mailbox::BATCH_MAX;
use mirrorvm_abi::op::{Begin, Status};
use mirrorvm_abi::record::{HEADER_BYTES, Header, Kind, TAG_BYTES};
use ring::digest;
use uuid::Uuid;

use super::records::{Walk, record_bytes};
use super::{LaneError, Mirror, Nonce, SealedToken};
use crate::addr::RamPage;
use crate::address_space::{Addressing, GuestLayout};

/// Pages of one batch at most.
pub const BATCH_PAGES_MAX: usize = 256;
/// Bytes of a batch's records at most.
pub const BATCH_BYTES_MAX: usize = BATCH_PAGES_MAX * (HEADER_BYTES + PAGE_BYTES + TAG_BYTES);

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

/// Why records are not framed as records are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("byte {at} of the records begins no record of a page")]
pub struct NotRecords {
    /// Offset of the record in the batch.
    pub at: usize,
}

/// Why a batch was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchFault {
    /// The helper refuses a record, or the token (`index` is then the number of records). The session is
    /// over.
    #[error("the helper refuses record {index}: {status:?}")]
    Refused {
        /// The helper's reason.
        status: Status,
        /// Index of the record.
        index: usize,
    },
    /// The helper, its vCPU or its rings.
    #[error("the helper failed")]
    Lane(#[source] LaneError),
}

impl BatchTerms<'_> {
    fn transcript(&self, mirror: &Mirror) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(b"mirrorvm batch v1");
        context.update(&mirrorvm_abi::ABI_VERSION.to_le_bytes());
        context.update(&mirrorvm_abi::layout::LAYOUT_HASH.to_le_bytes());
        context.update(&mirror.helper_measurement());
        context.update(self.guest.as_bytes());
        context.update(&[match self.addressing {
            Addressing::RamAddr => 1,
            Addressing::Gpa => 2,
        }]);
        context.update(&serde_json::to_vec(self.layout).unwrap_or_default());
        let mut out = [0; 32];
        out.copy_from_slice(context.finish().as_ref());
        out
    }

    fn begin(&self, mirror: &mut Mirror, source: bool, peer_nonce: Nonce) -> Result<(), LaneError> {
        let transcript = self.transcript(mirror);
        mirror.begin(&Begin {
            digests: false,
            source,
            // Which pages are zero is nobody's business.
            elide_zero: false,
            fresh: false,
            streams: 1,
            session: *self.session.as_bytes(),
            peer_nonce,
            transcript,
        })
    }
}

/// Headers of records, one after the other. Host and helper both look: what comes is anybody's bytes.
///
/// # Errors
/// [`NotRecords`].
pub fn parse_records(bytes: &[u8]) -> Result<Vec<Header>, NotRecords> {
    let (mut walk, mut headers) = (Walk::over(bytes.len()), Vec::new());
    while !walk.is_over() {
        let at = walk.at();
        let header = bytes[at..].first_chunk().and_then(|raw| walk.step(raw));
        let header = header.filter(|h| matches!(h.kind, Kind::Page | Kind::ZeroPage));
        match header {
            Some(header) if headers.len() < BATCH_PAGES_MAX => headers.push(header),
            Some(_) | None => return Err(NotRecords { at }),
        }
    }
    Ok(headers)
}

impl Mirror {
    /// Exporting end: begins a session with an importer's nonce, gives its own.
    ///
    /// # Errors
    /// [`LaneError`]; the helper has a session already.
    pub fn begin_export(&mut self, terms: &BatchTerms<'_>, importer: Nonce) -> Result<Nonce, LaneError> {
        let nonce = self.hello()?;
        terms.begin(self, true, importer)?;
        Ok(nonce)
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
        let mut records =
            Vec::with_capacity(BATCH_BYTES_MAX.min(named.len() * (BATCH_BYTES_MAX / BATCH_PAGES_MAX)));
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

    /// Importing end: begins the session that [`Mirror::hello`] gave a nonce for.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn begin_import(&mut self, terms: &BatchTerms<'_>, exporter: Nonce) -> Result<(), LaneError> {
        terms.begin(self, false, exporter)
    }

    /// Importing end: opens a batch into RAM, record by record, and checks its token. Gives the pages
    /// written; after a fault those before it were written, and the session is over.
    ///
    /// # Errors
    /// [`BatchFault`].
    pub fn import_batch(
        &mut self,
        records: &[u8],
        headers: &[Header],
        epoch: u32,
        token: &SealedToken,
    ) -> Result<(), BatchFault> {
        let mut at = 0;
        for (n, chunk) in headers.chunks(BATCH_MAX).enumerate() {
            let len: usize = chunk.iter().map(record_bytes).sum();
            let lane = self.control_lane();
            let slot = lane.acquire().ok_or(BatchFault::Lane(LaneError::NoSlot))?;
            lane.write_payload(slot, 0, &records[at..at + len]);
            lane.submit_import(slot, chunk.len() as u32, len as u32, epoch);
            let done = lane.wait().map_err(|e| fault(e, n * BATCH_MAX))?;
            lane.release(done.slot);
            at += len;
        }
        self.check_epoch(token).map_err(|e| fault(e, headers.len()))
    }
}

/// An index within a slot's batch is one within the whole.
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
    use proptest::prelude::*;

    use super::*;

    fn record(page: u64, kind: Kind) -> Vec<u8> {
        let len = kind.body_bytes();
        let header = Header { kind, stream: 0, epoch: 1, sequence: 0, page, len: len as u32 };
        let mut bytes = header.encode().to_vec();
        bytes.resize(HEADER_BYTES + len + TAG_BYTES, 7);
        bytes
    }

    #[test]
    fn records_are_framed_or_refused_where_they_stop_being() {
        let whole: Vec<u8> = (0..3).flat_map(|p| record(p, Kind::Page)).collect();
        let pages: Vec<u64> = parse_records(&whole).unwrap().iter().map(|h| h.page).collect();
        assert_eq!(pages, [0, 1, 2]);
        assert_eq!(parse_records(&[]), Ok(vec![]));
        let one = HEADER_BYTES + PAGE_BYTES + TAG_BYTES;
        assert_eq!(parse_records(&whole[..2 * one + 9]), Err(NotRecords { at: 2 * one }));
        assert_eq!(parse_records(&record(0, Kind::Commit)), Err(NotRecords { at: 0 }));
        let many: Vec<u8> = (0..=BATCH_PAGES_MAX as u64).flat_map(|p| record(p, Kind::ZeroPage)).collect();
        let at = BATCH_PAGES_MAX * (HEADER_BYTES + TAG_BYTES);
        assert_eq!(parse_records(&many), Err(NotRecords { at }));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..9000)) {
            if let Ok(headers) = parse_records(&bytes) {
                let sum: usize = headers.iter().map(|h| HEADER_BYTES + h.len as usize + TAG_BYTES).sum();
                prop_assert_eq!(sum, bytes.len());
            }
        }
    }
}
