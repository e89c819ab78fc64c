//! What reaches the kernel, compared byte by byte with a recorder in its place.

mod recorder;

use std::sync::Arc;

use recorder::{Answer, Recorder, Seen, Shared};

use super::context::{KernelContext, VmKind};
use super::ioctls::{Ioctls, Request};
use super::platform::KernelPlatform;
use super::source::KernelSource;
use super::trace::{Trace, Traced};
use crate::addr::PAGE_SIZE;
use crate::memory::{Mapping, View};
use crate::sev::copy::CopyFacts;
use crate::sev::{
    Context, CopyRefusal, FirmwareError, GuestState, OwnerSession, PacketHeader, PdhCert, Platform,
    PlatformCerts, Policy, Session, SevError,
};

fn context(recorder: &Arc<Recorder>) -> KernelContext {
    context_of(recorder, VmKind::Default)
}

fn context_of(recorder: &Arc<Recorder>, kind: VmKind) -> KernelContext {
    let fd = std::fs::File::open("/dev/null").unwrap().into();
    KernelContext::new(Arc::new(Shared(Arc::clone(recorder))), fd, kind)
}

fn setup() -> (Arc<Recorder>, KernelContext, Arc<Mapping>) {
    let recorder = Arc::new(Recorder::default());
    let vm = context(&recorder);
    (recorder, vm, Mapping::memfd("t", 4 * PAGE_SIZE).unwrap())
}

/// Words of 32 bits as they lie in memory.
fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

fn op(id: u32, bytes: Vec<u8>, guest: Vec<u64>, read: Vec<Vec<u8>>) -> Seen {
    Seen { request: Request::EncryptOp, id, bytes, guest, read }
}

const fn errno(errno: i32) -> Answer {
    Answer { errno, firmware: 0, put: Vec::new(), write: Vec::new() }
}

fn session(fill: u8) -> Session {
    Session::from_bytes(&[fill; 128])
}

fn raw<T>(result: Result<T, SevError>) -> Option<i32> {
    result.err().and_then(|e| e.errno())
}

#[test]
fn a_launch_is_this_sequence_of_these_structures() {
    let (recorder, vm, memory) = setup();
    vm.init(false).unwrap();
    vm.register_region(&memory, PAGE_SIZE, 2 * PAGE_SIZE).unwrap();
    recorder.answer(Answer { put: vec![(0, words(&[9]))], ..Answer::default() });
    let owner = OwnerSession { dh_cert: PdhCert(vec![5; 2084]), session: session(6) };
    assert_eq!(vm.launch_start(Policy(0x0105_0001), Some(&owner)).unwrap(), 9);
    vm.launch_update_data(&memory, PAGE_SIZE, PAGE_SIZE).unwrap();
    vm.launch_update_vmsa().unwrap();
    let measured: Vec<u8> = (0..48).collect();
    recorder.answer(Answer { write: vec![measured.clone()], ..Answer::default() });
    assert_eq!(vm.launch_measure().unwrap().to_bytes()[..], measured);
    let header = PacketHeader { flags: 0, iv: [7; 16], mac: [8; 32] };
    vm.launch_secret(&header, &[4; 32], &memory, 16).unwrap();
    vm.launch_finish().unwrap();
    let status = Answer { put: vec![(0, words(&[9, 0x0105_0001, 3]))], ..Answer::default() };
    recorder.answer(status);
    let status = vm.guest_status().unwrap();
    assert_eq!((status.handle, status.policy.0, status.state), (9, 0x0105_0001, GuestState::Running));
    vm.unregister_region(&memory, PAGE_SIZE, 2 * PAGE_SIZE).unwrap();

    let at = memory.host_address(View::Guest);
    let region = |request| Seen {
        request,
        id: 0,
        bytes: [0u64.to_ne_bytes(), (2 * PAGE_SIZE).to_ne_bytes()].concat(),
        guest: vec![at + PAGE_SIZE],
        read: vec![],
    };
    let expected = [
        op(22, vec![0; 48], vec![], vec![]),
        region(Request::RegisterRegion),
        op(
            2,
            words(&[0, 0x0105_0001, 0, 0, 2084, 0, 0, 0, 128, 0]),
            vec![],
            vec![vec![5; 2084], vec![6; 128]],
        ),
        op(3, words(&[0, 0, 4096, 0]), vec![at + PAGE_SIZE], vec![]),
        op(4, vec![], vec![], vec![]),
        op(6, words(&[0, 0, 48, 0]), vec![], vec![]),
        op(
            5,
            words(&[0, 0, 52, 0, 0, 0, 32, 0, 0, 0, 32, 0]),
            vec![at + 16],
            vec![header.to_bytes().to_vec(), vec![4; 32]],
        ),
        op(7, vec![], vec![], vec![]),
        op(16, vec![0; 12], vec![], vec![]),
        region(Request::UnregisterRegion),
    ];
    assert_eq!(recorder.seen(), expected);
}

