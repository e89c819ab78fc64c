//! One VM's encryption context in the kernel.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mirrorvm_abi::evidence::{MNONCE_BYTES, REPORT_BYTES};

use kvm_bindings::{KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, kvm_enable_cap, kvm_enc_region, kvm_sev_guest_status};

use super::call::{Call, Plain, Span, plain, run, try_run};
use super::ioctls::Ioctls;
use super::source::{KernelSource, Known};
use crate::addr::PAGE_SIZE;
use crate::memory::{Mapping, View};
use crate::sev::copy::check;
use crate::sev::{
    Context, CopyRefusal, CopySource, GuestState, GuestStatus, HEADER_BYTES, MEASUREMENT_BYTES, Measurement,
    OwnerSession, PacketHeader, PdhCert, PlatformCerts, Policy, SESSION_BYTES, Session, SevError,
};

/// How often a copy that met another is tried again.
const COPY_TRIES: usize = 100;

/// What one LAUNCH_UPDATE_DATA takes here: the kernel pins all of it at once. The measurement does not see
/// the cuts.
const LAUNCH_CHUNK: u64 = 64 << 20;

const COPY: &str = "KVM_CAP_VM_COPY_ENC_CONTEXT_FROM";

/// What a VM was made as (KVM_CREATE_VM's argument).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmKind {
    /// KVM_X86_DEFAULT_VM: KVM_SEV_INIT or KVM_SEV_ES_INIT tells which it becomes.
    Default,
    /// KVM_X86_SEV_VM: for KVM_SEV_INIT2.
    Sev,
    /// KVM_X86_SEV_ES_VM: for KVM_SEV_INIT2.
    SevEs,
}

/// A VM's context in the kernel. Written by the kernel's documents and tested against a recorder; it has
/// never run on hardware with SEV.
pub struct KernelContext {
    ioctls: Arc<dyn Ioctls>,
    source: Arc<KernelSource>,
    known: Arc<Known>,
    kind: VmKind,
    es: AtomicBool,
}

impl std::fmt::Debug for KernelContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelContext").field("source", &self.source).finish_non_exhaustive()
    }
}

impl KernelContext {
    /// `vm` is a duplicate of the VM's descriptor.
    pub(super) fn new(ioctls: Arc<dyn Ioctls>, vm: OwnedFd, kind: VmKind) -> Self {
        let known = Arc::new(Known::default());
        let source = Arc::new(KernelSource::own(vm, Arc::clone(&known)));
        Self { ioctls, source, known, kind, es: AtomicBool::new(false) }
    }

    /// A vCPU was created in the VM: it can be neither initialized for SEV nor made a mirror any more.
    pub fn note_vcpu(&self) {
        self.known.has_vcpus.store(true, Ordering::Release);
    }

    fn run(&self, call: Call<'_>) -> Result<(), SevError> {
        run(&*self.ioctls, call)
    }

    /// What no kernel does for a mirror, whatever is asked.
    fn not_for_mirrors(&self, what: &'static str) -> Result<(), SevError> {
        if self.known.facts().mirror {
            let why =
                "KVM lets a mirror give LAUNCH_UPDATE_VMSA, GUEST_STATUS, DBG_DECRYPT and DBG_ENCRYPT alone";
            return Err(SevError::Unsupported { what, why });
        }
        Ok(())
    }

    /// KVM has no SEND_UPDATE_VMSA and no RECEIVE_UPDATE_VMSA: an SEV-ES guest's vCPUs could not come along.
    fn not_for_es(&self, what: &'static str) -> Result<(), SevError> {
        if self.es.load(Ordering::Acquire) {
            let why = "KVM moves no save areas (SEND_UPDATE_VMSA, RECEIVE_UPDATE_VMSA) of SEV-ES guests";
            return Err(SevError::Unsupported { what, why });
        }
        Ok(())
    }

    /// Part of one page, as KVM takes it; checked here so that the buffers beside it are small.
    fn page_span<'a>(
        command: &'static str,
        memory: &'a Mapping,
        offset: u64,
        len: u64,
    ) -> Result<Span<'a>, SevError> {
        let span = Span::new(command, memory, offset, len)?;
        if offset % PAGE_SIZE + len > PAGE_SIZE {
            return Err(SevError::Kernel { command, source: io::Error::from_raw_os_error(libc::EINVAL) });
        }
        Ok(span)
    }

    fn region(
        command: &'static str,
        memory: &Mapping,
        offset: u64,
        len: u64,
    ) -> Result<kvm_enc_region, SevError> {
        let end = offset.checked_add(len).filter(|end| len != 0 && *end <= memory.len());
        end.ok_or_else(|| SevError::Kernel { command, source: io::Error::from_raw_os_error(libc::EINVAL) })?;
        Ok(kvm_enc_region { addr: memory.host_address(View::Guest) + offset, size: len })
    }
}

