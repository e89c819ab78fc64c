//! The software machine: the workload guest and the helper run on it as they do on KVM.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use mirrorvm::addr::{PAGE_SIZE, RamPage};
use mirrorvm::guest::embedded::{Embedded, EmbeddedSetup, EmbeddedSpec};
use mirrorvm::guest::{Machine, OnEnd};
use mirrorvm::hypervisor::Hypervisor;
use mirrorvm::hypervisor::emulated::EmulatedHost;
use mirrorvm::memory::{GuestRam, Secret};
use mirrorvm::mirror::{HelperImage, LaneError};
use mirrorvm::pages::PageSet;
use mirrorvm_abi::mailbox::BATCH_MAX;
use mirrorvm_abi::op::{Greeting, Start, Status};

use support::{Pair, mirror, ram};

const SPEC: EmbeddedSpec = EmbeddedSpec {
    vcpus: 2,
    fill: true,
    working_set: 4 << 20,
    dirty_bytes_per_second: 16 << 20,
    withdraw_after: None,
};

fn machine(host: &dyn Hypervisor, ram: GuestRam, boot: bool) -> Embedded {
    let on_end: OnEnd = Arc::new(|_| {});
    let image = HelperImage::built_in();
    let home = ram.layout();
    let setup = EmbeddedSetup {
        name: "t",
        home: &home,
        declaration: None,
        check_declaration: Arc::new(|_| Vec::new()),
        on_readiness: Arc::new(|| ()),
        sev: None,
        ram,
        helper_image: image.bytes(),
        secret: Secret::copied(&[1; 32]),
        boot,
        on_end,
    };
    Embedded::new(host, &SPEC, setup).unwrap()
}

/// The last whole `tick` line: ticks, pages, errors.
fn last_tick(m: &dyn Machine) -> Option<(u64, u64, u64)> {
    let text = String::from_utf8(m.console().read(None, usize::MAX).1).unwrap();
    let line = text.lines().rfind(|l| l.starts_with("tick "))?.to_owned();
    let n: Vec<u64> = line.split(' ').filter_map(|w| w.parse().ok()).collect();
    (n.len() == 3).then(|| (n[0], n[1], n[2]))
}

/// Lets the guest run until it has counted `ticks`. The deadline only bounds a failure.
fn run_until(m: &mut dyn Machine, ticks: u64) -> (u64, u64, u64) {
    let deadline = Instant::now() + Duration::from_secs(30);
    m.resume().unwrap();
    loop {
        if let Some(t) = last_tick(m).filter(|t| t.0 >= ticks) {
            return t;
        }
        assert!(Instant::now() < deadline, "no tick {ticks}: {:?}", m.ended());
        std::thread::yield_now();
    }
}

fn copy(from: &GuestRam, to: &GuestRam) {
    let mut page = [0; 4096];
    for block in from.layout().ram() {
        let first = block.ram_addr.page().get();
        for p in (first..first + block.size / PAGE_SIZE).map(RamPage::new) {
            from.read_page(p, &mut page).unwrap();
            to.write_page(p, &page).unwrap();
        }
    }
}

#[test]
fn a_guest_runs_is_held_and_goes_on_in_another_machine() {
    let host = EmulatedHost::without_sev();
    let mut a = machine(&host, ram(32 << 20), true);
    run_until(&mut a, 30);
    a.pause().unwrap();
    let (ticks, pages, errors) = last_tick(&a).unwrap();
    assert_eq!(errors, 0);
    assert!(pages > 0);
    assert_eq!(a.encryption().shared().len(), 16, "the guest shares its statistics pages");

    let end = a.console().end();
    let state = a.save_state().unwrap();
    let mut b = machine(&host, ram(32 << 20), false);
    copy(a.ram(), b.ram());
    assert_eq!(a.console().end(), end, "a held guest prints nothing");
    b.load_state(&state).unwrap();
    b.console().adopt(end, &a.console().carry().1);
    let later = run_until(&mut b, ticks + 30);
    assert_eq!(later.2, 0, "no page is lost or stale");
    b.pause().unwrap();
    for bad in [
        &b"{}"[..],
        br#"{"vcpus":[]}"#,
        br#"{"vcpus":[{},{}]}"#,
        br#"{"vcpus":[{"save_area":{}},{"save_area":{}}]}"#,
    ] {
        assert!(b.load_state(bad).is_err());
    }
}