#[test]
fn an_attestation_is_this_structure_and_as_long_as_a_report() {
    let (recorder, vm, _) = setup();
    let nonce: [u8; 16] = std::array::from_fn(|i| i as u8);
    let report: Vec<u8> = (0..208).map(|i| i as u8).collect();
    recorder.answer(Answer { write: vec![report.clone()], ..Answer::default() });
    assert_eq!(vm.attestation(&nonce).unwrap()[..], report);
    // struct kvm_sev_attestation_report: mnonce, address, length, padding.
    let structure = [&nonce[..], &[0; 8], &words(&[208, 0])].concat();
    assert_eq!(recorder.seen(), [op(20, structure, vec![], vec![])]);
    // KVM puts the firmware's length into the structure.
    recorder.answer(Answer { put: vec![(24, words(&[207]))], ..Answer::default() });
    assert!(vm.attestation(&nonce).is_err());
    // A mirror is refused by the kernel (is_cmd_allowed_from_mirror); nothing here decides for it.
    recorder.answer(errno(libc::EINVAL));
    assert_eq!(raw(vm.attestation(&nonce)), Some(libc::EINVAL));
    recorder.answer(Answer { firmware: 2, ..errno(libc::EIO) });
    let refused = vm.attestation(&nonce).err().and_then(|e| e.firmware());
    assert_eq!(refused, Some(FirmwareError::InvalidGuestState));
}

