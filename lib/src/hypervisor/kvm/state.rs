//! A vCPU's registers as a value that travels.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::hypervisor::HypervisorError;

/// MSRs that a guest without interrupt controller can have changed (AMD APM vol. 2, appendix A): TSC,
/// SYSENTER_*, PAT, STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE. EFER and the segment bases are in `sregs`.
const MSRS: [u32; 10] =
    [0x10, 0x174, 0x175, 0x176, 0x277, 0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102];

/// Everything that KVM holds of a vCPU here.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    msrs: Vec<(u32, u64)>,
}

impl VcpuState {
    pub fn read(fd: &VcpuFd) -> Result<Self, HypervisorError> {
        let k = HypervisorError::kernel;
        Ok(Self {
            regs: fd.get_regs().map_err(k("KVM_GET_REGS"))?,
            sregs: fd.get_sregs().map_err(k("KVM_GET_SREGS"))?,
            xsave: fd.get_xsave().map_err(k("KVM_GET_XSAVE"))?,
            xcrs: fd.get_xcrs().map_err(k("KVM_GET_XCRS"))?,
            debug: fd.get_debug_regs().map_err(k("KVM_GET_DEBUGREGS"))?,
            events: fd.get_vcpu_events().map_err(k("KVM_GET_VCPU_EVENTS"))?,
            msrs: read_msrs(fd)?,
        })
    }

    #[expect(unsafe_code, reason = "UNSAFETY: KVM_SET_XSAVE reads a struct whose size the kernel decides")]
    pub fn write(&self, fd: &VcpuFd) -> Result<(), HypervisorError> {
        let k = HypervisorError::kernel;
        fd.set_xcrs(&self.xcrs).map_err(k("KVM_SET_XCRS"))?;
        // SAFETY: KVM_SET_XSAVE reads at most KVM_CAP_XSAVE2 bytes, more than `kvm_xsave` only for a process
        // that asked for AMX by arch_prctl; this one never does (api.rst, 4.43).
        unsafe { fd.set_xsave(&self.xsave) }.map_err(k("KVM_SET_XSAVE"))?;
        fd.set_sregs(&self.sregs).map_err(k("KVM_SET_SREGS"))?;
        fd.set_regs(&self.regs).map_err(k("KVM_SET_REGS"))?;
        write_msrs(fd, &self.msrs)?;
        fd.set_debug_regs(&self.debug).map_err(k("KVM_SET_DEBUGREGS"))?;
        fd.set_vcpu_events(&self.events).map_err(k("KVM_SET_VCPU_EVENTS"))
    }
}

/// One by one: the kernel stops a list at the first MSR that it does not have.
fn read_msrs(fd: &VcpuFd) -> Result<Vec<(u32, u64)>, HypervisorError> {
    let mut found = Vec::new();
    for index in MSRS {
        let mut list = one(index, 0);
        let got = fd.get_msrs(&mut list).map_err(HypervisorError::kernel("KVM_GET_MSRS"))?;
        if got == 1 {
            found.push((index, list.as_slice()[0].data));
        }
    }
    Ok(found)
}

fn write_msrs(fd: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), HypervisorError> {
    // Only those that we read ourselves: a peer's bytes do not choose MSRs.
    for (index, data) in msrs.iter().filter(|(i, _)| MSRS.contains(i)) {
        fd.set_msrs(&one(*index, *data)).map_err(HypervisorError::kernel("KVM_SET_MSRS"))?;
    }
    Ok(())
}

fn one(index: u32, data: u64) -> Msrs {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    Msrs::from_entries(&[entry]).expect("one entry fits")
}
