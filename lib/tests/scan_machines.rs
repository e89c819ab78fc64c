//! Scans on real mirrors, KVM's and the software machine's, over RAM that a thread writes at the same time.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use mirrorvm::addr::{PAGE_SIZE, RamPage};
use mirrorvm::hypervisor::Hypervisor;
use mirrorvm::hypervisor::emulated::EmulatedHost;
use mirrorvm::memory::GuestRam;
use mirrorvm::mirror::{Lane, LaneError, Mirror};
use mirrorvm_abi::mailbox::BATCH_MAX;
use mirrorvm_abi::op::{Begin, Scan, Status};

use support::{Pair, kvm, mirror, ordinary_begin, random_fill, scanning_ram};

const RAM: u64 = 32 << 20;
const PAGES: u64 = RAM / PAGE_SIZE;

/// A page of one number: torn, it has two.
fn page(n: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    bytes.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = n.to_le_bytes());
    bytes
}

/// Scans a range that is longer than one request could be, with two under way.
fn scan(lane: &mut Lane, pages: std::ops::Range<u64>, epoch: u32) -> Result<Vec<u64>, LaneError> {
    // Not a multiple of 64: edges of words within the range.
    let pieces: Vec<Scan> = pages
        .clone()
        .step_by(1000)
        .map(|first| Scan { first, count: (pages.end - first).min(1000) as u32 })
        .collect();
    let (mut found, mut words, mut asked) = (Vec::new(), Vec::new(), std::collections::VecDeque::new());
    let mut pieces = pieces.into_iter();
    loop {
        while asked.len() < 2
            && let Some(piece) = pieces.next()
        {
            let slot = lane.acquire().unwrap();
            lane.submit_scan(slot, piece, epoch);
            asked.push_back(piece);
        }
        let Some(piece) = asked.pop_front() else { return Ok(found) };
        let done = lane.wait()?;
        lane.read_scan(&done, piece, &mut words)?;
        lane.release(done.slot);
        let bit = |i: u64| words[(i / 64) as usize] >> (i % 64) & 1 != 0;
        found.extend((0..u64::from(piece.count)).filter(|i| bit(*i)).map(|i| piece.first + i));
    }
}

/// Both lanes scan a half each, at once.
fn scan_all(mirror: &mut Mirror, epoch: u32) -> Vec<u64> {
    let halves = [0..PAGES / 2, PAGES / 2..PAGES];
    std::thread::scope(|s| {
        let lanes = mirror.lanes().iter_mut().zip(halves);
        let threads: Vec<_> = lanes.map(|(lane, half)| s.spawn(move || scan(lane, half, epoch))).collect();
        threads.into_iter().flat_map(|t| t.join().unwrap().unwrap()).collect()
    })
}

fn send(pair: &mut Pair, pages: &[u64], epoch: u32) {
    for batch in pages.chunks(BATCH_MAX) {
        let batch: Vec<_> = batch.iter().map(|p| RamPage::new(*p)).collect();
        pair.carry(&batch, epoch).unwrap();
    }
    let token = pair.source.end_epoch().unwrap();
    pair.destination.check_epoch(&token).unwrap();
}

fn differing(a: &GuestRam, b: &GuestRam) -> Vec<u64> {
    let (mut x, mut y) = ([0; 4096], [0; 4096]);
    let differs = |p: &u64| {
        a.read_page(RamPage::new(*p), &mut x).unwrap();
        b.read_page(RamPage::new(*p), &mut y).unwrap();
        x != y
    };
    (0..PAGES).filter(differs).collect()
}