/// The firmware's number, which KVM passes on as it is: amd-memory-encryption.rst lists 4 as receiving and 5
/// as sending, the SEV API and QEMU the other way round. The firmware's order is taken; no hardware has
/// confirmed it here.
fn state(number: u32) -> Option<GuestState> {
    Some(match number {
        0 => GuestState::Invalid,
        1 => GuestState::Launching,
        2 => GuestState::Secret,
        3 => GuestState::Running,
        4 => GuestState::Sending,
        5 => GuestState::Receiving,
        6 => GuestState::Sent,
        _ => return None,
    })
}

impl Context for KernelContext {
    fn init(&self, es: bool) -> Result<(), SevError> {
        // INIT2 makes of a VM what its kind says: a guest that is to be SEV-ES must not become less.
        if matches!((self.kind, es), (VmKind::Sev, true) | (VmKind::SevEs, false)) {
            let why = "the VM was made as the other kind of SEV VM";
            return Err(SevError::Unsupported { what: "this kind of SEV", why });
        }
        // It asks for a VM that was made as an SEV VM, and for Linux 6.10. Others answer EINVAL or ENOTTY.
        let answer = try_run(&*self.ioctls, Call::Init2).or_else(|failure| {
            let legacy = matches!(failure.errno.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY));
            if !legacy {
                return Err(failure.explain(Call::Init2.name()));
            }
            self.run(if es { Call::EsInit } else { Call::Init })
        });
        answer?;
        self.es.store(es, Ordering::Release);
        self.known.encrypted.store(true, Ordering::Release);
        Ok(())
    }

    fn register_region(&self, memory: &Arc<Mapping>, offset: u64, len: u64) -> Result<(), SevError> {
        const COMMAND: &str = "KVM_MEMORY_ENCRYPT_REG_REGION";
        let region = Self::region(COMMAND, memory, offset, len)?;
        plain(&*self.ioctls, Plain::Register(&region))
            .map_err(|source| SevError::Kernel { command: COMMAND, source })
    }

    fn unregister_region(&self, memory: &Arc<Mapping>, offset: u64, len: u64) -> Result<(), SevError> {
        const COMMAND: &str = "KVM_MEMORY_ENCRYPT_UNREG_REGION";
        let region = Self::region(COMMAND, memory, offset, len)?;
        plain(&*self.ioctls, Plain::Unregister(&region))
            .map_err(|source| SevError::Kernel { command: COMMAND, source })
    }

    fn launch_start(&self, policy: Policy, owner: Option<&OwnerSession>) -> Result<u32, SevError> {
        let session = owner.map(|o| o.session.to_bytes());
        let owner = owner.zip(session.as_ref()).map(|(o, session)| (&o.dh_cert.0[..], session));
        let mut handle = 0;
        self.run(Call::LaunchStart { policy, owner, handle: &mut handle })?;
        Ok(handle)
    }

    fn launch_update_data(&self, memory: &Mapping, offset: u64, len: u64) -> Result<(), SevError> {
        const COMMAND: &str = "LAUNCH_UPDATE_DATA";
        // The whole span, before the first part of it changes anything.
        let end = offset.checked_add(len).filter(|end| len != 0 && *end <= memory.len());
        let end = end.ok_or_else(|| SevError::Kernel {
            command: COMMAND,
            source: io::Error::from_raw_os_error(libc::EINVAL),
        })?;
        let mut at = offset;
        while at < end {
            let part = (end - at).min(LAUNCH_CHUNK);
            self.run(Call::LaunchUpdateData { at: Span::new(COMMAND, memory, at, part)? })?;
            at += part;
        }
        Ok(())
    }

    fn launch_update_vmsa(&self) -> Result<(), SevError> {
        self.run(Call::LaunchUpdateVmsa)
    }

    fn launch_measure(&self) -> Result<Measurement, SevError> {
        let mut to = [0; MEASUREMENT_BYTES];
        self.run(Call::LaunchMeasure { to: &mut to })?;
        Ok(Measurement::from_bytes(&to))
    }

    fn launch_secret(
        &self,
        header: &PacketHeader,
        packet: &[u8],
        memory: &Mapping,
        offset: u64,
    ) -> Result<(), SevError> {
        let at = Span::new("LAUNCH_SECRET", memory, offset, packet.len() as u64)?;
        self.run(Call::LaunchSecret { header: &header.to_bytes(), packet, at })
    }

    fn launch_finish(&self) -> Result<(), SevError> {
        self.run(Call::LaunchFinish)
    }

    fn guest_status(&self) -> Result<GuestStatus, SevError> {
        let mut status = kvm_sev_guest_status::default();
        self.run(Call::GuestStatus { to: &mut status })?;
        let why = "its state is none of the firmware's";
        let state = state(status.state).ok_or(SevError::Malformed { what: "guest status", why })?;
        Ok(GuestStatus { handle: status.handle, policy: Policy(status.policy), state })
    }

    fn attestation(&self, mnonce: &[u8; MNONCE_BYTES]) -> Result<[u8; REPORT_BYTES], SevError> {
        let mut to = [0; REPORT_BYTES];
        self.run(Call::Attestation { mnonce, to: &mut to })?;
        Ok(to)
    }

    fn copy_from(&self, source: &CopySource) -> Result<(), SevError> {
        let CopySource::Kernel(source) = source else { return Err(SevError::Copy(CopyRefusal::NotAVm)) };
        if Arc::ptr_eq(source.known(), &self.known) {
            return Err(SevError::Copy(CopyRefusal::Itself));
        }
        check(self.known.facts(), source.known().facts()).map_err(SevError::Copy)?;
        let mut cap = kvm_enable_cap { cap: KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, ..Default::default() };
        // An unsigned descriptor; open, so not negative.
        cap.args[0] = u64::from(source.raw_fd().cast_unsigned());
        let mut answer = plain(&*self.ioctls, Plain::EnableCap(&cap));
        for _ in 1..COPY_TRIES {
            match &answer {
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    std::thread::yield_now();
                    answer = plain(&*self.ioctls, Plain::EnableCap(&cap));
                }
                _ => break,
            }
        }
        answer.map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => SevError::Copy(CopyRefusal::Busy),
            Some(libc::EBADF) => SevError::Copy(CopyRefusal::NotAVm),
            _ => SevError::Kernel { command: COPY, source: e },
        })?;
        self.known.mirror.store(true, Ordering::Release);
        self.known.encrypted.store(true, Ordering::Release);
        Ok(())
    }

    fn copy_source(&self) -> CopySource {
        CopySource::Kernel(Arc::clone(&self.source))
    }

    fn send_start(&self, target: &PlatformCerts) -> Result<Session, SevError> {
        self.not_for_mirrors("SEND_START")?;
        self.not_for_es("SEND_START")?;
        if target.chain.is_empty() || target.amd.is_empty() {
            let why =
                "the firmware wants the platform's chain and AMD's certificates, and they are not all given";
            return Err(SevError::Malformed { what: "target's certificates", why });
        }
        // The firmware has the policy; what the structure says of it is not used (SEV API, SEND_START).
        let policy = self.guest_status()?.policy;
        let mut session = [0; SESSION_BYTES];
        self.run(Call::SendStart { policy, target, session: &mut session })?;
        Ok(Session::from_bytes(&session))
    }

    fn send_update_data(
        &self,
        memory: &Mapping,
        offset: u64,
        len: u64,
    ) -> Result<(PacketHeader, Vec<u8>), SevError> {
        let at = Self::page_span("SEND_UPDATE_DATA", memory, offset, len)?;
        let (mut header, mut packet) = ([0; HEADER_BYTES], vec![0; len as usize]);
        self.run(Call::SendUpdateData { at, header: &mut header, packet: &mut packet })?;
        Ok((PacketHeader::from_bytes(&header), packet))
    }

    fn send_finish(&self) -> Result<(), SevError> {
        self.run(Call::SendFinish)
    }

    fn send_cancel(&self) -> Result<(), SevError> {
        self.run(Call::SendCancel)
    }

    fn receive_start(
        &self,
        policy: Policy,
        origin: &PdhCert,
        session: &Session,
        share: Option<u32>,
    ) -> Result<u32, SevError> {
        self.not_for_mirrors("RECEIVE_START")?;
        self.not_for_es("RECEIVE_START")?;
        let mut handle = share.unwrap_or(0);
        let session = session.to_bytes();
        self.run(Call::ReceiveStart { policy, origin: &origin.0, session: &session, handle: &mut handle })?;
        Ok(handle)
    }

    fn receive_update_data(
        &self,
        header: &PacketHeader,
        packet: &[u8],
        memory: &Mapping,
        offset: u64,
    ) -> Result<(), SevError> {
        let at = Self::page_span("RECEIVE_UPDATE_DATA", memory, offset, packet.len() as u64)?;
        self.run(Call::ReceiveUpdateData { header: &header.to_bytes(), packet, at })
    }

    fn receive_finish(&self) -> Result<(), SevError> {
        self.run(Call::ReceiveFinish)
    }

    fn debug_decrypt(&self, memory: &Mapping, offset: u64, to: &mut [u8]) -> Result<(), SevError> {
        let at = Span::new("DBG_DECRYPT", memory, offset, to.len() as u64)?;
        self.run(Call::DebugDecrypt { at, to })
    }
}
