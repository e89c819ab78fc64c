use std::sync::Arc;

use proptest::prelude::*;
use ring::digest;

use super::firmware::{Firmware, Span};
use super::*;
use crate::addr::PAGE_SIZE;
use crate::memory::Mapping;
use crate::sev::random::Random;
use crate::sev::{
    Context, CopyRefusal, FirmwareError, GuestOwner, GuestState, OwnerSession, PdhCert, Platform,
    PlatformCerts, Policy, SevError,
};

const LIMITS: AsidLimits = AsidLimits { es: 3, sev: 3 };
const PAGE: usize = PAGE_SIZE as usize;

fn memory() -> Arc<Mapping> {
    let memory = Mapping::memfd("t", 8 * PAGE_SIZE).unwrap();
    memory.write(0, &(0..8 * PAGE).map(|i| (i / 16) as u8).collect::<Vec<_>>());
    memory
}

fn platform() -> Arc<ModelPlatform> {
    ModelPlatform::seeded(1, LIMITS)
}

/// A guest that runs, of one page.
fn running(platform: &Arc<ModelPlatform>, memory: &Mapping, policy: u32) -> Arc<ModelContext> {
    let vm = platform.context();
    vm.init(policy & Policy::ES != 0).unwrap();
    vm.launch_start(Policy(policy), None).unwrap();
    vm.launch_update_data(memory, 0, PAGE_SIZE).unwrap();
    vm.launch_measure().unwrap();
    vm.launch_finish().unwrap();
    vm
}

fn certs(platform: &ModelPlatform) -> PlatformCerts {
    platform.pdh().unwrap().into()
}

fn errno<T>(result: Result<T, SevError>) -> Option<i32> {
    match result {
        Err(SevError::Kernel { source, .. }) => source.raw_os_error(),
        _ => None,
    }
}

fn code<T>(result: Result<T, SevError>) -> Option<FirmwareError> {
    result.err().and_then(|e| e.firmware())
}

fn refusal(result: Result<(), SevError>) -> Option<CopyRefusal> {
    match result {
        Err(SevError::Copy(refusal)) => Some(refusal),
        _ => None,
    }
}

fn plain(vm: &ModelContext, memory: &Mapping, offset: u64, len: usize) -> Vec<u8> {
    let mut to = vec![0; len];
    vm.memory_key().unwrap().read(memory, offset, &mut to);
    to
}

fn raw(memory: &Mapping, offset: u64, len: usize) -> Vec<u8> {
    let mut to = vec![0; len];
    memory.read(offset, &mut to);
    to
}

#[test]
fn an_attested_launch_with_a_secret() {
    let (platform, memory) = (platform(), memory());
    let content = raw(&memory, 0, 2 * PAGE);
    let policy = Policy(Policy::NODBG | Policy::NOKS);
    let mut owner = GuestOwner::seeded(&platform.pdh().unwrap(), policy, 2).unwrap();

    let vm = platform.context();
    vm.init(false).unwrap();
    assert!(vm.memory_key().is_none());
    let handle = vm.launch_start(policy, Some(owner.session())).unwrap();
    vm.launch_update_data(&memory, 0, PAGE_SIZE).unwrap();
    vm.launch_update_data(&memory, PAGE_SIZE, PAGE_SIZE).unwrap();
    assert_ne!(raw(&memory, 0, 2 * PAGE), content, "the host sees ciphertext");
    assert_eq!(plain(&vm, &memory, 0, 2 * PAGE), content);
    let measurement = vm.launch_measure().unwrap();
    assert_eq!(vm.guest_status().unwrap().state, GuestState::Secret);

    let mut expected = [0; 32];
    expected.copy_from_slice(digest::digest(&digest::SHA256, &content).as_ref());
    let status = platform.status().unwrap();
    let mut other = expected;
    other[31] ^= 1;
    assert!(owner.verify(&status, &other, &measurement).is_err());
    let mut launch = owner.verify(&status, &expected, &measurement).unwrap();
    assert!(launch.secret(&[1; 15]).is_err() && launch.secret(&[]).is_err());
    let (header, packet) = launch.secret(b"sixteen byte key").unwrap();
    for bit in [0, 7, packet.len() * 8 - 1] {
        let mut bad = packet.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let before = raw(&memory, 4 * PAGE_SIZE, PAGE);
        let refused = vm.launch_secret(&header, &bad, &memory, 4 * PAGE_SIZE);
        assert_eq!(code(refused), Some(FirmwareError::BadMeasurement));
        assert_eq!(raw(&memory, 4 * PAGE_SIZE, PAGE), before, "nothing was written");
    }
    vm.launch_secret(&header, &packet, &memory, 4 * PAGE_SIZE).unwrap();
    assert_eq!(plain(&vm, &memory, 4 * PAGE_SIZE, 16), b"sixteen byte key");
    vm.launch_finish().unwrap();
    let status = vm.guest_status().unwrap();
    assert_eq!((status.handle, status.policy, status.state), (handle, policy, GuestState::Running));
    let again = vm.launch_secret(&header, &packet, &memory, 4 * PAGE_SIZE);
    assert_eq!(code(again), Some(FirmwareError::InvalidGuestState));
    assert_eq!(code(vm.debug_decrypt(&memory, 0, &mut [0; 16])), Some(FirmwareError::PolicyFailure));
}