#[test]
fn a_guest_whose_page_is_lost_notices() {
    let host = EmulatedHost::without_sev();
    let ram = ram(32 << 20);
    let mut a = machine(&host, ram.clone(), true);
    run_until(&mut a, 10);
    a.pause().unwrap();
    // Free RAM begins behind boot page, shared pages, image, stacks and tables: the working set of vCPU 1 is
    // in there.
    for p in (1 << 20) / PAGE_SIZE..(2 << 20) / PAGE_SIZE {
        ram.write_page(RamPage::new(p), &[0; 4096]).unwrap();
    }
    let (ticks, ..) = last_tick(&a).unwrap();
    let deadline = ticks + 2000;
    let mut now = ticks;
    while run_until(&mut a, now + 10).2 == 0 {
        now += 10;
        assert!(now < deadline, "no error was counted");
    }
}

#[test]
fn the_dirty_log_is_exactly_what_the_guest_wrote() {
    let host = EmulatedHost::without_sev();
    let mut m = machine(&host, ram(32 << 20), true);
    run_until(&mut m, 10);
    m.log_dirty(true).unwrap();
    let (ticks, ..) = last_tick(&m).unwrap();
    run_until(&mut m, ticks + 20);
    m.pause().unwrap();
    m.take_dirty(&mut PageSet::new()).unwrap();
    let mut before = vec![[0u8; 4096]; (32 << 20) / 4096];
    for (i, p) in before.iter_mut().enumerate() {
        m.ram().read_page(RamPage::new(i as u64), p).unwrap();
    }
    run_until(&mut m, ticks + 60);
    m.pause().unwrap();
    let mut dirty = PageSet::new();
    m.take_dirty(&mut dirty).unwrap();
    let (mut page, mut changed) = ([0; 4096], 0);
    for (i, old) in before.iter().enumerate() {
        m.ram().read_page(RamPage::new(i as u64), &mut page).unwrap();
        let logged = dirty.contains(RamPage::new(i as u64));
        // Every rewrite changes a page; words of the shared pages may be written with the same value.
        assert!(logged == (page != *old) || (logged && i <= 16), "page {i}: logged {logged}");
        changed += u32::from(page != *old);
    }
    assert!(changed > 10);
    let mut again = PageSet::new();
    m.take_dirty(&mut again).unwrap();
    assert!(again.is_empty(), "a held guest writes nothing");
    m.log_dirty(false).unwrap();
    assert!(m.take_dirty(&mut dirty).is_ok());
}

#[test]
fn helpers_carry_all_of_a_guests_ram() {
    let host = EmulatedHost::without_sev();
    let mut pair = Pair::new(&host, 64 << 20, 2);
    support::random_fill(&pair.source_ram, 7);
    pair.begin();
    let begun = Instant::now();
    let total = (64 << 20) / PAGE_SIZE;
    for first in (0..total).step_by(BATCH_MAX) {
        let pages: Vec<_> = (first..first + BATCH_MAX as u64).map(RamPage::new).collect();
        pair.carry(&pages, 1).unwrap();
    }
    println!("64 MiB sealed and opened in {:?}", begun.elapsed());
    assert_eq!(
        pair.carry(&[RamPage::new(0)], 1),
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
    pair.source.check_commit(&commit).unwrap();
    let (mut a, mut b) = ([0; 4096], [0; 4096]);
    for page in (0..total).map(RamPage::new) {
        pair.source_ram.read_page(page, &mut a).unwrap();
        pair.destination_ram.read_page(page, &mut b).unwrap();
        assert!(a == b, "page {page:?} differs");
    }
}

#[test]
fn a_mirror_beside_a_running_guest_writes_nothing_into_its_dirty_log() {
    let host = EmulatedHost::without_sev();
    let ram = ram(32 << 20);
    let mut guest = machine(&host, ram.clone(), true);
    run_until(&mut guest, 10);
    guest.pause().unwrap();
    guest.log_dirty(true).unwrap();
    let mut mirror = mirror(&host, &ram, 1);
    assert_ne!(mirror.hello().unwrap(), Greeting::default());
    drop(mirror);
    let mut dirty = PageSet::new();
    guest.take_dirty(&mut dirty).unwrap();
    assert!(dirty.is_empty());
}
