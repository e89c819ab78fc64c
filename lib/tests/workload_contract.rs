//! The workload's contract with its host, on the software machine and, where there is one, on KVM: both must
//! agree.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

#[path = "support/bare_guest.rs"]
mod bare_guest;
mod support;

use mirrorvm::addr::PAGE_SIZE;
use mirrorvm::hypervisor::emulated::EmulatedHost;
use mirrorvm::hypervisor::{Exit, Hypervisor, NoPorts, SlotId};
use mirrorvm::memory::Mapping;
use mirrorvm_workload as w;

use bare_guest::{Answers, BareGuest, DECLARATION_PAGE, FREE_AT, IMAGE_AT, MORE, Plan, firmware_entry};

fn on_both(test: impl Fn(&dyn Hypervisor)) {
    test(&EmulatedHost::without_sev());
    if let Some(kvm) = support::kvm() {
        test(&kvm);
    }
}

fn words(ram: &Mapping, at: u64, count: usize) -> Vec<u64> {
    let mut bytes = vec![0; count * 8];
    ram.read(at, &mut bytes);
    bytes.as_chunks().0.iter().map(|w| u64::from_le_bytes(*w)).collect()
}

fn declaration(ram: &Mapping) -> Vec<u64> {
    words(ram, bare_guest::SHARED_AT + w::DECLARATION_AT as u64, 1 + 3 * w::DECLARATION_MAX)
}

#[test]
fn a_guest_works_and_counts_no_error() {
    on_both(|host| {
        let mut guest = BareGuest::new(host, &Plan::PLAIN);
        guest.run(50).unwrap();
        let stats = guest.stats();
        assert_eq!((stats.working, stats.errors, stats.filled), (1, 0, 3), "{}", host.name());
        assert!((190..=200).contains(&stats.pages), "four pages a tick: {stats:?}");
    });
}

#[test]
fn both_machines_leave_the_same_memory() {
    let Some(kvm) = support::kvm() else { return };
    let run = |host: &dyn Hypervisor| {
        let mut guest = BareGuest::new(host, &Plan::PLAIN);
        guest.run(33).unwrap();
        // Stacks are the bare-metal program's own affair.
        let mut free = vec![0; (bare_guest::RAM_BYTES - FREE_AT) as usize];
        guest.ram.read(FREE_AT, &mut free);
        let mut shared = vec![0; (IMAGE_AT - bare_guest::SHARED_AT) as usize];
        guest.ram.read(bare_guest::SHARED_AT, &mut shared);
        (free, shared, guest.stats())
    };
    let (native, real) = (run(&EmulatedHost::without_sev()), run(&kvm));
    assert_eq!(native.2, real.2);
    assert!(native == real);
}

#[test]
fn the_firmware_declares_and_then_asks_what_to_write() {
    on_both(|host| {
        for (count, tuples) in [
            (0u64, 0),
            (2, 2),
            (w::DECLARATION_MAX as u64, w::DECLARATION_MAX),
            (u64::MAX, w::DECLARATION_MAX),
        ] {
            let content: Vec<u64> = [count].into_iter().chain((1..).map(|i| i * 0x1111)).take(512).collect();
            let mut guest = BareGuest::with(host, &Plan::PLAIN, |ram| {
                let bytes: Vec<u8> = content.iter().flat_map(|w| w.to_le_bytes()).collect();
                ram.write(DECLARATION_PAGE, &bytes);
            })
            .unwrap();
            guest.vcpu.enter_supervisor_mode(&firmware_entry(guest.cr3)).unwrap();
            let mut ports = Answers::always(0);
            for _ in 0..3 {
                let exit = guest.vcpu.run(&mut ports).unwrap();
                assert_eq!(exit, Exit::PortRead { port: w::PORT_FIRMWARE }, "{}", host.name());
            }
            let copied = declaration(&guest.ram);
            assert_eq!(copied[..1 + 3 * tuples], content[..1 + 3 * tuples]);
            assert!(copied[1 + 3 * tuples..].iter().all(|w| *w == 0), "bounded");
        }
    });
}

