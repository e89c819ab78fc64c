//! Guests on the software machine under the model of SEV: what is private is ciphertext, and a wrong bit is
//! garbage.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

#[path = "support/bare_guest.rs"]
mod bare_guest;

use std::collections::HashSet;
use std::sync::Arc;

use mirrorvm::addr::PAGE_SIZE;
use mirrorvm::hypervisor::emulated::EmulatedHost;
use mirrorvm::hypervisor::{Exit, Hypervisor, HypervisorError, NoPorts, SlotId};
use mirrorvm::memory::Mapping;
use mirrorvm::sev::model::{AsidLimits, ModelPlatform};
use mirrorvm_workload as w;

use bare_guest::{
    AREA_AT, BareGuest, FREE_AT, IMAGE_AT, MORE, Plan, RAM_BYTES, STACK_AT, WORKING_SET, entry, run, slot,
};

fn host() -> EmulatedHost {
    EmulatedHost::new(ModelPlatform::seeded(1, AsidLimits::default()))
}

/// Every 16 aligned bytes of what the workload has in its pages.
fn canaries() -> HashSet<[u8; 16]> {
    let pages = FREE_AT / PAGE_SIZE + WORKING_SET..RAM_BYTES / PAGE_SIZE;
    let mut set = HashSet::new();
    for page in pages {
        let mut bytes = [0; w::PAGE];
        w::Pattern::new(page, 0).fill_bytes(&mut bytes);
        set.extend(bytes.as_chunks::<16>().0);
    }
    set
}

/// Plaintext of the guest at any offset of what the host sees.
fn plaintext_seen(ram: &Mapping) -> usize {
    let mut all = vec![0; RAM_BYTES as usize];
    ram.read(0, &mut all);
    let canaries = canaries();
    all.array_windows::<16>().filter(|w| canaries.contains(*w)).count()
}

#[test]
fn the_host_sees_no_plaintext_of_a_private_page_and_all_of_a_shared_one() {
    let host = host();
    let mut private = BareGuest::new(&host, &Plan::SEV);
    private.run(20).unwrap();
    let stats = private.stats();
    assert_eq!((stats.working, stats.errors), (1, 0));
    assert!(stats.pages >= 60, "{stats:?}");
    assert_eq!(plaintext_seen(&private.ram), 0);

    let mut shared = BareGuest::new(&host, &Plan { window_private: false, ..Plan::SEV });
    shared.run(20).unwrap();
    assert_eq!(shared.stats().errors, 0);
    assert!(canaries().len() > 60_000);
    assert_eq!(plaintext_seen(&shared.ram), canaries().len());

    let mut plain = BareGuest::new(&host, &Plan::PLAIN);
    plain.run(20).unwrap();
    assert_eq!(plaintext_seen(&plain.ram), canaries().len());
}

#[test]
fn a_page_that_the_host_changes_is_noticed_by_the_guest() {
    let mut guest = BareGuest::new(&host(), &Plan::SEV);
    guest.run(5).unwrap();
    let page = (FREE_AT / PAGE_SIZE) * PAGE_SIZE;
    let mut bytes = [0; 4096];
    guest.ram.read(page, &mut bytes);
    bytes[100] ^= 1;
    guest.ram.write(page, &bytes);
    guest.run(10).unwrap();
    assert_eq!(guest.stats().errors, 1);
}

