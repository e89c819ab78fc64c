//! Exits of KVM, seen by a few instructions of their own at CPL 0. They hold on every kind of KVM: with
//! hardware virtualization, and where the kernel interprets such code.
#![allow(clippy::unwrap_used, reason = "a test: a panic is its way to fail")]

#[path = "support/bare_guest.rs"]
mod bare_guest;
mod support;

use mirrorvm::hypervisor::{Exit, Hypervisor, Ports};
use mirrorvm_workload as w;

use bare_guest::{BareGuest, Plan};
use support::kvm;

/// `mov al, n; out 0xe9, al` three times, for 1, 2 and 3; each by a port access that leaves to the host; then
/// a halt.
const THREE_DOORBELLS: &[u8] = &[0xb0, 1, 0xe6, 0xe9, 0xb0, 2, 0xe6, 0xe9, 0xb0, 3, 0xe6, 0xe9, 0xf4];

/// `in al, 0xea; out 0xe9, al; hlt`
const ECHO: &[u8] = &[0xe4, 0xea, 0xe6, 0xe9, 0xf4];

/// `mov ecx, MSR_KVM_MIGRATION_CONTROL; rdmsr; out 0xe9, eax; mov eax, edx; out 0xe9, eax; hlt`
const READ_MSR: &[u8] = &[0xb9, 0x08, 0x4d, 0x56, 0x4b, 0x0f, 0x32, 0xe7, 0xe9, 0x89, 0xd0, 0xe7, 0xe9, 0xf4];

/// `mov ecx, MSR_KVM_MIGRATION_CONTROL; xor edx, edx; mov eax, 2; wrmsr; hlt`
const WRITE_2: &[u8] = &[0xb9, 0x08, 0x4d, 0x56, 0x4b, 0x31, 0xd2, 0xb8, 2, 0, 0, 0, 0x0f, 0x30, 0xf4];

/// Answers with what the test says.
struct Says {
    port: u32,
    msr: Option<u64>,
    takes: bool,
    asked: Vec<u32>,
}

const fn nothing() -> Says {
    Says { port: 0, msr: None, takes: true, asked: Vec::new() }
}

impl Ports for Says {
    fn read(&mut self, _: u16) -> u32 {
        self.port
    }

    fn read_msr(&mut self, msr: u32) -> Option<u64> {
        self.asked.push(msr);
        self.msr
    }

    fn takes_msr(&self, _: u32, _: u64) -> bool {
        self.takes
    }
}

fn guest(host: &dyn Hypervisor, code: &[u8]) -> BareGuest {
    let mut guest = BareGuest::with(host, &Plan::PLAIN, |ram| ram.write(bare_guest::IMAGE_AT, code)).unwrap();
    guest.vcpu.enter_supervisor_mode(&bare_guest::entry(guest.cr3)).unwrap();
    guest
}

const fn bell(value: u32) -> Exit {
    Exit::PortWrite { port: 0xe9, value }
}

#[test]
fn a_state_saved_at_a_doorbell_neither_repeats_nor_loses_one() {
    let Some(kvm) = kvm() else { return };
    let mut from = guest(&kvm, THREE_DOORBELLS);
    for n in 1..=3 {
        assert_eq!(from.vcpu.run(&mut nothing()).unwrap(), bell(n), "after {} moves", n - 1);
        // Saved twice: saving changes nothing.
        let (state, again) = (from.vcpu.save().unwrap(), from.vcpu.save().unwrap());
        let mut to = guest(&kvm, THREE_DOORBELLS);
        to.vcpu.restore(&state).unwrap();
        assert_eq!(without_time(&state), without_time(&again), "saving changed the state");
        from = to;
    }
    assert_eq!(from.vcpu.run(&mut nothing()).unwrap(), Exit::Halt);
}

/// A saved state but for the time-stamp counter (MSR 0x10), which never stands still.
fn without_time(state: &[u8]) -> serde_json::Value {
    let mut value: serde_json::Value = serde_json::from_slice(state).unwrap();
    value["msrs"].as_array_mut().unwrap().retain(|msr| msr[0] != 0x10);
    value
}

