//! The workload guest on real KVM: it runs, is held, and goes on elsewhere from its saved state.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mirrorvm::addr::RamPage;
use mirrorvm::guest::embedded::{Embedded, EmbeddedSetup, EmbeddedSpec};
use mirrorvm::guest::{Machine, OnEnd};
use mirrorvm::hypervisor::kvm::KvmHost;
use mirrorvm::memory::{GuestRam, Secret};
use mirrorvm::mirror::HelperImage;
use mirrorvm::pages::PageSet;

use support::{kvm, ram};

const SPEC: EmbeddedSpec = EmbeddedSpec {
    vcpus: 2,
    fill: true,
    working_set: 4 << 20,
    dirty_bytes_per_second: 64 << 20,
    withdraw_after: None,
};

fn machine(kvm: &KvmHost, ram: GuestRam, boot: bool) -> Embedded {
    let ends = AtomicUsize::new(0);
    let on_end: OnEnd = Arc::new(move |_| {
        ends.fetch_add(1, Ordering::SeqCst);
    });
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
    Embedded::new(kvm, &SPEC, setup).unwrap()
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

#[test]
fn runs_is_held_and_goes_on_in_another_machine() {
    let Some(kvm) = kvm() else { return };
    let mut a = machine(&kvm, ram(32 << 20), true);
    run_until(&mut a, 30);
    a.pause().unwrap();
    let (ticks, pages, errors) = last_tick(&a).unwrap();
    assert_eq!(errors, 0);
    assert!(pages > 0);
    assert_eq!(a.encryption().shared().len(), 16, "the guest shares its statistics pages");

    let end = a.console().end();
    let state = a.save_state().unwrap();
    let mut b = machine(&kvm, ram(32 << 20), false);
    let mut page = [0; 4096];
    for block in a.ram().layout().ram() {
        let first = block.ram_addr.page().get();
        for p in first..first + block.size / 4096 {
            a.ram().read_page(RamPage::new(p), &mut page).unwrap();
            b.ram().write_page(RamPage::new(p), &page).unwrap();
        }
    }
    assert_eq!(a.console().end(), end, "a held guest prints nothing");
    b.load_state(&state).unwrap();
    b.console().adopt(end, &a.console().carry().1);
    let later = run_until(&mut b, ticks + 30);
    assert_eq!(later.2, 0, "no page is lost or stale");
    assert!(b.load_state(b"{}").is_err());
    assert!(b.load_state(br#"{"vcpus":[]}"#).is_err());
}

#[test]
fn the_dirty_log_is_what_the_guest_wrote() {
    let Some(kvm) = kvm() else { return };
    let mut m = machine(&kvm, ram(32 << 20), true);
    run_until(&mut m, 10);
    m.log_dirty(true).unwrap();
    let mut seen = PageSet::new();
    m.take_dirty(&mut seen).unwrap();
    let (ticks, ..) = last_tick(&m).unwrap();
    run_until(&mut m, ticks + 20);
    m.pause().unwrap();
    let mut before = vec![[0u8; 4096]; (32 << 20) / 4096];
    for (i, p) in before.iter_mut().enumerate() {
        m.ram().read_page(RamPage::new(i as u64), p).unwrap();
    }
    let mut dirty = PageSet::new();
    m.take_dirty(&mut dirty).unwrap();
    assert!(!dirty.is_empty());
    m.resume().unwrap();
    run_until(&mut m, ticks + 60);
    m.pause().unwrap();
    let mut dirty = PageSet::new();
    m.take_dirty(&mut dirty).unwrap();
    let mut page = [0; 4096];
    for (i, old) in before.iter().enumerate() {
        m.ram().read_page(RamPage::new(i as u64), &mut page).unwrap();
        assert!(page == *old || dirty.contains(RamPage::new(i as u64)), "page {i} changed unlogged");
    }
    m.log_dirty(false).unwrap();
    assert!(m.take_dirty(&mut dirty).is_ok());
}
