//! The helper's seal and open rate on a mirror vCPU, against ring doing the same work on a host thread.

use std::time::Instant;

use mirrorvm::addr::RamPage;
use mirrorvm::hypervisor::kvm::KvmHost;
use mirrorvm::memory::GuestRam;
use mirrorvm::mirror::Mirror;
use mirrorvm_abi::{
    mailbox::{BATCH_MAX, PAYLOAD_BYTES},
    op::Begin,
    record,
};
use ring::aead;

use super::setting::{fill, mirror, ram};
use super::{BenchArgs, BenchError, Row, Target};

/// Least of ring's rate that a helper reaches.
const LEAST: Target = Target::AtLeast(0.85);

/// Bytes of one batch of pages.
type Sealed = Vec<(u32, Vec<u8>)>;

pub(super) fn measure(args: &BenchArgs) -> Result<Vec<Row>, BenchError> {
    let kvm = KvmHost::open()?;
    let bytes = args.bytes();
    let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
    let mut found: [Vec<f64>; 9] = Default::default();
    for _ in 0..args.runs() {
        let (source_ram, destination_ram) = (ram(bytes)?, ram(bytes)?);
        fill(&source_ram)?;
        let (mut source, mut destination) = (mirror(&kvm, &source_ram)?, mirror(&kvm, &destination_ram)?);
        begin(&mut source, &mut destination)?;
        let cold = export(&mut source, bytes, 1, None)?;
        let token = source.end_epoch()?;
        let mut sealed = Sealed::new();
        let warm = export(&mut source, bytes, 2, None)?;
        source.end_epoch()?;
        let host = host_seal(&source_ram, bytes)?;
        found[0].push(rate(cold));
        found[1].push(rate(warm));
        found[2].push(rate(host));
        found[3].push(host / cold);
        found[4].push(host / warm);
        // A fresh session for the opening side, whose first records must be the first sealed.
        drop((source, destination, token));
        let (mut source, mut destination) = (mirror(&kvm, &source_ram)?, mirror(&kvm, &destination_ram)?);
        begin(&mut source, &mut destination)?;
        export(&mut source, bytes, 1, Some(&mut sealed))?;
        let cold_open = import(&mut destination, &sealed, 1)?;
        found[5].push(rate(cold_open));
        let token = source.end_epoch()?;
        destination.check_epoch(&token)?;
        export(&mut source, bytes, 2, Some(&mut sealed))?;
        let warm_open = import(&mut destination, &sealed, 2)?;
        found[6].push(rate(warm_open));
        found[7].push(host / cold_open);
        found[8].push(host / warm_open);
    }
    let [cold, warm, host, cold_ratio, ratio, open_cold, open_warm, open_cold_ratio, open_ratio] = found;
    let promised = |name: &str, values| Row::new(name, "ratio", values).promised(LEAST);
    Ok(vec![
        Row::new("helper seals, first pass over RAM", "GB/s", cold),
        Row::new("helper seals, second pass", "GB/s", warm),
        Row::new("ring on a host thread, same batches (copy, seal, copy)", "GB/s", host),
        promised("helper seals, first pass / ring", cold_ratio),
        promised("helper seals, second pass / ring", ratio),
        Row::new("helper opens, first touch of the destination's RAM", "GB/s", open_cold),
        Row::new("helper opens, second pass", "GB/s", open_warm),
        promised("helper opens, first touch / ring seals", open_cold_ratio),
        promised("helper opens, second pass / ring seals", open_ratio),
    ])
}

fn begin(source: &mut Mirror, destination: &mut Mirror) -> Result<(), BenchError> {
    let (s, d) = (source.hello()?, destination.hello()?);
    let base = Begin {
        source: true,
        elide_zero: true,
        fresh: false,
        digests: false,
        audit: false,
        suite: mirrorvm_abi::record::Suite::Aes256Gcm,
        streams: 1,
        session: [1; 16],
        peer: d,
        transcript: [2; 32],
    };
    source.begin(&base)?;
    destination.begin(&Begin { source: false, fresh: true, peer: s, ..base })?;
    Ok(())
}

/// Seals all of RAM, with as many batches under way as there are slots; seconds. `keep`: the records are
/// copied out, which is not part of the helper's rate, so such a run is not reported.
pub(super) fn export(
    mirror: &mut Mirror,
    bytes: u64,
    epoch: u32,
    mut keep: Option<&mut Sealed>,
) -> Result<f64, BenchError> {
    if let Some(keep) = keep.as_deref_mut() {
        keep.clear();
    }
    let lane = mirror.lanes().first_mut().ok_or("no lane")?;
    let begun = Instant::now();
    let mut next = 0;
    let pages = bytes / 4096;
    loop {
        while next < pages
            && let Some(slot) = lane.acquire()
        {
            let batch: Vec<_> = (next..pages.min(next + BATCH_MAX as u64)).collect();
            next += batch.len() as u64;
            lane.submit_export(slot, &batch, epoch);
        }
        if lane.in_flight() == 0 {
            return Ok(begun.elapsed().as_secs_f64());
        }
        let done = lane.wait()?;
        if let Some(keep) = keep.as_deref_mut() {
            let mut records = vec![0; done.len];
            lane.read_payload(done.slot, 0, &mut records);
            keep.push((done.pages, records));
        }
        lane.release(done.slot);
    }
}

/// Opens all records; seconds. Copying them into the mailbox is part of it, as it is of a migration.
fn import(mirror: &mut Mirror, sealed: &Sealed, epoch: u32) -> Result<f64, BenchError> {
    let lane = mirror.lanes().first_mut().ok_or("no lane")?;
    let begun = Instant::now();
    for (pages, records) in sealed {
        let slot = match lane.acquire() {
            Some(slot) => slot,
            None => lane.wait()?.slot,
        };
        lane.write_payload(slot, 0, records);
        lane.submit_import(slot, *pages, records.len() as u32, epoch);
    }
    while lane.in_flight() > 0 {
        let done = lane.wait()?;
        lane.release(done.slot);
    }
    Ok(begun.elapsed().as_secs_f64())
}

/// What the helper does to pages, by ring on this thread: copy in, seal with the same associated data, copy
/// out. One key for all: what a group's own key costs is the helper's to bear.
fn host_seal(ram: &GuestRam, bytes: u64) -> Result<f64, BenchError> {
    let key = aead::UnboundKey::new(&aead::AES_256_GCM, &[9; 32]).map_err(|_| "no key")?;
    let key = aead::LessSafeKey::new(key);
    let mut out = vec![0u8; PAYLOAD_BYTES];
    // Touched before, as the mailbox is.
    out.fill(1);
    let mut page = [0; 4096];
    let begun = Instant::now();
    for n in 0..bytes / 4096 {
        ram.read_page(RamPage::new(n), &mut page)?;
        let index = n as usize % BATCH_MAX;
        let word = record::Listed { page: n, zero: false }.encode();
        let nonce = aead::Nonce::assume_unique_for_key(record::piece_nonce(n as usize));
        let aad = aead::Aad::from(record::piece_aad(index, word));
        let tag = key.seal_in_place_separate_tag(nonce, aad, &mut page).map_err(|_| "not sealed")?;
        out[record::front_bytes(index)..][..word.len()].copy_from_slice(&word);
        let at = record::front_bytes(BATCH_MAX) + index * (4096 + record::TAG_BYTES);
        out[at..at + 4096].copy_from_slice(&page);
        out[at + 4096..][..record::TAG_BYTES].copy_from_slice(tag.as_ref());
    }
    std::hint::black_box(&out);
    Ok(begun.elapsed().as_secs_f64())
}
