//! A VM's SEV commands in the model, each with the checks that KVM makes before it asks the firmware.

use std::io;
use std::sync::Arc;

use mirrorvm_abi::evidence::{MNONCE_BYTES, REPORT_BYTES};

use super::ModelContext;
use super::context::{By, Sev};
use super::firmware::Span;
use crate::addr::PAGE_SIZE;
use crate::memory::Mapping;
use crate::sev::{
    Context, CopyRefusal, CopySource, GuestStatus, Measurement, OwnerSession, PacketHeader, PdhCert,
    PlatformCerts, Policy, Session, SevError,
};

pub(super) fn refused(command: &'static str, errno: i32) -> SevError {
    SevError::Kernel { command, source: io::Error::from_raw_os_error(errno) }
}

/// A span of guest memory as KVM finds it: not empty, all of it mapped.
fn span<'a>(command: &'static str, memory: &'a Mapping, offset: u64, len: u64) -> Result<Span<'a>, SevError> {
    let end = offset.checked_add(len).filter(|_| len != 0).ok_or_else(|| refused(command, libc::EINVAL))?;
    if end > memory.len() {
        return Err(refused(command, libc::EFAULT));
    }
    Ok(Span { memory, offset, len })
}

/// What SEND_UPDATE_DATA and RECEIVE_UPDATE_DATA take in KVM: part of one page.
fn page_span<'a>(
    command: &'static str,
    memory: &'a Mapping,
    offset: u64,
    len: u64,
) -> Result<Span<'a>, SevError> {
    let span = span(command, memory, offset, len)?;
    if offset % PAGE_SIZE + len > PAGE_SIZE {
        return Err(refused(command, libc::EINVAL));
    }
    Ok(span)
}

impl Context for ModelContext {
    fn init(&self, es: bool) -> Result<(), SevError> {
        const COMMAND: &str = "KVM_SEV_INIT2";
        let mut vm = self.vm();
        if vm.vcpus != 0 || vm.sev.is_some() {
            return Err(refused(COMMAND, libc::EINVAL));
        }
        let asid = self.platform.lock().asids.take(es).ok_or_else(|| refused(COMMAND, libc::EBUSY))?;
        vm.sev = Some(Sev::new(asid, es));
        Ok(())
    }

    fn register_region(&self, memory: &Arc<Mapping>, offset: u64, len: u64) -> Result<(), SevError> {
        const COMMAND: &str = "KVM_MEMORY_ENCRYPT_REG_REGION";
        let mut begun = self.begin(COMMAND, By::Owner)?;
        span(COMMAND, memory, offset, len)?;
        if let Some(sev) = &mut begun.vm.sev {
            sev.regions.add(memory, offset, len);
        }
        Ok(())
    }

    fn unregister_region(&self, memory: &Arc<Mapping>, offset: u64, len: u64) -> Result<(), SevError> {
        const COMMAND: &str = "KVM_MEMORY_ENCRYPT_UNREG_REGION";
        let mut begun = self.begin(COMMAND, By::Owner)?;
        let removed = begun.vm.sev.as_mut().is_some_and(|sev| sev.regions.remove(memory, offset, len));
        if removed { Ok(()) } else { Err(refused(COMMAND, libc::EINVAL)) }
    }

    fn launch_start(&self, policy: Policy, owner: Option<&OwnerSession>) -> Result<u32, SevError> {
        const COMMAND: &str = "LAUNCH_START";
        let begun = self.begin(COMMAND, By::Owner)?;
        let handle = self.platform.command(COMMAND, |f| f.launch_start(policy, owner))?;
        self.bind(COMMAND, begun, handle)
    }

    fn launch_update_data(&self, memory: &Mapping, offset: u64, len: u64) -> Result<(), SevError> {
        const COMMAND: &str = "LAUNCH_UPDATE_DATA";
        let begun = self.begin(COMMAND, By::Owner)?;
        let span = span(COMMAND, memory, offset, len)?;
        self.platform.command(COMMAND, |f| f.launch_update_data(begun.handle, span))
    }

    fn launch_update_vmsa(&self) -> Result<(), SevError> {
        const COMMAND: &str = "LAUNCH_UPDATE_VMSA";
        // Asked before the VM is locked: whoever answers may hold a lock that he also creates vCPUs under.
        let areas = self.areas();
        let mut begun = self.begin(COMMAND, By::Anyone)?;
        if !begun.vm.sev.as_ref().is_some_and(|s| s.es) {
            return Err(refused(COMMAND, libc::ENOTTY));
        }
        for (memory, offset) in &areas {
            let at = memory.modelled_physical() + offset;
            if begun.vm.protected.contains(&at) {
                // KVM does not do this twice for a vCPU.
                return Err(refused(COMMAND, libc::EINVAL));
            }
            let span = span(COMMAND, memory, *offset, PAGE_SIZE)?;
            self.platform.command(COMMAND, |f| f.launch_update_vmsa(begun.handle, span))?;
            begun.vm.protected.push(at);
        }
        Ok(())
    }

    fn save_areas(&self) -> Vec<(Arc<Mapping>, u64)> {
        self.areas()
    }