#[test]
fn the_firmware_writes_the_msr_as_it_is_told() {
    // Without an MSR filter KVM keeps the write to itself; that path is the driver's to test.
    let host = EmulatedHost::without_sev();
    let mut guest = BareGuest::new(&host, &Plan::PLAIN);
    guest.vcpu.enter_supervisor_mode(&firmware_entry(guest.cr3)).unwrap();
    let mut ports = Answers { tick: 0, firmware: [1, w::FIRMWARE_AGAIN, 0].into() };
    let mut writes = Vec::new();
    for turn in 0..8 {
        match guest.vcpu.run(&mut ports).unwrap() {
            Exit::MsrWrite { msr: w::MSR_KVM_MIGRATION_CONTROL, value } => writes.push(value),
            Exit::PortRead { port: w::PORT_FIRMWARE } => {}
            other => panic!("{other:?}"),
        }
        // It can be saved between any two exits, and goes on.
        let state = guest.vcpu.save().unwrap();
        guest.vcpu.restore(&state).unwrap_or_else(|e| panic!("turn {turn}: {e}"));
    }
    assert_eq!(writes, [1, 0]);
}

#[test]
fn a_piece_is_left_alone_once_it_is_unplugged_and_verified_when_it_is_back() {
    on_both(|host| {
        let mut guest = BareGuest::new(host, &Plan::PLAIN);
        guest.run(5).unwrap();
        assert_eq!(guest.shared_word(w::IN_USE_AT), 3);
        guest.set_shared_word(w::PLUGGED_AT, 1);
        guest.run(2).unwrap();
        assert_eq!(guest.shared_word(w::IN_USE_AT), 1, "{}", host.name());
        // Whatever happens to it now is not the guest's affair.
        let damaged = MORE[1].0;
        let mut page = [0; 4096];
        guest.ram.read(damaged, &mut page);
        guest.ram.write(damaged, &[0; 4096]);
        guest.run(40).unwrap();
        assert_eq!(guest.stats().errors, 0);
        guest.ram.write(damaged, &page);
        guest.set_shared_word(w::PLUGGED_AT, 3);
        guest.run(40).unwrap();
        assert_eq!((guest.shared_word(w::IN_USE_AT), guest.stats().errors), (3, 0));
        // In use and damaged: noticed.
        guest.ram.write(damaged, &[0; 4096]);
        guest.run(40).unwrap();
        assert!(guest.stats().errors > 0, "{}", host.name());
    });
}

#[test]
fn a_piece_that_was_not_plugged_at_the_start_is_neither_filled_nor_verified() {
    on_both(|host| {
        let mut guest = BareGuest::new(host, &Plan { plugged: 1, ..Plan::PLAIN });
        guest.run(3).unwrap();
        let empty = words(&guest.ram, MORE[1].0, (MORE[1].1 / 8) as usize);
        assert!(empty.iter().all(|w| *w == 0));
        guest.set_shared_word(w::PLUGGED_AT, 3);
        guest.run(40).unwrap();
        assert_eq!((guest.shared_word(w::IN_USE_AT), guest.stats().errors), (3, 0), "{}", host.name());
        assert_eq!(guest.stats().filled, 1);
    });
}

#[test]
fn a_boot_page_that_makes_no_sense_switches_the_guest_off() {
    on_both(|host| {
        for (field, value) in
            [(0, 0), (0, 17), (0, u64::MAX), (1, 1 << 60), (2, 0), (4, 1 << 40), (7, u64::MAX)]
        {
            let mut guest = BareGuest::with(host, &Plan::PLAIN, |ram| {
                ram.write(field * 8, &u64::to_le_bytes(value));
            })
            .unwrap();
            let off = Exit::PortWrite { port: w::PORT_POWER_OFF, value: 0 };
            assert_eq!(guest.vcpu.run(&mut NoPorts).unwrap(), off, "{}: field {field}", host.name());
        }
    });
}