#[test]
fn moved_swapped_or_unlaunched_code_is_a_triple_fault() {
    let host = host();
    let first_exit = |mut g: BareGuest| g.vcpu.run(&mut NoPorts).unwrap();
    let guest = || BareGuest::new(&host, &Plan::SEV);
    assert_ne!(first_exit(guest()), Exit::Shutdown);

    let unlaunched = BareGuest::new(&host, &Plan { image_launched: false, ..Plan::SEV });
    assert_eq!(first_exit(unlaunched), Exit::Shutdown, "fetches are private whatever the C-bit says");

    let swapped = guest();
    let (mut a, mut b) = ([0; 4096], [0; 4096]);
    swapped.ram.read(IMAGE_AT, &mut a);
    swapped.ram.read(IMAGE_AT + PAGE_SIZE, &mut b);
    swapped.ram.write(IMAGE_AT, &b);
    swapped.ram.write(IMAGE_AT + PAGE_SIZE, &a);
    assert_eq!(first_exit(swapped), Exit::Shutdown, "moved ciphertext");

    let (one, other) = (guest(), guest());
    let mut image = vec![0; (STACK_AT - IMAGE_AT) as usize];
    one.ram.read(IMAGE_AT, &mut image);
    other.ram.write(IMAGE_AT, &image);
    assert_eq!(first_exit(other), Exit::Shutdown, "another guest's ciphertext");

    let mut flipped = guest();
    flipped.ram.write(IMAGE_AT + 17, &[0xa5]);
    assert_eq!(flipped.vcpu.run(&mut NoPorts).unwrap(), Exit::Shutdown);
    assert_eq!(flipped.vcpu.run(&mut NoPorts).unwrap(), Exit::Shutdown, "a dead vCPU stays dead");
}

#[test]
fn a_slot_over_the_same_memory_is_readable_only_with_the_key() {
    let host = host();
    let mut guest = BareGuest::new(&host, &Plan::SEV);
    guest.run(5).unwrap();
    let state = guest.vcpu.save().unwrap();

    // A mirror of it goes on where it stopped.
    let mut mirror = host.create_vm().unwrap();
    mirror.set_slot(SlotId(0), slot(&guest.ram)).unwrap();
    mirror.sev().unwrap().copy_from(&guest.vm.sev().unwrap().copy_source()).unwrap();
    let mut vcpu = mirror.create_vcpu(0).unwrap();
    vcpu.restore(&state).unwrap();
    run(vcpu.as_mut(), &guest.ram, 20).unwrap();
    let stats = guest.stats();
    assert!(stats.ticks >= 25 && stats.errors == 0, "{stats:?}");

    // A VM without its context, or with another, does not.
    for init in [false, true] {
        let mut stranger = host.create_vm().unwrap();
        stranger.set_slot(SlotId(0), slot(&guest.ram)).unwrap();
        if init {
            let sev = stranger.sev().unwrap();
            sev.init(false).unwrap();
            sev.launch_start(mirrorvm::sev::Policy(0), None).unwrap();
        }
        let mut vcpu = stranger.create_vcpu(0).unwrap();
        vcpu.restore(&state).unwrap();
        assert_eq!(vcpu.run(&mut NoPorts).unwrap(), Exit::Shutdown);
    }
}

#[test]
fn a_context_is_copied_before_there_are_vcpus() {
    let host = host();
    let guest = BareGuest::new(&host, &Plan::SEV);
    let mut mirror = host.create_vm().unwrap();
    let _vcpu = mirror.create_vcpu(0).unwrap();
    assert!(mirror.sev().unwrap().copy_from(&guest.vm.sev().unwrap().copy_source()).is_err());
}