    fn launch_measure(&self) -> Result<Measurement, SevError> {
        const COMMAND: &str = "LAUNCH_MEASURE";
        let begun = self.begin(COMMAND, By::Owner)?;
        self.platform.command(COMMAND, |f| f.launch_measure(begun.handle))
    }

    fn launch_secret(
        &self,
        header: &PacketHeader,
        packet: &[u8],
        memory: &Mapping,
        offset: u64,
    ) -> Result<(), SevError> {
        const COMMAND: &str = "LAUNCH_SECRET";
        let begun = self.begin(COMMAND, By::Owner)?;
        let span = span(COMMAND, memory, offset, packet.len() as u64)?;
        self.platform.command(COMMAND, |f| f.launch_secret(begun.handle, header, packet, span))
    }

    fn launch_finish(&self) -> Result<(), SevError> {
        const COMMAND: &str = "LAUNCH_FINISH";
        let begun = self.begin(COMMAND, By::Owner)?;
        self.platform.command(COMMAND, |f| f.launch_finish(begun.handle))
    }

    fn guest_status(&self) -> Result<GuestStatus, SevError> {
        const COMMAND: &str = "GUEST_STATUS";
        let begun = self.begin(COMMAND, By::Anyone)?;
        self.platform.command(COMMAND, |f| f.guest_status(begun.handle))
    }

    fn attestation(&self, mnonce: &[u8; MNONCE_BYTES]) -> Result<[u8; REPORT_BYTES], SevError> {
        const COMMAND: &str = "ATTESTATION";
        let begun = self.begin(COMMAND, By::Owner)?;
        self.platform.command(COMMAND, |f| f.attestation(begun.handle, mnonce))
    }

    fn copy_from(&self, source: &CopySource) -> Result<(), SevError> {
        match source {
            CopySource::Model(source) => self.copy_from_model(source),
            CopySource::Kernel(_) => Err(CopyRefusal::NotAVm),
        }
        .map_err(SevError::Copy)
    }

    fn copy_source(&self) -> CopySource {
        CopySource::Model(self.shared())
    }

    fn send_start(&self, target: &PlatformCerts) -> Result<Session, SevError> {
        const COMMAND: &str = "SEND_START";
        let begun = self.begin(COMMAND, By::Owner)?;
        self.platform.command(COMMAND, |f| f.send_start(begun.handle, &target.pdh))
    }

    fn send_update_data(
        &self,
        memory: &Mapping,
        offset: u64,
        len: u64,
    ) -> Result<(PacketHeader, Vec<u8>), SevError> {
        const COMMAND: &str = "SEND_UPDATE_DATA";
        let begun = self.begin(COMMAND, By::Owner)?;
        let span = page_span(COMMAND, memory, offset, len)?;
        self.platform.command(COMMAND, |f| f.send_update_data(begun.handle, span))
    }

    fn send_finish(&self) -> Result<(), SevError> {
        const COMMAND: &str = "SEND_FINISH";
        let begun = self.begin(COMMAND, By::Owner)?;
        self.platform.command(COMMAND, |f| f.send_finish(begun.handle))
    }

    fn send_cancel(&self) -> Result<(), SevError> {
        const COMMAND: &str = "SEND_CANCEL";
        let begun = self.begin(COMMAND, By::Owner)?;
        self.platform.command(COMMAND, |f| f.send_cancel(begun.handle))
    }

    fn receive_start(
        &self,
        policy: Policy,
        origin: &PdhCert,
        session: &Session,
        share: Option<u32>,
    ) -> Result<u32, SevError> {
        const COMMAND: &str = "RECEIVE_START";
        let begun = self.begin(COMMAND, By::Owner)?;
        let handle = self.platform.command(COMMAND, |f| f.receive_start(policy, origin, session, share))?;
        self.bind(COMMAND, begun, handle)
    }

    fn receive_update_data(
        &self,
        header: &PacketHeader,
        packet: &[u8],
        memory: &Mapping,
        offset: u64,
    ) -> Result<(), SevError> {
        const COMMAND: &str = "RECEIVE_UPDATE_DATA";
        let begun = self.begin(COMMAND, By::Owner)?;
        let span = page_span(COMMAND, memory, offset, packet.len() as u64)?;
        self.platform.command(COMMAND, |f| f.receive_update_data(begun.handle, header, packet, span))
    }

    fn receive_finish(&self) -> Result<(), SevError> {
        const COMMAND: &str = "RECEIVE_FINISH";
        let begun = self.begin(COMMAND, By::Owner)?;
        self.platform.command(COMMAND, |f| f.receive_finish(begun.handle))
    }

    fn debug_decrypt(&self, memory: &Mapping, offset: u64, to: &mut [u8]) -> Result<(), SevError> {
        const COMMAND: &str = "DBG_DECRYPT";
        let begun = self.begin(COMMAND, By::Anyone)?;
        let span = span(COMMAND, memory, offset, to.len() as u64)?;
        self.platform.command(COMMAND, |f| f.debug_decrypt(begun.handle, span, to))
    }
}