#[test]
fn what_a_port_answered_is_in_the_state_that_is_saved_right_after() {
    let Some(kvm) = kvm() else { return };
    let mut from = guest(&kvm, ECHO);
    let mut says = Says { port: 0x5a, ..nothing() };
    assert_eq!(from.vcpu.run(&mut says).unwrap(), Exit::PortRead { port: 0xea });
    let state = from.vcpu.save().unwrap();
    let mut to = guest(&kvm, ECHO);
    to.vcpu.restore(&state).unwrap();
    assert_eq!(to.vcpu.run(&mut nothing()).unwrap(), bell(0x5a));
    // A state that is set over an exit that is half done is not changed by what completes later.
    let mut over = guest(&kvm, ECHO);
    assert_eq!(over.vcpu.run(&mut Says { port: 0x77, ..nothing() }).unwrap(), Exit::PortRead { port: 0xea });
    over.vcpu.restore(&state).unwrap();
    assert_eq!(over.vcpu.run(&mut nothing()).unwrap(), bell(0x5a));
    assert_eq!(over.vcpu.run(&mut nothing()).unwrap(), Exit::Halt);
}

#[test]
fn a_guest_that_reads_the_migration_control_msr_is_answered() {
    let Some(kvm) = kvm() else { return };
    let msr = w::MSR_KVM_MIGRATION_CONTROL;
    let mut guest = guest(&kvm, READ_MSR);
    let mut says = Says { msr: Some(0x1_2345_6789), ..nothing() };
    assert_eq!(guest.vcpu.run(&mut says).unwrap(), Exit::MsrRead { msr });
    assert_eq!(says.asked, [msr]);
    assert_eq!(guest.vcpu.run(&mut nothing()).unwrap(), bell(0x2345_6789));
    assert_eq!(guest.vcpu.run(&mut nothing()).unwrap(), bell(1));
    assert_eq!(guest.vcpu.run(&mut nothing()).unwrap(), Exit::Halt);
}

#[test]
fn an_msr_access_that_is_refused_is_a_fault_of_the_guest_and_its_last_exit_is_told() {
    let Some(kvm) = kvm() else { return };
    let msr = w::MSR_KVM_MIGRATION_CONTROL;
    for (code, mut says) in [(READ_MSR, nothing()), (WRITE_2, Says { takes: false, ..nothing() })] {
        let mut guest = guest(&kvm, code);
        assert_eq!(guest.vcpu.last_exit(), None);
        assert_eq!(guest.vcpu.run(&mut says).unwrap(), Exit::MsrRefused { msr });
        // #GP, and no table of handlers: a triple fault.
        assert_eq!(guest.vcpu.run(&mut nothing()).unwrap(), Exit::Shutdown);
        let last = guest.vcpu.last_exit().unwrap();
        assert_eq!((last.reason, last.code, last.exits), ("KVM_EXIT_SHUTDOWN", 0, 2));
        assert_eq!(last.before, [Some(Exit::MsrRefused { msr }), None, None, None]);
        assert!(last.stood.is_some());
    }
    // Where it stood, where the processor does not lose it: at the halt's next instruction, in the image.
    let mut halts = guest(&kvm, THREE_DOORBELLS);
    for n in 1..=3 {
        assert_eq!(halts.vcpu.run(&mut nothing()).unwrap(), bell(n));
    }
    assert_eq!(halts.vcpu.run(&mut nothing()).unwrap(), Exit::Halt);
    let last = halts.vcpu.last_exit().unwrap();
    assert_eq!((last.reason, last.exits), ("KVM_EXIT_HLT", 4));
    assert_eq!(last.before, [Some(bell(3)), Some(bell(2)), Some(bell(1)), None]);
    let stood = last.stood.unwrap();
    assert_eq!(stood.rip, w::IMAGE_VA + THREE_DOORBELLS.len() as u64);
    assert_eq!((stood.cr3, stood.cs & 3), (halts.cr3, 0));
}