fn rounds_over_memory_that_is_written(on: &dyn Hypervisor) {
    let mut pair = Pair::over(on, scanning_ram(RAM), scanning_ram(RAM), 2);
    random_fill(&pair.source_ram, 11);
    pair.begin();
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let ram = pair.source_ram.clone();
    let mut epoch = 1;
    let sent = std::thread::scope(|s| {
        // The guest's part: whole pages in a wandering working set, some of them back and forth between two
        // contents.
        let writer = s.spawn(|| {
            let mut n = 0u64;
            while !stop.load(Relaxed) {
                n = n.wrapping_add(1);
                let at = if n.is_multiple_of(3) { n % 64 } else { 100 + n.wrapping_mul(7919) % 500 };
                ram.write_page(RamPage::new(at), &page(if at < 64 { n % 2 } else { n })).unwrap();
                written.store(n, Relaxed);
            }
        });
        let mut left: Vec<u64> = (0..PAGES).collect();
        let mut sent = Vec::new();
        for _ in 0..6 {
            send(&mut pair, &left, epoch);
            epoch += 1;
            sent.push(left.len() as u64);
            // A round of its own work for the writer, however the threads are scheduled.
            let seen = written.load(Relaxed);
            while written.load(Relaxed) < seen + 1000 {
                std::thread::yield_now();
            }
            left = scan_all(&mut pair.source, epoch);
            assert!(!left.is_empty() && left.iter().all(|p| *p < 600), "{left:?}");
        }
        stop.store(true, Relaxed);
        writer.join().unwrap();
        sent
    });
    // Paused. What a scan finds now is exactly what differs.
    let left = scan_all(&mut pair.source, epoch);
    assert_eq!(left, differing(&pair.source_ram, &pair.destination_ram));
    send(&mut pair, &left, epoch);
    epoch += 1;
    println!("{sent:?} pages in live rounds, {} at the end, {} writes", left.len(), written.load(Relaxed));
    assert_eq!(differing(&pair.source_ram, &pair.destination_ram), [] as [u64; 0]);
    assert_eq!(scan_all(&mut pair.source, epoch), [] as [u64; 0]);

    // Changed and changed back is nothing to send; and it is equal there.
    let (at, mut before) = (RamPage::new(1234), [0; 4096]);
    pair.source_ram.read_page(at, &mut before).unwrap();
    pair.source_ram.write_page(at, &page(1)).unwrap();
    assert_eq!(scan_all(&mut pair.source, epoch), [1234]);
    pair.source_ram.write_page(at, &before).unwrap();
    assert_eq!(scan_all(&mut pair.source, epoch), [] as [u64; 0]);
    assert_eq!(differing(&pair.source_ram, &pair.destination_ram), [] as [u64; 0]);
}

#[test]
fn rounds_of_scans_on_kvm() {
    let Some(kvm) = kvm() else { return };
    rounds_over_memory_that_is_written(&kvm);
}

#[test]
fn rounds_of_scans_on_the_software_machine() {
    rounds_over_memory_that_is_written(&EmulatedHost::without_sev());
}

#[test]
fn a_helper_without_room_refuses_and_goes_on() {
    let Some(kvm) = kvm() else { return };
    for on in [&kvm as &dyn Hypervisor, &EmulatedHost::without_sev()] {
        let mut pair = Pair::new(on, RAM, 1);
        pair.begin();
        assert!(!pair.source.plan().has_digests());
        let refused = scan(&mut pair.source.lanes()[0], 0..64, 1);
        assert!(matches!(refused, Err(LaneError::Refused { status: Status::WrongState, .. })), "{refused:?}");
        assert_eq!(pair.source.lanes()[0].in_flight(), 0);
        pair.carry(&[RamPage::new(0)], 1).unwrap();
        // The helper's own block is no RAM to be looked at, with room and without.
        let ram = scanning_ram(RAM);
        let own = ram.layout().helper().unwrap().ram_addr.page().get();
        let mut source = mirror(on, &ram, 1);
        let greeting = source.hello().unwrap();
        let begin = Begin { elide_zero: true, digests: true, ..ordinary_begin(greeting) };
        source.begin(&begin).unwrap();
        let lane = &mut source.lanes()[0];
        let refused = scan(lane, own..own + 1, 1);
        assert!(
            matches!(refused, Err(LaneError::Refused { status: Status::PageRefused, .. })),
            "{refused:?}"
        );
        assert_eq!(scan(lane, 0..PAGES, 1).unwrap().len() as u64, PAGES);
    }
}