#[test]
fn a_session_for_another_policy_platform_or_key_starts_nothing() {
    let (platform, elsewhere) = (platform(), ModelPlatform::seeded(9, LIMITS));
    let owner = GuestOwner::seeded(&platform.pdh().unwrap(), Policy(1), 2).unwrap();
    let vm = platform.context();
    vm.init(false).unwrap();
    let start = |policy, session: &OwnerSession| code(vm.launch_start(policy, Some(session)));
    assert_eq!(start(Policy(0), owner.session()), Some(FirmwareError::BadMeasurement));
    let foreign = GuestOwner::seeded(&elsewhere.pdh().unwrap(), Policy(1), 3).unwrap();
    assert_eq!(start(Policy(1), foreign.session()), Some(FirmwareError::BadMeasurement));
    let mut no_cert = owner.session().clone();
    no_cert.dh_cert = PdhCert(vec![0; 2084]);
    assert_eq!(start(Policy(1), &no_cert), Some(FirmwareError::InvalidCertificate));
    // A policy that asks for a newer API than there is.
    let newer = code(vm.launch_start(Policy(2 << 16), None));
    assert_eq!(newer, Some(FirmwareError::PolicyFailure));
    assert_eq!(platform.status().unwrap().guests, 0);
    vm.launch_start(Policy(1), Some(owner.session())).unwrap();
}

#[test]
fn kvm_refuses_what_it_refuses() {
    let (platform, memory) = (platform(), memory());
    let vm = platform.context();
    assert_eq!(errno(vm.launch_start(Policy(0), None)), Some(libc::ENOTTY));
    assert_eq!(errno(vm.guest_status()), Some(libc::ENOTTY));
    vm.init(false).unwrap();
    assert_eq!(errno(vm.init(false)), Some(libc::EINVAL), "twice");
    assert_eq!(code(vm.guest_status()), Some(FirmwareError::InvalidGuest), "not started");
    let late = platform.context();
    late.note_vcpu();
    assert_eq!(errno(late.init(false)), Some(libc::EINVAL), "after a vCPU");

    assert_eq!(code(vm.launch_start(Policy(Policy::ES), None)), Some(FirmwareError::InvalidAsid));
    vm.launch_start(Policy(0), None).unwrap();
    assert_eq!(code(vm.launch_start(Policy(0), None)), Some(FirmwareError::AsidOwned));
    assert_eq!(platform.status().unwrap().guests, 1, "the second was forgotten again");

    let update = |offset, len| vm.launch_update_data(&memory, offset, len);
    assert_eq!(errno(update(0, 0)), Some(libc::EINVAL));
    assert_eq!(errno(update(u64::MAX, 16)), Some(libc::EINVAL), "wraps");
    assert_eq!(errno(update(8 * PAGE_SIZE, 16)), Some(libc::EFAULT));
    assert_eq!(code(update(8, 16)), Some(FirmwareError::InvalidAddress));
    assert_eq!(code(update(0, 8)), Some(FirmwareError::InvalidLength));
    assert_eq!(errno(vm.launch_update_vmsa()), Some(libc::ENOTTY), "no SEV-ES guest");
    vm.launch_measure().unwrap();
    vm.launch_finish().unwrap();

    vm.send_start(&certs(&platform)).unwrap();
    let send = |offset, len| vm.send_update_data(&memory, offset, len);
    assert_eq!(errno(send(0, PAGE_SIZE + 16)), Some(libc::EINVAL), "more than a page");
    assert_eq!(errno(send(PAGE_SIZE - 16, 32)), Some(libc::EINVAL), "across one");
    assert_eq!(code(send(8, 16)), Some(FirmwareError::InvalidAddress));
    send(PAGE_SIZE - 16, 16).unwrap();

    let snp = platform.context();
    snp.init(true).unwrap();
    snp.mark_snp();
    assert_eq!(errno(snp.launch_start(Policy(0), None)), Some(libc::EPERM));
}

