//! The destination's side of a stream: records go from the peer to the helper; and of shared pages: into RAM.

use std::time::{Duration, Instant};

use super::MigrationFault;
use super::landing::{Ground, Landing};
use super::records::{Mask, Pass, pass};
use super::stages::{Clock, Stage};
use super::wire::{DATA_HEADER_BYTES, DATA_MAX, DataFrame, SHARED_PAGE_BYTES, kind};
use crate::addr::RamPage;
use crate::memory::GuestRam;
use crate::mirror::Lane;
use crate::transport::Link;

/// One stream's link, kept over rounds.
pub(super) struct Sink {
    pub link: Link,
    /// Shows headers that came on a link without TLS.
    mask: Option<Mask>,
}

/// What an epoch brought on one stream.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Received {
    pub sealed: u64,
    pub zero: u64,
}

impl Sink {
    pub const fn new(link: Link, mask: Option<Mask>) -> Self {
        Self { link, mask }
    }

    /// Takes everything of `epoch` that comes on this stream.
    pub fn receive(
        &mut self,
        lane: &mut Lane,
        ground: Option<&Ground<'_>>,
        epoch: u32,
        stall: Duration,
    ) -> Result<Received, MigrationFault> {
        let mut got = Received::default();
        let mut landing = ground.map(Landing::new);
        let mut clock = Clock::start();
        loop {
            self.link.set_deadline(Some(Instant::now() + stall));
            let header = self.link.recv_header(DATA_MAX)?.ok_or(MigrationFault::PeerGone)?;
            match header.kind {
                kind::EPOCH_END => {
                    let mut number = [0; 4];
                    if header.len != 4 {
                        return Err(MigrationFault::Protocol("an epoch's end of another length"));
                    }
                    self.link.read_payload(&mut number)?;
                    if u32::from_le_bytes(number) != epoch {
                        return Err(MigrationFault::Protocol("the end of another epoch"));
                    }
                    break;
                }
                kind::RECORDS => {
                    let frame = self.header(header.len, epoch)?;
                    self.records(lane, frame, landing.as_mut(), &mut got, &mut clock)?;
                }
                _ => return Err(MigrationFault::Protocol("a message that does not belong on a stream")),
            }
        }
        clock.lap(Stage::Receive);
        while lane.in_flight() > 0 {
            finish_one(lane, &mut got)?;
        }
        clock.lap(Stage::Open);
        Ok(got)
    }

    fn header(&mut self, len: u32, epoch: u32) -> Result<DataFrame, MigrationFault> {
        let mut raw = [0; DATA_HEADER_BYTES];
        if (len as usize) < raw.len() {
            return Err(MigrationFault::Protocol("a data frame without its header"));
        }
        self.link.read_payload(&mut raw)?;
        if let Some(mask) = &mut self.mask {
            mask.apply(&mut raw);
        }
        DataFrame::read(&raw, len, epoch)
    }

    fn records(
        &mut self,
        lane: &mut Lane,
        frame: DataFrame,
        landing: Option<&mut Landing<'_>>,
        got: &mut Received,
        clock: &mut Clock,
    ) -> Result<(), MigrationFault> {
        let DataFrame { epoch, count, bytes } = frame;
        clock.lap(Stage::Receive);
        let slot = loop {
            match lane.acquire() {
                Some(slot) => break slot,
                None => finish_one(lane, got)?,
            }
        };
        clock.lap(Stage::Open);
        let records = lane.payload(slot, bytes);
        self.link.read_span(&records)?;
        clock.lap(Stage::Receive);
        let what = self.mask.as_mut().map_or(Pass::Look, Pass::Show);
        match landing {
            Some(landing) => {
                pass(&records, count, what, |listed| landing.expect(listed))?;
                clock.lap(Stage::Show);
                landing.prepare();
                clock.lap(Stage::Fault);
            }
            None if matches!(what, Pass::Look) => {}
            None => pass(&records, count, what, |_| {})?,
        }
        clock.lap(Stage::Show);
        lane.submit_import(slot, count, bytes as u32, epoch);
        Ok(())
    }
}

/// Writes shared pages, a frame of which has begun on a link with TLS; gives their number.
pub(super) fn receive_shared(
    link: &mut Link,
    ram: &GuestRam,
    len: u32,
    epoch: u32,
) -> Result<u64, MigrationFault> {
    let mut raw = [0; DATA_HEADER_BYTES];
    if (len as usize) < raw.len() {
        return Err(MigrationFault::Protocol("a data frame without its header"));
    }
    link.read_payload(&mut raw)?;
    let DataFrame { count, bytes, .. } = DataFrame::read(&raw, len, epoch)?;
    if bytes != count as usize * SHARED_PAGE_BYTES {
        return Err(MigrationFault::Protocol("shared pages of another length"));
    }
    let (mut number, mut page) = ([0; 8], [0; 4096]);
    let layout = ram.layout();
    for _ in 0..count {
        link.read_payload(&mut number)?;
        link.read_payload(&mut page)?;
        let at = RamPage::new(u64::from_le_bytes(number));
        let inside = layout.ram().any(|b| b.ram_range().contains(at.get().saturating_mul(4096)));
        if !inside || ram.write_page(at, &page).is_err() {
            return Err(MigrationFault::Protocol("a shared page that is no RAM"));
        }
    }
    Ok(u64::from(count))
}

fn finish_one(lane: &mut Lane, got: &mut Received) -> Result<(), MigrationFault> {
    let done = lane.wait()?;
    lane.release(done.slot);
    got.sealed += u64::from(done.pages);
    got.zero += u64::from(done.zero);
    Ok(())
}