#[test]
fn memory_that_is_taken_away_ends_the_guest_on_both_machines() {
    on_both(|host| {
        let mut guest = BareGuest::new(host, &Plan::PLAIN);
        guest.run(3).unwrap();
        guest.vm.remove_slot(SlotId(0)).unwrap();
        let exit = guest.run(3).unwrap_err();
        assert!(
            matches!(exit, Exit::Shutdown | Exit::Mmio { .. } | Exit::Unexpected { .. }),
            "{}: {exit:?}",
            host.name()
        );
        assert!(guest.vm.remove_slot(SlotId(0)).is_err());
    });
}

#[test]
fn writes_to_a_read_only_slot_leave_to_the_host_on_both_machines() {
    on_both(|host| {
        let (ram, cr3) = bare_guest::load(host, &Plan::PLAIN);
        let mut vm = host.create_vm().unwrap();
        // The statistics pages cannot be written.
        let at = bare_guest::SHARED_AT;
        let part = |gpa: u64, len, read_only| {
            let mut slot = bare_guest::slot(&ram);
            (slot.gpa, slot.offset, slot.len, slot.read_only) = (gpa, gpa, len, read_only);
            slot
        };
        vm.set_slot(SlotId(0), part(0, at, false)).unwrap();
        vm.set_slot(SlotId(1), part(at, PAGE_SIZE, true)).unwrap();
        let rest = at + PAGE_SIZE;
        vm.set_slot(SlotId(2), part(rest, bare_guest::RAM_BYTES - rest, false)).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.enter_user_mode(&bare_guest::entry(cr3)).unwrap();
        // Every write before the statistics goes to later pages.
        let exit = loop {
            match vcpu.run(&mut Answers::always(1)).unwrap() {
                Exit::PortRead { .. } | Exit::PortWrite { .. } => {}
                other => break other,
            }
        };
        match exit {
            Exit::Mmio { gpa, write: true } => assert!((at..rest).contains(&gpa), "{gpa:#x}"),
            other => panic!("{}: {other:?}", host.name()),
        }
    });
}

#[test]
fn slots_are_refused_alike_on_both_machines() {
    on_both(|host| {
        let memory = Mapping::memfd("m", 1 << 20).unwrap();
        let at = |gpa, len, offset| {
            let mut slot = bare_guest::slot(&memory);
            (slot.gpa, slot.len, slot.offset) = (gpa, len, offset);
            slot
        };
        let mut vm = host.create_vm().unwrap();
        vm.set_slot(SlotId(0), at(0x10000, 0x4000, 0)).unwrap();
        for (id, slot) in [
            (1, at(0x13000, 0x2000, 0x8000)),
            (1, at(0xf000, 0x2000, 0x8000)),
            (1, at(0, 1 << 20, 0)),
            (1, at(0x20001, 0x1000, 0)),
            (1, at(0x20000, 0x1001, 0)),
            (1, at(0x20000, 0x1000, 0x800)),
            (1, at(0x20000, 0, 0)),
            (1, at(0x20000, 0x2000, (1 << 20) - 0x1000)),
            (1, at(0x20000, 0x1000, u64::MAX - 0xfff)),
            (0, at(0x20000, 0x4000, 0)),
            (0, at(0x10000, 0x4000, 0x1000)),
            (40_000, at(0x20000, 0x1000, 0)),
        ] {
            let what = format!("{}: slot {id} {:#x}+{:#x}", host.name(), slot.gpa, slot.len);
            assert!(vm.set_slot(SlotId(id), slot).is_err(), "{what}");
        }
        vm.set_slot(SlotId(1), at(0x14000, 0x1000, 0)).unwrap();
        vm.remove_slot(SlotId(0)).unwrap();
        vm.set_slot(SlotId(2), at(0x10000, 0x4000, 0x8000)).unwrap();
        assert!(vm.take_dirty_log(SlotId(2)).is_err(), "not logged");
        assert!(vm.take_dirty_log(SlotId(7)).is_err(), "not there");
    });
}