#[test]
fn the_firmware_takes_16_kib_at_most() {
    let memory = Mapping::memfd("t", 8 * PAGE_SIZE).unwrap();
    let mut firmware = Firmware::new(Random::seeded(1), LIMITS);
    let handle = firmware.launch_start(Policy(0), None).unwrap();
    let asid = firmware.asids.take(false).unwrap();
    let span = |len| Span { memory: &memory, offset: 0, len };
    assert_eq!(firmware.launch_update_data(handle, span(16)), Err(FirmwareError::Inactive));
    firmware.activate(handle, asid).unwrap();
    firmware.launch_update_data(handle, span(8 * PAGE_SIZE)).unwrap();
    firmware.launch_measure(handle).unwrap();
    firmware.launch_finish(handle).unwrap();
    let target = firmware.pdh().clone();
    firmware.send_start(handle, &target).unwrap();
    assert!(firmware.send_update_data(handle, span(16 * 1024)).is_ok());
    let long = firmware.send_update_data(handle, span(16 * 1024 + 16));
    assert_eq!(long.err(), Some(FirmwareError::InvalidLength));
    assert_eq!(firmware.decommission(handle), Err(FirmwareError::Active));
    assert_eq!(firmware.guest_status(77).err(), Some(FirmwareError::InvalidGuest));
}

#[test]
fn copy_rules_error_by_error() {
    let (platform, memory) = (platform(), memory());
    let owner = running(&platform, &memory, 0);
    let copy = |to: &Arc<ModelContext>, from: &Arc<ModelContext>| refusal(to.copy_from(&from.copy_source()));
    let (mirror, plain_vm) = (platform.context(), platform.context());
    assert_eq!(copy(&mirror, &plain_vm), Some(CopyRefusal::SourceNotEncrypted));
    assert_eq!(copy(&owner, &owner), Some(CopyRefusal::Itself));
    assert_eq!(copy(&running(&platform, &memory, 0), &owner), Some(CopyRefusal::AlreadyEncrypted));
    let late = platform.context();
    late.note_vcpu();
    assert_eq!(copy(&late, &owner), Some(CopyRefusal::HasVcpus));
    assert_eq!(copy(&ModelPlatform::new().context(), &owner), Some(CopyRefusal::NotAVm));
    assert_eq!(copy(&mirror, &owner), None);
    assert_eq!(copy(&platform.context(), &mirror), Some(CopyRefusal::SourceIsMirror));
    assert_eq!(copy(&mirror, &owner), Some(CopyRefusal::AlreadyEncrypted));
    let snp = platform.context();
    snp.init(true).unwrap();
    snp.mark_snp();
    assert_eq!(copy(&platform.context(), &snp), Some(CopyRefusal::Snp));
}

#[test]
fn a_copy_in_progress_is_busy_for_both() {
    let (platform, memory) = (platform(), memory());
    let owner = running(&platform, &memory, 0);
    let mirror = platform.context();
    for held in [&owner, &mirror] {
        let turn = held.hold_for_copy().unwrap();
        assert_eq!(refusal(mirror.copy_from(&owner.copy_source())), Some(CopyRefusal::Busy));
        drop(turn);
    }
    mirror.copy_from(&owner.copy_source()).unwrap();
}

