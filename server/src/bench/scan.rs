//! The helper's scan on a mirror vCPU: how fast changed pages are found, and what keeping their digests costs
//! an export.

use std::sync::Arc;
use std::time::Instant;

use mirrorvm::addr::Gpa;
use mirrorvm::address_space::{BlockSpec, GuestLayout, HelperPlacement, LayoutError};
use mirrorvm::hypervisor::kvm::KvmHost;
use mirrorvm::memory::{Backing, GuestRam};
use mirrorvm::mirror::{HelperImage, Mirror};
use mirrorvm_abi::op::{Begin, Greeting, SCAN_MAX, Scan};

use super::seal::export;
use super::setting::{fill, mirror};
use super::{BenchArgs, BenchError, Row};

pub(super) fn measure(args: &BenchArgs) -> Result<Vec<Row>, BenchError> {
    let kvm = KvmHost::open()?;
    let bytes = args.bytes();
    let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
    let mut found: [Vec<f64>; 4] = Default::default();
    for _ in 0..args.runs() {
        let mut warm = [0.0; 2];
        for (digests, warm) in [false, true].into_iter().zip(&mut warm) {
            let ram = memory(bytes, digests)?;
            fill(&ram)?;
            let mut source = mirror(&kvm, &ram)?;
            begin(&mut source)?;
            export(&mut source, bytes, 1, None)?;
            source.end_epoch()?;
            *warm = export(&mut source, bytes, 2, None)?;
            source.end_epoch()?;
            if !digests {
                continue;
            }
            let (seconds, changed) = scan(&mut source, bytes, 3)?;
            if changed != 0 {
                return Err(
                    format!("{changed} pages of a guest that does not run were called changed").into()
                );
            }
            found[2].push(rate(seconds));
            let every = 100;
            for page in (0..bytes / 4096).step_by(every) {
                ram.write_page(mirrorvm::addr::RamPage::new(page), &[0xa5; 4096])?;
            }
            let (seconds, changed) = scan(&mut source, bytes, 3)?;
            if changed != (bytes / 4096).div_ceil(every as u64) {
                return Err(format!("{changed} pages were found").into());
            }
            found[3].push(rate(seconds));
        }
        found[0].push(rate(warm[0]));
        found[1].push(rate(warm[1]));
    }
    let [plain, digested, still, changed] = found;
    Ok(vec![
        Row::new("helper seals (4 KiB memfd pages), second pass", "GB/s", plain),
        Row::new("the same and keeps digests", "GB/s", digested),
        Row::new("helper scans, nothing changed", "GB/s", still),
        Row::new("helper scans, 1 % of pages changed", "GB/s", changed),
    ])
}

/// RAM as QEMU's guests have it.
fn memory(bytes: u64, digests: bool) -> Result<GuestRam, BenchError> {
    let block = BlockSpec { name: "ram0".into(), size_bytes: bytes, gpa: Some(Gpa::new(0)) };
    let first = |mut e: Vec<LayoutError>| e.swap_remove(0);
    let bare = GuestLayout::assign(&[block]).map_err(first)?;
    let size = if digests { HelperPlacement::block_size_with_digests } else { HelperPlacement::block_size };
    let size = size(HelperImage::built_in().header(), &bare).ok_or("RAM too large")?;
    Ok(GuestRam::allocate(Arc::new(bare.with_helper(size, true).map_err(first)?), Backing::Memfd)?)
}

fn begin(source: &mut Mirror) -> Result<(), BenchError> {
    source.hello()?;
    Ok(source.begin(&Begin {
        source: true,
        elide_zero: true,
        fresh: false,
        digests: true,
        audit: false,
        suite: mirrorvm_abi::record::Suite::Aes256Gcm,
        streams: 1,
        session: [1; 16],
        peer: Greeting { nonce: [3; 32], public_key: [3; 32] },
        transcript: [2; 32],
    })?)
}

/// Scans all of RAM, two requests under way at a time; seconds and pages found.
fn scan(mirror: &mut Mirror, bytes: u64, epoch: u32) -> Result<(f64, u64), BenchError> {
    let lane = mirror.lanes().first_mut().ok_or("no lane")?;
    let begun = Instant::now();
    let (mut next, mut found, pages) = (0, 0, bytes / 4096);
    let mut waiting = std::collections::VecDeque::new();
    let mut words = Vec::new();
    loop {
        while waiting.len() < 2 && next < pages {
            let scan = Scan { first: next, count: (pages - next).min(u64::from(SCAN_MAX)) as u32 };
            next += u64::from(scan.count);
            let slot = lane.acquire().ok_or("no slot")?;
            lane.submit_scan(slot, scan, epoch);
            waiting.push_back(scan);
        }
        let Some(scan) = waiting.pop_front() else {
            return Ok((begun.elapsed().as_secs_f64(), found));
        };
        let done = lane.wait()?;
        lane.read_scan(&done, scan, &mut words)?;
        found += words.iter().map(|w| u64::from(w.count_ones())).sum::<u64>();
        lane.release(done.slot);
    }
}