#[test]
fn registers_of_an_es_guest_are_in_its_save_area_alone() {
    let host = host();
    let mut guest = BareGuest::new(&host, &Plan::ES);
    let area = |g: &BareGuest| {
        let mut bytes = [0; 4096];
        g.ram.read(AREA_AT, &mut bytes);
        bytes
    };
    let launched = area(&guest);
    guest.run(5).unwrap();
    assert_eq!(guest.stats().errors, 0);
    let stopped = area(&guest);
    assert_ne!(launched, stopped);
    for known in [entry(guest.cr3).rip, entry(guest.cr3).rsp, w::STACK_VA] {
        assert!(!stopped.windows(8).any(|w| w == known.to_le_bytes()), "a register in plain");
    }
    let state = guest.vcpu.save().unwrap();
    assert_eq!(state, br#"{"save_area":{}}"#);

    // What is in plain sight of the host cannot be put in its place.
    let plain = {
        let mut plain = BareGuest::new(&host, &Plan::SEV);
        plain.run(1).unwrap();
        plain.vcpu.save().unwrap()
    };
    let einval = |r: Result<(), HypervisorError>| matches!(r, Err(HypervisorError::Kernel { source, .. }) if source.raw_os_error() == Some(libc_einval()));
    assert!(einval(guest.vcpu.restore(&plain)));
    assert!(einval(guest.vcpu.enter_user_mode(&entry(guest.cr3))));

    // The area travels as memory; the vCPU goes on from it.
    guest.vcpu.restore(&state).unwrap();
    guest.run(5).unwrap();
    assert_eq!(guest.stats().errors, 0);

    // An area that was changed, or another guest's, holds no registers.
    let good = area(&guest);
    guest.ram.write(AREA_AT + 3, &[!good[3]]);
    let refused = Exit::Unexpected { what: "KVM_EXIT_FAIL_ENTRY" };
    assert_eq!(guest.vcpu.run(&mut NoPorts).unwrap(), refused);
    let mut other = BareGuest::new(&host, &Plan::ES);
    other.run(1).unwrap();
    guest.ram.write(AREA_AT, &area(&other));
    assert_eq!(guest.vcpu.run(&mut NoPorts).unwrap(), refused);
    guest.ram.write(AREA_AT, &good);
    guest.run(5).unwrap();
    assert_eq!(guest.stats().errors, 0);
}

#[test]
fn an_es_vcpu_cannot_be_entered_anew_once_it_was_measured() {
    let host = host();
    let mut guest = BareGuest::new(&host, &Plan::ES);
    assert!(guest.vcpu.enter_user_mode(&entry(guest.cr3)).is_err());
    guest.run(3).unwrap();
}

#[test]
fn states_that_are_none_are_refused_and_change_nothing() {
    let host = host();
    let mut guest = BareGuest::new(&host, &Plan::SEV);
    guest.run(5).unwrap();
    let good = guest.vcpu.save().unwrap();
    let text = String::from_utf8(good.clone()).unwrap();
    for bad in [
        String::new(),
        "{}".into(),
        "[]".into(),
        r#"{"save_area":{}}"#.into(),
        text.replace("workload", "helper"),
        text.replace("workload", "firmware"),
        text.replace("workload", "doom"),
        text.replace("\"rip\":4194304", "\"rip\":4194305"),
        text.replace("\"words\":[5", "\"words\":[99"),
        text.replace("\"tss\"", "\"more\""),
        text.replace("]}", ",0]}"),
        text.replace("0]}", "7]}"),
    ] {
        assert_ne!(bad, text);
        let refused = guest.vcpu.restore(bad.as_bytes());
        assert!(matches!(refused, Err(HypervisorError::BadState { .. })), "{bad}");
        assert_eq!(guest.vcpu.save().unwrap(), good);
    }
    guest.run(5).unwrap();
    assert_eq!(guest.stats().errors, 0);
}

#[test]
fn what_the_sweep_covers_is_ciphertext_too() {
    let mut guest = BareGuest::new(&host(), &Plan::SEV);
    guest.run(5).unwrap();
    guest.ram.write(MORE[1].0 + 5 * PAGE_SIZE, &[1; 16]);
    guest.run(20).unwrap();
    assert!(guest.stats().errors >= 1);
}

const fn libc_einval() -> i32 {
    22
}

#[test]
fn a_kicked_vcpu_comes_back_between_two_steps() {
    let mut guest = BareGuest::new(&host(), &Plan::SEV);
    let kicker = guest.vcpu.kicker();
    kicker.kick();
    assert_eq!(guest.vcpu.run(&mut NoPorts).unwrap(), Exit::Interrupted);
    guest.run(3).unwrap();
    let state = guest.vcpu.save().unwrap();
    kicker.kick();
    assert_eq!(guest.vcpu.run(&mut NoPorts).unwrap(), Exit::Interrupted);
    assert_eq!(guest.vcpu.save().unwrap(), state);
    let (done, theirs) = (Arc::new(std::sync::Barrier::new(2)), kicker);
    let other = Arc::clone(&done);
    let thread = std::thread::spawn(move || {
        theirs.kick();
        other.wait();
    });
    done.wait();
    assert_eq!(guest.vcpu.run(&mut NoPorts).unwrap(), Exit::Interrupted);
    thread.join().unwrap();
}