#[test]
fn a_mirror_sees_its_owners_memory_and_may_give_four_commands() {
    let (platform, memory) = (platform(), memory());
    let content = raw(&memory, 0, PAGE);
    let owner = running(&platform, &memory, 0);
    owner.register_region(&memory, 0, 4 * PAGE_SIZE).unwrap();
    let mirror = platform.context();
    mirror.copy_from(&owner.copy_source()).unwrap();
    assert!(mirror.is_mirror() && mirror.asid() == owner.asid());
    assert_eq!(plain(&mirror, &memory, 0, PAGE), content);
    assert_eq!(mirror.guest_status().unwrap(), owner.guest_status().unwrap());
    let mut part = [0; 21];
    mirror.debug_decrypt(&memory, 13, &mut part).unwrap();
    assert_eq!(part, content[13..34]);
    assert!(mirror.is_registered(&memory, PAGE_SIZE, 3 * PAGE_SIZE));
    assert!(!mirror.is_registered(&memory, PAGE_SIZE, 4 * PAGE_SIZE));

    let (header, packet) = (crate::sev::PacketHeader { flags: 0, iv: [0; 16], mac: [0; 32] }, [0; 16]);
    let session = owner.send_start(&certs(&platform)).unwrap();
    let pdh = platform.pdh().unwrap();
    let refused = [
        errno(mirror.init(false)),
        errno(mirror.register_region(&memory, 0, PAGE_SIZE)),
        errno(mirror.unregister_region(&memory, 0, PAGE_SIZE)),
        errno(mirror.launch_start(Policy(0), None)),
        errno(mirror.launch_update_data(&memory, 0, 16)),
        errno(mirror.launch_measure()),
        errno(mirror.launch_secret(&header, &packet, &memory, 0)),
        errno(mirror.launch_finish()),
        errno(mirror.send_start(&certs(&platform))),
        errno(mirror.send_update_data(&memory, 0, 16)),
        errno(mirror.send_finish()),
        errno(mirror.send_cancel()),
        errno(mirror.receive_start(Policy(0), &pdh, &session, None)),
        errno(mirror.receive_update_data(&header, &packet, &memory, 0)),
        errno(mirror.receive_finish()),
    ];
    assert_eq!(refused, [Some(libc::EINVAL); 15]);

    // The owner's handle is gone, its context is not.
    drop(owner);
    assert_eq!((platform.asids_in_use(), platform.status().unwrap().guests), (1, 1));
    assert_eq!(plain(&mirror, &memory, 0, PAGE), content);
    drop(mirror);
    assert_eq!((platform.asids_in_use(), platform.status().unwrap().guests), (0, 0));
}

#[test]
fn save_areas_are_encrypted_and_measured_once_by_owner_and_mirror() {
    let (platform, memory) = (platform(), memory());
    let content = raw(&memory, 0, 3 * PAGE);
    let policy = Policy(Policy::ES);
    let mut guest_owner = GuestOwner::seeded(&platform.pdh().unwrap(), policy, 4).unwrap();
    let owner = platform.context();
    owner.init(true).unwrap();
    owner.launch_start(policy, Some(guest_owner.session())).unwrap();
    owner.launch_update_data(&memory, 0, PAGE_SIZE).unwrap();
    let area = |page: u64| {
        let memory = Arc::clone(&memory);
        Box::new(move || vec![(Arc::clone(&memory), page * PAGE_SIZE)]) as SaveAreas
    };
    owner.set_save_areas(area(1));
    owner.launch_update_vmsa().unwrap();
    assert_eq!(errno(owner.launch_update_vmsa()), Some(libc::EINVAL), "once for a vCPU");
    let mirror = platform.context();
    mirror.copy_from(&owner.copy_source()).unwrap();
    assert!(mirror.is_es());
    mirror.set_save_areas(area(2));
    mirror.launch_update_vmsa().unwrap();
    assert_eq!(plain(&owner, &memory, 0, 3 * PAGE), content);
    let measurement = owner.launch_measure().unwrap();
    let mut digest = [0; 32];
    digest.copy_from_slice(digest::digest(&digest::SHA256, &content).as_ref());
    guest_owner.verify(&platform.status().unwrap(), &digest, &measurement).unwrap();

    // A vCPU that comes after the launch has no encrypted save area any more.
    owner.launch_finish().unwrap();
    let late = platform.context();
    late.copy_from(&owner.copy_source()).unwrap();
    late.set_save_areas(area(3));
    assert_eq!(code(late.launch_update_vmsa()), Some(FirmwareError::InvalidGuestState));
}

/// Sends page 0 of `from` to page 4, in `to`.
fn send(
    from: &ModelContext,
    to: &ModelContext,
    target: &ModelPlatform,
    origin: &ModelPlatform,
    share: Option<u32>,
    memory: &Mapping,
) {
    let policy = from.guest_status().unwrap().policy;
    let session = from.send_start(&certs(target)).unwrap();
    to.init(false).unwrap();
    to.receive_start(policy, &origin.pdh().unwrap(), &session, share).unwrap();
    let (header, packet) = from.send_update_data(memory, 0, PAGE_SIZE).unwrap();
    to.receive_update_data(&header, &packet, memory, 4 * PAGE_SIZE).unwrap();
    for bit in [0, 500] {
        let mut bad = packet.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let refused = to.receive_update_data(&header, &bad, memory, 5 * PAGE_SIZE);
        assert_eq!(code(refused), Some(FirmwareError::BadMeasurement));
    }
    let short = to.receive_update_data(&header, &packet[16..], memory, 5 * PAGE_SIZE);
    assert_eq!(code(short), Some(FirmwareError::BadMeasurement));
    from.send_finish().unwrap();
    to.receive_finish().unwrap();
    assert_eq!(from.guest_status().unwrap().state, GuestState::Sent);
    assert_eq!(to.guest_status().unwrap().state, GuestState::Running);
}

