//! Mirror creation up to "helper ready", against the KVM calls that it cannot do without.

use std::sync::Arc;
use std::time::Instant;

use mirrorvm::address_space::SlotBacking;
use mirrorvm::hypervisor::Hypervisor as _;
use mirrorvm::hypervisor::kvm::KvmHost;
use mirrorvm::hypervisor::{Slot, SlotId, UserEntry};
use mirrorvm::memory::{GuestRam, Mapping, View};

use super::setting::{mirror, mirror_plan, ram};
use super::{BenchArgs, BenchError, Row, Target};

pub(super) fn measure(args: &BenchArgs) -> Result<Vec<Row>, BenchError> {
    let kvm = KvmHost::open()?;
    let ram = ram(args.bytes())?;
    let (mut ours, mut raw, mut ratio) = (Vec::new(), Vec::new(), Vec::new());
    // Each takes milliseconds: many runs cost little and say more.
    for _ in 0..args.runs() * 4 {
        let bare = raw_calls(&kvm, &ram)?;
        let begun = Instant::now();
        let made = mirror(&kvm, &ram)?;
        let whole = begun.elapsed().as_secs_f64();
        drop(made);
        ours.push(whole * 1e3);
        raw.push(bare * 1e3);
        ratio.push(whole / bare);
    }
    Ok(vec![
        Row::new("mirror: plan, load, create, helper ready", "ms", ours).promised(Target::AtMost(10.0)),
        Row::new("raw: KVM_CREATE_VM, the same slots, vCPU, registers", "ms", raw),
        Row::new("mirror / raw", "ratio", ratio).promised(Target::AtMost(3.0)),
    ])
}

/// The same VM without plan, image, mailbox, threads or helper.
fn raw_calls(kvm: &KvmHost, ram: &GuestRam) -> Result<f64, BenchError> {
    let plan = mirror_plan(kvm, ram)?;
    let mailbox = Mapping::anonymous(plan.mailbox.bytes())?;
    let begun = Instant::now();
    let mut vm = kvm.create_vm()?;
    for (slot, id) in plan.slots.iter().zip(0..) {
        let (memory, offset) = match slot.backing {
            SlotBacking::Mailbox => (&mailbox, 0),
            SlotBacking::Ram { ram_addr } => ram.locate(ram_addr, slot.len)?,
            SlotBacking::Private { .. } => return Err("the scenario's strategy has no private memory".into()),
        };
        let memory = Arc::clone(memory);
        vm.set_slot(
            SlotId(id),
            Slot {
                gpa: slot.gpa.get(),
                len: slot.len,
                memory,
                offset,
                view: View::Helper,
                dirty_log: false,
                read_only: false,
            },
        )?;
    }
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.enter_user_mode(&UserEntry { rip: 0, rsp: 0, rdi: 0, cr3: plan.tables.root().get(), tss: 0 })?;
    let seconds = begun.elapsed().as_secs_f64();
    drop((vcpu, vm));
    Ok(seconds)
}
