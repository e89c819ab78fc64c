//! KVM's rules and the firmware's over whole launches.

use std::sync::Arc;

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

mod lives;
mod sending;

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
fn a_report_says_what_was_launched_for_whoever_asks_and_for_this_nonce() {
    use mirrorvm_abi::evidence::{PekCertificate, Release, Report};
    let (platform, memory) = (platform(), memory());
    let launched = raw(&memory, 0, PAGE);
    let vm = platform.context();
    vm.init(false).unwrap();
    vm.launch_start(Policy(Policy::NODBG), None).unwrap();
    vm.launch_update_data(&memory, 0, PAGE_SIZE).unwrap();
    assert_eq!(code(vm.attestation(&[1; 16])), Some(FirmwareError::InvalidGuestState), "not measured");
    vm.launch_measure().unwrap();
    let before = vm.attestation(&[1; 16]).unwrap();
    vm.launch_finish().unwrap();
    let report = vm.attestation(&[2; 16]).unwrap();
    assert_ne!(before, report);
    let read = Report::decode(&report).unwrap();
    assert_eq!((read.mnonce, read.policy), ([2; 16], Policy::NODBG));
    assert_eq!(read.launch_digest, digest::digest(&digest::SHA256, &launched).as_ref());
    let endorsed = platform.endorsement().unwrap();
    assert!(PekCertificate::decode(&endorsed.pek).is_some());
    let release = Release::demanded(&[endorsed.chip], &[read.launch_digest]).unwrap();
    let evidence: [u8; 2292] = [&report[..], &endorsed.pek[..]].concat().try_into().unwrap();
    let judged = |nonce: [u8; 16]| mirrorvm_helper::evidence::check(&release, &evidence, &nonce, 1);
    assert_eq!((judged([2; 16]).is_ok(), judged([1; 16]).is_ok()), (true, false));
    assert_ne!(ModelPlatform::of_another_chip().endorsement().unwrap().chip, endorsed.chip);
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
    // A mirror is no key sharing for the firmware.
    assert_eq!(copy(&platform.context(), &running(&platform, &memory, Policy::NOKS)), None);
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
        errno(mirror.attestation(&[1; 16])),
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
    assert_eq!(refused, [Some(libc::EINVAL); 16]);

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
    // The hook may ask the context, if it does not keep it.
    let (weak, areas) = (Arc::downgrade(&owner), area(1));
    owner.set_save_areas(Box::new(move || {
        assert!(weak.upgrade().unwrap().is_es());
        areas()
    }));
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