#[test]
fn a_guest_is_sent_to_another_platform() {
    let (here, there, memory) = (platform(), ModelPlatform::seeded(2, LIMITS), memory());
    let content = raw(&memory, 0, PAGE);
    let (guest, arrived) = (running(&here, &memory, Policy::SEV), there.context());
    send(&guest, &arrived, &there, &here, None, &memory);
    assert_eq!(plain(&arrived, &memory, 4 * PAGE_SIZE, PAGE), content);
    assert_ne!(plain(&guest, &memory, 4 * PAGE_SIZE, PAGE), content, "under another key");
    let again = guest.send_start(&certs(&there));
    assert_eq!(code(again), Some(FirmwareError::InvalidGuestState), "it runs elsewhere");
}

#[test]
fn a_fresh_context_receives_under_a_shared_key() {
    let (platform, memory) = (platform(), memory());
    let content = raw(&memory, 0, PAGE);
    // The guest whose key is shared is another than the one that is sent: that could not run meanwhile.
    let guest = running(&platform, &memory, 0);
    let helper_memory = self::memory();
    let (helper, received) = (running(&platform, &helper_memory, 0), platform.context());
    let share = guest.guest_status().unwrap().handle;
    send(&helper, &received, &platform, &platform, Some(share), &helper_memory);
    assert_ne!(received.asid(), guest.asid());
    assert_eq!(plain(&received, &memory, 0, PAGE), content, "it reads the guest's memory");
    assert_eq!(plain(&received, &helper_memory, 4 * PAGE_SIZE, PAGE), content);
    assert_eq!(guest.guest_status().unwrap().state, GuestState::Running);
}

#[test]
fn policies_bind_sending_and_sharing() {
    let (platform, there, memory) = (platform(), ModelPlatform::seeded(2, LIMITS), memory());
    let no_send = running(&platform, &memory, Policy::NOSEND);
    assert_eq!(code(no_send.send_start(&certs(&there))), Some(FirmwareError::PolicyFailure));
    let domain = running(&platform, &memory, Policy::DOMAIN);
    assert_eq!(code(domain.send_start(&certs(&there))), Some(FirmwareError::PolicyFailure));
    let nobody = PlatformCerts::from(PdhCert(vec![]));
    assert_eq!(code(domain.send_start(&nobody)), Some(FirmwareError::PolicyFailure));
    domain.send_start(&certs(&platform)).unwrap();
    drop((no_send, domain));

    for policy in [0, Policy::NOKS] {
        let sender = running(&platform, &memory, policy);
        assert_eq!(code(sender.send_start(&nobody)), Some(FirmwareError::InvalidCertificate));
        let session = sender.send_start(&certs(&platform)).unwrap();
        let handle = sender.guest_status().unwrap().handle;
        let to = platform.context();
        to.init(false).unwrap();
        let pdh = platform.pdh().unwrap();
        let receive = |p, share| code(to.receive_start(Policy(p), &pdh, &session, Some(share)));
        // The policy is under the session's MAC, so a receiver cannot change it.
        assert_eq!(receive(policy ^ Policy::NODBG, handle), Some(FirmwareError::BadMeasurement));
        assert_eq!(receive(policy, 999), Some(FirmwareError::InvalidGuest));
        let expected = (policy == Policy::NOKS).then_some(FirmwareError::PolicyFailure);
        assert_eq!(receive(policy, handle), expected);
        sender.send_cancel().unwrap();
        assert_eq!(sender.guest_status().unwrap().state, GuestState::Running);
        sender.send_start(&certs(&there)).unwrap();
    }
}

#[test]
fn sharing_asks_for_equal_policies() {
    let (platform, memory) = (platform(), memory());
    let (sender, other) = (running(&platform, &memory, 0), running(&platform, &memory, Policy::NODBG));
    let session = sender.send_start(&certs(&platform)).unwrap();
    let to = platform.context();
    to.init(false).unwrap();
    let share = other.guest_status().unwrap().handle;
    let refused = to.receive_start(Policy(0), &platform.pdh().unwrap(), &session, Some(share));
    assert_eq!(code(refused), Some(FirmwareError::PolicyFailure));
}

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