#[test]
fn a_launch_without_an_owner_names_no_buffers() {
    let (recorder, vm, _) = setup();
    vm.launch_start(Policy(1), None).unwrap();
    let nothing = words(&[0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(recorder.seen(), [op(2, nothing, vec![], vec![vec![], vec![]])]);
}

#[test]
fn sending_and_receiving_are_these_structures() {
    let (recorder, vm, memory) = setup();
    let at = memory.host_address(View::Guest);
    let target = PlatformCerts { pdh: PdhCert(vec![1; 2084]), chain: vec![2; 6252], amd: vec![3; 100] };
    recorder.answer(Answer { put: vec![(0, words(&[9, 0x20, 3]))], ..Answer::default() });
    recorder.answer(Answer { write: vec![vec![0xab; 128]], ..Answer::default() });
    assert_eq!(vm.send_start(&target).unwrap(), session(0xab));
    let header = PacketHeader { flags: 0, iv: [4; 16], mac: [5; 32] };
    recorder.answer(Answer { write: vec![header.to_bytes().to_vec(), vec![6; 4096]], ..Answer::default() });
    assert_eq!(vm.send_update_data(&memory, PAGE_SIZE, PAGE_SIZE).unwrap(), (header, vec![6; 4096]));
    vm.send_finish().unwrap();
    vm.send_cancel().unwrap();
    let send_start = words(&[0x20, 0, 0, 0, 2084, 0, 0, 0, 6252, 0, 0, 0, 100, 0, 0, 0, 128, 0]);
    let update = words(&[0, 0, 52, 0, 0, 0, 4096, 0, 0, 0, 4096, 0]);
    let expected = [
        op(16, vec![0; 12], vec![], vec![]),
        op(8, send_start, vec![], vec![vec![1; 2084], vec![2; 6252], vec![3; 100]]),
        op(9, update.clone(), vec![at + PAGE_SIZE], vec![]),
        op(11, vec![], vec![], vec![]),
        op(21, vec![], vec![], vec![]),
    ];
    assert_eq!(recorder.seen(), expected);

    recorder.answer(Answer { put: vec![(0, words(&[12]))], ..Answer::default() });
    let handle = vm.receive_start(Policy(0x20), &target.pdh, &session(7), Some(9)).unwrap();
    assert_eq!(handle, 12);
    vm.receive_update_data(&header, &[8; 4096], &memory, 0).unwrap();
    vm.receive_finish().unwrap();
    let mut clear = [0; 40];
    recorder.answer(Answer { write: vec![vec![1; 40]], ..Answer::default() });
    vm.debug_decrypt(&memory, 3, &mut clear).unwrap();
    assert_eq!(clear, [1; 40]);
    let receive_start = words(&[9, 0x20, 0, 0, 2084, 0, 0, 0, 128, 0]);
    let expected = [
        op(12, receive_start, vec![], vec![vec![1; 2084], vec![7; 128]]),
        op(13, update, vec![at], vec![header.to_bytes().to_vec(), vec![8; 4096]]),
        op(15, vec![], vec![], vec![]),
        op(17, words(&[0, 0, 0, 0, 40, 0]), vec![at + 3], vec![]),
    ];
    assert_eq!(recorder.seen(), expected);
}

#[test]
fn init2_falls_back_where_the_kernel_knows_no_such_thing() {
    for (refused, es, legacy) in [(libc::EINVAL, false, 0), (libc::ENOTTY, false, 0), (libc::EINVAL, true, 1)]
    {
        let (recorder, vm, _) = setup();
        recorder.answer(errno(refused));
        vm.init(es).unwrap();
        let ids: Vec<u32> = recorder.seen().iter().map(|s| s.id).collect();
        assert_eq!(ids, [22, legacy]);
    }
    let (recorder, vm, _) = setup();
    recorder.answer(errno(libc::EBUSY));
    assert_eq!(raw(vm.init(false)), Some(libc::EBUSY));
    assert_eq!(recorder.seen().len(), 1, "no ASIDs are left whichever way one asks");
    recorder.answer(errno(libc::EINVAL));
    recorder.answer(errno(libc::ENOTTY));
    assert_eq!(raw(vm.init(false)), Some(libc::ENOTTY));
    recorder.seen();
    for (kind, es) in [(VmKind::Sev, true), (VmKind::SevEs, false)] {
        let vm = context_of(&recorder, kind);
        assert!(
            matches!(vm.init(es), Err(SevError::Unsupported { .. })),
            "no VM becomes less than asked for"
        );
        assert_eq!(recorder.seen(), []);
        vm.init(!es).unwrap();
        assert_eq!(recorder.seen().len(), 1);
    }
}

#[test]
fn answers_are_the_firmwares_where_it_gave_one() {
    let (recorder, vm, _) = setup();
    for code in FirmwareError::ALL {
        recorder.answer(Answer { firmware: code as u32, ..errno(libc::EIO) });
        assert_eq!(vm.launch_finish().unwrap_err().firmware(), Some(code));
    }
    // The firmware was not asked, or gave a status that is not in SEV's table.
    for firmware in [0, u32::MAX] {
        recorder.answer(Answer { firmware, ..errno(libc::ENOTTY) });
        assert_eq!(raw(vm.launch_finish()), Some(libc::ENOTTY));
    }
    recorder.answer(Answer { firmware: 0x27, ..errno(libc::EIO) });
    let SevError::Kernel { source, .. } = vm.launch_finish().unwrap_err() else {
        panic!("not the firmware's table")
    };
    assert!(source.to_string().contains("0x27"), "{source}");
    recorder.answer(Answer { put: vec![(0, words(&[1, 0, 99]))], ..Answer::default() });
    assert!(matches!(vm.guest_status(), Err(SevError::Malformed { .. })));
}

#[test]
fn signals_are_waited_out_but_not_for_ever() {
    let (recorder, vm, memory) = setup();
    for _ in 0..20 {
        recorder.answer(errno(libc::EINTR));
    }
    vm.launch_finish().unwrap();
    assert_eq!(recorder.seen().len(), 21);
    for _ in 0..1000 {
        recorder.answer(errno(libc::EINTR));
    }
    assert_eq!(raw(vm.register_region(&memory, 0, PAGE_SIZE)), Some(libc::EINTR));
    assert_eq!(recorder.seen().len(), 65);
}

#[test]
fn a_mirror_is_made_by_one_request_after_the_rules() {
    let recorder = Arc::new(Recorder::default());
    let (owner, mirror, third) = (context(&recorder), context(&recorder), context(&recorder));
    let copy = |to: &KernelContext, from: &KernelContext| match to.copy_from(&from.copy_source()) {
        Err(SevError::Copy(refusal)) => Some(refusal),
        Err(other) => panic!("{other}"),
        Ok(()) => None,
    };
    assert_eq!(copy(&mirror, &owner), Some(CopyRefusal::SourceNotEncrypted));
    owner.init(false).unwrap();
    recorder.seen();
    assert_eq!(copy(&owner, &owner), Some(CopyRefusal::Itself));
    third.note_vcpu();
    assert_eq!(copy(&third, &owner), Some(CopyRefusal::HasVcpus));
    let model = crate::sev::model::ModelPlatform::new().context().copy_source();
    assert!(matches!(mirror.copy_from(&model), Err(SevError::Copy(CopyRefusal::NotAVm))));
    assert_eq!(recorder.seen(), [], "no request for what the rules forbid");

    recorder.answer(errno(libc::EBUSY));
    recorder.answer(errno(libc::EINTR));
    assert_eq!(copy(&mirror, &owner), None);
    let crate::sev::CopySource::Kernel(source) = owner.copy_source() else { panic!("a kernel's") };
    let mut bytes = vec![0; 104];
    bytes[..4].copy_from_slice(&197u32.to_ne_bytes());
    bytes[8..16].copy_from_slice(&(source.raw_fd() as u64).to_ne_bytes());
    let request = Seen { request: Request::EnableCap, id: 0, bytes, guest: vec![], read: vec![] };
    assert_eq!(recorder.seen(), [request.clone(), request.clone(), request]);
    assert_eq!(copy(&context(&recorder), &mirror), Some(CopyRefusal::SourceIsMirror));
    assert_eq!(copy(&mirror, &owner), Some(CopyRefusal::AlreadyEncrypted));

    // What no kernel does for a mirror is not asked.
    let refused = mirror.receive_start(Policy(0), &PdhCert(vec![]), &session(0), Some(1));
    assert!(matches!(refused, Err(SevError::Unsupported { .. })));
    let refused = mirror.send_start(&PdhCert(vec![]).into());
    assert!(matches!(refused, Err(SevError::Unsupported { .. })));
    assert_eq!(recorder.seen(), []);

    let busy = context(&recorder);
    (0..1000).for_each(|_| recorder.answer(errno(libc::EBUSY)));
    assert_eq!(copy(&busy, &owner), Some(CopyRefusal::Busy));
    assert_eq!(recorder.seen().len(), 100);
    recorder.forget_answers();
    recorder.answer(errno(libc::EBADF));
    assert_eq!(copy(&busy, &owner), Some(CopyRefusal::NotAVm));
    recorder.answer(errno(libc::EINVAL));
    assert_eq!(raw(busy.copy_from(&owner.copy_source())), Some(libc::EINVAL));
}

#[test]
fn an_snp_guest_known_for_one_is_not_asked_for() {
    let Ok(kvm) = kvm_ioctls::Kvm::new() else { return };
    let Ok(vm) = kvm.create_vm() else { return };
    let dup = |fd: i32| {
        use std::os::fd::{FromRawFd, OwnedFd};
        #[expect(unsafe_code, reason = "UNSAFETY: a raw descriptor")]
        // SAFETY: dup's answer is ours alone.
        unsafe {
            OwnedFd::from_raw_fd(libc::dup(fd))
        }
    };
    use std::os::fd::AsRawFd;
    let facts = CopyFacts { encrypted: true, snp: true, ..CopyFacts::default() };
    let source = KernelSource::foreign(dup(vm.as_raw_fd()), facts).unwrap();
    let (recorder, mirror, _) = setup();
    let copied = mirror.copy_from(&crate::sev::CopySource::Kernel(Arc::new(source)));
    assert!(matches!(copied, Err(SevError::Copy(CopyRefusal::Snp))));
    assert_eq!(recorder.seen(), []);
    let vcpu = vm.create_vcpu(0).unwrap();
    for other in [vcpu.as_raw_fd(), kvm.as_raw_fd()] {
        assert_eq!(KernelSource::foreign(dup(other), facts).err(), Some(CopyRefusal::NotAVm));
    }
}

#[test]
fn what_the_kernel_cannot_do_is_refused_with_the_reason() {
    let (recorder, vm, memory) = setup();
    vm.init(true).unwrap();
    recorder.seen();
    let certs = PlatformCerts { pdh: PdhCert(vec![1]), chain: vec![2], amd: vec![3] };
    assert!(matches!(vm.send_start(&certs), Err(SevError::Unsupported { what: "SEND_START", .. })));
    let received = vm.receive_start(Policy(0), &certs.pdh, &session(0), None);
    assert!(matches!(received, Err(SevError::Unsupported { what: "RECEIVE_START", .. })));
    let plain = context(&recorder);
    assert!(matches!(plain.send_start(&certs.pdh.clone().into()), Err(SevError::Malformed { .. })));
    assert_eq!(raw(vm.launch_update_data(&memory, 0, 0)), Some(libc::EINVAL));
    assert_eq!(raw(vm.launch_update_data(&memory, 3 * PAGE_SIZE, PAGE_SIZE + 16)), Some(libc::EINVAL));
    assert_eq!(raw(vm.launch_update_data(&memory, u64::MAX, 16)), Some(libc::EINVAL));
    assert_eq!(raw(vm.send_update_data(&memory, PAGE_SIZE - 16, 32)), Some(libc::EINVAL));
    assert_eq!(raw(vm.send_update_data(&memory, 0, u64::from(u32::MAX))), Some(libc::EFAULT));
    assert_eq!(raw(vm.register_region(&memory, 0, 5 * PAGE_SIZE)), Some(libc::EINVAL));
    assert_eq!(raw(vm.debug_decrypt(&memory, 0, &mut [])), Some(libc::EINVAL));
    assert_eq!(recorder.seen(), []);
}

#[test]
fn the_platform_is_asked_by_packed_structures() {
    let recorder = Arc::new(Recorder::default());
    let platform = KernelPlatform::over(Arc::new(Shared(Arc::clone(&recorder))));
    let mut status = vec![1, 55, 2];
    status.extend(0x101u32.to_le_bytes());
    status.push(21);
    status.extend(3u32.to_le_bytes());
    recorder.answer(Answer { put: vec![(0, status)], ..Answer::default() });
    let status = platform.status().unwrap();
    assert_eq!((status.api, status.build, status.es, status.guests), ((1, 55), 21, true, 3));
    recorder.answer(Answer { write: vec![vec![1; 2084], vec![2; 6252]], ..Answer::default() });
    let certs = platform.certs().unwrap();
    assert_eq!((certs.pdh, certs.chain), (PdhCert(vec![1; 2084]), vec![2; 6252]));
    assert!(certs.amd.is_empty() && !platform.is_modelled());
    let mut export = vec![0; 24];
    export[8..12].copy_from_slice(&2084u32.to_le_bytes());
    export[20..24].copy_from_slice(&6252u32.to_le_bytes());
    let issue = |id, bytes| Seen { request: Request::IssueCmd, id, bytes, guest: vec![], read: vec![] };
    assert_eq!(recorder.seen(), [issue(1, vec![0; 12]), issue(5, export)]);
    recorder.answer(Answer { firmware: 1, ..errno(libc::EIO) });
    assert_eq!(platform.pdh().unwrap_err().firmware(), Some(FirmwareError::InvalidPlatformState));
    assert!(platform.context(std::io::stdin(), VmKind::Default).is_err(), "a recorder has no VMs");
}

#[test]
fn a_trace_has_what_reached_the_kernel_and_what_came_but_no_address_and_no_content() {
    let (recorder, trace) = (Arc::new(Recorder::default()), Arc::new(Trace::default()));
    let inner: Arc<dyn Ioctls> = Arc::new(Shared(Arc::clone(&recorder)));
    let traced = Arc::new(Traced { inner, trace: Arc::clone(&trace) });
    let vm = KernelContext::new(traced, std::fs::File::open("/dev/null").unwrap().into(), VmKind::Default);
    let memory = Mapping::memfd("t", 4 * PAGE_SIZE).unwrap();
    vm.init(false).unwrap();
    vm.register_region(&memory, 0, PAGE_SIZE).unwrap();
    let owner = OwnerSession { dh_cert: PdhCert(vec![7; 2084]), session: session(3) };
    recorder.answer(Answer { put: vec![(0, words(&[42]))], ..Answer::default() });
    assert_eq!(vm.launch_start(Policy(1), Some(&owner)).unwrap(), 42);
    recorder.answer(Answer { write: vec![vec![9; 48]], ..Answer::default() });
    vm.launch_measure().unwrap();
    recorder.answer(Answer { firmware: 2, ..errno(libc::EIO) });
    vm.launch_finish().unwrap_err();

    let (seen, issued) = (recorder.seen(), trace.issued());
    assert_eq!((seen.len(), issued.len()), (5, 5));
    for (seen, issued) in seen.iter().zip(&issued) {
        assert_eq!((issued.request, issued.command), (seen.request as u32, seen.id));
        assert_eq!(issued.before, seen.bytes, "{issued:?}");
    }
    // What the kernel wrote into the structure; not what it wrote elsewhere, nor what it read there.
    assert_eq!(issued[2].after[..4], 42u32.to_ne_bytes());
    let kept: Vec<u8> = issued.iter().flat_map(|i| [i.before.clone(), i.after.clone()].concat()).collect();
    assert!(!kept.windows(8).any(|w| w == [7; 8] || w == [3; 8] || w == [9; 8]));
    let answers: Vec<_> = issued.iter().map(|i| (i.errno, i.firmware)).collect();
    assert_eq!(answers, [(0, 0), (0, 0), (0, 0), (0, 0), (libc::EIO, 2)]);
}
