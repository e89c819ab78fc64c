//! Two mirrors on real KVM, back to back: what the source's helper seals, the destination's opens.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use std::sync::Arc;
use std::time::Instant;

use mirrorvm::addr::{PAGE_SIZE, RamPage};
use mirrorvm::mirror::LaneError;
use mirrorvm_abi::mailbox::BATCH_MAX;
use mirrorvm_abi::op::{Begin, Start, Status};

use support::{Pair, kvm, random_fill};

#[test]
fn a_page_crosses_and_the_helper_refuses_its_own_footprint() {
    let Some(kvm) = kvm() else { return };
    let mut pair = Pair::new(&kvm, 64 << 20, 1);
    random_fill(&pair.source_ram, 7);
    pair.begin();
    let pages: Vec<_> = (0..BATCH_MAX as u64).map(RamPage::new).collect();
    let t = Instant::now();
    let total = (64 << 20) / PAGE_SIZE;
    for first in (0..total).step_by(BATCH_MAX) {
        let pages: Vec<_> = (first..first + BATCH_MAX as u64).map(RamPage::new).collect();
        pair.carry(&pages, 1).unwrap();
    }
    println!("64 MiB sealed and opened in {:?}", t.elapsed());
    assert_eq!(
        pair.carry(&pages[..1], 1),
        Err(LaneError::Refused { status: Status::PageRepeated, index: 0 })
    );
    let helper = pair.source_ram.layout().helper().unwrap().ram_addr.page();
    assert_eq!(pair.carry(&[helper], 1), Err(LaneError::Refused { status: Status::PageRefused, index: 0 }));

    let token = pair.source.end_epoch().unwrap();
    pair.destination.check_epoch(&token).unwrap();
    pair.source.paused().unwrap();
    let start = pair.source.start(&Start { state: [5; 32], shared_pages: 0 }).unwrap();
    pair.destination.state_arrived(&[5; 32]).unwrap();
    pair.destination.check_start(&start).unwrap();
    let commit = pair.destination.commit().unwrap();
    assert!(pair.destination.abort().is_err(), "a committed destination mints no ABORT");
    pair.source.check_commit(&commit).unwrap();

    let (mut a, mut b) = ([0; 4096], [0; 4096]);
    for page in (0..total).map(RamPage::new) {
        pair.source_ram.read_page(page, &mut a).unwrap();
        pair.destination_ram.read_page(page, &mut b).unwrap();
        assert!(a == b, "page {page:?} differs");
    }
    let _ = (Arc::strong_count(pair.source.plan()), Begin::decode(&[]));
}
