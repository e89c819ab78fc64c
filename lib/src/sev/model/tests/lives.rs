//! Many lives of contexts: what is left at the end.

use proptest::prelude::*;

use super::*;

#[test]
fn asids_run_out_and_come_back() {
    let (platform, memory) = (platform(), memory());
    let all: Vec<_> = (0..LIMITS.sev).map(|_| running(&platform, &memory, 0)).collect();
    assert_eq!(errno(platform.context().init(false)), Some(libc::EBUSY));
    platform.context().init(true).unwrap();
    drop(all);
    for _ in 0..3 * LIMITS.sev {
        running(&platform, &memory, 0);
    }
    assert_eq!((platform.asids_in_use(), platform.status().unwrap().guests), (0, 0));
}

#[test]
fn copies_and_ends_from_many_threads_leak_nothing() {
    const TURNS: usize = 2000;
    let platform = ModelPlatform::seeded(1, AsidLimits { es: 0, sev: 4 });
    let memory = memory();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..TURNS / 3 {
                    let owner = platform.context();
                    owner.init(false).unwrap();
                    owner.launch_start(Policy(0), None).unwrap();
                    owner.launch_update_data(&memory, 0, 16).unwrap();
                    let source = owner.copy_source();
                    let mirrors = [platform.context(), platform.context()];
                    std::thread::scope(|copies| {
                        for mirror in &mirrors {
                            copies.spawn(|| match refusal(mirror.copy_from(&source)) {
                                None => assert!(mirror.is_mirror()),
                                Some(refusal) => assert_eq!(refusal, CopyRefusal::Busy),
                            });
                        }
                        copies.spawn(move || drop(owner));
                    });
                }
            });
        }
    });
    assert_eq!((platform.asids_in_use(), platform.status().unwrap().guests), (0, 0));
}

/// One thing done to a handful of VMs.
#[derive(Clone, Copy, Debug)]
enum Act {
    Create,
    Init(usize, bool),
    Start(usize),
    Copy(usize, usize),
    End(usize),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        Just(Act::Create),
        (0usize..6, any::<bool>()).prop_map(|(vm, es)| Act::Init(vm, es)),
        (0usize..6).prop_map(Act::Start),
        (0usize..6, 0usize..6).prop_map(|(to, from)| Act::Copy(to, from)),
        (0usize..6).prop_map(Act::End),
    ]
}

proptest! {
    #[test]
    fn whatever_is_copied_and_ended_the_asids_in_use_are_those_of_living_owners(
        acts in prop::collection::vec(act(), 0..80)
    ) {
        let platform = platform();
        let mut vms: Vec<Arc<ModelContext>> = Vec::new();
        for act in acts {
            let at = |i: usize| (!vms.is_empty()).then(|| Arc::clone(&vms[i % vms.len()]));
            match act {
                Act::Create if vms.len() < 6 => vms.push(platform.context()),
                Act::Init(i, es) => drop(at(i).map(|vm| vm.init(es))),
                Act::Start(i) => drop(at(i).map(|vm| {
                    vm.launch_start(Policy(if vm.is_es() { Policy::ES } else { 0 }), None)
                })),
                Act::Copy(i, j) => drop(at(i).zip(at(j)).map(|(to, from)| to.copy_from(&from.copy_source()))),
                Act::End(i) if !vms.is_empty() => drop(vms.swap_remove(i % vms.len())),
                _ => {}
            }
            // Mirrors have their owner's ASID, so the living contexts' ASIDs are those in use.
            let living: std::collections::BTreeSet<u32> = vms.iter().filter_map(|vm| vm.asid()).collect();
            prop_assert_eq!(platform.asids_in_use(), living.len());
            let owners = vms.iter().filter(|vm| vm.asid().is_some() && !vm.is_mirror()).count();
            prop_assert!(owners <= living.len(), "no two owners have one ASID");
        }
        vms.clear();
        prop_assert_eq!((platform.asids_in_use(), platform.status().unwrap().guests), (0, 0));
    }

    /// Whatever commands a VM is given: the state it says it is in is that of the table, and nothing panics.
    #[test]
    fn a_vm_stays_in_the_table(commands in prop::collection::vec(0u8..11, 0..40)) {
        let (platform, memory) = (platform(), memory());
        let vm = platform.context();
        vm.init(false).unwrap();
        vm.launch_start(Policy(0), None).unwrap();
        let (mut state, pdh) = (State::LaunchUpdate, platform.pdh().unwrap());
        let header = crate::sev::PacketHeader { flags: 0, iv: [0; 16], mac: [0; 32] };
        for command in commands {
            let (command, result) = match command {
                0 => (Command::LaunchUpdateData, vm.launch_update_data(&memory, 0, 16)),
                1 => (Command::LaunchMeasure, vm.launch_measure().map(drop)),
                2 => (Command::LaunchSecret, vm.launch_secret(&header, &[0; 16], &memory, 0)),
                3 => (Command::LaunchFinish, vm.launch_finish()),
                4 => (Command::SendStart, vm.send_start(&pdh.clone().into()).map(drop)),
                5 => (Command::SendUpdateData, vm.send_update_data(&memory, 0, 16).map(drop)),
                6 => (Command::SendFinish, vm.send_finish()),
                7 => (Command::SendCancel, vm.send_cancel()),
                8 => (Command::ReceiveUpdateData, vm.receive_update_data(&header, &[0; 16], &memory, 0)),
                9 => (Command::ReceiveFinish, vm.receive_finish()),
                _ => (Command::DbgDecrypt, vm.debug_decrypt(&memory, 0, &mut [0; 16])),
            };
            match step(state, command) {
                // The packet is a forgery.
                Ok(_) if command == Command::LaunchSecret => {
                    prop_assert_eq!(code(result), Some(FirmwareError::BadMeasurement));
                }
                Ok(next) => {
                    prop_assert!(result.is_ok(), "{:?} in {:?}: {:?}", command, state, result);
                    state = next;
                }
                Err(refused) => prop_assert_eq!(code(result), Some(refused)),
            }
            prop_assert_eq!(vm.guest_status().unwrap().state, state.shown());
        }
    }
}
